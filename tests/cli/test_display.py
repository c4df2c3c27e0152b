import datetime
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from lora_tuner import Library, Notice, Progress
from lora_tuner.adapters.adapter import MANIFEST_FILE, load_adapter_folder
from lora_tuner.adapters.library import Ancestor
from lora_tuner.adapters.manifest import EvalResult
from lora_tuner.adapters.model_card import model_card
from lora_tuner.adapters.report import GrowthFigures
from lora_tuner.adapters.samples import SAMPLES_FILE, Sample, write_samples
from lora_tuner.analysis.leak import Leak
from lora_tuner.cli import adapters, convert, display, evaluate, export, generate, train
from lora_tuner.convert.blend import BlendResult
from lora_tuner.convert.compress import CompressResult
from lora_tuner.convert.verify import OutputComparison
from lora_tuner.data.eval_sets import EvalSet
from lora_tuner.evaluation.gain_matrix import GainMatrix
from lora_tuner.server.playground.gain_matrix import show_gains
from lora_tuner.text import describe_gain, escape_control, format_age, format_bytes, format_duration
from lora_tuner.training.progress import Display
from lora_tuner.training.sweep_result import SweepResult, Trial

from .. import adapter_files
from .test_commands import run

CONTROL = {chr(code) for code in (*range(32), *range(127, 160))} - {"\t", "\n"}
# Hostile text in place of a name: colors, a window title, cursor movement, markup of rich.
EVIL = "\x1b[31mred\x1b]0;title\x07\x9b2A\x00\r\b\x7f[red]x[/red][/nope]"
SHOWN = "\ufffd[31mred\ufffd]0;title\ufffd\ufffd2A\ufffd\ufffd\ufffd\ufffd[red]x[/red][/nope]"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (143, "2.4 min"), (3000, "50 min"), (5400, "1.5 h"), (166_000, "46 h")],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(900, "900 bytes"), (9_400, "9 kB"), (2_000_000, "2.0 MB"), (4.3e9, "4.3 GB")]
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text


def test_messages_name_the_called_program(capsys, monkeypatch):
    for program, called in {"cli.py": "python cli.py", "/usr/bin/lora-tuner": "lora-tuner"}.items():
        monkeypatch.setattr(sys, "argv", [program, "train"])
        display.print_stderr("Resume with: python cli.py train --resume poems")
        assert capsys.readouterr().err == f"Resume with: {called} train --resume poems\n"


@pytest.mark.parametrize(
    ("gain", "times"), [(-3.0, "0.05"), (0.0, "1.00"), (0.2, "1.22"), (5.05, "156"), (1e3, "1e+304")]
)
def test_gain_in_words(gain, times):
    assert describe_gain(gain) == f"each token is {times} times as likely"


def test_show_fields_skips_unknown_values(capsys):
    display.show_fields(
        {"name": "a", "data": None, "base": {"repo": "b", "revision": None}, "targets": ["q", "v"]}
    )
    shown = capsys.readouterr().out
    assert "repo: b" in shown
    assert "q, v" in shown
    assert "revision" not in shown
    assert "data" not in shown


# Untrusted text


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")


def printed(capsys):
    """All output, checked for control characters."""
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert not CONTROL & set(shown)
    return shown


def test_escape_control_replaces_control_characters():
    every = "".join(map(chr, range(0x300)))
    shown = escape_control(every)
    assert len(shown) == len(every)
    assert {a for a, b in zip(every, shown, strict=True) if a != b} == CONTROL
    assert set(shown) & {"\t", "\n"} == {"\t", "\n"}
    assert escape_control(EVIL) == SHOWN
    assert escape_control("plaîn — text 😀") == "plaîn — text 😀"


def test_stderr_escapes_control_characters(capsys):
    display.print_stderr(EVIL)
    Display()(Notice(EVIL))
    assert printed(capsys) == f"{SHOWN}\n{SHOWN}\n"


def test_progress_escapes_control_characters(capsys):
    Display()(Progress(EVIL, 1, 1, EVIL))
    assert printed(capsys) == f"{SHOWN} 1/1  {SHOWN}\n"


