"""Recognize what is no causal language model, by its config.json and the names of its files.

So a repo is refused before its weights are downloaded, and a folder before they are read. Limit: a
model type is looked up in the installed transformers, of which only `why_unknown_type` needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import PurePosixPath

from ..adapters.peft_config import CONFIG_FILE as ADAPTER_CONFIG
from . import stored_weights

INSTEAD = "Use a causal language model with safetensors weights (its config.json names a ...ForCausalLM)"
WEIGHTS_NAMES = (stored_weights.WEIGHTS_FILE, stored_weights.WEIGHTS_INDEX)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_EMBEDDING_MARKERS = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
# Class in config.json -> kind; the first match counts.
_KINDS = (
    (r"(ForCausalLM|LMHeadModel|WithLMHead)$", ""),
    (r"ForMaskedLM$|ForPreTraining$", "a masked language model"),
    (r"Diffusion", "a diffusion model"),
    (r"ForSequenceClassification$|Reward", "a classifier or reranker"),
    (r"^(Bark|FastSpeech2|Hubert|SEW|UniSpeech|Vits|Wav2Vec2|WavLM)", "a speech model"),
    (r"For(Token|Audio|Video|Image|AudioFrame)?Classification$|ForImageClassification", "a classifier"),
    (r"For(Extractive|Table|Visual|Document)?QuestionAnswering$|ForMultipleChoice$|ForNextSentence", "a question answerer"),
    (r"ForCTC$|ForSpeechSeq2Seq$|ForRNNT$|ForXVector$|ForTextToWaveform$|TextToSpeech|ToSpectrogram|Vocoder", "a speech model"),
    (r"Detection$|Segmentation$|DepthEstimation$|Backbone$|MaskGeneration$|ImageModeling$", "an image model"),
    (r"(EncoderModel|TextModel|DualEncoder|ForRetrieval|Embedding|ForSentenceEmbedding)$", "an embedding model"),
)  # fmt: skip
# Encoders that are causal language models only where config.json says is_decoder.
_ENCODERS = frozenset((
    "albert", "bert", "bert-generation", "big_bird", "camembert", "convbert", "data2vec-text", "deberta",
    "deberta-v2", "distilbert", "electra", "ernie", "esm", "eurobert", "funnel", "ibert", "layoutlm",
    "longformer", "luke", "megatron-bert", "mobilebert", "modernbert", "mpnet", "nomic_bert", "nystromformer",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "squeezebert", "xlm-roberta",
    "xlm-roberta-xl", "xmod", "yoso",
))  # fmt: skip
_ADVICE = {
    "a masked language model": "",
    "an embedding model": "; embeddings are trained with sentence-transformers",
    "a classifier or reranker": "; classifiers are trained with transformers' Trainer",
}
# Ending of a file -> format; the first that the repo has is named.
_FORMATS = (
    (".onnx", "ONNX"),
    (".nemo", "NVIDIA NeMo"),
    (".tflite", "TensorFlow Lite"),
    (".task", "MediaPipe"),
    (".litertlm", "LiteRT"),
    (".mlpackage", "Core ML"),
    (".mlmodel", "Core ML"),
    (".xml", "OpenVINO"),
    (".engine", "TensorRT"),
    (".msgpack", "Flax"),
    (".h5", "TensorFlow"),
    ("saved_model.pb", "TensorFlow"),
    (".npz", "an old format of MLX"),
)
_ADAPTER = "it holds an adapter. Name that with --adapter or --from, and its base with --base"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OWN_FORMATS = {"params.json": "the format of its authors (params.json)"}


def why_unsupported(names: Collection[str], config: Mapping[str, object] | None) -> str | None:
    """The reason why files are no causal language model that can be trained here, and the remedy.

    Args:
        names: the files of the repo or folder, with / between folders.
        config: content of config.json, if it has one.

    Returns:
        A text such as "it is a diffusion model (model_index.json). Use ..."; None if there is no
        reason.
    """
    problem = _other_library(names, config) or (_other_kind(config) if config is not None else None)
    return problem or _missing(names)


def why_unknown_type(config: Mapping[str, object]) -> str | None:
    """The reason why transformers here has no model for a config, and the remedy; None if it has."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return f"its config.json names no model_type. {INSTEAD}"
    class_name = _class_name(config) or "no class"
    # MusicGen and others have a decoder that is one, in a model that is none.
    is_whole = class_name.endswith("ForConditionalGeneration")
    if model_type in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES or (
        model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_whole
    ):
        return None
    if model_type in CONFIG_MAPPING:
        return f"it is of type {model_type} ({class_name}), which is no causal language model. {INSTEAD}"
    if config.get("auto_map"):
        return (
            f"its model type {model_type} is code of its own (auto_map in config.json), and code "
            "from a repo is never run. Use a model that transformers has itself"
        )
    saved_by = config.get("transformers_version")
    newer = f" (it was saved by {saved_by})" if saved_by else ""
    return (
        f"its model type {model_type} is unknown to transformers "
        f"{transformers.__version__}{newer}: `pip install -U transformers`, or use another base"
    )


