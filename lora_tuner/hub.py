"""The Hugging Face Hub: is it there, and fetch from it.

Surprise: the libraries below retry an unreachable Hub for up to half a minute, wait for an answer as long as it takes, and
keep what has come without a look at its hash. So the Hub is asked once per process whether it is there, with a deadline;
every request has the limits below; and what has come is held to the hash by which the Hub names it, or goes. `HF_ENDPOINT`
and `HF_HUB_OFFLINE` are respected. Limit: hf_xet, where it is installed, has time-outs and checks of its own.
"""

import contextlib
import functools
import hashlib
import math
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from glob import escape
from pathlib import Path
from typing import Any

from .errors import HubError, LoraTunerError

_REVISION = re.compile(r"(?!.*\.\.)\w[\w.+/-]{0,250}", re.ASCII)
REACHABLE_SECONDS = 4.0  # seconds until the Hub counts as out of reach
READ_SECONDS = 10.0  # seconds without a byte until a connection is given up; it is tried again while it is not stalled
WRITE_SECONDS = 60.0  # the same where something is written: the Hub may be long in taking it
STALLED_SECONDS = 30.0  # seconds in which the Hub ends no answer and sends fewer than LEAST bytes, until it is given up
MIN_BYTES_PER_SECOND = 16_000
_CAPTIVE_PORTAL = "check HF_ENDPOINT and the proxy, and whether this network wants you to log in first"


class RequestLimits:
    """The limits of all requests to the Hub: called before each, after each, and for each piece of an answer."""

    def __init__(self) -> None:
        self.since = math.inf  # when something of use came last; nobody waits yet
        self.last = 0.0  # when anything was heard
        self.bytes = 0
        self.why = ""  # it is given up, where it says so

    def before(self, request: Any) -> None:
        if time.monotonic() - self.last > 1.5 * READ_SECONDS:  # nobody waited for an answer: hf_xet has its own way
            self.renew()
        self._check()
        limit = READ_SECONDS if request.method in ("GET", "HEAD") else WRITE_SECONDS
        self.since += (
            int(request.headers.get("Content-Length") or 0) / MIN_BYTES_PER_SECOND * STALLED_SECONDS
        )  # and so long to send it
        given = request.extensions.get("timeout") or {}
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: min(given.get(kind) or limit, limit) for kind in kinds}

    def after(self, response: Any) -> None:
        wait = response.headers.get("Retry-After", "")
        if response.status_code == 429 and self.since < math.inf:  # it would be waited for, without a word
            after = f" after {wait} seconds" if wait.isdigit() else " later"
            raise HubError(f"it was asked too often. Try again{after}, or log in by `hf auth login` to be let in more.")
        if response.status_code >= 500 and wait.isdigit() and int(wait) > STALLED_SECONDS:
            raise HubError(f"it answers with status {response.status_code}. Try again after {wait} seconds.")
        read, useful = response.iter_raw, response.status_code < 300
        if useful and response.request.method not in ("GET", "HEAD"):
            self.renew()  # what was sent may have been long on its way
        if response.status_code >= 500:
            self.why = f"it answers with status {response.status_code}. Try again later."

        def watched(chunk_size: int | None = None) -> Iterator[bytes]:
            for chunk in read(chunk_size):
                self.bytes += len(chunk) if useful else 0
                if self.bytes >= MIN_BYTES_PER_SECOND:
                    self.renew()
                self._check()
                yield chunk
            if useful:
                self.renew()

        response.iter_raw = watched  # everything that reads an answer goes through it

    def renew(self) -> None:
        if self.since < math.inf:
            self.since, self.bytes, self.why = time.monotonic(), 0, ""

    def _check(self) -> None:
        self.last = time.monotonic()
        if self.last - self.since > STALLED_SECONDS:
            slow = f"next to nothing came for {STALLED_SECONDS:g} seconds. Try again when the Hub or the network is faster."
            raise HubError(self.why or slow)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self.since, self.bytes, self.why = time.monotonic(), 0, ""
        try:
            yield
        finally:
            self.since = math.inf


_request_limits = RequestLimits()


