"""Several processes, or threads, at one library, one cache, one generator: every answer is a right one or a clear refusal."""

import contextlib
import functools
import importlib
import json
import random
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, TrainConfig, atomic_io, train
from lora_tuner.adapters.adapter import MANIFEST_FILE, WEIGHTS_FILE, Adapter, verify_adapter
from lora_tuner.errors import AdapterError, GenerationError
from lora_tuner.inference.cpu_decoder import CpuDecoder

from .process import Command, CommandResult, contents, unchanged

Start = Callable[..., Command]
Run = Callable[..., CommandResult]
QUICK = ("--max-steps", "3", "--eval-rows", "4", "--batch-size", "2", "--max-length", "48", "--rank", "2")
GREEDY = SamplingParams(greedy=True, max_new_tokens=12, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, gpt2: Path) -> Path:
    """Two adapters of the same shapes and different scales, so that a mixture of them would load; and one of a stranger."""
    root = tmp_path_factory.mktemp("stock")
    (root / "reviews.txt").write_text("\n".join(f"{n}: the story {'works' if n % 3 else 'drags'}." for n in range(60)))
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
def world(stock: Path, tmp_path: Path) -> Path:
    """A folder of its own with them."""
    for name in ("adapters", "foreign", "reviews.txt"):
        copy = shutil.copytree if (stock / name).is_dir() else shutil.copyfile
        copy(stock / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def training(gpt2: Path, world: Path) -> tuple[str | Path, ...]:
    return ("train", "--base", gpt2, "--dataset", world / "reviews.txt", "--txt-rows", "line", *QUICK)


def wait_at(place: str, here: Path, until: Path) -> None:
    """In the process of a command: at this function it says that it is `here`, and waits `until` a file is there."""
    module, _, name = place.rpartition(".")
    real = getattr(importlib.import_module(module), name)

    def waiting(*arguments: Any, **more: Any) -> Any:
        here.touch()
        end = time.monotonic() + 60
        while not until.exists() and time.monotonic() < end:
            time.sleep(0.005)
        return real(*arguments, **more)

    setattr(importlib.import_module(module), name, waiting)


def held(root: Path, place: str = "lora_tuner.training.trainer.run_trainer") -> dict[str, Any]:
    return {"before": functools.partial(wait_at, place, root / "here", root / "go")}


def is_whole(root: Path, name: str, adapters: str = "adapters") -> None:
    assert verify_adapter(Library(root / adapters).get(name)) == []
    left = [it.name for it in (root / adapters).iterdir() if it.name.startswith(".")]
    assert not left


def test_second_training_of_name_is_refused(
    start: Start, run: Run, world: Path, training: tuple[str | Path, ...]
) -> None:
    first = start(*training, "--name", "new", **held(world))
    first.wait_for((world / "here").exists)
    second = run(*training, "--name", "new")
    assert (second.status, second.error_line) == (
        1,
        "Error: Another process trains 'new' now: choose another --name, or wait for it.",
    )
    (world / "go").touch()
    assert first.end().status == 0
    is_whole(world, "new")
    assert list((world / "runs").iterdir()) == []
    alone = run(*training, "--name", "alone")
    assert alone.status == 0
    weights = [(world / "adapters" / name / WEIGHTS_FILE).read_bytes() for name in ("new", "alone")]
    assert weights[0] == weights[1]


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
    start: Start, run: Run, world: Path, training: tuple[str | Path, ...], gpt2: Path, other: str
) -> None:
    commands: dict[str, tuple[str | Path, ...]] = {
        "train": (*training, "--name", "new", "--runs-dir", "elsewhere"),
        "blend": ("blend", "one=0.5", "two=0.5", "--name", "new", "--eval-rows", "4"),
        "adopt": ("adapters", "adopt", "foreign", "--name", "new", "--base", gpt2),
        "rename": ("adapters", "rename", "one", "new"),
    }
    first = start(*training, "--name", "new", **held(world))
    first.wait_for((world / "here").exists)
    faster = run(*commands[other])
    assert faster.status == 0, faster.err
    theirs = contents(world / "adapters" / "new")
    (world / "go").touch()
    refused = first.end()
    assert refused.status == 1
    assert "adapters/new exists: rename or remove that one first" in refused.error_line
    again = run("train", "--resume", "new").error_line
    if other == "train":  # with the same settings: the same adapter
        assert again == "Error: The run new has finished: its adapter is adapters/new."
        return
    assert again.startswith("Error: adapters/new exists: rename or remove that one first")
    assert contents(world / "adapters" / "new") == theirs
    is_whole(world, "new")
    assert run("adapters", "rename", "new", "theirs").status == 0
    resumed = run("train", "--resume", "new")
    assert resumed.status == 0, resumed.err
    alone = run(*training, "--name", "alone")
    assert alone.status == 0
    weights = [(world / "adapters" / name / WEIGHTS_FILE).read_bytes() for name in ("new", "alone")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("other", ["rename", pytest.param("train", marks=pytest.mark.slow)])
def test_name_taken_during_blend_is_kept(
    start: Start, run: Run, world: Path, training: tuple[str | Path, ...], other: str
) -> None:
    waiting = held(world, "lora_tuner.convert.common.verify_written")
    first = start("blend", "one=0.5", "two=0.5", "--name", "new", "--eval-rows", "4", **waiting)
    first.wait_for((world / "here").exists)
    faster = run("adapters", "rename", "two", "new") if other == "rename" else run(*training, "--name", "new")
    assert faster.status == 0, faster.err
    theirs = contents(world / "adapters" / "new")
    (world / "go").touch()
    refused = first.end()
    assert refused.status == 1
    assert "adapters/new exists" in refused.error_line
    assert contents(world / "adapters" / "new") == theirs
    is_whole(world, "new")


def blind(times: int) -> None:
    """In the process of a command: the first times that it asks, no name is taken."""
    looked, asked = Library.check_name_free, iter(range(times))

    def look(*arguments: Any, **more: Any) -> None:
        if next(asked, None) is None:
            looked(*arguments, **more)

    Library.check_name_free = look  # type: ignore[method-assign]


@pytest.mark.parametrize("command", ["adopt", "rename"])
def test_name_taken_at_rename_is_kept(run: Run, world: Path, gpt2: Path, command: str) -> None:
    commands = {"adopt": ("adopt", "foreign", "--name", "two", "--base", gpt2), "rename": ("rename", "one", "two")}
    asked = {"adopt": 3, "rename": 1}[command]
    with unchanged(world / "adapters"):
        refused = run("adapters", *commands[command], before=functools.partial(blind, asked))
    assert refused.status == 1
    assert refused.error_line.startswith("Error: adapters/two exists: choose another")


def saving_by_turns(stop: Path) -> None:
    """In the process of a command: save one adapter and the other under one name, again and again."""
    library, turns = Library(Path("adapters")), 0
    while not stop.exists():
        name = ("one", "two")[turns % 2]
        with library.create("turns", overwrite=True) as work:
            for file in (Path("adapters") / name).iterdir():
                shutil.copyfile(file, work / file.name)
        turns += 1
        atomic_io.atomic_write_text(Path("turns"), str(turns))


@pytest.fixture
def turns(world: Path, start: Start) -> Any:
    """Another process replaces `adapters/turns` without a pause; the count of its turns so far."""
    shutil.copytree(world / "adapters" / "one", world / "adapters" / "turns")
    stop = world / "stop"
    command = start("adapters", "list", before=functools.partial(saving_by_turns, stop))
    command.wait_for((world / "turns").exists)
    yield lambda: int((world / "turns").read_text())
    stop.touch()
    assert command.end().status == 0


def facts_of(adapter: Adapter) -> str:
    return json.dumps(adapter.to_dict() | {"name": "", "path": ""}, sort_keys=True, default=str)


def test_reads_during_saves_are_consistent(turns: Callable[[], int], run: Run, world: Path) -> None:
    library = Library(world / "adapters")
    either = {facts_of(library.get(name)) for name in ("one", "two")}
    assert len(either) == 2
    seen, before, end = set(), turns(), time.monotonic() + 1.5
    while time.monotonic() < end or len(seen) < 2:
        found = dict(library.entries())
        assert sorted(found) == ["one", "turns", "two"]
        for answer in (found["turns"], library.get("turns")):
            assert isinstance(answer, Adapter), answer
            seen.add(facts_of(answer))
        assert library.inspect("turns", verify_adapter) == []
    assert seen == either
    assert turns() > before + 2
    listed = run("adapters", "list", "--json")
    assert [it["name"] for it in json.loads(listed.out)] == ["one", "turns", "two"]
    assert not [it for it in json.loads(listed.out) if "broken" in it]
    shown = run("adapters", "show", "turns", "--json")
    facts = {key: it for key, it in json.loads(shown.out).items() if key != "ancestors"} | {"name": "", "path": ""}
    assert json.dumps(facts, sort_keys=True) in either
    whole = run("adapters", "verify", "turns")
    assert (whole.status, whole.out) == (0, "turns: whole\n")


@pytest.fixture(scope="module")
def texts(stock: Path, gpt2: Path) -> dict[tuple[str | None, str], str]:
    """What each adapter writes after each prompt in a generator of its own."""
    found = {}
    for name in ("one", "two", None):
        for prompt in ("the actor", "the story never", "42: her voice"):
            chosen = [name] if name else []
            fresh = Generator(
                *chosen, adapters_dir=stock / "adapters", options=ModelOptions(base=str(gpt2), device="cpu")
            )
            found[name, prompt] = fresh.generate(prompt, GREEDY).text
    assert len({found[name, "the actor"] for name in ("one", "two", None)}) == 3
    return found


def test_generation_during_saves_is_consistent(
    turns: Callable[[], int], run: Run, world: Path, texts: dict[tuple[str | None, str], str]
) -> None:
    either = {texts[name, "the actor"] for name in ("one", "two")}
    generator = Generator("turns", adapters_dir=world / "adapters", options=ModelOptions(device="cpu"))
    seen, end = set(), time.monotonic() + 1.5
    while time.monotonic() < end or len(seen) < 2:
        seen.add(generator.generate_batch([("the actor", "turns")], GREEDY)[0].text)
        generator.set_adapter("turns")
        seen.add(generator.generate("the actor", GREEDY).text)
    assert seen == either
    for _ in range(2):
        options = ("--greedy", "--max-new-tokens", "12", "--repetition-penalty", "1")
        ended = run("generate", "--adapter", "turns", *options, "the actor")
        assert ended.status == 0, ended.err
        assert ended.out.removeprefix("the actor").removesuffix("\n") in either
    (world / "stop").touch()


def slowly() -> None:
    """In the process of a command: each token takes a while."""
    step = CpuDecoder.forward

    def slow(*arguments: Any, **more: Any) -> Any:
        time.sleep(0.03)
        return step(*arguments, **more)

    CpuDecoder.forward = slow  # type: ignore[method-assign]


def test_generation_continues_after_adapter_removal(start: Start, run: Run, world: Path) -> None:
    asked = ("generate", "--adapter", "one", "--greedy", "--max-new-tokens", "60", "the actor")
    alone = run(*asked)
    assert alone.status == 0
    writing = start(*asked, before=slowly)
    out = writing.folder / "out"
    writing.wait_for(lambda: out.exists() and len(out.read_bytes()) > len("the actor"))
    assert run("adapters", "remove", "one", "--yes").status == 0
    assert writing.process.is_alive()
    ended = writing.end()
    assert (ended.status, ended.out) == (0, alone.out)
    refused = run(*asked)
    assert (refused.status, refused.error_line) == (
        1,
        "Error: There is no adapter 'one', neither in adapters (two) nor as a path.",
    )


@pytest.mark.parametrize("way", ["our own way", pytest.param("transformers", marks=pytest.mark.slow)])
def test_threads_share_one_generator(
    world: Path,
    gpt2: Path,
    texts: dict[tuple[str | None, str], str],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    if way == "transformers":
        monkeypatch.setattr(CpuDecoder, "for_base", lambda base: None)
    generator = Generator(adapters_dir=world / "adapters", options=ModelOptions(base=str(gpt2), device="cpu"))
    asked, wrong, answered = list(texts), [], []

    def check(prompt: str, answer: Any) -> None:
        answered.append(answer)
        if answer.text != texts[answer.adapter, prompt]:
            wrong.append(answer)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            for _ in range(4):
                name, prompt = draw.choice(asked)
                match draw.randrange(4):
                    case 0:
                        rows = draw.sample(asked, 3)
                        answers = generator.generate_batch([(prompt, name) for name, prompt in rows], GREEDY)
                        assert [answer.adapter for answer in answers] == [name for name, _ in rows]
                        for (_, prompt), answer in zip(rows, answers, strict=True):
                            check(prompt, answer)
                    case 1:
                        generator.set_adapter(name)
                        check(prompt, generator.generate(prompt, GREEDY))
                    case 2:
                        pieces: list[str] = []
                        answer = generator.generate(prompt, GREEDY, on_text=pieces.append)
                        assert "".join(pieces) == answer.text
                        check(prompt, answer)
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
    assert len(answered) > 60


def unpacking(model: Path, arrived: Path) -> None:
    """In the process of a command: the embedded base is a small one, and both have begun to unpack it before either ends."""
    import transformers

    from lora_tuner.models import resolve

    file = model / "tiny.Q4_1.gguf"
    resolve._embedded_gguf = lambda: (file, "1.0")
    for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):

        def load(place: Any, *arguments: Any, real: Any = kind.from_pretrained, **more: Any) -> Any:
            if more.pop("gguf_file", None) is None:
                return real(place, *arguments, **more)
            made = real(place, *arguments, **more)
            if hasattr(made, "config"):
                made.config.quantization_config = {}
                arrived.touch()
                while len(list(arrived.parent.glob("unpacking-*"))) < 2:
                    time.sleep(0.005)
            return made

        kind.from_pretrained = load


def test_processes_unpack_base_at_once(start: Start, gpt2: Path, tmp_path: Path) -> None:
    model = shutil.copytree(gpt2, tmp_path / "package")
    (model / "tiny.Q4_1.gguf").write_bytes(b"GGUF")
    asked = ("generate", "--base", "smollm2-135m", "--greedy", "--max-new-tokens", "8", "the actor")
    both = [start(*asked, before=functools.partial(unpacking, model, tmp_path / f"unpacking-{it}")) for it in "ab"]
    ended = [command.end() for command in both]
    assert [it.status for it in ended] == [0, 0], ended[0].err + ended[1].err
    text = (
        Generator(options=ModelOptions(base=str(gpt2), device="cpu"))
        .generate("the actor", SamplingParams(greedy=True, max_new_tokens=8))
        .text
    )
    assert {it.out for it in ended} == {f"the actor{text}\n"}
    bases = list((tmp_path / ".cache" / "own" / "bases").iterdir())
    assert len(bases) == 1


@pytest.mark.slow
def test_trainings_share_empty_cache(start: Start, run: Run, world: Path, training: tuple[str | Path, ...]) -> None:
    several = [start(*training, "--name", f"new{it}") for it in range(4)]
    assert [command.end().status for command in several] == [0] * 4
    assert run(*training, "--name", "alone", "--adapters-dir", "others").status == 0
    alone = Library(world / "others").get("alone")
    for it in range(4):
        found = Library(world / "adapters").get(f"new{it}")
        is_whole(world, f"new{it}")
        assert found.manifest is not None
        assert alone.manifest is not None
        assert (found.sha256, found.manifest.result) == (alone.sha256, alone.manifest.result)
