"""GGUF export, tested in llama.cpp itself: on a float32 base it must generate the same text."""

import functools
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_tuner import Generator, Library, ModelOptions
from lora_tuner.adapters.adapter import WEIGHTS_FILE, load_adapter_folder, weights_info
from lora_tuner.adapters.llama_cpp import ARCHITECTURES
from lora_tuner.config import SamplingParams
from lora_tuner.convert.adopt import adopt
from lora_tuner.convert.export_gguf import to_gguf
from lora_tuner.errors import AdapterError, ConfigError, WrongBaseError
from lora_tuner.models.resolve import find_base
from lora_tuner.models.tokenizer import TokenizedBase, load_tokenizer

from .. import adapter_files, gguf_base, ollama
from ..cli.test_commands import run
from ..parameters import sampled

PROMPT, TOKENS = "the actor", 8
GREEDY = SamplingParams(greedy=True, max_new_tokens=TOKENS, repetition_penalty=1.0)
RANKS, ALPHAS = (2, 6), (3, 20)  # of the layers in the patterns
VARIANTS = {
    "float32": ({}, "float32"),
    "float16": ({}, "float16"),
    "bfloat16": ({}, "bfloat16"),
    "rsLoRA": ({"use_rslora": True}, "float16"),
    "patterns": ({"rank_pattern": RANKS, "alpha_pattern": ALPHAS}, "float16"),
    "rsLoRA, patterns": ({"use_rslora": True, "rank_pattern": RANKS, "alpha_pattern": ALPHAS}, "float16"),
    "alpha 0, a pattern": ({"lora_alpha": 0, "alpha_pattern": (24,)}, "float16"),
}
TOLERANCE = {
    "float32": 2e-3,
    "float16": 1e-2,
    "bfloat16": 5e-2,
}  # of log-probabilities; llama.cpp rounds inputs too


