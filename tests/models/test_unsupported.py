"""Refusals by config.json and the names of files: before a download, and before weights are read."""

import json
import shutil

import pytest

from lora_tuner import ModelOptions
from lora_tuner.errors import BaseModelError
from lora_tuner.models import unsupported
from lora_tuner.models.loading import load_base
from lora_tuner.models.resolve import find_base

from .. import model_families
from ..hub_server import Hub

MODEL = {"config.json", "tokenizer.json", "model.safetensors"}
INSTEAD = "Use a causal language model with safetensors weights (its config.json names a ...ForCausalLM)"


def named(model_type, class_name, **settings):
    return {"model_type": model_type, "architectures": [class_name], **settings}


ENCODER_DECODER = f"which reads and writes with two stacks of layers. {INSTEAD}"
SENTENCES = f"{INSTEAD}; embeddings are trained with sentence-transformers"
KINDS = {
    "T5": (
        named("t5", "T5ForConditionalGeneration", is_encoder_decoder=True),
        f"it is an encoder-decoder (T5ForConditionalGeneration), {ENCODER_DECODER}",
    ),
    "T5's encoder": (
        named("t5", "T5EncoderModel", is_encoder_decoder=True),
        f"it is an encoder-decoder (T5EncoderModel), {ENCODER_DECODER}",
    ),
    "BART": (
        named("bart", "BartForConditionalGeneration", is_encoder_decoder=True),
        f"it is an encoder-decoder (BartForConditionalGeneration), {ENCODER_DECODER}",
    ),
    "BART without a class": (
        {"model_type": "bart", "is_encoder_decoder": True},
        f"it is an encoder-decoder (bart), {ENCODER_DECODER}",
    ),
    "Whisper": (
        named("whisper", "WhisperForConditionalGeneration", is_encoder_decoder=True),
        f"it is an encoder-decoder (WhisperForConditionalGeneration), {ENCODER_DECODER}",
    ),
    "Florence-2": (
        named("florence2", "Florence2ForConditionalGeneration", text_config={"is_encoder_decoder": True}),
        f"it is an encoder-decoder (Florence2ForConditionalGeneration), {ENCODER_DECODER}",
    ),
    "BERT": (
        named("bert", "BertForMaskedLM"),
        f"it is a masked language model (BertForMaskedLM). {INSTEAD}",
    ),
    "ModernBERT": (
        named("modernbert", "ModernBertForMaskedLM"),
        f"it is a masked language model (ModernBertForMaskedLM). {INSTEAD}",
    ),
    "an encoder without a class": ({"model_type": "roberta"}, f"it is an embedding model (roberta). {SENTENCES}"),
    "a bare encoder": (named("xlm-roberta", "XLMRobertaModel"), f"it is an embedding model (XLMRobertaModel). {SENTENCES}"),
    "an encoder with a causal head": (
        named("roberta", "RobertaForCausalLM"),
        "it is an encoder (RobertaForCausalLM): without is_decoder in config.json its attention looks ahead, so it is no "
        f"causal language model. {INSTEAD}",
    ),
    "a reranker": (
        named("xlm-roberta", "XLMRobertaForSequenceClassification"),
        f"it is a classifier or reranker (XLMRobertaForSequenceClassification). {INSTEAD}; classifiers are trained with "
        "transformers' Trainer",
    ),
    "a classifier head on a decoder": (
        named("qwen2", "Qwen2ForSequenceClassification"),
        f"it is a classifier or reranker (Qwen2ForSequenceClassification). {INSTEAD}; classifiers are trained with "
        "transformers' Trainer",
    ),
    "a decoder as embedding model": (
        named("mistral", "MistralModel", tie_word_embeddings=False),
        f"it is a model without an output head (MistralModel), as embedding models are. {INSTEAD}",
    ),
    "a decoder that looks ahead": (
        named("gemma3_text", "Gemma3Model", use_bidirectional_attention=True),
        f"it is an embedding model (Gemma3Model), whose attention looks ahead. {SENTENCES}",
    ),
    "a tagger": (
        named("deberta-v2", "DebertaV2ForTokenClassification"),
        f"it is a classifier (DebertaV2ForTokenClassification). {INSTEAD}",
    ),
    "an image classifier": (
        named("vit", "ViTForImageClassification"),
        f"it is a classifier (ViTForImageClassification). {INSTEAD}",
    ),
    "vits": (named("vits", "VitsModel"), f"it is a speech model (VitsModel). {INSTEAD}"),
    "bark": (named("bark", "BarkModel"), f"it is a speech model (BarkModel). {INSTEAD}"),
    "speech": (named("wav2vec2", "Wav2Vec2ForCTC"), f"it is a speech model (Wav2Vec2ForCTC). {INSTEAD}"),
    "text by diffusion": (
        named("diffusion_gemma", "DiffusionGemmaForBlockDiffusion"),
        f"it is a diffusion model (DiffusionGemmaForBlockDiffusion). {INSTEAD}",
    ),
    "a part of a diffusion model": (
        {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.39.0"},
        f"it is a diffusion model. {INSTEAD}; LoRA for image models is trained with diffusers",
    ),
    "timm": ({"architecture": "vit_base", "pretrained_cfg": {}}, f"it is an image model (timm or OpenCLIP). {INSTEAD}"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_other_kind_of_model_is_named(kind):
    config, expected = KINDS[kind]
    assert unsupported.why_unsupported(MODEL, config) == expected


QUANTIZED = (
    "its weights are quantized ({}), and only those of bitsandbytes (8bit, 4bit) can be loaded. Use the model from which "
    "they were quantized, or a copy in bfloat16; with --load-in 4bit if it is too large"
)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"compression_config": {"format": "pack"}}, "an unnamed format"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization": {"group_size": 64}, "quantization_config": {"group_size": 64}}, "MLX"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, None),
    ],
)
def test_quantization_of_other_tools_is_named(settings, kind):
    problem = unsupported.why_quantized(named("llama", "LlamaForCausalLM", **settings))
    assert problem == (QUANTIZED.format(kind) if kind else None)


