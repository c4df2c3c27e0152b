"""Every error that this package raises on purpose, in one tree, and the events it reports.

    LoraTunerError
    ├── ConfigError            a setting is wrong, or two contradict each other
    ├── HubError               the Hugging Face Hub is out of reach, or said no
    ├── DataError              the text cannot be read, or nothing usable is in it
    ├── BaseModelError         the base model cannot be found or used
    ├── AdapterError           an adapter folder is missing, broken, or its name is taken
    │   ├── WrongBaseError     the adapter was trained on another base model
    │   └── UnknownModelError  a request names a model that is not served
    ├── TrainingError          a run cannot start, go on, or be resumed
    │   ├── DivergedError      the loss or a gradient is not finite any more
    │   └── LostError          another process of the run is no more
    └── GenerationError        a prompt or a sampling setting cannot be answered
        ├── MixedBatchError    a base on which different adapters cannot share a batch
        ├── TooLongError       a prompt leaves no room for what is to follow
        ├── RequestError       a request asks for more than the server gives
        ├── BusyError          too many requests wait already
        ├── LateError          a request took longer than it may
        └── ClosedError        the server is stopping

`Interrupted` stands apart: nothing is wrong, the user (or the system) asked the run to stop and its work is saved. So does
`Elsewhere`, in the other processes of a run of which the first says what is wrong.
Messages are complete sentences for people: what is wrong, where, and what to do.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass


class LoraTunerError(Exception):
    """Base of all errors with a message meant for the user."""


class ConfigError(LoraTunerError): ...


class HubError(LoraTunerError): ...


class DataError(LoraTunerError): ...


class BaseModelError(LoraTunerError): ...


class AdapterError(LoraTunerError): ...


class WrongBaseError(AdapterError): ...


class UnknownModelError(AdapterError): ...


class TrainingError(LoraTunerError): ...


class DivergedError(TrainingError): ...


class ProcessLostError(TrainingError): ...


class GenerationError(LoraTunerError): ...


class MixedBatchError(GenerationError): ...


class ContextLengthError(GenerationError): ...


class RequestError(GenerationError):
    """`param` is the field of the request that is at fault."""

    def __init__(self, text: str, param: str) -> None:
        super().__init__(text)
        self.param = param


class QueueFullError(GenerationError):
    """After `seconds` there may be room."""

    def __init__(self, text: str, seconds: int) -> None:
        super().__init__(text)
        self.seconds = seconds


class RequestTimeoutError(GenerationError): ...


class ServerClosingError(GenerationError): ...


class Interrupted(Exception):  # noqa: N818 - it is not an error
    """A run was asked to stop and did, with its work saved; the message says how to go on."""


class RaisedOnRankZero(Exception):  # noqa: N818 - another says it
    """The first process of a run has failed or was stopped, and says why; this one ends with it."""


_OS_ERROR_ADVICE = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "free some space and try again",
    errno.EACCES: "choose another place, or have its owner let you in",
    errno.EPERM: "choose another place, or have its owner let you in",
    errno.EROFS: "choose another place",
    errno.ENOTDIR: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter one",
}


def os_error_message(error: OSError) -> str:
    """One sentence about what the system refused, where, and what to do."""
    what = f"{error.filename or 'A file'}: {error.strerror or error}".rstrip(".")
    return f"{what}: {_OS_ERROR_ADVICE[error.errno]}." if error.errno in _OS_ERROR_ADVICE else f"{what}."


@dataclass(frozen=True)
class Notice:
    """Something the user should know: a choice made for them, a fallback, a count."""

    text: str


@dataclass(frozen=True)
class Progress:
    """How far a stage is. `detail` is one of a stage's own figures as text, such as "loss 3.412  180 tokens/s"."""

    stage: str
    done: int
    total: int
    detail: str = ""


EventHandler = Callable[[Notice | Progress], None]


def ignore_events(event: Notice | Progress) -> None:
    """The listener of callers who do not listen."""
