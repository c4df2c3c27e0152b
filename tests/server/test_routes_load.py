"""Routes: load, disconnects, time-outs, limits of one request."""

import concurrent.futures
import contextlib
import json
import logging
import shutil
import socket
import threading
from pathlib import Path

import httpx
import openai
import pytest

from lora_tuner.adapters import adapter, library
from lora_tuner.server import generate, service

from ..api_server import (
    GREEDY,
    PROMPT,
    error_of,
    events,
    read_all,
    write_adapter,
)

ROOT = Path(__file__).parents[2]


def test_full_queue_gives_429_with_retry(start_server):
    with start_server(max_batch=1, max_waiting=2) as served, served.held_steps() as release:
        client = served.client()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            futures = []
            for count in (1, 2, 3):
                futures.append(pool.submit(client.completions.create, model="a", **GREEDY))
                served.wait(lambda count=count: served.scheduler.waiting + served.scheduler.running == count)
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(model="b", **GREEDY)
            assert full.value.code == "rate_limit_exceeded"
            assert int(full.value.response.headers["retry-after"]) >= 1
            assert "The queue is full, with 2 sequences waiting: try again in" in str(full.value)
            release(1000)
            assert len({future.result().choices[0].text for future in futures}) == 1
        # The client's own retries get through.
        assert served.client(max_retries=2).completions.create(model="b", **GREEDY).choices


@contextlib.contextmanager
def held_loading(served):
    """Hold the loading of adapters until the yielded function is called."""
    get_or_load, released = served.generator.get_or_load, threading.Event()
    served.generator.get_or_load = lambda path: released.wait(10) and get_or_load(path)
    try:
        yield released.set
    finally:
        released.set()
        served.generator.get_or_load = get_or_load


