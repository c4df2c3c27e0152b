"""Load a base model and its tokenizer onto a device, in a dtype."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..config import ModelOptions
from ..errors import BaseModelError
from . import fsdp, kernels, quantization
from .memory import choose_precision
from .resolve import BaseModelFiles, find_base, loading_errors, quiet_transformers

_CPU_4BIT_PACKING = "support_avx512bf16_for_cpu"  # of bitsandbytes' layers of 4 bits


@dataclass
class LoadedBase:
    """A base in memory. `model` is a transformers causal language model in evaluation mode."""

    files: BaseModelFiles
    model: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    load_in: str = "full"  # or the bits that its linear layers are in: 8bit, 4bit

    @property
    def max_context(self) -> int:
        """Tokens that the model can look back on, or a very large number where its config does not say."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)

    @cached_property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokens that end a text: the tokenizer's, and those the model was made to stop at, such as the end of a turn."""
        more = getattr(self.model.generation_config, "eos_token_id", None)
        return frozenset({self.tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None})

    @cached_property
    def lm_head(self) -> kernels.ChunkedLMHead:
        return kernels.ChunkedLMHead(self.model)

    @cached_property
    def tokenizer_hash(self) -> str:
        """sha256 over the vocabulary and the ids of the special tokens."""
        vocabulary = sorted(self.tokenizer.get_vocab().items())
        special = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return hashlib.sha256(json.dumps([vocabulary, special]).encode()).hexdigest()


def load_base(source: BaseModelFiles, options: ModelOptions = ModelOptions()) -> LoadedBase:
    """Read model and tokenizer into memory; what is left to `auto` takes fewer bits where more do not fit, and says so.

    Raises BaseModelError when they are no causal language model, or do not fit.
    """
    from transformers import AutoModelForCausalLM

    dtype, load_in = options.dtype, options.load_in
    place = choose_device(options.device)
    if dtype == "int8" and place.type != "cpu":
        raise BaseModelError(f"int8 is for writing on a CPU, and this would run on {place}: leave --dtype out there.")
    if dtype == "int8" and load_in not in ("auto", "full"):
        raise BaseModelError("--dtype int8 and --load-in are two ways to read fewer bits: give one.")
    tokenizer = load_tokenizer(source)
    kind, load_in = choose_precision(source, place, dtype, load_in, options.notify)
    bits: dict[str, Any] = {}
    if load_in != "full":
        bits = {"quantization_config": _quantization_config(load_in, kind), "device_map": {"": place}}
    with quiet_transformers(), loading_errors(source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=kind, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **bits
        )
    model, info = loaded
    if absent := sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])]):
        raise BaseModelError(f"The base {source.name} lacks weights, such as {absent[0]}: it would be partly random.")
    model.loss_type = "ForCausalLM"  # GPT-2's is None, and everything that asks for it warns
    model.requires_grad_(False)
    kernels.fuse_modules(model)
    if dtype == "int8":
        quantization.quantize_int8(model)
    if load_in == "full":
        fsdp.place_or_shard(model, place)
    for layer in model.modules():
        if hasattr(
            layer, _CPU_4BIT_PACKING
        ):  # once it has written, it would turn its weights round, and give no gradients any more
            setattr(layer, _CPU_4BIT_PACKING, False)
    return LoadedBase(source, model.eval(), tokenizer, place, kind, load_in)


def _quantization_config(load_in: str, kind: torch.dtype) -> Any:
    """As QLoRA has it (Dettmers et al., 2023, arXiv:2305.14314), or LLM.int8() (2022, arXiv:2208.07339)."""
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=kind
    )


def load_tokenizer(source: BaseModelFiles) -> Any:
    """The tokenizer, its pad token set to its end of text. Raises BaseModelError when it has none."""
    from transformers import AutoTokenizer

    with quiet_transformers(), loading_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"The tokenizer of {source.name} has no end-of-text token, so no text could end.")
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, else Apple's MPS, else the CPU. Raises BaseModelError for a device this machine lacks."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cuda", "mps") and name != "cpu":
            raise RuntimeError(f"{name} is not what models run on")
        torch.empty(0, device=device)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            torch.cuda.set_device(device)  # for everything that does not say which
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
        raise BaseModelError(
            f"There is no device '{name}' here: choose {', '.join(['auto', 'cpu', *here])}."
        ) from error
    return device


def open_base(adapter: Adapter | None, options: ModelOptions = ModelOptions()) -> LoadedBase:
    """Load the base that the options name, else the one that the adapter names, else the default."""
    return load_base(base_for_adapter(adapter, options), options)


def base_for_adapter(adapter: Adapter | None, options: ModelOptions = ModelOptions()) -> BaseModelFiles:
    """Find the files of that base."""
    base, revision = options.base, options.revision
    if base is None and adapter is not None:
        base, revision = adapter.base or None, revision or adapter.revision
    return find_base(base, revision, options.notify)
