"""A folder with something of everything in it, the commands that change it, and what is of value there."""

import shutil
from pathlib import Path

from lora_tuner import Adapter, Library, TrainConfig, train
from lora_tuner.adapters.adapter import verify_adapter

from .process import Command, CommandResult, Fault

TRAIN = ["--max-steps=4", "--save-every=2", "--max-length=64", "--batch-size=2", "--rank=4", "--eval-rows=4"]
COMMANDS: dict[str, list[str]] = {
    "train": ["train", "--name", "new", *TRAIN],
    "train over another": ["train", "--name", "one", "--overwrite", *TRAIN],
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
}
# Of two of a kind the harder one; what compress makes is written as a blend is, and a merged model too.
ALIKE = ("compress", "merge over another")
QUICK = [name for name in COMMANDS if f"{name} over another" not in COMMANDS and name not in ALIKE]
State = dict[str, object]


def make(root: Path, base: Path) -> Path:
    """Two adapters, one of another tool in and one beside the library, a merged model, and data."""
    lines = [f"{number}: the story {'works well' if number % 3 else 'drags on and on'}." for number in range(60)]
    (root / "reviews.txt").write_text("\n".join(lines))
    settings = {
        "base": str(base),
        "dataset": str(root / "reviews.txt"),
        "max_steps": 2,
        "max_length": 64,
        "rank": 4,
        "eval_rows": 4,
        "txt_rows": "line",
        "adapters_dir": root / "adapters",
        "runs_dir": root / "runs",
    }
    for seed, name in enumerate(("one", "two")):
        train(TrainConfig.model_validate(settings | {"name": name, "seed": seed}))
    for target in (root / "foreign", root / "adapters" / "stranger"):
        shutil.copytree(root / "adapters" / "one", target)
        (target / "manifest.json").unlink()
    result = Command("merge", "one", "--out", "whole", cwd=root, cache=root / "cache").end()
    assert result.status == 0, result.err
    shutil.rmtree(root / "cache")
    shutil.rmtree(root / "runs")
    return root


def arguments(name: str, world: Path, base: Path) -> list[str]:
    """The words of one of COMMANDS."""
    words = list(COMMANDS[name])
    if name.startswith("adopt"):
        words += ["--base", str(base)]
    if name.startswith("train"):
        words += ["--base", str(base), "--dataset", str(world / "reviews.txt"), "--txt-rows", "line"]
    return words


def run(root: Path, *words: str, fault: Fault | None = None, **more: object) -> CommandResult:
    """A command in a world, whose cache is a part of it."""
    own = {"LORA_TUNER_CACHE": str(root / "cache")}
    given = {"cache": root.parent / "processes"} | more
    return Command(*words, cwd=root, env=own, fault=fault, **given).end()  # type: ignore[arg-type]


def state(root: Path) -> State:
    """What is of value: each adapter, whole, by the hash of its weights; models and exported files by their bytes."""
    found: State = {}
    for name, it in Library(root / "adapters").entries():
        assert isinstance(it, Adapter), it
        assert verify_adapter(it) == []
        found[name] = (it.sha256, it.manifest is not None)
    for path in [*root.glob("whole/*"), *root.glob("merged/**/*"), *root.glob("*.gguf")]:
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts):
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def old_or_new(now: State, old: State, new: State) -> bool:
    """Whether each thing is as it was or as it should become, and a model folder is so as a whole."""
    models = [
        {name: it for name, it in them.items() if name.startswith(("whole", "merged"))}
        for them in (now, old, new)
    ]
    each = (
        now.get(name, "none") in (old.get(name, "none"), new.get(name, "none")) for name in {*now, *old, *new}
    )
    return models[0] in models[1:] and all(each)


def litter(root: Path) -> list[str]:
    """What is hidden."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.name.startswith("."))


def becomes(words: list[str], world: Path, root: Path) -> tuple[State, list[str]]:
    """What a command makes when nothing goes wrong, and what it does to files on its way."""
    shutil.copytree(world, root, symlinks=True)
    result = run(root, *words, fault=Fault(root))
    assert result.status == 0, result.err
    assert litter(root) == []
    return state(root), result.events