def _install_request_limits() -> None:
    """Have the client that huggingface_hub and datasets share ask us about each request."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks
    if _request_limits.before not in hooks["request"]:
        hooks["request"].append(_request_limits.before)
        hooks["response"].append(_request_limits.after)


@contextlib.contextmanager
def hub_request(repo: str, *, writing: bool = False) -> Iterator[None]:
    """In the block the Hub is asked about a repo, within the limits above. What goes wrong is raised as HubError, and of what
    came damaged nothing stays in the cache."""
    from huggingface_hub.utils import logging

    _install_request_limits()
    start, verbosity = time.time(), logging.get_verbosity()
    logging.set_verbosity_error()  # what it says of its attempts is not what came of them
    try:
        with _request_limits.waiting():
            yield
    except Exception as error:  # the HTTP library's own come through as well
        if isinstance(error, LoraTunerError) and not isinstance(error, HubError):
            raise
        raise HubError(_damaged_file(repo, start) or hub_error_message(error, repo, writing=writing)) from error
    finally:
        logging.set_verbosity(verbosity)
    if why := _damaged_file(repo, start):
        raise HubError(why)


def _damaged_file(repo: str, start: float) -> str | None:
    """Remove what has come into the cache since `start` and is not what its name says; that, in words, or None.

    A file there is called by its sha256 or, if it is small, by its hash in git. Price: a second for each gigabyte.
    """
    from huggingface_hub import constants

    found = []
    for blob in Path(constants.HF_HUB_CACHE).glob(f"*s--{escape(repo.replace('/', '--'))}/blobs/*"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it
            size, changed = blob.stat().st_size, blob.stat().st_mtime
            if blob.is_symlink() or changed < start - 2 or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
                continue
            digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % size)
            with blob.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            if digest.hexdigest() != blob.name:
                blob.unlink()
                found.append(blob.name)
    what = "a file" if len(found) == 1 else f"{len(found)} files"
    return f"{repo} came damaged from the Hub: {what} had another hash and went. Try again." if found else None


@functools.cache
def why_unreachable() -> str | None:
    """None when the Hub answers, else the reason in a few words. Asked once per process; at most `DEADLINE` seconds."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=REACHABLE_SECONDS).status_code
            answer.append(f"{constants.ENDPOINT} answers with status {status}" if status >= 500 else None)
        except HubError as error:
            answer.append(str(error).rstrip("."))
        except Exception as error:  # whatever the HTTP library raises means the same here
            answer.append(f"{constants.ENDPOINT} does not answer ({type(error).__name__})")

    # In a thread: name resolution has no time-out of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(REACHABLE_SECONDS)
    return answer[0] if answer else f"{constants.ENDPOINT} does not answer within {REACHABLE_SECONDS:g} seconds"


@contextlib.contextmanager
def offline_mode() -> Iterator[None]:
    """Within the block, huggingface_hub and datasets look at their caches alone and ask nobody."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def hub_error_message(error: Exception, repo: str, *, writing: bool = False) -> str:
    """One sentence about what the Hub's refusal means, with what to do. A token is never part of it."""
    from huggingface_hub import errors, get_token

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    # What the Hub said itself says more than what the libraries make of it.
    said = next((it for it in chain if isinstance(it, HubError | errors.HfHubHTTPError)), None)
    made = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
    first = said or made or error
    if isinstance(error, errors.HFValidationError):
        return f"'{repo}' is neither a local folder nor a Hub id (owner/name)."
    if isinstance(first, errors.GatedRepoError) or "is a gated dataset" in str(error):  # datasets drops the cause
        return f"{repo} is gated: accept its terms on its Hub page, then run `hf auth login`."
    if isinstance(first, errors.RevisionNotFoundError):
        return f"{repo} has no such revision: leave --revision out, or name one of its branches, tags or commits."
    status = first.response.status_code if isinstance(first, errors.HfHubHTTPError) else 0
    if writing and (status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError)):
        return f"{repo} may not be written with the token in use: run `hf auth login` with one that may write there."
    if isinstance(first, errors.RepositoryNotFoundError):
        return f"the Hub has no {repo} that you may read: check the spelling, or run `hf auth login` if it is private."
    # The HTTP library's own are known by name: which library it is changes.
    kinds = set() if said else {kind.__name__ for it in chain for kind in type(it).__mro__}
    if status == 401:
        what = "it does not take the token in use. Run `hf auth login` with a valid one."
    elif status >= 500:
        what = f"it answers with status {status}. Try again later."
    elif "TimeoutException" in kinds:
        what = f"it was silent for {WRITE_SECONDS if writing else READ_SECONDS:g} seconds. Try again later."
    elif "TransportError" in kinds:
        what = f"the connection broke off ({str(first).rstrip('.') or type(first).__name__}). Try again."
    elif "TooManyRedirects" in kinds:
        what = f"it sends from one address to the next without end: {_CAPTIVE_PORTAL}."
    elif kinds & {"JSONDecodeError", "FileMetadataError"} or isinstance(error, AssertionError | KeyError | TypeError):
        what = f"what answers is not the Hub: {_CAPTIVE_PORTAL}."
    else:
        lines = str(first).splitlines() or [repr(first)]
        what = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    text = f"{repo} could not be {'written to' if writing else 'fetched from'} the Hub: {what}"
    token = get_token()
    return text.replace(token, "***") if token else text  # the Hub may have said it


