import asyncio
import contextlib
import json
import logging
import os
import queue
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
from pydantic import ValidationError
from uvicorn.server import ServerState

import lora_tuner.server
from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.adapters.library import Library
from lora_tuner.config import ServerConfig
from lora_tuner.errors import ConfigError, Notice
from lora_tuner.server import runner as module
from lora_tuner.server.runner import serve

from .. import api_server, tiny_models
from ..api_server import PROMPT, greedy, write_adapter
from ..cli.test_commands import run

ROOT = Path(__file__).parents[2]
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}


@pytest.fixture
def adapters_dir(gpt2, tmp_path):
    write_adapter(tmp_path / "adapters", "a", gpt2, 1)
    return tmp_path / "adapters"


# The address

NO_ORIGIN = (
    "is no origin as browsers send it. Give SCHEME://HOST or SCHEME://HOST:PORT in lower case, "
    "without a path or the scheme's default port, or *\n"
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--host", "0.0.0.0"],
            "Error: --host 0.0.0.0 can be reached from other machines: set --api-key or LORA_TUNER_API_KEY.\n",
        ),
        (["--host", "::"], "Error: --host :: can be reached from other machines: set --api-key or LORA_TUNER_API_KEY.\n"),
        (["--host", "example.org"], "Error: --host example.org can be reached from other machines: set"),
        (["--api-key", "short"], "Error: api_key: string should have at least 8 characters\n"),
        (["--api-key", "with a space"], "Error: --api-key: use printable ASCII characters without spaces"),
        (["--port", "70000"], "Error: port: input should be less than or equal to 65535"),
        (["--adapter", "nothing"], "Error: There is no adapter 'nothing'"),
        (["--adapter", "a", "--adapter", "adapters/a"], "Error: Two of these adapters have the name a"),
        (["--host", "127.0.0.1", "--base", "nothing"], "Error: "),
        (["--allow-origin", "http://localhost:3000/"], f"Error: allow_origin: http://localhost:3000/ {NO_ORIGIN}"),
    ],
)  # fmt: skip
def test_invalid_options_give_one_line(adapters_dir, arguments, message):
    port = [] if "--port" in arguments else ["--port", 0]
    result = run("serve", *port, *arguments, exit_code=1)
    assert result.stderr.splitlines(keepends=True)[-1].startswith(message)


@pytest.mark.parametrize(
    "origin",
    ["*", "http://localhost:3000", "https://chat.example", "http://127.0.0.1:8080", "http://[::1]:3000",
     "app://obsidian.md", "lsp://logseq.io", "chrome-extension://klickieipjdmihlbbhikjoipddogidjo"],
)  # fmt: skip
def test_origin_of_browser_is_taken(origin):
    assert ServerConfig(allow_origin=[origin]).allow_origin == [origin]


@pytest.mark.parametrize(
    "origin",
    ["null", "localhost:3000", "chat.example", "https://chat.example/", "https://chat.example/page", "https://Chat.example",
     "HTTPS://chat.example", "https://chat.example:443", "http://localhost:80", "https://*.example", "https://a@b.example",
     "https://chät.example", "https://chat.example:", "http://a\nb", "https://chat.example, https://b.example"],
)  # fmt: skip
def test_text_that_is_no_origin_is_refused(origin):
    with pytest.raises(ValidationError, match="is no origin as browsers send it"):
        ServerConfig(allow_origin=["https://chat.example", origin])


def test_port_in_use_gives_one_line(gpt2, adapters_dir):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = run("serve", "--port", port, "--base", gpt2, exit_code=1).stderr
    expected = f"Error: Cannot listen on 127.0.0.1, port {port}: Address already in use. "
    expected += "Use another --port, or 0 for any free one."
    assert line.startswith(expected)


