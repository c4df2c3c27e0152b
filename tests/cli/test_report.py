"""The command `report`, and `train --report`."""

import json
import os
import shutil
from pathlib import Path

import pytest

from lora_tuner import Library, TrainConfig, train
from lora_tuner.adapters.report import REPORT_FILE, TITLES
from lora_tuner.analysis import forgetting, style_openings
from lora_tuner.data.general_text import general_texts

from .. import tiny_models
from .test_commands import error, run

QUICK = (
    "--device",
    "cpu",
    "--max-steps",
    2,
    "--max-length",
    64,
    "--rank",
    2,
    "--learning-rate",
    0.01,
)


@pytest.fixture(scope="module")
def trained(gpt2, tmp_path_factory):
    """A folder with an adapter, its data, and the cache of its first report."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_TUNER_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        make_quick(patch)
        rows = [json.dumps({"text": text}) + "\n" for text in tiny_models.reviews(120)]
        (folder / "rows.jsonl").write_text("".join(rows))
        config = {
            "dataset": "rows.jsonl",
            "base": str(gpt2),
            "device": "cpu",
            "name": "film",
            "max_steps": 2,
        }
        train(TrainConfig(**config, batch_size=4, max_length=64, rank=2, learning_rate=0.01), None)
        run("report", "film", "--device", "cpu", "--json")
        (folder / "adapters" / "film" / REPORT_FILE).unlink()
    return folder


def make_quick(patch):
    patch.setattr(forgetting, "general_texts", lambda: general_texts(subset=True))
    patch.setattr(style_openings, "NEW_TOKENS", 24)


@pytest.fixture
def film(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("LORA_TUNER_CACHE", str(tmp_path / "cache"))
    make_quick(monkeypatch)
    return Library().get("film")


def test_report_fits_the_terminal(film, columns):
    columns(80)
    result = run("report", "film", "--device", "cpu")
    lines = result.stdout.splitlines()
    assert [line for line in lines if line in TITLES.values()] == [*TITLES.values()]
    assert [line for line in lines if len(line) > 80] == []
    assert lines[-1] == "page: film.report.html"
    assert "This takes about" in result.stderr
    figures = Library().get("film").report
    for _, part in figures.parts():
        assert part.sentences[0] in " ".join(result.stdout.split())
    shown = " ".join(run("adapters", "show", "film").stdout.split())
    assert figures.forgetting.sentences[0] in shown


def test_report_as_json_and_page(film):
    shown = run("report", "film", "--device", "cpu", "--skip", "style", "--json")
    facts = json.loads(shown.stdout)
    assert facts["style"] is None
    assert facts["memorization"]
    assert "page" not in facts
    assert not list(Path().glob("*.html"))
    run(
        "report",
        "film",
        "--device",
        "cpu",
        "--skip",
        "style",
        "--skip",
        "memorization",
        "--html",
        "a.html",
    )
    text = Path("a.html").read_text()
    assert "<h2>Forgetting</h2>" in text
    assert "<h2>Style</h2>" not in text
    Path("mine.html").write_text("<html>mine</html>")
    assert error("report", "film", "--html", "mine.html") == (
        "Error: mine.html exists and is no report: choose another name with --html, or use --overwrite."
    )


def test_unknown_part_is_refused(film):
    assert error("report", "film", "--skip", "beauty") == (
        "Error: --skip beauty: choose from style, memorization, forgetting, growth."
    )


def test_guards_are_measured(film):
    Path("letters.txt").write_text("\n".join(tiny_models.reviews(40, seed=5)))
    options = ("--device", "cpu", "--skip", "style", "--skip", "memorization", "--json")
    facts = json.loads(run("report", "film", *options, "--guard", "letters.txt").stdout)
    assert facts["forgetting"]["guards"]["letters.txt"]["rows"] == 40
    assert "There is no dataset 'none.txt'" in error("report", "film", "--guard", "none.txt")


def test_interrupted_report_names_its_command(film, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(forgetting, "measure_forgetting", interrupt)
    shutil.copytree("adapters", "my library")
    shown = run(
        *("report", "film", "--device", "cpu", "--skip", "style", "--skip", "memorization"),
        *("--adapters-dir", "my library", "--html", "a.html"),
        exit_code=130,
    )
    assert shown.stderr.splitlines()[-1] == (
        "Stopped. What is finished is kept; go on with: python cli.py report film --skip style --skip memorization "
        "--html a.html --adapters-dir 'my library' --device cpu"
    )
    assert not os.path.lexists("a.html")


def test_damaged_report_only_decorates(film):
    (film.path / REPORT_FILE).write_text("{}")
    shown = run("adapters", "show", "film")
    assert "report.json is no report" in shown.stderr
    assert "fingerprint" in shown.stdout
    assert "report.json is no report" in run("adapters", "verify", "film", exit_code=1).stdout


def test_train_ends_with_report(film, gpt2):
    base = ("--base", gpt2, "--dataset", "rows.jsonl")
    shown = run("train", *base, *QUICK, "--name", "other", "--report").stdout
    assert shown.index("held-out loss") < shown.index("\nStyle\n") < shown.index("\nForgetting\n")
    assert Library().get("other").report is not None
    facts = json.loads(run("train", *base, *QUICK, "--name", "third", "--report", "--json").stdout)
    assert facts["report"]["forgetting"]
    for option in ("--plan", "--preview"):
        assert error("train", *base, *QUICK, "--report", option) == (
            "Error: --report is for training: leave it out with --plan and --preview."
        )


def test_sweep_reports_on_recommended_adapter(film, gpt2):
    base = (
        "--base",
        gpt2,
        "--dataset",
        "rows.jsonl",
        "--device",
        "cpu",
        "--max-steps",
        2,
        "--max-length",
        64,
    )
    run("train", *base, "--learning-rate", 0.01, "--rank", "1,2", "--name", "sizes", "--report")
    reported = [name for name, adapter in Library().entries() if adapter.report]
    (result,) = Path("runs").glob("sizes.sweep/sweep.json")
    assert reported == [json.loads(result.read_text())["recommended"]]
