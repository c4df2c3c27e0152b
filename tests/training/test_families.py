"""Each family of models trains, generates, is measured and merged."""

import pytest

from lora_tuner import ModelOptions, SamplingParams, evaluation, train
from lora_tuner.config import METHODS
from lora_tuner.convert.merge import merge
from lora_tuner.errors import ConfigError
from lora_tuner.inference.generator import EncodedPrompt, Generator
from lora_tuner.models.targets import resolve_target_modules

from ..model_families import CONTEXT, FAMILIES, make_family, save_family

PRECISIONS = ({"dtype": "bfloat16"}, {"load_in": "8bit"}, {"load_in": "4bit"})
DIFFERENT = ("mamba", "llama4_text", "deepseek_v3", "jamba")  # in what PEFT and kernels do with their layers
REST = [family for family in FAMILIES if family not in DIFFERENT]


@pytest.mark.parametrize(
    "family", [*DIFFERENT, *(pytest.param(family, marks=pytest.mark.slow) for family in REST)]
)
def test_family_trains_generates_and_merges(tmp_path, settings, family):
    check_family(tmp_path, settings, family)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_works_in_low_precision(tmp_path, settings, family, precision):
    check_family(tmp_path, settings, family, **precision)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_family_generates_in_int8(tmp_path, family):
    options = ModelOptions(base=str(save_family(tmp_path / family, family)), device="cpu", dtype="int8")
    prompt = EncodedPrompt("", list(range(10, 30)))
    output = Generator(options=options).generate(prompt, SamplingParams(max_new_tokens=2, greedy=True))
    assert output.tokens == 2 or output.finished


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
    measured = evaluation.evaluate([adapter], options=options)
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
