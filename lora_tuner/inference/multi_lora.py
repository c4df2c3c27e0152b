"""Many adapters beside one base: each row of a batch has its own.

With PEFT, loading and switching take longer the more adapters are loaded (benchmarks/RESULTS.md).
Here an adapter is not part of the model: its tensors stay beside it, and B A x is added while a
batch runs, by CpuDecoder or by forward hooks. The base is never modified or wrapped. Price: a batch
that mixes adapters holds a second copy of their tensors. Limit: rows of a batch whose adapters
change experts must share one adapter, as experts get the tokens of all rows at once."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from ..adapters.adapter import Adapter
from ..adapters.label_info import LabelInfo
from ..adapters.manifest import RoutingInfo
from ..data.row_template import Template
from ..errors import AdapterError, MixedBatchError
from ..models.delta import load_deltas
from ..models.experts import ExpertDelta, ExpertWeights
from ..models.fused_linear import Lora
from ..models.layers import LinearLayer, adaptable_layers, layer_sizes
from ..models.loading import LoadedBase
from ..models.quantization import dense_weight
from ..models.replaced import load_replaced, untrained_rows
from ..models.replacement import ReplacedHook, Replacements
from ..text import display_name

LoraFactors = tuple[torch.Tensor, torch.Tensor]  # (ranks, in), (ranks, out)


@dataclass(frozen=True)
class _LayerLora:
    """LoRA weights of one layer: A (rank, in), B (out, rank) with the scale; of experts (experts,
    rank, in) and (experts, out, rank). With DoRA the base's own output without bias is added once
    more, times `dora_scale` (out,)."""

    A: torch.Tensor
    B: torch.Tensor
    dora_scale: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """LoRA weights in memory, by layer name. Immutable: a newer version is loaded beside one that
    is still in use. `tokenizer` is that of an adapter whose own differs from the base's, `replaced`
    what it has in place of modules of the base, `vocab_size` the number of its token ids, 0 for
    those of the base; `is_chat` says that it has learned conversations, `template` in which form
    it has learned texts, `routing` what its own rows gain, `labels` those that it tells, `data` the
    name of its data."""

    layers: dict[str, _LayerLora]
    tokenizer: PreTrainedTokenizerBase | None = None
    replaced: Replacements = field(default_factory=dict)
    vocab_size: int = 0
    is_chat: bool = False
    template: Template | None = None
    routing: RoutingInfo | None = None
    labels: LabelInfo | None = None
    data: str | None = None
    fused: dict[tuple[str, ...], LoraFactors] = field(default_factory=dict)  # a cache

    @property
    def is_additive(self) -> bool:
        """True if it only adds to outputs; DoRA also rescales them, others replace them."""
        return not self.replaced and all(lora.dora_scale is None for lora in self.layers.values())

    @property
    def adapts_experts(self) -> bool:
        """True if rows with it can only share a batch with each other."""
        return any(layer_lora.A.dim() == 3 for layer_lora in self.layers.values())


def blend_loaded(parts: Sequence[tuple[float, LoadedAdapter]]) -> LoadedAdapter:
    """Compute the exact weighted sum of loaded adapters. Raises AdapterError for DoRA, whose update
    is not additive."""
    if any(loaded.replaced for _, loaded in parts):
        raise AdapterError(
            "An adapter that replaces weights of the base, such as rows of new tokens, cannot be "
            "part of a weighted sum: merge it instead."
        )
    if not all(loaded.is_additive for _, loaded in parts):
        raise AdapterError(
            "A DoRA adapter also rescales the base's weights, so it cannot be part of a weighted sum: merge it instead."
        )
    layers = {}
    for module in dict.fromkeys(module for _, loaded in parts for module in loaded.layers):
        weighted = [(weight, loaded.layers[module]) for weight, loaded in parts if module in loaded.layers]
        layers[module] = _LayerLora(
            torch.cat([layer_lora.A for _, layer_lora in weighted], -2),
            torch.cat([weight * layer_lora.B for weight, layer_lora in weighted], -1),
        )
    return LoadedAdapter(layers, is_chat=any(loaded.is_chat for _, loaded in parts))


# layer, inputs, output
HookFunction = Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor | None]
LayerHook = tuple[torch.nn.Module, HookFunction | ExpertDelta]


class MultiLora:
    """Loads adapters for a base and applies them to the rows of a batch."""

    def __init__(self, base: LoadedBase) -> None:
        self._base = base
        self.layers = adaptable_layers(base.model)
        self.plain = LoadedAdapter({})  # the plain base

    def load(self, adapter: Adapter) -> LoadedAdapter:
        """Read an adapter into memory. Raises AdapterError if it is damaged or does not fit the
        base."""
        layers, device = {}, self._base.device
        for module, delta in load_deltas(adapter, self.layers).items():
            lora_a, lora_b = delta.A.to(device), delta.B.to(device)
            if delta.magnitude is None:
                layers[module] = _LayerLora(lora_a, lora_b)
            else:
                norm = (dense_weight(self.layers[module]).float() + lora_b @ lora_a).norm(dim=1)
                scale = delta.magnitude.to(device) / norm
                layers[module] = _LayerLora(lora_a, scale[:, None] * lora_b, scale - 1)
        replaced = load_replaced(adapter, self._base)
        vocab_size = max((each.vocab_size for each in replaced.values()), default=0)
        return LoadedAdapter(
            layers,
            replaced=replaced,
            vocab_size=vocab_size,
            is_chat=adapter.is_chat,
            template=adapter.manifest.template if adapter.manifest else None,
            routing=adapter.manifest.routing if adapter.manifest else None,
            labels=adapter.manifest.labels if adapter.manifest else None,
            data=display_name(adapter.manifest.data.name) if adapter.manifest and adapter.manifest.data else None,
        )

    def untrained(self, loaded: LoadedAdapter) -> LoadedAdapter:
        """The plain base, with rows for the token ids that only the adapter has."""
        rows = untrained_rows(self._base, loaded.vocab_size)
        return LoadedAdapter({}, replaced=rows, vocab_size=loaded.vocab_size)

    def hooks(self, rows: Sequence[LoadedAdapter | None]) -> list[LayerHook]:
        """Make forward hooks that apply `rows[i]` to row i of a batch, None for the plain base.

        A single entry applies to all rows of batches of any size. Raises MixedBatchError where the
        experts of some rows would need another adapter than those of others.
        """
        hooks: list[LayerHook] = []
        for module, layer in self.layers.items():
            of_rows = [(loaded or self.plain).layers.get(module) for loaded in rows]
            if not isinstance(layer, ExpertWeights):
                if hook := _make_hook(of_rows):
                    hooks.append((layer, hook))
            elif any(layer_lora is not of_rows[0] for layer_lora in of_rows):
                raise MixedBatchError(
                    f"{module} gets the tokens of all rows of a batch at once, so rows whose "
                    "adapter changes these experts must share it."
                )
            elif of_rows[0] is not None:
                hooks.append((layer.module, ExpertDelta(layer, of_rows[0].A, of_rows[0].B)))
        for module in dict.fromkeys(module for loaded in rows if loaded for module in loaded.replaced):
            replacements = [(loaded or self.plain).replaced.get(module) for loaded in rows]
            hooks.append((self._base.model.get_submodule(module), ReplacedHook(replacements)))
        return hooks

    @contextlib.contextmanager
    def apply_hooks(self, hooks: Sequence[LayerHook]) -> Iterator[None]:
        """Install forward hooks for the duration of the block.

        A forward pass in it raises MixedBatchError where a layer cannot tell the rows apart.
        """
        with contextlib.ExitStack() as stack:
            for layer, hook in hooks:
                if isinstance(hook, ExpertDelta):
                    stack.enter_context(hook.applied())
                else:
                    stack.enter_context(layer.register_forward_hook(hook))
                if isinstance(hook, ReplacedHook) and isinstance(layer, torch.nn.Embedding):
                    stack.enter_context(layer.register_forward_pre_hook(hook.clamp))
            yield

    def fused_factors(self, modules: Sequence[str], loaded: LoadedAdapter) -> LoraFactors:
        """Concatenate the LoRA weights of layers that share their input; each rank contributes to
        its own layer's outputs only.

        Returns (ranks, in) and (ranks, outs of all layers). Cached in the adapter.
        """
        key = tuple(modules)
        if key not in loaded.fused:
            sizes = layer_sizes({module: self.layers[module] for module in modules})
            parts = [
                loaded.layers.get(module) or _LayerLora(torch.empty(0, size_in), torch.empty(size_out, 0))
                for module, (size_in, size_out) in sizes.items()
            ]
            down = torch.cat([part.A for part in parts])
            loaded.fused[key] = down, torch.block_diag(*[part.B.T for part in parts])
        return loaded.fused[key]


class _RowGroups:
    """Rows of a batch grouped by adapter, so that the rows of each adapter are multiplied together.

    `rows` are the adapters of the rows, None for the plain base; `adapters` the distinct ones.
    """

    def __init__(self, rows: Sequence[LoadedAdapter | None], adapters: Sequence[LoadedAdapter]) -> None:
        groups = [[row for row, loaded in enumerate(rows) if loaded is adapter] for adapter in adapters]
        size = max(map(len, groups))
        grouped = [row for group in groups for row in group + group[:1] * (size - len(group))]
        position = [grouped.index(row) if loaded is not None else 0 for row, loaded in enumerate(rows)]
        self.rows, self.adapters = len(rows), len(adapters)
        self.grouped = torch.tensor(grouped)
        self.position = torch.tensor(position)
        self.plain = torch.tensor([[[loaded is None]] for loaded in rows])

    def add_delta(self, out: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Add to each row the delta of its adapter.

        Args:
            out: (tokens, out), the rows one after another; modified in place.
            x: (tokens, in).
            down: (adapters, ranks, in).
            up: (adapters, ranks, out).
        """
        per_row = x.float().view(self.rows, -1, x.shape[1])
        grouped = per_row.index_select(0, self.grouped).view(self.adapters, -1, x.shape[1])
        delta = torch.bmm(torch.bmm(grouped, down.transpose(1, 2)), up).view(len(self.grouped), -1, up.shape[2])
        return out.add_(delta.index_select(0, self.position).masked_fill_(self.plain, 0).view(out.shape))


