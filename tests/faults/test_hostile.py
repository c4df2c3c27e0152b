"""Adapters of strangers: every command that opens one, and what is wrong with them, by hand and by chance."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_tuner import Generator, ModelOptions
from lora_tuner.config import SamplingParams
from lora_tuner.errors import LoraTunerError

from .. import tiny_models
from . import hostile_adapters
from .hostile_adapters import BY_HAND, NAME, Stranger
from .process import Command

MEMORY = 200_000_000  # bytes that a stranger may cost more than a good one does
SECONDS = 5.0  # of the processor
HANGS = 20.0  # seconds by the clock
PROMPT = ["the actor", "--greedy", "--max-new-tokens", "3"]
ROWS = ["--eval-dataset", "rows.txt", "--eval-rows", "2"]
ODD = f"x{hostile_adapters.ESCAPE}"  # the name of a folder
LONG = 1_500_000  # characters of what it says that are kept
BASE = ["--base", "base"]
CHEAP: dict[str, list[str]] = {
    "list": ["adapters", "list"],
    "list --json": ["adapters", "list", "--json"],
    "show": ["adapters", "show", NAME],
    "show --json": ["adapters", "show", NAME, "--json"],
    "verify": ["adapters", "verify", NAME],
    "check vllm": ["adapters", "check", NAME, "--for", "vllm"],
    "check llama.cpp": ["adapters", "check", NAME, "--for", "llama.cpp"],
    "check peft": ["adapters", "check", NAME, "--for", "peft"],
    "adopt": ["adapters", "adopt", f"adapters/{NAME}", "--adapters-dir", "other", *BASE],
    "rename": ["adapters", "rename", NAME, "renamed"],
    "push": ["push", NAME, "me/mine", "--dry-run"],
}
ON_A_BASE: dict[str, list[str]] = {
    "generate": ["generate", *PROMPT, "--adapter", NAME, *BASE],
    "compare": ["compare", *PROMPT, "--adapter", NAME, *BASE],
    "evaluate": ["evaluate", NAME, *ROWS, *BASE],
    "merge": ["merge", NAME, "--out", "merged", *ROWS, *BASE],
    "blend": ["blend", f"{NAME}=0.5", "--name", "blended", *ROWS, *BASE],
    "compress": ["compress", NAME, "--name", "compressed", *ROWS, *BASE],
    "export": ["export", NAME, "--out", "out.gguf", *BASE],
    "train": [
        *("train", "--from", NAME, "--name", "trained", "--dataset", "rows.csv", "--max-steps", "1"),
        *("--max-length", "32", "--eval-rows", "2", *BASE),
    ],
}
ALL = CHEAP | ON_A_BASE


@dataclass
class Outcome:
    """What a command did with an adapter: `grown` in bytes, `wrote` outside its folder, `left` beside what was there."""

    stranger: str
    command: str
    status: int
    out: str
    err: str
    broke: str
    seconds: float
    grown: int
    wrote: list[str]
    left: list[str]

    @property
    def text(self) -> str:
        return self.out + self.err


class _HangError(BaseException):
    pass


def _hang(*_: Any) -> None:
    raise _HangError


def tree(root: Path) -> dict[str, Any]:
    """All that is in a folder, links and pipes among it; of what is no plain file, what it is."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        plain = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(root))] = (
            facts.st_mode,
            os.readlink(path) if path.is_symlink() else (facts.st_size, facts.st_mtime_ns) if plain else None,
        )
    return found


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def _do_all(libraries: list[tuple[str, Path]], commands: dict[str, list[str]], answer: Path) -> None:
    """In a process of its own: all commands on all of these, each in the place of the good one."""
    from typer.testing import CliRunner

    from lora_tuner.cli.app import app

    wrote: list[str] = []
    here = Path.cwd()

    def watch(event: str, arguments: Any) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link"):
            names = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
            for name in names:
                if isinstance(name, str | bytes | os.PathLike):
                    path = Path(os.path.abspath(os.fsdecode(name)))
                    if not path.is_relative_to(here) and not path.is_relative_to("/dev"):
                        wrote.append(f"{event} {path}")

    sys.dont_write_bytecode = True
    tempfile.tempdir = os.environ["MPLCONFIGDIR"] = str(here / ".tmp")
    (here / ".tmp").mkdir(exist_ok=True)
    sys.addaudithook(watch)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 10 * MEMORY,) * 2)  # before the machine suffers
    signal.signal(signal.SIGALRM, _hang)
    outcomes = []
    adapter = here / "adapters" / NAME
    for name, library in libraries:
        library.rename(here / "adapters")
        for command, arguments in commands.items():
            before = tree(here)
            Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts again from here
            wrote.clear()
            resident, start = _memory("VmRSS"), time.process_time()
            signal.setitimer(signal.ITIMER_REAL, HANGS)
            try:
                result = CliRunner().invoke(app, arguments)
                error = result.exception
                broke = "" if error is None or isinstance(error, SystemExit) else repr(error)[:500]
                status, out, err = result.exit_code, result.stdout, result.stderr
            except _HangError:
                status, out, err, broke = -1, "", "", "it hangs"
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds, grown = time.process_time() - start, _memory("VmHWM") - resident
            if (renamed := here / "adapters" / "renamed").exists() and not os.path.lexists(adapter):
                renamed.rename(adapter)
            after = tree(here)
            left = [path for path in {*before, *after} if before.get(path) != after.get(path) and path[0] != "."]
            left = [path for path in left if path not in ("adapters", "runs", "other")]
            for path in (here / it for it in left if it not in before):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.exists():
                    path.unlink()
            if name != "warm":
                outcomes.append(
                    Outcome(
                        name, command, status, out[:LONG], err[:LONG], broke, seconds, grown, list(wrote), sorted(left)
                    )
                )
        shutil.rmtree(here / "adapters")
    answer.write_text(json.dumps([asdict(it) for it in outcomes]))
    raise SystemExit(0)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    return hostile_adapters.write_good(tmp_path_factory.mktemp("good") / NAME, gpt2)