@pytest.fixture(scope="module")
def llama_cpp():
    pytest.importorskip("xllamacpp")
    return gguf_base.LlamaCpp


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Architecture -> model folder, created on first use."""
    folder = tmp_path_factory.mktemp("bases")
    return functools.cache(lambda kind: gguf_base.save(folder / kind, kind))


@pytest.fixture(scope="module")
def base_gguf(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return functools.cache(lambda kind: gguf_base.convert(base(kind), folder / f"{kind}.gguf"))


@pytest.fixture
def make(base, tmp_path):
    def write(kind, name="random", **settings):
        return load_adapter_folder(gguf_base.adapt(base(kind), tmp_path / "adapters" / name, **settings))

    return write


def log_probabilities(model, ids):
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)


@pytest.mark.parametrize("variant", sampled(VARIANTS, 3))
@pytest.mark.parametrize("kind", gguf_base.SEEDS)
def test_llama_cpp_output_matches(llama_cpp, make, base, base_gguf, tmp_path, kind, variant):
    settings, dtype = VARIANTS[variant]
    adapter = make(kind, **settings)
    exported = to_gguf(adapter, tmp_path / "random.gguf", dtype=dtype)
    prompt = AutoTokenizer.from_pretrained(base(kind))(PROMPT)["input_ids"]
    llama = llama_cpp(base_gguf(kind), exported.path)
    text, tokens = llama.greedy(prompt, TOKENS, top=320)
    assert text == Generator(adapter.path, options=ModelOptions(device="cpu")).generate(PROMPT, GREEDY).text
    plain = AutoModelForCausalLM.from_pretrained(base(kind))
    ids = prompt + [number for number, _ in tokens]
    without = log_probabilities(plain, ids)
    expected = log_probabilities(PeftModel.from_pretrained(plain, adapter.path), ids)
    assert (expected - without).abs().max() > 5 * TOLERANCE[dtype]
    for position, (_, top) in enumerate(tokens, len(prompt) - 1):
        assert len(top) == 320
        assert all(abs(expected[position, number] - value) < TOLERANCE[dtype] for number, value in top.items())
    if variant != "alpha 0, a pattern":
        assert llama.greedy(PROMPT, TOKENS, scale=0.0)[0] != text


@pytest.mark.parametrize("kind", gguf_base.SEEDS)
def test_zero_alpha_export_equals_base(llama_cpp, make, base_gguf, tmp_path, kind):
    exported = to_gguf(make(kind, lora_alpha=0), tmp_path / "nothing.gguf")
    for prompt in (PROMPT, "7: her voice"):
        plain = llama_cpp(base_gguf(kind)).greedy(prompt, TOKENS, top=5)
        assert llama_cpp(base_gguf(kind), exported.path).greedy(prompt, TOKENS, top=5) == plain


def test_llama_cpp_rejects_other_architecture(llama_cpp, make, base_gguf, tmp_path):
    exported = to_gguf(make("llama"), tmp_path / "random.gguf")
    for kind in ("mistral", "gpt2"):
        with pytest.raises(RuntimeError):
            llama_cpp(base_gguf(kind), exported.path)


def read_back(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors
    }


@pytest.fixture
def make_chat(base, tmp_path):
    """Make an adapter on a base whose chat template ends turns with a token."""

    def write(token):
        folder = shutil.copytree(base("llama"), tmp_path / "chat" / "llama")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        token = token or tokenizer.eos_token
        if token != tokenizer.eos_token:
            tokenizer.add_special_tokens({"additional_special_tokens": [token]})
        messages = "{% for m in messages %}{{ m.role }}: {{ m.content }}"
        tokenizer.chat_template = messages + token + "\n{% endfor %}"
        tokenizer.save_pretrained(folder)
        return load_adapter_folder(gguf_base.adapt(folder, tmp_path / "adapters" / "chat"))

    return write


@pytest.mark.parametrize("token", ["film", "!", '<"\\end>', None])
def test_turn_end_is_in_gguf_and_modelfile(make_chat, tmp_path, token):
    adapter = make_chat(token)
    exported = to_gguf(adapter, tmp_path / "chat.gguf")
    number = AutoTokenizer.from_pretrained(adapter.base).get_vocab()[token] if token else None
    assert (exported.turn_end, exported.turn_end_id) == (token, number)
    assert read_back(exported.path)[0].get("tokenizer.ggml.eot_token_id") == number
    stop = {"stop": [token]} if token else {}
    files = {"FROM": ["./base.gguf"], "ADAPTER": ["./chat.gguf"]}
    assert ollama.parse_modelfile(exported.modelfile) == files | stop


def test_export_refuses_other_chat_template(make_chat, tmp_path):
    adapter = make_chat("film")
    files = find_base(adapter.base)
    base = TokenizedBase(files, load_tokenizer(files)).info(with_template=True)
    manifest = adapter_files.manifest(base=base.model_dump() | {"chat_template": "0" * 64}, run=None)
    manifest = manifest.model_copy(update={"weights": weights_info(adapter)})
    (adapter.path / "manifest.json").write_text(manifest.to_json())
    with pytest.raises(WrongBaseError, match="was trained with another chat template"):
        to_gguf(load_adapter_folder(adapter.path), tmp_path / "chat.gguf")


def test_export_command_prints_modelfile(make_chat):
    make_chat("!")
    output = run("export", "chat", "--out", "a.gguf").stdout
    assert "Answers end with !" in output
    assert output.endswith('FROM ./base.gguf\nADAPTER ./a.gguf\nPARAMETER stop "!"\n')


def test_llama_cpp_stops_at_exported_turn_end(llama_cpp, make, make_chat, base, base_gguf, tmp_path):
    """With the id in the GGUF file of the base, which has the template."""
    plain = to_gguf(make("llama"), tmp_path / "plain.gguf")
    ids = [number for number, _ in llama_cpp(base_gguf("llama"), plain.path).greedy(PROMPT, TOKENS)[1]]
    token = AutoTokenizer.from_pretrained(base("llama")).convert_ids_to_tokens(ids[0])
    chat = make_chat(token)
    exported = to_gguf(chat, tmp_path / "chat.gguf")
    ending = gguf_base.convert(Path(chat.base), tmp_path / "base.gguf")
    stopped = llama_cpp(ending, exported.path).greedy(PROMPT, TOKENS)[1]
    assert len(stopped) <= 1 < len(ids)


def test_gguf_tensor_names_and_scales(make, tmp_path):
    adapter = make("gpt2", **VARIANTS["rsLoRA, patterns"][0])
    exported = to_gguf(adapter, tmp_path / "new" / "random.gguf", dtype="float32")
    fields, tensors = read_back(exported.path)
    assert fields == {
        "general.architecture": "gpt2",
        "general.type": "adapter",
        "general.name": "random",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    layers = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
    names = {f"blk.{block}.{layer}.weight.lora_{part}" for block in (0, 1) for layer in layers for part in "ab"}
    assert set(tensors) == names
    weights = load_file(adapter.path / WEIGHTS_FILE)
    for name, module, rank, scale in (
        ("blk.0.attn_qkv", "transformer.h.0.attn.c_attn", 2, 3 / 2**0.5),
        ("blk.1.ffn_down", "transformer.h.1.mlp.c_proj", 6, 20 / 6**0.5),
        ("blk.1.attn_output", "transformer.h.1.attn.c_proj", 4, 8 / 4**0.5),
    ):
        down, up = (weights[f"base_model.model.{module}.lora_{part}.weight"].numpy() for part in "AB")
        assert tensors[f"{name}.weight.lora_a"].shape == down.shape == (rank, len(down[0]))
        found = 8 / rank * tensors[f"{name}.weight.lora_b"] @ tensors[f"{name}.weight.lora_a"]
        np.testing.assert_allclose(found, scale * up @ down, rtol=1e-5, atol=1e-6)
    assert (exported.tensors, exported.bytes, exported.error) == (16, exported.path.stat().st_size, 0)


def test_gguf_permutes_qk_for_llama(make, tmp_path):
    permuted = [0, 4, 1, 5, 2, 6, 3, 7]  # of each head of 8
    for kind, order in (("llama", permuted), ("qwen2", sorted(permuted))):
        adapter = make(kind, kind)
        _, tensors = read_back(to_gguf(adapter, tmp_path / f"{kind}.gguf", dtype="float32").path)
        weights = load_file(adapter.path / WEIGHTS_FILE)
        for layer, heads in (("q", 4), ("k", 2), ("v", 2)):
            rows = [8 * head + row for head in range(heads) for row in (sorted(order) if layer == "v" else order)]
            up = weights[f"base_model.model.model.layers.1.self_attn.{layer}_proj.lora_B.weight"].numpy()
            assert (tensors[f"blk.1.attn_{layer}.weight.lora_b"] == up[rows]).all()


def test_export_reports_rounding_error(make, tmp_path):
    adapter = make("llama")
    for dtype, low, high in (("float16", 2**-13, 2**-11), ("bfloat16", 2**-10, 2**-8)):
        assert low < to_gguf(adapter, tmp_path / f"{dtype}.gguf", dtype=dtype).error <= high


def spoil(adapter, part, change):
    """Change the first tensor of that name and load the adapter again."""
    tensors = load_file(adapter.path / WEIGHTS_FILE)
    name = next(name for name in tensors if f"{part}.lora_B" in name)
    tensors[name] = change(tensors[name])
    save_file(tensors, adapter.path / WEIGHTS_FILE)
    return load_adapter_folder(adapter.path)


def refused(adapter, out, *, dtype="float16", overwrite=False, **options):
    """The error message of an export that fails and writes nothing."""
    before = {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()}
    with pytest.raises(AdapterError) as error:
        to_gguf(adapter, out, dtype=dtype, overwrite=overwrite, options=ModelOptions(**options))
    assert {path: path.read_bytes() for path in out.parent.iterdir() if path.is_file()} == before
    return str(error.value)


def test_export_replaces_file_atomically(make, tmp_path):
    out, adapter = tmp_path / "random.gguf", make("gpt2")
    to_gguf(adapter, out)
    message = f"{out} exists: choose another --out, or replace it with --overwrite."
    assert refused(adapter, out) == message
    old = out.read_bytes()
    large = spoil(adapter, "c_attn", lambda values: values * 1e6)
    assert refused(large, out) == message
    assert "out of the range of float16" in refused(large, out, overwrite=True)
    to_gguf(large, out, dtype="bfloat16", overwrite=True)
    assert out.read_bytes() != old


@pytest.mark.parametrize("factor", [1e6, 1e-7])
def test_export_out_of_float16_range_fails(make, tmp_path, factor):
    adapter = spoil(make("llama"), "up_proj", lambda values: values * factor)
    advice = "random has values out of the range of float16: use bfloat16 or float32."
    assert refused(adapter, tmp_path / "random.gguf") == advice
    for dtype in ("bfloat16", "float32"):
        to_gguf(adapter, tmp_path / f"{dtype}.gguf", dtype=dtype)
    with pytest.raises(ConfigError, match="dtype is int8: use one of float32, float16, bfloat16"):
        to_gguf(adapter, tmp_path / "int8.gguf", dtype="int8")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("layer", ["0.self_attn.q_proj", "1.mlp.down_proj"])
def test_export_out_of_float32_range_fails(make, tmp_path, layer):
    adapter = spoil(make("llama"), layer, lambda values: values.double() * 1e60)
    assert "out of the range of float32" in refused(adapter, tmp_path / "random.gguf", dtype="float32")


def test_export_damaged_weights_fails(make, tmp_path):
    adapter = spoil(make("gpt2"), "c_attn", lambda values: values * float("nan"))
    assert "is damaged: " in (message := refused(adapter, tmp_path / "random.gguf"))
    assert "has values that are not finite" in message


def test_export_dora_or_unknown_layers_fails(tmp_path):
    magnitudes = {
        f"base_model.model.{module}.lora_magnitude_vector": np.ones(18, np.float32)
        for module in adapter_files.MODULES
    }
    dora = load_adapter_folder(
        adapter_files.write(tmp_path / "dora", {"use_dora": True}, adapter_files.tensors() | magnitudes)
    )
    merge = "merge it (`python cli.py merge {0} --out merged/{0}`)."
    assert (
        refused(dora, tmp_path / "a.gguf")
        == f"{dora.path}: llama.cpp does not support DoRA: {merge.format('dora')}"
    )
    phi = load_adapter_folder(
        adapter_files.write(tmp_path / "phi", weights=adapter_files.tensors(modules=["model.layers.0.qkv_proj"]))
    )
    unknown = "layers such as model.layers.0.qkv_proj cannot be converted for llama.cpp"
    assert refused(phi, tmp_path / "a.gguf") == f"{phi.path}: {unknown}: {merge.format('phi')}"


def changed(base, folder, **settings):
    """A copy of a base with other settings in its config."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return str(folder)