def test_tables_escape_control_characters(capsys, wide):
    display.print_table([(EVIL, "b")], ("name", "other"))
    display.show_fields({EVIL: EVIL, "many": [EVIL, EVIL], "deep": {EVIL: EVIL}})
    lines = [line.split() for line in printed(capsys).splitlines()]
    assert lines[0] == ["name", "other"]
    assert lines[1] == [SHOWN, "b"]
    assert lines[2] == [SHOWN, SHOWN]
    assert lines[3] == ["many", f"{SHOWN},", SHOWN]
    assert lines[4] == ["deep", f"{SHOWN}:", SHOWN]


@pytest.fixture
def evil(tmp_path):
    """An adapter with hostile text in every text field of its manifest."""
    facts = adapter_files.manifest().model_dump() | {"created": EVIL, "versions": {EVIL: EVIL}, "weights": None}
    facts["base"] |= dict.fromkeys(("name", "repo", "revision", "weights"), EVIL)
    texts = dict.fromkeys(("name", "source", "split_salt", "eval_dataset"), EVIL)
    facts["data"] |= texts | {"where": [EVIL], "counts": {EVIL: 3}}
    facts["run"] |= {"device": EVIL, "dtype": EVIL}
    facts["parents"] = [{"name": EVIL, "sha256": "ab" * 32, "parents": [{"name": EVIL, "sha256": "cd" * 32}]}]
    return load_adapter_folder(
        adapter_files.write(tmp_path / "adapters" / "evil", facts=adapter_files.Manifest.model_validate(facts))
    )


def test_list_escapes_hostile_manifest(capsys, wide, evil):
    adapters.show_adapters(Library().entries())
    header, line = printed(capsys).splitlines()
    assert header.split() == [*("adapter", "base", "rank", "data", "size", "gain", "created", "parent")]
    assert line.split() == [
        "evil",
        SHOWN,
        "4",
        "nope]",
        *format_bytes(evil.bytes).split(),
        "0.25",
        "±",
        "0.01",
        "?",
        SHOWN,
    ]


def test_show_escapes_hostile_manifest(capsys, wide, evil):
    adapters.show_details(evil, Library().ancestors(evil))
    shown = {" ".join(line.split()) for line in printed(capsys).splitlines()}
    assert {
        f"base {SHOWN}: {SHOWN}",
        f"revision {SHOWN}",
        f"parent from {SHOWN} (abababababab, not in this library)",
        f"from {SHOWN} (cdcdcdcdcdcd, not in this library)",
        f"data {SHOWN}",
        f"where {SHOWN}",
        f"rows 3 {SHOWN}",
        f"evaluated on {SHOWN}",
        f"run lora, 40 steps, 20,480 tokens, 1.5 min on {SHOWN} in {SHOWN}",
        f"created {SHOWN} with {SHOWN} {SHOWN}",
    } <= shown


def test_list_escapes_hostile_config(capsys, wide, tmp_path):
    bare = load_adapter_folder(
        adapter_files.write(tmp_path / "adapters" / "bare", {"base_model_name_or_path": EVIL})
    )
    adapter_files.write(tmp_path / "adapters" / "broken", {EVIL: 1, "task_type": EVIL})
    adapters.show_adapters(Library().entries())
    adapters.show_details(bare, [])
    lines = [" ".join(line.split()) for line in printed(capsys).splitlines()]
    assert f"bare {SHOWN} 4 ? {format_bytes(bare.bytes)} ? ? ?" in lines
    assert f"base {SHOWN}" in lines
    assert "created by another tool, without a manifest (run `adapters adopt` to write one)" in lines
    (broken,) = (line for line in lines if line.startswith("broken is broken: "))
    assert broken == (
        f"broken is broken: adapters/broken/adapter_config.json: task_type is {EVIL!r}, and only 'CAUSAL_LM' is "
        f"accepted; {SHOWN} is set, which is not supported."
    )


