import asyncio
import json
import time

import httpx
import pytest

from lora_tuner import Generator, ModelOptions
from lora_tuner.config import ServerConfig
from lora_tuner.server import middleware
from lora_tuner.server.middleware import CrossOriginMiddleware, SecurityMiddleware, is_loopback
from lora_tuner.server.routes import create_app
from lora_tuner.server.service import ModelService


async def echo(scope, receive, send):
    """Answer with the body of the request."""
    message = await receive()
    assert not message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def send_request(path="/v1/models", settings=None, url="http://127.0.0.1:8000", **request):
    async def go():
        config = settings or ServerConfig()
        app = CrossOriginMiddleware(SecurityMiddleware(echo, config), config)
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
def test_host_header_must_be_local(host, status):
    for path in ("/v1/models", "/", "/health"):
        assert send_request(path, headers={"Host": host}).status_code == status


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_api_key_allows_any_host(host):
    """A proxy may pass on the host it was called by."""
    settings = ServerConfig(host=host, api_key="12345678")
    assert (
        send_request(settings=settings, headers={"Host": "any", "Authorization": "Bearer 12345678"}).status_code
        == 200
    )
    assert send_request(settings=settings, headers={"Host": "any"}).status_code == 401


@pytest.mark.parametrize(
    "authorization",
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
def test_api_paths_require_key(authorization):
    settings = ServerConfig(api_key="12345678")
    headers = {"Authorization": authorization.encode("latin-1")} if authorization is not None else {}
    for path in ("/v1/models", "/v1/completions", "/v1/nothing", "/metrics", "/openapi.json"):
        response = send_request(path, settings, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert send_request(path, settings, headers={"Authorization": "Bearer 12345678"}).status_code == 200
    for path in ("/", "/health", "/assets/page.js"):
        assert send_request(path, settings, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "path", ["/metrics%0A", "/openapi.json%0A", "/health%0A", "/v1/models%0A", "/%1F", "/%7F"]
)
def test_control_characters_in_path_give_404(path, gpt2, tmp_path):
    """Starlette's patterns end in `$`, which also matches before a newline."""
    service = ModelService(
        Generator(adapters_dir=tmp_path, options=ModelOptions(base=str(gpt2), device="cpu")),
        ServerConfig(api_key="12345678"),
    )

    async def go():
        transport = httpx.ASGITransport(create_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.get(path)

    response = asyncio.run(go())
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["message"], error["type"]) == (
        "There is nothing at this path.",
        "invalid_request_error",
    )


def test_api_key_comparison_takes_constant_time(monkeypatch):
    compared = []
    compare = middleware.hmac.compare_digest
    monkeypatch.setattr(middleware.hmac, "compare_digest", lambda *keys: compared.append(keys) or compare(*keys))
    send_request(settings=ServerConfig(api_key="12345678"), headers={"Authorization": "Bearer wrong"})
    assert compared == [(b"Bearer wrong", b"Bearer 12345678")]


def preflight(origin, settings, host="127.0.0.1", **headers):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-own"}
    headers = {"Origin": origin, "Host": host} | asked | headers
    return send_request("/v1/chat/completions", settings, method="OPTIONS", headers=headers)


def cors_headers(response):
    return {name: value for name, value in response.headers.items() if name.startswith("access-control-")}


ORIGIN = "https://chat.example"


@pytest.mark.parametrize("settings", [ServerConfig(), ServerConfig(api_key="12345678")])
def test_cross_origin_is_off_by_default(settings):
    for response in (
        preflight(ORIGIN, settings),
        send_request("/health", settings, headers={"Origin": ORIGIN}),
        send_request("/v1/models", settings, headers={"Origin": ORIGIN, "Authorization": "Bearer 12345678"}),
    ):
        assert cors_headers(response) == {}


@pytest.mark.parametrize("key", [None, "12345678"])
@pytest.mark.parametrize(
    ("allowed", "header"), [([ORIGIN], ORIGIN), (["http://localhost:1", ORIGIN], ORIGIN), (["*"], "*")]
)
def test_preflight_of_allowed_origin_needs_no_key(allowed, header, key):
    settings = ServerConfig(allow_origin=allowed, api_key=key)
    response = preflight(ORIGIN, settings, **{"Access-Control-Request-Private-Network": "true"})
    headers = cors_headers(response)
    assert (response.status_code, headers["access-control-allow-origin"]) == (200, header)
    assert headers["access-control-allow-headers"] == "authorization,x-own"
    assert headers["access-control-allow-private-network"] == "true"
    assert "POST" in headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in headers
    response = send_request(settings=settings, headers={"Origin": ORIGIN, "Authorization": "Bearer 12345678"})
    assert cors_headers(response)["access-control-allow-origin"] == header
    assert "Retry-After" in cors_headers(response)["access-control-expose-headers"]
    assert response.headers["vary"] == "Origin"


def test_other_origin_is_not_allowed():
    settings = ServerConfig(allow_origin=[ORIGIN])
    for origin in (
        "https://evil.example",
        "http://chat.example",
        f"{ORIGIN}:8443",
        f"{ORIGIN}.evil.example",
        "null",
    ):
        response = preflight(origin, settings)
        assert (response.status_code, response.json()["error"]["code"]) == (403, "wrong_origin")
        assert f"Pages of {origin} may not call this server" in response.json()["error"]["message"]
        assert cors_headers(response) == {}
        response = send_request(settings=settings, headers={"Origin": origin})
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("allowed", [ORIGIN, "*"])
def test_allowed_origin_keeps_key_and_host_checks(allowed):
    settings = ServerConfig(allow_origin=[allowed])
    assert preflight(ORIGIN, settings, host="evil.example").status_code == 403
    assert send_request(settings=settings, headers={"Origin": ORIGIN, "Host": "evil.example"}).status_code == 403
    settings = ServerConfig(allow_origin=[allowed], api_key="12345678")
    response = send_request(settings=settings, headers={"Origin": ORIGIN})
    assert (response.status_code, response.headers["vary"]) == (401, "Origin")
    # OPTIONS that is no preflight
    assert send_request(settings=settings, method="OPTIONS", headers={"Origin": ORIGIN}).status_code == 401
    assert cors_headers(send_request("/", settings, headers={"Origin": ORIGIN})) == {}


def test_body_size_is_limited(monkeypatch):
    monkeypatch.setattr(middleware, "MAX_BODY", 10)
    assert send_request(method="POST", content=b"0123456789").content == b"0123456789"

    async def chunks(count):
        for _ in range(count):
            yield b"01234"

    for content in (b"0123456789+", chunks(3)):
        response = send_request(method="POST", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "The body is larger than 10 bytes."
        assert response.headers["connection"] == "close"
    assert send_request(method="POST", content=chunks(2)).content == b"0123401234"
    assert send_request(method="POST", headers={"Content-Length": "9" * 5000}, content=b"").status_code == 413
    monkeypatch.setattr(middleware, "MAX_PAGE_BODY", 5)  # sent without the key
    assert send_request("/login", method="POST", content=b"01234").content == b"01234"
    assert send_request("/login", method="POST", content=b"012345").status_code == 413


def run_middleware(receive):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"host", b"localhost")],
    }
    asyncio.run(SecurityMiddleware(echo, ServerConfig())(scope, receive, send))
    return sent


def test_slow_body_times_out(monkeypatch):
    monkeypatch.setattr(middleware, "MAX_SECONDS", 0.2)

    async def slow():
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    begun = time.monotonic()
    start, body = run_middleware(slow)
    assert 0.2 <= time.monotonic() - begun < 5
    assert (start["status"], json.loads(body["body"])["error"]["code"]) == (408, "request_timeout")


def test_disconnect_in_body_gets_no_response():
    messages = [
        {"type": "http.disconnect"},
        {"type": "http.request", "body": b"x", "more_body": True},
    ]

    async def receive():
        return messages.pop()

    assert run_middleware(receive) == []


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
def test_is_loopback(host, local):
    assert is_loopback(host) == local
