"""Runs as jobs: processes in a queue, which outlive the one that starts them. No torch.

What was started here keeps its settings, messages and result in `runs/.jobs/NAME/` until it is
forgotten. Runs that were started in a terminal are listed, stopped and paused as well.
"""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil
import yaml

from .. import atomic_io
from ..adapters.library import adapter_name
from ..config import TrainConfig
from ..errors import ConfigError, TrainingError
from ..settings_files import resolve_settings
from . import paths, tickets
from .live import LiveRun as LiveRun
from .live import last_step
from .live import read_live as read_live
from .paths import JOB_VARIABLE, JOBS_DIR, job_folder
from .tickets import Ticket, ahead_of, live_tickets, process_start
from .unfinished import UnfinishedRun, find_removable, remove_unfinished, unfinished_runs

SETTINGS_FILE, PROCESS_FILE = "settings.yaml", "process.json"
LOG_FILE, RESULT_FILE = "log.txt", "result.json"
KEPT_JOBS = 5  # that have finished, or failed with nothing to resume
MAX_LOG_BYTES, KEPT_LOG_BYTES = 1_000_000, 100_000
_START_SECONDS = 30.0  # until a process has its ticket, at most
_SAME_PROCESS_MS = 2000  # the clock may be set in between
_starting = threading.Lock()


class JobState(StrEnum):
    """State of a job. Stopped ones can be resumed, and failed ones that have a checkpoint."""

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    FAILED = "failed"
    FINISHED = "finished"

    @property
    def is_alive(self) -> bool:
        """True while it has a process."""
        return self in (JobState.WAITING, JobState.STARTING, JobState.RUNNING, JobState.PAUSED)


@dataclass(frozen=True)
class Job:
    """A run, or a sweep, in a folder of runs.

    Attributes:
        folder: That of the run, which need not exist yet or any more.
        log: Messages of a run that was started by `start_job` or `resume_job`.
        step: Steps so far; of a sweep, trials that have ended.
        total: All steps, or trials; None while that is unknown.
        data: The datasets, where they are known.
        created: Time at which it was begun, ISO 8601.
        pid: Its process, if it has one.
        ahead: Jobs that must end before it starts.
        problem: Its last error message, or the reason why its settings cannot be read.
    """

    name: str
    state: JobState
    folder: Path
    log: Path | None = None
    step: int = 0
    total: int | None = None
    data: list[str] = field(default_factory=list)
    created: str = ""
    pid: int | None = None
    ahead: int = 0
    problem: str | None = None

    @property
    def kind(self) -> str:
        """Either `run` or `sweep`."""
        return "sweep" if self.folder.suffix == ".sweep" else "run"

    def to_dict(self) -> dict[str, object]:
        log = str(self.log) if self.log else None
        return asdict(self) | {"kind": self.kind, "folder": str(self.folder), "log": log}


def list_jobs(runs_dir: Path) -> list[Job]:
    """Return the jobs of a folder of runs: those with a process in order, then the newest."""
    live = live_tickets(runs_dir)
    runs = {run.folder.name: run for run in unfinished_runs(runs_dir)}
    started = {log.parent.name: log.parent for log in runs_dir.glob(f"{JOBS_DIR}/*/{LOG_FILE}")}
    names = list(dict.fromkeys([*(ticket.name for ticket in live), *runs, *started]))
    jobs = [_describe(runs_dir / name, live, runs.get(name), started.get(name)) for name in names]
    jobs.sort(key=lambda job: job.created, reverse=True)
    alive = [job for job in jobs if job.state.is_alive]
    alive.sort(key=lambda job: names.index(job.folder.name))
    return [*alive, *(job for job in jobs if not job.state.is_alive)]


def find_job(name: str, runs_dir: Path) -> Job:
    """Return the job of this name. Raises TrainingError if there is none."""
    for job in list_jobs(runs_dir):
        if job.name == name:
            return job
    raise TrainingError(f"There is no run '{name}' in {runs_dir}.")


def start_job(config: TrainConfig) -> Job:
    """Start a run in a process of its own, which first waits until the runs before it have ended.

    Returns at once when the process has its place in the queue. It outlives this process and its
    terminal. What it refuses later, such as unreadable data, is the `problem` of the failed job.

    Raises:
        LoraTunerError: the name is taken, or the folders cannot be used.
    """
    name = adapter_name(config)
    paths.check_places(config)
    paths.check_output_paths(config)
    values = config.model_dump(mode="json", exclude_none=True, exclude_unset=True) | {"name": name}
    settings = job_folder(config.runs_dir, name) / SETTINGS_FILE
    text = yaml.safe_dump(values, allow_unicode=True)
    return _start(config.runs_dir / name, ["--config", str(settings)], text)


