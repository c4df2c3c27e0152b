"""Failures of the Hub, simulated by the local server: one line within the time limits of hub.py, no partial or damaged
files, and the same command works when the Hub works again."""

import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_tuner import ModelOptions
from lora_tuner import hub as hub_module
from lora_tuner.adapters import adapter
from lora_tuner.errors import HubError

from .. import adapter_files, tiny_models
from ..hub_server import Hub, fail, reply
from .process import contents

CLI = Path(__file__).parents[2] / "cli.py"
MODEL, TEXTS, ADAPTER = "owner/model", "owner/texts", "owner/reviews"
TOKEN = "hf_whoEverReadsThisHasIt"
HTML = b"<html><body>Welcome to the guest network</body></html>"


@pytest.fixture(scope="session")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    import datasets

    root = tmp_path_factory.mktemp("hub")
    tiny_models.save_model(root / "model", "llama", seed=5)
    (root / "texts").mkdir()
    datasets.Dataset.from_dict({"text": tiny_models.reviews(60)}).to_parquet(
        str(root / "texts" / "train.parquet")
    )
    adapter_files.write(root / "adapter", facts=adapter_files.manifest(run=None))
    return {
        f"models/{MODEL}": root / "model",
        f"datasets/{TEXTS}": root / "texts",
        f"models/{ADAPTER}": root / "adapter",
    }


def use_hub(url: str, home: str, limits: dict[str, float]) -> None:
    """Use only this hub, with shorter time limits, in the process of a command."""
    import datasets.config
    from huggingface_hub import constants

    from lora_tuner import hub as hub_module

    changes: list[tuple[Any, dict[str, Any]]] = [
        (
            constants,
            {
                "ENDPOINT": url,
                "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
                "HF_HUB_OFFLINE": False,
                "HF_HUB_DISABLE_XET": True,
                "HF_HUB_CACHE": f"{home}/hub",
                "HF_TOKEN_PATH": f"{home}/token",
            },
        ),
        (
            datasets.config,
            {
                "HF_ENDPOINT": url,
                "HF_HUB_OFFLINE": False,
                "HF_DATASETS_CACHE": Path(home, "datasets"),
                "DOWNLOADED_DATASETS_PATH": f"{home}/datasets/downloads",
            },
        ),
        (hub_module, limits),
    ]
    for module, values in changes:
        for name, value in values.items():
            assert hasattr(module, name), name
            setattr(module, name, value)


@pytest.fixture
def hub(repos: dict[str, Path]) -> Any:
    with Hub(repos) as server:
        yield server


@pytest.fixture
def run_command(
    hub: Hub, start: Callable[..., Any], tmp_path: Path, gpt2: Path, reviews_csv: Path
) -> Callable[..., Any]:
    """Run one of the commands that send requests to the Hub."""
    adapter_files.write(tmp_path / "adapters" / "small", facts=adapter_files.manifest(run=None))
    quick = (
        "--max-steps",
        "1",
        "--eval-rows",
        "2",
        "--batch-size",
        "1",
        "--max-length",
        "32",
        "--learning-rate",
        "0.01",
    )
    commands: dict[str, tuple[str | Path, ...]] = {
        "generate": ("generate", "--base", MODEL, "--greedy", "--max-new-tokens", "5", "the actor"),
        "base": ("train", "--base", MODEL, "--dataset", reviews_csv, "--name", "new", *quick),
        "dataset": ("train", "--base", gpt2, "--dataset", TEXTS, "--name", "new", *quick),
        "sweep": ("train", "--base", MODEL, "--dataset", reviews_csv, "--name", "new", "--rank", "2,4", *quick),
        "pull": ("pull", ADAPTER, "--name", "new"),
        "push": ("push", "small", "owner/new"),
    }

    def run(what: str, token: str = TOKEN, **limits: float) -> Any:
        short = {"READ_SECONDS": 1.0, "WRITE_SECONDS": 1.0, "STALLED_SECONDS": 1.5} | limits
        before = functools.partial(use_hub, hub.url, str(tmp_path / ".home"), short)
        return start(*commands[what], before=before, env={"HF_TOKEN": token}).end()

    return run


