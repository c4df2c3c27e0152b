"""`adapters check --url`: six sabotages have their names, and no server that uses the adapter is accused."""

import contextlib
import json
import math
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from safetensors.torch import load_file, save_file

from lora_tuner import Library, ModelOptions
from lora_tuner.adapters.adapter import CONFIG_FILE, MANIFEST_FILE
from lora_tuner.adapters.manifest import Probe
from lora_tuner.analysis.openai_client import read_tokens
from lora_tuner.analysis.server_check import check_server, compare
from lora_tuner.convert.remeasure import remeasure
from lora_tuner.errors import AdapterError, ConfigError
from lora_tuner.models.resolve import find_base
from lora_tuner.models.tokenizer import TokenizedBase, load_tokenizer

from .. import tiny_models
from ..api_server import TEMPLATE, serving, write_adapter
from ..cli.test_commands import error, run

OTHER_TEMPLATE = "{% for message in messages %}<<{{ message.content }}>>{% endfor %}"
SCALES = {"loud": 2.0, "quiet": 0.5}


def copy_scaled(folder, name, scale):
    """Copy an adapter whose alpha is another one, which nothing on disk tells."""
    copy = shutil.copytree(folder, folder.parent / name)
    config = json.loads((copy / CONFIG_FILE).read_text())
    (copy / CONFIG_FILE).write_text(json.dumps(config | {"lora_alpha": scale * config["lora_alpha"]}))
    return copy


def without_manifest(folder, library):
    """Copy an adapter that any base of these sizes takes."""
    copy = shutil.copytree(folder, library / folder.name)
    (copy / MANIFEST_FILE).unlink()
    return library


def save_talker(folder, seed=0, template=TEMPLATE):
    """Save a tiny GPT-2 that is sure of its next tokens, with a chat template."""
    tiny_models.save_model(folder, "gpt2", seed)
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.weight"] *= 8
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_talker(tmp_path_factory.mktemp("bases") / "talker")


@pytest.fixture(scope="module")
def library(base, tmp_path_factory):
    """Two adapters with probes, one for conversations, and copies at another scale."""
    library = Library(tmp_path_factory.mktemp("library"))
    files = find_base(str(base))
    chat = TokenizedBase(files, load_tokenizer(files)).info(with_template=True).model_dump()
    write_adapter(library.path, "a", base, 0, chat)
    write_adapter(library.path, "b", base, 1)
    options = ModelOptions(base=str(base), device="cpu", dtype="float32")
    remeasure([library.get("a"), library.get("b")], options)
    for name, scale in SCALES.items():
        copy_scaled(library.path / "a", name, scale)
    return library


@pytest.fixture(scope="module")
def url(base, library):
    with serving(base, library.path) as served:
        yield f"{served.url}/v1"


def others(library):
    return [library.get("a"), library.get("b")]


def test_server_that_uses_adapter_passes(url, library):
    for name in ("a", "b"):
        check = check_server(library.get(name), url, others=others(library))
        assert check.verdict == "the adapter"
        for comparison in filter(None, (check.text, check.chat)):
            assert comparison.distances["adapter"] < 1e-3
            assert comparison.scale == 1.0
            assert comparison.span > 1


def test_base_under_adapter_name_is_named(url, library):
    for name in ("a", "b"):
        check = check_server(library.get(name), url, model="talker", others=others(library))
        assert check.verdict == "the base"
        assert check.text.distances["base"] < 1e-3


def test_other_adapter_is_named(url, library):
    for name, served in (("a", "b"), ("b", "a")):
        check = check_server(library.get(name), url, model=served, others=others(library))
        assert (check.verdict, check.other) == ("another adapter", served)
        assert check_server(library.get(name), url, model=served).verdict == "unknown"


@pytest.mark.parametrize("name", SCALES)
def test_wrong_scale_is_estimated(url, library, name):
    check = check_server(library.get("a"), url, model=name, others=others(library))
    assert (check.verdict, check.scale) == ("a wrong scale", SCALES[name])


def test_wrong_template_is_named(library, tmp_path):
    other = save_talker(tmp_path / "talker", template=OTHER_TEMPLATE)
    with serving(other, without_manifest(library.path / "a", tmp_path / "served")) as served:
        check = check_server(library.get("a"), f"{served.url}/v1", others=others(library))
    assert check.verdict == "a wrong template"
    assert check.text.distances["adapter"] < 1e-3
    assert check.chat.distances["adapter"] > 0.1


def test_other_base_is_unknown(library, tmp_path):
    other = save_talker(tmp_path / "talker", seed=5)
    with serving(other, without_manifest(library.path / "a", tmp_path / "served")) as served:
        check = check_server(library.get("a"), f"{served.url}/v1", others=others(library))
    assert check.verdict == "unknown"
    assert "another base" in check.reason


def test_check_command_prints_verdict(url, library, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    where = ("--adapters-dir", library.path)
    out = run("adapters", "check", "a", "--url", url, *where).stdout
    assert out.startswith(f"a at {url}: the adapter\n")
    assert max(map(len, out.splitlines())) <= 80
    found = json.loads(run("adapters", "check", "a", "--url", url, "--json", *where).stdout)
    assert (found["verdict"], found["text"]["probes"], found["chat"]["probes"]) == ("the adapter", 4, 4)
    assert "talker" in error("adapters", "check", "a", "--url", url, "--model", "nobody", *where)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Error: Give one of --for TOOL"),
        (["--for", "vllm", "--url", "http://127.0.0.1:9/v1"], "Error: Give one of --for TOOL"),
        (["--for", "vllm", "--model", "a"], "Error: --model and --api-key belong to --url: leave them out."),
        (["--url", "ftp://host/v1"], "Error: --url ftp://host/v1: give the address of the API, such as"),
        (["--url", "http://127.0.0.1:9/v1"], "Error: No server answers at http://127.0.0.1:9/v1 ("),
        (["--url", "http://[::1/v1"], "Error: No server answers at http://[::1/v1 ("),
    ],
)
def test_check_command_errors(library, options, message):
    assert error("adapters", "check", "a", *options, "--adapters-dir", library.path).startswith(message)


