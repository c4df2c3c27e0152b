import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from lora_tuner import Generator, ModelOptions, SamplingParams
from lora_tuner.adapters.library import Library
from lora_tuner.config import ServerConfig
from lora_tuner.errors import Notice
from lora_tuner.server import runner as module
from lora_tuner.server.runner import serve

from .. import api_server, tiny_models
from ..api_server import PROMPT, greedy, write_adapter
from ..cli.test_commands import run

ROOT = Path(__file__).parents[2]
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 20}


@pytest.fixture
def shelf(gpt2, tmp_path):
    write_adapter(tmp_path / "adapters", "a", gpt2, 1)
    return tmp_path / "adapters"


# The address


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "Error: --host 0.0.0.0: others can reach it there, so it needs --api-key, or"),
        (["--host", "::"], "Error: --host ::: others can reach it there, so it needs --api-key, or LORA_TUNER_API_KEY."),
        (["--host", "example.org"], "Error: --host example.org: others can reach it there"),
        (["--api-key", "short"], "Error: api_key: string should have at least 8 characters\n"),
        (["--api-key", "with a space"], "Error: --api-key: it is sent in a header"),
        (["--port", "70000"], "Error: port: input should be less than or equal to 65535"),
        (["--adapter", "nothing"], "Error: There is no adapter 'nothing'"),
        (["--adapter", "a", "--adapter", "adapters/a"], "Error: Two of these adapters are called a"),
        (["--host", "127.0.0.1", "--base", "nothing"], "Error: "),
    ],
)  # fmt: skip
def test_what_cannot_be_served_gets_a_line(shelf, arguments, message):
    port = [] if "--port" in arguments else ["--port", 0]
    result = run("serve", *port, *arguments, exit_code=1)
    assert result.stderr.splitlines(keepends=True)[-1].startswith(message)


def test_a_port_that_is_taken_gets_a_line(gpt2, shelf):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = run("serve", "--port", port, "--base", gpt2, exit_code=1).stderr
    expected = (
        f"Error: 127.0.0.1, port {port}, is not to be had: Address already in use. Choose another --port, or 0 for any"
    )
    assert line.startswith(expected)


def test_the_key_can_come_from_the_environment(shelf, monkeypatch):
    monkeypatch.setenv("LORA_TUNER_API_KEY", "")
    assert "api_key: it is empty" in run("serve", exit_code=1).stderr
    monkeypatch.setenv("LORA_TUNER_API_KEY", "secret")
    assert "secret" not in run("serve", exit_code=1).stderr
    given = []
    monkeypatch.setattr(module, "serve", lambda adapters, settings, **_: given.append(settings.api_key))
    monkeypatch.setenv("LORA_TUNER_API_KEY", "from-the-environment")
    run("serve")
    run("serve", "--api-key", "from-the-line")
    assert given == ["from-the-environment", "from-the-line"]


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lora_tuner.server.runner", None)
    with pytest.raises(ModuleNotFoundError):  # ours, so it is not the extra
        run("serve")
    monkeypatch.delitem(sys.modules, "lora_tuner.server.runner")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    error = "Error: serve needs FastAPI, uvicorn and Gradio: `pip install -e '.[serve]'` gets them.\n"
    assert run("serve", exit_code=1).stderr == error


# From settings to a server


@pytest.fixture
def started(monkeypatch):
    """`serve` up to where it listens: what it says, and the desk that it has set up."""
    desks, said = [], []

    class Stopped(module._Server):
        def run(self, sockets):
            desks.append(self.desk)
            self.listening()

    monkeypatch.setattr(module, "_Server", Stopped)
    monkeypatch.setattr(module, "_configure_logging", lambda: None)
    monkeypatch.setattr(module, "mount", lambda app, desk, key: app)

    def start(adapters=(), settings={}, adapters_dir=Path("adapters"), **options):  # noqa: B006 - it is only read
        said.clear()
        chosen = ModelOptions(**{"device": "cpu", "notify": said.append} | options)
        serve(adapters, ServerConfig(port=0, **settings), options=chosen, adapters_dir=adapters_dir)
        return desks[-1], [event.text for event in said if isinstance(event, Notice)]

    return start


def test_the_base_is_the_one_that_most_adapters_name(gpt2, llama, shelf, started):
    write_adapter(shelf, "b", gpt2, 2)
    write_adapter(shelf, "odd", llama, 3)
    (shelf / "broken").mkdir()
    desk, said = started(adapters_dir=shelf)
    assert (
        said[0]
        == f"The base is {gpt2}, as 2 of 3 adapters in {shelf} name it; 1 are not served. --base chooses another."
    )
    assert re.fullmatch(
        r"Listening on (http://127.0.0.1:\d+): the base gpt2 and 2 adapters. \1/v1 is for OpenAI's clients.", said[1]
    )
    assert [it.id for it in desk.models() if it.broken] == ["broken", "odd"]
    desk, said = started(adapters_dir=shelf, base=str(llama))
    assert [it.id for it in desk.models() if it.broken] == ["a", "b", "broken", "odd"]  # odd has layers of another kind
    assert len(said) == 1


def test_the_adapters_that_are_named_alone_on_the_base_of_the_first(gpt2, shelf, started, tmp_path):
    write_adapter(shelf, "b", gpt2, 2)
    write_adapter(tmp_path / "elsewhere", "c", gpt2, 3)
    desk, said = started(["b", tmp_path / "elsewhere" / "c"], adapters_dir=shelf)
    assert [it.id for it in desk.models()] == ["gpt2", "b", "c"]
    assert "the base gpt2 and 2 adapters" in said[-1]
    assert desk.generator.loaded == ["b", "c"]
    assert desk.generator.current is None  # so that either may leave memory


