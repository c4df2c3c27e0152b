"""The library: a folder of adapters to list, find, create, rename and remove. No torch.

A name becomes a folder, so every name is validated before it is used as a path. New adapters appear
complete or not at all.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import yaml

from .. import atomic_io
from ..config import TrainConfig
from ..errors import AdapterError
from ..text import (
    NAME_PATTERN,
    default_adapter_name,
    did_you_mean,
    display_name,
    format_bytes,
    format_created,
    format_gain,
    format_names,
)
from . import other_formats
from .adapter import (
    CARD_FILE,
    CONFIG_FILE,
    MANIFEST_FILE,
    RUN_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
    Adapter,
    load_adapter_folder,
    validate_name,
)
from .manifest import ParentInfo
from .summaries import Summary, Table, to_html

T = TypeVar("T")
FolderIdentity = tuple[tuple[int, ...] | None, ...]
_ADAPTER_FILES = (WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE, *TOKENIZER_FILES)


@dataclass(frozen=True)
class Ancestor:
    """A parent of an adapter, or a parent's parent.

    Args:
        name: its name when the child was made.
        sha256: hash of its weights.
        generation: 1 for parents, 2 for their parents.
        here: its current name in the library; None if it is not there.
    """

    name: str
    sha256: str
    generation: int
    here: str | None


def current_name(parent: ParentInfo, hashes: Sequence[tuple[str, str]]) -> str | None:
    """Return the name that a parent has now, from names and hashes of adapters; None if it is not among them."""
    names = [name for name, sha256 in hashes if sha256 == parent.sha256]
    return parent.name if parent.name in names else next(iter(names), None)


@dataclass(frozen=True)
class Library:
    """A folder with one adapter per subfolder.

    Examples:
        >>> Library().names()  # of the folder adapters
        ['noir', 'verse']
        >>> Library().get("noir").rank
        8
    """

    path: Path = Path("adapters")

    def names(self) -> list[str]:
        """Names of all subfolders that could be adapters. Raises AdapterError for a file."""
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise AdapterError(f"{self.path} is not a folder: choose another --adapters-dir.")
        try:
            self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return []
        atomic_io.finish_replacement(self.path)
        return sorted(
            entry.name for entry in self.path.iterdir() if entry.is_dir() and NAME_PATTERN.fullmatch(entry.name)
        )

    def entries(self) -> Iterator[tuple[str, Adapter | AdapterError]]:
        """Each name with its adapter, or with the error that loading it raised."""
        for name in self.names():
            try:
                yield name, read_consistently(self.path / name, lambda adapter: adapter)
            except AdapterError as error:
                if os.path.lexists(self.path / name):  # else it was removed in the meantime
                    yield name, error

    def _repr_html_(self) -> str:
        """The adapters as a table, for notebooks."""

        def parts() -> Iterator[Table | str]:
            yield from describe_entries([*self.entries()]) or [f"No adapters in {self.path} yet."]

        return to_html(parts())

    def get(self, name: str | Path) -> Adapter:
        """The adapter with this name or, if there is none, at this path."""
        return self.inspect(name, lambda adapter: adapter)

    def inspect(self, name: str | Path, function: Callable[[Adapter], T]) -> T:
        """Call a function on an adapter; repeat it if its files were replaced meanwhile."""
        text = str(name)
        atomic_io.finish_replacement(self.path)
        if NAME_PATTERN.fullmatch(text) and (self.path / text).is_dir():
            return read_consistently(self.path / text, function)
        if Path(text).is_dir():
            return read_consistently(Path(text), function)
        if Path(text).is_file():
            raise AdapterError(f"{text} {other_formats.explain_file(Path(text))}.")
        names = self.names()
        existing, similar = format_names(names) or "none yet", did_you_mean(text, names)
        raise AdapterError(
            f"There is no adapter '{text}', neither in {self.path} ({existing}) nor as a path.{similar}"
        )

    def get_all(self, names: Sequence[str | Path]) -> list[Adapter]:
        """The adapters with these names or paths. Raises AdapterError if two share a name."""
        adapters = [self.get(name) for name in names]
        check_distinct_names(adapters)
        return adapters

    def check_name_free(self, name: str, *, overwrite: bool = False, advice: str | None = None) -> None:
        """Raise AdapterError, with `advice` for a name in use, unless the name can be written."""
        target = self.path / validate_name(name)
        self._check_writable()
        atomic_io.finish_replacement(self.path)
        if os.path.lexists(target) and not overwrite:
            raise AdapterError(
                f"{target} exists: {advice or 'choose another --name, or replace it with --overwrite'}."
            )
        if os.path.lexists(target) and not (target / CONFIG_FILE).is_file():
            raise AdapterError(f"{target} is not an adapter, so it is not replaced: choose another --name.")
        if os.path.ismount(target):
            raise AdapterError(f"{target} is a mount point, so it is not replaced: choose another --name.")

    def _check_writable(self) -> None:
        if why := atomic_io.why_not_writable(self.path):
            raise AdapterError(f"{why}: choose another --adapters-dir.")

    def rename(self, old: str, new: str) -> Adapter:
        """Rename an adapter of this library, in its model card and run.yaml too; of a link, only the link.

        Raises:
            AdapterError: the new name is taken, or the adapter cannot be written.
        """
        self.check_name_free(new, advice="choose another name")
        adapter = load_adapter_folder(self._existing_folder(old))
        if not adapter.path.is_symlink() and (why := atomic_io.why_not_writable(adapter.path)):
            raise AdapterError(f"{why}, so it is not renamed.")
        with atomic_io.temporary_folder(self.path) as work:  # a full disk is noticed before anything has changed
            _write_renamed(adapter.path, old, new, work)
            try:
                os.rename(adapter.path, self.path / new)
            except OSError:
                self.check_name_free(new, advice="choose another name")  # taken in the meantime
                raise
            atomic_io.fsync_path(self.path)
            for file in sorted(work.iterdir()):
                os.replace(file, self.path / new / file.name)
        atomic_io.fsync_path(self.path / new)
        return load_adapter_folder(self.path / new)

    def find_removable(self, name: str) -> Path:
        """Return the folder of an adapter of this library, even a broken one, that can be removed."""
        target = self._existing_folder(name)
        if (
            not target.is_symlink()
            and not (target / CONFIG_FILE).is_file()
            and not (target / WEIGHTS_FILE).is_file()
        ):
            raise AdapterError(f"{target} is not an adapter, so it is not removed.")
        self._check_writable()
        return target

    def remove(self, name: str) -> None:
        """Delete an adapter of this library, even a broken one."""
        atomic_io.delete_atomically(self.find_removable(name))

    def ancestors(self, adapter: Adapter) -> list[Ancestor]:
        """Parents, each followed by its own parents."""
        if adapter.manifest is None or not adapter.manifest.parents:
            return []
        hashes = [(name, entry.sha256) for name, entry in self.entries() if isinstance(entry, Adapter)]

        def walk(parents: Sequence[ParentInfo], generation: int) -> Iterator[Ancestor]:
            for parent in parents:
                yield Ancestor(parent.name, parent.sha256, generation, current_name(parent, hashes))
                yield from walk(parent.parents, generation + 1)

        return list(walk(adapter.manifest.parents, 1))

    def _existing_folder(self, name: str) -> Path:
        """Folder of an adapter in this library. Raises AdapterError for a path elsewhere."""
        atomic_io.finish_replacement(self.path)
        if not NAME_PATTERN.fullmatch(name) or not (self.path / name).is_dir():
            names = self.names()
            existing, similar = format_names(names) or "none yet", did_you_mean(name, names)
            raise AdapterError(f"There is no adapter '{name}' in {self.path} ({existing}).{similar}")
        return self.path / name

    @contextlib.contextmanager
    def create(self, name: str, *, overwrite: bool = False, advice: str | None = None) -> Iterator[Path]:
        """Yield a temporary folder to fill; on exit it is checked and becomes the adapter `name`.

        After an error nothing has changed. `advice` is for a name in use.
        """
        self.check_name_free(name, overwrite=overwrite, advice=advice)
        try:
            with atomic_io.atomic_folder(self.path / name, overwrite=overwrite) as folder:
                yield folder
                manifest = load_adapter_folder(folder).manifest
                expected = manifest.weights.sha256 if manifest and manifest.weights else None
                if expected and expected != atomic_io.sha256_file(folder / WEIGHTS_FILE):
                    raise AdapterError(
                        f"{self.path / name} was not saved: the disk returned other weights than were written."
                    )
                self.check_name_free(name, overwrite=overwrite, advice=advice)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # taken in the meantime
                self.check_name_free(name, overwrite=overwrite, advice=advice)
            raise


def describe_entries(entries: Sequence[tuple[str, Adapter | AdapterError]]) -> Summary:
    """Return a table of adapters, and sentences about broken ones."""
    rows, broken, hashes = list[tuple[str, ...]](), list[str](), list[tuple[str, str]]()
    for name, entry in entries:
        if isinstance(entry, Adapter) and entry.manifest and entry.manifest.weights:
            hashes.append((name, entry.manifest.weights.sha256))
    for name, adapter in entries:
        if isinstance(adapter, AdapterError):
            broken.append(f"{name} is broken: {adapter}")
            continue
        manifest = adapter.manifest
        data, result = (manifest.data, manifest.result) if manifest else (None, None)
        parents = (
            [current_name(parent, hashes) or parent.name for parent in manifest.parents] if manifest else ["?"]
        )
        rows.append(
            (
                name,
                adapter.base,
                str(adapter.rank),
                display_name(data.name) if data else "?",
                format_bytes(adapter.bytes),
                format_gain(result.gain, result.standard_error, ".2f") if result else "?",
                format_created(manifest.created) if manifest else "?",
                ", ".join(parents),
            )
        )
    header = ("adapter", "base", "rank", "data", "size", "gain", "created", "parent")
    shown = slice(None if any(row[-1] for row in rows) else -1)  # the last column only if there is a parent
    table = Table([row[shown] for row in rows], header[shown], droppable=("size", "created"))
    return [*([table] if rows else []), *broken]


def rename_in_card(text: str, old: str, new: str) -> str:
    """Return a model card in which the heading and the examples have another name; all else stays."""
    places = r'^# |path/to/|a model `|"model": "|--lora-modules |--out |--lora '
    return re.sub(rf"({places}){re.escape(old)}(?![\w-])", rf"\g<1>{new}", text, flags=re.MULTILINE)


def _write_renamed(folder: Path, old: str, new: str, work: Path) -> None:
    """Write the model card and run.yaml of an adapter with another name into a work folder."""
    line = yaml.safe_dump({"name": new}).strip()  # of null and the like, in quotes
    renamings: dict[str, Callable[[str], str]] = {
        CARD_FILE: lambda text: rename_in_card(text, old, new),
        RUN_FILE: lambda text: re.sub(r"^name:.*$", line, text, flags=re.MULTILINE),
    }
    for name, renamed in renamings.items():
        file = folder / name
        if file.is_file() and not file.is_symlink() and not folder.is_symlink():
            text = renamed(file.read_bytes().decode("utf-8", "surrogateescape"))
            (work / name).write_bytes(text.encode("utf-8", "surrogateescape"))
            shutil.copymode(file, work / name)
            atomic_io.fsync_path(work / name)


def read_consistently(folder: Path, function: Callable[[Adapter], T]) -> T:
    """Load an adapter and call a function on it; repeat both if it was replaced meanwhile."""

    def identity() -> tuple[int, ...]:
        try:
            status = folder.stat()
        except OSError:
            return ()
        return status.st_ino, status.st_ctime_ns  # inode numbers are reused

    while True:
        before = identity()
        try:
            result = function(load_adapter_folder(folder))
            if identity() == before:
                return result
        except Exception:  # a mix of two adapters may fail in any way
            if identity() == before:
                raise


def adapter_name(requested: TrainConfig) -> str:
    """Return the name of the adapter of a run: the requested one, or one made from the dataset's."""
    return validate_name(requested.name or default_adapter_name(*requested.dataset_names))


def check_distinct_names(adapters: Sequence[Adapter]) -> None:
    """Raise AdapterError if two adapters share a name."""
    names = [adapter.name for adapter in adapters]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise AdapterError(f"Two of these adapters have the name {repeated[0]}: list each once, or rename one.")


def copy_files(adapter: Adapter, folder: Path, names: Sequence[str]) -> None:
    """Copy those of the named files that the adapter has. Only config and weights may be symlinks,
    unless they point into the Hub's cache: any other could point to a private file."""
    blobs = (adapter.path.resolve().parent.parent / "blobs").resolve()
    for name in names:
        file = adapter.path / name
        if not file.is_file():
            continue
        if name in (CONFIG_FILE, WEIGHTS_FILE) or not file.is_symlink() or file.resolve().parent == blobs:
            shutil.copyfile(file, folder / name)


def folder_identity(folder: Path) -> FolderIdentity:
    """Return values that differ between versions of an adapter: of each of its files, None for a
    missing one."""
    return tuple(_file_identity(folder / name) for name in _ADAPTER_FILES)


def _file_identity(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    # With ctime: a file that replaces another may have its inode number, size and mtime.
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
