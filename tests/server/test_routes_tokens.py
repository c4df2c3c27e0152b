"""Routes: token ids of prompts, and adapters that are loaded and unloaded by request."""

import shutil

import httpx
import openai
import pytest
from transformers import AutoTokenizer

from ..api_server import CHAT, GREEDY, KEY, PROMPT, error_of

LONG = "this film never drags. " * 60  # longer than the context


def test_tokens_are_those_of_completion(served, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    for prompt in (PROMPT, "☕ <|endoftext|>", LONG):
        body = served.post("/tokenize", model="a", prompt=prompt, return_token_strs=True).json()
        expected = tokenizer(prompt, split_special_tokens=True)["input_ids"]
        assert (body["count"], body["max_model_len"], body["tokens"]) == (len(expected), 128, expected)
        assert body["token_strs"] == tokenizer.convert_ids_to_tokens(expected)
        assert served.post("/detokenize", model="a", tokens=expected).json() == {"prompt": prompt}
    plain = served.post("/tokenize", prompt=PROMPT, add_special_tokens=False).json()
    assert (plain["tokens"], plain["token_strs"]) == (tokenizer(PROMPT)["input_ids"], None)
    assert served.post("/tokenize", prompt="").json()["tokens"] == []
    assert served.post("/detokenize", tokens=[0]).json() == {"prompt": tokenizer.decode([0])}


def test_tokens_are_those_of_chat(served):
    answer = served.post("/v1/chat/completions", model="a", max_tokens=1, **CHAT).json()
    body = served.post("/tokenize", model="a", **CHAT).json()
    assert body["count"] == answer["usage"]["prompt_tokens"]
    assert served.post("/detokenize", model="a", tokens=body["tokens"]).json()["prompt"].endswith("assistant:")
    without = served.post("/tokenize", model="a", add_generation_prompt=False, **CHAT).json()
    assert body["tokens"][: without["count"]] == without["tokens"] != body["tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/tokenize", {}, "messages", "give prompt or messages: one of them"),
        ("/tokenize", {"prompt": "x", **CHAT}, "messages", "one of them"),
        ("/tokenize", {"add_special_tokens": True, **CHAT}, "add_special_tokens", "only allowed with prompt"),
        ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt", "with messages"),
        ("/tokenize", {"chat_template": "x", **CHAT}, "chat_template", "not supported"),
        ("/tokenize", {"prompt": "x", "what": 1}, "what", "unknown field"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "<|endoftext|>"}]},
            "messages[0].content",
            "a special token of talker: remove it",
        ),
        ("/detokenize", {}, "tokens", "Field required"),
        ("/detokenize", {"tokens": [1, 320]}, "tokens", "there is no token 320: give ids from 0 to 319."),
        ("/detokenize", {"tokens": [1, "x"]}, "tokens[1]", "valid integer"),
    ],
)
def test_invalid_tokens_are_named(served, path, body, param, message):
    error = error_of(served.post(path, **body), 400)
    assert error["param"] == param
    assert message in error["message"]


def test_tokens_of_unknown_model_are_refused(served):
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": [1]})):
        assert error_of(served.post(path, model="c", **body), 404)["code"] == "model_not_found"


def test_adapter_is_loaded_and_unloaded(start_server, tmp_path):
    with start_server() as served:

        def resident():
            return served.generator.loaded_adapters

        path = start_server.adapters_dir / "a"
        for lora_path in ("a", str(path), f"{path.parent}/b/../a/", None):
            body = {"lora_name": "a", "lora_path": lora_path, "load_inplace": True}
            assert served.post("/v1/load_lora_adapter", **body).status_code == 200
            assert resident() == ["a"]
        text = served.post("/v1/completions", model="a", **GREEDY).json()["choices"]
        assert served.post("/v1/unload_lora_adapter", lora_name="a").status_code == 200
        assert resident() == []
        error_of(served.post("/v1/unload_lora_adapter", lora_name="a"), 404)
        assert served.post("/v1/completions", model="a", **GREEDY).json()["choices"] == text
        assert resident() == ["a"]


def test_only_adapters_of_library_are_loaded(start_server, tmp_path):
    other = shutil.copytree(start_server.adapters_dir / "a", tmp_path / "elsewhere" / "a")
    with start_server() as served:
        for name, path, status, text in (
            ("a", str(other), 400, "lora_path: only adapters of this server's library can be loaded"),
            ("a", "b", 400, "leave it out, or send a."),
            ("a", "/etc/passwd", 400, "only adapters of this server's library"),
            ("elsewhere/a", str(other), 404, "There is no model 'elsewhere/a'"),
            ("../elsewhere/a", None, 404, "There is no model"),
            ("talker", None, 400, "talker is the base, which is always in memory."),
        ):
            error = error_of(served.post("/v1/load_lora_adapter", lora_name=name, lora_path=path), status)
            assert text in error["message"]
            assert str(tmp_path) not in error["message"]
        assert served.generator.loaded_adapters == []


def test_tokens_and_adapters_need_key(start_server):
    with start_server(api_key=KEY) as served:
        for path, body in (
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [1]}),
            ("/v1/load_lora_adapter", {"lora_name": "a"}),
            ("/v1/unload_lora_adapter", {"lora_name": "a"}),
        ):
            error_of(served.post(path, **body), 401)
            headers = {"Authorization": f"Bearer {KEY}"}
            assert httpx.post(f"{served.url}{path}", json=body, headers=headers).status_code == 200


def test_embeddings_are_refused_with_reason(client):
    with pytest.raises(openai.BadRequestError, match="its models give no embeddings"):
        client.embeddings.create(model="a", input="so?")
