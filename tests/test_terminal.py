import pytest

from lora_tuner import Notice, Progress, terminal


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (143, "2.4 min"), (3000, "50 min"), (5400, "1.5 h"), (166_000, "46 h")],
)
def test_durations(seconds, text):
    assert terminal.duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(900, "1 kB"), (2_000_000, "2.0 MB"), (4.3e9, "4.3 GB")])
def test_sizes(count, text):
    assert terminal.size(count) == text


def test_off_a_terminal_progress_is_a_line_now_and_then_with_the_time_left(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    show = terminal.Display()
    for done, now in ((0, 0.0), (1, 5.0), (2, 20.0), (3, 25.0), (4, 40.0)):  # noqa: B007 - the clock reads it
        show(Progress("training", done, 4, "loss 3.1"))
    show(Notice("[not markup] said"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "training 2/4  loss 3.1  20 s left\ntraining 4/4  loss 3.1\n[not markup] said\n"


def test_unknown_facts_are_not_shown(capsys):
    terminal.show_facts({"name": "a", "data": None, "base": {"repo": "b", "revision": None}, "targets": ["q", "v"]})
    shown = capsys.readouterr().out
    assert "repo: b" in shown
    assert "q, v" in shown
    assert "revision" not in shown
    assert "data" not in shown


def test_time_left_counts_from_where_the_stage_went_on(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    show = terminal.Display()
    for done, now in ((500, 0.0), (510, 20.0)):  # noqa: B007 - the clock reads it
        show(Progress("training", done, 1000))
    assert capsys.readouterr().err == "training 510/1000  16 min left\n"
