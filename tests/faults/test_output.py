"""Output that cannot be shown ends no command: it is dropped, and the work is done."""

import logging
import os
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lora_tuner.server.runner import MODEL_LIBRARIES

from .. import adapter_files
from ..parameters import sampled
from .injected_signals import dropped
from .runs import ADAPTER, HARD, outcome

ROOT = Path(__file__).parents[2]
KINDS = ["reader gone", "closed terminal", "full disk", "closed"]
slow = pytest.mark.slow


@pytest.fixture
def library(tmp_path):
    adapter_files.write(tmp_path / ADAPTER, facts=adapter_files.manifest())
    return ["--adapters-dir", tmp_path / "adapters"]


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=slow) for kind in KINDS[1:])])
def test_run_goes_on_without_stderr(run, arguments, whole, kind):
    ended = run(*arguments, *HARD, "--eval-every", "3", before=partial(dropped, kind, 2))
    assert (ended.status, ended.out.splitlines()[0].split()[0]) == (0, str(ADAPTER))
    assert outcome(ADAPTER)[0] == whole(*HARD, "--eval-every", "3")[0]


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=slow) for kind in KINDS[1:])])
def test_sweep_goes_on_without_output(run, arguments, kind):
    ended = run(*arguments, "--rank", "2,4", "--max-steps", "1", before=partial(dropped, kind, 1, 2))
    assert ended.status == (1 if kind == "full disk" else 0)
    assert {path.name for path in Path("adapters").iterdir()} == {"reviews-r2", "reviews-r4"}
    assert Path("runs/reviews.sweep/sweep.json").is_file()


@pytest.mark.parametrize("kind", KINDS)
def test_unshown_output_keeps_exit_status(run, library, kind):
    assert run("adapters", "list", *library, before=partial(dropped, kind, 2)).status == 0
    ended = run("adapters", "show", "none", *library, before=partial(dropped, kind, 2))
    assert (ended.status, ended.out, ended.err) == (1, "", "")
    ended = run("adapters", "list", *library, before=partial(dropped, kind, 1))
    if kind == "full disk":
        assert (ended.status, ended.line) == (
            1,
            "Error: stdout: No space left on device: free some space and try again.",
        )
    else:
        assert (ended.status, ended.out) == (0, "")


@pytest.mark.parametrize("kind", ["reader gone", "closed"])
def test_merges_go_on_without_stdout(world, tmp_path, start, kind):
    ended = start(
        "merge", "one", "two", "--adapters-dir", world / "adapters", "--out", "both", before=partial(dropped, kind, 1, 2)
    ).end()  # fmt: skip
    assert ended.status == 0
    assert (tmp_path / "both/two/model.safetensors").is_file()


def test_generation_ends_when_nobody_reads(world, start, tmp_path):
    (tmp_path / "prompts.txt").write_text("Acting\n" * 1000)
    generate = ("generate", "--adapter", "one", "--adapters-dir", world / "adapters", "--max-new-tokens", "2")
    ended = start(*generate, "--file", "prompts.txt", before=partial(dropped, "reader gone", 1)).end()
    assert (ended.status, ended.err) == (1, "")
    ended = start(*generate, "Acting", before=partial(dropped, "full disk", 1)).end()
    assert ended.line == "Error: stdout: No space left on device: free some space and try again."
    assert start(*generate, before=partial(dropped, "closed", 0, 1, 2)).end().status == 0


def test_closed_streams_mix_no_output(library, tmp_path):
    def shell(redirection, *words):
        command = [sys.executable, str(ROOT / "cli.py"), *map(str, words), *map(str, library)]
        done = subprocess.run(
            ["sh", "-c", f'"$@" {redirection}', "sh", *command], capture_output=True, text=True, timeout=60, check=False,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    assert shell("2>&-", "adapters", "show", "none") == (1, "", "")
    assert shell(">&-", "adapters", "list", "--json") == (0, "", "")
    assert shell("<&- >&- 2>&-", "adapters", "list") == (0, "", "")


def advising() -> None:
    """Make every library of models give advice while a base is loaded."""
    from lora_tuner.models import loading

    real = loading.load_base

    def load_base(*arguments: Any, **options: Any) -> Any:
        for name in MODEL_LIBRARIES:
            logging.getLogger(f"{name}.any").warning("We strongly recommend it")
        warnings.warn("It is deprecated", FutureWarning, stacklevel=1)
        return real(*arguments, **options)

    setattr(loading, "load_base", load_base)  # noqa: B010


@pytest.mark.parametrize(
    "words", sampled([["generate", "--adapter", "one", "Acting"], ["merge", "one", "--out", "merged"]], 2)
)
def test_advice_of_libraries_is_not_shown(world, start, words):
    ended = start(*words, "--adapters-dir", world / "adapters", before=advising).end()
    assert ended.status == 0
    assert "recommend" not in ended.err
    assert "deprecated" not in ended.err


def test_full_pipe_that_never_blocks_waits(library):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.write(writer, b"." * 65536)
    command = [sys.executable, ROOT / "cli.py", "adapters", "show", "reviews", "--json", *library]
    process = subprocess.Popen(command, stdout=writer, env=os.environ | {"PYTHONPATH": str(ROOT)})
    os.close(writer)
    time.sleep(1.5)
    with open(reader, "rb") as file:
        assert file.read().strip(b".\n").endswith(b"}")
    assert process.wait(60) == 0
