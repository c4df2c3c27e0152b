"""Load a base model onto a device.

Surprise: transformers fills in missing weights at random and only warns. Here an incomplete base is
an error. Limit: nothing that a repo brings as code is ever run.
"""

import copy
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..adapters.adapter import Adapter
from ..adapters.base_config import is_in_wrapper
from ..config import ModelOptions
from ..data import tokenization
from ..data.tokenization import TokenIds
from ..errors import BaseModelError, EventHandler, Notice, first_line
from ..text import format_bytes
from . import fsdp, kernels, memory, positions, quantization, threads, unsupported
from .base_files import BaseModelFiles, loading_errors, quiet_transformers
from .experts import expert_weights
from .layers import linear_layers
from .lm_head import ChunkedLMHead
from .probe import probe_layers
from .resolve import find_adapter_base, find_base
from .tokenizer import TokenizedBase, load_tokenizer

# transformers applies an adapter that lies in the folder of a base. Below a file there is none.
_NO_ADAPTER = {"subfolder": "config.json"}
_BNB_CPU_REPACKING = "support_avx512bf16_for_cpu"  # attribute of bitsandbytes' 4-bit layers


@dataclass
class LoadedBase(TokenizedBase):
    """A causal language model in memory, frozen and in evaluation mode, with its tokenizer."""

    model: PreTrainedModel
    device: torch.device
    dtype: torch.dtype
    load_in: str = "full"  # or the quantization of its linear layers: 8bit, 4bit
    max_context: int = positions.NO_LIMIT  # longest sequence in tokens; very large where there is no limit

    @property
    def vocab_size(self) -> int:
        embeddings: Any = self.model.get_input_embeddings()
        embeddings = getattr(embeddings, "original_module", embeddings)  # in PEFT's wrapper
        return len(embeddings.weight)

    @cached_property
    def head_size(self) -> int | None:
        """Number of logits; None where the output head does not tell it."""
        size = getattr(self.model.get_output_embeddings(), "out_features", None)
        return size if isinstance(size, int) else None

    def probe_sequences(self) -> tuple[TokenIds, TokenIds]:
        """Two rows of 16 tokens from the middle of the vocabulary that tokenizer and embeddings have."""
        middle = min(len(self.tokenizer), self.vocab_size) // 2
        ids = np.arange(middle - 8, middle + 8, dtype=np.int32)
        return ids, ids[::-1].copy()

    def check_token_ids(self, rows: Iterable[TokenIds], vocab_size: int = 0) -> None:
        """Raise BaseModelError for a token that the embeddings have no row for.

        Args:
            rows: token ids.
            vocab_size: number of the token ids of an adapter that has others; 0 for the base's.
        """
        largest = max((int(tokenization.token_ids(row).max()) for row in rows if len(row)), default=0)
        if largest >= (vocab_size or self.vocab_size):
            raise BaseModelError(
                f"The token {self.tokenizer.convert_ids_to_tokens(largest)} has the id "
                f"{largest:,}, but the embeddings of {self.files.name} have {self.vocab_size:,} "
                "rows: tokens were added to its tokenizer, and the model was not resized. Use the "
                "tokenizer that it was trained with, or resize the model to that of now "
                "(resize_token_embeddings) and train the new rows."
            )

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """Token ids that end a text or a turn, of tokenizer and generation config."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        values = configured if isinstance(configured, list) else [configured]
        return frozenset({self.tokenizer.eos_token_id, *(value for value in values if isinstance(value, int))})

    @cached_property
    def lm_head(self) -> ChunkedLMHead:
        """Output head of the model, with a loss that never holds all logits at once."""
        return ChunkedLMHead(self.model)


def open_base(
    adapter: Adapter | None, options: ModelOptions = ModelOptions(), *, training: bool = False
) -> LoadedBase:
    """Load the base that the options name, else that of the adapter, else the default.

    Args:
        training: choose its dtype as for training, where the options leave it open.
    """
    files = base_for_adapter(adapter, options)
    if training:
        options = replace(options, dtype=memory.training_dtype(files, choose_device(options.device), options))
    return load_base(files, options, training=training, layers=adapter.modules if adapter else ())


def base_for_adapter(adapter: Adapter | None, options: ModelOptions = ModelOptions()) -> BaseModelFiles:
    """Find the files of the base that `open_base` would load."""
    if options.base is None and adapter is not None:
        return find_adapter_base(adapter, options.revision, options.notify)
    return find_base(options.base, options.revision, options.notify)


def load_base(
    files: BaseModelFiles,
    options: ModelOptions = ModelOptions(),
    *,
    training: bool = False,
    layers: Collection[str] = (),
) -> LoadedBase:
    """Load model and tokenizer into memory.

    A dtype or quantization left at `auto` is reduced, with a notice, where the weights would not
    fit otherwise.

    Args:
        training: quantize by bitsandbytes, whose products have gradients, on a CPU too.
        layers: those of an adapter (`auto_class`).

    Raises:
        BaseModelError: the files are not a causal language model, lack weights, or do not fit into
            memory.
    """
    from transformers import AutoConfig

    device = choose_device(options.device)
    threads.set_threads(options.threads)
    if device.type == "cpu" and (warning := threads.hourly_warning()):
        options.notify(Notice(warning))
    if options.dtype == "int8":
        if device.type != "cpu":
            raise BaseModelError(f"int8 is for generation on a CPU, not on {device}: leave --dtype out.")
        if options.load_in not in ("auto", "full", "8bit"):
            raise BaseModelError("--dtype int8 and --load-in both quantize the base: choose one.")
        if files.quantization is None:
            options = replace(options, dtype="float32", load_in="8bit")
    tokenizer = load_tokenizer(files)
    in_place = device.type == "cpu" and not training and files.quantization is None
    in_place = in_place and options.load_in in ("8bit", "4bit")
    dtype, load_in = memory.choose_precision(
        files, device, options.dtype, "full" if in_place else options.load_in, options.notify
    )
    # transformers prefers them.
    if shards := sorted(files.folder.glob("shard-*-model-*.safetensors")):
        raise BaseModelError(f"{shards[0]} belongs to a distributed checkpoint: move such files elsewhere.")
    with quiet_transformers(), loading_errors(files):
        if problem := unsupported.why_unknown_type(files.config()):
            raise BaseModelError(f"The base {files.name} cannot be loaded: {problem}.")
        config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        config.transformers_weights = None  # only `model.safetensors` and its shards are the base
        if files.quantization == "4bit":
            config.quantization_config["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        model, loading_info = cast(
            tuple[PreTrainedModel, dict[str, Collection[Any]]],
            auto_class(config, layers).from_pretrained(
                files.folder,
                config=config,
                adapter_kwargs=_NO_ADAPTER,
                generation_config=_default_if_unusable(files, options.notify),
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the tensor
                **_quantization_settings(load_in, dtype, device, saved=load_in == files.quantization),
            ),
        )
    for name, saved, configured in sorted(loading_info["mismatched_keys"]):
        raise BaseModelError(
            f"The weights of {files.name} contradict its config.json: {name} is "
            f"{_dimensions(saved)}, not {_dimensions(configured)}. Restore the config.json that "
            "was saved with them; if tokens were added to the model, its vocab_size is the number "
            "of rows of the embeddings."
        )
    if missing := sorted(map(str, loading_info["missing_keys"])):
        raise BaseModelError(
            f"The base {files.name} lacks weights, such as {missing[0]}: part of it would be random."
        )
    if files.quantization is not None:
        quantization.cast_unquantized(model, dtype)
    model.loss_type = "ForCausalLM"  # GPT-2's is None, which causes a warning at every use
    model.requires_grad_(False)
    kernels.fuse_modules(model)
    _keep_weights_unscaled(model, dtype)
    if in_place:
        probe = probe_layers(model, linear_layers(model))
        probe.check("on text alone")
        quantization.quantize(model, options.load_in, keep=probe.read)
    is_sharded = fsdp.shard_count() > 1  # then a forward pass waits for all processes
    max_context = positions.set_positions(model) if is_sharded else positions.NO_LIMIT
    if load_in == "full":
        fsdp.place_or_shard(model, device)
    for layer in model.modules():
        if hasattr(layer, _BNB_CPU_REPACKING):  # weights repacked at first use give no gradients
            setattr(layer, _BNB_CPU_REPACKING, False)
    model.eval()
    if load_in != "full":
        _adapt_quantized_layers(model, dtype, is_saved_quantized=files.quantization is not None)
    if not is_sharded:  # on its device, which is faster
        max_context = positions.set_positions(model)
    load_in = options.load_in if in_place else load_in
    if load_in != "full" and (experts := expert_weights(model)):
        size = sum(each.weight.numel() * each.weight.itemsize for each in experts.values())
        options.notify(
            Notice(f"The experts ({format_bytes(size)}) stay as they are: {load_in} is for linear layers.")
        )
    return LoadedBase(files, tokenizer, model, device, dtype, load_in, max_context)


def auto_class(config: PreTrainedConfig, layers: Collection[str] = ()) -> type[_BaseAutoModelClass]:
    """The class that loads a model: whole, where the checkpoint is a wrapper of a text model.

    Then the layers have the names of the wrapper, which vLLM expects of an adapter (vllm#48019).
    transformers gives the text model of some wrappers as the causal language model, of others none.

    Args:
        layers: those of an adapter; with names of the text model alone, that is loaded.
    """
    from transformers.models.auto import modeling_auto

    wrapper = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(config.model_type)
    text_model = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    is_text = config.architectures == [text_model] or (layers and not any(map(is_in_wrapper, layers)))
    if wrapper is None or (is_text and text_model is not None):
        return AutoModelForCausalLM
    return modeling_auto.AutoModelForMultimodalLM


def choose_device(name: str) -> torch.device:
    """Resolve a device name and make a GPU the current device.

    `auto` is CUDA, else Apple's MPS, else the CPU.

    Raises:
        BaseModelError: this machine has no such device.
    """
    if name == "auto":
        name = _available_devices()[-1]
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps") and name != "cpu":
            raise RuntimeError(f"{name} cannot run models")
        torch.empty(0, device=device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)  # for calls that do not name a device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BaseModelError(
            f"There is no device '{name}' here: choose auto, {', '.join(_available_devices())}."
        ) from error
    return device


def _keep_weights_unscaled(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Turn off that RWKV halves weights in place for evaluation, and doubles them for training.

    LoRA and quantized weights would not follow. A saved model keeps it.

    Raises:
        BaseModelError: for float16, which needs it.
    """
    if getattr(model.config, "rescale_every", 0):
        if dtype == torch.float16:
            raise BaseModelError("This base overflows in float16: choose --dtype bfloat16 or float32.")
        inner: Any = model.base_model
        inner.config = copy.copy(model.config)
        inner.config.rescale_every = 0


def _adapt_quantized_layers(model: PreTrainedModel, dtype: torch.dtype, *, is_saved_quantized: bool) -> None:
    """Make layers of bitsandbytes do in a model what plain ones do.

    Those whose weights are used without a call get plain weights again, of the same values.

    Raises:
        BaseModelError: the base does not run in 8 or 4 bits.
    """
    quantization.flatten_inputs(model)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):  # with this mark mixers of Mamba's kind compute otherwise
            vars(module.config).pop("_is_quantized", None)
    done: set[str] = set()
    while new := (probe := probe_layers(model, linear_layers(model))).read - done:
        quantization.dequantize_layers(model, new, dtype)
        done |= new
    probe.check("with quantized weights", "" if is_saved_quantized else ". Use --load-in full.")


