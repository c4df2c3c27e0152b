"""Recognize folders and tensors that are no LoRA adapter of PEFT: the cause, and the remedy."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from . import safetensors_header
from .peft_config import CONFIG_FILE, WEIGHTS_FILE

_PICKLED_FILES = ("adapter_model.bin", "adapter_model.pt")
_MLX_FILES = ("adapters.safetensors", "adapters.npz")
_MODEL_FILES = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")
_IMAGE_LORA = re.compile(
    r"(lora_unet|lora_te\d?|unet|text_encoder|transformer\.single)[_.]|[._]lora[._](up|down)\b"
)
_LYCORIS = re.compile(r"\.(hada_w[12]|lokr_w[12]|oft_blocks|glora)")
_MAX_ENTRIES = 1_000  # of a folder that are looked at
_MERGE = "merge it with PEFT's merge_and_unload, and give the result as --base"
_TENSORS = (  # name -> origin; the first match counts
    (r"\.lora_[ab]$", "of an adapter of MLX"),
    (_LYCORIS.pattern, "of LyCORIS"),
    (_IMAGE_LORA.pattern, "of a LoRA for image models"),
    (r"\.lora_embedding_[AB]|\.base_layer\.weight$", f"LoRA on embeddings or output head, not adapted here: {_MERGE}"),
    (r"\.trainable_tokens_", "of trainable tokens in a form that PEFT does not load"),
    (r"\.lora_[AB]\.bias", "of lora_bias, which is not supported"),
    (r"\.lora_[AB]\.\w+\.weight", "it holds the name of an adapter: save it with PEFT's save_pretrained"),
    (r"\.bias$", "a trained bias, which is not supported"),
    (r"\.(modules_to_save|base_layer|embed_tokens|lm_head|wte|embed_in|embed_out|score)\b",
     "whole weights, which PEFT does not load under this name: modules_to_save does not list them"),
)  # fmt: skip
_LAYERS = (
    (r"\bexperts\.\d+\.",
     "of one expert, as transformers 4 has them: load it with PEFT and transformers 5, and save it with save_pretrained"),
    (r"\.weight$", f"of a router or a linear layer in target_parameters, and not adapted here: {_MERGE}"),
    (r"(^|\.)(lm_head|embed_out)$", f"the output head, which is not adapted here: {_MERGE}"),
)  # fmt: skip


def describe_tensor(name: str) -> str:
    """The origin of a tensor that is no LoRA tensor, in parentheses; "" if it is unknown."""
    return _describe(name, _TENSORS)


def describe_missing_layer(module: str, layers: Iterable[str]) -> str:
    """The kind of an adapted layer that a base with other layers lacks, and the remedy, in parentheses;
    "" if unknown."""
    bare = safetensors_header.bare_name(module)
    if same := [layer for layer in layers if safetensors_header.bare_name(layer) == bare]:
        return (
            f" (here it is {same[0]}: export the adapter that has the names of the text model alone with `python "
            "cli.py export NAME --to vllm`, and use the result)"
        )
    return _describe(module, _LAYERS)


def _describe(name: str, kinds: Iterable[tuple[str, str]]) -> str:
    return next((f" ({kind})" for pattern, kind in kinds if re.search(pattern, name)), "")


def explain_folder(path: Path) -> str | None:
    """The reason why a folder that lacks the files of an adapter is none, and the remedy.

    None where nothing is recognized.
    """
    names = {entry.name for entry in _entries(path)}
    if found := sorted(names.intersection(_MLX_FILES)):
        return (
            f"is an adapter of MLX ({found[0]}), not of PEFT: merge it with `mlx_lm.fuse "
            f"--adapter-path {path}`, and give the result as --base"
        )
    pickled = next((name for name in _PICKLED_FILES if name in names), None)
    if pickled and CONFIG_FILE in names:
        load = f"torch.load('{pickled}', weights_only=True)"
        return (
            f"has pickled weights ({pickled}), which are not read: convert them in that folder "
            f'with `python -c "import torch, safetensors.torch as s; s.save_file({load}, '
            f"'{WEIGHTS_FILE}')\"`"
        )
    if folders := _adapter_folders(path):
        listed = ", ".join(map(str, folders[:5]))
        more = f" and {len(folders) - 5:,} more" if len(folders) > 5 else ""
        if len(folders) == 1:
            return f"holds its adapter in a sub-folder: give {listed}"
        return f"holds {len(folders):,} adapters in sub-folders: give one of {listed}{more}"
    if "config.json" in names and any(_MODEL_FILES.fullmatch(name) for name in names):
        return f"is a whole model, not an adapter: use it with --base {path}"
    if gguf := sorted(name for name in names if name.endswith(".gguf")):
        return f"is in GGUF ({gguf[0]}), the format of llama.cpp: give the PEFT adapter that it was made from"
    for name in sorted(name for name in names if name.endswith(".safetensors")):
        if kind := _image_lora(path / name):
            return f"is a {kind} ({name}), not an adapter for a language model"
    return None


def explain_file(path: Path) -> str:
    """The remedy for a file in place of an adapter folder."""
    if path.name in (CONFIG_FILE, WEIGHTS_FILE):
        return f"is a file of an adapter: give its folder, {path.parent}"
    if path.suffix == ".gguf":
        return "is in GGUF, the format of llama.cpp: give the PEFT adapter that it was made from"
    if path.suffix == ".safetensors" and (kind := _image_lora(path)):
        return f"is a {kind}, not an adapter for a language model"
    return f"is a file, and an adapter is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"


def _entries(folder: Path) -> list[Path]:
    try:
        return list(itertools.islice(folder.iterdir(), _MAX_ENTRIES))
    except OSError:
        return []


def _adapter_folders(path: Path) -> list[Path]:
    """Folders up to two levels below that hold an adapter, checkpoints by their step."""

    def subfolders(folders: Iterable[Path]) -> list[Path]:
        return [entry for folder in folders for entry in _entries(folder) if entry.is_dir()]

    below = subfolders([path])
    below += subfolders(below[:_MAX_ENTRIES])
    adapters = [
        folder
        for folder in below
        if (folder / CONFIG_FILE).is_file()
        and any((folder / name).is_file() for name in (WEIGHTS_FILE, *_PICKLED_FILES, *_MLX_FILES))
    ]
    return sorted(adapters, key=lambda folder: [(len(part), part) for part in folder.parts])


def _image_lora(path: Path) -> str | None:
    try:
        header, _ = safetensors_header.read_safetensors_header(path)
    except (OSError, ValueError):
        return None
    if any(_LYCORIS.search(name) for name in header):
        return "LyCORIS adapter"
    return "LoRA for image models" if any(_IMAGE_LORA.match(name) for name in header) else None