def test_api_key_comes_from_environment(adapters_dir, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_API_KEY", "")
    assert "api_key: it is empty" in run("serve", exit_code=1).stderr
    monkeypatch.setenv("LORA_TUNER_API_KEY", "secret")
    assert "secret" not in run("serve", exit_code=1).stderr
    keys = []
    monkeypatch.setattr(module, "serve", lambda adapters, settings, **_: keys.append(settings.api_key))
    monkeypatch.setenv("LORA_TUNER_API_KEY", "from-the-environment")
    run("serve")
    run("serve", "--api-key", "from-the-line")
    assert keys == ["from-the-environment", "from-the-line"]


def test_missing_serve_extra_is_named(monkeypatch):
    monkeypatch.delattr(lora_tuner.server, "runner")
    monkeypatch.setitem(sys.modules, "lora_tuner.server.runner", None)
    with pytest.raises(ModuleNotFoundError):  # of this package, so it is not the extra
        run("serve")
    monkeypatch.delitem(sys.modules, "lora_tuner.server.runner")
    error = "Error: serve needs FastAPI, uvicorn and Gradio: run `pip install 'lora_tuner[serve]'`.\n"
    for package in ("gradio", "uvicorn"):
        with monkeypatch.context() as patch:
            for name in ("playground.app", "playground.page", "runner"):
                patch.delitem(sys.modules, f"lora_tuner.server.{name}", raising=False)
            patch.delattr(lora_tuner.server, "runner", raising=False)
            patch.setitem(sys.modules, package, None)
            assert run("serve", exit_code=1).stderr == error


# Startup


@pytest.fixture
def started(monkeypatch):
    """Run `serve` until it would listen. Return its service and notices."""
    services, events = [], []

    class Stopped(module._Server):
        def run(self, sockets):
            services.append(self.service)
            self.on_listening()

    monkeypatch.setattr(module, "_Server", Stopped)
    monkeypatch.setattr(module, "_configure_logging", lambda: None)
    page = SimpleNamespace(mount=lambda app, service, key: app)
    monkeypatch.setitem(sys.modules, "lora_tuner.server.playground.app", page)

    def start(adapters=(), settings={}, adapters_dir=Path("adapters"), **options):  # noqa: B006 - it is only read
        events.clear()
        chosen = ModelOptions(**{"device": "cpu", "notify": events.append} | options)
        serve(adapters, ServerConfig(port=0, **settings), options=chosen, adapters_dir=adapters_dir)
        return services[-1], [event.text for event in events if isinstance(event, Notice)]

    return start


def test_any_origin_without_key_gives_notice(adapters_dir, started):
    notice = "--allow-origin * without --api-key: any web page that is open on this machine can use the models."
    assert notice in started(settings={"allow_origin": ["*"]})[1]
    assert notice not in started(settings={"allow_origin": ["*"], "api_key": "12345678"})[1]
    assert notice not in started(settings={"allow_origin": ["https://chat.example"]})[1]


def test_base_defaults_to_most_common(gpt2, llama, adapters_dir, started):
    write_adapter(adapters_dir, "b", gpt2, 2)
    write_adapter(adapters_dir, "odd", llama, 3)
    (adapters_dir / "broken").mkdir()
    service, notices = started(adapters_dir=adapters_dir)
    assert notices[0] == (
        f"Using base {gpt2}, which 2 of 3 adapters in {adapters_dir} were trained on; the others are not served. "
        "Use --base to select another."
    )
    assert re.fullmatch(
        r"Listening on (http://127.0.0.1:\d+): base gpt2 and 2 adapters. OpenAI-compatible API: \1/v1",
        notices[1],
    )
    assert [model.id for model in service.list_models() if model.broken] == ["broken", "odd"]
    service, notices = started(adapters_dir=adapters_dir, base=str(llama))
    assert [model.id for model in service.list_models() if model.broken] == [
        "a",
        "b",
        "broken",
        "odd",
    ]  # odd has other layers
    assert len(notices) == 1


def test_named_adapters_are_served_alone(gpt2, adapters_dir, started, tmp_path):
    write_adapter(adapters_dir, "b", gpt2, 2)
    write_adapter(tmp_path / "elsewhere", "c", gpt2, 3)
    service, notices = started(["b", tmp_path / "elsewhere" / "c"], adapters_dir=adapters_dir)
    assert [model.id for model in service.list_models()] == ["gpt2", "b", "c"]
    assert "base gpt2 and 2 adapters" in notices[-1]
    assert service.generator.loaded_adapters == ["b", "c"]
    assert service.generator.current_adapter is None  # the adapter in use never leaves memory


def test_empty_library_keeps_default_base(tmp_path):
    assert module._with_most_common_base(Library(tmp_path / "none"), options := ModelOptions()) == options


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("localhost", "localhost"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", r"\[::1\]"),
    ],
)
def test_browser_opens_reachable_url(gpt2, adapters_dir, started, monkeypatch, host, name):
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    opened = queue.Queue()
    monkeypatch.setattr(module.webbrowser, "open", lambda url: opened.put(url) or True)
    result = run("serve", "--open", "--host", host, "--port", 0, "--base", gpt2, "--api-key", "12345678")
    url = opened.get(timeout=5)
    assert re.fullmatch(rf"http://{name}:[1-9]\d*", url)
    assert f"Listening on {url}: " in result.stderr


