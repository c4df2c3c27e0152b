"""The library: adapters in one folder, each under its name. List, find, write, rename, remove, adopt. Never imports torch.

Surprise: a name is a folder, so every name is checked before it becomes a path, and all that is written appears whole or
not at all. Limit: an adapter of another tool names its base and no more; adopting it can compare sizes, not origins.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .. import atomic_io
from ..config import NAME_PATTERN
from ..errors import AdapterError
from .adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    load_adapter_folder,
    validate_name,
)
from .manifest import ParentInfo

T = TypeVar("T")


@dataclass(frozen=True)
class Library:
    """The folder in which adapters are kept, each under its name."""

    path: Path = Path("adapters")

    def names(self) -> list[str]:
        """Of what lies in the library and could be an adapter by its name. Raises AdapterError where it is no folder."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise AdapterError(f"{self.path} is no folder, so no adapters are in it: choose another --adapters-dir.")
        try:
            self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return []
        atomic_io.finish_replacement(self.path)
        return sorted(
            entry.name for entry in self.path.iterdir() if entry.is_dir() and NAME_PATTERN.fullmatch(entry.name)
        )

    def entries(self) -> Iterator[tuple[str, Adapter | AdapterError]]:
        """Every folder of the library with what it is: an adapter, or the reason why it is none."""
        for name in self.names():
            try:
                yield name, read_consistently(self.path / name, lambda adapter: adapter)
            except AdapterError as error:
                if os.path.lexists(self.path / name):  # else it was removed meanwhile
                    yield name, error

    def get(self, name: str | Path) -> Adapter:
        """The adapter of that name here or, failing that, at that path."""
        return self.inspect(name, lambda adapter: adapter)

    def inspect(self, name: str | Path, look: Callable[[Adapter], T]) -> T:
        """What `look` makes of that adapter, which may read its files: none is replaced meanwhile."""
        text = str(name)
        atomic_io.finish_replacement(self.path)
        if NAME_PATTERN.fullmatch(text) and (self.path / text).is_dir():
            return read_consistently(self.path / text, look)
        if Path(text).is_dir():
            return read_consistently(Path(text), look)
        known = ", ".join(self.names()) or "none yet"
        raise AdapterError(f"There is no adapter '{text}', neither in {self.path} ({known}) nor as a path.")

    def get_all(self, names: Sequence[str | Path]) -> list[Adapter]:
        """Those adapters, in this order. Raises AdapterError when two of them share a name, and so could not be told apart."""
        found = [self.get(name) for name in names]
        check_distinct_names(found)
        return found

    def check_name_free(
        self,
        name: str,
        *,
        overwrite: bool = False,
        advice: str | None = None,
    ) -> None:
        """Raise AdapterError, with `advice` for a name that is taken, unless an adapter of that name may be written."""
        target = self.path / validate_name(name)
        atomic_io.finish_replacement(self.path)
        if os.path.lexists(target) and not overwrite:
            raise AdapterError(f"{target} exists: {advice or 'choose another --name, or replace it with --overwrite'}.")
        if os.path.lexists(target) and not (target / CONFIG_FILE).is_file():
            raise AdapterError(f"{target} is no adapter, so it is not replaced: choose another --name.")
        self._check_writable()

    def _check_writable(self) -> None:
        if why := atomic_io.why_not_writable(self.path):
            raise AdapterError(f"{why}: choose another --adapters-dir.")

    def rename(self, old: str, new: str) -> Adapter:
        """Give an adapter of this library another name. Raises AdapterError when it is taken."""
        self.check_name_free(new, advice="choose another name")
        adapter = load_adapter_folder(self._own(old))
        try:
            os.rename(adapter.path, self.path / new)
        except OSError:
            self.check_name_free(new, advice="choose another name")  # taken in the last moment
            raise
        atomic_io.fsync_path(self.path)
        return load_adapter_folder(self.path / new)

    def remove(self, name: str) -> None:
        """Delete an adapter of this library, a broken one too. It is gone from the list at once, and for good."""
        target = self._own(name)
        if not target.is_symlink() and not (target / CONFIG_FILE).is_file() and not (target / WEIGHTS_FILE).is_file():
            raise AdapterError(f"{target} is no adapter, so it is not removed.")
        self._check_writable()
        atomic_io.delete_atomically(target)

    def ancestors(self, adapter: Adapter) -> list[dict[str, Any]]:
        """Parents, their parents and so on: `name`, `sha256`, `generation` (1 for parents), and `here`, the name under which
        this library has it today, or None."""
        if adapter.manifest is None or not adapter.manifest.parents:
            return []
        here = [(name, it.sha256) for name, it in self.entries() if isinstance(it, Adapter)]

        def walk(parents: Sequence[ParentInfo], generation: int) -> Iterator[dict[str, Any]]:
            for parent in parents:
                facts = {"name": parent.name, "sha256": parent.sha256, "generation": generation}
                same = [name for name, digest in here if digest == parent.sha256]
                yield facts | {"here": parent.name if parent.name in same else next(iter(same), None)}
                yield from walk(parent.parents, generation + 1)

        return list(walk(adapter.manifest.parents, 1))

    def _own(self, name: str) -> Path:
        """The folder of that name in this library; a path elsewhere is not its to change."""
        atomic_io.finish_replacement(self.path)
        if not NAME_PATTERN.fullmatch(name) or not (self.path / name).is_dir():
            known = ", ".join(self.names()) or "none yet"
            raise AdapterError(f"There is no adapter '{name}' in {self.path} ({known}).")
        return self.path / name

    @contextlib.contextmanager
    def create(self, name: str, *, overwrite: bool = False, advice: str | None = None) -> Iterator[Path]:
        """Yield a folder to fill; then it is checked and becomes `name`, or nothing changes and the error comes out."""
        self.check_name_free(name, overwrite=overwrite, advice=advice)
        try:
            with atomic_io.atomic_folder(self.path / name, overwrite=overwrite) as work:
                yield work
                adapter = load_adapter_folder(work)
                if adapter.manifest and adapter.manifest.weights:
                    written = atomic_io.sha256_file(work / WEIGHTS_FILE)
                    if written != adapter.manifest.weights.sha256:
                        raise AdapterError(
                            f"{self.path / name} was not written as it should be: the disk gave back other weights."
                        )
                self.check_name_free(name, overwrite=overwrite, advice=advice)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # it was taken in the last moment
                self.check_name_free(name, overwrite=overwrite, advice=advice)
            raise


def read_consistently(folder: Path, look: Callable[[Adapter], T]) -> T:
    """What `look` makes of the adapter in a folder; once more where another process has replaced the folder meanwhile, for what
    was read would be of two adapters."""

    def identity() -> tuple[int, ...]:
        try:
            facts = folder.stat()
        except OSError:
            return ()
        return facts.st_ino, facts.st_ctime_ns  # a number is given again when a folder has gone

    while True:
        before = identity()
        try:
            found = look(load_adapter_folder(folder))
        except Exception:  # half of one and half of another may fail in any way
            if identity() == before:
                raise
            continue
        if identity() == before:
            return found


def check_distinct_names(adapters: Sequence[Adapter]) -> None:
    """Raise AdapterError when two adapters share a name."""
    called = [adapter.name for adapter in adapters]
    if twice := [name for name in called if called.count(name) > 1]:
        raise AdapterError(f"Two of these adapters are called {twice[0]}: name each once, or rename one.")
