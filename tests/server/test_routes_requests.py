"""Routes: what clients send: refused with message and field, or accepted; random requests."""

import json
import shutil
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from lora_tuner.server import neutral

from .. import api_server
from ..api_server import CHAT, GREEDY, PROMPT, TEXT, error_of, turn

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": None}, "prompt", "Field required"),
        ({"prompt": 5}, "prompt", "valid string"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1"),
        ({"prompt": ["x", 1]}, "prompt[1]", "valid string"),
        ({"prompt": [320]}, None, "each from 0 to 319"),
        ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
        ({"prompt": [2**80]}, "prompt[0]", "less than or equal"),
        ({"prompt": "a\0b"}, "prompt", "text cannot contain null bytes"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 1.5}, "n", "valid integer"),
        ({"n": 128, "prompt": ["x", "y", "z"]}, "n", "n: 384 outputs requested, the limit of this server is 320."),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"stop": ["a", 1]}, "stop[1]", "valid string"),
        ({"max_tokens": 0}, "max_tokens", "0 leaves nothing to answer without echo: true"),
        ({"max_tokens": -1}, "max_tokens", "greater than or equal to 0"),
        (
            {"max_tokens": 127},
            None,
            "The prompt has 3 tokens and max_tokens is 127, but the context length of talker is 128 tokens.",
        ),
        ({"max_tokens": 3000}, "max_tokens", "max_tokens is 3,000: the limit of this server is 2,048."),
        ({"prompt": "so " * 200}, None, "tokens, but talker has a context of 128: shorten it."),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed with stream: true"),
        ({"stream": True, "stream_options": {"what": 1}}, "stream_options.what", "unknown field"),
        (CHAT | {"echo": True}, "echo", "echo: not supported: leave it out, or send false."),
        ({"best_of": 2, "n": 3}, "best_of", "must be at least n"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"best_of": 128, "prompt": ["x", "y", "z"]}, "best_of", "best_of: 384 outputs requested, the limit"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "give token ids with a value from -100 to 100"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"1": "1"}}, "logit_bias.1", "valid number"),
        ({"logit_bias": {"320": 1}}, "logit_bias", "there is no token 320: give ids from 0 to 319."),
        ({"stop_token_ids": [1, 320]}, "stop_token_ids", "there is no token 320"),
        ({"min_tokens": 17}, "min_tokens", "min_tokens is 17: more than max_tokens, which is 16."),
        ({"presence_penalty": 2.5}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -2.5}, "frequency_penalty", "greater than or equal to -2"),
        ({"add_special_tokens": False}, "add_special_tokens", "or send true"),
        ({"min_p": False}, "min_p", "valid number"),
        ({"nonsense": 1}, "nonsense", "unknown field"),
        ({"user": 5}, "user", "valid string"),
        ({"model": 5}, "model", "valid string"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools[0].function", "Field required"),
        ({"tool_choice": "required"}, "tool_choice", 'or send "none" or "auto"'),
        (CHAT | {"response_format": {"type": "xml"}}, "response_format.type", "'text', 'json_object' or 'json_schema'"),
        (CHAT | {"modalities": ["text", "audio"]}, "modalities", 'or send ["text"]'),
        (CHAT | {"reasoning_effort": "low"}, "reasoning_effort", 'or send "none"'),
        (CHAT | {"service_tier": "flex"}, "service_tier", 'or send "auto" or "default"'),
        (CHAT | {"audio": {"voice": "alloy"}}, "audio", "audio: not supported: leave it out."),
        (CHAT | {"top_logprobs": 2}, "top_logprobs", "only allowed with logprobs: true"),
        (CHAT | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"messages": []}, "messages", "at least 1"),
        (turn(role="function", content="x"), "messages[1].role", "'developer', 'user', 'assistant' or 'tool'"),
        (turn(role="user"), "messages[1].content", "give a string, or a list of parts of type text"),
        (turn(role="system", content=None), "messages[1].content", "give a string"),
        (turn(role="assistant", content=None, tool_calls=[{}]), "messages[1].tool_calls[0].function", "required"),
        (turn(role="assistant", content="x", reasoning_content="y"), "messages[1].reasoning_content", 'or send ""'),
        (turn(role="user", content="x", agent="cli"), "messages[1].agent", "unknown field"),
        (turn(role="user", content={"a": 1}), "messages[1].content", "valid string"),
        (
            turn(role="user", content=[TEXT, {"type": "image_url", "image_url": {}}]),
            "messages[1].content[1].type",
            "messages[1].content[1].image_url: not supported: leave it out",
        ),
        ({"min_tokens": 2, "guided_choice": ["a", "b"]}, "guided_choice", "leave out min_tokens"),
        ({"min_tokens": 2, "response_format": {"type": "json_object"}}, "response_format", "leave out min_tokens"),
        ({"messages": [{"role": "user", "content": "so " * 200}]}, None, "has a context of 128: shorten it."),
    ],
)  # fmt: skip
def test_invalid_field_is_named(served, body, param, message):
    chat = "messages" in body
    path, required = "/v1/completions", {"model": "talker", "prompt": PROMPT}
    if chat:
        path, required = "/v1/chat/completions", {"model": "talker"}
    error = error_of(served.post(path, **required | body), 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert message in error["message"]
    if "has a context of" in message or "context length" in message:
        assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("field", ["n", "stop", "logprobs", "best_of", "guided_json", "of_some_other_tool"])
def test_null_equals_omitted_field(served, field):
    assert served.post("/v1/completions", model="a", prompt=PROMPT, **{field: None}).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields"),
    [("/v1/completions", neutral.COMPLETION), ("/v1/chat/completions", neutral.CHAT)],
)
def test_neutral_values_are_accepted(served, path, fields):
    long = turn(role="user", content="so? " * 25)  # leaves little room for output
    prompt = long if "chat" in path else {"prompt": PROMPT}
    request = {"model": "a", "temperature": 0, "top_k": 5, **prompt}
    limit = {} if "chat" in path else {"max_tokens": 20}
    first = {name: values[0] if values else "anything" for name, values in fields.items() if values != ()}
    last = {name: values[-1] if values else {"any": 1} for name, values in fields.items() if values != ()}
    other = {"stop": "", "n": 1, "best_of": 1, "response_format": {"type": "text", "json_schema": None}}
    other = other if "chat" not in path else other | {"best_of": None, "stop": [], "stream_options": {}}
    expected = served.post(path, **request, **limit).json()
    for values in (first, last, other | {"stop": ["", ""]}, other):
        response = served.post(path, **request | limit | values)
        assert response.status_code == 200, response.text
        answer = response.json()
        for each in (answer, expected):
            each["usage"].pop("prompt_tokens_details", None)  # the first has computed what others find
        assert (answer["choices"], answer["usage"]) == (expected["choices"], expected["usage"])