def test_compare_escapes_control_characters(capsys, monkeypatch):
    answers = [SimpleNamespace(adapter=name, prompt="p" + EVIL, text=EVIL) for name in (None, "a")]
    for columns in ("1000", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        generate.show_comparison(answers)
        assert printed(capsys).replace("\n", "").replace(" ", "").count(f"p{SHOWN}{SHOWN}") == 2


def test_json_round_trips_control_characters(capsys):
    display.show_json({"name": EVIL, "ü": "😀"})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"name": EVIL, "ü": "😀"}
    assert '"ü": "😀"' in shown
    assert not {chr(code) for code in range(32)} - {"\n"} & set(shown)


# Ages and lineage


@pytest.mark.parametrize(
    "created", ["", "yesterday", "2025-01-02", "2025-01-02T03:04:05", "2025-13-02T03:04:05+00:00", "9" * 5000]
)
def test_format_invalid_age(created):
    assert format_age(created) == "?"


def test_format_age():
    now = datetime.datetime.now(datetime.UTC)
    assert format_age((now - datetime.timedelta(hours=3)).isoformat()) == "3.0 h"
    assert format_age((now - datetime.timedelta(days=400)).isoformat()) == "400 d"
    assert format_age((now + datetime.timedelta(days=2)).isoformat()) == "0 s"  # clock of another machine
    for extreme in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
        assert format_age(extreme).endswith((" d", " s"))


def test_format_ancestor():
    sha256 = "ab" * 32
    assert adapters.format_ancestor(Ancestor("a", sha256, 1, "a")) == "from a (abababababab)"
    assert adapters.format_ancestor(Ancestor("a", sha256, 2, "b")) == "  from a (abababababab, now named b)"
    assert (
        adapters.format_ancestor(Ancestor("a", sha256, 3, None))
        == "    from a (abababababab, not in this library)"
    )


@pytest.mark.parametrize(
    "facts",
    [
        {"result": {"base_loss": 1e308, "loss": -1e308, "rows": -5}},
        {"run": {"seconds": 0.5, "steps": 10**4000, "tokens": -1}},
        {"run": {"seconds": 1e300}},
        {"data": {"name": "", "counts": {"": 10**4200}, "where": [""]}},
        {"data": {"name": "/"}},
    ],
)
def test_show_impossible_numbers(capsys, tmp_path, facts):
    changed = {
        name: getattr(adapter_files.manifest(), name).model_dump() | change for name, change in facts.items()
    }
    folder = adapter_files.write(tmp_path / "odd", facts=adapter_files.manifest())
    manifest = json.loads((folder / MANIFEST_FILE).read_text()) | changed
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    adapter = load_adapter_folder(folder)
    adapters.show_adapters([("odd", adapter)])
    adapters.show_details(adapter, [])
    display.show_json(adapter.to_dict())
    assert "odd" in printed(capsys)


def test_show_adopted_adapter(capsys, wide, tmp_path):
    facts = adapter_files.manifest(data=None, run=None, result=None, versions={})
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "adopted", facts=facts))
    adapters.show_adapters([("adopted", adapter)])
    adapters.show_details(adapter, [])
    shown = printed(capsys)
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert lines[1].startswith(f"adopted distilgpt2 4 ? {format_bytes(adapter.bytes)} ? ")
    assert "gain not evaluated" in lines
    adopted = "created by another tool, adopted 2025-01-02T03:04:05+00:00 ("
    assert any(line.startswith(adopted) and line.endswith(" d ago)") for line in lines)
    for absent in ("parent", "data", "rows", "run", "where"):
        assert not any(line.startswith(f"{absent} ") for line in lines[2:])


def test_one_held_out_row_shows_no_error(capsys, wide, tmp_path):
    result = adapter_files.manifest().result.model_dump() | {"rows": 1, "standard_error": 0.0}
    facts = adapter_files.manifest(result=result)
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "single", facts=facts))
    adapters.show_adapters([("single", adapter)])
    adapters.show_details(adapter, [])
    display.print_result(facts.result)
    trial = Trial("s-2", 2, 1e-3, 2.0, standard_error=None)
    train._show_sweep(SweepResult("s", 3.0, [trial], "s-2", adapter.path, tmp_path))
    evaluate.show_gains(GainMatrix("base", ["single"], [EvalSet("rows", ["a"])], [[facts.result]]))
    shown = printed(capsys) + model_card(adapter, "single")
    assert "±" not in shown.replace("(loss, ± standard error)", "")
    assert shown.count("(no error: one row or group)") == 6
    assert "recommended: s-2, the best; one held-out row, group or document gives no standard error" in shown


