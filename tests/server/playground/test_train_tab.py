"""The tab that trains, without a browser: what the form refuses, commands as processes, and the list of runs."""

import json
import re
import sys
import time
from types import SimpleNamespace

import gradio as gr
import pytest

from lora_tuner.adapters.adapter import METRICS_FILE
from lora_tuner.config import TrainConfig
from lora_tuner.errors import LoraTunerError
from lora_tuner.server.metrics import Metrics
from lora_tuner.server.playground import commands, train_form, train_html, uploads
from lora_tuner.server.playground.page import Page
from lora_tuner.server.playground.train_runs import RunsView
from lora_tuner.settings_files import config_to_yaml
from lora_tuner.training import jobs

from .browser import run_async

ID = "0123456789abcdef" * 2
SKIP = gr.skip()


@pytest.fixture
def page(served, tmp_path, monkeypatch):
    """A page whose runs are in the folder of the test."""
    settings = served.service.config.model_copy(update={"runs_dir": tmp_path / "runs"})
    monkeypatch.setattr(served.service, "config", settings)
    return Page(served.service, Metrics(served.service))


@pytest.fixture
def tab(page):
    return page.train


@pytest.fixture
def upload(tab):
    """A file of rows as it was uploaded."""
    folder = tab.uploads.folder / ID / "upload"
    folder.mkdir(parents=True)
    (folder / "rows.csv").write_text(
        "text\n" + "".join(f"the actor {number} drags on and on\n" for number in range(60))
    )
    return ID


@pytest.fixture
def started(monkeypatch):
    """Configurations of runs, which are not started."""
    started = []

    def start_job(config):
        started.append(config)
        return jobs.Job(str(config.name), jobs.JobState.STARTING, config.runs_dir / str(config.name))

    monkeypatch.setattr(jobs, "start_job", start_job)
    return started


def values(**typed):
    """Return the values of all controls, of which some are typed."""
    defaults = {name: control_default(name) for name in train_form.FIELDS}
    assert typed.keys() <= defaults.keys()
    return [*(defaults | typed).values()]


def control_default(name):
    return "" if name == "dataset" else train_form.control(name).value


def press_train(tab, upload="", **typed):
    """Press Train. Return the message, the help of the fields that show a problem, and the view."""
    view = RunsView()
    _, status, *updates = run_async(tab.train(view, upload, *values(**typed)))
    shown = dict(zip(train_form.FIELDS, updates, strict=False))
    return str(status), {name: update["info"] for name, update in shown.items() if "info" in update}, view


def test_settings_are_those_of_config():
    """Every setting is offered, but for paths and what belongs to the server; a blank one has its default."""
    assert {*train_form.OFFERED} | {*train_form._NOT_OFFERED} == TrainConfig.model_fields.keys()
    for name in train_form.OFFERED:
        control, field = train_form.control(name), TrainConfig.model_fields[name]
        assert "--" not in control.info
        if isinstance(control, gr.Textbox) and field.default not in (None, []):
            assert control.placeholder == str(field.default)
    assert [*train_form.panels()] == ["Data", "Model", "Training", "Output", "Machine"]
    assert train_form.control("rank").info == "LoRA rank. Higher learns more and makes a larger file."
    assert "One per line" in train_form.control("where").info


def test_run_has_typed_settings_only(tab, upload, started, served):
    status, problems, view = press_train(
        tab, upload, name="mine", rank=" 4 ", learning_rate="1e-3", where="a=1\n\nb=2", packing=False
    )
    assert (status, problems, view.chosen) == ("", {}, None)  # it is in no list, as it was not started
    (config,) = started
    assert config.model_fields_set - {"revision"} == {
        *(
            "dataset",
            "base",
            "adapters_dir",
            "runs_dir",
            "device",
            "name",
            "rank",
            "learning_rate",
            "where",
            "packing",
        )
    }
    assert (config.rank, config.learning_rate, config.where) == (4, 0.001, ["a=1", "b=2"])
    assert config.dataset == str(tab.uploads.dataset(upload))
    assert config.adapters_dir == served.generator.library.path