def test_neutral_values_are_documented():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    for fields in (
        neutral.COMPLETION,
        neutral.CHAT,
        neutral.RESPONSES,
        neutral.NESTED,
        neutral.TOKENIZE,
        neutral.CLASSIFY,
        neutral.LOAD_ADAPTER,
        neutral.UNLOAD_ADAPTER,
    ):
        assert [name for name, values in fields.items() if values != () and f"`{name}`" not in page] == []


ANSWER = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER | {"refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
        ANSWER | {"tool_calls": [], "reasoning_content": "", "reasoning": None, "reasoning_details": []},
        ANSWER | {"id": "msg_1", "provider_specific_fields": {"refusal": None}, "thinking_blocks": []},
        ANSWER
        | {
            "content": [
                {"type": "text", "text": "yes", "annotations": [], "cache_control": {"type": "ephemeral"}}
            ]
        },
    ],
)
def test_answer_is_accepted_as_it_came(served, answer):
    def prompt_tokens(answer):
        response = served.post("/v1/chat/completions", model="a", max_tokens=1, **turn(**answer))
        assert response.status_code == 200, response.text
        return response.json()["usage"]["prompt_tokens"]

    assert prompt_tokens(answer) == prompt_tokens(ANSWER)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": None, "tool_calls": []}, {"content": []}])
def test_missing_answer_equals_empty_one(served, content):
    usages = [
        served.post(
            "/v1/chat/completions", model="a", max_tokens=1, temperature=0, **turn(role="assistant", **message)
        )
        for message in (content, {"content": ""})
    ]
    assert usages[0].json()["usage"] == usages[1].json()["usage"]


def test_name_reaches_the_chat_template(base, adapters_dir, tmp_path):
    folder = shutil.copytree(base, tmp_path / "named")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}\n{% endfor %}"
    )
    with api_server.serving(folder, adapters_dir) as served:

        def post(**message):
            return served.post("/v1/chat/completions", model="a", max_tokens=1, **turn(**message))

        named, plain = post(role="user", name="ada", content="x"), post(role="user", content="x")
        assert named.json()["usage"]["prompt_tokens"] > plain.json()["usage"]["prompt_tokens"]
        error = error_of(post(role="user", name="<|endoftext|>", content="x"), 400)
    assert error["message"].startswith("messages[1].name contains <|endoftext|>, a special token")


