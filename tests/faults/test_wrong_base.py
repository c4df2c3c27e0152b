"""An adapter on a base other than its own is refused by every command, with both named and nothing written."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from lora_tuner import Generator, Library, ModelOptions
from lora_tuner.adapters.adapter import MANIFEST_FILE
from lora_tuner.cli.app import app
from lora_tuner.config import SamplingParams
from lora_tuner.errors import WrongBaseError
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import tiny_models
from . import hostile_adapters
from .process import contents

NAME = "x"
ROWS = ["--eval-dataset", "rows.txt", "--eval-rows", "2"]
PROMPT = ["the actor", "--greedy", "--max-new-tokens", "2"]
COMMANDS: dict[str, list[str]] = {
    "generate": ["generate", *PROMPT, "--adapter", NAME],
    "compare": ["compare", *PROMPT, "--adapter", NAME],
    "evaluate": ["evaluate", NAME, *ROWS],
    "merge": ["merge", NAME, "--out", "merged", *ROWS],
    "blend": ["blend", f"{NAME}=0.5", "--name", "blended", *ROWS],
    "compress": ["compress", NAME, "--name", "compressed", *ROWS],
    "export": ["export", NAME, "--out", "out.gguf"],
    "train": [
        "train",
        "--from",
        NAME,
        "--name",
        "next",
        "--dataset",
        "rows.csv",
        "--max-steps",
        "1",
        "--eval-rows",
        "2",
    ],
}
SAME_SIZES = ("gpt2", "gpt2 of another seed", "gpt2 with other heads")
SAME_LLAMAS = ("llama", "llama of another seed")
RETOKENISED = "gpt2 with another tokenizer"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, gpt2: Path, llama: Path) -> dict[str, Path]:
    """Bases by the way in which they differ."""
    root = tmp_path_factory.mktemp("bases")
    heads, words = (Path(shutil.copytree(gpt2, root / name)) for name in ("heads", "words"))
    config = AutoConfig.from_pretrained(heads)
    config.n_head = 2
    config.save_pretrained(heads)
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(words)
    return {
        "gpt2": gpt2,
        "gpt2 of another seed": tiny_models.save_model(root / "seed", "gpt2", seed=7),
        "gpt2 with other heads": heads,
        RETOKENISED: words,
        "wider gpt2": tiny_models.save_model(root / "wide", "gpt2", width=64),
        "deeper gpt2": tiny_models.save_model(root / "deep", "gpt2", layers=3),
        "shallower gpt2": tiny_models.save_model(root / "shallow", "gpt2", layers=1),
        "llama": llama,
        "llama of another seed": tiny_models.save_model(root / "llama", "llama", seed=7),
    }


@pytest.fixture(autouse=True)
def _workspace(tmp_path: Path) -> None:
    texts = tiny_models.reviews(30)
    (tmp_path / "rows.txt").write_text("\n".join(texts))
    (tmp_path / "rows.csv").write_text("text\n" + "\n".join(texts))
    for name in ("adapters", "runs"):
        (tmp_path / name).mkdir()


@pytest.fixture
def trained_on(tmp_path: Path, bases: dict[str, Path]) -> Callable[..., Path]:
    """Write an adapter whose manifest names this base."""

    def write(name: str, adapter_name: str = NAME) -> Path:
        base = load_base(find_base(str(bases[name])), ModelOptions(device="cpu"))
        folder = tmp_path / "adapters" / adapter_name
        if name.startswith("llama"):
            return hostile_adapters.write_on(
                folder, bases[name], base.tokenizer_hash, "model.layers.{}.self_attn.q_proj", 32
            )
        return hostile_adapters.write_on(folder, bases[name], base.tokenizer_hash)

    return write


def run(*arguments: Any) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*arguments: Any) -> str:
    """Run a command that must fail with status 1 and write nothing; returns its error line."""
    before = contents(Path.cwd())
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert errors == result.stderr.splitlines()[-1:], result.stderr
    assert contents(Path.cwd()) == before
    return errors[0]


ALL = [*SAME_SIZES, RETOKENISED, "wider gpt2", "deeper gpt2", "shallower gpt2", *SAME_LLAMAS]
QUICK = [*(("gpt2", other) for other in (*SAME_SIZES[1:], RETOKENISED, "wider gpt2")), SAME_LLAMAS]
PAIRS = [
    pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in QUICK)) for pair in itertools.permutations(ALL, 2)
]


@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_wrong_base_is_refused_by_commands(own, other, bases, trained_on):
    trained_on(own)
    for name, arguments in COMMANDS.items():
        same_weights = {own, other} == {"gpt2", RETOKENISED}
        if name == "export" and same_weights:
            continue  # the file contains no vocabulary
        line = refusal(*arguments, "--base", bases[other])
        if same_weights:
            assert line.startswith(
                f"Error: {NAME} was trained with another tokenizer than that of {bases[other]}."
            ), name
        else:
            assert line.startswith(f"Error: {NAME} was trained on {bases[own]} (fingerprint "), name
            assert f"not on {bases[other]} (fingerprint " in line, name
        assert "Name the right base with --base" in line, name


def test_own_base_is_accepted_by_commands(bases, trained_on):
    trained_on("gpt2")
    for arguments in COMMANDS.values():
        result = run(*arguments, "--base", bases["gpt2"])
        assert result.exit_code == 0, result.output
        assert "FORCED" not in result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_forced_wrong_base_gives_notice(name, bases, trained_on):
    trained_on("gpt2")
    result = run(*COMMANDS[name], "--base", bases["gpt2 of another seed"], "--force")
    assert result.exit_code == 0, result.output
    notices = [line for line in result.stderr.splitlines() if "FORCED" in line]
    assert notices
    assert notices[0].startswith(f"FORCED: {NAME} was trained on {bases['gpt2']} (fingerprint ")
    assert f"not on {bases['gpt2 of another seed']} (fingerprint " in notices[0]


@pytest.mark.parametrize(
    "other",
    ["shallower gpt2", *(pytest.param(other, marks=pytest.mark.slow) for other in ("wider gpt2", "llama"))],
)
@pytest.mark.parametrize("name", [*COMMANDS, "adopt"])
def test_wrong_shapes_are_refused_even_forced(name, other, bases, trained_on):
    """Shapes are compared even without a manifest."""
    folder = trained_on("gpt2")
    forced = ["--force"]
    if name == "adopt":
        (folder / MANIFEST_FILE).unlink()
        forced = []
    arguments = COMMANDS.get(name, ["adapters", "adopt", NAME])
    line = refusal(*arguments, "--base", bases[other], *forced)
    assert line.startswith(f"Error: adapters/{NAME} does not fit the base: "), line
    assert "transformer.h." in line
    if name == "adopt":
        assert not (folder / MANIFEST_FILE).exists()


@pytest.mark.parametrize("other", [*SAME_SIZES[1:], RETOKENISED, "llama"])
def test_generator_survives_refused_adapter(other, bases, trained_on, tmp_path):
    trained_on("gpt2")
    trained_on(other, "own")
    generator = Generator("own", adapters_dir=tmp_path / "adapters", options=ModelOptions(device="cpu"))
    greedy = SamplingParams(greedy=True, max_new_tokens=5)
    before = generator.generate("the actor", greedy)
    with pytest.raises(WrongBaseError, match=f"^{NAME} was trained "):
        generator.set_adapter(NAME)
    with pytest.raises(WrongBaseError):
        generator.generate_batch([("the actor", "own"), ("the actor", NAME)], greedy)
    assert (generator.current_adapter, generator.loaded_adapters) == ("own", ["own"])
    assert generator.generate("the actor", greedy) == before


@pytest.mark.parametrize(
    "other",
    [
        SAME_SIZES[1],
        *(pytest.param(other, marks=pytest.mark.slow) for other in (SAME_SIZES[2], RETOKENISED, "llama")),
    ],
)
@pytest.mark.parametrize("command", ["blend", "evaluate", "compare", "merge"])
def test_adapters_of_two_bases_are_refused(command, other, bases, trained_on):
    trained_on("gpt2")
    trained_on(other, "y")
    commands = {
        "blend": ["blend", "x=0.5", "y=0.5", "--name", "both", *ROWS],
        "evaluate": ["evaluate", "x", "y", *ROWS],
        "compare": ["compare", *PROMPT, "--adapter", "x", "--adapter", "y"],
        "merge": ["merge", "x", "y", "--out", "merged", "--base", bases["gpt2"], *ROWS],
    }
    if command == "merge":  # one after another, and finished ones stay
        result = run(*commands[command])
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith("Error: y was trained ")
        assert [path.name for path in Path("merged").iterdir()] == ["x"]
    else:
        assert refusal(*commands[command]).startswith("Error: y was trained ")
    assert Library().names() == ["x", "y"]


def test_replaced_base_folder_is_refused(bases, trained_on, tmp_path):
    base = Path(shutil.copytree(bases["gpt2"], tmp_path / "base"))
    folder = trained_on("gpt2")
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["base"] |= {"name": "base", "repo": "base"}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert run(*COMMANDS["generate"]).exit_code == 0
    shutil.rmtree(base)
    shutil.copytree(bases["gpt2 of another seed"], base)
    for arguments in COMMANDS.values():
        assert refusal(*arguments).startswith(f"Error: {NAME} was trained on base (fingerprint ")
