"""Ask a server of OpenAI's API for the likeliest next tokens after a prompt. No torch."""

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any

from ..errors import ConfigError
from ..text import format_names, shorten

Tokens = Mapping[str, float]  # text of a token -> log-probability in nats
TOP_LOGPROBS = 5  # OpenAI's limit for completions
TIMEOUT = 120.0  # seconds: the first answer may have to wait for the adapter to be loaded
MAX_BYTES = 4_000_000


class NoAnswerError(Exception):
    """An endpoint has not answered. The text is a clause."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Follow no redirect: it would take the key to another host."""


def endpoint(*, chat: bool) -> str:
    return "chat/completions" if chat else "completions"


class Server:
    """A server of OpenAI's API.

    Args:
        url: its address, with /v1.
        model: sent with each request.
        api_key: sent too.

    Raises:
        ConfigError: the address is none of HTTP.
    """

    def __init__(self, url: str, model: str, api_key: str | None) -> None:
        if not url.startswith(("http://", "https://")):
            example = "http://localhost:8000/v1"
            raise ConfigError(f"--url {url}: give the address of the API, such as {example}.")
        self.url, self.model = url.rstrip("/"), model
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._opener = urllib.request.build_opener(_NoRedirect)

    def next_tokens(self, prompt: str, *, chat: bool) -> Tokens:
        """Return the likeliest next tokens after a prompt; none where the server does not name them.

        Args:
            prompt: text to continue.
            chat: send it as a user's message instead.

        Raises:
            ConfigError: no server answers, it refuses the key, or does not know the model.
            NoAnswerError: it refuses the request.
        """
        path = endpoint(chat=chat)
        body: dict[str, object] = {"model": self.model, "max_tokens": 1, "temperature": 0}
        if chat:
            body["messages"] = [{"role": "user", "content": prompt}]
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        else:
            body |= {"prompt": prompt, "logprobs": TOP_LOGPROBS}
        status, answer = self._request(path, body)
        if status in (401, 403):
            problem = f"{self.url} refuses the key (status {status})"
            raise ConfigError(f"{problem}: give the right one with --api-key.")
        if status != 200:
            self._check_model()
            problem = f"answers with status {status} ({_message(answer)})"
            raise NoAnswerError(f"/{path} {problem}")
        return read_tokens(answer)

    def _check_model(self) -> None:
        """Raise ConfigError if the server lists models, and not this one."""
        _, answer = self._request("models")
        try:
            names = [str(entry["id"]) for entry in answer["data"]]
        except (LookupError, TypeError):
            return
        if names and self.model not in names:
            raise ConfigError(
                f"{self.url} has no model {self.model}: it lists {format_names(names[:20])}. Name "
                "the adapter as it is called there with --model."
            )

    def _request(self, path: str, body: object = None) -> tuple[int, Any]:
        """Return status and JSON of an answer; None for what is no JSON."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.url}/{path}", data, self._headers)
            with self._opener.open(request, timeout=TIMEOUT) as response:
                status, content = response.status, response.read(MAX_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                status, content = error.code, error.read(MAX_BYTES)
        except (OSError, ValueError, HTTPException) as error:
            problem = getattr(error, "reason", None) or error
            raise ConfigError(
                f"No server answers at {self.url} ({problem}): is it running, and is the address right?"
            ) from error
        try:
            return status, json.loads(content)
        except (ValueError, RecursionError):
            return status, None


def _message(answer: object) -> str:
    """The text of an error, as far as it is known."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    text = error.get("message", error) if isinstance(error, dict) else error
    return shorten(" ".join(str(text or "no reason given").split()), 200)


def read_tokens(answer: Any) -> Tokens:
    """The likeliest first tokens, of either endpoint's form; none if they are missing.

    llama.cpp gives those of completions in the form of chats.
    """
    try:
        logprobs = answer["choices"][0]["logprobs"]
        if logprobs.get("content"):
            first = logprobs["content"][0]
            entries = first.get("top_logprobs") or [first]
            pairs = [(each["token"], each["logprob"]) for each in entries]
        else:
            pairs = [*logprobs["top_logprobs"][0].items()]
        tokens = {str(text): min(float(logprob), 0.0) for text, logprob in pairs}
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}
    # Parts of characters have another spelling in each server.
    return {
        text: logprob
        for text, logprob in tokens.items()
        if text and "\ufffd" not in text and not text.startswith("bytes:") and logprob > -100
    }