@pytest.mark.parametrize(
    ("typed", "field", "text"),
    [
        ({}, "dataset", "Give the id of a dataset"),
        ({"dataset": "/etc/passwd"}, "dataset", "Give the id of a dataset"),
        ({"dataset": "../rows.csv"}, "dataset", "Give the id of a dataset"),
        ({"dataset": "rows.csv"}, "dataset", "Give the id of a dataset"),
        ({"dataset": "runs"}, "dataset", "Give the id of a dataset"),
        ({"dataset": "--config"}, "dataset", "Give the id of a dataset"),
        ({"dataset": "imdb", "rank": "0"}, "rank", "Input should be greater than or equal to 1 (got '0')."),
        ({"dataset": "imdb", "epochs": "1", "minutes": "2"}, "minutes", "Epochs and minutes contradict each other"),
        ({"dataset": "imdb", "streaming": True, "max_rows": "9"}, "streaming", "cannot sample Max rows from all"),
        ({"dataset": "imdb", "name": "../x"}, "name", "../x"),
        ({"dataset": "imdb", "name": "noir"}, "name", "There is an adapter noir: choose another name."),
        ({"dataset": "imdb", "parent": "nobody"}, "parent", "It is not in the library any more."),
    ],
)  # fmt: skip
def test_problem_stands_at_its_field(tab, started, tmp_path, typed, field, text):
    (tmp_path / "runs").mkdir()  # a folder that a typed name must not reach
    status, problems, view = press_train(tab, **typed)
    assert [*problems] == [field]
    assert text in problems[field]
    assert f"Not started: see {train_form.label_of(field)}." in status
    assert started == []
    updates = train_form.error_updates({}, view.invalid)  # its help comes back
    assert updates[train_form.FIELDS.index(field)]["info"] == train_form.help_of(field)


def test_taken_run_is_refused_in_words(tab, upload, tmp_path):
    (tmp_path / "runs/mine").mkdir()
    (tmp_path / "runs/mine/run.yaml").write_text(config_to_yaml(TrainConfig(name="mine", max_steps=3)))
    (tmp_path / "runs/mine/manifest.json").write_text("{}")
    status, problems, _ = press_train(tab, upload, name="mine")
    assert "mine holds an unfinished run: resume it" in status
    assert problems == {}
    assert str(tmp_path) not in status


def test_upload_suggests_free_name(tab, upload, served):
    event = SimpleNamespace(id=ID, problem="")
    drop, new, name = run_async(tab.receive("", event))
    assert ("Uploaded: rows.csv." in drop, new, name) == (True, ID, "rows")
    (tab.uploads.folder / ID / "upload" / "rows.csv").rename(tab.uploads.folder / ID / "upload" / "noir.csv")
    assert run_async(tab.receive("", event))[2] == "noir-2"
    failed = SimpleNamespace(id="", problem="<b>too large")
    drop, *others = run_async(tab.receive(ID, failed))
    assert "&lt;b&gt;too large" in drop
    assert "Uploaded: noir.csv." in drop  # the one before stays
    assert others == [SKIP, SKIP]


# Commands


def run_command(monkeypatch, code, count=None):
    """Run a command in place of the command line; return its outputs, the first `count` of them."""
    monkeypatch.setattr(commands, "command_line", lambda *arguments: [sys.executable, "-c", code, *arguments])
    runner, outputs = commands.CommandRunner(), []

    async def run():
        with commands.temporary_folder() as folder:
            updates = runner.run("train", "--plan", config=TrainConfig(rank=4), folder=commands.Path(folder))
            async for output in updates:
                outputs.append(output)
                if len(outputs) == count:
                    await updates.aclose()
                    break

    run_async(run())
    return outputs


def test_command_gives_progress_and_result(monkeypatch):
    code = """
import json, sys, time
print("counting 1/2", file=sys.stderr, flush=True)
time.sleep(0.5)
print("counting 2/2", file=sys.stderr, flush=True)
time.sleep(0.5)
print(json.dumps([sys.argv[1:3], sys.argv[3], open(sys.argv[4]).read(), sys.argv[5]]))
"""
    first, *progress, result = run_command(monkeypatch, code)
    assert first == "Starting ..."
    assert progress == ["counting 1/2", "counting 2/2"]
    assert result == [["train", "--plan"], "--config", "rank: 4\n", "--json"]


def test_command_error_is_its_last_line(monkeypatch):
    code = "import sys; print('reading\\nError: rows.csv is empty.', file=sys.stderr); sys.exit(1)"
    with pytest.raises(LoraTunerError, match=r"^rows\.csv is empty\.$"):
        run_command(monkeypatch, code)