def test_groups_are_shown_beside_rows(capsys, wide, tmp_path):
    result = EvalResult.model_validate(adapter_files.manifest().result.model_dump() | {"groups": 3})
    adapter = load_adapter_folder(
        adapter_files.write(tmp_path / "a", facts=adapter_files.manifest(result=result))
    )
    comparison = OutputComparison(0.0, 1.0, None, 1)
    convert._show_blend(BlendResult(adapter, 4, {}, 0.0, comparison, {"one": result, "two": result}))
    convert._show_compress(CompressResult(adapter, {"c": (4, 2)}, (9, 5), {}, 0.0, comparison, (result, result)))
    evaluate.show_leaks([Leak("a", all_rows=result, without_copy=result)])
    assert printed(capsys).count("200 rows in 3 groups") == 6
    matrix = GainMatrix("base", ["a"], [EvalSet("rows", ["a", "b"], groups=[0, 0])], [[result]])
    assert "<small>2 rows in 1 group</small>" in show_gains(matrix)


def test_preferences_are_shown(capsys, monkeypatch, tmp_path):
    """At the end of a run in 80 columns, in the card, in `adapters show`, and beside a sweep."""
    monkeypatch.setenv("COLUMNS", "80")
    facts = adapter_files.manifest(preference=adapter_files.PREFERENCE)
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a", facts=facts))
    display.print_preference(facts.preference)
    lines = printed(capsys).splitlines()
    assert lines == [
        "accuracy      0.600 -> 0.800  (+0.200 ± 0.030, 250 held-out pairs of 90 prompts)",
        "margin        0.100 -> 0.400  (+0.300 ± 0.040 nats per token)",
        "by length     0.500 -> 0.750 chosen shorter (120)",
    ]
    adapters.show_adapters([("a", adapter)])
    adapters.show_details(adapter, [])
    shown, card = printed(capsys), model_card(adapter, "a")
    for name, text in facts.preference.lines():
        assert f"| {name.capitalize()} | {' '.join(text.split())} |" in card
        assert " ".join(f"{name} {text}".split()) in " ".join(shown.split())
    assert "| Objective | dpo, beta 0.1, reference: the base; the held-out loss is that of" in card
    assert "- It prefers chosen answers of its data more often than" in card
    trials = [Trial("s-1", 2, 1e-3, 2.0, accuracy=0.8), Trial("s-2", 2, 1e-2)]
    result = SweepResult("s", 3.0, trials, "s-1", adapter.path, tmp_path, base_accuracy=0.6)
    train._show_sweep(result)
    shown = printed(capsys)
    assert "accuracy" in shown.splitlines()[0]
    assert "base: held-out loss 3.000, accuracy 0.600" in shown
    trials = [Trial(f"s-b{beta}", 2, 1e-3, 2.0, accuracy=0.8, macro_f1=0.75, beta=beta) for beta in (0.1, 0.5)]
    train._show_sweep(SweepResult("s", 3.0, trials, "s-b0.1", adapter.path, tmp_path, base_accuracy=0.6))
    lines = printed(capsys).splitlines()
    header = " ".join(lines[0].split())
    assert header == "adapter beta held-out loss accuracy macro F1 gap to the best size"
    assert lines[1].split()[:5] == ["s-b0.1", "0.1", "2.000", "0.800", "0.750"]
    assert max(map(len, lines[:3])) <= 80


