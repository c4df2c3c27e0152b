"""Adapters into models: merge.

Surprise: PEFT merges in place, and taking a merge back changes the base's last bits. So a base of its own is merged, in
float32, and cast at the end.
"""

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from . import files
from .base_model import choose_dtype, quiet
from .errors import AdapterError, Listener, ignore
from .lora import attach, check_base, open_base
from .store import Adapter

SLOT = "merged"


def merge(
    adapter: Adapter,
    out: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    force: bool = False,
    notify: Listener = ignore,
) -> Path:
    """Write base and adapter as one plain model folder, tokenizer included, that transformers loads without PEFT.

    The folder appears whole or not at all. Raises AdapterError when it exists, or the adapter does not fit the base.
    """
    if out.exists() and not overwrite:
        raise AdapterError(f"{out} exists: choose another --out, or replace it with --overwrite.")
    if out.exists() and not (out / "config.json").is_file():
        raise AdapterError(f"{out} is no model folder, so it is not replaced: choose another --out.")
    opened = open_base(adapter, base, revision, device="cpu", dtype="float32", notify=notify)
    check_base(adapter, opened, force=force, notify=notify)
    weights = sum(p.numel() * p.element_size() for p in opened.model.parameters())
    out.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out.parent).free) < weights:
        raise AdapterError(f"{out} needs {weights / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there.")
    model = attach(opened.model, adapter, SLOT).merge_and_unload(safe_merge=True, adapter_names=[SLOT])
    model = model.to(choose_dtype(dtype, opened.device))
    with quiet(), files.new_folder(out) as work:
        model.save_pretrained(work)
        # The tokenizer as it came: in memory its pad token has been set.
        AutoTokenizer.from_pretrained(opened.source.folder, trust_remote_code=False).save_pretrained(work)
    return out