def requests_file(handler: BaseHTTPRequestHandler) -> bool:
    return "/resolve/" in handler.path and handler.command == "GET"


def requests_large_file(handler: BaseHTTPRequestHandler) -> bool:
    return requests_file(handler) and handler.path.endswith((".safetensors", ".parquet"))


def front_page(handler: BaseHTTPRequestHandler) -> bool:
    return handler.path == "/"


Fault = Callable[[Hub, BaseHTTPRequestHandler], bool]


def everywhere(play: Callable[[Hub, BaseHTTPRequestHandler], Any]) -> Fault:
    """Fail all requests but those for the front page, so that the Hub counts as reachable."""
    return lambda hub, handler: not front_page(handler) and bool([play(hub, handler)])


def where(
    matches: Callable[[BaseHTTPRequestHandler], bool], play: Callable[[Hub, BaseHTTPRequestHandler], Any]
) -> Fault:
    return lambda hub, handler: matches(handler) and bool([play(hub, handler)])


def begin(hub: Hub, handler: BaseHTTPRequestHandler) -> bytes:
    """Send the headers of a file of the hub and return its body."""
    name = handler.path.partition("?")[0].rpartition("/")[2]
    body = next(repo.files[name].read_bytes() for repo in hub.repos.values() if name in repo.files)
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    return body


