"""Resolve the name of a base model to files on this machine, downloading them where needed.

A repo or folder that is no causal language model is refused by its config.json and the names of its
files, before weights are downloaded or read (`unsupported`). Nothing here imports torch on import.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from .. import atomic_io, hub
from ..adapters.adapter import CONFIG_FILE, MANIFEST_FILE, Adapter
from ..config import DEFAULT_BASE, EMBEDDED_BASE
from ..errors import BaseModelError, EventHandler, HubError, Notice, ignore_events
from . import embedded, gguf_base, stored_weights, unsupported
from .base_files import LOCAL_FOLDER, BaseModelFiles

HUB_NAMES = {DEFAULT_BASE: "distilbert/distilgpt2", EMBEDDED_BASE: embedded.EMBEDDED_REPO}


def find_base(
    name: str | None, revision: str | None = None, notify: EventHandler = ignore_events
) -> BaseModelFiles:
    """Resolve a name to files on this machine, downloading them from the Hub where needed.

    Args:
        name: a local folder, a Hub id or a named base. None means the default base, and only then
            may the embedded base take its place, with a notice.
        revision: branch, tag or commit on the Hub.

    Raises:
        BaseModelError: the files are not a usable model.
        HubError: the model is not on this machine and cannot be downloaded.
    """
    resolved_name = name or DEFAULT_BASE
    if name is not None and os.path.isdir(os.path.expanduser(name)):
        _refuse_revision(name, revision)
        local_folder = Path(os.path.expanduser(name))
        _check_folder(local_folder, f"The folder {name}")
        _notify_ignored_adapter(name, local_folder, notify)
        return BaseModelFiles(name, name, local_folder, None, LOCAL_FOLDER, notify)
    if gguf_base.is_gguf_name(resolved_name):
        _refuse_revision(resolved_name, revision)
        return gguf_base.open_gguf(resolved_name, notify)
    if name is not None and os.path.isfile(os.path.expanduser(name)):
        raise BaseModelError(f"{name} is a file: name the folder of a model, or a GGUF file (.gguf).")
    if resolved_name.startswith((".", "/", "~")):
        raise BaseModelError(f"There is no folder {name}.")
    if resolved_name == EMBEDDED_BASE:
        _refuse_revision(EMBEDDED_BASE, revision)
        return embedded.open_embedded(notify)
    repo = HUB_NAMES.get(resolved_name, resolved_name)
    folder = hub.cached_snapshot(repo, revision)
    if folder is None or not _is_complete(folder):  # not downloaded yet, or only partly
        try:
            folder = _download(repo, revision, notify)
        except HubError as error:
            if name is None and revision is None:
                return _fall_back_to_embedded(error, notify)
            if hub.why_unreachable():
                raise HubError(
                    f"{error} `doctor` lists the bases available without the Hub; a local folder works too."
                ) from error
            raise
    _check_folder(folder, repo)
    _notify_ignored_adapter(repo, folder, notify)
    return BaseModelFiles(resolved_name, repo, folder, folder.name, f"{repo} on the Hub", notify)


def _download(repo: str, revision: str | None, notify: EventHandler) -> Path:
    """Download a base, once its config.json and the names of its files say that it is one."""
    _, sizes = hub.list_repo_files(repo, revision, needed="is not cached")
    config = None
    if "config.json" in sizes:
        config = _read_config(hub.download_files(repo, revision, ["config.json"]))
    problem = unsupported.why_unsupported(sizes, config)
    if problem is None and config is not None:
        problem = unsupported.why_quantized(config) or unsupported.why_unknown_type(config)
    if problem:
        raise BaseModelError(
            f"{repo} is not a model for this tool: {problem}. Nothing else of it was downloaded."
        )
    notify(Notice(f"Downloading the base {repo} from the Hub."))
    return hub.download_model(repo, revision)


def find_adapter_base(
    adapter: Adapter, revision: str | None = None, notify: EventHandler = ignore_events
) -> BaseModelFiles:
    """`find_base` for the base that an adapter names; the errors say where that name comes from."""
    is_local = adapter.manifest is not None and adapter.manifest.base.weights == LOCAL_FOLDER
    try:
        if is_local and not os.path.isdir(os.path.expanduser(adapter.base)):
            raise BaseModelError("it was a local folder, which is not there. It is not looked for on the Hub.")
        return find_base(adapter.base or None, revision or adapter.revision, notify)
    except (BaseModelError, HubError) as error:
        if not adapter.base or (revision and os.path.isdir(os.path.expanduser(adapter.base))):
            raise  # it names none, or the revision is wrong
        source = MANIFEST_FILE if adapter.manifest else CONFIG_FILE
        raise type(error)(
            f"{adapter.name} was trained on the base {adapter.base} (named in its {source}), "
            f"which cannot be used here: {error} Name a copy of it with --base."
        ) from error


def available_bases() -> list[str]:
    """Named bases and converted GGUF files that can be used without a download."""
    folder = hub.cached_snapshot(HUB_NAMES[DEFAULT_BASE], None)
    names = [DEFAULT_BASE] if folder and _is_complete(folder) else []
    if embedded.is_available():
        names.append(EMBEDDED_BASE)
    return names + gguf_base.converted_files()


def _fall_back_to_embedded(hub_error: HubError, notify: EventHandler) -> BaseModelFiles:
    """Use the embedded base instead of the default one, with a notice: a short one but for the first time."""
    try:
        is_first = not any((atomic_io.cache_dir() / "bases").glob(f"{EMBEDDED_BASE}-*"))
        files = embedded.open_embedded(notify)
    except BaseModelError as error:
        raise HubError(f"{hub_error} {error}") from error
    reason = hub.why_unreachable()
    if is_first or reason is None:
        text = f"Using base {EMBEDDED_BASE} instead of {DEFAULT_BASE}: {hub_error} Choose one with --base."
    else:
        text = f"Using base {EMBEDDED_BASE}: {reason}."
    notify(Notice(text))
    return files


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise BaseModelError(
            f"{name} is not on the Hub, so it has no revision '{revision}': leave --revision out."
        )


def _notify_ignored_adapter(name: str, folder: Path, notify: EventHandler) -> None:
    """Say that adapter files beside a base are left alone; transformers would apply them."""
    if (folder / CONFIG_FILE).is_file():
        notify(Notice(f"The adapter files in the base {name} are ignored: --adapter or --from names an adapter."))


def _file_names(folder: Path) -> set[str]:
    """Files of a folder and of the folders in it, as a repo on the Hub lists them."""
    return {path.relative_to(folder).as_posix() for path in (*folder.glob("*"), *folder.glob("*/*"))}


def _read_config(folder: Path) -> dict[str, object] | None:
    """Content of config.json; None without the file. Raises BaseModelError for other than an object."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BaseModelError(f"{path} is not readable as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise BaseModelError(f"{path}: it is not a JSON object.")
    return config


def _check_folder(folder: Path, what: str) -> None:
    """Raise BaseModelError unless a folder is a causal language model, as far as names tell."""
    if problem := unsupported.why_unsupported(_file_names(folder), _read_config(folder)):
        raise BaseModelError(f"{what} is not a model: {problem}.")
    if missing := _missing_weights(folder):
        raise BaseModelError(f"{what} is not a model: it has no {missing}.")


def _is_complete(folder: Path) -> bool:
    names = _file_names(folder)
    has_tokenizer = not names.isdisjoint(unsupported.TOKENIZER_FILES)
    return "config.json" in names and has_tokenizer and _missing_weights(folder) is None


def _missing_weights(folder: Path) -> str | None:
    """Name of the first weight file that a folder lacks, or None when it has all."""
    try:
        files = stored_weights.weight_files(folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"readable {stored_weights.WEIGHTS_INDEX}"
    return next((file.name for file in files if not file.is_file()), None) if files else "safetensors weights"
