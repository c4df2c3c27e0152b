"""Tables of adapters and results: in notebooks as HTML, with the texts that the terminal shows."""

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lora_tuner import (
    Classification,
    EvalSet,
    GainMatrix,
    GenerationOutput,
    Library,
    RunEstimate,
    SweepResult,
)
from lora_tuner.adapters.adapter import MANIFEST_FILE, WEIGHTS_FILE, load_adapter_folder
from lora_tuner.adapters.manifest import EvalResult, Manifest
from lora_tuner.adapters.report import REPORT_FILE
from lora_tuner.adapters.samples import SAMPLES_FILE, Sample, write_samples
from lora_tuner.adapters.summaries import Table, to_html
from lora_tuner.cli.display import print_parts
from lora_tuner.cli.evaluate import show_gains
from lora_tuner.training.sweep_result import Trial

from .. import adapter_files

EVIL = "<script>alert(1)</script>$x$&amp;\x1b[5m"
SHOWN = "<script>alert(1)</script>$x$&amp;\ufffd[5m"
RESULT = EvalResult(base_loss=3.75, loss=3.5, gain=0.25, standard_error=0.0125, rows=200, tokens=40_000)


class Page(HTMLParser):
    """Tags and texts of a page: a text of a cell or paragraph each."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.texts = set[str](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag in ("th", "td", "p"):
            self.texts.append("")
        elif tag == "br":
            self.texts[-1] += "\n"

    def handle_data(self, text):
        self.texts[-1] += text


def estimate(**changes):
    return RunEstimate(
        **{
            "steps": 40,
            "steps_per_epoch": 120,
            "advice": "Too many passes.",
            "seconds_per_step": 1.5,
            "training_seconds": 60.0,
            "learning_rate": 1e-3,
            "learning_rate_origin": "the default",
            "probe_steps": 0,
            "probe_seconds": 0.0,
            "reference_seconds": 0.0,
            "held_out_seconds": 20.0,
            "peak_memory_bytes": 900_000_000,
            "tokens_per_second": 300.0,
            "used_share": 0.9,
            "truncated_rows": 3,
            "coverage": 1.0,
            "not_adapted": [],
            "trained_parameters": 1_000,
            "base_parameters": 99_000,
            "adapter_bytes": 4_000,
            "dtype": "float32",
            "load_in": "full",
            "gradient_checkpointing": False,
        }
        | changes
    )


def sweep(*trials, **changes):
    return SweepResult("s", 3.75, [*trials], "s-r2", Path("adapters/s-r2"), Path("runs/s.sweep"), **changes)


TRIALS = Trial("s-r2", 2, 1e-3, 3.5, 1_000_000, 60.0, standard_error=0.01), Trial("s-r8", 8, 1e-3)
MATRIX = GainMatrix(
    "base", ["a", "b"], [EvalSet("a", ["x", "y"]), EvalSet("b", [], "gone")], [[RESULT, None]] * 2
)


@pytest.mark.parametrize(
    "result",
    [
        Classification("bad", {"good": 0.25, "bad": 0.75}),
        estimate(),
        estimate(probe_steps=9, reference_seconds=3.0),
        sweep(*TRIALS),
        sweep(*TRIALS, base_accuracy=0.5),
    ],
)
def test_notebook_shows_the_terminals_texts(result, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    print_parts(result.summary())
    printed = re.split(r" {2,}| *\n", capsys.readouterr().out)
    assert [*filter(None, Page(result._repr_html_()).texts)] == [*filter(None, printed)]


def test_gains_are_the_terminals(capsys):
    show_gains(MATRIX)
    output = capsys.readouterr()
    printed = re.split(r" {2,}| *\n", output.out + output.err)
    texts = "\n".join(Page(MATRIX._repr_html_()).texts).split("\n")
    assert sorted(filter(None, texts)) == sorted(filter(None, printed))


@pytest.fixture
def evil(tmp_path):
    """An adapter with hostile text in every text field of its manifest, and in its samples."""
    facts = adapter_files.manifest(weights=None).model_dump()
    facts["base"] |= dict.fromkeys(("name", "repo", "weights"), EVIL)
    facts["data"] |= {"source": EVIL, "where": [EVIL], "template": EVIL, "counts": {EVIL: 3}}
    facts["run"] |= {"device": EVIL, "advice": EVIL}
    facts["parents"] = [{"name": EVIL, "sha256": "ab" * 32}]
    folder = adapter_files.write(tmp_path / "adapters" / "evil", facts=Manifest.model_validate(facts))
    write_samples([Sample(step=30, prompt=EVIL, base=EVIL, adapter=f"a\n{EVIL}")], folder / SAMPLES_FILE)
    return load_adapter_folder(folder)


def test_adapter_texts_are_escaped(evil):
    html = evil._repr_html_()
    page = Page(html)
    assert page.tags <= {"table", "tr", "th", "td", "p", "br"}
    assert f"{SHOWN} ({SHOWN})" in page.texts
    assert page.texts[-3:] == [SHOWN, SHOWN, f"a\n{SHOWN}"]
    assert html.count("mathjax_ignore") == html.count("<table") + html.count("<p")
    assert "color" not in html  # those of the theme, light or dark
    assert Page(Library(evil.path.parent)._repr_html_()).tags <= {"table", "tr", "th", "td"}


@pytest.mark.parametrize(
    "result",
    [
        estimate(advice=EVIL, learning_rate_origin=EVIL, not_adapted=[EVIL]),
        sweep(replace(TRIALS[0], name=EVIL)),
        GainMatrix(EVIL, [EVIL], [EvalSet(EVIL, ["x", "y"]), EvalSet(EVIL, [], EVIL)], [[RESULT, None]]),
        Classification(EVIL, {EVIL: 1.0}),
        GenerationOutput(EVIL, EVIL, EVIL, 3, "stop", 1, False),
    ],
)
def test_names_and_texts_are_escaped(result):
    page = Page(result._repr_html_())
    assert page.tags <= {"table", "tr", "th", "td", "p", "br"}
    assert any(SHOWN in text for text in page.texts)


def test_adapter_shows_summary_and_samples(tmp_path):
    folder = adapter_files.write(tmp_path / "noir", facts=adapter_files.manifest())
    samples = [Sample(step=step, prompt="Acting", base=" was", adapter=f" is {step}") for step in (0, 30)]
    write_samples(samples, folder / SAMPLES_FILE)
    adapter = load_adapter_folder(folder)
    rows = [text for row in adapter.summary_rows() for text in row]
    assert Page(adapter._repr_html_()).texts == [
        "noir",
        *rows,
        *("Prompt", "Base", "Adapter"),
        *("Acting", " was", " is 30"),
    ]
    assert "tensors" not in repr(adapter)
    assert "rows=" not in repr(EvalSet("a", ["secret"]))
    assert "secret" not in repr(EvalSet("a", ["secret"]))


@pytest.mark.parametrize("file", [SAMPLES_FILE, REPORT_FILE, WEIGHTS_FILE, MANIFEST_FILE])
def test_damaged_adapter_shows_message(tmp_path, file):
    folder = adapter_files.write(tmp_path / "noir", facts=adapter_files.manifest())
    adapter = load_adapter_folder(folder)
    (folder / file).write_text("{")
    *_, message = Page(adapter._repr_html_()).texts
    assert str(folder / file) in message
    assert Page(adapter._repr_html_()).texts[:2] == ["noir", "Base"]


def test_library_tells_broken_adapter(tmp_path):
    library = Library(tmp_path / "adapters")
    assert "No adapters" in library._repr_html_()
    (adapter_files.write(library.path / "noir") / WEIGHTS_FILE).write_text("{")
    assert "noir is broken" in library._repr_html_()
    assert "is not a folder" in Library(library.path / "noir" / WEIGHTS_FILE)._repr_html_()


def test_error_replaces_the_rest():
    def parts():
        yield Table([("a", "1")])
        raise KeyError(EVIL)

    page = Page(to_html(parts()))
    assert page.texts[:2] == ["a", "1"]
    assert "script" not in page.tags


def test_showing_adapter_loads_no_torch(tmp_path):
    adapter_files.write(tmp_path / "adapters" / "noir", facts=adapter_files.manifest())
    code = (
        "import sys, lora_tuner; html = lora_tuner.Library().get('noir')._repr_html_(); "
        "assert 'Held-out loss' in html; print({'torch', 'transformers', 'IPython'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")