def test_a_library_without_adapters_leaves_the_default_base(tmp_path):
    assert module._most_common_base(Library(tmp_path / "none"), None, print) == (None, None)


@pytest.mark.parametrize(
    ("host", "name"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("0.0.0.0", "127.0.0.1"), ("::", r"\[::1\]")],
)
def test_a_browser_opens_where_it_finds_the_page(gpt2, shelf, started, monkeypatch, host, name):
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    opened = queue.Queue()
    monkeypatch.setattr(module.webbrowser, "open", lambda url: opened.put(url) or True)
    result = run("serve", "--open", "--host", host, "--port", 0, "--base", gpt2, "--api-key", "12345678")
    url = opened.get(timeout=5)
    assert re.fullmatch(rf"http://{name}:[1-9]\d*", url)
    assert f"Listening on {url}: " in result.stderr


def test_where_there_is_no_browser_it_says_so(gpt2, shelf, started, monkeypatch):
    monkeypatch.setattr(module.webbrowser, "open", lambda url: False)
    said = queue.Queue()
    serve(
        [],
        ServerConfig(port=0),
        adapters_dir=shelf,
        browse=True,
        options=ModelOptions(device="cpu", notify=lambda it: said.put(it.text)),
    )
    while not (line := said.get(timeout=5)).startswith("There is no browser"):
        pass
    assert re.fullmatch(r"There is no browser to open here: visit http://127.0.0.1:\d+ with one.", line)


# The end


def test_asked_to_stop_it_finishes_what_runs_and_refuses_what_is_new(gpt2, shelf):
    with api_server.serving(gpt2, shelf) as served, served.braked() as let:
        client = served.client()
        let(3)
        stream = client.completions.create(model="a", stream=True, **GREEDY)
        text = next(iter(stream)).choices[0].text
        served.server.handle_exit(signal.SIGTERM, None)
        served.wait(lambda: not served.worker.answers)
        with pytest.raises(openai.InternalServerError) as refused:
            client.completions.create(model="a", **GREEDY)
        assert (refused.value.status_code, refused.value.code) == (503, "stopping")
        assert int(refused.value.response.headers["retry-after"]) > 0
        health = served.get("/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "stopping")
        let(1000)
        assert text + "".join(it.choices[0].text for it in stream) == greedy(gpt2, shelf, "a").text
    assert not served.server.cut_off


def test_a_second_signal_cuts_off(gpt2, shelf):
    with api_server.serving(gpt2, shelf) as served, served.braked() as let:
        let(3)
        stream = served.client().completions.create(model="a", stream=True, **GREEDY)
        next(iter(stream))
        served.server.handle_exit(signal.SIGTERM, None)
        served.wait(lambda: not served.worker.answers)
        served.server.handle_exit(signal.SIGTERM, None)
        with pytest.raises(openai.APIConnectionError):
            list(stream)
    assert served.server.cut_off


def test_a_connection_that_never_ends_does_not_hold_up_the_end(gpt2, shelf):
    """As a page of the playground keeps one."""
    with api_server.serving(gpt2, shelf) as served:

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


# A process of its own


class Process:
    """`cli.py serve`; `url` when it listens."""

    def __init__(self, *arguments, **env):
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "cli.py", "serve", "--port", "0", "--device", "cpu", *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | env,
        )  # fmt: skip
        self.lines = []
        threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()
        end = time.monotonic() + 60
        while not (found := re.search(r"Listening on (\S+):", "".join(self.lines))):
            assert time.monotonic() < end
            assert self.process.poll() is None, self.lines
            time.sleep(0.02)
        self.url = found[1]

    def wait(self):
        return self.process.wait(30)


@pytest.fixture
def long(tmp_path):
    """A base that writes for seconds."""
    return tiny_models.save_model(tmp_path / "long", "gpt2", width=192, layers=6, context=2048)


def test_a_process_listens_answers_and_ends_a_running_stream_whole(long):
    process = Process("--base", long, LORA_TUNER_API_KEY="12345678")
    try:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0).models.list()
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="12345678", max_retries=0)
        asked = {"model": "long", "prompt": PROMPT, "temperature": 0, "max_tokens": 150}
        stream = client.completions.create(stream=True, **asked)
        pieces = [next(iter(stream))]
        process.process.send_signal(signal.SIGTERM)
        pieces += list(stream)
        assert process.wait() == 0
    finally:
        process.process.kill()
    expected = Generator(options=ModelOptions(base=str(long), device="cpu")).generate(
        PROMPT, SamplingParams(temperature=0, max_new_tokens=150, repetition_penalty=1.0)
    )
    assert "".join(it.choices[0].text for it in pieces) == expected.text
    assert process.process.stdout.read() == ""
    lines = [json.loads(line) for line in process.lines if line.startswith("{")]
    assert [(it["path"], it["status"]) for it in lines] == [("/v1/models", 401), ("/v1/completions", 200)]
    assert [line for line in process.lines if not line.startswith("{")] == [
        f"Listening on {process.url}: the base long and 0 adapters. {process.url}/v1 is for OpenAI's clients.\n"
    ]


@pytest.mark.slow
def test_a_second_signal_ends_a_process_at_once(long):
    process = Process("--base", long)
    try:
        client = openai.OpenAI(base_url=f"{process.url}/v1", api_key="none", max_retries=0)
        stream = client.completions.create(model="long", prompt=PROMPT, temperature=0, max_tokens=2000, stream=True)
        next(iter(stream))
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        process.process.send_signal(signal.SIGTERM)
        assert process.wait() == 130
    finally:
        process.process.kill()
    assert "Stopped at once: answers that were being written are cut off.\n" in process.lines