# One adapter: (in, ranks), (ranks, outs), None.
# Several: (adapters, ranks, in), (adapters, ranks, outs), groups of rows.
LoraPart = tuple[torch.Tensor, torch.Tensor, _RowGroups | None]


class BatchedLora:
    """LoRA weights of the rows of a batch for CpuDecoder, one LoraPart per fused linear layer.

    `modules` are the names of the layers in each fused layer. When rows change, only the weights of
    new adapters are copied.
    """

    def __init__(self, multi_lora: MultiLora, modules: Sequence[Sequence[str]]) -> None:
        self.multi_lora = multi_lora
        self.modules = list(modules)
        self.rows: list[LoadedAdapter | None] = [None]
        self.parts: list[LoraPart | None] = [None] * len(self.modules)
        self._stacks: list[LoraFactors] = []  # (slots, ranks, in), (slots, ranks, outs)
        self._slots: list[LoadedAdapter] = []  # the adapter in each slot of the stacks

    def set_rows(self, rows: Sequence[LoadedAdapter | None]) -> None:
        """Apply `rows[i]` to row i, None for the plain base. A single entry applies to all rows of
        any batch."""
        if list(rows) == self.rows:
            return
        self.rows = list(rows)
        if all(loaded is rows[0] for loaded in rows):
            factors = self._fused_factors(rows[0] or self.multi_lora.plain)
            self.parts = [(down.T, up, None) if len(down) else None for down, up in factors]
            self._stacks, self._slots = [], []
            return
        self._fill_slots([loaded for loaded in dict.fromkeys(rows) if loaded is not None])
        groups, count = _RowGroups(rows, self._slots), len(self._slots)
        self.parts = [
            (downs[:count], ups[:count], groups) if downs.shape[1] else None for downs, ups in self._stacks
        ]

    def _fused_factors(self, loaded: LoadedAdapter) -> list[LoraFactors]:
        return [self.multi_lora.fused_factors(modules, loaded) for modules in self.modules]

    def _fill_slots(self, adapters: list[LoadedAdapter]) -> None:
        """Copy the weights of adapters into slots; one that has a slot within their number keeps
        it."""
        factors = {loaded: self._fused_factors(loaded) for loaded in adapters}
        ranks = [0] * len(self.modules)
        for fused in factors.values():
            ranks = [max(rank, len(down)) for rank, (down, _) in zip(ranks, fused, strict=True)]
        if not self._stacks or any(
            len(downs) < len(adapters) or downs.shape[1] < rank
            for rank, (downs, _) in zip(ranks, self._stacks, strict=True)
        ):
            slots = max(len(adapters), 2 * len(self._slots))
            self._stacks = [
                (torch.zeros(slots, rank, down.shape[1]), torch.zeros(slots, rank, up.shape[1]))
                for rank, (down, up) in zip(ranks, factors[adapters[0]], strict=True)
            ]
            self._slots = []
        old = self._slots[: len(adapters)]
        new = [loaded for loaded in adapters if loaded not in old]
        self._slots = [loaded if loaded in adapters else new.pop(0) for loaded in old] + new
        for slot, loaded in enumerate(self._slots):
            if loaded not in old:
                for stacks, parts in zip(self._stacks, factors[loaded], strict=True):
                    for stack, part in zip(stacks, parts, strict=True):
                        stack[slot, : len(part)] = part
                        stack[slot, len(part) :] = 0


