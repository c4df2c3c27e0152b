"""Progress of runs, the default event handler: a bar on a terminal, else lines.

They go to stderr, in a notebook to stdout."""

import contextlib
import time
from collections import deque
from collections.abc import Iterator

from rich import progress
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Column
from rich.text import Text

from ..errors import EventHandler, Notice, Progress
from ..text import escape_control, format_duration, one_line, shorten

# Without a terminal: seconds between two lines of a stage, the longer the longer it takes.
MIN_INTERVAL, MAX_INTERVAL, LINES_PER_STAGE = 10.0, 60.0, 100
MIN_BAR = 5  # cells of the shortest bar, with slash and spaces
SHORTEST = 0.5  # seconds left that are shown
_SAMPLES = 50  # of the pace


class TimeLeft:
    """Estimate how long a stage still takes, from its pace in the second half of the time so far.

    What happens between two steps counts, such as measuring the held-out loss. The time before the
    first event is unknown, so that there is an estimate from the second one on.
    """

    def __init__(self, event: Progress) -> None:
        self.start = self.now = self.shown = time.monotonic()
        self.done, self.total, self.events = event.done, event.total, 1
        self.samples = deque([(self.start, event.done)])  # the oldest is where the second half begins

    def is_continued_by(self, event: Progress) -> bool:
        """Return whether an event is a later one of the same stage, not the first of its next run."""
        return event.done >= self.done and event.total == self.total

    def update(self, event: Progress) -> float | None:
        """Return the seconds left at an event; None if no step is done since the first one."""
        self.now, self.done, self.events = time.monotonic(), event.done, self.events + 1
        while len(self.samples) > 1 and self.samples[1][0] <= (self.start + self.now) / 2:
            self.samples.popleft()
        since, done = self.samples[0]
        if self.now - self.samples[-1][0] >= (self.now - self.start) / _SAMPLES:
            self.samples.append((self.now, event.done))
        if event.done == done:
            return None
        return (self.now - since) / (event.done - done) * (event.total - event.done)

    def is_due(self, seconds_left: float | None) -> bool:
        """Return whether it is time for a line: with the first estimate, then at intervals."""
        if self.events == 2 and seconds_left is not None:
            return seconds_left >= SHORTEST
        whole = self.now - self.start + (seconds_left or 0.0)
        return self.now - self.shown > min(max(whole / LINES_PER_STAGE, MIN_INTERVAL), MAX_INTERVAL)


class Display:
    """Event handler: shows a progress bar on a terminal, else a line of progress now and then."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False)
        if self.console.is_jupyter:  # stderr is red there, and rich writes bars and lines as HTML
            self.console = Console(highlight=False, force_jupyter=False, force_terminal=False)
        self.bar: progress.Progress | None = None
        self.stage = ""
        self.stages: dict[str, TimeLeft] = {}  # one continues after another has interrupted it

    def __call__(self, event: Notice | Progress) -> None:
        if isinstance(event, Notice):
            self.console.print(Text(shorten(escape_control(event.text))), soft_wrap=True)
            return
        if event.stage != self.stage:
            self._begin_stage(event)
        estimate, seconds_left = self.stages.get(event.stage), None
        if estimate is not None and estimate.is_continued_by(event):
            seconds_left = estimate.update(event)
        else:
            estimate = self.stages[event.stage] = TimeLeft(event)
        is_shown = seconds_left is not None and seconds_left >= SHORTEST
        time_left = f"{format_duration(seconds_left or 0.0)} left" if is_shown else ""
        if self.bar is not None:
            task = self.bar.task_ids[0]
            self.bar.update(
                task, completed=event.done, total=event.total, detail=self._fit_detail(event, time_left)
            )
        elif event.done == event.total or estimate.is_due(seconds_left):
            estimate.shown = estimate.now
            parts = [f"{event.stage} {event.done}/{event.total}", event.detail, time_left]
            self.console.print(Text(shorten(one_line("  ".join(filter(None, parts))))), soft_wrap=True)
        if event.done >= event.total:
            self._end_stage()

    def _begin_stage(self, event: Progress) -> None:
        self._end_stage()
        self.stage = event.stage
        if not self.console.is_terminal:
            return
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=None, table_column=Column(ratio=1)),  # takes the rest of the line
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[detail]}", markup=False),
            console=self.console,
            expand=True,
        )
        self.bar.start()
        self.bar.add_task(escape_control(event.stage), total=event.total, completed=event.done, detail="")

    def _fit_detail(self, event: Progress, time_left: str) -> str:
        """Return details and time left for the bar, without the last details that a narrow line has no room for."""
        parts = event.detail.split("  ") if event.detail else []
        ending = [time_left] if time_left else []
        room = self.console.width - cell_len(event.stage) - 2 * len(str(event.total)) - MIN_BAR
        while parts and cell_len("  ".join([*parts, *ending])) > room:
            parts.pop()
        return "  ".join([*parts, *ending])

    def _end_stage(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.stage = None, ""

    def close(self) -> None:
        """Stop the progress bar, begin a new line, and forget all stages."""
        self._end_stage()
        self.stages.clear()


def fit_width(text: str, width: int) -> str:
    """Return a text, or its beginning and a mark, on one line of this width."""
    text = one_line(" ".join(text.split()))
    return set_cell_size(text, width) if cell_len(text) <= width else f"{set_cell_size(text, width - 1)}\u2026"


display = Display()


@contextlib.contextmanager
def closing(notify: EventHandler | None) -> Iterator[None]:
    """Stop the progress bar at the end of a block, be it an error."""
    try:
        yield
    finally:
        if isinstance(notify, Display):
            notify.close()
