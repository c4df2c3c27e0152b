"""Write an adapter in the layout of mlx-lm: adapters.safetensors and adapter_config.json.

mlx-lm stores the pair of a layer as `lora_a` (in, rank) and `lora_b` (rank, out) and has one rank
and one scale for all layers (mlx-lm 0.32.2, mlx_lm/tuner/lora.py, dora.py and utils.py). Lower
ranks are filled up with zeros, and where scales differ they are multiplied into `lora_b`; both are
exact. The magnitudes of DoRA are `m`. Experts are three layers in mlx-lm, with pairs (experts, rank,
in) and (experts, out, rank), and two parameters in transformers: gate and up share their `lora_a`.
Checked in mlx-lm on a CPU under Linux; untried on a Mac.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from .. import atomic_io
from ..adapters import mlx_lm
from ..adapters.adapter import CONFIG_FILE, Adapter
from ..adapters.base_config import BaseConfig
from ..adapters.compatibility_mlx import base_notes, count_blocks, find_model
from ..config import ModelOptions
from ..errors import AdapterError, Notice
from ..models import lora
from ..models.base_files import LOCAL_FOLDER
from ..models.tokenizer import load_adapter_tokenizer
from .common import base_for_export, check_output_path
from .export_gguf import find_turn_end

MLX_WEIGHTS_FILE = "adapters.safetensors"


@dataclass(frozen=True)
class MlxExport:
    """The exported folder.

    Args:
        path: the folder.
        bytes: size of its weights.
        model: the base, as mlx-lm loads it: an id on the Hub or a folder.
        turn_end: the token that ends an answer, where that is not the end of text of the base.
    """

    path: Path
    bytes: int
    model: str
    turn_end: str | None


def to_mlx(
    adapter: Adapter, out: Path, *, overwrite: bool = False, options: ModelOptions = ModelOptions()
) -> MlxExport:
    """Write an adapter for mlx-lm, read it back and compare it. The base's weights are not loaded.

    Raises:
        AdapterError: the folder exists; mlx-lm has no place for a part of the adapter; the adapter
            does not fit the base.
    """
    options.require_default("device", "dtype", "load_in", why="the base is not loaded for an export")
    valid = (out / MLX_WEIGHTS_FILE).is_file()
    check_output_path(out, "folder with an adapter of mlx-lm", valid=valid, overwrite=overwrite)
    base = base_for_export(adapter, out, "mlx", options)
    files, config = base.files, base.files.config()
    for note in base_notes(config):
        options.notify(Notice(f"{note}."))
    tensors, settings = _convert(adapter, config)
    if files.weights_source != LOCAL_FOLDER and files.revision:
        settings = {"model": files.repo, **settings}
    own = load_adapter_tokenizer(adapter, base, options)
    if own is not None and own.chat_template != base.tokenizer.chat_template:
        options.notify(
            Notice(
                f"mlx-lm reads the chat template of the base, not that of {adapter.name}: mlx_lm.server has --chat-template."
            )
        )
    turn_end, _ = find_turn_end(adapter, base, options)
    with atomic_io.atomic_folder(out, overwrite=overwrite) as folder:
        save_file(tensors, folder / MLX_WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")
        _check_written(adapter, config, folder)
    return MlxExport(
        out, (out / MLX_WEIGHTS_FILE).stat().st_size, str(settings.get("model", files.folder)), turn_end
    )


def _convert(adapter: Adapter, config: BaseConfig) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Tensors and adapter_config.json."""
    model = _find_model(config)
    scales = {adapter.scale_of(module) for module in adapter.modules}
    scale = scales.pop() if len(scales) == 1 else 1.0
    rank = max(adapter.rank_of(module) for module in adapter.modules)
    weights = lora.read_weights_file(adapter)
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, mlx_lm.Place] = {}
    for module in adapter.modules:
        lora_a, lora_b = _stored_pair(adapter, module, weights)
        if scales:  # they differ
            lora_b = lora_b.float() * adapter.scale_of(module)
        places = model.layers_of(module)
        for name, rows in zip(places, _split_rows(lora_b, len(places), model.interleaved), strict=True):
            tensors |= _mlx_pair(name, lora_a, rows, rank)
            if adapter.config.get("use_dora"):
                tensors[f"{name}.m"] = weights[adapter.tensor_name(module, "lora_magnitude_vector")]
        layers |= places
    for name, tensor in tensors.items():  # a Mac's GPU has no float64
        tensors[name] = (tensor.float() if tensor.dtype == torch.float64 else tensor).contiguous()
    parameters = {"rank": rank, "scale": scale, "dropout": float(adapter.config.get("lora_dropout") or 0.0)}
    settings = mlx_lm.lora_config(layers, count_blocks(config), parameters)
    return tensors, {"fine_tune_type": "dora" if adapter.config.get("use_dora") else "lora", **settings}


