"""The Hugging Face Hub: is it there, and fetch from it.

Surprise: the libraries below retry an unreachable Hub for up to half a minute. So it is asked once per process, with a
deadline, and from then on they are told to be offline. `HF_ENDPOINT` and `HF_HUB_OFFLINE` are respected.
"""

import contextlib
import functools
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .errors import HubError

_REVISION = re.compile(r"(?!.*\.\.)\w[\w.+/-]{0,250}", re.ASCII)
DEADLINE = 4.0  # seconds until the Hub counts as out of reach


@functools.cache
def unreachable() -> str | None:
    """None when the Hub answers, else the reason in a few words. Asked once per process; at most `DEADLINE` seconds."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=DEADLINE).status_code
            answer.append(f"{constants.ENDPOINT} answers with status {status}" if status >= 500 else None)
        except Exception as error:  # whatever the HTTP library raises means the same here
            answer.append(f"{constants.ENDPOINT} does not answer ({type(error).__name__})")

    # In a thread: name resolution has no time-out of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(DEADLINE)
    return answer[0] if answer else f"{constants.ENDPOINT} does not answer within {DEADLINE:g} seconds"


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within the block, huggingface_hub and datasets look at their caches alone and ask nobody."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def reason(error: Exception, repo: str, *, writing: bool = False) -> str:
    """One sentence about what the Hub's refusal means, with what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return f"'{repo}' is neither a local folder nor a Hub id (owner/name)."
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms on its Hub page, then run `hf auth login`."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no such revision: leave --revision out, or name one of its branches, tags or commits."
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if writing and (status in (401, 403) or isinstance(error, errors.LocalTokenNotFoundError)):
        return f"{repo} may not be written with the token in use: run `hf auth login` with one that may write there."
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hub has no {repo} that you may read: check the spelling, or run `hf auth login` if it is private."
    what = "written to" if writing else "fetched from"
    lines = str(error).splitlines() or [repr(error)]
    return f"{repo} could not be {what} the Hub: {' '.join(lines[: 2 if lines[0].endswith(':') else 1])}"


def require(repo: str, needed: str = "is not cached") -> None:
    """Raise HubError unless the Hub can be asked for a repo."""
    if why := unreachable():
        raise HubError(f"{repo} {needed}, and the Hub is out of reach: {why}.")


def _check_revision(repo: str, revision: str | None) -> None:
    """Raise HubError for what would be a path out of the cache, in which a revision is a file's name."""
    if revision is not None and not _REVISION.fullmatch(revision):
        raise HubError(f"{repo} has no revision '{revision[:100]}': name one of its branches, tags or commits.")


def cached_model(repo: str, revision: str | None) -> Path | None:
    """The snapshot folder of a model repo in the cache, or None. Asks nobody. Raises HubError for what is no repo name."""
    from huggingface_hub import errors

    _check_revision(repo, revision)
    try:
        return _snapshot(repo, revision, cached_only=True)
    except errors.HFValidationError as error:
        raise HubError(reason(error, repo)) from error
    except (errors.LocalEntryNotFoundError, OSError, ValueError):
        return None


def fetch_model(repo: str, revision: str | None) -> Path:
    """The snapshot folder of a model repo, downloaded where the cache lacks it. Raises HubError."""
    require(repo)
    try:
        return _snapshot(repo, revision, cached_only=False)
    except Exception as error:  # the HTTP library's own come through as well
        raise HubError(reason(error, repo)) from error


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


def files_of(repo: str, revision: str | None) -> tuple[str | None, dict[str, int]]:
    """The commit that a revision of a model repo is now, and name and bytes of each file of it. Raises HubError."""
    from huggingface_hub import HfApi

    _check_revision(repo, revision)
    require(repo, "cannot be fetched")
    try:
        found = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:  # the HTTP library's own come through as well
        raise HubError(reason(error, repo)) from error
    return found.sha or revision, {it.rfilename: it.size or 0 for it in found.siblings or []}


def fetch_files(repo: str, revision: str | None, names: Iterable[str]) -> Path:
    """A folder with these files of a model repo, and no others. Raises HubError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(names)))
    except Exception as error:
        raise HubError(reason(error, repo)) from error


def upload(folder: Path, repo: str, names: Sequence[str], *, private: bool, message: str) -> str:
    """Put all files of a folder into a model repo, which is made where it is missing; the address of the commit.

    One commit, on top of what is there: the Hub keeps what it replaces. Of `names` those go that the folder lacks. Raises
    HubError, also for a public repo when it is to be private.
    """
    from huggingface_hub import HfApi

    require(repo, "cannot be written")
    api = HfApi()
    try:
        # A repo that is there stays as public or private as it is.
        full = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(full).private:
            raise HubError(f"{repo} is public: make it private on its Hub page first, or leave --private out.")
        return str(
            api.upload_folder(repo_id=full, folder_path=folder, commit_message=message, delete_patterns=list(names))
        )
    except HubError:
        raise
    except Exception as error:
        raise HubError(reason(error, repo, writing=True)) from error
