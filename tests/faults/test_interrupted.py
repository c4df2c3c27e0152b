"""Ctrl-C, SIGTERM and SIGHUP at any moment: status 130, one line, no partial files, and the command that resumes."""

import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from lora_tuner.training.paths import run_lock

from .. import adapter_files
from . import workspaces
from .injected_signals import ignored, signalled
from .process import CommandResult, Fault, contents, unchanged
from .runs import ADAPTER, HARD, RUN, STEP_END, cases, leftovers, outcome, resume_arguments

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
BEFORE_IT_RUNS = {  # nothing to resume yet
    "reading": "lora_tuner.training.inputs:load_dataset",
    "loading": "lora_tuner.models.loading:load_base",
    "tokenizing": "lora_tuner.data.tokenization:encode_texts",
    "wrapping": "lora_tuner.models.lora:add_lora",
    "counting memory": "lora_tuner.training.profiling:fit_to_memory",
    "measuring the base": "lora_tuner.evaluation.held_out_loss:measure_loss",
    "keeping rows": "lora_tuner.data.eval_sets:cache_rows",
    "starting": "lora_tuner.training.run:config_to_yaml",
}
AFTER_ITS_STEPS: dict[str, tuple[str, int]] = {
    "measuring": ("lora_tuner.training.loss_result:paired_gain", 1),
    "writing weights": ("lora_tuner.training.run:save_adapter", 1),
    "writing the curve": ("lora_tuner.adapters.plots:write_metrics", 1),
    "drawing": ("lora_tuner.adapters.plots:plot_loss", 1),
    "writing the card": ("lora_tuner.adapters.model_card:model_card", 1),
    "checking": ("lora_tuner.adapters.library:load_adapter_folder", 1),
}


NOTHING_SAVED = "Interrupted before the first step: nothing was saved."


