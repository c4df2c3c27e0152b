"""A stopped or killed run that is resumed equals the uninterrupted run bitwise, or is refused with the reason."""

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_tuner import resume
from lora_tuner.adapters import adapter
from lora_tuner.config import TrainConfig
from lora_tuner.errors import ConfigError, Notice, TrainingError
from lora_tuner.training.checkpoints import (
    HASHES_FILE,
    NOT_DECISIVE,
    REQUIRED_FILES,
    RNG_PREFIX,
    latest_valid,
    prune_checkpoints,
)

from .. import tiny_models
from .injected_signals import best_at, replaced, signalled, threads
from .process import CommandResult, Fault, contents, unchanged
from .runs import (
    ADAPTER,
    HARD,
    MICRO_BATCH,
    PATIENT,
    RUN,
    STEP_END,
    cases,
    leftovers,
    outcome,
    resume_arguments,
    slow,
)

PIECES = sorted({*REQUIRED_FILES, f"{RNG_PREFIX}.pth", HASHES_FILE})


@pytest.fixture
def killed(kept: dict[Any, Any], run: Callable[..., CommandResult], arguments: list[str]) -> Callable[..., Path]:
    """Return the folder of a run killed in step 8, with checkpoints of steps 4 and 6."""

    def of(*how: str, place: Path = RUN) -> Path:
        if ("killed", how) not in kept:
            ended = run(*arguments, *HARD, *how, before=partial(signalled, (MICRO_BATCH, 15, signal.SIGKILL)))
            assert ended.status == -signal.SIGKILL
            kept["killed", how] = kept["place"] / str(len(kept))
            shutil.move(RUN, kept["killed", how])
            Path("runs/.reviews.lock.lora_tuner-new").unlink()
        shutil.copytree(kept["killed", how], place)
        return place

    return of


# Stopped and killed


@pytest.mark.parametrize(
    ("step", "number"),
    cases(
        [(3, signal.SIGINT)],
        [*((step, signal.SIGINT) for step in range(1, 10)), (4, signal.SIGTERM), (9, signal.SIGTERM)],
    ),
)
def test_stop_at_any_step_resumes_bitwise(run, arguments, whole, step, number):
    ended = run(*arguments, *HARD, before=partial(signalled, (STEP_END, step, number)))
    assert ended.status == 130
    assert ended.err.splitlines()[-1] == (
        f"Stopped at step {step} of 9, saved. Resume with: python cli.py train --resume reviews"
    )
    assert leftovers() == {str(RUN)}
    assert run(*resume_arguments(ended)).status == 0
    assert outcome(ADAPTER) == whole(*HARD)
    assert leftovers() == {str(ADAPTER)}


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [*range(1, 19, 2), 18])
def test_kill_in_micro_batch_resumes_bitwise(run, arguments, whole, micro_batch):
    ended = run(*arguments, *HARD, before=partial(signalled, (MICRO_BATCH, micro_batch, signal.SIGKILL)))
    assert ended.status == -signal.SIGKILL
    assert run("train", "--resume", "reviews").status == 0
    assert outcome(ADAPTER) == whole(*HARD)
    assert leftovers() == {str(ADAPTER)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "number"), [(step, (signal.SIGINT, signal.SIGKILL)[step % 2]) for step in range(1, 11)]
)
def test_stop_with_patience_resumes_bitwise(run, arguments, whole, step, number):
    expected = whole(*PATIENT, before=partial(best_at, 6))
    assert expected[2][:2] == (10, 6)
    ended = run(*arguments, *PATIENT, before=partial(best_at, 6, (STEP_END, step, number)))
    assert ended.status in (130, -signal.SIGKILL)
    assert run("train", "--resume", "reviews", before=partial(best_at, 6)).status == 0
    assert outcome(ADAPTER) == expected
    assert leftovers() == {str(ADAPTER)}


