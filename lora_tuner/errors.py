"""All errors that this package raises on purpose, and the events it reports.

    LoraTunerError
    ├── ConfigError                a setting is wrong, or two contradict each other
    ├── HubError                   the Hugging Face Hub is unreachable, or refused a request
    ├── DataError                  a dataset cannot be read, or has no usable rows
    ├── BaseModelError             the base model cannot be found or used
    ├── AdapterError               an adapter folder is missing or broken, or its name is taken
    │   ├── WrongBaseError         the adapter was trained on another base model
    │   └── UnknownModelError      a request names a model that is not served
    ├── TrainingError              a run cannot start, continue or be resumed
    │   ├── DivergedError          the loss or a gradient is no longer finite
    │   └── ProcessLostError       another process of the run has ended
    └── GenerationError            a prompt or a sampling setting cannot be used
        ├── MixedBatchError        this base cannot run different adapters in one batch
        ├── ContextLengthError     the prompt leaves no room for new tokens
        ├── RequestError           a request exceeds the limits of the server
        ├── QueueFullError         too many requests are waiting
        ├── RequestTimeoutError    a request took too long
        └── ServerClosingError     the server is shutting down

Two exceptions are no errors: `Interrupted` (the run was asked to stop, and its work is saved) and
`RaisedOnRankZero` (this process ends because rank 0 has reported an error).
Messages are full sentences for users: what is wrong, where, and what to do.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass


class LoraTunerError(Exception):
    """Base of all errors whose message is meant for the user."""


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
    """Error in one field of a request: `param`."""

    def __init__(self, text: str, param: str) -> None:
        super().__init__(text)
        self.param = param


class QueueFullError(GenerationError):
    """Error of a full queue. A retry after `seconds` may succeed."""

    def __init__(self, text: str, seconds: int) -> None:
        super().__init__(text)
        self.seconds = seconds


class RequestTimeoutError(GenerationError): ...


class ServerClosingError(GenerationError): ...


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop and has saved its work. The message contains the resume command."""


class RaisedOnRankZero(Exception):  # noqa: N818 - rank 0 reports it
    """Rank 0 of the run has failed or was stopped, and reports that; this process ends with it."""


_OS_ERROR_ADVICE = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "free some space and try again",
    errno.EACCES: "choose another place, or ask its owner for access",
    errno.EPERM: "choose another place, or ask its owner for access",
    errno.EROFS: "choose another place",
    errno.ENOTDIR: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def os_error_message(error: OSError) -> str:
    """Format an OSError as one sentence: the file, the problem, and what to do."""
    text = f"{error.filename or 'A file'}: {error.strerror or error}".rstrip(".")
    return f"{text}: {_OS_ERROR_ADVICE[error.errno]}." if error.errno in _OS_ERROR_ADVICE else f"{text}."


@dataclass(frozen=True)
class Notice:
    """A message for the user: an automatic choice, a fallback, or a count."""

    text: str


@dataclass(frozen=True)
class Progress:
    """Progress of a stage, in its own units. `detail` is text such as "loss 3.412  180 tokens/s"."""

    stage: str
    done: int
    total: int
    detail: str = ""


EventHandler = Callable[[Notice | Progress], None]


def ignore_events(event: Notice | Progress) -> None:
    """Ignore all events: the default handler."""