def resume_job(name: str, runs_dir: Path) -> Job:
    """Resume a stopped run, or sweep, in a process of its own, as `start_job` starts one.

    Raises:
        TrainingError: there is no such run, or it has a process.
    """
    job = find_job(name, runs_dir)
    if not job.folder.exists() or job.state == JobState.FINISHED:
        raise TrainingError(f"{name} has no unfinished run in {runs_dir} to resume: train again.")
    return _start(job.folder, ["--resume", name, "--runs-dir", str(runs_dir)])


def stop_job(job: Job) -> None:
    """Let a run save a checkpoint and end, as Ctrl-C does; remove one that waits from the queue.

    Returns before the run has ended. Raises TrainingError if it has no process here.
    """
    if job.state == JobState.WAITING:
        dismiss_job(job)
    else:
        with _process(job) as process:
            _ask_to_end(process)


def pause_job(job: Job) -> None:
    """Suspend the process of a run. Raises TrainingError if it has none here."""
    with _process(job) as process:
        process.suspend()


def continue_job(job: Job) -> None:
    """Continue a process that `pause_job` has suspended. Raises TrainingError if there is none."""
    with _process(job) as process:
        process.resume()


def dismiss_job(job: Job) -> None:
    """Forget what a job said that has finished or failed; take one that waits from the queue;
    delete a stopped run with its checkpoints.

    Of a run that failed or waits to be resumed the checkpoints are kept: then it is a stopped one.

    Raises:
        TrainingError: it is training, or its folder holds other files.
    """
    runs_dir = job.folder.parent
    if job.state == JobState.WAITING:
        with _process(job) as process, contextlib.suppress(psutil.TimeoutExpired):
            _ask_to_end(process)
            process.wait(10)
    elif job.state.is_alive:
        raise TrainingError(f"{job.name} is training: stop it first.")
    elif job.state == JobState.STOPPED:
        remove_unfinished(find_removable(job.name, runs_dir))
    paths.forget_job(runs_dir, job.folder.name)


# Processes


def _start(run_folder: Path, arguments: list[str], settings: str | None = None) -> Job:
    """Start `train` in a process without a terminal, and wait until it is in the queue."""
    runs_dir, name = run_folder.parent, run_folder.name
    folder = job_folder(runs_dir, name)
    with _starting:
        if any(job.folder.name == name and job.state.is_alive for job in list_jobs(runs_dir)):
            raise tickets.already_there(name, runs_dir)
        _forget_old(runs_dir)
        with atomic_io.atomic_folder(folder) as work:
            if settings is not None:
                (work / SETTINGS_FILE).write_text(settings, encoding="utf-8")
            (work / LOG_FILE).touch()
        options: dict[str, Any] = {"start_new_session": True}  # no terminal sends it signals
        if sys.platform == "win32":
            options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # for CTRL_BREAK_EVENT
        with (folder / LOG_FILE).open("ab") as log, (folder / RESULT_FILE).open("wb") as result:
            process = subprocess.Popen(
                command_line("train", *arguments, "--queue", "--json"),
                stdin=subprocess.DEVNULL,
                stdout=result,
                stderr=log,
                env=os.environ | {JOB_VARIABLE: name},
                **options,
            )
        threading.Thread(target=process.wait, daemon=True).start()  # else it stays as a zombie
        with contextlib.suppress(psutil.Error):  # it has ended
            facts = {"pid": process.pid, "started": process_start(process.pid)}
            atomic_io.atomic_write_text(folder / PROCESS_FILE, json.dumps(facts))
        end = time.monotonic() + _START_SECONDS
        while process.poll() is None and time.monotonic() < end:
            if any(ticket.name == name for ticket in live_tickets(runs_dir)):
                break
            time.sleep(0.05)
    return next(job for job in list_jobs(runs_dir) if job.folder.name == name)


def command_line(*arguments: str) -> list[str]:
    """Return the command line of a process with the modules of this one, and its name in messages."""
    code = f"import sys; sys.path[:], sys.argv[0] = {(sys.path, sys.argv[0])!r}; from lora_tuner.cli import app"
    return [sys.executable, "-P", "-c", f"{code}; app.app(prog_name='cli.py')", *arguments]


@contextlib.contextmanager
def _process(job: Job) -> Iterator[psutil.Process]:
    """Give the process of a job, which is surely not another one with its number.

    Raises:
        TrainingError: it has none here, or this user may not do what is done with it.
    """
    runs_dir, name = job.folder.parent, job.folder.name
    held = [(it.pid, it.started) for it in live_tickets(runs_dir) if it.name == name]
    owners = [*held, _read_process(job_folder(runs_dir, name))]
    found = (_find_process(pid, started) for pid, started in owners if pid == job.pid)
    if (process := next(filter(None, found), None)) is None:
        why = "it has ended, or is of another machine"
        raise TrainingError(f"{job.name} has no process here: {why}.")
    try:
        yield process
    except psutil.NoSuchProcess:  # it has ended in this moment
        return
    except psutil.Error as error:
        raise TrainingError(f"The process of {job.name} cannot be controlled: {error}.") from error