def test_results_say_where_pictures_are(capsys, wide, tmp_path):
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a", facts=adapter_files.manifest()))
    train._show_trained(adapter)
    train._show_sweep(SweepResult("s", 3.0, [Trial("a", 2, 1e-3, 2.0)], "a", adapter.path, Path("runs/s.sweep")))
    comparison = OutputComparison(0.0, 1.0, None, 1)
    convert._show_compress(CompressResult(adapter, {"c": (4, 2)}, (9, 5), {}, 0.0, comparison, None))
    assert [line for line in printed(capsys).splitlines() if line.startswith("picture: ")] == [
        f"picture: {tmp_path}/a/loss.png (losses of the run)",
        "picture: runs/s.sweep/sweep.png (held-out loss against size and training time)",
        f"picture: {tmp_path}/a/spectrum.png (singular values of each kind of layer)",
    ]


def test_sweep_over_rows_shows_what_more_brings(capsys, monkeypatch, tmp_path):
    """In 80 columns, with the settings that differ alone."""
    monkeypatch.setenv("COLUMNS", "80")
    adapter = load_adapter_folder(adapter_files.write(tmp_path / "a", facts=adapter_files.manifest()))
    trials = [Trial(f"reviews-n{n}", 8, 1e-3, 3.0, 9_800_000, 65.0, rows=n, steps=400) for n in (1_600, 3_200)]
    doubling = {"quantity": "rows", "values": [1_600, 3_200], "gains": [0.1, 0.2], "gain": 0.03}
    doubling |= {"standard_error": 0.01, "low": 0.017, "high": 0.043}
    growth = GrowthFigures(
        sentences=["Twice the rows: +0.030 ± 0.010.", "Text limits you."], doublings=[doubling]
    )
    folder = Path("runs/s.sweep")
    train._show_sweep(SweepResult("s", 3.0, [*trials], "a", adapter.path, folder, growth=growth))
    lines = printed(capsys).splitlines()
    assert " ".join(lines[0].split()) == "adapter training rows held-out loss gap to the best size training"
    assert lines[1].split()[:2] == ["reviews-n1600", "1600"]
    assert lines[5:7] == ["Twice the rows: +0.030 ± 0.010.", "Text limits you."]
    assert max(map(len, lines[:7])) <= 80


def test_sweep_json_names_picture(monkeypatch):
    path = Path("adapters/s-2")
    result = SweepResult("s", 3.0, [Trial("s-2", 2, 1e-3, 2.0)], "s-2", path, Path("runs/s.sweep"))
    monkeypatch.setattr("lora_tuner.training.sweep.run_sweep", lambda configs, notify: result)
    facts = json.loads(run("train", "--rank", "2,4", "--json").stdout)
    assert (facts["picture"], facts["path"]) == ("runs/s.sweep/sweep.png", "adapters/s-2")