# In the manner of the documentation of each tool.
CLIENTS = {
    "openai curl": CHAT | {"store": True, "metadata": {"run": "1"}, "service_tier": "auto", "top_p": 1, "n": 1},
    "openai legacy curl": {
        "prompt": "Say this", "max_tokens": 7, "temperature": 0, "stream": False, "logprobs": None, "stop": "\n",
    },
    "lm studio": CHAT | {"temperature": 0.7, "max_tokens": -1, "stream": True},
    "librechat": CHAT | {
        "temperature": 1, "top_p": 1, "presence_penalty": 0, "frequency_penalty": 0, "user": "id", "stream": True,
    },
    "open webui": CHAT | {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 4},
    "sillytavern chat": CHAT | {"max_tokens": 4, "stop": [], "logit_bias": {}, "seed": 1, "n": 1, "reasoning_effort": None},
    "sillytavern vllm": {
        "prompt": PROMPT, "max_tokens": 4, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "ignore_eos": False,
        "spaces_between_special_tokens": True, "skip_special_tokens": True, "stop": ["\nYou:", "\n***"] * 4, "best_of": 1,
        "echo": False, "suffix": "", "use_beam_search": False, "length_penalty": 1, "early_stopping": False,
        "stop_token_ids": [], "min_tokens": 0, "guided_grammar": None, "include_stop_str_in_output": False,
    },
    "langchain": CHAT | {"max_completion_tokens": 4, "stream": False, "parallel_tool_calls": False, "seed": None},
    "litellm proxy": CHAT | {"max_tokens": 4, "tools": None, "tool_choice": None, "response_format": None, "extra_headers": None},
    "continue": {"prompt": PROMPT, "max_tokens": 4, "stop": ["<fim>", "\n\n", "```", "/src/", "<|end|>"], "suffix": None},
    "garak": CHAT | {
        "frequency_penalty": 0.0, "max_tokens": 4, "n": 1, "presence_penalty": 0.0, "stop": ["#", ";"], "top_p": 1.0,
    },
    "llama.cpp": CHAT | {
        "cache_prompt": True, "n_predict": -1, "samplers": None, "mirostat": 0, "mirostat_tau": 5, "typical_p": 1,
        "dry_multiplier": 0, "dry_base": 1.75, "xtc_probability": 0, "xtc_threshold": 0.1, "repeat_penalty": 1.0,
        "repeat_last_n": 64, "max_tokens": 4, "timings_per_token": False, "grammar": "",
    },
}  # fmt: skip


@pytest.mark.parametrize("client", CLIENTS)
def test_request_of_known_client_is_accepted(served, client):
    request = {"max_tokens": 4} | CLIENTS[client] | {"model": "a"}
    response = served.post("/v1/chat/completions" if "messages" in request else "/v1/completions", **request)
    assert response.status_code == 200, response.text
    assert "data: [DONE]" in response.text or response.json()["choices"]


def test_body_without_json_header_is_explained(served):
    response = httpx.post(f"{served.url}/v1/completions", content=json.dumps({"model": "a", "prompt": "x"}))
    error = error_of(response, 400)
    assert (
        error["message"]
        == "The body should be a JSON object, sent with the header Content-Type: application/json."
    )


MALFORMED = [
    b"", b"{", b"null", b"[]", b'"x"', b"{}", b"\xff\xfe", b"\x00", b'{"model": "a", "prompt": "x", "temperature": NaN}',
    b'{"model": "a", "prompt": "x", "temperature": Infinity}', b'{"model": "a", "prompt": "x", "temperature": 1e999}',
    b'{"model": "a", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "a", "prompt": "x", "n": ' + b"9" * 400 + b"}",
    b"[" * 100_000, b'{"a":' * 100_000, b'{"model": "a", "prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    b'{"model": "a", "prompt": "\\ud800"}', b'{"model": "\\ud800", "prompt": "x"}', b'{"\\ud800": 1}',
    b'{"model": "a", "prompt": "x", "user": "\\udfff"}', b'{"model": "a", "prompt": "x", "stop": ["\\ud800"]}',
    b'{"model": "a", "prompt": [' + b"{}," * 100_000 + b"{}]}", b'{"' + b"k" * 900_000 + b'": 1}',
    b'{"model": "a", "prompt": "x"} trailing',
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("data", MALFORMED, ids=[str(number) for number in range(len(MALFORMED))])
def test_malformed_body_gives_openai_error(served, path, data):
    response = httpx.post(
        f"{served.url}{path}",
        content=data,
        headers={"Content-Type": "application/json"},
        timeout=30,
    )
    error_of(response, 400)
    assert len(response.content) < 5000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_browser_form_is_rejected(served, kind):
    """Browsers send these across origins without a preflight request."""
    data = json.dumps({"model": "a", "prompt": "x"}).encode()
    error_of(
        httpx.post(
            f"{served.url}/v1/completions",
            content=data,
            headers={"Content-Type": kind} if kind else {},
        ),
        400,
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1", 404),
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/models/a", 405),
        ("PUT", "/v1/chat/completions", 405),
        ("POST", "/health", 405),
    ],
)
def test_unknown_route_gives_404_or_405(served, method, path, status):
    response = httpx.request(method, f"{served.url}{path}")
    error_of(response, status)
    if status == 405:
        assert response.headers["allow"] == ("GET" if "models" in path or "health" in path else "POST")