@pytest.fixture
def do(tmp_path: Path, gpt2: Path, good: Path) -> Iterator[Callable[..., list[Outcome]]]:
    """All of these commands on all of these strangers. Checks what holds whatever is wrong."""
    place = tmp_path / "place"
    for name in ("runs", "other"):
        (place / name).mkdir(parents=True)
    (place / "base").symlink_to(gpt2)
    texts = tiny_models.reviews(40)
    (place / "rows.txt").write_text("\n".join(texts))
    (place / "rows.csv").write_text("text\n" + "\n".join(texts))

    def work(jobs: list[tuple[str, Any]], commands: dict[str, list[str]]) -> list[Outcome]:
        libraries = []
        for number, (name, spoil) in enumerate([("warm", nothing), *jobs]):
            libraries.append((name, tmp_path / f"library-{number}"))
            spoil(hostile_adapters.copy(good, libraries[-1][1] / NAME))
        answer = tmp_path / "answer.json"
        before = Command(cwd=place, cache=place / ".cache", before=partial(_do_all, libraries, commands, answer)).end(
            600
        )
        assert before.status == 0, before.err
        outcomes = [Outcome(**it) for it in json.loads(answer.read_text())]
        assert len(outcomes) == len(jobs) * len(commands)
        return outcomes

    base = strangers_hash(gpt2)
    yield work
    assert strangers_hash(gpt2) == base


def strangers_hash(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(it: Outcome) -> None:
    """What holds whatever is wrong with an adapter."""
    where = f"{it.command} of {it.stranger}: {it.err[-800:]}{it.out[-400:]}"
    assert not it.broke, f"{it.broke} {where}"
    assert it.status in (0, 1, 2), where
    assert "Traceback" not in it.text, where
    seen = it.err if it.command in ("generate", "compare") else it.text  # what a model writes is the user's
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in seen), where
    assert it.seconds < SECONDS, where
    assert it.grown < MEMORY, f"{it.grown} {where}"
    assert not it.wrote, f"{it.wrote} {where}"
    errors = [line for line in it.err.splitlines() if line.startswith("Error: ")]
    if it.status == 0:
        assert not errors, where
    else:
        runs = "runs/" if it.command == "train" else "."  # a run that fails on its way may leave its checkpoints
        assert not [path for path in it.left if not path.startswith(runs)], f"{it.left} {where}"
        if it.command.startswith("verify") or (it.command.startswith("check") and not errors):
            return
        assert len(errors) == 1, where
        assert len(errors[0]) < 2_000, where
        assert errors[0].endswith("."), where
        assert it.err.splitlines()[-1] == errors[0], where


