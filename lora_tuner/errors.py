"""All errors that this package raises on purpose, and the events it reports.

    LoraTunerError
    ├── ConfigError
    ├── HubError
    ├── DataError
    │   └── InvalidRowError
    ├── BaseModelError
    ├── AdapterError
    │   ├── WrongBaseError
    │   └── UnknownModelError
    ├── TrainingError
    │   ├── DivergedError
    │   └── ProcessLostError
    └── GenerationError
        ├── MixedBatchError
        ├── ContextLengthError
        ├── RequestError
        ├── QueueFullError
        ├── RequestTimeoutError
        └── ServerClosingError

Two exceptions are no errors: `Interrupted` (the run was asked to stop, and its work is saved) and
`RaisedOnRankZero` (this process ends because rank 0 has reported an error).
Messages are full sentences for users: what is wrong, where, and what to do.
"""

import errno
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


class LoraTunerError(Exception):
    """Base of all errors whose message is meant for the user."""


class ConfigError(LoraTunerError):
    """A setting is wrong, or two contradict each other. `problems` says by setting what, where that is known."""

    def __init__(self, text: str, problems: Mapping[str, str] = MappingProxyType({})) -> None:
        super().__init__(text)
        self.problems = problems


class HubError(LoraTunerError):
    """The Hugging Face Hub is unreachable, or refused a request."""


class DataError(LoraTunerError):
    """A dataset cannot be read, or has no usable rows."""


class InvalidRowError(DataError):
    """One row cannot be read: it is left out, and counted under `reason`, a short noun phrase that
    all such rows share. `detail` says more about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class BaseModelError(LoraTunerError):
    """The base model cannot be found or used."""


class AdapterError(LoraTunerError):
    """An adapter folder is missing or broken, or its name is taken."""


class WrongBaseError(AdapterError):
    """The adapter was trained on another base model."""


class UnknownModelError(AdapterError):
    """A request names a model that is not served."""


class TrainingError(LoraTunerError):
    """A run cannot start, continue or be resumed."""


class DivergedError(TrainingError):
    """The loss or a gradient is no longer finite."""


class ProcessLostError(TrainingError):
    """Another process of the run has ended."""


class GenerationError(LoraTunerError):
    """A prompt or a sampling setting cannot be used."""


class MixedBatchError(GenerationError):
    """This base cannot run different adapters in one batch."""


class ContextLengthError(GenerationError):
    """The prompt leaves no room for new tokens."""


class RequestError(GenerationError):
    """A field of a request, `param`, is wrong or exceeds a limit of the server."""

    def __init__(self, text: str, param: str) -> None:
        super().__init__(text)
        self.param = param


class QueueFullError(GenerationError):
    """Too many requests are waiting. A retry after `seconds` may succeed."""

    def __init__(self, text: str, seconds: int) -> None:
        super().__init__(text)
        self.seconds = seconds


class RequestTimeoutError(GenerationError):
    """A request took too long."""


class ServerClosingError(GenerationError):
    """The server is shutting down."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was asked to stop and has saved its work. The message contains the resume command."""


class RaisedOnRankZero(Exception):  # noqa: N818 - rank 0 reports it
    """Rank 0 of the run has failed or was stopped, and reports that; this process ends with it."""


_OUT_OF_MEMORY_PATTERN = "out of memory|can't allocate|[Cc]annot allocate|not enough memory|bad_alloc"
_OS_ERROR_ADVICE = {
    errno.ENOSPC: "free some space and try again",
    errno.EDQUOT: "free some space and try again",
    errno.EACCES: "choose another place, or ask its owner for access",
    errno.EPERM: "choose another place, or ask its owner for access",
    errno.EROFS: "choose another place",
    errno.ENOTDIR: "choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory is exhausted: of Python, or as torch says in a RuntimeError."""
    if isinstance(error, RuntimeError):
        return re.search(_OUT_OF_MEMORY_PATTERN, str(error)) is not None
    return isinstance(error, MemoryError)


def first_line(error: Exception) -> str:
    """First line of the message of an error, with the next one after a colon; else its type."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


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
    """Progress of a stage, in its own units. `detail` is text such as "loss 3.412, avg 3.398  180 tokens/s";
    a narrow terminal leaves out its last parts, which two spaces separate."""

    stage: str
    done: int
    total: int
    detail: str = ""


EventHandler = Callable[[Notice | Progress], None]


def ignore_events(event: Notice | Progress) -> None:
    """Ignore all events: the default handler."""
