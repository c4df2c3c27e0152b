"""Clients of others ask a server unchanged, each in an environment of its own (tests/clients)."""

import json
import shutil
import subprocess
import venv
from pathlib import Path

import pytest

from ..api_server import GREEDY

CLIENTS = Path(__file__).parents[1] / "clients"
SECONDS = 600


def run(*command, **settings):
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=SECONDS, check=False, **settings
    )


def install(*command, **settings):
    """Install packages, or skip the test: there may be no registry here."""
    if not (program := shutil.which(command[0])):
        pytest.skip(f"{command[0]} is not installed")
    result = run(program, *command[1:], **settings)
    if result.returncode:
        pytest.skip(f"{command[0]} cannot install: {result.stderr.strip().splitlines()[-1:]}")


def ask(served, *command, **settings):
    result = run(*command, f"{served.url}/v1", "a", **settings)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def expected_answers(served, client):
    """Return what the API itself answers."""
    messages = [{"role": "user", "content": "so?"}]
    settings = {"model": "a", "messages": messages, "max_tokens": 16}
    choice = client.chat.completions.create(temperature=0, logprobs=True, **settings).choices[0]
    several = client.chat.completions.create(temperature=1, seed=5, n=2, **settings).choices
    text = client.completions.create(model="a", **GREEDY | {"max_tokens": 16}).choices[0].text
    return {
        "chat": choice.message.content,
        "chat_stream": choice.message.content,
        "text": text,
        "text_stream": text,
        "choices": [choice.message.content for choice in several],
        "tokens": [token.token for token in choice.logprobs.content],
        "response": choice.message.content,
    }


def check(answers, served, client):
    assert "There is no model 'nobody': GET /v1/models lists the models." in answers.pop("error")
    expected = expected_answers(served, client)
    assert answers == {name: expected[name] for name in answers}
    assert len(answers) >= 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "package"),
    [
        ("ask_openai.py", "openai"),
        ("ask_langchain.py", "langchain-openai"),
        ("ask_litellm.py", "litellm"),
        ("ask_llama_index.py", "llama-index-llms-openai-like"),
    ],
)
def test_python_client_is_answered(served, client, tmp_path, script, package):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package)
    check(ask(served, python, CLIENTS / script, cwd=tmp_path), served, client)


@pytest.mark.slow
def test_javascript_client_is_answered(served, client, tmp_path):
    install("npm", "install", "--no-audit", "--no-fund", "openai", cwd=tmp_path)
    shutil.copy(CLIENTS / "ask_openai.mjs", tmp_path)
    check(ask(served, "node", "ask_openai.mjs", cwd=tmp_path), served, client)