def test_loading_requests_hold_queue_slots(start_server, expected_texts):
    with (
        start_server(max_batch=1, max_waiting=2) as served,
        held_loading(served) as release,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        client = served.client()
        futures = [pool.submit(client.completions.create, model="a", n=n, **GREEDY) for n in (1, 2)]
        served.wait(lambda: served.scheduler._reserved == 3)
        error = error_of(served.post("/v1/completions", model="a", **GREEDY), 429)
        assert error["message"].startswith("The queue is full, with 3 sequences waiting: try again in ")
        release()
        assert {choice.text for future in futures for choice in future.result().choices} == {expected_texts["a"]}
    assert not served.scheduler.waiting


def test_loading_time_counts_towards_timeout(start_server):
    with start_server(timeout=0.3) as served, held_loading(served) as release:
        threading.Timer(0.6, release).start()
        assert error_of(served.post("/v1/completions", model="a", **GREEDY), 504)["code"] == "timeout"


@pytest.mark.parametrize("work", ["list", "load", "encode-long", "format", "metrics", "blend", "draw", "measure"])
def test_answers_pass_other_work(served, work):
    """Requests that need no such work are answered while it is stuck."""
    assert served.post("/v1/completions", model="a", **GREEDY).status_code == 200  # it is in memory now
    with held(served, work):
        for model in ("talker", "a"):
            assert served.post("/v1/completions", model=model, **GREEDY).status_code == 200
        assert served.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("work", "body"),
    [
        ("load", {"model": "b", "prompt": PROMPT}),
        ("encode-long", {"model": "talker", "prompt": "x" * (service.SHORT_PROMPT + 1)}),
        ("encode-long", {"model": "talker", "prompt": [PROMPT] * (service.SHORT_PROMPT // len(PROMPT) + 1)}),
        ("format", {"model": "talker", "prompt": PROMPT, "logprobs": 2}),
    ],
    ids=["not in memory", "long prompt", "many prompts", "log-probabilities"],
)
def test_dear_request_waits_in_its_own_thread(start_server, work, body):
    with start_server(max_waiting=5000) as served, concurrent.futures.ThreadPoolExecutor() as pool:
        with held(served, work):
            waiting = served.service._threads[work]._work_queue
            dear = pool.submit(served.post, "/v1/completions", max_tokens=1, **body)
            served.wait(lambda: waiting.qsize() == 1)
            assert served.post("/v1/completions", model="talker", **GREEDY).status_code == 200
            assert not dear.done()
        assert dear.result(30).status_code in (200, 400)


@contextlib.contextmanager
def held(served, work):
    """Keep a thread of the service busy."""
    busy, release = threading.Event(), threading.Event()
    served.service._threads[work].submit(lambda: busy.set() or release.wait(30))
    assert busy.wait(10)
    try:
        yield
    finally:
        release.set()


def test_listing_reads_only_changed_adapters(start_server, base, monkeypatch):
    read = []
    load_adapter_folder = library.load_adapter_folder
    monkeypatch.setattr(
        library, "load_adapter_folder", lambda path: read.append(path.name) or load_adapter_folder(path)
    )
    monkeypatch.setattr(service, "SETTLED_SECONDS", 0)
    (start_server.adapters_dir / "empty").mkdir()
    with start_server() as served:
        first = served.get("/v1/models")
        assert sorted(read) == ["a", "b", "empty"]
        read.clear()
        assert served.get("/v1/models").content == first.content
        assert served.get("/v1/models/b").json() in first.json()["data"]
        assert read == []
        write_adapter(start_server.adapters_dir, "b", base, 5)
        write_adapter(start_server.adapters_dir, "empty2", base, 5)
        shutil.rmtree(start_server.adapters_dir / "a")
        (start_server.adapters_dir / "empty" / adapter.CONFIG_FILE).write_text("{}")
        read.clear()
        listed = {model["id"]: model["broken"] for model in served.get("/v1/models").json()["data"]}
        assert sorted(read) == ["b", "empty", "empty2"]
        assert list(listed) == ["talker", "b", "empty", "empty2"]
        assert "peft_type" in listed["empty"]


def test_fresh_change_is_read_again(start_server, monkeypatch):
    """The next change may have the same size and time."""
    monkeypatch.setattr(service, "SETTLED_SECONDS", 1000)
    with start_server() as served:
        models = [served.service.get_model("a") for _ in range(2)]
    assert models[0] is not models[1]


def test_request_uses_few_threads(served, monkeypatch):
    works, run_in_thread = [], served.service.run_in_thread

    def counted(work, function):
        works.append(work)
        return run_in_thread(work, function)

    served.post("/v1/completions", model="a", **GREEDY)  # loads it
    monkeypatch.setattr(served.service, "run_in_thread", counted)
    for model in ("talker", "a"):
        served.post("/v1/completions", model=model, **GREEDY)
    assert works == ["encode", "find", "encode"]


def test_busy_adapter_does_not_delay_another(start_server):
    with start_server(max_batch=2) as served, served.held_steps() as release:
        client, done = served.client(), []

        def complete(model):
            client.completions.create(model=model, **GREEDY)
            done.append(model)

        threads = [threading.Thread(target=complete, args=["a"]) for _ in range(20)]
        for thread in threads:
            thread.start()
        served.wait(lambda: served.scheduler.waiting + served.scheduler.running == 20)
        threads.append(threading.Thread(target=complete, args=["b"]))
        threads[-1].start()
        served.wait(lambda: served.scheduler.waiting + served.scheduler.running == 21)
        release(5000)
        for thread in threads:
            thread.join()
    assert done.index("b") < 6


def test_short_request_overtakes_long_one(start_server):
    with start_server() as served, served.held_steps() as release:
        client, long = served.client(), "this film " * 25
        with concurrent.futures.ThreadPoolExecutor() as pool:
            first = pool.submit(client.completions.create, model="a", prompt=long, max_tokens=60, temperature=0)
            served.wait(lambda: served.scheduler.running == 1)
            second = pool.submit(client.completions.create, model="b", prompt="x", max_tokens=2, temperature=0)
            served.wait(lambda: served.scheduler.waiting == 1)
            release(10)
            assert second.result(10).usage.completion_tokens == 2
            assert not first.done()
            release(1000)
            assert first.result(10).usage.completion_tokens == 60


def test_disconnect_frees_slot(start_server, expected_texts):
    request = {"model": "a", "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
    with start_server(max_batch=1) as served, served.held_steps() as release:
        for stream in (True, False):
            body = json.dumps(request | {"stream": stream}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(head.encode() + body)
                served.wait(lambda: served.scheduler.running == 1)
                release(3)
                received = b""
                while stream and b"data: {" not in received:
                    received += connection.recv(65536)
            served.wait(lambda: all(request.cancelled for request in served.scheduler._requests()))
            release(2)
            served.wait(lambda: served.scheduler.idle)
        release(1000)
        assert served.client().completions.create(model="a", **GREEDY).choices[0].text == expected_texts["a"]
        assert not served.generator.engine.sequences


def test_disconnected_waiting_request_never_starts(start_server):
    with (
        start_server(max_batch=1) as served,
        served.held_steps() as release,
        concurrent.futures.ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(served.client().completions.create, model="a", **GREEDY)
        served.wait(lambda: served.scheduler.running == 1)
        with pytest.raises(openai.APITimeoutError):
            served.client(timeout=0.3).completions.create(model="b", **GREEDY)
        served.wait(lambda: served.app.state.metrics.open == 1)
        release(3)
        served.wait(lambda: served.scheduler.waiting == 0)
        release(1000)
        first.result()


def test_timeout_gives_504_or_event(start_server):
    with start_server(timeout=1) as served:
        client = served.client()
        with served.held_steps(pause=0.05):
            with pytest.raises(openai.InternalServerError) as late:
                client.completions.create(model="a", prompt=PROMPT, max_tokens=100, temperature=0)
            assert (late.value.status_code, late.value.code) == (504, "timeout")
            assert late.value.body["message"] == "The request took longer than 1 seconds."
            stream = client.completions.create(
                model="a", prompt=PROMPT, max_tokens=100, temperature=0, stream=True
            )
            assert next(iter(stream)).choices
            with pytest.raises(openai.APIError, match=r"The request took longer than 1 seconds"):
                list(stream)
        served.wait(lambda: served.scheduler.idle)
        assert client.completions.create(model="a", prompt=PROMPT, max_tokens=2).choices


def test_unexpected_error_fails_its_batch_alone(start_server, expected_texts, caplog):
    with start_server() as served:
        engine = served.generator.engine
        step = engine.step

        def fail():
            engine.step = step
            raise RuntimeError("a secret of this machine")

        caplog.set_level(logging.INFO, "lora_tuner.server")
        for round_number, stream in enumerate((False, True)):
            engine.step = fail
            response = served.post("/v1/completions", model="a", stream=stream, **GREEDY)
            error = events(response.text)[0]["error"] if stream else error_of(response, 500)
            assert (error["type"], error["code"]) == ("server_error", None)
            request = response.headers["x-request-id"]
            assert error["message"] == f"Internal error; the server's log has it as request {request}."
            served.wait(lambda count=2 * round_number + 2: len(caplog.records) >= count)
            failure, line = caplog.records[2 * round_number :]
            assert failure.getMessage() == f"request {request}"
            assert str(failure.exc_info[1]) == "a secret of this machine"
            assert (line.msg["id"], line.msg["code"]) == (request, "RuntimeError")
            assert line.msg["status"] == (200 if stream else 500)
        assert (
            served.post("/v1/completions", model="a", **GREEDY).json()["choices"][0]["text"]
            == expected_texts["a"]
        )


def test_disconnect_in_body_leaves_server_running(served, expected_texts):
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for rest in (
        "Content-Length: 500\r\n\r\n{",
        'Transfer-Encoding: chunked\r\n\r\n5\r\n{"mod\r\n',
        "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall((head + rest).encode())
    body = json.dumps({"model": "a", **GREEDY}).encode()
    halves = b"%x\r\n%s\r\n" % (10, body[:10]) + b"%x\r\n%s\r\n0\r\n\r\n" % (
        len(body) - 10,
        body[10:],
    )
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as connection:
        connection.sendall((head + "Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n").encode() + halves)
        response = read_all(connection)
    assert json.loads(response.partition(b"\r\n\r\n")[2])["choices"][0]["text"] == expected_texts["a"]
    served.wait(lambda: served.app.state.metrics.open == 0)


def test_slow_reader_delays_nobody(start_server, expected_texts):
    """The buffers between client and server are full, and the server goes on generating."""
    small = (socket.SOL_SOCKET, socket.SO_RCVBUF, 32_768)
    request = {
        "model": "a",
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": 100,
        "n": 20,
        "logprobs": 5,
    }
    with start_server() as served:
        served.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768)
        with (
            httpx.Client(transport=httpx.HTTPTransport(socket_options=[small]), timeout=20) as client,
            client.stream("POST", f"{served.url}/v1/completions", json=request | {"stream": True}) as response,
        ):
            (protocol,) = served.server.server_state.connections
            served.wait(lambda: protocol.flow.write_paused and served.scheduler.idle)
            assert (
                served.post("/v1/completions", model="a", **GREEDY).json()["choices"][0]["text"]
                == expected_texts["a"]
            )
            assert protocol.flow.write_paused
            deltas = [event["choices"][0] for event in events(response.read().decode())]
        for choice in served.post("/v1/completions", **request).json()["choices"]:
            own = [delta for delta in deltas if delta["index"] == choice["index"]]
            assert "".join(delta["text"] for delta in own) == choice["text"]
            tokens = [token for delta in own for token in delta["logprobs"]["tokens"]]
            assert tokens == choice["logprobs"]["tokens"]


# Limits of one request


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("completions", {"prompt": PROMPT, "n": 128, "logprobs": 5, "max_tokens": 20}, "logprobs"),
        ("completions", {"prompt": [PROMPT] * 40, "n": 8, "logprobs": 0, "max_tokens": 40}, "logprobs"),
        ("chat/completions", {"n": 128, "logprobs": True, "top_logprobs": 20}, "top_logprobs"),
    ],
    ids=["n", "prompts", "default max_tokens"],
)
def test_product_of_logprobs_is_limited(served, monkeypatch, path, body, field):
    monkeypatch.setattr(generate, "MAX_LOGPROBS", 10_000)
    if path != "completions":
        body = body | {"messages": [{"role": "user", "content": "x"}]}
    error = error_of(served.post(f"/v1/{path}", model="talker", **body), 400)
    assert error["param"] == field
    assert error["message"].endswith(f"the limit of this server is 10,000. Lower {field}, n or max_tokens.")


def test_logprobs_within_limit_are_answered(served, monkeypatch):
    monkeypatch.setattr(generate, "MAX_LOGPROBS", 2 * 3 * 6)
    body = {"model": "talker", "prompt": PROMPT, "n": 2, "logprobs": 5}
    assert served.post("/v1/completions", max_tokens=3, **body).status_code == 200
    assert served.post("/v1/completions", max_tokens=4, **body).status_code == 400


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_tiny_temperature_is_greedy(served, expected_texts, temperature):
    body = {"model": "a", **GREEDY, "temperature": temperature, "seed": 3, "top_k": 5}
    (choice,) = served.post("/v1/completions", **body).json()["choices"]
    assert choice["text"] == expected_texts["a"]


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ('{"model": "talker", "prompt": "x", "model": "a"}', "model"),
        ('{"model": "talker", "prompt": "x", "\\u006dodel": "a"}', "model"),
        ('{"model": "talker", "prompt": "x", "stream_options": {"include_usage": true, "include_usage": null}}', "include_usage"),
        ('{"model": "talker", "messages": [{"role": "user", "role": "system", "content": "x"}]}', "role"),
    ],
)  # fmt: skip
def test_repeated_json_key_is_refused(served, body, key):
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    headers = {"Content-Type": "application/json"}
    error = error_of(httpx.post(f"{served.url}{path}", content=body, headers=headers), 400)
    assert error["message"] == f"The body is not valid JSON: '{key}' is given twice in an object."
