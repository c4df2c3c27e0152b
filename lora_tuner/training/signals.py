"""Signals that ask a process to stop: Ctrl-C, SIGTERM, and SIGHUP, sent when its terminal is closed."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

from .. import distributed

HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # not on Windows
BREAK: signal.Signals | None = getattr(signal, "SIGBREAK", None)  # on Windows alone
TERMINATION = (signal.SIGTERM, *(number for number in (HANGUP, BREAK) if number is not None))


@contextlib.contextmanager
def handle_signals(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Handle signals during the block. Only the main thread can: in others nothing changes.

    SIGHUP stays ignored where it was ignored at the start, as by `nohup`. A handler must expect to
    receive it more than once: the kernel sends it, and the shell again.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextlib.contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C, SIGTERM or SIGHUP sets; a second one raises KeyboardInterrupt.

    Not a second SIGHUP: a terminal that is closed sends several.
    """
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        # Launchers repeat signals.
        if stop.is_set() and number != HANGUP and distributed.world_size() == 1:
            raise KeyboardInterrupt
        stop.set()

    with handle_signals((signal.SIGINT, *TERMINATION), handle):
        yield stop
