"""GGUF files as bases: read in full, equal to the model that they were made from, or refused by name."""

import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType

from lora_tuner import Generator, ModelOptions, Notice, SamplingParams, atomic_io, train
from lora_tuner.adapters import compatibility
from lora_tuner.adapters.adapter import RUN_FILE
from lora_tuner.errors import BaseModelError, WrongBaseError
from lora_tuner.models import gguf_config, loading, lora
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import available_bases, find_base
from lora_tuner.settings_files import read_settings

from .. import gguf_base, gguf_models
from ..cli.test_commands import run
from ..parameters import sampled

TEMPLATE = "{% for message in messages %}{{ message.content }}!{% endfor %}"


@pytest.fixture(scope="session")
def llama_gguf(llama, tmp_path_factory):
    return gguf_base.convert(llama, tmp_path_factory.mktemp("gguf") / "llama.gguf")


@pytest.fixture
def tiny(llama_gguf, tmp_path):
    """The GGUF file of a tiny Llama, in the working folder."""
    return Path(shutil.copyfile(llama_gguf, tmp_path / "tiny.gguf"))


def edit(path, out, values=(), tensors=(), drop=()):
    """Write a copy of a GGUF file with other settings, name -> value or None, and other tensors."""
    reader, values, tensors = gguf.GGUFReader(path), dict(values), dict(tensors)
    architecture = values.pop("general.architecture", reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(out, architecture)
    kinds = {
        str: GGUFValueType.STRING,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        bool: GGUFValueType.BOOL,
    }
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in values:
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1])
    for name, value in values.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_key_value(name, value, kinds[type(value)])
    for tensor in reader.tensors:
        if tensor.name not in drop and tensor.name not in tensors:
            writer.add_tensor(tensor.name, tensor.data)
    for name, data in tensors.items():
        writer.add_tensor(name, np.asarray(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def open_base(path, notices=None):
    notify = (lambda notice: None) if notices is None else notices.append
    return load_base(find_base(str(path), notify=notify), ModelOptions(device="cpu", dtype="float32"))


# Of the models that are exported: those that transformers does not read, or not in full.
UNREAD = {
    **dict.fromkeys(
        ("gemma", "olmo2", "smollm3", "granite", "glm4"), "which transformers does not read from GGUF"
    ),
    **dict.fromkeys(("gpt_neox", "gpt_neox in sequence"), "which transformers does not read from GGUF"),
    "falcon with groups": "transformers does not read its tensor blk.0.attn_norm_2.bias",
    "falcon with one norm": "such as transformer.h.0.self_attention.query_key_value.weight",
    "falcon with all heads": "such as transformer.h.0.mlp.dense_4h_to_h.weight",
}


@pytest.mark.parametrize("name", sampled(gguf_models.MODELS, 16))
def test_gguf_equals_its_source(tmp_path, name):
    folder = gguf_models.save(tmp_path / "base", name)
    path = gguf_base.convert(folder, tmp_path / "base.gguf")
    if name in UNREAD:
        with pytest.raises(BaseModelError, match=re.escape(UNREAD[name])):
            find_base(str(path))
        return
    base, original = open_base(path), open_base(folder)
    count = 40 if name == "mistral with a window" else 60  # llama.cpp has none: within it they are the same
    ids = torch.arange(1, count)[None]
    with torch.no_grad():
        torch.testing.assert_close(base.model(ids).logits, original.model(ids).logits, atol=1e-4, rtol=0)
    text = "1: the actor never works. 22 333  her voice\n\tsomehow über"
    assert base.tokenizer(text)["input_ids"] == original.tokenizer(text)["input_ids"]
    assert base.tokenizer.decode(base.tokenizer(text)["input_ids"]) == text
    assert base.eos_token_ids == original.eos_token_ids


def test_gguf_is_converted_once_by_content(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    notices = []
    first = find_base("tiny.gguf", notify=notices.append)
    assert str(tiny) in available_bases()
    assert notices == [Notice("Converting tiny.gguf to safetensors in the cache, once.")]
    digest = atomic_io.sha256_file(tiny)[:12]
    assert first.weights_source == f"converted from the GGUF file tiny.gguf (sha256 {digest})"
    assert (first.folder.name, first.gguf) == (f"gguf-{digest}", Path("tiny.gguf"))
    fingerprint = first.fingerprint
    tiny.rename(tmp_path / "other.gguf")
    again = find_base(str(tmp_path / "other.gguf"), notify=notices.append)
    assert (again.folder, again.fingerprint) == (first.folder, fingerprint)
    assert len(notices) == 1
    assert str(tiny) not in available_bases()


def test_damaged_conversion_is_made_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    folder, notices = find_base("tiny.gguf").folder, []
    (folder / "config.json").write_text("{}")
    assert find_base("tiny.gguf", notify=notices.append).config()["model_type"] == "llama"
    assert notices[0].text == f"{folder} is damaged, or of an older version: it is made again."


def test_adapter_on_gguf_finds_its_base(tiny, tmp_path, settings):
    adapter = train(settings(base="tiny.gguf", max_steps=1))
    info = adapter.manifest.base
    assert (info.name, info.repo, info.revision) == ("tiny.gguf", "tiny.gguf", None)
    assert info.weights.startswith("converted from the GGUF file tiny.gguf (sha256 ")
    assert read_settings(Path(adapter.path, RUN_FILE))["base"] == "./tiny.gguf"
    assert compatibility.find_base_config(adapter)["model_type"] == "llama"
    base = loading.open_base(adapter, ModelOptions(device="cpu"))
    lora.check_base(adapter, base)
    tiny.rename(tmp_path / "moved.gguf")
    with pytest.raises(BaseModelError) as error:
        loading.open_base(adapter)
    assert str(error.value) == (
        "reviews was trained on the base tiny.gguf (named in its manifest.json), which cannot be used here: There is no file "
        "tiny.gguf. Name a copy of it with --base."
    )
    lora.check_base(adapter, loading.open_base(adapter, ModelOptions(base="moved.gguf", device="cpu")))
    edit(tmp_path / "moved.gguf", tiny, {"general.description": "another"})
    with pytest.raises(WrongBaseError, match=r"was trained on tiny\.gguf \(fingerprint"):
        lora.check_base(adapter, loading.open_base(adapter, ModelOptions(device="cpu")))


@pytest.mark.slow
def test_gguf_works_in_every_command(tiny, settings):
    train(settings(base="tiny.gguf", max_steps=2))
    for arguments in (
        ["generate", "the actor", "--adapter", "reviews", "--max-new-tokens", "2"],
        ["evaluate", "reviews"],
        ["merge", "reviews", "--out", "merged"],
        ["export", "reviews", "--out", "out.gguf"],
        ["adapters", "check", "reviews", "--for", "peft"],
    ):
        run(*arguments)
    merged = Generator(options=ModelOptions(base="merged", device="cpu"))
    greedy = SamplingParams(greedy=True, max_new_tokens=8)
    text = Generator("reviews", options=ModelOptions(device="cpu")).generate("the actor", greedy).text
    assert merged.generate("the actor", greedy).text == text


@pytest.mark.slow
def test_export_never_replaces_gguf_base(tiny, settings):
    train(settings(base="tiny.gguf", max_steps=1))
    line = run("export", "reviews", "--out", "tiny.gguf", "--overwrite", exit_code=1).stderr
    assert "tiny.gguf would replace or change its base" in line.replace("\n", " ")


def test_template_and_end_tokens_survive(tiny, tmp_path):
    out = edit(
        tiny,
        tmp_path / "chat.gguf",
        {"tokenizer.chat_template": TEMPLATE, "tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 9},
    )
    base = open_base(out)
    assert base.tokenizer.chat_template == TEMPLATE
    assert base.eos_token_ids == {0, 7, 9}
    named = {
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "T",
    }
    assert open_base(edit(tiny, tmp_path / "named.gguf", named)).tokenizer.chat_template == {
        "default": TEMPLATE,
        "tool_use": "T",
    }


def test_files_beside_gguf_are_not_read(tiny, tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    for name in (
        "config.json",
        "tokenizer_config.json",
        "generation_config.json",
        "adapter_config.json",
        "tokenizer.json",
    ):
        (folder / name).write_text(json.dumps({"tokenizer_class": "T5Tokenizer", "eos_token_id": 3}))
    (folder / "chat_template.jinja").write_text("other")
    shutil.copyfile(tiny, folder / "tiny.gguf")
    with (folder / "tiny.gguf").open("ab") as file:  # another hash
        file.write(b"\0")
    base = open_base(folder / "tiny.gguf")
    assert base.tokenizer.chat_template is None
    assert base.eos_token_ids == {0}


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("original", [8192, 64])
def test_llama3_rope_factors_are_read(tiny, tmp_path, original):
    """transformers skips this tensor, and would place tokens otherwise."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = ROPE | {"rope_theta": 10000.0, "original_max_position_embeddings": original}
    config = LlamaConfig(hidden_size=512, num_attention_heads=8, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    factors = (plain / scaled).tolist()
    settings = gguf_config._llama3_settings(factors, 10000.0, None)
    assert settings.pop("original_max_position_embeddings") == pytest.approx(original, abs=1)
    assert settings.pop("factor") == pytest.approx(8.0, rel=1e-4)
    assert settings == {key: value for key, value in ROPE.items() if key != "factor"}
    assert gguf_config._llama3_settings([*factors[:-1], 3.0], 10000.0, None) is None
    out = edit(tiny, tmp_path / "rope.gguf", tensors={"rope_freqs.weight": [1.0, 1.0, 1.0, 8.0]})
    assert find_base(str(out)).config()["rope_parameters"]["rope_type"] == "llama3"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        ),
        ({"rope.scaling.type": "none"}, {"rope_type": "default"}),
        ({"rope.freq_base": 500.0}, {"rope_theta": 500.0}),
    ],
)
def test_rope_settings_are_read(tiny, tmp_path, values, expected):
    out = edit(tiny, tmp_path / "rope.gguf", {f"llama.{key}": value for key, value in values.items()})
    rope = find_base(str(out)).config()["rope_parameters"]
    assert {key: rope[key] for key in expected} == expected


def test_unknown_split_rule_is_said(tiny, tmp_path):
    notices = []
    find_base(str(edit(tiny, tmp_path / "pre.gguf", {"tokenizer.ggml.pre": "exotic"})), notify=notices.append)
    assert notices[1].text.endswith(
        "pre.gguf splits text by the rule exotic, which transformers does not know: it is split as for GPT-2, so some token "
        "ids may differ from those in llama.cpp."
    )


PARTLY = "cannot be read in full: "
SOURCE = " Use the model that it was made from."
EDITS = {
    "an adapter": (
        {"values": {"general.type": "adapter"}},
        "is a LoRA adapter for llama.cpp, not a model: name the GGUF file of its base with --base. Adapters are read in PEFT's "
        "format alone.",
    ),
    "an image part": (
        {"values": {"general.architecture": "clip", "general.type": "mmproj"}},
        "is the image or audio part (mmproj) of a multimodal model: name the file with its text model.",
    ),
    "a vocabulary": (
        {"values": {"general.type": "vocab"}},
        "holds no model (vocab): name the file with the weights.",
    ),
    "an encoder": (
        {"values": {"general.architecture": "bert"}},
        "is an embedding model, and only causal language models are trained here.",
    ),
    "an encoder-decoder": (
        {"values": {"general.architecture": "t5"}},
        "is an encoder-decoder, and only causal language models are trained here.",
    ),
    "a part of a split file": (
        {"values": {"split.count": 4}},
        "is one part of a split file, which transformers does not read: join the parts with llama.cpp's `llama-gguf-split "
        "--merge` (the first part, then edited.gguf), and name the result.",
    ),
    "no tokenizer": (
        {"values": {"tokenizer.ggml.tokens": None}},
        "has no tokenizer: convert the model again with its tokenizer files beside it.",
    ),
    "an unread setting": (
        {"values": {"llama.attention.clamp_kqv": 8.0}},
        f"{PARTLY}transformers has no place for its setting llama.attention.clamp_kqv = 8.0.{SOURCE}",
    ),
    "an unread tensor": (
        {"tensors": {"blk.0.ffn_gate_exps.weight": np.zeros((2, 4))}},
        f"{PARTLY}transformers does not read its tensor blk.0.ffn_gate_exps.weight.{SOURCE}",
    ),
    "a missing tensor": (
        {"drop": ("blk.1.ffn_up.weight",)},
        f"{PARTLY}it lacks tensors of the model, such as model.layers.1.mlp.up_proj.weight.{SOURCE}",
    ),
    "a tensor of another shape": (
        {"tensors": {"blk.1.ffn_up.weight": np.zeros((4, 32))}},
        f"{PARTLY}it has tensors of other shapes than its settings say, such as ",
    ),
    "more blocks than tensors": (
        {"values": {"llama.block_count": 4_000_000_000}},
        f"{PARTLY}its settings say 4,000,000,000 blocks, and it has 2.{SOURCE}",
    ),
    "more weights than tensors": (
        {"values": {"llama.feed_forward_length": 4_000_000_000}},
        "takes 3072.0 GB on the disk of ",
    ),
    "rotary factors of another form": (
        {"tensors": {"rope_freqs.weight": [1.0, 8.0, 1.0, 8.0]}},
        f"{PARTLY}transformers has no place for its setting rope_freqs.weight = of an unknown form.{SOURCE}",
    ),
    "part of a head rotated": (
        {"values": {"llama.rope.dimension_count": 4, "llama.attention.key_length": 8}},
        f"{PARTLY}transformers has no place for its setting llama.rope.dimension_count = 4.{SOURCE}",
    ),
    "attention that looks ahead": (
        {"values": {"llama.attention.causal": False}},
        "is a model whose attention looks ahead, so it is no causal language model.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_unreadable_gguf_is_named(tiny, tmp_path, case):
    changes, expected = EDITS[case]
    out = edit(tiny, tmp_path / "edited.gguf", **changes)
    with pytest.raises(BaseModelError) as error:
        find_base(str(out))
    assert str(error.value).startswith(f"{out} {expected}")
    assert not list((atomic_io.cache_dir() / "bases").glob(f"*{atomic_io.sha256_file(out)[:12]}*"))


def test_unknown_architecture_lists_known_ones(tiny, tmp_path):
    out = edit(tiny, tmp_path / "edited.gguf", {"general.architecture": "plamo9"})
    with pytest.raises(BaseModelError) as error:
        find_base(str(out))
    assert str(error.value).startswith(
        f"{out} is of the architecture plamo9, which transformers does not read from GGUF: use the model that it was made "
        "from, with safetensors weights. It reads bloom, "
    )
    assert "gemma3" in str(error.value)


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.3, 0.9, 0.999])
def test_truncated_gguf_is_one_line(tiny, tmp_path, share):
    data = tiny.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        BaseModelError, match=r"cut\.gguf cannot be read: .* It is damaged, was downloaded in part, or"
    ):
        find_base("cut.gguf")


def test_other_files_named_gguf_are_refused(tmp_path):
    for content, expected in (
        (b"", "is not a GGUF file: it does not begin with the letters GGUF."),
        (b"PK\x03\x04 zip", "is not a GGUF file: it does not begin with the letters GGUF."),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "is a pointer of git-lfs, not the file itself: run `git lfs pull`.",
        ),
    ):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(BaseModelError) as error:
            find_base("a.gguf")
        assert str(error.value) == f"a.gguf {expected}"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gone.gguf", "There is no file gone.gguf."),
        ("./gone/a.gguf", "There is no file ./gone/a.gguf."),
        (
            "owner/name:a-q4.gguf",
            "There is no file owner/name:a-q4.gguf. A GGUF file on the Hub is downloaded first: `hf download owner/name "
            "a-q4.gguf --local-dir .`, then --base ./a-q4.gguf.",
        ),
    ],
)
def test_missing_gguf_says_what_to_do(name, expected):
    with pytest.raises(BaseModelError) as error:
        find_base(name)
    assert str(error.value) == expected


def test_split_gguf_is_refused_by_name(tiny, tmp_path):
    part = tiny.rename(tmp_path / "big-00001-of-00004.gguf")
    with pytest.raises(BaseModelError) as error:
        find_base(part.name)
    assert str(error.value) == (
        "big-00001-of-00004.gguf is one part of a split file, which transformers does not read: join the parts with "
        "llama.cpp's `llama-gguf-split --merge` (the first part, then big.gguf), and name the result."
    )


def test_gguf_with_revision_is_refused(tiny):
    with pytest.raises(BaseModelError, match=r"tiny\.gguf is not on the Hub, so it has no revision 'v1'"):
        find_base("tiny.gguf", "v1")


def test_gguf_larger_than_disk_is_refused(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(atomic_io, "free_space", lambda path: 1000)
    with pytest.raises(
        BaseModelError, match=r"tiny\.gguf takes 0\.0 GB on the disk of .* in float32, and 0\.0 GB are free"
    ):
        find_base("tiny.gguf")