def _make_hook(rows: Sequence[_LayerLora | None]) -> HookFunction | None:
    """Make the hook of one layer, given its LoRA weights per row; None if it has nothing to do."""
    first = rows[0]
    if all(layer_lora is first for layer_lora in rows):
        if first is None:
            return None
        # Fused blocks know the hook of plain LoRA, and compute the same in their own products.
        return Lora(first.A, first.B) if first.dora_scale is None else partial(_dora_hook, first)
    present = [layer_lora for layer_lora in rows if layer_lora is not None]
    rank = max(len(layer_lora.A) for layer_lora in present)
    down = present[0].A.new_zeros(len(rows), rank, present[0].A.shape[1])
    up = present[0].B.new_zeros(len(rows), len(present[0].B), rank)
    dora_scale = present[0].B.new_zeros(len(rows), 1, len(present[0].B))
    for row, layer_lora in enumerate(rows):
        if layer_lora is not None:  # zeros elsewhere: the plain base, and ranks below the highest
            down[row, : len(layer_lora.A)] = layer_lora.A
            up[row, :, : len(layer_lora.A)] = layer_lora.B
            if layer_lora.dora_scale is not None:
                dora_scale[row] = layer_lora.dora_scale
    any_dora = any(layer_lora.dora_scale is not None for layer_lora in present)
    return partial(_per_row_hook, down.transpose(1, 2), up.transpose(1, 2), dora_scale if any_dora else None)


