"""Hostile adapters: every command rejects them with one line, or they are harmless."""

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
from .hostile_adapters import BY_HAND, NAME, HostileAdapter
from .process import Command

MEMORY = 200_000_000  # bytes that a command may allocate
SECONDS = 5.0  # CPU time
HANGS = 20.0  # seconds of wall time
PROMPT = ["the actor", "--greedy", "--max-new-tokens", "3"]
ROWS = ["--eval-dataset", "rows.txt", "--eval-rows", "2"]
ODD = f"x{hostile_adapters.ESCAPE}"
LONG = 1_500_000  # characters of output that are kept
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
        *("--max-length", "32", "--eval-rows", "2", "--learning-rate", "0.001", *BASE),
    ],
}
ALL = CHEAP | ON_A_BASE


@dataclass
class Outcome:
    """Result of a command: memory it `grown` by (bytes), files it `wrote` outside its folder or `left` in it."""

    adapter: str
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
    """All entries of a folder: type and size, or the target of a link."""
    entries: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        facts = path.lstat()
        plain = path.is_file() and not path.is_symlink()
        entries[str(path.relative_to(root))] = (
            facts.st_mode,
            os.readlink(path) if path.is_symlink() else (facts.st_size, facts.st_mtime_ns) if plain else None,
        )
    return entries


def _memory(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0]) * 1024


def _do_all(libraries: list[tuple[str, Path]], commands: dict[str, list[str]], answer: Path) -> None:
    """Run all commands on all adapters, in a separate process."""
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
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 10 * MEMORY,) * 2)  # protects the machine
    signal.signal(signal.SIGALRM, _hang)
    outcomes = []
    adapter = here / "adapters" / NAME
    for name, library in libraries:
        library.rename(here / "adapters")
        for command, arguments in commands.items():
            before = tree(here)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak memory
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
            for path in (here / name for name in left if name not in before):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.exists():
                    path.unlink()
            if name != "warm":
                outcomes.append(
                    Outcome(
                        name,
                        command,
                        status,
                        out[:LONG],
                        err[:LONG],
                        broke,
                        seconds,
                        grown,
                        list(wrote),
                        sorted(left),
                    )
                )
        shutil.rmtree(here / "adapters")
    answer.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
    raise SystemExit(0)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    return hostile_adapters.write_good(tmp_path_factory.mktemp("good") / NAME, gpt2)


@pytest.fixture
def do(tmp_path: Path, gpt2: Path, good: Path) -> Iterator[Callable[..., list[Outcome]]]:
    """Run commands on damaged adapters."""
    workspace = tmp_path / "workspace"
    for name in ("runs", "other"):
        (workspace / name).mkdir(parents=True)
    (workspace / "base").symlink_to(gpt2)
    texts = tiny_models.reviews(40)
    (workspace / "rows.txt").write_text("\n".join(texts))
    (workspace / "rows.csv").write_text("text\n" + "\n".join(texts))

    def work(jobs: list[tuple[str, Any]], commands: dict[str, list[str]]) -> list[Outcome]:
        libraries = []
        for number, (name, spoil) in enumerate([("warm", nothing), *jobs]):
            libraries.append((name, tmp_path / f"library-{number}"))
            spoil(hostile_adapters.copy(good, libraries[-1][1] / NAME))
        answer = tmp_path / "answer.json"
        before = Command(
            cwd=workspace, cache=workspace / ".cache", before=partial(_do_all, libraries, commands, answer)
        ).end(600)
        assert before.status == 0, before.err
        outcomes = [Outcome(**fields) for fields in json.loads(answer.read_text())]
        assert len(outcomes) == len(jobs) * len(commands)
        return outcomes

    base = file_contents(gpt2)
    yield work
    assert file_contents(gpt2) == base


def file_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check(outcome: Outcome) -> None:
    """Check what holds for every adapter and command."""
    where = f"{outcome.command} of {outcome.adapter}: {outcome.err[-800:]}{outcome.out[-400:]}"
    assert not outcome.broke, f"{outcome.broke} {where}"
    assert outcome.status in (0, 1, 2), where
    assert "Traceback" not in outcome.text, where
    seen = (
        outcome.err if outcome.command in ("generate", "compare") else outcome.text
    )  # generated text may contain anything
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in seen), where
    assert outcome.seconds < SECONDS, where
    assert outcome.grown < MEMORY, f"{outcome.grown} {where}"
    assert not outcome.wrote, f"{outcome.wrote} {where}"
    errors = [line for line in outcome.err.splitlines() if line.startswith("Error: ")]
    if outcome.status == 0:
        assert not errors, where
    else:
        runs = "runs/" if outcome.command == "train" else "."  # a failed run may leave checkpoints
        assert not [path for path in outcome.left if not path.startswith(runs)], f"{outcome.left} {where}"
        if outcome.command.startswith("verify") or (outcome.command.startswith("check") and not errors):
            return
        assert len(errors) == 1, where
        assert len(errors[0]) < 2_000, where
        assert errors[0].endswith("."), where
        assert outcome.err.splitlines()[-1] == errors[0], where


def check_rejected(outcome: Outcome, hostile: HostileAdapter) -> None:
    """Check that the right commands reject it, with the reason."""
    by, name = hostile.rejected_by, outcome.command.partition(" ")[0]
    if name == "list":
        refused = by == "all"
        said = json.loads(outcome.out)[0].get("broken", "") if "--json" in outcome.command else outcome.err
    else:
        refused = {
            "all": True,
            "weights": name in ("verify", "push", *ON_A_BASE),
            "base": name in ON_A_BASE,
            "push": name == "push",
        }.get(by, False)
        said = outcome.out if name == "verify" else outcome.err
        if refused:
            assert outcome.status == 1, f"{outcome.command} of {outcome.adapter}: {outcome.text[-800:]}"
    if refused:
        assert re.search(f"{hostile.why}|no manifest", said), (
            f"{outcome.command} of {outcome.adapter}: {said[-800:]}"
        )