def ensure_reachable(repo: str, needed: str = "is not cached") -> None:
    """Raise HubError unless the Hub can be asked for a repo."""
    if why := why_unreachable():
        raise HubError(f"{repo} {needed}, and the Hub is out of reach: {why}.")


def _check_revision(repo: str, revision: str | None) -> None:
    """Raise HubError for what would be a path out of the cache, in which a revision is a file's name."""
    if revision is not None and not _REVISION.fullmatch(revision):
        raise HubError(f"{repo} has no revision '{revision[:100]}': name one of its branches, tags or commits.")


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The snapshot folder of a model repo in the cache, or None. Asks nobody. Raises HubError for what is no repo name."""
    from huggingface_hub import errors

    _check_revision(repo, revision)
    try:
        return _snapshot(repo, revision, cached_only=True)
    except errors.HFValidationError as error:
        raise HubError(hub_error_message(error, repo)) from error
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        return None


def download_model(repo: str, revision: str | None) -> Path:
    """The snapshot folder of a model repo, downloaded where the cache lacks it. Raises HubError."""
    ensure_reachable(repo)
    with hub_request(repo):
        return _snapshot(repo, revision, cached_only=False)


def _snapshot(repo: str, revision: str | None, *, cached_only: bool) -> Path:
    """Config, tokenizer and safetensors of a model repo; nothing pickled, nothing in sub-folders."""
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
            ignore_patterns=["*/*"],
            local_files_only=cached_only,
        )
    )


def list_repo_files(repo: str, revision: str | None) -> tuple[str | None, dict[str, int]]:
    """The commit that a revision of a model repo is now, and name and bytes of each file of it. Raises HubError."""
    from huggingface_hub import HfApi

    _check_revision(repo, revision)
    ensure_reachable(repo, "cannot be fetched")
    with hub_request(repo):
        found = HfApi().model_info(repo, revision=revision, files_metadata=True)
        return found.sha or revision, {it.rfilename: it.size or 0 for it in found.siblings or []}


def download_files(repo: str, revision: str | None, names: Iterable[str]) -> Path:
    """A folder with these files of a model repo, and no others. Raises HubError."""
    from huggingface_hub import snapshot_download

    with hub_request(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(names)))


def upload_files(folder: Path, repo: str, names: Sequence[str], *, private: bool, message: str) -> str:
    """Put all files of a folder into a model repo, which is made where it is missing; the address of the commit.

    One commit, on top of what is there: the Hub keeps what it replaces. Of `names` those go that the folder lacks. Raises
    HubError, also for a public repo when it is to be private.
    """
    from huggingface_hub import HfApi

    ensure_reachable(repo, "cannot be written")
    api = HfApi()
    with hub_request(repo, writing=True):
        # A repo that is there stays as public or private as it is.
        full = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        public = private and not api.model_info(full).private
    if public:
        raise HubError(f"{repo} is public: make it private on its Hub page first, or leave --private out.")
    with hub_request(repo, writing=True):
        return str(
            api.upload_folder(repo_id=full, folder_path=folder, commit_message=message, delete_patterns=list(names))
        )
