"""evaluate: the gain matrix, its figures and its plot."""

import json
import re
from pathlib import Path

import pytest

from lora_tuner import EvalSet, GainMatrix, Library, ModelOptions, evaluate
from lora_tuner.adapters import plots
from lora_tuner.adapters.manifest import EvalResult
from lora_tuner.cli.evaluate import show_gains
from lora_tuner.text import format_gain

from .. import tiny_models
from .test_commands import error, other_base, run
from .test_compare import flat


def loss(cell):
    return f"{cell['loss']:.2f} ({cell['perplexity']:.2f})"


def gain(cell):
    return format_gain(cell["gain"], cell["standard_error"], "+.2f")


def test_evaluate_output(two, gpt2, columns):
    columns(150)
    facts = json.loads(run("evaluate", "noir", "verse", "--json").stdout)
    assert facts == json.loads(json.dumps(evaluate(two, options=ModelOptions(device="cpu")).to_dict()))
    (first, second), (third, fourth) = (row["results"] for row in facts["adapters"])
    base = [
        f"{cell['base_loss']:.2f} ({EvalResult(**_figures(cell)).perplexities[0]:.2f})"
        for cell in (first, second)
    ]
    shown = [line.rstrip() for line in run("evaluate", "noir", "verse").stdout.splitlines()]
    assert [re.split(r" {2,}", line) for line in shown] == [
        ["held-out loss (perplexity) on each held-out set"],
        ["", "noir", "verse"],
        ["", "6 rows", "7 rows"],
        ["(base)", *base],
        ["noir", loss(first), loss(second)],
        ["verse", loss(third), loss(fourth)],
        [""],
        [f"gain over {gpt2.name} (loss, ± standard error)"],
        ["below zero: worse than the base; 0.69: each token twice as likely"],
        ["", "noir", "verse"],
        ["", "6 rows", "7 rows"],
        ["noir", gain(first), gain(second)],
        ["verse", gain(third), gain(fourth)],
    ]


def _figures(cell):
    return {name: value for name, value in cell.items() if name != "perplexity"}


def test_evaluate_on_narrow_terminal(two, columns):
    columns(34)
    facts = json.loads(run("evaluate", "noir", "verse", "--json").stdout)
    (first, second), (third, fourth) = (row["results"] for row in facts["adapters"])
    shown = [re.split(r" {2,}", line.rstrip()) for line in run("evaluate", "noir", "verse").stdout.splitlines()]
    assert shown[1][:2] == ["(base)", "on noir"]
    assert shown[3:7] == [
        ["noir", "on noir", loss(first)],
        ["noir", "on verse", loss(second)],
        ["verse", "on noir", loss(third)],
        ["verse", "on verse", loss(fourth)],
    ]
    assert shown[10:] == [
        ["noir", "on noir", gain(first)],
        ["noir", "on verse", gain(second)],
        ["verse", "on noir", gain(third)],
        ["verse", "on verse", gain(fourth)],
    ]


@pytest.mark.parametrize(
    ("names", "groups"), [(["praise", "pan", "both"], 1), (["a" * 64, "b" * 64], 1), (["a", "b", "c"], 10_000)]
)
def test_gains_fit_80_columns(capsys, columns, names, groups):
    """Long names and many groups take a line for each cell."""
    columns(80)
    gain = EvalResult(base_loss=3.75, loss=3.5004, gain=0.2496, standard_error=0.0124, rows=9, tokens=99)
    small = EvalResult(base_loss=3.75, loss=3.77, gain=-0.02, standard_error=0.0004, rows=9, tokens=99)
    numbers = [] if groups == 1 else [*range(groups)]
    sets = [EvalSet(name, ["a row"] * groups, groups=numbers) for name in names]
    show_gains(GainMatrix("owner/" + "m" * 64, names, sets, [[gain, *[small] * (len(names) - 1)]] * len(names)))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(
        r"\ngain over owner/m+ \.\.\. m+ \(loss, ± standard error\)\n"
        r"below zero: worse than the base; 0.69: each token twice as likely\n",
        shown,
    )
    assert "+0.25 ± 0.01" in shown
    assert "-0.02 ± <0.01" in shown
    assert "3.50 (33.13)" in shown


def test_wide_names_count_their_columns(capsys, columns):
    columns(80)
    gain = EvalResult(base_loss=3.75, loss=3.5004, gain=0.2496, standard_error=0.0124, rows=9, tokens=99)
    names = ["\u30ec\u30d3\u30e5\u30fc" * 6, "\ud55c\uad6d\uc5b4\uae00" * 6]
    sets = [EvalSet(name, ["a row"]) for name in names]
    show_gains(GainMatrix("base", ["noir"], sets, [[gain, gain]]))
    shown = capsys.readouterr().out
    assert all(f"on {name}" in shown for name in names)


def test_evaluate_writes_plot(two, tmp_path):
    shown = run("evaluate", "noir", "verse", "--plot", "gains.png").stdout
    assert shown.startswith("held-out loss (perplexity)")
    assert shown.splitlines()[-1] == "picture: gains.png (gain of each adapter on each held-out set)"
    drawn = (tmp_path / "gains.png").read_bytes()
    matrix = evaluate(two, options=ModelOptions(device="cpu"))
    names = [rows.name for rows in matrix.sets]
    plots.plot_gains(matrix.base, matrix.adapters, names, matrix.cells, tmp_path / "again.png")
    assert drawn == (tmp_path / "again.png").read_bytes()
    facts = json.loads(run("evaluate", "noir", "verse", "--plot", "other.PNG", "--json").stdout)
    assert facts["picture"] == "other.PNG"
    assert (tmp_path / "other.PNG").read_bytes() == drawn