def check_refused(it: Outcome, stranger: Stranger) -> None:
    """Who has to refuse it does, with the reason."""
    by, name = stranger.refused_by, it.command.partition(" ")[0]
    if name == "list":
        refused = by == "all"
        said = json.loads(it.out)[0].get("broken", "") if "--json" in it.command else it.err
    else:
        refused = {
            "all": True,
            "numbers": name in ("verify", "push", *ON_A_BASE),
            "base": name in ON_A_BASE,
            "push": name == "push",
        }.get(by, False)
        said = it.out if name == "verify" else it.err
        if refused:
            assert it.status == 1, f"{it.command} of {it.stranger}: {it.text[-800:]}"
    if refused:
        assert re.search(f"{stranger.why}|no manifest", said), f"{it.command} of {it.stranger}: {said[-800:]}"


BROKEN = {name: it for name, it in BY_HAND.items() if it.refused_by in ("all", "numbers", "base")}
QUICK = {name: CHEAP[name] for name in ("verify",)}


def test_hostile_adapter_fails_verify(do):
    for it in do([(name, it.spoil) for name, it in BY_HAND.items()], QUICK):
        check(it)
        check_refused(it, BY_HAND[it.stranger])


def test_harmless_adapter_is_accepted(do):
    done = do([("good", nothing), ("writes", BY_HAND["a manifest that writes"].spoil)], ALL)
    harmless = [(name, BY_HAND[name].spoil) for name in ("half an adapter", "targets that hang", "facts that climb")]
    done += do(harmless, {name: ALL[name] for name in ("list", "show", "generate", "blend")})
    refused = {"check vllm": "vLLM does not support LoRA on GPT-2", "adopt": "has a manifest", "push": "no manifest"}
    for it in done:
        check(it)
        assert it.status == 0 or refused[it.command] in it.text, it.text
    wrote = {it.stranger: it.out for it in done if it.command == "generate"}
    assert wrote["targets that hang"] == wrote["writes"] == wrote["good"]


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize("seeds", [range(12, 15), pytest.param(range(15, 18), marks=pytest.mark.slow)])
def test_fuzzed_adapter_loads_or_fails_cleanly(do, seeds):
    for it in do([(f"seed {seed}", partial(hostile_adapters.spoil_by_chance, seed=seed)) for seed in seeds], ALL):
        check(it)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(1_000, 1_080), range(1_080, 1_160), range(1_160, 1_240), range(1_240, 1_310)])
def test_many_fuzzed_adapters_fail_cleanly(do, seeds):
    for it in do([(f"seed {seed}", partial(hostile_adapters.spoil_by_chance, seed=seed)) for seed in seeds], ALL):
        check(it)


@pytest.mark.slow
def test_hostile_adapter_fails_every_command(do):
    for it in do([(name, it.spoil) for name, it in BY_HAND.items()], ALL):
        check(it)
        check_refused(it, BY_HAND[it.stranger])


def test_rejected_adapter_keeps_base_unchanged(gpt2, good, tmp_path):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    tokens = torch.arange(1, 30)[None]
    with torch.inference_mode():
        before = generator.base.model(tokens).logits
        for number, (name, stranger) in enumerate(BROKEN.items()):
            folder = hostile_adapters.copy(good, tmp_path / f"x{number}")
            stranger.spoil(folder)
            with pytest.raises(LoraTunerError):  # large numbers are found out when it writes
                generator.set_adapter(folder) and generator.generate(
                    "the actor", SamplingParams(max_new_tokens=2, greedy=True)
                )
            if generator.current_adapter is not None:
                generator.unload(generator.current_adapter)
            assert not generator.loaded_adapters, name
            assert torch.equal(generator.base.model(tokens).logits, before), name


