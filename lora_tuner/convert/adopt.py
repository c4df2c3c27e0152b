"""Adopt an adapter that another tool made: give it a manifest that ties it to a base model. Never imports torch.

Only the sizes of its layers are compared with the base: whether the adapter was trained on it cannot be proven.
"""

import shutil
from pathlib import Path

from .. import atomic_io
from ..adapters.adapter import (
    CARD_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Adapter,
    check_weights_hash,
    validate_name,
    weights_info,
)
from ..adapters.library import Library
from ..adapters.manifest import Manifest, utc_timestamp
from ..errors import AdapterError, EventHandler, Notice, ignore_events
from ..models.resolve import find_base, layer_sizes_in_files


def adopt(
    library: Library,
    folder: str | Path,
    name: str | None = None,
    *,
    base: str | None = None,
    revision: str | None = None,
    notify: EventHandler = ignore_events,
) -> Adapter:
    """Give an adapter of another tool a manifest: from then on it is held to the base that it is adopted on.

    A folder elsewhere is copied into the library, under `name` or its own; one of the library stays where it is. Raises
    AdapterError when it has a manifest, is damaged, or has other sizes than the base.
    """
    adapter = library.get(folder)
    if adapter.manifest is not None:
        raise AdapterError(f"{adapter.path} has a manifest: there is nothing to adopt.")
    here = adapter.path.absolute().parent == library.path.absolute()
    if here and adapter.path.is_symlink():
        raise AdapterError(f"{adapter.path} is a link: adopt {adapter.path.resolve()} under another --name.")
    if here and name is not None:
        raise AdapterError(f"{adapter.path} is in the library: it keeps its name; `adapters rename` gives another.")
    target = validate_name(name or adapter.name)
    if not here:
        library.check_name_free(target, advice="choose another --name")
    check_weights_hash(adapter)
    if base is None:
        base, revision = adapter.base, revision or adapter.revision
    if not base:
        raise AdapterError(f"{adapter.path} names no base: give it with --base.")
    source = find_base(base, revision, notify)
    adapter.check_shapes(layer_sizes_in_files(source, adapter))
    manifest = Manifest(
        created=utc_timestamp(),
        base=source.base_info(),
        weights=weights_info(adapter),
    )
    if here:
        atomic_io.atomic_write_text(adapter.path / MANIFEST_FILE, manifest.to_json())
    else:
        with library.create(target) as work:
            shutil.copyfile(adapter.path / WEIGHTS_FILE, work / WEIGHTS_FILE)
            shutil.copyfile(adapter.path / CONFIG_FILE, work / CONFIG_FILE)
            card = adapter.path / CARD_FILE
            if card.is_file() and not card.is_symlink():  # it is not looked into, and might be any file
                shutil.copyfile(card, work / CARD_FILE)
            (work / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
    notify(Notice(f"{target} fits {source.name} in its sizes; that it was trained on it cannot be proven."))
    return library.get(target)
