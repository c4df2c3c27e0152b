"""Initialization and optimizers of LoRA variants: PiSSA, EVA and LoRA+.

Surprise: PEFT's PiSSA subtracts the largest directions from the base's weights. Here the base never
changes: the adapter has twice the rank, and its second half, which is frozen, cancels what the
first half starts with. So every checkpoint is a plain LoRA adapter. Price: A and B of twice the
size. Limit: new adapters only.
"""

import math
from collections.abc import Iterator
from itertools import count, islice
from typing import Any, cast
from unittest.mock import patch

import torch
from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer, eva
from peft.tuners.lora.layer import ParamWrapper

from ..config import LORA_PLUS_RATIO, TrainConfig
from ..data import packing
from ..data.packing import PackedSequences
from ..data.tokenization import TokenIds
from ..errors import ConfigError
from . import fsdp
from .base_files import quiet_transformers
from .delta import LoraDelta
from .experts import ExpertWeights
from .loading import LoadedBase
from .lora import ADAPTER_NAME
from .quantization import dense_weight

EVA_BATCHES = 4  # batches of text that EVA takes the inputs of each layer from
EVA_CONVERGED = 0.9  # cosine similarity between batches; PEFT's 0.99 takes minutes
EVA_MAX_PASSES = 12  # then directions count as converged: on some texts they never converge


def initialize(base: LoadedBase, model: PeftModel, config: TrainConfig, sequences: PackedSequences) -> None:
    """Initialize a new adapter as the method of the configuration requires.

    Args:
        base: the base under `model`.
        model: the base with new LoRA layers.
        config: method and rank.
        sequences: training sequences, which EVA reads.

    Raises:
        ConfigError: the rank exceeds the size of a layer, or EVA has too little text for it.
    """
    if config.method not in ("pissa", "eva"):
        return
    layers = _lora_layers(model)
    weights = [_lora_weights(layer) for layer in layers]
    max_rank = min(lora_a.shape[1] for lora_a, _ in weights)
    if config.method == "pissa":
        max_rank = min(max_rank, *(len(lora_b) for _, lora_b in weights))
    if config.rank > max_rank:
        raise ConfigError(
            f"rank is {config.rank}, but {config.method} allows at most {max_rank} here: lower --rank."
        )
    if config.method == "pissa":
        for layer in layers:
            init_pissa(layer, config.rank)
    else:
        rho = min(EvaConfig().rho, max_rank / config.rank)
        min_tokens = math.ceil(rho * config.rank)
        batches = list(islice(_eva_batches(base, sequences, min_tokens), EVA_BATCHES))
        if not batches:
            raise ConfigError(
                f"eva needs {min_tokens:,} tokens of text for this rank: provide more text, or lower --rank."
            )
        init_eva(base, model, rho, batches)