def test_pickle_fixture_executes_code(good, tmp_path):
    folder = hostile_adapters.copy(good, tmp_path / NAME)
    BY_HAND["pickled"].spoil(folder)
    pickle.loads((folder / "adapter_model.bin").read_bytes())
    assert (tmp_path / "it-ran").is_dir()


PLACES = [
    "/etc",
    "/dev/zero",
    "../../..",
    "~root/x",
    "x" * 300,
    "a b/c",
    "https://example.org/x",
    f"x{hostile_adapters.ESCAPE}",
]


def test_hostile_base_name_cannot_escape(do):
    """Places for a base, and revisions, by which the cache would be left."""
    jobs = [(f"config {n}", hostile_adapters.config(base_model_name_or_path=place)) for n, place in enumerate(PLACES)]
    jobs += [(f"manifest {n}", hostile_adapters.manifest(base__name=place)) for n, place in enumerate(PLACES)]
    jobs += [
        (f"revision {n}", hostile_adapters.manifest(base__name="me/mine", base__revision=place))
        for n, place in enumerate(PLACES)
    ]
    own = {name: [it for it in ALL[name] if it not in BASE] for name in ("generate", "export", "adopt", "merge")}
    for it in do(jobs, own | {name: CHEAP[name] for name in ("list", "show")}):
        check(it)
        assert it.status == (it.command in own), it.text


NAMES = [
    "../y",
    "/y",
    "y/../../z",
    "..",
    ".",
    "",
    "~",
    f"y{hostile_adapters.ESCAPE}",
    "y\n",
    "con",
    "é",
    "-y",
    "y" * 300,
]


def test_path_as_adapter_name_fails(do):
    commands = {}
    for number, name in enumerate(NAMES):
        commands |= {
            f"rename to {number}": ["adapters", "rename", "--", NAME, name],
            f"rename of {number}": ["adapters", "rename", "--", name, "y"],
            f"remove {number}": ["adapters", "remove", "--yes", "--", name],
            f"adopt {number}": [*CHEAP["adopt"], f"--name={name}"],
            f"pull {number}": ["pull", "me/mine", f"--name={name}"],
        }
    for name in ("../y", "/y", ODD):
        commands |= {
            f"blend {name!r}": ["blend", f"{NAME}=1", "--name", name, *BASE],
            f"compress {name!r}": ["compress", NAME, "--name", name, *BASE],
            f"train {name!r}": [name if it == "trained" else it for it in ALL["train"]],
        }
    for it in do([("good", nothing)], commands):
        check(it)
        assert it.status in (1, 2), it.text


def test_symlinks_and_odd_folder_names(do, tmp_path):
    def odd(folder: Path) -> None:
        for name, to in (
            ("loop", "loop"),
            ("nowhere", "nothing"),
            ("zero", "/dev/zero"),
            ("up", ".."),
            ("etc", "/etc"),
        ):
            (folder.parent / name).symlink_to(to)
        os.mkfifo(folder.parent / "pipe")
        (folder.parent / "twice").symlink_to(NAME)
        hostile_adapters.copy(folder, folder.parent / ODD)

    names = ["loop", "nowhere", "zero", "up", "etc", "pipe"]
    commands: dict[str, list[str]] = {"list": CHEAP["list"], "verify all": ["adapters", "verify"]}
    for name in names:
        commands |= {
            f"show {name}": ["adapters", "show", name],
            f"export {name}": ["export", name, "--out", "out.gguf"],
        }
    path = f"adapters/{ODD}"
    commands |= {f"{name} odd": [path if it == NAME else it for it in ALL[name]] for name in ALL if name != "rename"}
    commands["blend odd"] = ["blend", f"{path}=0.5", "--name", "blended", *ROWS, *BASE]
    commands["show twice"] = ["adapters", "show", "twice"]
    for it in do([("odd", odd)], commands):
        check(it)
        assert it.status == 1 or not it.command.endswith(tuple(names)), it.text
