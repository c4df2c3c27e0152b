"""Requests to the Hugging Face Hub, with time limits and checked downloads.

Surprise: the libraries retry an unreachable Hub for up to half a minute, wait without limit for
slow responses, and do not check the hash of a download. So once per process a request with a
deadline checks that the Hub is reachable; every request has the limits below; and a file whose hash
is not the one the Hub names is deleted. `HF_ENDPOINT` and `HF_HUB_OFFLINE` are respected. Limit:
hf_xet, where installed, has its own timeouts and checks.
"""

from __future__ import annotations

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
from typing import TYPE_CHECKING

from .errors import HubError, LoraTunerError

if TYPE_CHECKING:
    import httpx2

_REVISION = re.compile(r"(?!.*\.\.)\w[\w.+/-]{0,250}", re.ASCII)
REACHABLE_SECONDS = 4.0  # until the Hub counts as unreachable
# Without a byte until a connection is closed; it is retried until STALLED_SECONDS.
READ_SECONDS = 10.0
WRITE_SECONDS = 60.0  # the same for uploads, which the Hub may take long to process
STALLED_SECONDS = 30.0  # without a completed response and below MIN_BYTES until the request fails
MIN_BYTES = 16_000  # per STALLED_SECONDS
_CAPTIVE_PORTAL = "check HF_ENDPOINT and the proxy, and whether this network requires a login"


class RequestLimits:
    """Limits of all requests to the Hub.

    `before` and `after` are hooks of the HTTP client; `after` also watches each chunk of a
    response. Outside of `limited` blocks nothing is limited but the timeouts."""

    def __init__(self) -> None:
        self.last_progress = math.inf  # time; infinite outside of `limited`
        self.last_activity = 0.0  # time of the last request or chunk
        self.bytes = 0  # since the last progress
        # Message about the last response with status 5xx, if it is to be reported.
        self.server_error = ""

    def before(self, request: httpx2.Request) -> None:
        """Set the timeouts of a request; raise HubError if nothing useful came for too long."""
        # Meanwhile hf_xet downloaded by itself.
        if time.monotonic() - self.last_activity > 1.5 * READ_SECONDS:
            self.record_progress()
        self._check()
        limit = READ_SECONDS if request.method in ("GET", "HEAD") else WRITE_SECONDS
        # The body must be sent first, at the lowest accepted rate.
        self.last_progress += int(request.headers.get("Content-Length") or 0) / MIN_BYTES * STALLED_SECONDS
        timeouts = request.extensions.get("timeout") or {}
        request.extensions["timeout"] = {
            kind: min(timeouts.get(kind) or limit, limit) for kind in ("connect", "read", "write", "pool")
        }

    def after(self, response: httpx2.Response) -> None:
        """Fail at once where the libraries would silently wait, and watch the body."""
        wait = response.headers.get("Retry-After", "")
        if response.status_code == 429 and self.last_progress < math.inf:
            advice = f"after {wait} seconds" if wait.isdigit() else "later"
            raise HubError(f"too many requests. Try again {advice}, or run `hf auth login` for a higher limit.")
        if response.status_code >= 500 and wait.isdigit() and int(wait) > STALLED_SECONDS:
            raise HubError(f"it answers with status {response.status_code}. Try again after {wait} seconds.")
        read_chunks, success = response.iter_raw, response.status_code < 300
        if success and response.request.method not in ("GET", "HEAD"):
            self.record_progress()
        if response.status_code >= 500:
            self.server_error = f"it answers with status {response.status_code}. Try again later."

        def watched(chunk_size: int | None = None) -> Iterator[bytes]:
            for chunk in read_chunks(chunk_size):
                self.bytes += len(chunk) if success else 0
                if self.bytes >= MIN_BYTES:
                    self.record_progress()
                self._check()
                yield chunk
            if success:
                self.record_progress()

        response.iter_raw = watched  # type: ignore[method-assign]  # every way to read the body uses it

    def record_progress(self) -> None:
        """Restart the time limit, inside of `limited`."""
        if self.last_progress < math.inf:
            self.last_progress, self.bytes, self.server_error = time.monotonic(), 0, ""

    def _check(self) -> None:
        self.last_activity = time.monotonic()
        if self.last_activity - self.last_progress > STALLED_SECONDS:
            raise HubError(
                self.server_error
                or f"almost nothing arrived for {STALLED_SECONDS:g} seconds. "
                "Try again when the Hub or the network is faster."
            )

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Apply the time limit in the block."""
        self.last_progress, self.bytes, self.server_error = time.monotonic(), 0, ""
        try:
            yield
        finally:
            self.last_progress = math.inf


_request_limits = RequestLimits()


@contextlib.contextmanager
def hub_request(repo: str, *, writing: bool = False) -> Iterator[None]:
    """Apply the limits to requests about a repo in the block, and delete damaged downloads.

    Raises:
        HubError: for any failure in the block, or a damaged download.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import logging

    hooks = get_session().event_hooks  # of the HTTP client that huggingface_hub and datasets share
    if _request_limits.before not in hooks["request"]:
        hooks["request"].append(_request_limits.before)
        hooks["response"].append(_request_limits.after)
    start, verbosity = time.time(), logging.get_verbosity()
    logging.set_verbosity_error()  # its warnings about single attempts say nothing about the result
    try:
        with _request_limits.limited():
            yield
    except Exception as error:  # errors of the HTTP library included
        if isinstance(error, LoraTunerError) and not isinstance(error, HubError):
            raise
        raise HubError(_damaged_file(repo, start) or hub_error_message(error, repo, writing=writing)) from error
    finally:
        logging.set_verbosity(verbosity)
    if why := _damaged_file(repo, start):
        raise HubError(why)


