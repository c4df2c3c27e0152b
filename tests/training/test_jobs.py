"""Runs as jobs: processes in a queue, which can be stopped, paused, resumed and forgotten."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from lora_tuner import Library, train
from lora_tuner.adapters.adapter import METRICS_FILE
from lora_tuner.errors import AdapterError, TrainingError
from lora_tuner.training import jobs, tickets
from lora_tuner.training.jobs import (
    JobState,
    continue_job,
    dismiss_job,
    find_job,
    list_jobs,
    pause_job,
    resume_job,
    start_job,
    stop_job,
)
from lora_tuner.training.paths import run_lock

from .test_run import weights

RUNS = Path("runs")
ROOT = Path(jobs.__file__).parents[2]
# A process that waits for its turn, notes it, and lives until it is ended; without torch.
WAITS = """
import sys, time
from pathlib import Path
from lora_tuner.training.tickets import turn
with turn(Path("runs"), sys.argv[1], lambda notice: print(notice.text, flush=True)):
    with open("order", "a") as file:
        file.write(sys.argv[1] + " ")
    time.sleep(float(sys.argv[2]))
"""
TRAINS = """
import time
from pathlib import Path
from lora_tuner.training.paths import run_lock
with run_lock(Path("runs"), "poems"):
    time.sleep(60)
