"""Whole models as GGUF: the file computes in llama.cpp what base and adapter compute here."""

import json
import shutil
import sys

import gguf
import numpy as np
import pytest
from transformers import AutoTokenizer

from lora_tuner import Generator, ModelOptions, SamplingParams, export_model
from lora_tuner.adapters.adapter import load_adapter_folder
from lora_tuner.convert import export_model as export_module
from lora_tuner.convert import llama_runtime
from lora_tuner.convert.gguf_model import write_model_gguf
from lora_tuner.convert.llama_runtime import LlamaModel
from lora_tuner.convert.quantize_gguf import quantize, tensor_types
from lora_tuner.data.eval_sets import EvalSet
from lora_tuner.errors import AdapterError, ConfigError, ignore_events

from .. import gguf_base, tiny_models
from ..cli.test_commands import run

PROMPT, TOKENS = "the actor", 8
GREEDY = SamplingParams(greedy=True, max_new_tokens=TOKENS, repetition_penalty=1.0)
ROWS = [EvalSet("reviews", tiny_models.reviews(12, seed=7))]


@pytest.fixture(scope="module", autouse=True)
def _library():
    pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return gguf_base.save(tmp_path_factory.mktemp("bases") / "llama", "llama")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return load_adapter_folder(gguf_base.adapt(base, tmp_path_factory.mktemp("adapters") / "random"))


def tensor_kinds(path):
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.slow
def test_exported_model_generates_same_text(adapter, base, tmp_path):
    exported = export_model(adapter, tmp_path / "model.gguf", dtype="float32", sets=ROWS)
    prompt = AutoTokenizer.from_pretrained(base)(PROMPT)["input_ids"]
    text, _ = gguf_base.LlamaCpp(exported.path).greedy(prompt, TOKENS)
    assert text == Generator(adapter.path, options=ModelOptions(device="cpu")).generate(PROMPT, GREEDY).text
    assert (exported.result.gain, exported.result.standard_error, exported.other_texts) == (0, 0, 0)
    assert exported.result.base_loss == exported.result.loss


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("q8_0", "f16")]


