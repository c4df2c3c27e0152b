"""The one thread that owns the model. Requests of all adapters share its batches, and join them between two tokens.

Fair: adapters take turns, and of one adapter the requests, an answer at a time, so that nobody's many hold up another's one.
Surprise: a request is not sent its text, it is woken and takes what is new; so a slow reader costs little memory. Limit: work on
the model that is no writing, such as measuring, has turns of its own between two tokens (`do`).
"""

import contextlib
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from ..errors import ContextLengthError, QueueFullError, RequestTimeoutError, ServerClosingError
from ..inference.batch import GenerationEngine
from ..inference.sequence import Sequence

T = TypeVar("T")


@dataclass(eq=False)
class Request:
    """The answers to one request. `wake` is called, in the worker's thread, whenever there is more of them."""

    model: str
    sequences: list[Sequence]
    timeout: float  # that it may take
    wake: Callable[[], object] = lambda: None
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None  # when it came
    failure: Exception | None = None  # of the job as a whole
    closed: bool = False  # nobody waits for it any more
    _next: int = 0  # the row that is written next

    @property
    def error(self) -> Exception | None:
        """Why there will be no more. A row has its own before it is complete, so nobody takes it for a finished one."""
        return self.failure or next((row.error for row in self.sequences if row.error is not None), None)

    @property
    def complete(self) -> bool:
        return self.error is not None or all(row.complete for row in self.sequences)