def _dora_hook(
    layer_lora: _LayerLora, layer: LinearLayer, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
) -> torch.Tensor:
    delta = F.linear(F.linear(inputs[0].to(layer_lora.A.dtype), layer_lora.A), layer_lora.B)
    return _add_delta(layer, output, delta, layer_lora.dora_scale)


def _per_row_hook(
    down: torch.Tensor,
    up: torch.Tensor,
    dora_scale: torch.Tensor | None,
    layer: LinearLayer,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    """Apply `down` (rows, in, rank) and `up` (rows, rank, out) to inputs (rows, tokens, in)."""
    x = inputs[0].to(down.dtype)
    if x.dim() != 3 or len(x) != len(down):  # OPT, for one, flattens rows and tokens
        raise MixedBatchError(
            "This base flattens the rows of a batch, so all rows of a batch must share one adapter."
        )
    return _add_delta(layer, output, torch.bmm(torch.bmm(x, down), up), dora_scale)


def _add_delta(
    layer: LinearLayer, output: torch.Tensor, delta: torch.Tensor, dora_scale: torch.Tensor | None
) -> torch.Tensor:
    if dora_scale is not None:
        delta = delta + dora_scale * (output if layer.bias is None else output - layer.bias)
    return (output + delta).to(output.dtype)