def why_quantized(config: Mapping[str, object]) -> str | None:
    """The kind of quantization that cannot be loaded here, and the remedy; None if there is none."""
    kind = stored_weights.configured_quantization(dict(config))
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "group_size" in mlx and kind not in ("8bit", "4bit"):
        kind = "MLX"
    if kind is None or kind in ("8bit", "4bit"):
        return None
    return (
        f"its weights are quantized ({kind}), and only those of bitsandbytes (8bit, 4bit) can be "
        "loaded. Use the model from which they were quantized, or a copy in bfloat16; with "
        "--load-in 4bit if it is too large"
    )


def _class_name(config: Mapping[str, object]) -> str:
    """The class that the config names; "" if it names none."""
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _other_library(names: Collection[str], config: Mapping[str, object] | None) -> str | None:
    """The kind of a repo of another library."""
    if "model_index.json" in names or (config and ("_diffusers_version" in config or "_class_name" in config)):
        return f"it is a diffusion model. {INSTEAD}; LoRA for image models is trained with diffusers"
    if marker := next((name for name in _EMBEDDING_MARKERS if name in names), None):
        return f"it is an embedding model ({marker}). {INSTEAD}{_ADVICE['an embedding model']}"
    if config is None:
        return _without_config(names)
    if "pretrained_cfg" in config or "open_clip_config.json" in names:
        return f"it is an image model (timm or OpenCLIP). {INSTEAD}"
    return None


def _without_config(names: Collection[str]) -> str:
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    own = next((text for name, text in _OWN_FORMATS.items() if name in names), None)
    if ADAPTER_CONFIG in names:
        return f"it has no config.json, {_ADAPTER}"
    if gguf:
        more = f" and {len(gguf) - 1} more" if len(gguf) > 1 else ""
        return f"it has no config.json, only GGUF files ({gguf[0]}{more}). Download one, and name it with --base"
    if own:
        return (
            f"it has no config.json, it is in {own}. Use a copy in the format of transformers, with a config.json"
        )
    if "open_clip_config.json" in names:
        return f"it is an image model (OpenCLIP). {INSTEAD}"
    if other := _other_format(names):
        return f"it has no config.json, its weights are in {other}. {INSTEAD}"
    return "it has no config.json"


def _other_kind(config: Mapping[str, object]) -> str | None:
    """The kind of model that a config names, if it is no causal language model."""
    class_name, model_type = _class_name(config), str(config.get("model_type"))
    shown = f" ({class_name or model_type})"
    kind = next((kind for pattern, kind in _KINDS if re.search(pattern, class_name)), None)
    is_encoder = model_type in _ENCODERS
    if is_encoder and not config.get("is_decoder"):
        if kind == "":
            return (
                f"it is an encoder{shown}: without is_decoder in config.json its attention looks "
                f"ahead, so it is no causal language model. {INSTEAD}"
            )
        return f"it is {kind or 'an embedding model'}{shown}. {INSTEAD}{_ADVICE.get(kind or 'an embedding model', '')}"
    if kind == "":
        return None
    text_config = config.get("text_config")
    has_encoder = isinstance(text_config, dict) and text_config.get("is_encoder_decoder")
    if (
        has_encoder
        or config.get("is_encoder_decoder")
        or model_type in ("encoder-decoder", "vision-encoder-decoder", "t5", "umt5")
    ):
        return f"it is an encoder-decoder{shown}, which reads and writes with two stacks of layers. {INSTEAD}"
    if kind is not None:
        return f"it is {kind}{shown}. {INSTEAD}{_ADVICE.get(kind, '')}"
    if config.get("use_bidirectional_attention") is True:
        return f"it is an embedding model{shown}, whose attention looks ahead. {INSTEAD}{_ADVICE['an embedding model']}"
    if class_name.endswith("Model") and config.get("tie_word_embeddings") is False:
        return f"it is a model without an output head{shown}, as embedding models are. {INSTEAD}"
    return None


def _missing(names: Collection[str]) -> str | None:
    """The first part that a model folder lacks, and the formats that it has in its place."""
    if not any(name in names for name in TOKENIZER_FILES):
        return "it has no tokenizer"  # transformers would create an empty one
    if any(name in names for name in WEIGHTS_NAMES):
        return None
    if pickled := sorted(name for name in names if name.endswith(_PICKLED) and "training_args" not in name):
        return (
            f"it has no safetensors weights. Pickled ones ({pickled[0]}) are not read: convert "
            "them (on the Hub: https://huggingface.co/spaces/safetensors/convert), or use another "
            "base"
        )
    if ADAPTER_CONFIG in names:
        return f"it has no safetensors weights, {_ADAPTER}"
    if other := _other_format(names):
        return f"it has no safetensors weights. They are in {other}. {INSTEAD}"
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        return (
            f"it has no safetensors weights. Of its GGUF files ({gguf[0]}) download one, and name it with --base"
        )
    return "it has no safetensors weights"


def _other_format(names: Collection[str]) -> str | None:
    """Name of another format, with the first file in it."""
    for ending, name in _FORMATS:
        if found := sorted(path for path in names if path.endswith(ending)):
            return f"{name} ({PurePosixPath(found[0]).name})"
    pickled = sorted(path for path in names if path.endswith(_PICKLED))
    return f"pickled files ({PurePosixPath(pickled[0]).name})" if pickled else None