def _find_model(config: BaseConfig) -> mlx_lm.MlxModel:
    model = find_model(config)
    assert model is not None, "refused by the check"
    return model


def _stored_pair(
    adapter: Adapter, module: str, weights: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, in) and B (out, rank) of a layer; of experts (experts, rank, in) and (experts, out, rank)."""
    lora_a, lora_b = (weights[adapter.tensor_name(module, f"lora_{part}.weight")] for part in "AB")
    if module not in adapter.experts:
        return lora_a, lora_b
    experts = adapter.layer_size(module)[0]
    return lora_a.reshape(experts, -1, lora_a.shape[1]), lora_b.reshape(len(lora_b), -1, experts).permute(2, 0, 1)


def _split_rows(lora_b: torch.Tensor, parts: int, interleaved: bool) -> list[torch.Tensor]:
    """The rows of B for each of the layers that a layer of transformers is in mlx-lm."""
    if parts > 1 and interleaved:
        return [lora_b[..., part::parts, :] for part in range(parts)]
    return list(lora_b.chunk(parts, dim=-2))


def _mlx_pair(name: str, lora_a: torch.Tensor, lora_b: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """Both tensors in the shapes of mlx-lm: transposed, but not those of experts (LoRASwitchLinear)."""
    lacking = rank - lora_a.shape[-2]
    lora_a, lora_b = F.pad(lora_a, (0, 0, 0, lacking)), F.pad(lora_b, (0, lacking))
    if lora_a.dim() == 2:
        lora_a, lora_b = lora_a.T, lora_b.T
    return {f"{name}.lora_a": lora_a, f"{name}.lora_b": lora_b}


def _check_written(adapter: Adapter, config: BaseConfig, folder: Path) -> None:
    """Raise AdapterError if a layer of the written folder does something else to a random input."""
    model = _find_model(config)
    tensors = load_file(folder / MLX_WEIGHTS_FILE)
    scale = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["lora_parameters"]["scale"]
    weights = lora.read_weights_file(adapter)
    generator = torch.Generator().manual_seed(0)
    for module in adapter.modules:
        lora_a, lora_b = (tensor.double() for tensor in _stored_pair(adapter, module, weights))
        sample = torch.randn(lora_a.shape[-1], 1, generator=generator, dtype=torch.float64)
        expected = adapter.scale_of(module) * (lora_b @ (lora_a @ sample))
        places = model.layers_of(module)
        for name, rows in zip(places, _split_rows(expected, len(places), model.interleaved), strict=True):
            own_a, own_b = (tensors[f"{name}.lora_{part}"].double() for part in "ab")
            if own_a.dim() == 2:
                own_a, own_b = own_a.T, own_b.T
            tolerance = 1e-5 * float(rows.abs().max())
            if not torch.allclose(scale * (own_b @ (own_a @ sample)), rows, rtol=0.0, atol=tolerance):
                raise AdapterError(f"The export of {adapter.name} is not kept: {name} differs from {module}.")
