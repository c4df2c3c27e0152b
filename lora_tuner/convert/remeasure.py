"""Measure again what manifests hold beside losses, for adapters of before or of other tools."""

from collections.abc import Sequence

from .. import atomic_io
from ..adapters.adapter import MANIFEST_FILE, Adapter, check_weights_hash, load_adapter_folder
from ..config import ModelOptions
from ..errors import AdapterError, Notice
from ..evaluation import gain_matrix
from ..inference import probes
from ..models import lora


def remeasure(adapters: Sequence[Adapter], options: ModelOptions = ModelOptions()) -> list[Adapter]:
    """Measure the probes of adapters on their held-out rows, and write them into their manifests.

    Returns the adapters as they are then.

    Raises:
        AdapterError: one has no manifest, is damaged, or has another base.
    """
    for adapter in adapters:
        if adapter.manifest is None:
            raise AdapterError(f"{adapter.name} has no manifest: write one with `adapters adopt`.")
    base = gain_matrix.open_base_of(adapters, options)
    for adapter in adapters:
        lora.check_base(adapter, base, options)
        check_weights_hash(adapter)
    written = []
    for adapter in adapters:
        assert adapter.manifest is not None
        rows = gain_matrix.cached_rows(adapter, options.notify, all_rows=False)
        if rows.missing:
            text = f"{adapter.name}: {rows.missing}. Its probes are neutral prompts."
            options.notify(Notice(text))
        fields = probes.measure_stored(base, adapter, adapter.manifest, rows.texts, options)
        manifest = adapter.manifest.model_copy(update=fields)
        atomic_io.atomic_write_text(adapter.path / MANIFEST_FILE, manifest.to_json())
        written.append(load_adapter_folder(adapter.path))
    return written