def test_missing_browser_is_reported(gpt2, adapters_dir, started, monkeypatch):
    monkeypatch.setattr(module.webbrowser, "open", lambda url: False)
    notices = queue.Queue()
    serve(
        [],
        ServerConfig(port=0),
        adapters_dir=adapters_dir,
        browse=True,
        options=ModelOptions(device="cpu", notify=lambda event: notices.put(event.text)),
    )
    while not (line := notices.get(timeout=5)).startswith("No browser"):
        pass
    assert re.fullmatch(r"No browser found: open http://127.0.0.1:\d+ yourself.", line)


# Connections

PARTIAL_BODY = b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nuser"


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET /health HT", PARTIAL_BODY, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"],
    ids=["nothing", "partial header", "partial body", "whole request"],
)
def test_waiting_connections_leave_room(gpt2, adapters_dir, sent):
    with (
        api_server.serving(gpt2, adapters_dir, max_connections=8) as served,
        contextlib.ExitStack() as stack,
    ):
        sockets = []
        for _ in range(40):
            sockets.append(stack.enter_context(socket.create_connection(("127.0.0.1", served.port), timeout=5)))
            sockets[-1].sendall(sent)
        assert served.get("/health").status_code == 200
        assert served.post("/v1/completions", model="a", **GREEDY).status_code == 200
        served.wait(lambda: len(served.server.server_state.connections) <= 8)


def test_only_busy_connections_give_503(gpt2, adapters_dir):
    with api_server.serving(gpt2, adapters_dir, max_connections=4) as served, served.held_steps() as release:
        with ThreadPoolExecutor() as pool:
            answers = [pool.submit(served.post, "/v1/completions", model="a", **GREEDY) for _ in range(3)]
            served.wait(lambda: served.scheduler.waiting + served.scheduler.running == 3)
            assert served.get("/health").status_code == 200  # the fourth
            answers.append(pool.submit(served.post, "/v1/completions", model="a", **GREEDY))
            served.wait(lambda: served.scheduler.waiting + served.scheduler.running == 4)
            assert served.get("/health").status_code == 503
            release(1000)
            assert [answer.result().status_code for answer in answers] == [200] * 4
        assert served.get("/health").status_code == 200


class Transport(asyncio.Transport):
    """Takes what is written, as if the client read it later or never."""

    def __init__(self):
        super().__init__()
        self.unread, self.aborted = 0, False

    def write(self, data):
        self.unread += len(data)

    def get_write_buffer_size(self):
        return self.unread

    def set_write_buffer_limits(self, high=None, low=None):
        pass

    def is_closing(self):
        return self.aborted

    def abort(self):
        self.aborted = True

    close = abort


