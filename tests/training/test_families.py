"""Each family of models trains, generates, is measured and merged: the table of docs/models.md."""

import re

import pytest

from lora_tuner import ModelOptions, SamplingParams, train
from lora_tuner.config import METHODS
from lora_tuner.convert.merge import merge
from lora_tuner.errors import ConfigError
from lora_tuner.evaluation import gain_matrix
from lora_tuner.inference.generator import EncodedPrompt, Generator
from lora_tuner.models.targets import resolve_target_modules

from .. import family_table
from ..model_families import CONTEXT, FAMILIES, make_family, save_family

PRECISIONS = ({"dtype": "bfloat16"}, {"load_in": "8bit"}, {"load_in": "4bit"})
QUICK = ("DeepSeek-V3", "Mamba")  # their layers differ most
# Of the issue that asks for the table.
REQUIRED = """gpt2 gpt_neox opt bloom falcon llama mistral qwen2 qwen3 qwen3_moe mixtral gpt_oss gemma2 gemma3_text phi3
olmo2 smollm3 glm4 qwen3_5 deepseek_v3 mamba bamba"""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in family_table.ROWS]
)
def test_row_of_family_is_current(tmp_path, name):
    text = family_table.PAGE.read_text(encoding="utf-8")
    computed = family_table.compute_row(tmp_path, name)
    assert family_table.read_rows(text)[name] == computed, f"run `python -m tests.family_table '{name}'`"


def test_table_of_families_is_complete():
    text = family_table.PAGE.read_text(encoding="utf-8")
    rows = family_table.read_rows(text)
    assert list(rows) == list(family_table.ROWS)
    columns = [*family_table.COLUMNS, *family_table.LAYER_COLUMNS]
    for name, row in rows.items():
        assert [*row] == columns, name
        assert all(row[column] for column in columns if column != "not adapted"), name
        assert "no" not in row.values(), name  # without a reason
    assert family_table.render(rows) in text  # numbered in order, no reason without a cell
    tried = {model_type for model_type, _ in family_table.ROWS.values()}
    assert tried == FAMILIES.keys()
    assert tried >= {*REQUIRED.split()}
    explained = re.findall(r"^\| ([^|]*) \| [^|]* \|$", text, re.MULTILINE)
    assert explained[2:] == list(family_table.COLUMNS)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_works_in_low_precision(tmp_path, settings, family, precision):
    check_family(tmp_path, settings, family, **precision)


def check_family(tmp_path, settings, family, **precision):
    base = save_family(tmp_path / family, family)
    config = settings(base=str(base), max_steps=2, max_length=32, batch_size=1, eval_rows=2, **precision)
    adapter = train(config)
    assert adapter.manifest.run.coverage > 0.1
    options = ModelOptions(device="cpu", **precision)
    generator = Generator(str(adapter.path), options=options)
    context = min(generator.base.max_context, CONTEXT)
    prompt = EncodedPrompt("", list(range(10, 8 + context)))
    output = generator.generate(prompt, SamplingParams(max_new_tokens=2, greedy=True))
    assert output.tokens == 2 or output.finished
    measured = gain_matrix.evaluate([adapter], options=options)
    assert measured.cells[0][0].loss == pytest.approx(adapter.manifest.result.loss, abs=1e-5)
    merged = merge(adapter, tmp_path / "merged", options=ModelOptions()).comparison
    if not precision:
        assert merged.losses[1] == pytest.approx(adapter.manifest.result.loss, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in METHODS if method != "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_method_trains_family(tmp_path, settings, family, method):
    base = save_family(tmp_path / family, family)
    config = settings(base=str(base), method=method, max_steps=1, max_length=32, batch_size=1, eval_rows=2)
    if method == "dora" and resolve_target_modules(make_family(family), "auto").experts:
        with pytest.raises(ConfigError, match="there is no DoRA for experts in PEFT") as error:
            train(config)
        config = config.model_copy(update={"target_modules": str(error.value).split("--target-modules ")[1][:-1]})
    assert train(config).manifest.run.method == method