def test_adapter_without_probes_is_refused(base, tmp_path):
    library = Library(tmp_path)
    write_adapter(tmp_path, "old", base, 0)
    text = r"^old has no probes: measure them with `evaluate old --probes`\.$"
    with pytest.raises(AdapterError, match=text):
        check_server(library.get("old"), "http://127.0.0.1:9/v1")


# Other servers: forms of answers, and errors


@contextlib.contextmanager
def answering(status, body, models=("a", "b")):
    """A server that gives each POST the same answer. Yields its address, and the headers of requests."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, body):
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self):
            seen.append(dict(self.headers))
            self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(status, body)

        def do_GET(self):
            self.reply(200, {"data": [{"id": name} for name in models]})

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


PAIRS = {" a": -0.5, " b": -1.5}
OF_COMPLETIONS = {"choices": [{"logprobs": {"top_logprobs": [PAIRS]}}]}
LISTED = [{"token": text, "logprob": logprob} for text, logprob in PAIRS.items()]
OF_CHATS = {"choices": [{"logprobs": {"content": [{"token": " a", "logprob": -0.5, "top_logprobs": LISTED}]}}]}


@pytest.mark.parametrize("answer", [OF_COMPLETIONS, OF_CHATS])
def test_both_forms_of_logprobs_are_read(answer):
    assert read_tokens(answer) == PAIRS


@pytest.mark.parametrize(
    "answer",
    [
        None, [], {"choices": []}, {"choices": [{"text": "a"}]}, {"choices": [{"logprobs": None}]},
        {"choices": [{"logprobs": {"top_logprobs": [], "content": None}}]},
        {"choices": [{"logprobs": {"top_logprobs": [{"\ufffd": -1.0, "": -1.0, "bytes:\\xe2": -1.0}]}}]},
        {"choices": [{"logprobs": {"top_logprobs": [{" a": "much"}]}}]},
    ],
)  # fmt: skip
def test_server_without_logprobs_is_unknown(library, answer):
    with answering(200, answer) as (url, _):
        check = check_server(library.get("a"), url, others=others(library))
    assert (check.verdict, check.text, check.chat) == ("unknown", None, None)
    assert "/completions gives no log-probabilities" in check.reason


def test_unknown_model_lists_those_of_server(library):
    with (
        answering(404, {"error": {"message": "no such model"}}, ["x", "y"]) as (url, _),
        pytest.raises(ConfigError, match=r"has no model a: it lists x, y\. Name the adapter as it is called"),
    ):
        check_server(library.get("a"), url)


def test_refused_key_is_named(library):
    with (
        answering(401, {"error": "no"}) as (url, seen),
        pytest.raises(ConfigError, match=r"refuses the key \(status 401\): give the right one with --api-key"),
    ):
        check_server(library.get("a"), url, api_key="secret")
    assert seen[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(("status", "reason"), [(302, "status 302"), (500, r"status 500 \(it is broken\)")])
def test_failing_server_is_unknown(library, status, reason):
    with answering(status, {"error": {"message": "it is broken"}}) as (url, _):
        check = check_server(library.get("b"), url)
    assert check.verdict == "unknown"
    assert re.search(reason, check.reason)


# Figures


def probe(base, adapter):
    half, double = (
        {text: base[text] + scale * (adapter[text] - base[text]) for text in base} for scale in (0.5, 2)
    )
    return Probe(prompt="x", base=base, half=normal(half), adapter=adapter, double=normal(double))


def normal(table):
    total = math.log(sum(map(math.exp, table.values())))
    return {text: min(logprob - total, 0.0) for text, logprob in table.items()}


BASE, ADAPTER = normal({" a": -0.2, " b": -2.0, " c": -3.0}), normal({" a": -3.0, " b": -0.3, " c": -2.5})


def test_distance_is_divergence():
    comparison = compare([probe(BASE, ADAPTER)], [BASE])
    expected = sum(math.exp(BASE[text]) * (BASE[text] - ADAPTER[text]) for text in BASE)
    assert comparison.distances["adapter"] == pytest.approx(expected, abs=1e-6)
    assert comparison.distances["base"] == pytest.approx(0, abs=1e-6)
    assert comparison.span == comparison.distances["adapter"]


def test_scale_between_tables_is_estimated():
    for scale in (0.3, 0.7, 1.5):
        answer = normal({text: BASE[text] + scale * (ADAPTER[text] - BASE[text]) for text in BASE})
        assert compare([probe(BASE, ADAPTER)], [answer]).scale == pytest.approx(scale, abs=0.11)


def test_tokens_without_their_space_are_known():
    answer = {text.strip(): logprob for text, logprob in ADAPTER.items()}
    assert compare([probe(BASE, ADAPTER)], [answer]).distances["adapter"] == pytest.approx(0, abs=1e-6)


def test_adapter_like_its_base_is_unknown():
    assert compare([probe(BASE, BASE)], [BASE]).verdict is None