"""


def wait_for(condition, seconds=180.0):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, list_jobs(RUNS)
        time.sleep(0.02)
    return value


def state_of(name):
    return next((job.state for job in list_jobs(RUNS) if job.name == name), None)


@pytest.fixture
def start_python(monkeypatch):
    """Start processes of Python, which are ended after the test."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(tickets, "POLL_SECONDS", 0.05)
    processes = []

    def start(code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def _no_process_is_left(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    for job in list_jobs(RUNS):
        if job.pid and job.pid != os.getpid():
            with contextlib.suppress(psutil.Error):
                psutil.Process(job.pid).kill()


def test_queue_is_first_come_first_served(start_python):
    with run_lock(RUNS, "terminal"):
        processes = {}
        for name in ("one", "two", "three"):
            processes[name] = start_python(WAITS, name, 0)
            wait_for(lambda name=name: state_of(name) == JobState.WAITING)
        assert [(job.name, job.ahead) for job in list_jobs(RUNS)] == [
            ("terminal", 0),
            ("one", 1),
            ("two", 2),
            ("three", 3),
        ]
        assert processes["two"].stdout.readline() == "Waiting for 2 runs in runs: terminal, one.\n"
        processes["two"].kill()
        processes["two"].wait()
        assert state_of("two") is None  # its ticket is stale
    for name in ("one", "three"):
        assert processes[name].wait(30) == 0
    assert Path("order").read_text().split() == ["one", "three"]
    assert list(RUNS.iterdir()) == []


def test_run_of_a_name_waits_once():
    refused = pytest.raises(TrainingError, match="'poems' is training or waiting in runs")
    with run_lock(RUNS, "poems"), refused, tickets.turn(RUNS, "poems", print):
        pass
    assert list(RUNS.iterdir()) == []


def test_run_that_waits_is_not_overtaken():
    RUNS.mkdir()
    with FileLock(RUNS / ".1-1-0-poems.ticket.lora_tuner-new"):
        with pytest.raises(TrainingError, match="'poems' is training or waiting"), run_lock(RUNS, "poems"):
            pass
        with run_lock(RUNS, "other"):
            pass
    with run_lock(RUNS, "poems"):
        pass


def test_terminal_run_is_paused_and_stopped(start_python):
    process = start_python(TRAINS)
    job = wait_for(lambda: next(iter(list_jobs(RUNS)), None))
    assert (job.name, job.state, job.pid, job.log) == (
        "poems",
        JobState.STARTING,
        process.pid,
        None,
    )
    pause_job(job)
    assert wait_for(lambda: state_of("poems") == JobState.PAUSED)
    continue_job(job)
    assert wait_for(lambda: state_of("poems") == JobState.STARTING)
    pause_job(job)
    with pytest.raises(TrainingError, match="poems is training: stop it first"):
        dismiss_job(find_job("poems", RUNS))
    stop_job(find_job("poems", RUNS))  # also while it is paused
    process.wait(30)
    assert list_jobs(RUNS) == []
    with pytest.raises(TrainingError, match="poems has no process here"):
        stop_job(job)


def test_foreign_process_is_never_stopped(start_python):
    """Its number is that of a process which has ended, and whose lock another one has by chance."""
    other = start_python("import time; time.sleep(60)")
    RUNS.mkdir()
    started = tickets.process_start(other.pid) - 60_000
    with FileLock(RUNS / f".0-{other.pid}-{started}-poems.ticket.lora_tuner-new"):
        job = find_job("poems", RUNS)
        for act in (stop_job, pause_job, continue_job):
            with pytest.raises(TrainingError, match="poems has no process here"):
                act(job)
    assert other.poll() is None
    assert psutil.Process(other.pid).status() != psutil.STATUS_STOPPED


def test_process_of_other_user_is_named(start_python, monkeypatch):
    start_python(TRAINS)
    job = wait_for(lambda: next(iter(list_jobs(RUNS)), None))

    def refuse(process):
        raise psutil.AccessDenied(process.pid)

    monkeypatch.setattr(psutil.Process, "suspend", refuse)
    with pytest.raises(TrainingError, match="The process of poems cannot be controlled"):
        pause_job(job)


@pytest.fixture
def says(monkeypatch):
    """Let jobs be processes that say something and end."""

    def set_code(code):
        command = [sys.executable, "-c", f"import sys\n{code}"]
        monkeypatch.setattr(jobs, "command_line", lambda *arguments: command)

    return set_code


def test_job_names_the_called_program(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/lora-tuner", "serve"])
    done = subprocess.run(jobs.command_line("train", "--bogus"), capture_output=True, text=True)
    assert done.stderr.endswith(" See lora-tuner train --help.\n")


def ended(name="reviews"):
    return wait_for(lambda: not (job := find_job(name, RUNS)).state.is_alive and job)


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        (
            "sys.exit('Reading.\\nError: There is no file or folder x.csv.')",
            "There is no file or folder x.csv.",
        ),
        ("sys.exit('Interrupted.')", "Interrupted."),
        ("", "The process has ended without a message."),
    ],
)
def test_failed_job_has_its_error(settings, says, code, problem):
    says(code)
    start_job(settings())
    job = ended()
    assert (job.state, job.problem, job.pid) == (JobState.FAILED, problem, None)
    assert job.data == settings().dataset_names
    with pytest.raises(TrainingError, match="reviews has no unfinished run in runs to resume"):
        resume_job("reviews", RUNS)
    dismiss_job(job)
    assert list(RUNS.iterdir()) == []


def test_finished_jobs_are_kept_few(settings, says, monkeypatch):
    monkeypatch.setattr(jobs, "KEPT_JOBS", 2)
    says('print(\'{"run": {"steps": 6}}\')')
    for number in range(4):
        start_job(settings(name=f"run-{number}"))
        assert ended(f"run-{number}").state == JobState.FINISHED
    assert {job.name for job in list_jobs(RUNS)} == {"run-2", "run-3"}


def test_log_is_bounded(settings, says, monkeypatch):
    monkeypatch.setattr(jobs, "MAX_LOG_BYTES", 1000)
    monkeypatch.setattr(jobs, "KEPT_LOG_BYTES", 100)
    says("sys.stderr.write('step\\n' * 1000); sys.exit('Error: full.')")
    start_job(settings())
    job = ended()
    assert job.problem == "full."
    assert job.log.stat().st_size == 100


def test_taken_name_is_refused_at_once(settings, adapter, says):
    says("")
    with pytest.raises(AdapterError, match="adapters/reviews exists: choose another --name"):
        start_job(settings())
    with (
        run_lock(RUNS, "poems"),
        pytest.raises(TrainingError, match="'poems' is training or waiting in runs"),
    ):
        start_job(settings(name="poems"))
    assert list(RUNS.iterdir()) == []


@pytest.mark.slow
def test_jobs_run_in_order(settings):
    with run_lock(RUNS, "terminal"):
        configs = [settings(name=name, max_steps=2) for name in ("first", "second")]
        first, second = map(start_job, configs)
        assert (first.state, first.ahead, first.step) == (JobState.WAITING, 1, 0)
        assert (second.state, second.ahead) == (JobState.WAITING, 2)
        wait_for(second.log.read_text)
        assert second.log.read_text() == "Waiting for 2 runs in runs: terminal, first.\n"
    wait_for(lambda: state_of("first") == JobState.FINISHED)
    assert state_of("second") in (JobState.WAITING, JobState.STARTING)
    wait_for(lambda: state_of("second") == JobState.FINISHED)
    done = find_job("second", RUNS)
    assert (done.step, done.total, done.pid, done.problem) == (2, 2, None, None)
    assert Library().names() == ["first", "second"]
    dismiss_job(done)
    dismiss_job(find_job("first", RUNS))
    assert list(RUNS.iterdir()) == []


@pytest.mark.slow
def test_stopped_job_resumes_bitwise(settings):
    """Through a pause, the death of its starter, and a stop."""
    changes = {"max_steps": 80, "dropout": 0.1, "save_every": 1000, "dtype": "float32"}
    whole = train(settings(name="whole", **changes))
    code = (
        "import sys; from lora_tuner import TrainConfig; from lora_tuner.training import jobs; "
        "jobs.start_job(TrainConfig.model_validate_json(sys.argv[1])); print('started', flush=True); "
        "input()"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", code, settings(**changes).model_dump_json(exclude_unset=True)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert starter.stdout.readline() == "started\n"
    os.killpg(starter.pid, 9)
    starter.communicate()
    job = wait_for(lambda: (job := find_job("reviews", RUNS)).step >= 3 and job)
    assert (job.state, job.total) == (JobState.RUNNING, 80)
    pause_job(job)
    wait_for(lambda: state_of("reviews") == JobState.PAUSED)
    steps = (RUNS / "reviews" / METRICS_FILE).read_text()
    time.sleep(0.2)
    assert (RUNS / "reviews" / METRICS_FILE).read_text() == steps
    continue_job(job)
    stop_job(job)
    job = ended()
    assert job.state == JobState.STOPPED
    assert 3 <= job.step < 80
    assert "Resume with" in job.log.read_text()
    resume_job("reviews", RUNS)
    assert ended().state == JobState.FINISHED
    assert weights(Library().get("reviews")) == weights(whole)


@pytest.mark.slow
def test_waiting_job_is_removed(settings, stop_at):
    """One that waits to be resumed is a stopped one again."""
    with stop_at(2):
        train(settings())
    with run_lock(RUNS, "terminal"):
        resume_job("reviews", RUNS)
        start_job(settings(name="later"))
        assert [job.state for job in list_jobs(RUNS)] == [
            JobState.STARTING,
            *[JobState.WAITING] * 2,
        ]
        for name in ("reviews", "later"):
            stop_job(find_job(name, RUNS))
        assert [job.name for job in list_jobs(RUNS)] == ["terminal", "reviews"]
    (job,) = list_jobs(RUNS)
    assert (job.state, job.step, job.total) == (JobState.STOPPED, 2, 6)
    dismiss_job(job)
    assert list(RUNS.iterdir()) == []