def stopped(ended: CommandResult, line: str = "Interrupted.") -> bool:
    assert (ended.status, ended.err.splitlines()[-1]) == (130, line), (ended.status, ended.err)
    return True


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Write an adapter that commands replace."""
    return adapter_files.write(tmp_path / ADAPTER, facts=adapter_files.manifest())


@pytest.mark.parametrize(
    ("moment", "number"),
    cases([("measuring the base", INT)], [(it, (INT, TERM, HUP)[n % 3]) for n, it in enumerate(BEFORE_IT_RUNS)]),
)
def test_signal_before_training_leaves_nothing(run, arguments, old, moment, number):
    with unchanged(old):
        ended = run(*arguments, "--overwrite", before=partial(signalled, (BEFORE_IT_RUNS[moment], 1, number)))
    assert stopped(ended, NOTHING_SAVED)
    assert leftovers() == {str(ADAPTER)}


@pytest.mark.parametrize(
    ("moment", "number"),
    cases([("drawing", INT)], [(it, (INT, TERM, HUP)[n % 3]) for n, it in enumerate(AFTER_ITS_STEPS)]),
)
def test_signal_after_training_resumes_bitwise(run, arguments, old, whole, moment, number):
    name, nth = AFTER_ITS_STEPS[moment]
    with unchanged(old):
        ended = run(*arguments, *HARD, "--overwrite", before=partial(signalled, (name, nth, number)))
    assert stopped(ended, "Stopped immediately. Resume with: python cli.py train --resume reviews")
    assert leftovers() == {str(ADAPTER), str(RUN)}
    ended = run(
        *resume_arguments(ended),
        before=partial(signalled, ("lora_tuner.training.trainer:LoraTrainer.training_step", 1, 9)),
    )
    assert ended.status == 0
    assert outcome(ADAPTER) == whole(*HARD)
    assert leftovers() == {str(ADAPTER)}


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param([(STEP_END, 3, INT), (STEP_END, 3, INT)], id="at once"),
        *(
            pytest.param(moments, id=name, marks=pytest.mark.slow)
            for name, moments in {
                "in the next step": [(STEP_END, 3, TERM), ("lora_tuner.training.trainer:save_adapter", 2, INT)],
                "in the checkpoint": [
                    (STEP_END, 4, INT),
                    ("lora_tuner.training.trainer:TrainerState.save_to_json", 2, TERM),
                ],
                "after the checkpoint": [
                    (STEP_END, 6, INT),
                    ("lora_tuner.training.checkpoints:prune_checkpoints", 3, INT),
                ],
                "at the end": [(STEP_END, 9, INT), ("lora_tuner.training.checkpoints:prune_checkpoints", 5, INT)],
            }.items()
        ),
    ],
)
def test_second_signal_stops_immediately_resumable(run, arguments, whole, moments):
    ended = run(*arguments, *HARD, before=partial(signalled, *moments))
    assert stopped(ended, "Stopped immediately. Resume with: python cli.py train --resume reviews")
    assert leftovers() == {str(RUN)}
    assert run(*resume_arguments(ended)).status == 0
    assert outcome(ADAPTER) == whole(*HARD)
    assert leftovers() == {str(ADAPTER)}


@pytest.mark.slow
def test_repeated_hangup_saves_like_sigterm(run, arguments, whole):
    ended = run(*arguments, *HARD, before=partial(signalled, *[(STEP_END, 3, HUP)] * 3))
    assert stopped(ended, "Stopped at step 3 of 9, saved. Resume with: python cli.py train --resume reviews")
    assert run(*resume_arguments(ended)).status == 0
    assert outcome(ADAPTER) == whole(*HARD)


def test_hangup_ignored_at_start_stays_ignored(run, arguments):
    moments = [("lora_tuner.data.tokenization:encode_texts", 1, HUP), (STEP_END, 2, HUP)]
    assert run(*arguments, "--max-steps", "3", before=partial(ignored, HUP, *moments)).status == 0


SWEEP = ("--rank", "2,4", "--max-steps", "3", "--save-every", "2")


@pytest.fixture
def whole_sweep(kept, run, arguments):
    """Return the weights of the trials of an undisturbed sweep."""
    if "sweep" not in kept:
        assert run(*arguments, *SWEEP, "--name", "whole").status == 0
        kept["sweep"] = [outcome(path) for path in sorted(Path("adapters").glob("whole-r*"))]
        for path in [*Path("adapters").glob("whole-r*"), Path("runs")]:
            shutil.rmtree(path)
    return kept["sweep"]


@pytest.mark.parametrize(
    ("moment", "nth", "number", "line"),
    cases(
        [],  # the quick one is test_stopped_sweep_resumes_bitwise
        [
            ("lora_tuner.training.sweep:prepare_training", 1, INT, None),  # nothing to resume yet
            ("lora_tuner.training.run:train", 1, HUP, "Stopped immediately."),
            ("lora_tuner.training.run:config_to_yaml", 1, TERM, "Stopped immediately."),
            (STEP_END, 1, TERM, "Stopped at step 1 of 3, saved."),
            ("lora_tuner.training.paths:remove_run_folder", 1, INT, "Stopped immediately."),
            ("lora_tuner.training.sweep:prepare_training", 3, INT, "Stopped immediately."),
            (STEP_END, 4, INT, "Stopped at step 1 of 3, saved."),
            ("lora_tuner.adapters.model_card:model_card", 2, TERM, "Stopped immediately."),
            ("lora_tuner.training.sweep:evaluation.held_out_losses", 1, INT, "Stopped immediately."),
            ("lora_tuner.adapters.plots:plot_sweep", 1, HUP, "Stopped immediately."),
        ],
    ),
)
def test_signalled_sweep_resumes_bitwise(run, arguments, old, whole_sweep, moment, nth, number, line):
    with unchanged(old):
        ended = run(*arguments, *SWEEP, before=partial(signalled, (moment, nth, number)))
    if line is None:
        assert stopped(ended, NOTHING_SAVED)
        assert leftovers() == {str(ADAPTER)}
        return
    assert stopped(ended, f"{line} Resume with: python cli.py train --resume reviews")
    assert run(*resume_arguments(ended)).status == 0
    assert [outcome(Path(f"{ADAPTER}-r{rank}")) for rank in (2, 4)] == whole_sweep
    assert leftovers() == {*(f"{ADAPTER}{end}" for end in ("", "-r2", "-r4")), f"{RUN}.sweep"}


@pytest.mark.slow
def test_signal_during_resume_changes_nothing(run, arguments, whole):
    assert run(*arguments, *HARD, before=partial(signalled, (STEP_END, 5, INT))).status == 130
    with unchanged(RUN):
        assert stopped(
            run(
                "train",
                "--resume",
                "reviews",
                before=partial(signalled, ("lora_tuner.models.lora:add_lora", 1, TERM)),
            )
        )
    assert run("train", "--resume", "reviews").status == 0
    assert outcome(ADAPTER) == whole(*HARD)


def test_ctrl_c_from_another_process(start, arguments):
    """Send SIGINT from another process at any moment."""
    command = start(
        *arguments,
        *HARD,
        before=partial(signalled, ("lora_tuner.training.trainer:LoraTrainer.training_step", 6, signal.SIGSTOP)),
    )
    command.wait_for(lambda: _state(command.pid) == "T")
    command.send(INT)
    command.send(signal.SIGCONT)
    ended = command.end()
    assert stopped(ended, "Stopped at step 3 of 9, saved. Resume with: python cli.py train --resume reviews")


@pytest.mark.parametrize("number", [INT, pytest.param(HUP, marks=pytest.mark.slow)])
def test_interrupted_waiting_leaves_nothing(start, arguments, number):
    with run_lock(Path("runs"), "other"):
        command = start(*arguments, "--queue")
        command.wait_for(lambda: "Waiting" in command.err)
        assert command.err == "Waiting for 1 run in runs: other.\n"
        command.send(number)
        assert stopped(command.end(), NOTHING_SAVED)
    assert leftovers() == set()


def test_queued_run_goes_on_alone(start, arguments, run):
    with run_lock(Path("runs"), "other"):
        command = start(*arguments, "--max-steps", "1", "--queue")
        command.wait_for(lambda: "Waiting" in command.err)
        assert "'reviews' is training or waiting in runs already" in run(*arguments, "--queue").line
        assert "There is no unfinished run runs/reviews" in run("train", "--resume", "reviews", "--queue").line
    assert command.end().status == 0
    assert leftovers() == {str(ADAPTER)}
    assert "adapters/reviews exists" in run(*arguments, "--queue").line
    assert "--queue is for training" in run(*arguments, "--queue", "--plan").line


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# The other commands

READERS: dict[str, tuple[list[str], list[str]]] = {
    "generate": (
        ["generate", "--adapter", "one", "Acting"],
        [
            "lora_tuner.models.loading:load_base",
            "lora_tuner.inference.generator:Generator._load_adapter",
            "lora_tuner.inference.sequence:Sequence.append_token",
        ],
    ),
    "compare": (["compare", "--adapter", "one", "Acting"], ["lora_tuner.inference.batch:RunningBatch.step"]),
    "evaluate": (
        ["evaluate", "one", "--plot", "gains.png", "--eval-dataset", "reviews.txt"],
        ["lora_tuner.evaluation.held_out_loss:measure_loss", "lora_tuner.adapters.plots:plot_gains"],
    ),
}


@pytest.mark.parametrize(
    ("command", "moment", "number"),
    cases(
        [("generate", "lora_tuner.inference.sequence:Sequence.append_token", INT)],
        [
            *((name, it, INT) for name, (_, moments) in READERS.items() for it in moments),
            *(("evaluate", "lora_tuner.adapters.plots:plot_gains", number) for number in (TERM, HUP)),
        ],
    ),
)
def test_signal_in_reading_command_is_one_line(world, tmp_path, command, moment, number):
    root = tmp_path / "root"
    shutil.copytree(world, root)
    (root / "gains.png").write_bytes(b"an older picture")
    before = contents(root, skip=["cache"])
    ended = workspaces.run(root, *READERS[command][0], before=partial(signalled, (moment, 1, number)))
    assert stopped(ended)
    assert contents(root, skip=["cache"]) == before


@pytest.mark.slow
def test_sigint_at_prompt_is_one_line(start, world, tmp_path):
    ended = start(
        "generate", "--adapter", "one", "--adapters-dir", world / "adapters",
        before=partial(signalled, ("builtins:input", 1, INT)),
    ).end()  # fmt: skip
    assert stopped(ended)


WRITERS = [
    name for name in workspaces.COMMANDS if name.startswith(("merge", "blend", "compress", "export", "adopt"))
]


def interrupted_at(
    name: str, world: Path, base: Path, tmp_path: Path, chosen: Callable[[int], list[int]]
) -> None:
    """Press Ctrl-C at some of the file operations: everything is the old or the new."""
    words = workspaces.arguments(name, world, base)
    new, events = workspaces.becomes(words, world, tmp_path / "clean")
    for at in chosen(len(events)):
        root = tmp_path / str(at)
        shutil.copytree(world, root)
        old = workspaces.state(root)
        ended = workspaces.run(root, *words, fault=Fault(root, at, "interrupt"))
        assert stopped(ended), events[at]
        assert workspaces.state(root) in (old, new), events[at]
        assert workspaces.litter(root) == [], events[at]


def test_sigint_during_cleanup_leaves_new(world, gpt2, tmp_path):
    interrupted_at("blend over another", world, gpt2, tmp_path, lambda count: [count - 2])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WRITERS, "rename", "remove"])
def test_sigint_while_writing_keeps_old_or_new(name, world, gpt2, tmp_path):
    interrupted_at(name, world, gpt2, tmp_path, lambda count: list(range(0, count, 1 if "over" in name else 3)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "train over another", "sweep", "sweep over another"])
def test_sigint_while_training_writes_is_resumable(name, world, gpt2, tmp_path):
    words = workspaces.arguments(name, world, gpt2)
    new, events = workspaces.becomes(words, world, tmp_path / "clean")
    for at in workspaces.points(name, events)[:: 1 if name.startswith("sweep") else 4]:
        root = tmp_path / str(at)
        shutil.copytree(world, root)
        old = workspaces.state(root)
        ended = workspaces.run(root, *words, fault=Fault(root, at, "interrupt"))
        assert ended.status == 130, (events[at], ended.err)
        assert workspaces.old_or_new(workspaces.state(root), old, new)
        # Interrupted while it removed a lock or a ticket: the next training removes it.
        held = (".lock.lora_tuner-new", ".ticket.lora_tuner-new")
        left = [path for path in workspaces.litter(root) if not path.endswith(held)]
        assert left == [], events[at]
        assert events[at].endswith(held) or workspaces.litter(root) == [], events[at]
        if "Resume with: " in ended.err:
            ended = workspaces.run(root, *resume_arguments(ended))
            assert ended.status == 0 or "has finished" in ended.line, (events[at], ended.err)
            assert workspaces.state(root) == new
            assert [path.name for path in root.glob("runs/*")] == [key for key in new if key.endswith(".sweep")]