def test_run_ends_with_samples(capsys, monkeypatch, tmp_path):
    """Texts of base and adapter side by side, and the next commands, within 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    general = {"base_loss": 3.0, "loss": 2.9, "gain": 0.1, "standard_error": 0.01, "rows": 40, "tokens": 2_000}
    facts = adapter_files.manifest(general=general)
    folder = adapter_files.write(tmp_path / "adapters" / "poems", facts=facts)
    texts = [Sample(step=0, prompt="Don't", base=" go.", adapter=" early.")]
    texts.append(Sample(step=30, prompt="The wind\nis", base=" a" * 60, adapter=" cold\x1b[5m and" * 9))
    texts.append(Sample(step=30, prompt="Don't", base=" go.", adapter=" stay."))
    write_samples(texts, folder / SAMPLES_FILE)
    train._show_trained(Library(Path("adapters")).get("poems"))
    shown = capsys.readouterr()
    assert "\x1b[5m" not in shown.out
    assert "early" not in shown.out
    lines = [line.split() for line in shown.out.splitlines()]
    assert ["(base)", "poems"] in lines
    assert ["Don't", "go.", "Don't", "stay."] in lines
    assert shown.err.splitlines() == [
        "Next:",
        "  python cli.py generate --adapter poems",
        """  python cli.py compare 'Don'"'"'t' --adapter poems""",
        "  python cli.py serve",
    ]
    assert max(map(len, [*shown.out.splitlines()[1:], *shown.err.splitlines()])) <= 80
    assert "held-out loss 3.750 -> 3.500  (gain 0.250 ± 0.013, 200 rows)" in shown.out
    assert "perplexity    42.52 -> 33.12  (each token is 1.28 times as likely)" in shown.out
    assert "general text: -0.100 ± 0.010 (change of loss on 40 rows; above zero is worse)\n" in shown.out
    trial = Trial("poems", 2, 1e-3, 2.0)
    train._show_sweep(SweepResult("s", 3.0, [trial], "poems", Path("adapters/poems"), Path("runs/s.sweep")))
    of_sweep = capsys.readouterr()
    assert of_sweep.out.endswith(shown.out[shown.out.index("(base)") :])
    assert of_sweep.err == shown.err
    train._show_next_commands(load_adapter_folder(folder))
    assert f"  python cli.py serve --adapters-dir {tmp_path / 'adapters'}" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["40", "1000"])
def test_compare_escapes_adapter_names(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    names = (None, "a\x1b[5m[red]b[/nope]")
    generate.show_comparison([SimpleNamespace(adapter=name, prompt="p", text="t") for name in names])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "[red]b" in shown


def test_gain_matrix_escapes_names(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    sets = [EvalSet("re[/b]views\x1b[5m.csv", ["a"])]
    evaluate.show_gains(GainMatrix("b\x1b[5m", ["a"], sets, [[adapter_files.manifest().result]]))
    assert "\x1b" not in capsys.readouterr().out


def test_progress_bar_escapes_stage(capsys):
    show = Display()
    show.console = Console(force_terminal=True, stderr=True, highlight=False, width=100)
    show(Progress("a on re[/b]views\x1b[5m", 1, 1, "[red]"))
    assert "\x1b[5m" not in capsys.readouterr().err


def test_json_escapes_control_characters(capsys):
    display.show_json({"name": "\x9b2J\x7f\ud800"})
    assert json.loads(capsys.readouterr().out) == {"name": "\x9b2J\x7f\ud800"}
    display.show_json({"name": "\x9b2J\x7f"})
    assert "\\u009b2J\\u007f" in capsys.readouterr().out


def test_notice_is_not_emoji_markup(capsys):
    Display()(Notice("C:key:base"))
    assert capsys.readouterr().err == "C:key:base\n"


@pytest.mark.parametrize("show", [display.print_stderr, lambda text: Display()(Notice(text))])
def test_long_message_loses_its_middle(capsys, show):
    show(f"Error: {'x' * 10**6}: use another --out.")
    shown = capsys.readouterr().err
    assert 15_000 < len(shown) < 25_000
    assert shown.startswith("Error: xxx")
    assert shown.endswith(": use another --out.\n")


def test_stderr_joins_lines(capsys):
    display.print_stderr("x\ngood: OK")
    assert capsys.readouterr().err == "x good: OK\n"


@pytest.mark.parametrize(("is_one", "shown"), [(True, "a\ufffd[2Jb\n"), (False, "a\x1b[2Jb\n")])
def test_generated_text_escaped_on_terminal(capsys, monkeypatch, is_one, shown):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_one)
    display.show_text("a\x1b[2Jb\n")
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"TERM": "xterm"}, "\x1b[1mthe\ufffd\x1b[0m"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "the\ufffd"),
        ({"TERM": "xterm", "NO_COLOR": ""}, "\x1b[1mthe\ufffd\x1b[0m"),
        ({"TERM": "dumb"}, "the\ufffd"),
        (None, "the\x1b"),
    ],
)
def test_prompt_is_bold_on_terminal_alone(capsys, monkeypatch, variables, shown):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: variables is not None)
    for name, value in (variables or {"TERM": "xterm"}).items():
        monkeypatch.setenv(name, value)
    display.show_text("the\x1b", "bold")
    assert capsys.readouterr().out == shown


def test_exported_turn_end_is_escaped(capsys):
    exported = SimpleNamespace(
        path="a.gguf", bytes=1, tensors=1, error=0.0, turn_end=EVIL, turn_end_id=1, modelfile=f"{EVIL}\n"
    )
    export._show_adapter_file(exported)
    shown = capsys.readouterr().out
    assert shown.count(SHOWN) == 2
    assert not CONTROL & set(shown)