def _damaged_file(repo: str, start: float) -> str | None:
    """Delete files that were downloaded since `start` and whose hash is not their name.

    The cache names a file by its sha256 or, if it is small, by its git hash. Takes about a second
    per gigabyte.

    Returns:
        A message about the deleted files, or None.
    """
    from huggingface_hub import constants

    deleted = 0
    for blob in Path(constants.HF_HUB_CACHE).glob(f"*s--{escape(repo.replace('/', '--'))}/blobs/*"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes it
            size, changed = blob.stat().st_size, blob.stat().st_mtime
            if (
                blob.is_symlink()
                or changed < start - 2
                or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name)
            ):
                continue
            digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % size)
            with blob.open("rb") as file:
                digest = hashlib.file_digest(file, digest.copy)
            if digest.hexdigest() != blob.name:
                blob.unlink()
                deleted += 1
    return f"{repo}: {deleted} damaged file(s) with a wrong hash deleted. Try again." if deleted else None


@functools.cache
def why_unreachable() -> str | None:
    """Return the reason why the Hub is unreachable, or None if it answers.

    Checked once per process, for at most REACHABLE_SECONDS.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def send_request() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=REACHABLE_SECONDS).status_code
            answer.append(f"{constants.ENDPOINT} answers with status {status}" if status >= 500 else None)
        except HubError as error:
            answer.append(str(error).rstrip("."))
        except Exception as error:  # any error of the HTTP library means that it does not answer
            answer.append(f"{constants.ENDPOINT} does not answer ({type(error).__name__})")

    # In a thread, because name resolution has no timeout.
    thread = threading.Thread(target=send_request, daemon=True)
    thread.start()
    thread.join(REACHABLE_SECONDS)
    return answer[0] if answer else f"{constants.ENDPOINT} does not answer within {REACHABLE_SECONDS:g} seconds"


@contextlib.contextmanager
def offline_mode() -> Iterator[None]:
    """Make huggingface_hub and datasets use only their caches in the block."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def hub_error_message(error: Exception, repo: str, *, writing: bool = False) -> str:
    """Explain an error of a request in one sentence, with what to do and without the token."""
    from huggingface_hub import errors, get_token

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    # The Hub's own message says more than the exceptions that the libraries raise because of it.
    from_hub = next((link for link in chain if isinstance(link, HubError | errors.HfHubHTTPError)), None)
    generation_cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" else None
    first = from_hub or generation_cause or error
    if isinstance(error, errors.HFValidationError):
        return f"'{repo}' is neither a local folder nor a Hub id (owner/name)."
    # datasets drops the cause.
    if isinstance(first, errors.GatedRepoError) or "is a gated dataset" in str(error):
        return f"{repo} is gated: accept its terms on its Hub page, then run `hf auth login`."
    if isinstance(first, errors.RevisionNotFoundError):
        return f"{repo} has no such revision: leave --revision out, or name one of its branches, tags or commits."
    status = first.response.status_code if isinstance(first, errors.HfHubHTTPError) else 0
    if writing and (status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError)):
        return f"no permission to write to {repo}: run `hf auth login` with a token that allows it."
    if isinstance(first, errors.RepositoryNotFoundError):
        return f"the Hub has no repo {repo}, or you have no access: check the name, or run `hf auth login` if it is private."
    # Exceptions of the HTTP library are recognized by name, because the library may change.
    names = set() if from_hub else {kind.__name__ for link in chain for kind in type(link).__mro__}
    if status == 401:
        reason = "the token is not valid. Run `hf auth login` with a valid one."
    elif status >= 500:
        reason = f"it answers with status {status}. Try again later."
    elif "TimeoutException" in names:
        reason = f"it did not answer for {WRITE_SECONDS if writing else READ_SECONDS:g} seconds. Try again later."
    elif "TransportError" in names:
        reason = f"the connection was lost ({str(first).rstrip('.') or type(first).__name__}). Try again."
    elif "TooManyRedirects" in names:
        reason = f"it redirects without end: {_CAPTIVE_PORTAL}."
    elif names & {"JSONDecodeError", "FileMetadataError"} or isinstance(
        error, AssertionError | KeyError | TypeError
    ):
        reason = f"the response is not from the Hub: {_CAPTIVE_PORTAL}."
    else:
        lines = str(first).splitlines() or [repr(first)]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1])
    action = "written to" if writing else "fetched from"
    text = f"{repo} could not be {action} the Hub: {reason}"
    token = get_token()
    return text.replace(token, "***") if token else text  # a message of the Hub may contain it


