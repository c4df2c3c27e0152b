"""A workspace of adapters, models and data, the commands that change it, and its state."""

import json
import shutil
from pathlib import Path

from lora_tuner import Adapter, Library, TrainConfig, train
from lora_tuner.adapters.adapter import verify_adapter

from .process import Command, CommandResult, Fault

TRAIN = ["--max-steps=4", "--save-every=2", "--max-length=64", "--batch-size=2", "--rank=4", "--eval-rows=4"]
TRAIN += ["--learning-rate=0.01"]  # to measure it takes as long as a run, and writes nothing
SWEEP = ["--max-steps=2", "--max-length=64", "--batch-size=2", "--rank=2,4", "--eval-rows=4", TRAIN[-1]]
COMMANDS: dict[str, list[str]] = {
    "train": ["train", "--name", "new", *TRAIN],
    "train over another": ["train", "--name", "one", "--overwrite", *TRAIN],
    "sweep": ["train", "--name", "new", *SWEEP],
    "sweep over another": ["train", "--name", "grid", "--overwrite", *SWEEP],
    "merge": ["merge", "one", "--out", "merged/one"],
    "merge over another": ["merge", "one", "--out", "whole", "--overwrite"],
    "blend": ["blend", "one=0.5", "two=0.5", "--name", "new"],
    "blend over another": ["blend", "one=0.5", "two=0.5", "--name", "two", "--overwrite"],
    "compress": ["compress", "one", "--name", "new", "--energy", "0.5"],
    "adopt": ["adapters", "adopt", "foreign", "--name", "new"],
    "adopt in place": ["adapters", "adopt", "stranger"],
    "rename": ["adapters", "rename", "one", "new"],
    "remove": ["adapters", "remove", "one", "--yes"],
    "export": ["export", "one", "--to", "gguf", "--out", "one.gguf"],
    "export to ollama": ["export", "one", "--to", "ollama", "--quantize", "q8_0", "--out", "one-ollama"],
}
# The harder command of each kind; the others write their results as blend does.
ALIKE = ("compress", "merge over another", "export to ollama")
QUICK = [name for name in COMMANDS if f"{name} over another" not in COMMANDS and name not in ALIKE]
State = dict[str, object]


def make(root: Path, base: Path) -> Path:
    """Make three adapters, one from another tool inside and one beside the library, a merged model, and data."""
    lines = [f"{number}: the story {'works well' if number % 3 else 'drags on and on'}." for number in range(60)]
    (root / "reviews.txt").write_text("\n".join(lines))
    settings = {
        "base": str(base),
        "dataset": str(root / "reviews.txt"),
        "max_steps": 2,
        "max_length": 64,
        "rank": 4,
        "learning_rate": 0.01,
        "eval_rows": 4,
        "txt_rows": "line",
        "adapters_dir": root / "adapters",
        "runs_dir": root / "runs",
    }
    for seed, name in enumerate(("one", "two")):
        train(TrainConfig.model_validate(settings | {"name": name, "seed": seed}))
    shutil.copytree(root / "adapters" / "two", root / "adapters" / "grid-r2")
    for target in (root / "foreign", root / "adapters" / "stranger"):
        shutil.copytree(root / "adapters" / "one", target)
        (target / "manifest.json").unlink()
    result = Command("merge", "one", "--out", "whole", cwd=root, cache=root / "cache").end()
    assert result.status == 0, result.err
    shutil.rmtree(root / "cache")
    shutil.rmtree(root / "runs")
    return root


def arguments(name: str, world: Path, base: Path) -> list[str]:
    """Return the arguments of one of COMMANDS."""
    words = list(COMMANDS[name])
    if name.startswith("adopt"):
        words += ["--base", str(base)]
    if words[0] == "train":
        words += ["--base", str(base), "--dataset", str(world / "reviews.txt"), "--txt-rows", "line"]
    return words


def run(root: Path, *words: str, fault: Fault | None = None, **more: object) -> CommandResult:
    """Run a command in a workspace, which contains its cache."""
    environment = {"LORA_TUNER_CACHE": str(root / "cache")}
    options = {"cache": root.parent / "processes"} | more
    return Command(*words, cwd=root, env=environment, fault=fault, **options).end()  # type: ignore[arg-type]


def state(root: Path) -> State:
    """Return the hash of each adapter, which must be intact, the bytes of models and exports, and losses of sweeps."""
    contents: State = {}
    for name, adapter in Library(root / "adapters").entries():
        assert isinstance(adapter, Adapter), adapter
        assert verify_adapter(adapter) == []
        contents[name] = (adapter.sha256, adapter.manifest is not None)
    for path in [
        *root.glob("whole/*"),
        *root.glob("merged/**/*"),
        *root.glob("*.gguf"),
        *root.glob("one-ollama/*"),
    ]:
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            contents[str(path.relative_to(root))] = path.read_bytes()
    for path in root.glob("runs/*.sweep/sweep.json"):
        result = json.loads(path.read_text())
        # Measured while training or later, a loss differs in the last digits.
        contents[path.parent.name] = [(trial["name"], round(trial["loss"], 6)) for trial in result["trials"]]
    return contents


def points(name: str, events: list[str]) -> list[int]:
    """Return the file operations to disturb: all but, in a sweep, most of those that it shares with a run."""
    return [
        number
        for number, event in enumerate(events)
        if not name.startswith("sweep")
        or number % 16 == 0
        or ".sweep" in event
        or event.startswith(("os.rename runs", "os.rename adapters", "sync runs", "sync adapters"))
    ]


def unfinished(words: list[str], root: Path) -> str | None:
    """Return the name to resume, if the command has left a run or a sweep."""
    if words[0] != "train":
        return None
    name = words[words.index("--name") + 1]
    states = root / "runs" / name / "run.yaml", root / "runs" / f"{name}.sweep" / "sweep.yaml"
    return name if any(path.exists() for path in states) else None


def old_or_new(now: State, old: State, new: State) -> bool:
    """Return true if each adapter and file, and each model folder as a whole, is the old or the new one."""
    models = [
        {name: data for name, data in state.items() if name.startswith(("whole", "merged", "one-ollama"))}
        for state in (now, old, new)
    ]
    each = (
        now.get(name, "none") in (old.get(name, "none"), new.get(name, "none")) for name in {*now, *old, *new}
    )
    return models[0] in models[1:] and all(each)


def litter(root: Path) -> list[str]:
    """List hidden files."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.name.startswith("."))


def becomes(words: list[str], world: Path, root: Path) -> tuple[State, list[str]]:
    """Return the state after an undisturbed command, and its file operations."""
    shutil.copytree(world, root, symlinks=True)
    result = run(root, *words, fault=Fault(root))
    assert result.status == 0, result.err
    assert litter(root) == []
    return state(root), result.events