def init_pissa(layer: LoraLayer, rank: int) -> None:
    """PiSSA: start from the `rank` largest singular directions of the weight, or of that of each expert.

    Source: Meng et al., 2024, arXiv:2404.02948.
    """
    if isinstance(layer, ParamWrapper):
        experts = ExpertWeights(layer.get_base_layer(), layer.parameter_name)
        weight = experts.weight.detach().float()
        weight = weight.mT if experts.is_transposed else weight
    else:
        weight = fsdp.full_tensor(dense_weight(layer.get_base_layer()).detach()).float()
    # The last directions are inexact, so more are computed.
    left, values, right = torch.svd_lowrank(weight, q=min(rank + 16, *weight.shape[-2:]), niter=4)
    root = (values[..., :rank] / layer.scaling[ADAPTER_NAME]).sqrt()
    a_half, b_half = root[..., None] * right.mT[..., :rank, :], left[..., :rank] * root[..., None, :]
    delta = LoraDelta(torch.cat([a_half, a_half], -2), torch.cat([b_half, -b_half], -1))
    lora_a, lora_b = _lora_weights(layer)
    with torch.no_grad():
        lora_a.copy_(delta.matrices[0])
        lora_b.copy_(delta.matrices[1])
    # The second half gets no gradient, so that it keeps cancelling the start.
    first_half = torch.arange(2 * rank, device=lora_a.device) < rank
    rows = first_half.repeat(len(lora_a) // len(first_half))
    columns = first_half.repeat_interleave(lora_b.shape[1] // len(first_half))
    lora_a.register_hook(lambda grad: torch.where(rows[:, None], grad, 0))
    lora_b.register_hook(lambda grad: torch.where(columns, grad, 0))


def init_eva(base: LoadedBase, model: PeftModel, rho: float, batches: list[dict[str, torch.Tensor]]) -> None:
    """EVA: start from the directions in which the inputs of a linear layer vary most.

    Layers of which these directions explain more get a higher rank, up to `rho` times the
    configured one. Source: Paischer et al., 2024, arXiv:2410.07170.
    """
    config = cast(LoraConfig, model.peft_config[ADAPTER_NAME])
    # A tensor that can be changed later: PEFT compares with it and has no limit of its own.
    threshold: Any = torch.tensor([EVA_CONVERGED], device=base.device)
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=rho, tau=threshold)
    head = base.lm_head  # created before: PEFT would count its probe of the model as text
    passes = count(1)

    def forward(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
        if (number := next(passes)) > EVA_MAX_PASSES:
            threshold.fill_(-1)
        if number > EVA_MAX_PASSES + EVA_BATCHES:  # PEFT would wait for more tokens forever
            raise ConfigError("eva reaches some layers with too few tokens: provide more text, or lower --rank.")
        # PEFT alone uses the attention mask; the model tells rows apart by position ids.
        inputs = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
        with head.skip_lm_head():
            model(**inputs, use_cache=False)

    # Experts have no inputs of their own, and start as plain LoRA.
    unsupported = (*eva.UNSUPPORTED_LORA_MODULES, ParamWrapper)
    with quiet_transformers(), patch.object(eva, "UNSUPPORTED_LORA_MODULES", unsupported):
        initialize_lora_eva_weights(
            model,
            batches,
            forward_fn=forward,
            prepare_layer_inputs_fn=_unpadded_inputs,
            show_progress_bar=False,
        )
    config.init_lora_weights, config.eva_config = True, None
    if config.target_parameters:  # PEFT has put their modules among the target modules
        config.target_modules = [
            name.removeprefix("base_model.model.")
            for name, layer in model.named_modules()
            if isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
        ]
    for layer in _lora_layers(model):  # PEFT uses the base's dtype where ranks changed
        layer.lora_A[ADAPTER_NAME].to(torch.float32)
        layer.lora_B[ADAPTER_NAME].to(torch.float32)


def lora_plus_optimizer(
    model: PeftModel,
    learning_rate: float,
    weight_decay: float,
    optimizer_class: type[torch.optim.Optimizer],
    **settings: Any,
) -> torch.optim.Optimizer:
    """LoRA+: an optimizer with a higher learning rate for B than for A.

    Source: Hayou et al., 2024, arXiv:2402.12354.
    """
    return create_loraplus_optimizer(
        model,
        optimizer_class,
        lr=learning_rate,
        loraplus_lr_ratio=LORA_PLUS_RATIO,
        loraplus_weight_decay=weight_decay,
        **settings,
    )


def _lora_layers(model: PeftModel) -> list[LoraLayer]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def _lora_weights(layer: LoraLayer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """A (rank, in) and B (out, rank)."""
    return layer.lora_A[ADAPTER_NAME].get_parameter("weight"), layer.lora_B[ADAPTER_NAME].get_parameter("weight")


def _unpadded_inputs(
    layer_input: tuple[torch.Tensor, ...], positions: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """Inputs of a layer (tokens, in) without those of padding.

    Args:
        layer_input: its positional arguments, the first (batch, length, in), or (batch * length, in)
            in bases that flatten rows, or other rows of which nothing is known.
        positions: batch and position of each token that is no padding, (tokens, 2).
        layer_name: required by PEFT.
    """
    inputs = layer_input[0]
    batch, position = positions.T
    rows, length = (positions.max(0).values + 1).tolist()  # the longest row has no padding
    if inputs.shape[:2] == (rows, length):
        inputs = inputs[batch, position]
    elif inputs.shape[:-1] == (rows * length,):
        inputs = inputs[batch * length + position]
    return inputs.reshape(-1, inputs.shape[-1]).contiguous()


def _eva_batches(
    base: LoadedBase, sequences: PackedSequences, min_tokens: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of at least `min_tokens` tokens each.

    With fewer tokens PEFT would wait for more forever.
    """
    items: list[list[TokenIds]] = []
    for index in range(len(sequences)):
        items.append(sequences[index])
        lengths = torch.tensor([sum(map(len, item)) for item in items])
        if lengths.sum() >= min_tokens:
            batch = packing.collate(items, base.tokenizer.pad_token_id)
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
            yield {name: tensor.to(base.device) for name, tensor in batch.items() if name != "labels"}
            items = []