def _find_process(pid: int, started: int) -> psutil.Process | None:
    """Return the process with this number and start, if it lives."""
    with contextlib.suppress(psutil.Error):
        is_same = abs(process_start(pid) - started) <= _SAME_PROCESS_MS
        process = psutil.Process(pid)
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    return None


def _read_process(folder: Path | None) -> tuple[int, int]:
    """Return number and start of the process of a job; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        facts = json.loads((folder / PROCESS_FILE).read_bytes()) if folder else {}
        return int(facts["pid"]), int(facts["started"])
    return 0, 0


def _ask_to_end(process: psutil.Process) -> None:
    if sys.platform == "win32":
        process.send_signal(signal.CTRL_BREAK_EVENT)
    else:
        process.terminate()
    process.resume()  # a suspended one gets no signal


def _forget_old(runs_dir: Path) -> None:
    """Delete what is kept of jobs that have ended with nothing to resume, beyond the newest."""
    ended = [job for job in list_jobs(runs_dir) if not job.state.is_alive]
    done = [job for job in ended if job.state == JobState.FINISHED or not job.folder.exists()]
    for job in done[KEPT_JOBS - 1 :]:
        dismiss_job(job)


# Their states


def _describe(
    run_folder: Path,
    live: Sequence[Ticket],
    run: UnfinishedRun | None,
    folder: Path | None,
) -> Job:
    """Return a job.

    Args:
        run: its unfinished run, or sweep.
        folder: what is kept of it, if it was started here.
    """
    own = next((ticket for ticket in live if ticket.name == run_folder.name), None)
    result, problem = _result(folder), None
    if result:
        state = JobState.FINISHED
    elif own:
        state = _living_state(own, live, run)
    else:
        state, problem = _ended_state(run, folder)
    step, total, data = (run.done, run.total, run.data) if run else (0, None, [])
    if result:
        step = total = result["run"]["steps"]
    elif state in (JobState.RUNNING, JobState.PAUSED) and run and run.kind == "run":
        step = last_step(run_folder) or step
    if not data and folder:
        with contextlib.suppress(ConfigError):
            settings = resolve_settings(TrainConfig, {}, folder / SETTINGS_FILE)
            data = settings.dataset_names
    begun = own.started / 1000 if own else 0.0
    if folder:
        with contextlib.suppress(OSError):  # it is forgotten in this moment
            begun = folder.stat().st_mtime
    return Job(
        name=run.name if run else run_folder.name.removesuffix(".sweep"),
        state=state,
        folder=run_folder,
        log=folder / LOG_FILE if folder else None,
        step=step,
        total=total,
        data=data,
        created=run.created if run else _iso(begun),
        pid=(own.pid if own else _read_process(folder)[0] or None) if state.is_alive else None,
        ahead=len(ahead_of(own, live)) if own and state == JobState.WAITING else 0,
        problem=problem or (run.problem if run else None),
    )


def _living_state(ticket: Ticket, live: Sequence[Ticket], run: UnfinishedRun | None) -> JobState:
    with contextlib.suppress(psutil.Error):
        if psutil.Process(ticket.pid).status() == psutil.STATUS_STOPPED:
            return JobState.PAUSED
    if ticket.number and ahead_of(ticket, live):
        return JobState.WAITING
    has_begun = run is not None and (run.kind == "sweep" or last_step(run.folder) is not None)
    return JobState.RUNNING if has_begun and not ticket.number else JobState.STARTING


def _ended_state(run: UnfinishedRun | None, folder: Path | None) -> tuple[JobState, str | None]:
    """Return the state of a job without a ticket, and its error."""
    if folder is None:
        is_running = run is not None and run.running  # by a version without tickets
        return JobState.RUNNING if is_running else JobState.STOPPED, None
    last = "".join(_log_end(folder / LOG_FILE).splitlines()[-1:])
    if last.startswith("Error: "):
        return JobState.FAILED, last.removeprefix("Error: ")
    if last.startswith(("Stopped", "Interrupted")):
        return (JobState.STOPPED, None) if run else (JobState.FAILED, last)
    if _find_process(*_read_process(folder)):
        return JobState.STARTING, None
    why = "The process has ended without a message."
    return (JobState.STOPPED if run else JobState.FAILED), why


def _result(folder: Path | None) -> dict[str, Any] | None:
    """Return what a run has printed at its end; None for one that has not finished."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        result = json.loads((folder / RESULT_FILE).read_bytes()) if folder else {}
        return result if isinstance(result["run"]["steps"], int) else None
    return None


def _log_end(log: Path) -> str:
    """Return the end of a log, and cut off the beginning of one that has become too long."""
    try:
        with log.open("rb+") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - KEPT_LOG_BYTES))
            end = file.read()
            if size > MAX_LOG_BYTES:
                file.seek(0)
                file.write(end)
                file.truncate()
        return end.decode(errors="replace")
    except OSError:
        return ""


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds")
