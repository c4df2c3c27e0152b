"""Each recipe is planned on rows like those in its head and, if it is for a CPU, trained for three steps."""

import csv
import itertools
import json
import re
from pathlib import Path

import pytest

from lora_tuner import Library, TrainConfig
from lora_tuner.settings_files import resolve_settings

from . import tiny_models
from .cli.test_commands import run
from .data.test_chat import save_chat_base

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
FOR_GPUS = {"qlora-24gb", "fsdp"}
ON_REAL_BASE = ["reviews", "chat-persona"]
EXAMPLE = re.compile(r"^# Data: ([^\s,]+).*\n((?:#     .*\n|#\n)+)", re.MULTILINE)


@pytest.fixture(scope="module")
def chat_base(tmp_path_factory):
    return save_chat_base(tmp_path_factory.mktemp("talk") / "talker")


def read_example(recipe):
    """Return the name of the data and the example rows in the head of a recipe."""
    name, rows = EXAMPLE.search(RECIPES[recipe].read_text(encoding="utf-8")).groups()
    return name, "\n".join(line[6:] for line in rows.splitlines()).strip().splitlines()


def vary(value, texts):
    """Return a row of the same shape with other phrases; roles, labels and JSON stay."""
    if isinstance(value, dict):
        return {name: vary(part, texts) for name, part in value.items()}
    if isinstance(value, list):
        return [vary(part, texts) for part in value]
    return next(texts) if isinstance(value, str) and " " in value else value


def write_data(recipe):
    """Write data like the example of a recipe, and return its path."""
    name, lines = read_example(recipe)
    path = Path("imdb.csv" if name == "imdb" else name)
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = iter(tiny_models.reviews(200))
    if path.suffix == ".jsonl":
        rows = itertools.cycle(map(json.loads, lines))
        path.write_text("".join(json.dumps(vary(next(rows), texts)) + "\n" for _ in range(60)))
    elif path.suffix == ".csv":
        rows = itertools.cycle(csv.DictReader(lines))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0].split(","))
            writer.writeheader()
            writer.writerows(vary(next(rows), texts) for _ in range(60))
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(next(texts).replace(". ", ".\n") for _ in range(60)))
    else:
        path.mkdir()
        for number in range(20):
            suffix = Path(lines[0].partition(":")[0]).suffix
            (path / f"{number}{suffix}").write_text("\n\n".join(next(texts) for _ in range(6)))
    return path


def train(recipe, base, *options):
    small = ("--max-length", tiny_models.CONTEXT, "--eval-rows", 8, "--device", "cpu", "--dtype", "float32")
    data = ("--dataset", write_data(recipe), "--base", base)
    return run("train", "--config", RECIPES[recipe], *data, *small, *options)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_says_its_name(recipe):
    config = resolve_settings(TrainConfig, {}, RECIPES[recipe])
    assert config.name == recipe
    assert config.dataset == read_example(recipe)[0]
    assert f"train --config recipes/{recipe}.yaml" in RECIPES[recipe].read_text(encoding="utf-8")
    assert f"| [{recipe}.yaml]({recipe}.yaml) |" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_planned(recipe, chat_base, tmp_path):
    estimate = json.loads(train(recipe, chat_base, "--plan", "--json").stdout)
    assert estimate["steps"] >= 1
    assert min(estimate["training_seconds"], estimate["peak_memory_bytes"], estimate["adapter_bytes"]) > 0
    assert estimate["gradient_checkpointing"] == (recipe in FOR_GPUS)
    assert not Path("adapters").exists()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in FOR_GPUS])
def test_recipe_trains_on_cpu(recipe, chat_base):
    train(recipe, chat_base, "--max-steps", 3)
    manifest = Library().get(recipe).manifest
    assert manifest.run.steps == 3
    assert (manifest.preference is not None) == (recipe in ("preferences-dpo", "thumbs-kto"))
    assert (manifest.labels is not None) == (recipe == "labels")


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("recipe", ON_REAL_BASE)
def test_recipe_trains_real_base(recipe):
    train(recipe, "smollm2-135m", "--max-steps", 3)
    manifest = Library().get(recipe).manifest
    assert (manifest.base.name, manifest.run.steps) == ("smollm2-135m", 3)
    assert manifest.result.loss != manifest.result.base_loss
