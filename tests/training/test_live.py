"""Losses and samples of a run in its folder, while it trains."""

import errno
import json
import os
from pathlib import Path

import pytest

from lora_tuner import Notice, resume, train
from lora_tuner.adapters.adapter import METRICS_FILE, RUN_FILE
from lora_tuner.adapters.samples import SAMPLES_FILE
from lora_tuner.training import arguments, checkpoints
from lora_tuner.training.live import last_step, read_live

from .test_run import weights

FOLDER = Path("runs/reviews")
CHANGES = {"max_steps": 4, "eval_every": 2, "sample_prompt": ["Acting"], "dropout": 0.1}


@pytest.fixture
def watched(monkeypatch):
    """What stands in the folder of a run after each entry of its log."""
    seen = []

    def watch(self, state):
        update(self, state)
        live = read_live(self.folder)
        seen.append((len(live.metrics), [sample.step for sample in live.samples], live))

    update = arguments.LiveLog._update
    monkeypatch.setattr(arguments.LiveLog, "_update", watch)
    return seen


def test_live_files_grow_from_step_0(settings, watched):
    adapter = train(settings(**CHANGES))
    counts, sampled, runs = zip(*watched, strict=True)
    assert counts == (0, 1, 2, 4, 5, 6, 7, 7)  # steps and evaluations, before the first of which is the base
    assert sampled == ([0], [0], *[[0, 2]] * 3, *[[0, 2, 4]] * 3)
    last = runs[-1]
    assert last.metrics[0] == {"step": 0, "eval_loss": adapter.manifest.result.base_loss}
    final = [json.loads(line) for line in (adapter.path / METRICS_FILE).read_text().splitlines()]
    assert last.metrics == final
    assert last.samples == adapter.samples
    assert (last.total, last.seconds_left) == (4, 0)
    assert last.memory_bytes > 10e6
    assert last.tokens_per_second > 0
    assert runs[2].seconds_left > 0
    assert not FOLDER.exists()


def test_resumed_run_rewrites_live_files(settings, stop_at, watched):
    whole = train(settings(name="whole", **CHANGES))
    with stop_at(3):
        train(settings(**CHANGES))
    assert checkpoints.is_run(FOLDER)
    for name in (METRICS_FILE, SAMPLES_FILE):  # of steps that are undone, torn
        with (FOLDER / name).open("a") as file:
            file.write('{"step": 4, "loss": 1.0, "tokens": 3}\n{"st')
    watched.clear()
    resumed = resume("reviews")
    steps = [entry["step"] for entry in watched[0][2].metrics]
    assert steps == [0, 1, 2, 2, 3]
    assert watched[-1][2].samples == whole.samples
    assert weights(resumed) == weights(whole)


def test_full_disk_keeps_run_going(settings, watched, monkeypatch):
    """The curve is written again when there is room."""
    calls = []

    def fail(path, text):
        calls.extend([path] * (path.name in checkpoints.LIVE_FILES))
        if len(calls) in (2, 3):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, text)

    write = arguments.atomic_io.atomic_write_text
    monkeypatch.setattr(arguments.atomic_io, "atomic_write_text", fail)
    notices = []
    adapter = train(settings(**CHANGES), notices.append)
    told = [event.text for event in notices if isinstance(event, Notice) and "cannot be followed" in event.text]
    assert told == [
        "The run goes on, but its curve cannot be followed. runs/reviews/samples.jsonl: No space left on device: "
        "free some space and try again."
    ]
    assert [count for count, _, _ in watched] == [0, 0, 2, 4, 5, 6, 7, 7]
    assert watched[-1][2].samples == adapter.samples


def test_torn_and_foreign_lines_are_skipped(tmp_path):
    entry = {"step": 1, "loss": 2.0, "tokens": 30, "seconds": 0.5, "peak_memory_bytes": 7}
    paused = {"step": 2, "loss": 2.0, "tokens": 30, "seconds": 900.0, "peak_memory_bytes": 9}
    lines = [entry, paused, entry | {"step": 3, "peak_memory_bytes": 9}]
    text = (
        "".join(json.dumps(line) + "\n" for line in lines)
        + '[]\n{"loss": 1}\n{"step": 4, "loss": "x"}\n{"step": 4, "lo'
    )
    (tmp_path / METRICS_FILE).write_text(text)
    (tmp_path / SAMPLES_FILE).write_bytes(
        b'{"step": 0, "prompt": "A", "base": "b", "adapter": "c"}\n{"step": 1}\n\xff'
    )
    (tmp_path / RUN_FILE).write_text("max_steps: 11\n")
    live = read_live(tmp_path)
    assert live.metrics == lines
    assert [sample.prompt for sample in live.samples] == ["A"]
    assert (live.total, live.memory_bytes, live.tokens_per_second) == (11, 9, 60)
    assert live.seconds_left == 4  # the pause does not count
    assert last_step(tmp_path) == 3


def test_missing_files_are_empty(tmp_path):
    live = read_live(tmp_path)
    assert (live.metrics, live.samples, live.total, live.seconds_left) == ([], [], None, None)
    assert last_step(tmp_path) is None
    os.mkfifo(tmp_path / METRICS_FILE)  # would block
    assert (read_live(tmp_path).metrics, last_step(tmp_path)) == ([], None)


def test_kept_checkpoints_have_no_live_files(settings):
    train(settings(max_steps=2, save_every=2, keep_checkpoints=True))
    assert sorted(path.name for path in FOLDER.iterdir()) == ["checkpoint-2", "manifest.json"]
