"""Progress of runs: the time left, the lines without a terminal, the bar on one."""

import io
import json

import pytest
from rich.console import Console

from lora_tuner import Notice, Progress, resume, train
from lora_tuner.adapters.plots import smooth_losses
from lora_tuner.errors import ConfigError
from lora_tuner.training import progress


class Clock:
    """A display whose clock stands until it is moved."""

    def __init__(self, monkeypatch):
        self.now, self.show = 0.0, progress.Display()
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)

    def step(self, seconds, done, total, stage="training", detail=""):
        self.now += seconds
        self.show(Progress(stage, done, total, detail))


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_piped_progress_begins_after_second_step(clock, capsys):
    clock.step(90.0, 1, 100, detail="loss 3.1")
    assert capsys.readouterr().err == ""
    clock.step(2.0, 2, 100, detail="loss 3.0")
    clock.show(Notice("[not markup] said"))
    captured = capsys.readouterr()
    assert captured.err == "training 2/100  loss 3.0  3.3 min left\n[not markup] said\n"
    assert captured.out == ""


def test_piped_progress_is_regular_and_ends(clock, capsys):
    for done in range(1, 101):
        clock.step(4.0, done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [
        "2/100",
        *(f"{done}/100" for done in range(5, 101, 3)),
        "100/100",
    ]
    assert lines[-1] == "training 100/100"
    assert lines[-2] == "training 98/100  8 s left"


def test_long_run_has_a_line_each_minute(clock, capsys):
    for done in range(1, 401):
        clock.step(20.0, done, 100_000)
    assert len(capsys.readouterr().err.splitlines()) == pytest.approx(400 * 20 / 80, abs=2)


@pytest.mark.parametrize("terminal", [False, True])
def test_bar_and_lines_show_one_estimate(clock, capsys, terminal):
    if terminal:
        clock.show.console = Console(file=io.StringIO(), force_terminal=True, width=80)
    detail = "loss 3.412, avg 3.398  1,480 tokens/s  1.2 GB"
    clock.step(0.0, 500, 1000, detail=detail)  # a resumed run
    clock.step(30.0, 510, 1000, detail=detail)
    shown = capsys.readouterr().err
    if terminal:
        clock.show.close()
        shown = clock.show.console.file.getvalue()
    assert "510/1000" in shown
    assert f"{detail}  24 min left" in shown  # in 80 columns


def test_narrow_bar_keeps_loss_and_time(clock):
    clock.show.console = Console(file=io.StringIO(), force_terminal=True, width=60)
    detail = "loss 3.412, avg 3.398  123,480 tokens/s  121.2 GB"
    clock.step(0.0, 500, 1000, detail=detail)
    clock.step(30.0, 510, 1000, detail=detail)
    clock.show.close()
    shown = clock.show.console.file.getvalue()
    assert "loss 3.412, avg 3.398  24 min left" in shown
    assert "tokens/s  24" not in shown


def test_live_line_has_average_and_memory(settings, stop_at):
    """The average goes on in a resumed run."""

    def details(events):
        steps = [event for event in events if isinstance(event, Progress) and event.stage == "training"]
        return [event.detail.split("  ") for event in steps]

    whole, first, second = [], [], []
    adapter = train(settings(name="whole", max_steps=4), whole.append)
    with stop_at(2):
        train(settings(name="part", max_steps=4), first.append)
    resume("part", notify=second.append)
    averages = smooth_losses([entry["loss"] for entry in read_metrics(adapter) if "loss" in entry])
    for average, (loss, speed, memory) in zip(averages, details(whole), strict=True):
        assert loss.endswith(f", avg {average:.3f}")
        assert speed.endswith(" tokens/s")
        assert float(memory.removesuffix(" MB").removesuffix(" GB")) > 0
    assert [loss for loss, _, _ in details(first) + details(second)] == [loss for loss, _, _ in details(whole)]


def read_metrics(adapter):
    return [json.loads(line) for line in (adapter.path / "metrics.jsonl").read_text().splitlines()]


def test_time_left_counts_interruptions(clock, capsys):
    clock.step(0.0, 1, 101)
    for done in range(2, 101):  # 1 s a step, and 4 s for the held-out rows after each
        clock.step(1.0, done, 101)
        clock.step(2.0, 1, 2, stage="held-out loss")
        clock.step(2.0, 2, 2, stage="held-out loss")
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("training")]
    assert lines[0] == "training 2/101  1.6 min left"  # before the first interruption
    assert lines[-1] == "training 98/101  15 s left"


def test_time_left_follows_the_pace(clock):
    estimate = progress.TimeLeft(Progress("training", 1, 1000))
    for done in range(2, 1001):
        clock.now += 0.1 if done <= 500 else 4.0  # the machine becomes busy
        seconds = estimate.update(Progress("training", done, 1000))
        if done == 500:
            assert seconds == pytest.approx(50.0)
        if done == 530:
            assert seconds == pytest.approx(470 * 4.0, rel=0.1)
    assert seconds == 0.0
    assert len(estimate.samples) <= 60


def test_second_run_starts_its_estimate(clock, capsys):
    clock.step(0.0, 1, 3)
    clock.step(60.0, 2, 3)
    clock.step(60.0, 1, 3)  # the next trial of a sweep
    clock.step(2.0, 2, 3)
    clock.show.close()
    clock.step(500.0, 3, 30)
    clock.step(1.0, 4, 30)  # another process took the steps before
    assert capsys.readouterr().err.splitlines()[-2:] == ["training 2/3  2 s left", "training 4/30  26 s left"]


def test_python_run_shows_progress_by_default(settings, capsys):
    train(settings(max_steps=2))
    shown = capsys.readouterr()
    assert "The run takes 2 steps" in shown.err
    assert "training 2/2  loss " in shown.err
    assert shown.out == ""
    events = []
    train(settings(max_steps=1, name="handled"), events.append)
    train(settings(max_steps=1, name="silent"), None)
    assert capsys.readouterr() == ("", "")
    assert [(event.done, event.total) for event in events if getattr(event, "stage", "") == "training"] == [
        (1, 1)
    ]


def test_bar_is_stopped_after_an_error():
    shown = progress.Display()
    shown.console = Console(file=io.StringIO(), force_terminal=True, width=80)
    shown(Progress("training", 1, 9))
    with pytest.raises(ConfigError), progress.closing(shown):
        raise ConfigError("wrong")
    assert shown.bar is None


def test_notebook_has_plain_lines(monkeypatch, capsys):
    """No bar, though Jupyter sets FORCE_COLOR, and no HTML of rich; stderr would be red."""

    class ZMQInteractiveShell:
        """By this name rich knows a notebook."""

    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    clock = Clock(monkeypatch)
    clock.show(Notice("[red]said"))
    for done in range(1, 4):
        clock.step(20.0, done, 3, detail="loss 3.0")
    clock.show.close()
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "[red]said",
        "training 2/3  loss 3.0  20 s left",
        "training 3/3  loss 3.0",
    ]
