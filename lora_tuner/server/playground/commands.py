"""Commands of the command line as processes of their own, so that bad data cannot hurt the server.

Their settings come from a file: nothing that a visitor typed is an argument.
"""

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...config import TrainConfig
from ...errors import LoraTunerError
from ...training.jobs import command_line

Json = dict[str, Any]
SETTINGS_FILE = "settings.yaml"
FRAME_SECONDS = 0.2  # between two looks at the progress
END_SECONDS = 5.0  # to end after SIGTERM
_MAX_LINE = 500


@dataclass
class CommandRunner:
    """Runs commands one after another, as each takes a core and the memory of a base.

    One with settings is given their folder, and may write there.
    """

    _free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))

    async def run(
        self, *arguments: str, config: TrainConfig | None = None, folder: Path | None = None
    ) -> AsyncGenerator[str | Json, None]:
        """Yield the last line of progress whenever it has changed, then the result.

        Closing the generator ends the command.

        Raises:
            LoraTunerError: the command has failed; its message.
        """
        if config is not None and folder is not None:
            values = config.model_dump(mode="json", exclude_none=True, exclude_unset=True)
            file = folder / SETTINGS_FILE
            file.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
            arguments += ("--config", str(file))
        if self._free.locked():
            yield "Waiting for what another visitor has started ..."
        async with self._free:
            yield "Starting ..."
            process = await asyncio.create_subprocess_exec(
                *command_line(*arguments, "--json"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            assert process.stdout is not None
            lines = _LastLine()
            output = asyncio.create_task(process.stdout.read())
            reading = asyncio.create_task(lines.read(process.stderr))
            try:
                shown = ""
                while not (output.done() and reading.done()):
                    await asyncio.wait([output, reading], timeout=FRAME_SECONDS)
                    if lines.text and lines.text != shown:
                        shown = lines.text
                        yield shown
                status = await process.wait()
            finally:
                reading.cancel()
                output.cancel()
                await _end(process)
        if status:
            raise LoraTunerError(lines.text.removeprefix("Error: ") or f"It ended with status {status}.")
        result: Json = json.loads(await output)
        yield result


@dataclass
class _LastLine:
    """The last line of a stream that is not blank."""

    text: str = ""

    async def read(self, stream: asyncio.StreamReader | None) -> None:
        assert stream is not None
        rest = b""
        while part := await stream.read(65_536):
            *whole, rest = (rest + part).replace(b"\r", b"\n").split(b"\n")
            for line in [*whole, rest]:
                if text := line.decode(errors="replace").strip():
                    self.text = text[:_MAX_LINE]
            rest = rest[:_MAX_LINE]


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process that still runs."""
    for send in (process.terminate, process.kill):
        if process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            send()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_SECONDS)


def temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="lora_tuner-", ignore_cleanup_errors=True)
