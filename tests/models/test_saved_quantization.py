"""Bases whose weights are saved in 8 or 4 bits: their quantization is that of every command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lora_tuner import Generator, Library, ModelOptions, SamplingParams, blend, compress, merge, train
from lora_tuner.convert.export_gguf import to_gguf
from lora_tuner.errors import BaseModelError
from lora_tuner.evaluation import gain_matrix
from lora_tuner.models import memory
from lora_tuner.models.layers_in_files import layer_sizes_in_files
from lora_tuner.models.loading import dequantize, load_base
from lora_tuner.models.resolve import find_base

from .. import tiny_models

pytest.importorskip("bitsandbytes")

CPU = ModelOptions(device="cpu")
SETTINGS = {
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
}
KINDS = [
    ("llama", "4bit"),
    ("gpt2", "8bit"),
    ("gpt2", "fp4"),
    pytest.param("llama", "8bit", marks=pytest.mark.slow),
]
IDS = torch.arange(1, 20)[None]


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    root = tmp_path_factory.mktemp("full")
    return {kind: tiny_models.save_model(root / kind, kind, width=64) for kind in ("llama", "gpt2")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, full):
    """Save a base in 8 or 4 bits as transformers does; each once."""
    root, folders = tmp_path_factory.mktemp("saved"), {}

    def save(kind: str, bits: str) -> Path:
        if (kind, bits) not in folders:
            folder = folders[kind, bits] = root / f"{kind}-{bits}"
            config = BitsAndBytesConfig(**SETTINGS[bits])
            model = AutoModelForCausalLM.from_pretrained(
                full[kind], quantization_config=config, device_map={"": "cpu"}
            )
            model.save_pretrained(folder)
            tiny_models.tokenizer().save_pretrained(folder)
        return folders[kind, bits]

    return save


def logits(base):
    with torch.no_grad():
        return base.model(IDS).logits.float()


@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_saved_quantization_is_load_in(kind, bits, full, saved):
    load_in = bits.replace("fp4", "4bit")
    base = load_base(find_base(str(saved(kind, bits))), CPU)
    assert (base.load_in, base.dtype) == (load_in, torch.float32)
    if bits != "fp4":  # what --load-in makes of the full base
        loaded = load_base(find_base(str(full[kind])), replace(CPU, load_in=load_in), training=True)
        assert torch.equal(logits(base), logits(loaded))
    again = load_base(base.files, replace(CPU, load_in=load_in, dtype="bfloat16"))
    assert (logits(again) - logits(base)).abs().max() < 0.2
    quantized = {name for name, module in again.model.named_modules() if hasattr(module, "source_cls")}
    dtypes = {
        parameter.dtype
        for name, parameter in again.model.named_parameters()
        if name.rpartition(".")[0] not in quantized
    }
    assert dtypes == {torch.bfloat16}
    assert base.files.fingerprint != find_base(str(full[kind])).fingerprint


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("llama", "4bit"), *(pytest.param("gpt2", bits, marks=pytest.mark.slow) for bits in ("8bit", "fp4"))],
)
def test_saved_quantization_through_all_commands(kind, bits, saved, settings, tmp_path):
    adapter = train(settings(base=str(saved(kind, bits))))
    manifest = adapter.manifest
    assert manifest.run.load_in == bits.replace("fp4", "4bit")
    assert manifest.result.gain > 2 * manifest.result.standard_error
    cell = gain_matrix.evaluate([adapter], options=CPU).cells[0][0]
    assert cell.loss == pytest.approx(manifest.result.loss, abs=1e-3)
    greedy = SamplingParams(greedy=True, max_new_tokens=6)
    generator = Generator("reviews", options=CPU)
    generated = generator.generate("the actor", greedy).text
    assert generator.generate_batch([("the actor", None), ("the actor", "reviews")], greedy)[1].text == generated

    sizes = layer_sizes_in_files(generator.base.files, adapter)
    assert sizes == {module: adapter.layer_size(module) for module in adapter.modules}
    notices = []
    options = replace(CPU, notify=lambda event: notices.append(event))
    result = merge(adapter, tmp_path / "merged", options=replace(options, device="auto"))
    texts = [getattr(event, "text", "") for event in notices]
    dequantized = (
        f"The weights of {saved(kind, bits)} are saved in {manifest.run.load_in}: dequantized to float32."
    )
    assert texts.count(dequantized) == 1
    assert result.comparison.max_logit_difference < 1e-4
    assert result.comparison.losses[1] == pytest.approx(manifest.result.loss, abs=5e-3)
    merged = load_base(find_base(str(tmp_path / "merged")), CPU)
    assert (merged.load_in, merged.files.quantization) == ("full", None)
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "merged"), "quantization_config")

    library = Library()
    blended = blend([(adapter, 1.0)], "blended", library, options=CPU)
    assert blended.results["reviews"].loss == pytest.approx(manifest.result.loss, abs=5e-3)
    compressed = compress(adapter, "compressed", library, options=CPU)
    assert compressed.comparison.max_logit_difference < 1e-3
    assert to_gguf(adapter, tmp_path / "out.gguf").tensors == 2 * len(adapter.modules)


@pytest.mark.parametrize(("kind", "bits"), KINDS)
def test_saved_quantization_has_sizes_before_quantization(kind, bits, full, saved):
    files, full_files = find_base(str(saved(kind, bits))), find_base(str(full[kind]))
    assert files.shapes.keys() == full_files.shapes.keys()
    for name, shape in files.shapes.items():
        transposed = full_files.shapes[name][::-1]  # as GPT-2's are in full precision
        assert shape in (full_files.shapes[name], transposed)


def test_memory_of_saved_quantization_is_own_size(full, saved, monkeypatch):
    files = find_base(str(saved("llama", "4bit")))
    weights = (files.folder / "model.safetensors").stat().st_size
    needed = memory._weight_bytes(files, torch.float32, "4bit")
    assert 0.8 * weights < needed <= weights
    monkeypatch.setattr(memory, "free_memory", lambda device: needed)
    base = load_base(files, replace(CPU, dtype="float32"))
    with pytest.raises(BaseModelError, match=r"in float32, and .* are free: choose a smaller base"):
        dequantize(base)
    monkeypatch.setattr(memory, "free_memory", lambda device: needed // 2)
    with pytest.raises(BaseModelError, match=r"in 4bit, and .* are free: choose a smaller base"):
        load_base(files, CPU)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"load_in": "8bit"}, "--load-in 8bit"),
        ({"load_in": "full"}, "--load-in full"),
        ({"dtype": "int8"}, "--dtype int8"),
    ],
)
def test_settings_that_contradict_weights_are_refused(saved, options, text):
    files = find_base(str(saved("llama", "4bit")))
    with pytest.raises(BaseModelError) as error:
        load_base(files, replace(CPU, **options))
    assert str(error.value) == (
        f"The weights of {files.name} are saved in 4bit, so they cannot be loaded with {text}: leave it out."
    )


def test_saved_quantization_without_bitsandbytes_is_refused(saved, monkeypatch):
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match="saved in 4bit, which needs bitsandbytes: pip install bitsandbytes"):
        load_base(find_base(str(saved("llama", "4bit"))), CPU)


@pytest.mark.parametrize(
    ("key", "settings", "name"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "mxfp4"}, "mxfp4"),
        ("quantization_config", {"bits": 4, "group_size": 128}, "an unnamed format"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("text_config", {"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_other_kinds_of_quantization_are_named(full, tmp_path, key, settings, name):
    folder = Path(shutil.copytree(full["llama"], tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: settings}))
    with pytest.raises(BaseModelError) as error:
        load_base(find_base("base"), CPU)
    assert str(error.value).startswith(f"The weights of base are saved in {name}, and only those of bitsandbytes")


def test_config_that_contradicts_weights_is_refused(full, saved, tmp_path):
    for name, weights, config in (
        ("a", full["llama"], saved("llama", "4bit")),
        ("b", saved("gpt2", "8bit"), full["gpt2"]),
    ):
        shutil.copytree(weights, tmp_path / name)
        shutil.copyfile(config / "config.json", tmp_path / name / "config.json")
    for name, text in (
        ("a", "The weights of a are not quantized, but its config.json says that they are quantized to 4bit"),
        ("b", "The weights of b are quantized to 8bit, but its config.json says that they are not quantized"),
    ):
        with pytest.raises(BaseModelError) as error:
            load_base(find_base(name), CPU)
        assert str(error.value) == f"{text}: restore the config.json that was saved with them."
