import asyncio
import json
import time

import httpx
import pytest

from lora_tuner import Generator, ModelOptions
from lora_tuner.config import ServerConfig
from lora_tuner.server import middleware
from lora_tuner.server.middleware import SecurityMiddleware, is_loopback
from lora_tuner.server.routes import create_app
from lora_tuner.server.service import ModelService


async def echo(scope, receive, send):
    """An app that answers with the body that it was sent."""
    message = await receive()
    assert not message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def ask(path="/v1/models", settings=None, url="http://127.0.0.1:8000", **request):
    async def go():
        app = SecurityMiddleware(echo, settings or ServerConfig())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=url) as client:
            return await client.request(request.pop("method", "GET"), path, **request)

    return asyncio.run(go())


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8000", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("127.0.0.1:8000@evil.example", 403),
        ("evil.example#127.0.0.1", 403),
        ("::1", 403),
        ("", 403),
    ],
)
def test_the_host_is_this_machine(host, status):
    for path in ("/v1/models", "/", "/health"):
        assert ask(path, headers={"Host": host}).status_code == status


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_with_a_key_any_name_is_taken(host):
    """A proxy in front may pass on the name that it was asked by."""
    settings = ServerConfig(host=host, api_key="12345678")
    assert ask(settings=settings, headers={"Host": "any", "Authorization": "Bearer 12345678"}).status_code == 200
    assert ask(settings=settings, headers={"Host": "any"}).status_code == 401


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer 1234567",
        "Bearer 123456789",
        "bearer 12345678",
        "12345678",
        "Basic 12345678",
        "Bearer 1234567\u00e9",
        "Bearer 12345678 ",
    ],
)
def test_the_key_is_asked_for_by_the_api_alone(given):
    settings = ServerConfig(api_key="12345678")
    headers = {"Authorization": given.encode("latin-1")} if given is not None else {}
    for path in ("/v1/models", "/v1/completions", "/v1/nothing", "/metrics", "/openapi.json"):
        response = ask(path, settings, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert ask(path, settings, headers={"Authorization": "Bearer 12345678"}).status_code == 200
    for path in ("/", "/health", "/assets/page.js"):
        assert ask(path, settings, headers=headers).status_code == 200


@pytest.mark.parametrize("path", ["/metrics%0A", "/openapi.json%0A", "/health%0A", "/v1/models%0A", "/%1F", "/%7F"])
def test_a_path_that_routes_and_guard_could_read_differently_leads_nowhere(path, gpt2, tmp_path):
    """Starlette's patterns end in `$`, which takes a line end."""
    desk = ModelService(
        Generator(adapters_dir=tmp_path, options=ModelOptions(base=str(gpt2), device="cpu")),
        ServerConfig(api_key="12345678"),
    )

    async def go():
        transport = httpx.ASGITransport(create_app(desk))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(path)

    response = asyncio.run(go())
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["message"], error["type"]) == ("There is nothing at this path.", "invalid_request_error")


def test_the_time_that_a_key_takes_to_check_does_not_tell_of_it(monkeypatch):
    compared = []
    compare = middleware.hmac.compare_digest
    monkeypatch.setattr(middleware.hmac, "compare_digest", lambda *both: compared.append(both) or compare(*both))
    ask(settings=ServerConfig(api_key="12345678"), headers={"Authorization": "Bearer wrong"})
    assert compared == [(b"Bearer wrong", b"Bearer 12345678")]


def test_bodies_are_bounded(monkeypatch):
    monkeypatch.setattr(middleware, "MAX_BODY", 10)
    assert ask(method="POST", content=b"0123456789").content == b"0123456789"

    async def chunks(count):
        for _ in range(count):
            yield b"01234"

    for content in (b"0123456789+", chunks(3)):
        response = ask(method="POST", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "The body has more than 10 bytes."
        assert response.headers["connection"] == "close"
    assert ask(method="POST", content=chunks(2)).content == b"0123401234"
    assert ask(method="POST", headers={"Content-Length": "9" * 5000}, content=b"").status_code == 413


def run(receive):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"host", b"localhost")]}
    asyncio.run(SecurityMiddleware(echo, ServerConfig())(scope, receive, send))
    return sent


def test_a_body_may_not_take_for_ever(monkeypatch):
    monkeypatch.setattr(middleware, "MAX_SECONDS", 0.2)

    async def slow():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    begun = time.monotonic()
    start, body = run(slow)
    assert 0.2 <= time.monotonic() - begun < 5
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (408, "request_timeout")


def test_who_leaves_before_the_end_of_the_body_is_not_answered():
    messages = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"x", "more_body": True}]

    async def receive():
        return messages.pop()

    assert run(receive) == []


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("example.org", False),
        ("", False),
        ("127.0.0.1.example.org", False),
    ],
)
def test_what_is_local(host, local):
    assert is_loopback(host) == local
