"""Changes of the library that visitors ask for. Each refusal is a sentence of the page.

Names come from visitors: adapters are looked up in the listing, new names are checked.
"""

import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ... import atomic_io
from ...adapters import archive, hub_sync
from ...adapters.adapter import (
    MANIFEST_FILE,
    WEIGHTS_FILE,
    Adapter,
    load_adapter_folder,
    validate_name,
    verify_adapter,
)
from ...adapters.library import Library, read_consistently
from ...convert.adopt import adopt
from ...errors import AdapterError, GenerationError, HubError, Notice, WrongBaseError
from ...models import lora
from ...text import default_adapter_name, display_name, format_bytes, format_count, format_names
from ..service import ModelService, ServedModel
from .common import GONE
from .uploads import Uploads, may_train

OFF = "Renaming, removing, uploading, exporting and pushing are off: start the server with --allow-training."
FIXED = "This server was started for certain adapters (--adapter): its library is not changed from the page."
NO_TOKEN = "Pushing is off: the server has no token of the Hugging Face Hub. Start it with HF_TOKEN set."
REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
T = TypeVar("T")


@dataclass(frozen=True)
class LibraryActions:
    """Checks and changes of adapters, for visitors. All methods block."""

    service: ModelService

    @property
    def library(self) -> Library:
        return self.service.generator.library

    def find(self, name: str) -> ServedModel:
        """Return an adapter of the listing. Raises AdapterError if it is not there."""
        model = next((model for model in self.service.list_models() if model.id == name and model.path), None)
        if model is None:
            raise AdapterError(GONE.format(name) if name else "Choose an adapter first.")
        return model

    def read(self, name: str, function: Callable[[Adapter], T]) -> T:
        """Call a function on an adapter of the listing. Raises AdapterError."""
        path = self.find(name).path
        assert path is not None
        return read_consistently(path, function)

    def check_allowed(self) -> None:
        """Raise AdapterError where visitors may change nothing."""
        if not may_train(self.service.config):
            raise AdapterError(OFF)

    def check_changeable(self) -> None:
        """Raise AdapterError where the library may not be changed."""
        self.check_allowed()
        if self.service.only:
            raise AdapterError(FIXED)

    def check_new_name(self, name: str) -> str:
        """Return a name that a new adapter can have. Raises AdapterError."""
        if validate_name(name) == self.service.name:
            raise AdapterError(f"{name} is the name of the base: choose another one.")
        if os.path.lexists(self.library.path / name):
            raise AdapterError(f"There is an adapter {name}: choose another name.")
        return name

    @property
    def uploads(self) -> Uploads:
        return Uploads(self.service.config)

    def adopt(self, upload: str, name: str) -> str:
        """Add an uploaded adapter to the library, as that of a stranger: its own manifest is not kept.

        Nothing in it chooses a base, a file or a folder. Returns what was done.
        """
        self.check_changeable()
        files = self.uploads.files(upload)
        archives = [path for path in files if path.suffix.lower() == ".zip"]
        if not files:
            raise AdapterError("Choose a zip file, or the files of an adapter, first.")
        if archives and len(files) > 1:
            raise AdapterError("Upload one zip file alone, or the files of one adapter.")
        if not name and not archives:
            raise AdapterError("Give the adapter a name.")
        name = self.check_new_name(name or default_adapter_name(archives[0].stem))
        notices: list[str] = []
        with atomic_io.temporary_folder(self.uploads.folder.absolute()) as temporary:
            folder = temporary / name
            folder.mkdir()
            left_out = archive.unpack(archives[0], folder) if archives else archive.copy_uploaded(files, folder)
            is_chat = self._check_base(folder)
            (folder / MANIFEST_FILE).unlink(missing_ok=True)
            adopt(
                self.library,
                folder,
                name,
                base=self.service.base.files,
                base_info=self.service.base.info(with_template=is_chat),
                notify=lambda event: notices.append(event.text) if isinstance(event, Notice) else None,
            )
        self.uploads.remove(upload)
        text = f"{name} is in the library. {' '.join(notices)}"
        return f"{text} Left out: {format_names(left_out)}." if left_out else text

    def _check_base(self, folder: Path) -> bool:
        """Return whether an adapter has learned conversations, by its manifest if it has one.

        Raises AdapterError if that names another base.
        """
        adapter = load_adapter_folder(folder)
        if adapter.manifest is None:
            return False
        try:
            lora.check_base(adapter, self.service.base)
        except WrongBaseError as error:
            trained_on = display_name(adapter.manifest.base.name)
            raise AdapterError(
                f"{adapter.name} was trained on {trained_on}, or with another tokenizer or chat template: it does not "
                f"fit {self.service.name}, the base of this server."
            ) from error
        return adapter.is_chat

    def rename(self, name: str, new: str) -> str:
        """Rename an adapter. Returns what was done."""
        self.check_changeable()
        self.find(name)
        self.library.rename(name, self.check_new_name(new))
        self._unload(name)
        return f"{name} is now {new}. Requests that use it are answered to their end."

    def _unload(self, name: str) -> None:
        """Free the memory of an adapter that is gone. Sequences that use it keep it to their end."""
        with suppress(GenerationError):  # it is not loaded
            self.service.generator.unload(name)

    def describe_loss(self, name: str) -> str:
        """Say what is lost with an adapter: files, and the adapters that name it as a parent."""
        model = self.find(name)
        assert model.path is not None
        if model.path.is_symlink():
            return f"{name} is a link to a folder elsewhere: only the link is removed."
        files = [path for path in model.path.rglob("*") if path.is_file()]
        size = sum(path.lstat().st_size for path in files)
        text = f"This deletes {name} for ever: {format_count(len(files), 'file')}, {format_bytes(size)}."
        children = self._children(model)
        if children:
            verb = "names" if len(children) == 1 else "name"
            text += f" {format_names(children)} {verb} it as a parent, and will show that it is gone."
        return text

    def _children(self, model: ServedModel) -> Sequence[str]:
        if model.adapter is None or model.adapter.manifest is None:
            return []
        sha256 = model.adapter.sha256
        others = [
            (other.id, other.adapter.manifest.parents)
            for other in self.service.list_models()
            if other.adapter is not None and other.adapter.manifest is not None
        ]
        return [name for name, parents in others if any(parent.sha256 == sha256 for parent in parents)]

    def remove(self, name: str) -> str:
        """Remove an adapter, even a broken one. Returns what was done."""
        self.check_changeable()
        self.find(name)
        try:
            self.library.remove(name)
        except (AdapterError, FileNotFoundError) as error:
            if os.path.lexists(self.library.path / name):
                raise
            raise AdapterError(GONE.format(name)) from error  # another visitor was faster
        self._unload(name)
        return f"{name} was removed."

    def verify(self, name: str) -> str:
        """Compare an adapter with its manifest, byte by byte. Raises AdapterError with its problems."""

        def check(adapter: Adapter) -> str:
            if problems := verify_adapter(adapter):
                raise AdapterError(f"{name} is damaged: {'; '.join(problems)}.")
            if adapter.manifest is None:
                return (
                    f"{name}: all values of {WEIGHTS_FILE} are finite. It has no manifest, so there is no hash to "
                    "compare with."
                )
            return (
                f"{name} is intact: weights and settings match the hashes in its manifest, all values are finite."
            )

        return self.read(name, check)

    def why_no_push(self) -> str | None:
        """Return why nothing can be pushed to the Hub; None if it can."""
        from huggingface_hub import get_token

        return None if get_token() else NO_TOKEN

    def check_push(self, name: str, repo: str, private: bool) -> str:
        """Ask the Hub whether an adapter may be pushed, and send nothing. Returns owner and visibility."""
        result = self._push(name, repo, private, dry_run=True)
        size = format_bytes(sum(result.files.values()))
        checks = ". ".join(f"{key.capitalize()}: {text}" for key, text in result.checks.items())
        return f"{checks}. To be sent: {format_count(len(result.files), 'file')}, {size}, without paths of this machine."

    def push(self, name: str, repo: str, private: bool) -> str:
        """Push an adapter to the Hub, after the same checks. Returns its address there."""
        self._push(name, repo, private, dry_run=True)
        return f"{name} was pushed: {self._push(name, repo, private, dry_run=False).url}"

    def _push(self, name: str, repo: str, private: bool, *, dry_run: bool) -> hub_sync.TransferResult:
        self.check_allowed()
        if why := self.why_no_push():
            raise AdapterError(why)
        if not REPO.fullmatch(repo):
            raise AdapterError("Give the repo as OWNER/NAME, in letters, digits, '-', '_' and '.'.")
        if self.read(name, lambda adapter: adapter.manifest) is None:
            raise AdapterError(
                f"{name} has no manifest that ties it to its base: download it, and upload it here."
            )
        result = self.read(name, lambda adapter: hub_sync.push(adapter, repo, private=private, dry_run=dry_run))
        if "not checked" in result.checks:
            raise HubError(f"Not checked: {result.checks['not checked']}.")
        return result