@pytest.mark.slow
def test_stop_after_each_step_resumes_bitwise(run, arguments, whole):
    command = [*arguments, *HARD]
    for step in range(1, 10):
        ended = run(*command, before=partial(signalled, (STEP_END, 1, signal.SIGINT)))
        assert f"Stopped at step {step} of 9" in ended.err
        command = resume_arguments(ended)
    assert run(*command).status == 0
    assert outcome(ADAPTER) == whole(*HARD)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "part"), [*(("crash", at / 12) for at in range(12)), *(("kill", at / 4) for at in range(4))]
)
def test_crash_during_checkpoint_resumes_bitwise(run, arguments, whole, kept, tmp_path, what, part):
    """Kill the process, or cut the power, which leaves half of what was not synced."""
    if "events" not in kept:
        counted = run(*arguments, *HARD, fault=Fault(tmp_path / "runs"))
        kept["events"] = counted.events
        shutil.rmtree("adapters")
    first = next(i for i, event in enumerate(kept["events"]) if "checkpoint" in event)
    at = first + int(part * (len(kept["events"]) - first))
    ended = run(*arguments, *HARD, fault=Fault(tmp_path / "runs", at, what))
    assert ended.status == -signal.SIGKILL
    resumed = run("train", "--resume", "reviews")
    if ADAPTER.exists() and resumed.status == 1:  # killed while it cleaned up
        assert "has finished" in resumed.line
    else:
        assert resumed.status == 0
    assert outcome(ADAPTER) == whole(*HARD)
    assert leftovers() == {str(ADAPTER)}


@pytest.mark.slow
def test_resume_command_includes_runs_dir(run, arguments, whole):
    ended = run(
        *arguments, *HARD, "--runs-dir", "my runs", before=partial(signalled, (STEP_END, 5, signal.SIGINT))
    )
    assert ended.err.endswith("Resume with: python cli.py train --resume reviews --runs-dir 'my runs'\n")
    assert run(*resume_arguments(ended)).status == 0
    assert outcome(ADAPTER) == whole(*HARD)
    assert list(Path("my runs").iterdir()) == []


# Damaged checkpoints, and those of another run


def damage(path: Path, how: str, other: Path) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "of another run":
        shutil.copyfile(other / path.name, path)
    else:
        *before, last = path.read_bytes()
        path.write_bytes(bytes([*before, last ^ 1]))


HOW = ("missing", "cut off", "empty", "of another run", "one byte is another")
OTHER = ("--rank", "8", "--seed", "1", "--learning-rate", "1e-3")


@pytest.mark.parametrize("how", HOW)
def test_checkpoint_with_damaged_file_is_skipped(killed, how):
    other = killed(*OTHER, place=Path("other")) / "checkpoint-6"
    killed()
    for piece in PIECES:
        told: list[Any] = []
        path = RUN / "checkpoint-6" / piece
        before = path.read_bytes()
        damage(path, how, other)
        assert latest_valid(RUN, told.append) == RUN / "checkpoint-4"
        (notice,) = told
        assert notice.text.startswith(f"{RUN}/checkpoint-6 is skipped: ")
        if piece != HASHES_FILE or how == "missing":
            assert f": {piece} {'is missing' if how == 'missing' else 'does not match its hash'}." in notice.text
        path.write_bytes(before)
    assert latest_valid(RUN, told.append) == RUN / "checkpoint-6"


def test_checkpoint_without_hash_is_skipped(killed):
    path = killed() / "checkpoint-6" / HASHES_FILE
    hashes = json.loads(path.read_text())
    for piece in REQUIRED_FILES:
        told: list[Any] = []
        path.write_text(json.dumps({name: it for name, it in hashes.items() if name != piece}))
        assert latest_valid(RUN, told.append) == RUN / "checkpoint-4"
        assert told == [Notice(f"{RUN}/checkpoint-6 is skipped: {piece} is missing.")]


@pytest.mark.slow
@pytest.mark.parametrize(("piece", "how"), [(piece, HOW[n % len(HOW)]) for n, piece in enumerate(PIECES)])
def test_resume_from_earlier_checkpoint_is_bitwise(run, killed, whole, arguments, piece, how):
    other = killed(*OTHER, place=Path("other")) / "checkpoint-6"
    killed()
    damage(RUN / "checkpoint-6" / piece, how, other)
    ended = run("train", "--resume", "reviews")
    assert ended.status == 0
    assert f"{RUN}/checkpoint-6 is skipped: " in ended.err
    assert outcome(ADAPTER) == whole(*HARD)


def test_resume_without_valid_checkpoint_starts_over(run, killed, whole):
    killed()
    (RUN / "checkpoint-6").rename(RUN / "checkpoint-8")
    damage(RUN / "checkpoint-4" / "rng_state.pth", "missing", RUN)
    ended = run("train", "--resume", "reviews")
    assert f"{RUN}/checkpoint-8 is skipped: it is of step 6." in ended.err
    assert f"{RUN}/checkpoint-4 is skipped: rng_state.pth is missing." in ended.err
    assert f"{RUN} holds no valid checkpoint: the run starts from its first step." in ended.err
    assert outcome(ADAPTER) == whole(*HARD)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["missing", "of another run"])
