"""Adopt an adapter made by another tool: give it a manifest that ties it to a base model. Never
imports torch.

Only the layer sizes are compared with the base; whether the adapter was trained on it cannot be
verified.
"""

from pathlib import Path

from .. import atomic_io
from ..adapters.adapter import (
    CARD_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    Adapter,
    check_weights_hash,
    validate_name,
    weights_info,
)
from ..adapters.library import Library, copy_files
from ..adapters.manifest import BaseInfo, Manifest, utc_timestamp
from ..errors import AdapterError, EventHandler, Notice, ignore_events
from ..models.base_files import BaseModelFiles
from ..models.layers_in_files import layer_sizes_in_files
from ..models.resolve import find_adapter_base, find_base


def adopt(
    library: Library,
    folder: str | Path,
    name: str | None = None,
    *,
    base: str | BaseModelFiles | None = None,
    revision: str | None = None,
    base_info: BaseInfo | None = None,
    notify: EventHandler = ignore_events,
) -> Adapter:
    """Write a manifest for an adapter of another tool; from then on it is rejected on any other
    base.

    Args:
        library: the library.
        folder: name or path of the adapter. A folder outside the library is copied into it.
        name: name of the copy; by default the folder's.
        base: the base model; by default the one in the PEFT config.
        revision: commit of the base on the Hub.
        base_info: what the manifest says of the base, where more is known than by its files.
        notify: receives a notice.

    Raises:
        AdapterError: the adapter has a manifest, is damaged, or does not fit the base.
    """
    adapter = library.get(folder)
    if adapter.manifest is not None:
        raise AdapterError(f"{adapter.path} has a manifest: there is nothing to adopt.")
    in_library = adapter.path.absolute().parent == library.path.absolute()
    if in_library and adapter.path.is_symlink():
        raise AdapterError(f"{adapter.path} is a symlink: adopt {adapter.path.resolve()} under another --name.")
    if in_library and name is not None:
        raise AdapterError(
            f"{adapter.path} is in the library already: leave out --name, or use `adapters rename`."
        )
    name = validate_name(name or adapter.name)
    if not in_library:
        library.check_name_free(name, advice="choose another --name")
    check_weights_hash(adapter)
    if isinstance(base, BaseModelFiles):
        base_files = base
    elif base is not None:
        base_files = find_base(base, revision, notify)
    elif adapter.base:
        base_files = find_adapter_base(adapter, revision, notify)
    else:
        raise AdapterError(f"{adapter.path} does not name its base: give it with --base.")
    adapter.check_shapes(layer_sizes_in_files(base_files, adapter))
    if problem := adapter.replaced.misfit(adapter.tensors, base_files.shapes):
        raise AdapterError(f"{adapter.path} does not fit the base: {problem}.")
    base_info = base_info or base_files.base_info()
    manifest = Manifest(created=utc_timestamp(), base=base_info, weights=weights_info(adapter))
    if in_library:
        atomic_io.atomic_write_text(adapter.path / MANIFEST_FILE, manifest.to_json())
    else:
        with library.create(name) as target:
            copy_files(adapter, target, (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE, *TOKENIZER_FILES))
            (target / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    notify(
        Notice(
            f"{name} fits {base_files.name} by its layer sizes; it cannot be verified that it was "
            f"trained on it.{adapter.ignored_note}"
        )
    )
    return library.get(name)