def _available_devices() -> list[str]:
    """Kinds of devices on this machine, the fastest last."""
    available = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    return [name for name, present in available.items() if present]


def _default_if_unusable(files: BaseModelFiles, notify: EventHandler) -> GenerationConfig | None:
    """An empty generation config, with a notice, where transformers rejects that of the base; else
    None."""
    try:
        GenerationConfig.from_pretrained(files.folder)
    except OSError:  # there is none
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        problem = f"is ignored, because it is not valid: {first_line(error)}"
        notify(Notice(f"The generation_config.json of {files.name} {problem}"))
        return GenerationConfig()
    return None


def dequantize(base: LoadedBase) -> None:
    """Turn a base with weights in 8 or 4 bits into one with the same weights in float32.

    Raises:
        BaseModelError: they do not fit into memory.
    """
    memory.check_full_weights_fit(base.files, base.device)
    quantization.dequantize_bitsandbytes(base.model)
    base.load_in = "full"


def _dimensions(shape: Iterable[int]) -> str:
    return " x ".join(f"{size:,}" for size in shape)


def _quantization_settings(
    load_in: str, dtype: torch.dtype, device: torch.device, *, saved: bool
) -> dict[str, Any]:
    """Arguments of `from_pretrained` for LLM.int8() or QLoRA's NF4; saved weights keep their own
    settings.

    Source: Dettmers et al., 2022, arXiv:2208.07339, and 2023, arXiv:2305.14314.
    """
    if load_in == "full":
        return {}
    if saved:
        return {"device_map": {"": device}}
    settings = BitsAndBytesConfig(
        load_in_8bit=load_in == "8bit",
        load_in_4bit=load_in == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}
