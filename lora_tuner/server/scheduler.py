"""Continuous batching of all requests on the one thread that owns the model.

Admission is fair: adapters take turns, and so do the requests of one adapter, one sequence at a
time. Requests are woken rather than sent their text, so a slow client costs little memory. Other
work on the model, such as evaluation, runs between two steps (`run_between_steps`), and takes at
most half of the time while there are requests.
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
from ..text import format_count

T = TypeVar("T")


@dataclass(eq=False)
class Request:
    """One request and its output sequences.

    `wake` is called in the scheduler's thread whenever a sequence has new output.
    """

    model: str
    sequences: list[Sequence]
    timeout: float  # seconds from `started`
    wake: Callable[[], object] = lambda: None
    started: float = field(default_factory=time.monotonic)
    first_token: float | None = None  # time of the first token of any sequence
    failure: Exception | None = None  # of the request as a whole
    cancelled: bool = False  # removed before the next step
    admitted: int = 0  # sequences that have left the queue

    @property
    def error(self) -> Exception | None:
        """The failure of the request or of its first failed sequence.

        A sequence sets its error before `complete`, so a reader never takes a failed one for a
        finished one.
        """
        return self.failure or next(
            (sequence.error for sequence in self.sequences if sequence.error is not None), None
        )

    @property
    def complete(self) -> bool:
        return self.error is not None or all(sequence.complete for sequence in self.sequences)


class Scheduler:
    """Runs the sequences of all requests on a `GenerationEngine`, in a thread of its own.

    Args:
        engine: used by this scheduler's thread alone once `start` was called.
        max_batch: sequences that run at once.
        max_waiting: sequences that may wait beyond those.
        max_cache_tokens: size of the KV cache; sequences run at once if they fit into it at their full
            lengths.
    """

    def __init__(
        self, engine: GenerationEngine, *, max_batch: int, max_waiting: int, max_cache_tokens: int
    ) -> None:
        self.engine = engine
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.max_cache_tokens = max_cache_tokens
        self._queue: OrderedDict[str, deque[Request]] = OrderedDict()  # by model; the first is next
        self._reserved = 0  # queue slots of requests that are still being prepared
        self._running: dict[Sequence, Request] = {}
        self._tasks: deque[Callable[[], None]] = deque()  # run between two steps
        # Time from which the next may run: steps get as long as the last one took.
        self._next_task = 0.0
        self._wake = threading.Condition()
        self._closed = False
        self._seconds_per_end = 1.0  # moving average of the time between two finished sequences
        self._last_end = 0.0  # when a sequence last finished, or the first began
        self._thread = threading.Thread(target=self._run, name="lora_tuner-scheduler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of sequences in the queue."""
        with self._wake:
            return sum(len(request.sequences) - request.admitted for request in self._requests())

    @property
    def running(self) -> int:
        """Number of sequences in the batch."""
        return len(self._running)

    @property
    def accepting(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def idle(self) -> bool:
        with self._wake:
            return not (self._queue or self._running)

    def submit(self, request: Request) -> None:
        """Put a request in the queue.

        Raises:
            QueueFullError: too many sequences wait.
            ServerClosingError: `close` was called.
            ContextLengthError: a sequence is longer than the KV cache.
        """
        longest = max(sequence.max_length for sequence in request.sequences)
        if longest > self.max_cache_tokens:
            raise ContextLengthError(
                f"Prompt and max_tokens add up to {longest:,} tokens, but the KV cache of this "
                f"server holds {self.max_cache_tokens:,}: shorten the prompt or lower max_tokens."
            )
        with self._wake:
            self._check_queue(len(request.sequences))
            self._queue.setdefault(request.model, deque()).append(request)
            self._wake.notify()

    @contextlib.contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Hold queue slots for `count` sequences while their request is prepared.

        Raises QueueFullError and ServerClosingError as `submit` does.
        """
        with self._wake:
            self._check_queue(count)
            self._reserved += count
        try:
            yield
        finally:
            with self._wake:
                self._reserved -= count

    def _check_queue(self, count: int) -> None:
        self._check_open()
        ahead = self.waiting + self._reserved
        excess = ahead + count - self.max_waiting - max(self.max_batch - self.running, 0)
        if excess > 0:  # that many must finish first
            seconds = max(1, math.ceil(self._seconds_per_end * excess))
            raise QueueFullError(
                f"The queue is full, with {format_count(ahead, 'sequence')} waiting: try again in "
                f"{format_count(seconds, 'second')}.",
                seconds,
            )

    def _check_open(self) -> None:
        if self._closed:
            raise ServerClosingError("The server is shutting down.")

    def cancel(self, request: Request) -> None:
        """Drop a request before the next step."""
        with self._wake:
            request.cancelled = True
            self._wake.notify()

    def run_between_steps(self, work: Callable[[], T]) -> T:
        """Run `work` in the scheduler's thread between two steps, and return its result.

        Raises what `work` raises, and ServerClosingError after `close`.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            self._check_open()
            self._tasks.append(run)
            self._wake.notify()
        return future.result()

    def close(self) -> None:
        """Accept no more requests; those in the queue are still completed."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def stop(self) -> None:
        """Fail all remaining requests and end the thread."""
        with self._wake:
            self.close()
            for request in self._requests():
                self._fail(request, ServerClosingError("The server is shutting down."))
        self._thread.join(timeout=30)

    def _requests(self) -> list[Request]:
        waiting = [request for queue in self._queue.values() for request in queue]
        return list(dict.fromkeys([*self._running.values(), *waiting]))

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._tasks or not self.idle)
                if self.idle and not self._tasks:
                    return
                may_run_task = self.idle or time.monotonic() >= self._next_task
                task = self._tasks.popleft() if self._tasks and may_run_task else None
            try:
                with self._wake:
                    self._drop_cancelled()
                    new = self._admit()
                self.engine.add(new)
                self.engine.step()
                self._wake_requests()
            except Exception as error:  # fails this batch alone
                self.engine.clear()
                with self._wake:
                    for request in dict.fromkeys(self._running.values()):
                        self._fail(request, error)
                    self._running.clear()
            if task is not None:
                started = time.monotonic()
                task()
                ended = time.monotonic()
                self._next_task = ended + (ended - started)

    def _drop_cancelled(self) -> None:
        """Fail requests that have timed out, and remove cancelled ones."""
        for request in self._requests():
            if not request.cancelled and time.monotonic() - request.started > request.timeout:
                self._fail(
                    request,
                    RequestTimeoutError(f"The request took longer than {request.timeout:g} seconds."),
                )
        for sequence in [sequence for sequence, request in self._running.items() if request.cancelled]:
            self.engine.cancel(sequence)
            del self._running[sequence]
        for model in list(self._queue):
            self._queue[model] = deque(request for request in self._queue[model] if not request.cancelled)
            if not self._queue[model]:
                del self._queue[model]

    def _fail(self, request: Request, error: Exception) -> None:
        request.failure, request.cancelled = error, True
        request.wake()

    def _admit(self) -> list[Sequence]:
        """Take sequences from the queue: each model in turn, and each of its requests in turn."""
        new: list[Sequence] = []
        if not self._running:
            self._last_end = time.monotonic()
        while self._queue and len(self._running) < self.max_batch:
            model, queue = next(iter(self._queue.items()))
            request = queue[0]
            sequence = request.sequences[request.admitted]
            needed = self.engine.cache_tokens([*self._running, sequence])
            if self._running and needed > self.max_cache_tokens:
                break
            queue.popleft()
            request.admitted += 1
            if request.admitted < len(request.sequences):
                queue.append(request)
            self._queue.move_to_end(model)
            if not queue:
                del self._queue[model]
            self._running[sequence] = request
            new.append(sequence)
        return new

    def _wake_requests(self) -> None:
        """Wake the requests in the batch, and take completed sequences out of it."""
        now = time.monotonic()
        for request in dict.fromkeys(self._running.values()):
            if request.first_token is None and any(row.output_ids or row.complete for row in request.sequences):
                request.first_token = now
            request.wake()
        with self._wake:
            for sequence, request in self._running.items():
                request.cancelled |= sequence.error is not None  # its other sequences are of no use
            ended = [sequence for sequence in self._running if sequence.complete]
            for sequence in ended:
                self._seconds_per_end += 0.1 * ((now - self._last_end) / len(ended) - self._seconds_per_end)
                del self._running[sequence]
            if ended:
                self._last_end = now