def test_export_unsupported_architecture_fails(make, base, tmp_path):
    other = changed(base("llama"), tmp_path / "opt", model_type="opt")
    adapter = make("llama")
    assert refused(adapter, tmp_path / "a.gguf", base=other) == (
        f"{adapter.path}: its base is of type opt, and only adapters of {', '.join(ARCHITECTURES)} can be exported: "
        "merge it (`python cli.py merge random --out merged/random`), then convert the result with llama.cpp's script."
    )


def test_export_wrong_base_fails(make, base, tmp_path):
    adapter, notices, out = make("llama"), [], tmp_path / "a.gguf"
    message = refused(adapter, out, base=str(base("mistral")), notify=notices.append)
    assert "no linear layer" not in message
    assert "layers.0.self_attn.k_proj is 32 -> 32 in the base, 32 -> 16 in the adapter" in message
    assert "random has no manifest" in notices[0].text
    assert "the base has no linear layer" in refused(adapter, out, base=str(base("gpt2")))
    short = changed(base("llama"), tmp_path / "short", num_hidden_layers=1)
    assert "llama.cpp has no layer for model.layers.1." in refused(adapter, out, base=short)
    adopted = adopt(Library(tmp_path / "adapters"), "random")
    other = changed(base("llama"), tmp_path / "other", rope_theta=5.0)
    with pytest.raises(WrongBaseError, match=r"not on .*other .*use --force to try it anyway"):
        to_gguf(adopted, out, options=ModelOptions(base=other))
    notices.clear()
    assert (
        to_gguf(adopted, out, options=ModelOptions(base=other, force=True, notify=notices.append)).tensors == 28
    )
    assert notices[0].text.startswith("FORCED: ")


def test_export_command_output(make, tmp_path):
    make("gpt2")
    line = run("export", "random", "--to", "gguf", "--out", "a.gguf").stdout
    assert line.startswith("a.gguf  ")
    assert ", 16 tensors, largest rounding error " in line
    assert "a.gguf exists" in run("export", "random", "--out", "a.gguf", exit_code=1).stderr
    again = run("export", "random", "--out", "a.gguf", "--overwrite", "--dtype", "float32", "--json").stdout
    size = (tmp_path / "a.gguf").stat().st_size
    assert json.loads(again) == {
        "path": "a.gguf",
        "bytes": size,
        "tensors": 16,
        "error": 0.0,
        "turn_end": None,
        "turn_end_id": None,
        "modelfile": "FROM ./base.gguf\nADAPTER ./a.gguf\n",
    }
    assert run("export", "random", "--out", "b.gguf", "--to", "onnx", exit_code=2).stdout == ""