def test_checkpoint_with_broken_best_is_skipped(run, arguments, whole, how):
    """Trainer would keep the last weights instead of the best ones."""
    expected = whole(*PATIENT, before=partial(best_at, 6))
    run(*arguments, *PATIENT, before=partial(best_at, 6, (STEP_END, 9, signal.SIGINT)))
    kept = {f"checkpoint-{step}" for step in (6, 8, 9)}
    assert {path.name for path in RUN.glob("checkpoint-*")} == kept
    damage(RUN / "checkpoint-6" / adapter.WEIGHTS_FILE, how, RUN / "checkpoint-8")
    ended = run("train", "--resume", "reviews", before=partial(best_at, 6))
    for step in (9, 8):
        reason = f"is skipped: its best step is in checkpoint-6, where {adapter.WEIGHTS_FILE}"
        assert f"{RUN}/checkpoint-{step} {reason}" in ended.err
    assert outcome(ADAPTER) == expected


def test_pruning_keeps_best_checkpoints(tmp_path):
    """Keep the best of the checkpoint before the newest too, in case the newest is damaged."""
    for step, best in ((2, 2), (4, 2), (6, 2), (8, 8)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(
            json.dumps({"best_model_checkpoint": f"runs/x/checkpoint-{best}"})
        )
    prune_checkpoints(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]


def test_checkpoint_with_other_settings_is_refused(run, killed):
    other = killed(*OTHER, place=Path("other")) / "checkpoint-6"
    killed()
    shutil.rmtree(RUN / "checkpoint-6")
    shutil.copytree(other, RUN / "checkpoint-6")
    with unchanged(RUN):
        ended = run("train", "--resume", "reviews")
    assert ended.status == 1
    assert ended.line.startswith(
        f"Error: {RUN}/run.yaml differs from that of {RUN}/checkpoint-6: rank (was 8, is 4)"
    )
    assert "seed (was 1, is 0)" in ended.line
    assert leftovers() == {str(RUN)}


@pytest.mark.slow
def test_checkpoint_with_other_data_is_refused(run, killed, reviews_csv):
    text = reviews_csv.read_text()
    reviews_csv.write_text(text + "one more row,1\n")
    other = killed("--seed", "0", place=Path("other")) / "checkpoint-6"
    reviews_csv.write_text(text)
    killed()
    shutil.rmtree(RUN / "checkpoint-6")
    shutil.copytree(other, RUN / "checkpoint-6")
    ended = run("train", "--resume", "reviews")
    assert ended.status == 1
    assert ended.line.startswith(
        f"Error: {RUN}/checkpoint-6 cannot be resumed exactly: changed since it stopped: data (was "
    )


# Changes since the run stopped

CHANGED: dict[str, Any] = {
    "dataset": "other.csv", "subset": "plain", "split": "test", "text_column": "text", "format": "text", "where": ["label=1"],
    "max_rows": 50, "max_invalid": 0.5, "txt_rows": "line", "delimiter": ";", "encoding": "cp1252",
    "clean": "lines", "max_length": 32, "long_rows": "chunk",
    "packing": False, "split_salt": "x", "eval_rows": 7, "eval_dataset": "reviews.csv", "base": "elsewhere", "revision": "main",
    "parent": "x", "rank": 2, "alpha": 3, "dropout": 0.2, "target_modules": "all-linear", "max_steps": 10, "batch_size": 3,
    "gradient_accumulation": 1, "learning_rate": 0.02, "schedule": "linear", "warmup": 0.1, "weight_decay": 0.1,
    "max_grad_norm": 2.0, "eval_every": 3, "save_every": 3, "seed": 1, "name": "other", "device": "auto", "dtype": "bfloat16",
    "group_by": "label", "table": "x", "near_duplicates": "keep", "add_tokens": ["<x>"],
    "streaming": True, "method": "dora", "load_in": "4bit", "gradient_checkpointing": "on",
}  # fmt: skip
TOGETHER: dict[str, dict[str, Any]] = {
    "template": {"text_column": None, "template": "{text}"},
    "answer_column": {"text_column": None, "template": "{text}", "answer_column": "text"},
    "eval_max_rows": {"max_rows": 50, "eval_max_rows": 60},
    "eval_split": {"eval_dataset": "reviews.csv", "eval_split": "test"},
    "parent_sha256": {"parent": "x", "parent_sha256": "ab"},
    "shuffle_buffer": {"streaming": True, "shuffle_buffer": 5},
    "force": {"parent": "x", "force": True},
    "objective": {"text_column": None, "objective": "dpo"},
    "beta": {"text_column": None, "objective": "dpo", "beta": 0.5},
    "label_column": {"label_column": "label"},
    "labels": {"label_column": "label", "labels": ["0", "1"]},
    "label_names": {"label_column": "label", "label_names": ["0=a", "1=b"]},
    "balance": {"label_column": "label", "balance": True},
    "patience": {"eval_every": 2, "patience": 2},
    "epochs": {"max_steps": None, "epochs": 1.0},
    "minutes": {"max_steps": None, "minutes": 1.0},
}


@pytest.mark.parametrize("checkpoints", [True, False])
def test_changed_setting_is_named(killed, checkpoints):
    killed()
    text = (RUN / adapter.RUN_FILE).read_text()
    if not checkpoints:  # found without checkpoints: where the run is and when it ends
        shutil.rmtree(RUN / "checkpoint-4")
        shutil.rmtree(RUN / "checkpoint-6")
    changes = {name: {name: value} for name, value in CHANGED.items()} | TOGETHER
    assert changes.keys() == TrainConfig.model_fields.keys() - NOT_DECISIVE
    for name in changes if checkpoints else ("name", "epochs", "minutes"):
        settings = {key: it for key, it in (yaml.safe_load(text) | changes[name]).items() if it is not None}
        (RUN / adapter.RUN_FILE).write_text(yaml.safe_dump(settings))
        with pytest.raises(
            TrainingError,
            match=rf"^runs/reviews/run\.yaml (differs from|was changed: ).*(\b{name}\b|its max_steps None)",
        ):
            resume("reviews")
    assert leftovers() == {str(RUN)}


def no_kernels() -> None:
    return None


@pytest.mark.parametrize(
    ("what", "before"),
    [
        ("data", None),
        slow("base", None),
        slow("tokenizer", None),
        slow("held-out rows", None),
        slow("threads", partial(threads, 2)),
        slow("kernels", partial(replaced, "lora_tuner.models.fused_blocks:native_kernels", no_kernels)),
        slow("torch", partial(replaced, "torch:__version__", "0.0.1")),
        slow("peft", partial(replaced, "peft:__version__", "0.0.1")),
        slow("transformers", partial(replaced, "transformers:__version__", "0.0.1")),
    ],
)
def test_changed_fact_is_named(run, killed, reviews_csv, what, before):
    killed()
    if what == "data":
        reviews_csv.write_text(reviews_csv.read_text().replace("the actor", "an actor", 1))
    elif what == "held-out rows":
        reviews_csv.write_text(reviews_csv.read_text().replace("the", "a"))
    elif what == "base":
        shutil.rmtree("base")
        tiny_models.save_model(Path("base"), "gpt2", seed=1)
    elif what == "tokenizer":
        path = Path("base/tokenizer.json")
        parts = json.loads(path.read_text())
        vocabulary = parts["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        path.write_text(json.dumps(parts))
    with unchanged(RUN):
        ended = run("train", "--resume", "reviews", before=before)
    assert ended.status == 1
    assert ended.line.startswith(f"Error: {RUN} cannot be resumed exactly: changed since it stopped: ")
    assert f"{what} (was " in ended.line
    advice = "Restore it, or train again with --overwrite."
    if what == "threads":
        advice = "or with --accept threads, and the manifest says that the result is no longer exact."
    assert ended.line.endswith(advice)
    assert leftovers() == {str(RUN)}


BROKEN = [None, b"", b"{", b"[]", b"\xff\xfe", b"name: [", b'{"nothing": "known"}']


@pytest.mark.parametrize("name", [adapter.RUN_FILE, adapter.MANIFEST_FILE])
def test_broken_run_file_is_one_line(run, killed, name):
    killed()
    for number, content in enumerate(BROKEN):
        (RUN / name).unlink(missing_ok=True)
        if content is not None:
            (RUN / name).write_bytes(content)
        before = contents(RUN)
        if number == 0 and name == adapter.RUN_FILE:
            ended = run("train", "--resume", "reviews")
            assert (ended.status, ended.err.count("\n")) == (1, 1)
            assert f"{RUN}/{name}" in ended.line
        else:
            with pytest.raises((TrainingError, ConfigError), match=rf"runs/reviews(/| has no ){name}"):
                resume("reviews")
        assert contents(RUN) == before


@pytest.mark.parametrize("part", ["data", "run"])
def test_manifest_without_run_is_refused(killed, part):
    killed()
    facts = json.loads((RUN / adapter.MANIFEST_FILE).read_text())
    (RUN / adapter.MANIFEST_FILE).write_text(json.dumps(facts | {part: None}))
    with pytest.raises(
        TrainingError, match=r"^runs/reviews cannot be resumed exactly: changed .* \(was none, is "
    ):
        resume("reviews")


@pytest.mark.slow
def test_missing_run_yaml_names_a_copy(run, killed, whole):
    killed()
    (RUN / adapter.RUN_FILE).unlink()
    copy = RUN / "checkpoint-4" / adapter.RUN_FILE
    assert run("train", "--resume", "reviews").line == (
        f"Error: There is no unfinished run {RUN}: it has finished, or {RUN}/run.yaml was removed; {copy} is a copy of it. "
        "Train without --resume."
    )
    shutil.copyfile(copy, RUN / adapter.RUN_FILE)
    assert run("train", "--resume", "reviews").status == 0
    assert outcome(ADAPTER) == whole(*HARD)


# Finished runs

SHORT = ("--max-steps", "2")


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--keep-checkpoints",)])
def test_resume_of_finished_run_is_refused(run, arguments, how):
    assert run(*arguments, *SHORT, *how).status == 0
    with unchanged(Path("runs")), unchanged(Path("adapters")):
        ended = run("train", "--resume", "reviews")
    assert ended.status == 1
    assert ended.line == (
        f"Error: There is no unfinished run {RUN}: it has finished, as {ADAPTER}. Train without --resume. A run keeps its "
        "number of steps; a new adapter continues from the finished one: python cli.py train --config "
        f"{ADAPTER}/run.yaml --from reviews --name reviews-2 --max-steps N"
    )


@pytest.mark.parametrize(
    ("moment", "time", "how"),
    [
        ("lora_tuner.training.paths:remove_run_folder", 1, ()),
        slow("lora_tuner.training.paths:remove_run_folder", 1, ("--keep-checkpoints",)),
        slow("lora_tuner.atomic_io:shutil.rmtree", 2, ()),  # the first is of the check before training
    ],
)
def test_kill_before_cleanup_trains_nothing_again(run, arguments, moment, time, how):
    ended = run(*arguments, *SHORT, *how, before=partial(signalled, (moment, time, signal.SIGKILL)))
    assert ended.status == -signal.SIGKILL
    checkpoint = contents(RUN / "checkpoint-2")
    with unchanged(Path("adapters")):
        ended = run("train", "--resume", "reviews")
    assert ended.status == 1
    assert ended.err.count("\n") == 1
    assert ended.line.startswith(
        "Error: The run reviews has finished: its adapter is"
    ) or "as adapters/reviews" in (ended.line)
    if how:
        assert leftovers() == {str(ADAPTER), str(RUN)}
        assert contents(RUN / "checkpoint-2") == checkpoint != {}
        assert "There is no unfinished run" in run("train", "--resume", "reviews").line
    else:
        assert {path for path in leftovers() if "/." not in path} == {str(ADAPTER)}
        assert run(*arguments, *SHORT, "--name", "next").status == 0  # removes what the killed run has hidden
        assert leftovers() == {str(ADAPTER), "adapters/next"}


@pytest.mark.slow
def test_run_over_damaged_adapter_resumes(run, arguments):
    """Resume a finished run whose adapter is damaged."""
    assert run(*arguments, *SHORT).status == 0
    expected = outcome(ADAPTER)
    weights = ADAPTER / adapter.WEIGHTS_FILE
    damage(weights, "one byte is another", ADAPTER)
    ended = run(*arguments, *SHORT, "--overwrite", before=partial(signalled, (STEP_END, 1, signal.SIGINT)))
    assert run(*resume_arguments(ended)).status == 0
    assert outcome(ADAPTER) == expected
