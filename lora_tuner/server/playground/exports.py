"""Exports of adapters for other programs: made by `export` as a process, kept for a day as downloads.

Each has a folder of its own, `runs_dir/.exports/ID`. Nothing that a visitor typed is an argument.
"""

import contextlib
import re
import secrets
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ... import atomic_io
from ...adapters.compatibility import Tool
from ...convert.model_check import WHOLE_MODELS, check_export
from ...errors import AdapterError
from ...text import format_bytes
from .commands import CommandRunner
from .library_actions import LibraryActions
from .uploads import KEPT_SECONDS, SPARE_BYTES

# Label -> tool, and the end of the file or folder.
FORMATS: dict[str, tuple[Tool, str]] = {
    "PEFT: transformers, and most others": ("peft", ""),
    "vLLM: an adapter": ("vllm", "-vllm"),
    "GGUF: an adapter for llama.cpp": ("gguf", ".gguf"),
    "GGUF: base and adapter as one model": ("gguf-merged", ".gguf"),
    "Ollama: base and adapter as one model": ("ollama", "-ollama"),
    "MLX: an adapter for mlx-lm": ("mlx", "-mlx"),
}
PRECISIONS = ("float16", "q8_0", "q4_k_m")  # of whole models
_ID = re.compile("[0-9a-f]{32}")
_EXPORT = re.compile(r" ?\(?`python cli\.py export [^`]*`\)?( writes it$)?")


@dataclass(frozen=True)
class Export:
    """An export that can be downloaded: the address on this server, and what is there."""

    href: str
    title: str


@dataclass(frozen=True)
class Exports:
    """The exports of a server."""

    actions: LibraryActions
    commands: CommandRunner

    @property
    def folder(self) -> Path:
        return self.actions.service.config.runs_dir / ".exports"

    def find(self, export: str) -> Path | None:
        """Return the file or folder of an export by its id; None if there is none."""
        folder = self.folder / export
        if not _ID.fullmatch(export) or not folder.is_dir():
            return None
        return next((path for path in folder.iterdir() if not path.name.startswith(".")), None)

    def verdict(self, name: str, label: str) -> tuple[list[str], list[str]]:
        """Return what stands against an export, and notes on it. Raises AdapterError."""
        tool, _ = _format(label)
        report = self.actions.read(name, lambda adapter: check_export(adapter, tool))
        notes = [_EXPORT.sub("", note) for note in report.notes]  # the page has a button for that
        return report.errors, [note for note in notes if note]

    async def export(self, name: str, label: str, precision: str) -> AsyncGenerator[str | Export, None]:
        """Yield the progress of an export, then the export. Closing the generator ends it.

        Raises:
            LoraTunerError: it is not possible, or has failed.
        """
        run = partial(self.actions.service.run_in_thread, "library")
        await run(self.actions.check_allowed)
        (tool, end), own = _format(label), Export(f"downloads/adapters/{name}.zip", f"{name}.zip")
        yield "Checking ..."
        errors, _ = await self.actions.service.run_in_thread("library-long", partial(self.verdict, name, label))
        if errors and tool != "vllm":  # whose export mends some of them
            raise AdapterError(f"{name}: {'; '.join(errors)}.")
        if tool == "peft" or (tool == "vllm" and not errors):
            yield own
            return
        if precision not in PRECISIONS:
            raise AdapterError("Choose a precision of the list.")
        source = (await run(partial(self.actions.find, name))).path
        assert source is not None
        number = secrets.token_hex(16)
        out = await run(partial(self._make_room, number, f"{name}{end}"))
        options = ["--to", tool.removesuffix("-merged"), "--out", str(out)]
        options += ["--merged"] if tool == "gguf-merged" else []
        if tool in WHOLE_MODELS and precision != PRECISIONS[0]:
            options += ["--quantize", precision]
        try:
            async with contextlib.aclosing(
                self.commands.run("export", str(source.absolute()), *options)
            ) as lines:
                async for line in lines:
                    if isinstance(line, str):
                        yield line
        except BaseException:
            atomic_io.delete(out.parent)
            raise
        size = await run(partial(_size, out))
        yield Export(
            f"downloads/exports/{number}", f"{out.name}{'.zip' if out.is_dir() else ''}, {format_bytes(size)}"
        )

    def _make_room(self, number: str, name: str) -> Path:
        """Remove old exports, and return the path of a new one."""
        folder = self.folder / number
        folder.mkdir(parents=True)
        for other in self.folder.iterdir():
            if time.time() - other.stat().st_mtime > KEPT_SECONDS:
                atomic_io.delete(other)
        if atomic_io.free_space(folder) < SPARE_BYTES:
            atomic_io.delete(folder)
            raise AdapterError("There is no room on the disk of the server for an export.")
        return folder.absolute() / name


def _format(label: str) -> tuple[Tool, str]:
    if label not in FORMATS:
        raise AdapterError("Choose a format of the list.")
    return FORMATS[label]


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