def ensure_reachable(repo: str, needed: str = "is not cached") -> None:
    """Raise HubError, naming the repo and the reason, if the Hub is unreachable."""
    if why := why_unreachable():
        raise HubError(f"{repo} {needed}, and the Hub is out of reach: {why}.")


def _check_revision(repo: str, revision: str | None) -> None:
    """Raise HubError for a revision that could leave the cache folder, where it is a file name."""
    if revision is not None and not _REVISION.fullmatch(revision):
        raise HubError(f"{repo} has no revision '{revision[:100]}': name one of its branches, tags or commits.")


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """Return the snapshot folder of a model repo in the cache, or None. Sends no request.

    Raises:
        HubError: the name or the revision is not valid.
    """
    from huggingface_hub import errors

    _check_revision(repo, revision)
    try:
        return _snapshot(repo, revision, cached_only=True)
    except errors.HFValidationError as error:
        raise HubError(hub_error_message(error, repo)) from error
    except (errors.LocalEntryNotFoundError, OSError, ValueError, RuntimeError):  # RuntimeError: no home folder
        return None


def download_model(repo: str, revision: str | None) -> Path:
    """Return the snapshot folder of a model repo, and download what the cache lacks.

    Raises:
        HubError: the Hub is unreachable or refuses.
    """
    ensure_reachable(repo)
    with hub_request(repo):
        return _snapshot(repo, revision, cached_only=False)


def _snapshot(repo: str, revision: str | None, *, cached_only: bool) -> Path:
    """Select config, tokenizer and safetensors files: no pickles, no subfolders."""
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


def list_repo_files(
    repo: str, revision: str | None, needed: str = "cannot be fetched"
) -> tuple[str | None, dict[str, int]]:
    """List the files of a model repo.

    Args:
        needed: the reason for the request, if the Hub is unreachable.

    Returns:
        The commit of the revision, and the size in bytes of each file by name.

    Raises:
        HubError: the Hub is unreachable or refuses, or the revision is not valid.
    """
    from huggingface_hub import HfApi

    _check_revision(repo, revision)
    ensure_reachable(repo, needed)
    with hub_request(repo):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        return info.sha or revision, {file.rfilename: file.size or 0 for file in info.siblings or []}


def download_files(repo: str, revision: str | None, names: Iterable[str]) -> Path:
    """Download the named files of a model repo; return their folder. Raises HubError."""
    from huggingface_hub import snapshot_download

    with hub_request(repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(names)))


def upload_files(folder: Path, repo: str, names: Sequence[str], *, private: bool, message: str) -> str:
    """Upload a folder to a model repo as one commit; the repo is created if it is missing.

    Args:
        names: files to delete from the repo where the folder lacks them.
        private: create a private repo; an existing repo must be private already.

    Returns:
        The URL of the commit.

    Raises:
        HubError: the Hub is unreachable or refuses, or the repo is public but `private` is set.
    """
    from huggingface_hub import HfApi

    ensure_reachable(repo, "cannot be written")
    api = HfApi()
    with hub_request(repo, writing=True):
        # The visibility of an existing repo does not change.
        repo_id = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        public = private and not api.model_info(repo_id).private
    if public:
        raise HubError(f"{repo} is public: make it private on its Hub page first, or push to it as it is.")
    with hub_request(repo, writing=True):
        return str(
            api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=list(names)
            )
        )