def half_then(
    more: Callable[[Hub, BaseHTTPRequestHandler], None],
) -> Callable[[Hub, BaseHTTPRequestHandler], None]:
    def play(hub: Hub, handler: BaseHTTPRequestHandler) -> None:
        body = begin(hub, handler)
        handler.wfile.write(body[: len(body) // 2])
        handler.wfile.flush()
        more(hub, handler)

    return play


def drip(hub: Hub, handler: BaseHTTPRequestHandler) -> None:
    for byte in begin(hub, handler):
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        if hub.closed.wait(0.1):
            return


def another_file(hub: Hub, handler: BaseHTTPRequestHandler) -> None:
    body = begin(hub, handler)
    handler.wfile.write(body[:-1] + bytes([body[-1] ^ 1]))


def redirect(hub: Hub, handler: BaseHTTPRequestHandler) -> None:
    reply(handler, 302, b"", {"Location": f"{hub.url}{handler.path}"})


def html(hub: Hub, handler: BaseHTTPRequestHandler) -> None:
    reply(handler, 200, HTML, {"Content-Type": "text/html"})


def status(number: int, **headers: str) -> Callable[[Hub, BaseHTTPRequestHandler], None]:
    return lambda hub, handler: reply(handler, number, {"error": "no"}, headers)


GATED = everywhere(lambda hub, handler: fail(handler, 403, "GatedRepo", "ask for access"))
LOGIN = "run `hf auth login`"
PORTAL = "whether this network requires a login"
FAULTS: dict[str, tuple[Fault, str]] = {
    "silent": (everywhere(lambda hub, _: hub.closed.wait(60)), "Try again"),
    "silent within a file": (
        where(requests_large_file, half_then(lambda hub, _: hub.closed.wait(60))),
        "Try again",
    ),
    "drip": (where(requests_large_file, drip), "almost nothing arrived for 1.5 seconds"),
    "cut off": (where(requests_large_file, half_then(lambda hub, _: None)), "Try again"),
    "another file": (
        where(requests_large_file, another_file),
        "1 damaged file(s) with a wrong hash deleted. Try again.",
    ),
    "a page in place of a file": (where(requests_file, html), ""),
    "a page in place of all": (everywhere(html), PORTAL),
    "redirects": (everywhere(redirect), "it redirects without end"),
    "gated": (GATED, "is gated: accept its terms on its Hub page, then run `hf auth login`."),
    "401": (everywhere(status(401)), "`hf auth login`"),
    "403": (everywhere(status(403)), "403 Forbidden"),
    "404": (everywhere(status(404)), ""),
    "429": (
        everywhere(status(429, **{"Retry-After": "3600"})),
        "too many requests. Try again after 3600 seconds",
    ),
    "500": (everywhere(status(500)), "it answers with status 500. Try again later."),
    "503": (everywhere(status(503, **{"Retry-After": "3600"})), "status 503. Try again after 3600 seconds."),
}
REPO = {"generate": MODEL, "base": MODEL, "sweep": MODEL, "dataset": TEXTS, "pull": ADAPTER, "push": "owner/new"}
QUICK = {("sweep", "429"), ("push", "500")}
CASES = [(what, how) for what in ("generate", "dataset", "pull") for how in FAULTS]
CASES += [("base", how) for how in ("silent within a file", "another file", "gated", "429")]
CASES += [("sweep", how) for how in ("cut off", "429")]  # `generate` downloads it too
CASES += [
    ("push", how) for how in ("silent", "a page in place of all", "redirects", "401", "403", "429", "500", "503")
]


@pytest.mark.parametrize(
    ("what", "how"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(case)) for case in CASES],
)
def test_failing_hub_leaves_nothing(
    hub: Hub, run_command: Callable[..., Any], tmp_path: Path, what: str, how: str
) -> None:
    fault, expected = FAULTS[how]
    if what == "push" and how in ("401", "403"):
        expected = f"no permission to write to owner/new: {LOGIN}"
    before = contents(tmp_path / "adapters")
    hub.fault = lambda handler: fault(hub, handler)
    failed = run_command(what)
    assert failed.status == 1, failed.err
    assert REPO[what] in failed.line
    assert expected in failed.line, failed.line
    assert failed.seconds < 60
    assert "in place of" not in failed.err
    assert contents(tmp_path / "adapters") == before
    hub.fault = None
    done = run_command(what, STALLED_SECONDS=30.0, READ_SECONDS=10.0, WRITE_SECONDS=10.0)
    assert done.status == 0, done.err
    _check_transfer(hub, tmp_path, what, done)


def _check_transfer(hub: Hub, root: Path, what: str, done: Any) -> None:
    """Compare what the command downloaded or uploaded with what the Hub has."""
    if what == "pull":
        files = hub.repos[f"models/{ADAPTER}"].files
        assert {p.name: p.read_bytes() for p in (root / "adapters" / "new").iterdir()} == {
            name: path.read_bytes() for name, path in files.items()
        }
    elif what == "push":
        assert (
            hub.repos["models/owner/new"].files[adapter.WEIGHTS_FILE].read_bytes()
            == (root / "adapters" / "small" / adapter.WEIGHTS_FILE).read_bytes()
        )
    elif what == "generate":
        from lora_tuner import Generator, SamplingParams

        folder = hub.repos[f"models/{MODEL}"].files["config.json"].parent
        greedy = SamplingParams(greedy=True, max_new_tokens=5)
        text = Generator(options=ModelOptions(base=str(folder), device="cpu")).generate("the actor", greedy).text
        assert done.out == f"the actor{text}\n"
    else:
        name = "new-r4" if what == "sweep" else "new"
        facts = json.loads((root / "adapters" / name / adapter.MANIFEST_FILE).read_text())
        if what in ("base", "sweep"):
            assert facts["base"]["repo"] == MODEL
        else:
            assert facts["data"]["source"] == TEXTS
            assert facts["data"]["counts"]["read"] == 60


def test_partial_download_is_not_used(hub: Hub, run_command: Callable[..., Any]) -> None:
    """All but one small file arrived, and then the Hub is unreachable."""
    hub.fault = lambda handler: (
        requests_file(handler) and "generation_config" in handler.path and _hang_up(handler)
    )
    assert run_command("generate").status == 1
    hub.fault = lambda handler: bool([reply(handler, 503)])
    failed = run_command("generate")
    assert failed.status == 1
    assert f"{MODEL} is not cached, and the Hub is out of reach" in failed.line


def _hang_up(handler: BaseHTTPRequestHandler) -> bool:
    handler.close_connection = True
    return True


def test_cached_model_used_without_hub(hub: Hub, run_command: Callable[..., Any]) -> None:
    first = run_command("generate")
    assert first.status == 0, first.err
    hub.fault = lambda handler: bool([reply(handler, 503)])
    requests = len(hub.requests)
    assert run_command("generate").out == first.out
    assert len(hub.requests) == requests


@pytest.mark.parametrize(
    "what",
    ["pull", *(pytest.param(name, marks=pytest.mark.slow) for name in ("generate", "base", "dataset", "push"))],
)
def test_token_never_printed_or_stored(
    hub: Hub, run_command: Callable[..., Any], tmp_path: Path, what: str
) -> None:
    warning = {"X-HF-Warning": f"token; {TOKEN} is old"}
    answers = [
        lambda handler: fail(handler, 403, "", f"the token {TOKEN} is not enough"),
        lambda handler: reply(
            handler, 401, {"error": f"Invalid token {TOKEN}"}, {"X-Error-Message": f"bad {TOKEN}"}
        ),
        lambda handler: reply(handler, 400, {"error": f"{TOKEN}?"}, warning),
        lambda handler: reply(handler, 302, b"", {"Location": f"{hub.url}/{TOKEN}{handler.path}"[:900]}),
    ]
    printed = ""
    for answer in answers:
        hub.fault = lambda handler, answer=answer: not front_page(handler) and bool([answer(handler)])
        failed = run_command(what)
        assert failed.status == 1
        printed += failed.out + failed.err
    hub.fault = None
    done = run_command(what)
    assert done.status == 0, done.err
    assert TOKEN not in printed + done.out + done.err
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not [path for path, content in kept.items() if TOKEN.encode() in content]
    assert not [
        name
        for repo in hub.repos.values()
        for name, path in repo.files.items()
        if TOKEN.encode() in path.read_bytes()
    ]


@pytest.mark.slow
def test_default_time_limits_hold(hub: Hub, tmp_path: Path) -> None:
    """Run a command with the default limits against a Hub that stops within a file."""
    fault, _ = FAULTS["silent within a file"]
    hub.fault = lambda handler: fault(hub, handler)
    env = hub.env(tmp_path / "home") | {"LORA_TUNER_CACHE": str(tmp_path / "own"), "HF_TOKEN": TOKEN}
    command = [sys.executable, str(CLI), "generate", "--base", MODEL, "the actor"]
    begun = time.monotonic()
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"Error: {MODEL} could not be fetched from the Hub: ")
    assert time.monotonic() - begun < 120
    hub.fault = None
    shutil.rmtree(tmp_path / "own", ignore_errors=True)
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_slow_commit_succeeds(hub: Hub, run_command: Callable[..., Any]) -> None:
    hub.fault = lambda handler: "/commit/" in handler.path and hub.closed.wait(3)
    done = run_command("push", WRITE_SECONDS=30.0)
    assert done.status == 0, done.err
    assert "models/owner/new" in hub.repos


@pytest.mark.parametrize("repo", ["**", "owner/[a", "a/b/c", "owner/"])
def test_invalid_repo_name_is_refused(hub: Hub, start: Callable[..., Any], tmp_path: Path, repo: str) -> None:
    before = functools.partial(use_hub, hub.url, str(tmp_path / ".home"), {})
    refused = start("pull", repo, "--name", "new", before=before).end()
    assert (refused.status, refused.line) == (
        1,
        f"Error: '{repo}' is neither a local folder nor a Hub id (owner/name).",
    )


def test_pause_between_requests_is_no_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    """hf_xet downloads requests_large_file files by itself; the next request follows when it is done."""
    now = [100.0]
    monkeypatch.setattr("lora_tuner.hub.time", SimpleNamespace(monotonic=lambda: now[0]))
    limits, request = hub_module.RequestLimits(), SimpleNamespace(method="GET", headers={}, extensions={})
    with limits.limited():
        limits.before(request)
        now[0] += 2 * hub_module.STALLED_SECONDS
        for _ in range(3):  # requests without any response are a stall
            limits.before(request)
            now[0] += hub_module.READ_SECONDS + 0.1
        with pytest.raises(HubError, match="almost nothing arrived for 30 seconds"):
            limits.before(request)
