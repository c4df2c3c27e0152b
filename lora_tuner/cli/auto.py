"""Adapter "auto" of the command line: the adapters to choose from."""

from collections import Counter

from ..adapters.adapter import Adapter
from ..adapters.library import Library
from ..adapters.manifest import why_never_chosen
from ..config import AUTO_MODEL, NO_ADAPTER_TO_CHOOSE, RESERVED_NAME
from ..errors import ConfigError, Notice
from ..training.progress import display


def adapters_to_choose(library: Library) -> list[Adapter]:
    """Return the adapters that can be chosen, of the base that most of them have. A notice names the others.

    Raises ConfigError if there are none.
    """
    if AUTO_MODEL in library.names():
        raise ConfigError(f"{library.path / AUTO_MODEL}: {RESERVED_NAME}")
    entries = [adapter for _, adapter in library.entries() if isinstance(adapter, Adapter)]
    usable = [adapter for adapter in entries if why_never_chosen(adapter.manifest) is None]
    if not usable:
        raise ConfigError(f"--adapter {AUTO_MODEL}: {NO_ADAPTER_TO_CHOOSE}")
    ((base, _),) = Counter(adapter.base for adapter in usable).most_common(1)
    chosen = [adapter for adapter in usable if adapter.base == base]
    for other in [adapter for adapter in entries if adapter not in chosen]:
        why = why_never_chosen(other.manifest) or f"its base is not {base}"
        display(Notice(f"{AUTO_MODEL} never chooses {other.name}: {why}."))
    return chosen