BROKEN = {name: hostile for name, hostile in BY_HAND.items() if hostile.rejected_by in ("all", "weights", "base")}
QUICK = {name: CHEAP[name] for name in ("verify",)}


def test_hostile_adapter_fails_verify(do):
    """The slow test below runs all of them."""
    for outcome in do([(name, hostile.spoil) for name, hostile in [*BY_HAND.items()][::16]], QUICK):
        check(outcome)
        check_rejected(outcome, BY_HAND[outcome.adapter])


def test_harmless_adapter_is_accepted(do):
    done = do([("good", nothing), ("writes", BY_HAND["control characters in manifest"].spoil)], ALL)
    harmless = [
        (name, BY_HAND[name].spoil)
        for name in ("half of the tensors", "catastrophic target pattern", "manifest with ..")
    ]
    done += do(harmless, {name: ALL[name] for name in ("list", "show", "generate", "blend")})
    refused = {
        "check vllm": "vLLM does not support LoRA on GPT-2",
        "adopt": "has a manifest",
        "push": "no manifest",
    }
    for outcome in done:
        check(outcome)
        assert outcome.status == 0 or refused[outcome.command] in outcome.text, outcome.text
    wrote = {outcome.adapter: outcome.out for outcome in done if outcome.command == "generate"}
    assert wrote["catastrophic target pattern"] == wrote["writes"] == wrote["good"]


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize("seeds", [range(12, 13), pytest.param(range(13, 18), marks=pytest.mark.slow)])
def test_fuzzed_adapter_loads_or_fails_cleanly(do, seeds):
    for outcome in do(
        [(f"seed {seed}", partial(hostile_adapters.spoil_randomly, seed=seed)) for seed in seeds], ALL
    ):
        check(outcome)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seeds", [range(1_000, 1_080), range(1_080, 1_160), range(1_160, 1_240), range(1_240, 1_310)]
)
def test_many_fuzzed_adapters_fail_cleanly(do, seeds):
    for outcome in do(
        [(f"seed {seed}", partial(hostile_adapters.spoil_randomly, seed=seed)) for seed in seeds], ALL
    ):
        check(outcome)


@pytest.mark.slow
def test_hostile_adapter_fails_every_command(do):
    for outcome in do([(name, hostile.spoil) for name, hostile in BY_HAND.items()], ALL):
        check(outcome)
        check_rejected(outcome, BY_HAND[outcome.adapter])


@pytest.mark.slow
@pytest.mark.parametrize(("first", "step"), [(0, 16), pytest.param(0, 1, marks=pytest.mark.slow)])
def test_rejected_adapter_keeps_base_unchanged(gpt2, good, tmp_path, first, step):
    generator = Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
    tokens = torch.arange(1, 30)[None]
    with torch.inference_mode():
        before = generator.base.model(tokens).logits
        for number, (name, hostile) in enumerate([*BROKEN.items()][first::step]):
            folder = hostile_adapters.copy(good, tmp_path / f"x{number}")
            hostile.spoil(folder)
            with pytest.raises(LoraTunerError):  # huge weights fail only in generation
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


BASE_NAMES = [
    "/etc",
    "/dev/zero",
    "../../..",
    "~root/x",
    "x" * 300,
    "a b/c",
    "https://example.org/x",
    f"x{hostile_adapters.ESCAPE}",
]


@pytest.mark.parametrize("names", [BASE_NAMES[3:5], pytest.param(BASE_NAMES, marks=pytest.mark.slow)])
def test_hostile_base_name_cannot_escape(do, names):
    """Base names and revisions that point outside the cache."""
    jobs = [
        (f"config {n}", hostile_adapters.config(base_model_name_or_path=place)) for n, place in enumerate(names)
    ]
    jobs += [(f"manifest {n}", hostile_adapters.manifest(base__name=place)) for n, place in enumerate(names)]
    jobs += [
        (f"revision {n}", hostile_adapters.manifest(base__name="me/mine", base__revision=place))
        for n, place in enumerate(names)
    ]
    own = {
        name: [word for word in ALL[name] if word not in BASE]
        for name in ("generate", "export", "adopt", "merge")
    }
    for outcome in do(jobs, own | {name: CHEAP[name] for name in ("list", "show")}):
        check(outcome)
        assert outcome.status == (outcome.command in own), outcome.text


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


@pytest.mark.parametrize("names", [NAMES[:2], pytest.param(NAMES, marks=pytest.mark.slow)])
def test_path_as_adapter_name_fails(do, names):
    commands = {}
    for number, name in enumerate(names):
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
            f"train {name!r}": [name if word == "trained" else word for word in ALL["train"]],
        }
    for outcome in do([("good", nothing)], commands):
        check(outcome)
        assert outcome.status in (1, 2), outcome.text


@pytest.mark.slow
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
    commands |= {
        f"{name} odd": [path if word == NAME else word for word in ALL[name]] for name in ALL if name != "rename"
    }
    commands["blend odd"] = ["blend", f"{path}=0.5", "--name", "blended", *ROWS, *BASE]
    commands["show twice"] = ["adapters", "show", "twice"]
    for outcome in do([("odd", odd)], commands):
        check(outcome)
        assert outcome.status == 1 or not outcome.command.endswith(tuple(names)), outcome.text