def test_stalled_connection_is_closed(monkeypatch):
    """By a clock of its own."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 100, "more_body": True})
        await asyncio.Event().wait()

    async def waited(sent, seconds, change=lambda connection: None):
        config = uvicorn.Config(app, limit_concurrency=4, log_config=None)
        connection = module._Connection(config, ServerState(), {})
        now = [0.0]
        monkeypatch.setattr(connection.loop, "time", lambda: now[0])
        connection.connection_made(Transport())
        if sent:
            connection.data_received(sent)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        for _ in range(seconds):
            now[0] += 1
            change(connection)
            connection.check_progress()
        if connection.cycle is not None:
            for task in connection.tasks:
                task.cancel()
        return connection.transport.aborted

    def trickle(connection):
        connection.data_received(b"x: y\r\n")

    def read_some(connection):
        connection.transport.unread -= 1

    def read_all(connection):
        connection.transport.unread = 0

    request = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    assert asyncio.run(waited(b"", 29)) is False
    assert asyncio.run(waited(b"", 32)) is True
    assert asyncio.run(waited(request, 32, trickle)) is True
    assert asyncio.run(waited(request + b"\r\n", 32)) is True  # nothing is read
    assert asyncio.run(waited(request + b"\r\n", 90, read_some)) is False
    assert asyncio.run(waited(request + b"\r\n", 90, read_all)) is False  # it waits for the model


def test_open_files_limit_connections(monkeypatch):
    notices = []
    monkeypatch.setattr(module.psutil.Process, "num_fds", lambda self: 30)

    def fit(limit):
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
        return module._fit_connections(ServerConfig(), lambda event: notices.append(event.text)).max_connections

    assert fit(1024) == fit(resource.RLIM_INFINITY) == 400
    assert notices == []
    assert fit(110) == 16
    assert notices == [
        "A process may open 110 files here, so at most 16 connections are open at once, not 400: for more, use `ulimit -n 878`."
    ]
    with pytest.raises(ConfigError, match=r"A process may open 80 files here, too few .* `ulimit -n 878`\."):
        fit(80)


@pytest.mark.slow
def test_idle_strangers_stop_nobody(gpt2):
    """120 connections against 110 open files."""
    process = Process("--base", gpt2, files=110, LORA_TUNER_API_KEY="12345678")
    try:
        address = process.url.removeprefix("http://").split(":")
        with contextlib.ExitStack() as stack:
            for _ in range(120):
                stack.enter_context(socket.create_connection((address[0], int(address[1])), timeout=10))
            client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="12345678", max_retries=0, timeout=20)
            for _ in range(5):
                assert client.completions.create(model="gpt2", **GREEDY).usage.completion_tokens == 20
                time.sleep(0.5)
        assert len(process.lines) < 20
    finally:
        process.process.kill()


# Shutdown


def test_sigterm_finishes_running_and_rejects_new(gpt2, adapters_dir):
    with api_server.serving(gpt2, adapters_dir) as served, served.held_steps() as release:
        client = served.client()
        release(3)
        stream = client.completions.create(model="a", stream=True, **GREEDY)
        text = next(iter(stream)).choices[0].text
        served.server.handle_exit(signal.SIGTERM, None)
        served.wait(lambda: not served.scheduler.accepting)
        with pytest.raises(openai.InternalServerError) as rejected:
            client.completions.create(model="a", **GREEDY)
        assert (rejected.value.status_code, rejected.value.code) == (503, "stopping")
        assert int(rejected.value.response.headers["retry-after"]) > 0
        health = served.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "stopping")
        release(1000)
        assert text + "".join(chunk.choices[0].text for chunk in stream) == greedy(gpt2, adapters_dir, "a").text
    assert not served.server.interrupted


def test_second_signal_cuts_off_stream(gpt2, adapters_dir):
    with api_server.serving(gpt2, adapters_dir) as served, served.held_steps() as release:
        release(3)
        stream = served.client().completions.create(model="a", stream=True, **GREEDY)
        next(iter(stream))
        served.server.handle_exit(signal.SIGTERM, None)
        served.wait(lambda: not served.scheduler.accepting)
        served.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    assert served.server.interrupted


def test_endless_connection_does_not_delay_shutdown(gpt2, adapters_dir):
    """Pages of the playground keep such a connection."""
    with api_server.serving(gpt2, adapters_dir) as served:

        async def forever(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"data", "more_body": True})
            while (await receive())["type"] != "http.disconnect":
                pass

        served.app.mount("/page", forever)
        with httpx.stream("GET", f"{served.url}/page/events") as response:
            data = response.iter_raw()
            assert next(data) == b"data"
            begun = time.monotonic()
            served.server.handle_exit(signal.SIGTERM, None)
            with pytest.raises(httpx.RemoteProtocolError):
                next(data)
        assert time.monotonic() - begun < 4


# The command


class Process:
    """Runs `cli.py serve`, and waits until it listens at `url`."""

    def __init__(self, *arguments, files=None, **env):
        limit = ["bash", "-c", f'ulimit -n {files} && exec "$@"', "bash"] if files else []
        command = [
            sys.executable,
            ROOT / "cli.py",
            "serve",
            "--port",
            "0",
            "--device",
            "cpu",
            *map(str, arguments),
        ]
        env = os.environ | {"OMP_NUM_THREADS": "1"} | env  # one thread says nothing of a busy machine
        self.process = subprocess.Popen(
            limit + command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
        )
        self.lines = []
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        end = time.monotonic() + 60
        while not (match := re.search(r"Listening on (\S+):", "".join(self.lines))):
            assert time.monotonic() < end
            assert self.process.poll() is None, self.lines
            time.sleep(0.02)
        self.url = match[1]

    def wait(self):
        return self.process.wait(30)


def test_log_has_warnings_but_no_advice(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)
    for name in module.MODEL_LIBRARIES:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)
    module._configure_logging()
    for name in (*module.MODEL_LIBRARIES, "asyncio"):
        logging.getLogger(f"{name}.any").warning("We recommend it")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "We recommend it"


@pytest.fixture
def long_base(tmp_path):
    """A base that generates for seconds."""
    return tiny_models.save_model(tmp_path / "long", "gpt2", width=192, layers=6, context=2048)


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGHUP, signal.SIGHUP]])
def test_serve_command_completes_stream_on_signal(long_base, signals):
    process = Process("--base", long_base, LORA_TUNER_API_KEY="12345678")
    try:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0).models.list()
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="12345678", max_retries=0)
        body = {"model": "long", "prompt": PROMPT, "temperature": 0, "max_tokens": 150}
        stream = client.completions.create(stream=True, **body)
        chunks = [next(iter(stream))]
        for number in signals:
            process.process.send_signal(number)
        chunks += list(stream)
        assert process.wait() == 0
    finally:
        process.process.kill()
    expected = Generator(options=ModelOptions(base=str(long_base), device="cpu")).generate(
        PROMPT, SamplingParams(temperature=0, max_new_tokens=150, repetition_penalty=1.0)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert process.process.stdout.read() == ""
    lines = [json.loads(line) for line in process.lines if line.startswith("{")]
    assert [(line["path"], line["status"]) for line in lines] == [
        ("/v1/models", 401),
        ("/v1/completions", 200),
    ]
    assert [line for line in process.lines if not line.startswith("{")] == [
        f"Listening on {process.url}: base long and 0 adapters. OpenAI-compatible API: {process.url}/v1\n"
    ]


@pytest.mark.slow
def test_serve_command_exits_130_on_second_sigterm(long_base):
    process = Process("--base", long_base)
    try:
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(
            model="long", prompt=PROMPT, temperature=0, max_tokens=2000, stream=True
        )
        next(iter(stream))
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.process.send_signal(signal.SIGTERM)
        assert process.wait() == 130
    finally:
        process.process.kill()
    assert "Stopped at once: running requests were cut off.\n" in process.lines