def test_broken_json_names_its_place(served):
    headers = {"Content-Type": "application/json"}
    error = error_of(
        httpx.post(f"{served.url}/v1/completions", content=b'{"model": "a" 5}', headers=headers), 400
    )
    assert error["message"].startswith("The body is not valid JSON: ")
    assert error["message"].endswith(", at character 14.")


def test_wrong_base_url_names_the_endpoints(served):
    error = error_of(served.post("/chat/completions", model="a", **CHAT), 404)
    assert error["message"] == (
        "There is nothing at /chat/completions: the API has /v1/models, /v1/completions, /v1/chat/completions, "
        "/v1/responses, /v1/classify, /v1/load_lora_adapter, /v1/unload_lora_adapter, /tokenize, /detokenize."
    )


def test_slash_at_the_end_is_accepted(served):
    assert served.get("/v1/models/").json() == served.get("/v1/models").json()
    assert served.post("/v1/chat/completions/", model="a", max_tokens=1, **CHAT).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/a", "/v1/models/c", "/v1/completions"])
def test_head_equals_get_without_body(served, path):
    get, head = served.get(path), httpx.head(f"{served.url}{path}")
    assert (head.status_code, head.headers["content-length"]) == (get.status_code, get.headers["content-length"])
    assert head.content == b""


def test_page_at_root_leaves_api_alone(start_server):
    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"page"})

    with start_server() as served:
        served.app.mount("/", page)
        assert served.get("/nothing").text == "page"
        error_of(served.get("/v1/nothing"), 404)
        error_of(served.post("/v1/models"), 405)
        assert served.get("/v1/models/a").json()["id"] == "a"


def test_allowed_origin_reads_streams_and_errors(start_server):
    origin = {"Origin": "http://localhost:3000"}
    with start_server(allow_origin=["http://localhost:3000"], api_key="12345678") as served:
        key = {"Authorization": "Bearer 12345678"}
        url, body = f"{served.url}/v1/completions", {"model": "a", "stream": True, **GREEDY}
        stream = httpx.post(url, json=body, headers=origin | key)
        assert "data: [DONE]" in stream.text
        wrong = httpx.post(url, json=body | {"model": "c"}, headers=origin | key)
        refused = httpx.post(url, json=body, headers=origin)
        served.service.list_models = None  # an unexpected error
        failed = httpx.get(f"{served.url}/v1/models", headers=origin | key)
        assert [r.status_code for r in (stream, wrong, refused, failed)] == [200, 404, 401, 500]
        for response in (stream, wrong, refused, failed):
            assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
            assert response.headers["vary"] == "Origin"
            assert "access-control-allow-credentials" not in response.headers


# Fuzzing


@pytest.fixture(scope="module")
def schema(served):
    return schemathesis.openapi.from_url(f"{served.url}/openapi.json")


def fuzz(schema, mode, examples):
    """Send valid or invalid requests; each response must match the schema, and none may be a 500."""
    for result in schema.get_all_operations():
        operation = result.ok()
        if not (mode.is_positive or list(operation.body)):
            continue  # without a body nothing can be invalid

        @given(case=operation.as_strategy(mode))
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        def check(case):
            if mode.is_positive and isinstance(case.body, dict):
                case.body["model"] = "a"
            case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=30)

        check()


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_fuzzed_requests_match_openapi(schema, mode):
    fuzz(schema, mode, 12)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_many_fuzzed_requests_match_openapi(schema, mode):
    fuzz(schema, mode, 1000)