@pytest.mark.parametrize("kind", ["q4_k_m", *SLOW])
def test_quantized_model_reports_loss_difference(adapter, tmp_path, kind):
    exported = export_model(adapter, tmp_path / "model.gguf", quantization=kind, sets=ROWS)
    low, high = {"q4_k_m": (1e-4, 0.2), "q8_0": (1e-6, 0.02), "f16": (1e-9, 2e-3)}[kind]
    assert low < abs(exported.result.gain) < high
    assert exported.result.rows == 12
    assert exported.bytes == (tmp_path / "model.gguf").stat().st_size
    matrix = {"q4_k_m": "Q5_0", "q8_0": "Q8_0", "f16": "F16"}[kind]  # rows are too short for Q4_K
    assert tensor_kinds(exported.path)["blk.0.attn_q.weight"] == matrix
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_base_alone_is_exported(base, tmp_path):
    options = ModelOptions(base=str(base))
    exported = export_model(None, tmp_path / "base.gguf", quantization="q8_0", options=options)
    assert exported.result is None
    fields = gguf.GGUFReader(exported.path).fields
    assert fields["general.name"].contents() == "llama"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    measured = export_model(None, tmp_path / "f.gguf", quantization="f16", sets=ROWS, options=options)
    assert measured.result.rows == 12
    with pytest.raises(ConfigError, match=r"^Name an adapter, or a base with --base\.$"):
        export_model(None, tmp_path / "b.gguf")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A float32 GGUF file whose rows are long enough for all types."""
    folder = tiny_models.save_model(tmp_path_factory.mktemp("wide") / "llama", "llama", width=256, layers=8)
    path = folder.parent / "wide.gguf"
    write_model_gguf(folder, path, "float32")
    return path


def test_q4_k_m_types_follow_llama_cpp(wide):
    """As in a file that llama.cpp has quantized: more bits for the first, the last and every third
    block, and for the embeddings that are the output as well."""
    types = {name: kind.name for name, kind in tensor_types(gguf.GGUFReader(wide), "q4_k_m").items()}
    assert types["token_embd.weight"] == "Q6_K"
    assert types["output_norm.weight"] == types["blk.3.attn_norm.weight"] == "F32"
    for layer in ("attn_v", "ffn_down"):
        more = [block for block in range(8) if types[f"blk.{block}.{layer}.weight"] == "Q6_K"]
        assert more == [0, 3, 6, 7]
    others = {
        kind for name, kind in types.items() if any(part in name for part in ("_q.", "_k.", "_output.", "_up."))
    }
    assert others == {"Q4_K"}


@pytest.mark.slow
def test_quantized_tensors_are_llama_cpps(wide, tmp_path):
    exact = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(wide).tensors}
    quantize(wide, tmp_path / "q8.gguf", "q8_0", ignore_events)
    for tensor in gguf.GGUFReader(tmp_path / "q8.gguf").tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0:
            expected = gguf.quants.quantize(exact[tensor.name], tensor.tensor_type)
            assert np.mean(tensor.data == expected) > 0.999  # halves are rounded to either side
    quantize(wide, tmp_path / "q4.gguf", "q4_k_m", ignore_events)
    errors = {}
    for tensor in gguf.GGUFReader(tmp_path / "q4.gguf").tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        difference = np.square(values - exact[tensor.name]).mean() / np.square(exact[tensor.name]).mean()
        errors.setdefault(tensor.tensor_type.name, []).append(float(difference))
    assert 0 == max(errors["F32"]) < max(errors["Q6_K"]) < 1e-3 < max(errors["Q4_K"]) < 1e-2


def test_values_out_of_range_are_refused(base, tmp_path):
    write_model_gguf(base, tmp_path / "exact.gguf", "float32")
    reader = gguf.GGUFReader(tmp_path / "exact.gguf", "r+")
    next(tensor for tensor in reader.tensors if "ffn_up" in tensor.name).data[0, 0] = 1e6
    reader.data.flush()
    with pytest.raises(AdapterError) as error:
        quantize(tmp_path / "exact.gguf", tmp_path / "f16.gguf", "f16", ignore_events)
    assert str(error.value) == (
        f"{tmp_path}/f16.gguf is not kept: blk.0.ffn_up.weight has values out of the range of F16."
    )
    assert not (tmp_path / "f16.gguf").exists()


def test_unloadable_file_is_refused(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(AdapterError, match=r"^bad\.gguf is not kept: llama\.cpp does not load it \("):
        LlamaModel(tmp_path / "bad.gguf", 64)


def test_wrong_file_is_not_kept(adapter, tmp_path, monkeypatch):
    def spoil(folder, out, dtype, **settings):
        write_model_gguf(folder, out, dtype, **settings)
        reader = gguf.GGUFReader(out, "r+")
        next(tensor for tensor in reader.tensors if "attn_q" in tensor.name).data[:] *= 3
        reader.data.flush()

    monkeypatch.setattr(export_module, "write_model_gguf", spoil)
    with pytest.raises(
        AdapterError, match=r"is not kept: llama.cpp computes a loss of \d.\d+ with it, and trans"
    ):
        export_model(adapter, tmp_path / "model.gguf", sets=ROWS)
    assert list(tmp_path.iterdir()) == []


def test_model_export_without_space_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module.atomic_io, "free_space", lambda path: 0)
    with pytest.raises(
        AdapterError, match=r"needs 0\.0 GB while it is written, and 0\.0 GB are free: free some space, or"
    ):
        export_model(None, tmp_path / "base.gguf", options=ModelOptions(base=str(base)))
    assert list(tmp_path.iterdir()) == []


def test_missing_library_is_one_line(adapter, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    llama_runtime.load_library.cache_clear()
    with pytest.raises(ConfigError) as error:
        export_model(adapter, tmp_path / "model.gguf")
    assert str(error.value) == (
        "A whole model as GGUF needs llama.cpp's library: pip install 'lora_tuner[gguf]' or xllamacpp."
    )


def test_library_without_c_api_is_refused(monkeypatch):
    monkeypatch.setitem(llama_runtime._FUNCTIONS, "llama_missing", (None, []))
    llama_runtime.load_library.cache_clear()
    with pytest.raises(
        ConfigError, match=r"^This build of xllamacpp does not export llama_missing of llama\.cpp"
    ):
        llama_runtime.load_library()
    llama_runtime.load_library.cache_clear()


def test_model_export_keeps_existing_file(adapter, base, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_bytes(b"GGUF")
    with pytest.raises(AdapterError, match=r"exists: choose another --out, or replace it with --overwrite\.$"):
        export_model(adapter, out)
    with pytest.raises(AdapterError, match="would replace or change its base"):
        export_model(adapter, base / "model.gguf")
    assert out.read_bytes() == b"GGUF"
    export_model(adapter, out, overwrite=True)
    assert out.stat().st_size > 1000


REFUSED = {
    "--quantize: only valid for a whole model: use --merged.": "a --quantize q8_0",
    "--quantize: only valid for a whole model: use --merged. ": "a --to ollama --no-merged --quantize q8_0",
    "--dtype: not valid with --quantize, which chooses the precision.": "a --merged --quantize f16 --dtype float16",
    "--eval-rows: only valid where the result is measured: use --merged or --to ollama.": "a --eval-rows 5",
    "--eval-dataset: only valid where the result is measured: use --merged or --to ollama.": (
        "a --no-merged --eval-dataset x.csv"
    ),
    "--eval-split: only valid where the result is measured: use --merged or --to ollama.": "a --eval-split test",
    "eval_split: only valid with --eval-dataset.": "a --merged --eval-split test",
    "--merged, --no-merged: only valid with an adapter.": "--base b --merged",
    "--force: only valid with an adapter.": "--base b --force",
    "--adapters-dir: only valid with an adapter.": "--base b --adapters-dir other",
    "--eval-rows: only valid with an adapter or --eval-dataset.": "--base b --eval-rows 5",
    "Name an adapter, or a base with --base.": "--quantize q8_0",
}


@pytest.mark.parametrize("message", REFUSED)
def test_wrong_export_options_are_refused(adapter, tmp_path, message):
    shutil.copytree(adapter.path, tmp_path / "adapters" / "a")
    result = run("export", *REFUSED[message].split(), "--out", "x", exit_code=1)
    assert result.stderr.strip() == f"Error: {message.strip()}"
    assert not (tmp_path / "x").exists()


def test_export_command_prints_loss_difference(adapter, tmp_path):
    shutil.copytree(adapter.path, tmp_path / "adapters" / "a")
    (tmp_path / "rows.txt").write_text("\n\n".join(tiny_models.reviews(6, seed=3)))
    command = ["export", "a", "--merged", "--quantize", "q8_0", "--eval-dataset", "rows.txt", "--out", "a.gguf"]
    first, second = run(*command).stdout.splitlines()
    assert first.startswith("a.gguf  ")
    assert first.endswith(", q8_0")
    assert second.startswith("held-out loss ")
    assert " in llama.cpp, a difference of " in second
    printed = json.loads(run(*command, "--overwrite", "--json").stdout)
    assert printed["result"]["rows"] == 6
    assert (printed["path"], printed["precision"], printed["other_texts"]) == ("a.gguf", "q8_0", 0)