def test_stop_ends_command(monkeypatch, tmp_path):
    code = f"""
import signal, sys, time
def end(*_): open({str(tmp_path / "ended")!r}, "w"); sys.exit(130)
signal.signal(signal.SIGTERM, end)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""
    assert run_command(monkeypatch, code, count=2) == ["Starting ...", "ready"]
    assert (tmp_path / "ended").exists()


def test_failed_preview_keeps_what_is_shown(tab, upload, monkeypatch):
    code = "import sys; sys.exit('Error: --max-length')"
    monkeypatch.setattr(commands, "command_line", lambda *_: [sys.executable, "-c", code])

    async def last():
        return [update async for update in tab.preview(RunsView(), upload, *values())][-1]

    status, stop, *outputs = run_async(last())
    assert "Max length" in status
    assert stop == gr.update(visible=False)
    assert outputs == [SKIP] * len(outputs)


@pytest.mark.slow
def test_preview_and_plan_come_from_commands(tab, upload):
    async def shown(updates):
        """Return the last value of each output."""
        values = {}
        async for update in updates:
            values |= {number: value for number, value in enumerate(update) if value != SKIP}
        return values

    typed = values(max_length="8", max_steps="2", learning_rate="1e-3")
    outputs = run_async(shown(tab.preview(RunsView(), upload, *typed)))
    status, preview, report = outputs[0], outputs[3], outputs[4]
    assert status == ""
    assert preview.count("<h3>Row ") == 5
    assert re.search(r"<mark>the actor \d+ drags on and on</mark>", preview)
    assert re.search(r"Max length 8 divides \d+ rows", preview)
    assert 'srcdoc="&lt;!doctype html&gt;' in report.lower()
    plan = run_async(shown(tab.plan(RunsView(), upload, *typed)))[2]
    assert "<dt>Peak memory</dt>" in plan
    assert "<dd>2 (one epoch: " in plan


def test_preview_escapes_rows():
    part = {"role": "user", "text": "<script>x</script>\nso", "is_learned": False}
    row = {"parts": [part], "tokens": ["<b>"], "labels": [True], "cut_tokens": 3, "pieces": 1}
    row |= {"number": 1, "side": ""}
    data = {
        "rows": [row],
        "train_rows": 9,
        "measured_rows": 0,
        "lengths": None,
        "dropped": [],
        "sample_prompts": ["<i>"],
    }
    shown = train_html.preview(data, TrainConfig(max_length=16))
    assert "<script>" not in shown
    assert "<span>&lt;script&gt;x&lt;/script&gt;\u21b5\nso</span>" in shown
    assert "<li>&lt;i&gt;</li>" in shown
    assert "Max length 16 cuts 3 behind them" in shown
    assert "What is marked is learned" in shown
    labels = TrainConfig(max_length=16, label_column="label")
    assert "Max length 16 cuts 3 in the middle" in train_html.preview(data, labels)
    shown = train_html.preview(data | {"rows": [row | {"side": "<chosen>"}]}, TrainConfig())
    assert "<h3>Row 1, &lt;chosen&gt;</h3>" in shown
    assert "What is marked is compared" in shown


# Runs


@pytest.fixture
def stopped(tab):
    """A run that was stopped in a terminal."""
    folder = tab.runs.runs_dir / "mine"
    folder.mkdir(parents=True)
    config = TrainConfig(dataset="texts/rows.csv", name="mine", max_steps=30)
    (folder / "run.yaml").write_text(config_to_yaml(config))
    add_metrics(folder, 1, 2, 3)
    sample = {"step": 2, "prompt": "the <b>", "base": "one", "adapter": "two"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def add_metrics(folder, *steps):
    with (folder / METRICS_FILE).open("a") as file:
        for step in steps:
            entry = {"step": step, "loss": 4.0 / step, "tokens": 100, "seconds": 0.5, "peak_memory_bytes": 2e9}
            file.write(json.dumps(entry) + "\n")


OUTPUTS = (
    *(
        "runs",
        "details",
        "toggle",
        "stop",
        "resume",
        "remove",
        "write",
        "chat",
        "question",
        "samples",
        "log_box",
        "log",
    ),
    *("timer", "ended"),
)


def look(tab, view):
    """Return what has changed for a visitor."""
    updates = dict(zip(OUTPUTS, run_async(tab.runs.look(view)), strict=True))
    return {name: update for name, update in updates.items() if update != SKIP}


def test_stopped_run_is_shown_once(tab, stopped):
    view = RunsView()
    shown = look(tab, view)
    assert shown["runs"]["choices"] == [("mine: stopped, step 0 of 30", "mine")]
    assert "<dd>rows.csv</dd>" in shown["details"]
    assert "<dd>200 tokens/s</dd>" in shown["details"]
    assert "<dd>2.0 GB</dd>" in shown["details"]
    assert "<svg" in shown["details"]
    assert "the &lt;b&gt;" in shown["samples"]
    buttons = {name: shown[name]["visible"] for name in ("toggle", "stop", "resume", "remove", "write")}
    assert buttons == {"toggle": False, "stop": False, "resume": True, "remove": True, "write": False}
    assert shown["timer"] == gr.update(active=False)
    assert look(tab, view) == {}  # nothing is sent again
    add_metrics(stopped, 4)
    view.rests_until = time.monotonic() + 60  # as after a look at very many steps
    assert look(tab, view) == {}
    view.problem = "It failed."
    assert "It failed." in look(tab, view)["details"]
    view.rests_until = 0.0
    add_metrics(stopped, 5)
    assert [*look(tab, view)] == ["details"]


def test_remove_asks_first(tab, stopped):
    view = RunsView()
    look(tab, view)
    shown = dict(zip(OUTPUTS, run_async(tab.runs.ask(True, view)), strict=True))
    assert shown["question"] == gr.update(visible=True)
    assert stopped.exists()
    shown = dict(zip(OUTPUTS, run_async(tab.runs.act(jobs.dismiss_job, view)), strict=True))
    assert not stopped.exists()
    assert "No runs yet" in shown["details"]
    assert shown["question"] == gr.update(visible=False)


def test_failed_action_is_told(tab, stopped):
    view = RunsView()
    look(tab, view)
    shown = dict(zip(OUTPUTS, run_async(tab.runs.act(jobs.pause_job, view)), strict=True))
    assert re.search(r"class=\"failure\" role=\"alert\">mine has no process", shown["details"])


def test_ended_run_renews_choices(tab, stopped, monkeypatch):
    view = RunsView()
    job = jobs.find_job("mine", tab.runs.runs_dir)
    states = [jobs.JobState.RUNNING, jobs.JobState.PAUSED, jobs.JobState.FINISHED]
    shown = []
    for state in states:
        monkeypatch.setattr(
            jobs, "list_jobs", lambda _, state=state: [jobs.Job("mine", state, job.folder, step=3, total=30)]
        )
        shown.append(look(tab, view))
    running, paused, finished = shown
    assert running["timer"] == gr.update(active=True)
    assert running["toggle"] == gr.update(value="Pause", visible=True)
    assert "ended" in running  # at first
    assert paused["toggle"] == gr.update(value="Continue", visible=True)
    assert "ended" not in paused
    assert (finished["ended"], finished["timer"]) == (1, gr.update(active=False))
    assert finished["write"] == gr.update(visible=True)


def test_finished_run_opens_in_write(page):
    tabs, names = run_async(page.open_in_write(RunsView(chosen="verse")))
    assert (tabs["selected"], names["value"]) == ("write", ["verse"])
    _, names = run_async(page.open_in_write(RunsView(chosen="gone")))
    assert names["value"] == []


def test_closed_tab_is_not_followed(tab, stopped, monkeypatch):
    job = jobs.Job("mine", jobs.JobState.RUNNING, stopped)
    monkeypatch.setattr(jobs, "list_jobs", lambda _: [job])
    view = RunsView()
    assert look(tab, view)["timer"] == gr.update(active=True)
    for name, active in (("Write", False), ("Train", True)):
        updates = run_async(tab.select_tab(view, SimpleNamespace(value=name)))
        assert dict(zip(OUTPUTS, updates, strict=True))["timer"] == gr.update(active=active)


def test_training_off_is_one_sentence(page, served, monkeypatch):
    settings = served.service.config.model_copy(update={"host": "0.0.0.0"})
    monkeypatch.setattr(served.service, "config", settings)
    texts = json.dumps(page.blocks().get_config_file(), default=str)
    assert uploads.OFF in texts
    assert "Drop files here" not in texts


def test_fixed_library_is_said(page, monkeypatch, tmp_path):
    """With `serve --adapter` a new adapter is in the library, but not served."""
    run = tmp_path / "runs" / ".jobs" / "mine"
    run.mkdir(parents=True)
    (run / jobs.LOG_FILE).touch()
    (run / jobs.RESULT_FILE).write_text(json.dumps({"run": {"steps": 3}}))

    def buttons():
        outputs = page.train.runs._look(RunsView(chosen="mine"))
        return [outputs[number]["visible"] for number in (6, 7)]  # Write with it, Chat with it

    assert buttons() == [True, True]
    monkeypatch.setattr(page.service, "only", {"noir": tmp_path})
    assert buttons() == [False, False]
    texts = [block.value for block in page.blocks().blocks.values() if isinstance(block, gr.HTML)]
    assert any("What is trained here comes into the library." in str(text) for text in texts)