class Scheduler:
    """Writes the rows of all jobs, at most `max_batch` at once; at most `max_waiting` more may wait.

    `room` is how many tokens the cache may hold, as rows times the longest.
    """

    def __init__(self, writer: GenerationEngine, *, max_batch: int, max_waiting: int, room: int) -> None:
        self.engine = writer
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.max_cache_tokens = room
        self._queue: OrderedDict[str, deque[Request]] = OrderedDict()  # by model; the first is next
        self._held = 0  # places of answers that are not in the queue yet
        self._running: dict[Sequence, Request] = {}
        self._chores: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self._pace = 1.0  # seconds from the end of one row to that of the next, lately
        self._ended = 0.0  # when a row ended, or the first began
        self._thread = threading.Thread(target=self._run, name="lora_tuner-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that are not being written yet."""
        with self._wake:
            return sum(len(job.sequences) - job._next for jobs in self._queue.values() for job in jobs)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def accepting(self) -> bool:
        """Whether it takes on work."""
        return self._thread.is_alive() and not self._closed

    @property
    def idle(self) -> bool:
        with self._wake:
            return not (self._queue or self._running)

    def submit(self, job: Request) -> None:
        """Raises BusyError when too many wait, ClosedError when the server stops, TooLongError for a row that is."""
        longest = max(len(row.prompt_ids) + row.max_new_tokens for row in job.sequences)
        if longest > self.max_cache_tokens:
            raise ContextLengthError(
                f"Prompt and answer may have {self.max_cache_tokens:,} tokens here: ask for fewer than {longest:,}."
            )
        with self._wake:
            self._check_room(len(job.sequences))
            self._queue.setdefault(job.model, deque()).append(job)
            self._wake.notify()

    @contextlib.contextmanager
    def reserve(self, answers: int) -> Iterator[None]:
        """Within it so many answers have places in the queue, while what they need is still being read. Raises BusyError and
        ClosedError as `submit` does."""
        with self._wake:
            self._check_room(answers)
            self._held += answers
        try:
            yield
        finally:
            with self._wake:
                self._held -= answers

    def _check_room(self, answers: int) -> None:
        if self._closed:
            raise ServerClosingError("The server is stopping.")
        ahead = self.waiting + self._held
        beyond = ahead + answers - self.max_waiting - max(self.max_batch - self.running, 0)
        if beyond > 0:  # so many must end first
            seconds = max(1, math.ceil(self._pace * beyond))
            raise QueueFullError(f"{ahead:,} answers are waiting already: try again in {seconds} seconds.", seconds)

    def cancel(self, job: Request) -> None:
        """Nobody waits for it any more."""
        with self._wake:
            job.closed = True
            self._wake.notify()

    def run_between_steps(self, chore: Callable[[], T]) -> T:
        """What the chore gives, done in the worker's thread between two tokens."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(chore())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._closed:
                raise ServerClosingError("The server is stopping.")
            self._chores.append(run)
            self._wake.notify()
        return future.result()

    def close(self) -> None:
        """Take on nothing more; what is running and waiting is finished."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def stop(self, why: str = "The server is stopping.") -> None:
        """End what is left, and the thread."""
        self.close()
        with self._wake:
            for job in self._jobs():
                self._fail(job, ServerClosingError(why))
            self._wake.notify()
        self._thread.join(timeout=30)

    def _jobs(self) -> list[Request]:
        waiting = [job for jobs in self._queue.values() for job in jobs]
        return list(dict.fromkeys([*self._running.values(), *waiting]))

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._queue or self._running or self._chores or self._closed):
                    self._wake.wait()
                if self._closed and not (self._queue or self._running or self._chores):
                    return
                chore = self._chores.popleft() if self._chores else None
            try:
                with self._wake:
                    self._drop_closed()
                    new = self._admit()
                self.engine.add(new)
                self.engine.step()
                self._wake_requests()
            except Exception as error:  # the batch is lost; what comes next is not
                self._fail_running(error)
            if chore is not None:
                chore()

    def _drop_closed(self) -> None:
        """What nobody waits for, and what has taken too long, goes."""
        now = time.monotonic()
        for job in self._jobs():
            if not job.closed and now - job.started > job.timeout:
                self._fail(job, RequestTimeoutError(f"It took longer than {job.timeout:g} seconds."))
            if job.closed:
                for row in [row for row, its in self._running.items() if its is job]:
                    self.engine.cancel(row)
                    del self._running[row]
        for model in list(self._queue):
            self._queue[model] = deque(job for job in self._queue[model] if not job.closed)
            if not self._queue[model]:
                del self._queue[model]

    def _fail(self, job: Request, error: Exception) -> None:
        job.failure, job.closed = error, True
        job.wake()

    def _admit(self) -> list[Sequence]:
        """Rows that begin now: of each model in turn, and of its requests in turn."""
        new: list[Sequence] = []
        if not self._running:
            self._ended = time.monotonic()
        longest = max((len(row.prompt_ids) + row.max_new_tokens for row in self._running), default=0)
        while self._queue and len(self._running) < self.max_batch:
            model, jobs = next(iter(self._queue.items()))
            job = jobs[0]
            row = job.sequences[job._next]
            longest = max(longest, len(row.prompt_ids) + row.max_new_tokens)
            if self._running and longest * (len(self._running) + 1) > self.max_cache_tokens:
                break
            jobs.popleft()
            job._next += 1
            if job._next < len(job.sequences):
                jobs.append(job)
            self._queue.move_to_end(model)
            if not jobs:
                del self._queue[model]
            self._running[row] = job
            new.append(row)
        return new

    def _wake_requests(self) -> None:
        """Wake those who have something new; rows that are complete are theirs alone."""
        now = time.monotonic()
        for job in dict.fromkeys(self._running.values()):
            if job.first_token is None and any(row.output_ids or row.complete for row in job.sequences):
                job.first_token = now
            job.wake()
        with self._wake:
            for row, job in self._running.items():
                job.closed |= row.error is not None  # its other rows need not be written
            ended = [row for row in self._running if row.complete]
            for row in ended:
                self._pace += 0.1 * ((now - self._ended) / len(ended) - self._pace)
                del self._running[row]
            if ended:
                self._ended = now

    def _fail_running(self, error: Exception) -> None:
        self.engine.clear()
        with self._wake:
            for job in dict.fromkeys(self._running.values()):
                self._fail(job, error)
            self._running.clear()