def test_evaluate_reports_missing_rows(two, tmp_path, columns):
    columns(100)
    lost = tmp_path / "cache" / "held-out" / f"{two[1].manifest.data.held_out_hash}.json"
    lost.unlink()
    why = "its held-out rows are not in the cache: it was trained elsewhere, or the cache was emptied"
    result = run("evaluate", "noir", "verse", "--plot", "gains.png")
    assert result.stderr.splitlines()[-1] == f"verse has no column: {why}."
    shown = [line.split() for line in result.stdout.splitlines()]
    assert shown[1:3] == [["noir"], ["6", "rows"]]
    assert [line[0] for line in shown[3:6]] == ["(base)", "noir", "verse"]
    assert (tmp_path / "gains.png").is_file()
    facts = json.loads(run("evaluate", "noir", "verse", "--json").stdout)
    assert facts["sets"][1] == {"name": "verse", "rows": 0, "missing": why}
    assert error("evaluate", "verse") == (
        f"Error: There are no rows to evaluate on. verse: {why}. Name other data with --eval-dataset."
    )


def test_evaluate_with_eval_dataset(two, tmp_path, columns):
    columns(100)
    lines = [f"{text},{number % 2}" for number, text in enumerate(tiny_models.reviews(30, seed=9))]
    (tmp_path / "films.csv").write_text("\n".join(["body,label", *lines]))
    given = ["--eval-dataset", "films.csv", "--text-column", "body", "--where", "label=1"]
    result = run("evaluate", "noir", "verse", *given)
    assert "Evaluation on films.csv: 15 usable rows of 30." in result.stderr.splitlines()
    assert [line.split() for line in result.stdout.splitlines()[1:3]] == [["films.csv"], ["15", "rows"]]
    some = json.loads(run("evaluate", "verse", *given, "--eval-rows", 4, "--json").stdout)
    assert some["sets"] == [{"name": "films.csv", "rows": 4, "missing": None}]
    assert [row["results"][0]["rows"] for row in some["adapters"]] == [4]
    fewer = json.loads(run("evaluate", "noir", "verse", "--eval-rows", 3, "--json").stdout)
    assert [eval_set["rows"] for eval_set in fewer["sets"]] == [3, 3]


def test_evaluate_errors(two, tmp_path, gpt2):
    stranger = other_base(tmp_path)
    for option, name in (
        (["--where", "label=1"], "where"),
        (["--eval-split", "test"], "eval_split"),
        (["--clean", "lines"], "clean"),
    ):
        assert error("evaluate", "noir", *option) == f"Error: {name}: only valid with --eval-dataset."
    assert error("evaluate", "noir", "--where", "a=1", "--text-column", "b") == (
        "Error: text_column, where: only valid with --eval-dataset."
    )
    for name in ("gains.jpg", "gains"):
        assert (
            error("evaluate", "noir", "--plot", name) == f"Error: --plot {name}: choose a name that ends in .png."
        )
    assert error("evaluate", "noir", "--plot", "none/gains.png") == (
        "Error: --plot none/gains.png: there is no folder none."
    )
    Path("folder.png").mkdir()
    assert error("evaluate", "noir", "--plot", "folder.png") == (
        "Error: --plot folder.png: folder.png is a folder."
    )
    assert error("evaluate", "noir", "nobody") == (
        "Error: There is no adapter 'nobody', neither in adapters (noir, verse) nor as a path."
    )
    assert error("evaluate", "noir", "verse", "adapters/noir") == (
        "Error: Two of these adapters have the name noir: list each once, or rename one."
    )
    assert error("evaluate", "noir", "--eval-dataset", "none.csv") == (
        "Error: There is no dataset 'none.csv': give imdb, an existing file or folder, or a Hub id (owner/name)."
    )
    assert error("evaluate", "noir", "--base", stranger).startswith(
        f"Error: noir was trained on {gpt2} (fingerprint "
    )
    assert "FORCED: noir was trained on" in run("evaluate", "noir", "--base", stranger, "--force").stderr
    assert "Missing argument" in flat(run("evaluate", exit_code=2).stderr)
    run("evaluate", "noir", "--eval-rows", 1, exit_code=2)
    assert not list(tmp_path.glob("*gains*"))


def test_probes_are_measured_again(two, gpt2):
    noir = two[0]
    old = noir.manifest.model_copy(update={"probes": None})
    (noir.path / "manifest.json").write_text(old.to_json())
    shown = run("evaluate", "noir", "--probes").stdout
    assert re.fullmatch(r"noir: 8 probes, on which base and adapter differ by \d+\.\d{3} nats each\n", shown)
    assert len(Library().get("noir").manifest.probes) == 8
    (figures,) = json.loads(run("evaluate", "noir", "--probes", "--json").stdout)
    assert (figures["name"], figures["probes"], figures["difference"] > 0) == ("noir", 8, True)
    for option in (["--leak"], ["--eval-rows", "5"], ["--plot", "x.png"]):
        assert "--probes measures prompts alone, so leave it out." in error(
            "evaluate", "noir", "--probes", *option
        )
