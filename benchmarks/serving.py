"""The server under load: many clients and adapters at once, beside one request after another; then the same while adapters are
replaced, broken and removed on disk. Every text is compared with what its adapter writes alone."""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.inference.sequence import Sequence

from .adapters import make
from .measure import Figure, figure

CLIENTS, ADAPTERS, NEW_TOKENS, SECONDS, ALONE_SECONDS = 64, 8, 48, 120.0, 40.0
PROMPTS = ("This film is about a man who", "The acting", "I went to see it because", "What a waste of time: the plot")
GREEDY = SamplingParams(greedy=True, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
CLOSE = 1e-3  # between the two best logits; beyond such a place rounding may decide, alone and in a batch
CLI = Path(__file__).parents[1] / "cli.py"
Expected = dict[tuple[str, str], list[str]]  # (adapter, prompt) -> beginnings of what either version of it writes


def run(rounds: int) -> list[Figure]:
    """Takes some eight minutes, whatever `rounds` is."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for seed, version in enumerate(("first", "second")):
            make(root / version, ADAPTERS, seed)
        expected = _expected([root / "first", root / "second"])
        shutil.copytree(root / "first", root / "adapters")
        with _server(root / "adapters") as (url, process):
            asyncio.run(_load(url, 1, ALONE_SECONDS / 4, expected))
            alone = asyncio.run(_load(url, 1, ALONE_SECONDS, expected))
            with _memory(process) as memory:
                many = asyncio.run(_load(url, CLIENTS, SECONDS, expected))
            with _spoiled(root):
                spoiled = asyncio.run(_load(url, CLIENTS, SECONDS, expected))
            lives = process.is_running()
    return [
        figure("one request after another", alone.rate, "tokens/s", f"{alone.answers} answers"),
        figure(
            f"{CLIENTS} clients, {ADAPTERS} adapters",
            many.rate,
            "tokens/s",
            f"{many.rate / alone.rate:.2f} x one after another (must be 4)",
        ),
        figure("time to first token, median", statistics.median(many.first), "s"),
        figure(
            "time to first token, p95", _p95(many.first), "s", f"{CLIENTS} clients; alone {_p95(alone.first):.2f} s"
        ),
        figure("wrong texts", many.wrong, "", f"of {many.answers} answers; {many.said()}"),
        figure("memory at the end", memory[-1] / memory[len(memory) // 4], "", "of that after a quarter of the time"),
        figure(
            "wrong texts while adapters change",
            spoiled.wrong,
            "",
            f"of {spoiled.answers} answers; {spoiled.said()}; the server {'goes on' if lives else 'HAS ENDED'}",
        ),
    ]


@dataclass
class _Seen:
    seconds: float
    tokens: float = 0.0
    answers: int = 0
    wrong: int = 0
    first: list[float] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def said(self) -> str:
        return ", ".join(f"{count} x {what}" for what, count in sorted(self.refused.items())) or "nothing refused"


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def _expected(shelves: list[Path]) -> Expected:
    """What each adapter writes alone, up to the first place that rounding may decide; without those of which that leaves
    nothing, for any text would do."""
    found: Expected = {}
    for shelf in shelves:
        generator = Generator(adapters_dir=shelf, options=ModelOptions(base=EMBEDDED_BASE, dtype="float32"))
        for name in generator.library.names():
            for prompt in PROMPTS:
                row = Sequence(
                    generator.base,
                    generator.encode_prompt(prompt).token_ids,
                    GREEDY,
                    None,
                    *generator.get_or_load(name),
                    top_logprobs=2,
                )
                generator.engine.add([row])
                while generator.engine.sequences:
                    generator.engine.step()
                margins = [chance.top[0][1] - chance.top[1][1] for chance in row.logprobs]
                sure = next((place for place, margin in enumerate(margins) if margin < CLOSE), len(margins))
                text = row.detokenizer.text
                if sure < len(margins):
                    text = str(generator.base.tokenizer.decode(row.output_ids[:sure])).removesuffix("\ufffd")
                found.setdefault((name, prompt), []).append(text)
    return {asked: texts for asked, texts in found.items() if all(texts)}


@contextlib.contextmanager
def _server(adapters: Path) -> Iterator[tuple[str, psutil.Process]]:
    command: list[str | Path] = [
        sys.executable,
        CLI,
        "serve",
        "--base",
        EMBEDDED_BASE,
        "--dtype",
        "float32",
        "--port",
        "0",
    ]
    command += ["--adapters-dir", adapters, "--max-waiting", str(CLIENTS)]
    env = os.environ | {"PYTHONPATH": str(CLI.parent)}
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log, env=env) as server:
        try:
            while True:
                log.seek(0)
                if url := re.search(r"http://[\d.]+:\d+", log.read()):
                    break
                if server.poll() is not None:
                    raise RuntimeError(f"The server ended at once with status {server.returncode}.")
                time.sleep(0.2)
            yield url[0], psutil.Process(server.pid)
        finally:
            server.terminate()


async def _load(url: str, clients: int, seconds: float, expected: Expected) -> _Seen:
    """Clients that ask again as soon as they are answered."""
    seen, end = _Seen(seconds), time.monotonic() + seconds
    async with httpx.AsyncClient(
        base_url=url, timeout=seconds + 300, limits=httpx.Limits(max_connections=clients)
    ) as http:

        async def client(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() < end:
                model, prompt = draw.choice(list(expected))
                await _ask(http, model, prompt, expected, seen, end)

        await asyncio.gather(*(client(number) for number in range(clients)))
    return seen


async def _ask(http: httpx.AsyncClient, model: str, prompt: str, expected: Expected, seen: _Seen, end: float) -> None:
    body = {"model": model, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "stream": True}
    began, text, tokens, in_time, first = time.monotonic(), "", 0, 0, None
    async with http.stream(
        "POST", "/v1/completions", json=body | {"stream_options": {"include_usage": True}}
    ) as answer:
        if answer.status_code != 200:
            error = json.loads(await answer.aread())["error"]
            seen.refused[f"{answer.status_code} {error['code']}"] += 1
            await asyncio.sleep(min(float(answer.headers.get("retry-after", 0.2)), 1.0))
            return
        async for event in _events(answer):
            if "error" in event:
                seen.refused[f"in a stream: {event['error']['code']}"] += 1
                return
            if event["choices"]:
                text += event["choices"][0]["text"]
                first = first or time.monotonic() - began
                in_time = len(text) if time.monotonic() < end else in_time
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    seen.wrong += not any(text.startswith(sure) for sure in expected[model, prompt])
    seen.answers += 1
    seen.tokens += tokens * in_time / max(len(text), 1)  # of an answer on its way when time is up, what had come
    seen.first.append(first or time.monotonic() - began)


async def _events(answer: httpx.Response) -> AsyncIterator[Any]:
    async for line in answer.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def _beside(work: Callable[[], None], every: float) -> Iterator[None]:
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(every):
            work()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def _memory(process: psutil.Process) -> Iterator[list[int]]:
    found: list[int] = []
    with _beside(lambda: found.append(process.memory_info().rss), 1.0):
        yield found


@contextlib.contextmanager
def _spoiled(root: Path) -> Iterator[None]:
    """Now and then an adapter is replaced by its other version, cut off in the middle, or removed."""
    draw, number = random.Random(0), 0

    def spoil() -> None:
        nonlocal number
        number += 1
        target = root / "adapters" / draw.choice(sorted(path.name for path in (root / "first").iterdir()))
        new = root / "adapters" / f".new{number}"
        way = draw.choice(["replace", "replace", "break", "remove"])
        shutil.copytree(root / draw.choice(["first", "second"]) / target.name, new)
        if way == "break":
            weights = new / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1000])
        if target.exists():
            target.rename(root / f"old{number}")
        if way != "remove":
            new.rename(target)
        else:
            shutil.rmtree(new)

    with _beside(spoil, 0.5):
        yield