CONFIG = named("llama", "LlamaForCausalLM")
FILES = {
    "a diffusion pipeline": (
        {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}, None,
        f"it is a diffusion model. {INSTEAD}; LoRA for image models is trained with diffusers",
    ),
    "sentence-transformers": (MODEL | {"modules.json"}, CONFIG, f"it is an embedding model (modules.json). {SENTENCES}"),
    "GGUF": (
        {"a-q4.gguf", "a-q8.gguf", "README.md"}, None,
        "it has no config.json, only GGUF files (a-q4.gguf and 1 more). Download one, and name it with --base",
    ),
    "GGUF beside a config": (
        {"config.json", "tokenizer.json", "a.gguf"}, CONFIG,
        "it has no safetensors weights. Of its GGUF files (a.gguf) download one, and name it with --base",
    ),
    "pickled weights": (
        {"config.json", "tokenizer.json", "pytorch_model.bin", "training_args.bin"}, CONFIG,
        "it has no safetensors weights. Pickled ones (pytorch_model.bin) are not read: convert them (on the Hub: "
        "https://huggingface.co/spaces/safetensors/convert), or use another base",
    ),
    "ONNX": (
        {"config.json", "tokenizer.json", "onnx/model.onnx"}, CONFIG,
        f"it has no safetensors weights. They are in ONNX (model.onnx). {INSTEAD}",
    ),
    "TensorFlow": (
        {"config.json", "tokenizer.json", "tf_model.h5"}, CONFIG,
        f"it has no safetensors weights. They are in TensorFlow (tf_model.h5). {INSTEAD}",
    ),
    "Core ML": ({"Model.mlmodel"}, None, f"it has no config.json, its weights are in Core ML (Model.mlmodel). {INSTEAD}"),
    "the format of Mistral": (
        {"params.json", "consolidated.safetensors", "tekken.json"}, None,
        "it has no config.json, it is in the format of its authors (params.json). Use a copy in the format of transformers, "
        "with a config.json",
    ),
    "an adapter": (
        {"adapter_config.json", "adapter_model.safetensors"}, None,
        "it has no config.json, it holds an adapter. Name that with --adapter or --from, and its base with --base",
    ),
    "an adapter with a config": (
        {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"}, CONFIG,
        "it has no safetensors weights, it holds an adapter. Name that with --adapter or --from, and its base with --base",
    ),
    "no tokenizer": ({"config.json", "model.safetensors"}, CONFIG, "it has no tokenizer"),
    "nothing": ({"README.md"}, None, "it has no config.json"),
    "only weights": ({"config.json", "tokenizer.json"}, CONFIG, "it has no safetensors weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_other_files_are_named(kind):
    names, config, expected = FILES[kind]
    assert unsupported.why_unsupported(names, config) == expected


@pytest.mark.parametrize("family", model_families.FAMILIES)
def test_families_of_decoders_are_accepted(family):
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **model_families.FAMILIES[family]).to_dict()
    class_name = {"bart": "BartForCausalLM", "bert": "BertLMHeadModel", "roberta": "RobertaForCausalLM"}.get(
        family
    )
    if family == "bart":  # as BartForCausalLM sets it
        config["is_encoder_decoder"] = False
    config["architectures"] = [class_name] if class_name else None
    assert unsupported.why_unsupported(MODEL, config) is None
    assert unsupported.why_unknown_type(config) is None


def test_unknown_model_types_say_what_helps():
    unknown = unsupported.why_unknown_type(named("llama9", "X", transformers_version="9.9.9"))
    assert unknown.startswith("its model type llama9 is unknown to transformers 5.")
    assert unknown.endswith(" (it was saved by 9.9.9): `pip install -U transformers`, or use another base")
    assert unsupported.why_unknown_type(named("own", "OwnModel", auto_map={"AutoConfig": "own.Config"})) == (
        "its model type own is code of its own (auto_map in config.json), and code from a repo is never run. Use a model "
        "that transformers has itself"
    )
    assert unsupported.why_unknown_type(named("clip", "CLIPModel")) == (
        f"it is of type clip (CLIPModel), which is no causal language model. {INSTEAD}"
    )
    assert unsupported.why_unknown_type(named("musicgen", "MusicgenForConditionalGeneration")) == (
        "it is of type musicgen (MusicgenForConditionalGeneration), which is no causal language model. " + INSTEAD
    )
    for class_name in ("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"):
        assert unsupported.why_unknown_type(named("qwen3_5", class_name)) is None
    assert unsupported.why_unknown_type({"hidden_size": 4}) == f"its config.json names no model_type. {INSTEAD}"
    known = named("qwen2", "Qwen2ForCausalLM", auto_map={"AutoModel": "modeling_qwen.Model"})
    assert unsupported.why_unknown_type(known) is None


@pytest.fixture
def repo(gpt2, tmp_path):
    """Make a repo of the tiny GPT-2's files with another config.json, or other files."""

    def make(config=None, add=(), remove=()):
        folder = shutil.copytree(gpt2, tmp_path / "repo")
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        for name in add:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        for name in remove:
            (folder / name).unlink()
        return folder

    return make


@pytest.fixture
def from_hub(tmp_path, monkeypatch):
    """Look for a base on a local Hub: the error, and the files that were requested."""
    from huggingface_hub import constants

    from lora_tuner import hub as hub_module

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def look(folder):
        with Hub({"models/owner/name": folder}) as hub:
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            hub_module.why_unreachable.cache_clear()
            message = None
            try:
                find_base("owner/name")
            except BaseModelError as error:
                message = str(error)
            files = [
                request.rpartition("/")[2]
                for request in hub.requests
                if request.startswith("GET") and "/resolve/" in request
            ]
        return message, files

    yield look
    hub_module.why_unreachable.cache_clear()


REFUSED = "owner/name is not a model for this tool: {}. Nothing else of it was downloaded."


@pytest.mark.parametrize("kind", ["T5", "BERT", "a reranker", "speech"])
def test_other_kind_on_hub_downloads_config_only(repo, from_hub, kind):
    config, expected = KINDS[kind]
    assert from_hub(repo(config)) == (REFUSED.format(expected), ["config.json"])


def test_diffusion_pipeline_on_hub_downloads_nothing(repo, from_hub):
    folder = repo(add=["model_index.json", "unet/config.json"], remove=["config.json"])
    message, files = from_hub(folder)
    assert message == REFUSED.format(FILES["a diffusion pipeline"][2])
    assert files == []


@pytest.mark.parametrize(
    "config", [named("llama9", "X"), named("clip", "CLIPModel"), named("own", "X", auto_map={"a": "b"})]
)
def test_unknown_type_on_hub_downloads_config_only(repo, from_hub, config):
    message, files = from_hub(repo(config))
    assert message == REFUSED.format(unsupported.why_unknown_type(config))
    assert files == ["config.json"]


def test_quantized_weights_on_hub_are_not_downloaded(repo, from_hub):
    config = named("llama", "LlamaForCausalLM", quantization_config={"quant_method": "awq"})
    assert from_hub(repo(config)) == (REFUSED.format(QUANTIZED.format("awq")), ["config.json"])


def test_pickled_weights_on_hub_are_not_downloaded(repo, from_hub):
    message, files = from_hub(repo(add=["pytorch_model.bin"], remove=["model.safetensors"]))
    assert "Pickled ones (pytorch_model.bin) are not read" in message
    assert files == ["config.json"]


def test_causal_model_on_hub_is_downloaded_once(repo, from_hub):
    message, files = from_hub(repo())
    assert message is None
    assert files.count("config.json") == files.count("model.safetensors") == 1


def test_other_kind_in_folder_is_refused_unread(repo):
    folder = repo(KINDS["BART"][0])
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(BaseModelError) as error:
        find_base(str(folder))
    assert str(error.value) == f"The folder {folder} is not a model: {KINDS['BART'][1]}."


def test_unknown_type_in_folder_is_refused_unread(repo):
    folder = repo(named("llama9", "X"))
    with pytest.raises(
        BaseModelError, match="cannot be loaded: its model type llama9 is unknown to transformers"
    ):
        load_base(find_base(str(folder)), ModelOptions(device="cpu"))


@pytest.mark.parametrize("settings", [{"quantization_config": "awq"}, {"n_layer": "two"}, {"n_embd": [1]}])
def test_config_that_transformers_rejects_is_one_line(repo, gpt2, settings):
    folder = repo(json.loads((gpt2 / "config.json").read_text()) | settings)
    with pytest.raises(BaseModelError) as error:
        load_base(find_base(str(folder)), ModelOptions(device="cpu"))
    assert str(error.value).startswith(f"The base {folder} cannot be loaded: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[1]", "{", ""])
def test_config_of_other_json_is_refused(repo, content):
    folder = repo()
    (folder / "config.json").write_text(content)
    with pytest.raises(BaseModelError, match=r"config\.json(: it is not a JSON object| is not readable as JSON)"):
        find_base(str(folder))


def test_file_as_base_is_refused(gpt2):
    weights = gpt2 / "model.safetensors"
    with pytest.raises(BaseModelError) as error:
        find_base(str(weights))
    assert str(error.value) == f"{weights} is a file: name the folder of a model, or a GGUF file (.gguf)."
