"""What a method does beyond LoRA's own start and optimizer: PiSSA and EVA begin elsewhere, LoRA+ learns at two rates.

Surprise: PEFT's PiSSA takes the base's largest directions out of the base's weights. Here no base is touched: the update has
twice the rank, and its second half, which never learns, takes off what the first half begins with. So each checkpoint is
a plain LoRA at any moment. Price: twice the narrow products, and twice the file. Limit: a fresh update alone.
"""

import math
from typing import Any

import torch
from peft import EvaConfig, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight

from ..config import LORA_PLUS_RATIO, TrainConfig
from ..data import packing
from ..data.packing import PackedSequences
from ..data.tokenization import TokenIds
from ..errors import ConfigError
from . import fsdp
from .loading import LoadedBase
from .lora import ADAPTER_NAME
from .resolve import quiet_transformers

EVA_BATCHES = 4  # from which EVA learns how the text excites each layer
EVA_SETTLED = 0.9  # how alike (cosine) directions must be from batch to batch; with PEFT's 0.99 that takes minutes
EVA_PASSES = 12  # after so many batches they are taken as they are: of some texts they never settle


def initialize(base: LoadedBase, model: Any, config: TrainConfig, sequences: PackedSequences) -> None:
    """Give a fresh update the beginning that its method wants.

    Raises ConfigError for a rank that the layers have not, or for which there is too little text.
    """
    if config.method in ("pissa", "eva"):
        sizes = [(layer.in_features, layer.out_features) for layer in _lora_layers(model)]
        most = min(into if config.method == "eva" else min(into, out) for into, out in sizes)
        if config.rank > most:
            raise ConfigError(f"rank is {config.rank}, and {config.method} has {most} at the most here: lower --rank.")
    if config.method == "pissa":
        for layer in _lora_layers(model):
            init_pissa(layer, config.rank)
    elif config.method == "eva":
        rho = min(EvaConfig().rho, most / config.rank)
        init_eva(base, model, rho, _eva_batches(base, sequences, math.ceil(rho * config.rank)))


def lora_plus_optimizer(model: Any, rate: float, weight_decay: float, kind: Any, **settings: Any) -> Any:
    """LoRA+ (Hayou et al., 2024, arXiv:2402.12354): an optimizer of this kind for which B learns faster than A."""
    return create_loraplus_optimizer(
        model,
        kind,
        lr=rate,
        loraplus_lr_ratio=LORA_PLUS_RATIO,
        loraplus_weight_decay=weight_decay,
        **settings,
    )


def _lora_layers(model: Any) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def init_pissa(layer: Any, rank: int) -> None:
    """PiSSA (Meng et al., 2024, arXiv:2404.02948): learn the `rank` largest directions of the weight itself."""
    base = layer.get_base_layer()
    weight = fsdp.full_tensor(dequantize_module_weight(base).detach()).float()
    if layer.fan_in_fan_out:
        weight = weight.T
    more = min(rank + 16, *weight.shape)  # than are kept: the last of those that are found are not exact
    left, values, right = torch.svd_lowrank(weight, q=more, niter=4)
    root = (values[:rank] / layer.scaling[ADAPTER_NAME]).sqrt()
    down, up = root[:, None] * right.T[:rank], left[:, :rank] * root
    learnt, stored = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
    with torch.no_grad():
        learnt.copy_(torch.cat([down, down]))
        stored.copy_(torch.cat([up, -up], 1))
    learnt.register_hook(lambda gradient: torch.cat([gradient[:rank], torch.zeros_like(gradient[rank:])]))
    stored.register_hook(lambda gradient: torch.cat([gradient[:, :rank], torch.zeros_like(gradient[:, rank:])], 1))


def _eva_batches(base: LoadedBase, sequences: PackedSequences, least: int) -> list[dict[str, torch.Tensor]]:
    """A few batches of so many tokens at least: with fewer, PEFT would wait for more without end."""
    found: list[dict[str, torch.Tensor]] = []
    items: list[list[TokenIds]] = []
    for number in range(len(sequences)):
        items.append(sequences[number])
        lengths = torch.tensor([sum(map(len, item)) for item in items])
        if lengths.sum() >= least:
            batch = packing.collate(items, base.tokenizer.pad_token_id)
            del batch["labels"]
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
            found.append({name: it.to(base.device) for name, it in batch.items()})
            items = []
        if len(found) == EVA_BATCHES:
            break
    if not found:
        raise ConfigError(f"eva needs {least:,} tokens of text for this rank: give more text, or lower --rank.")
    return found


def init_eva(base: LoadedBase, model: Any, rho: float, batches: list[dict[str, torch.Tensor]]) -> None:
    """EVA (Paischer et al., 2024, arXiv:2410.07170): begin with the directions in which the inputs of each layer vary most, and
    give more rank to layers of which these explain more."""
    settings = model.peft_config[ADAPTER_NAME]
    settled: Any = torch.tensor(
        [EVA_SETTLED], device=base.device
    )  # which PEFT compares with, and waits for without end
    settings.init_lora_weights, settings.eva_config = "eva", EvaConfig(rho=rho, tau=settled)
    passes = 0

    head = base.lm_head  # found now: it tries the model, and PEFT would take that for text

    def read(model: Any, batch: dict[str, Any]) -> None:  # the mask is for PEFT; rows are told apart without it
        nonlocal passes
        passes += 1
        if passes > EVA_PASSES:
            settled.fill_(-1)
        with head.skip_lm_head():
            model(**{name: it for name, it in batch.items() if name != "attention_mask"}, use_cache=False)

    with quiet_transformers():
        initialize_lora_eva_weights(model, batches, forward_fn=read, show_progress_bar=False)
    settings = model.peft_config[ADAPTER_NAME]
    settings.init_lora_weights, settings.eva_config = True, None
    for layer in _lora_layers(model):  # where the rank is another one, PEFT has made new tensors, in the base's numbers
        for part in (layer.lora_A, layer.lora_B):
            part[ADAPTER_NAME].to(torch.float32)
