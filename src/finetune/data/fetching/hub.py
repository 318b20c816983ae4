"""A repository of the Hub at one commit: what it holds, who may read it, and what the Hub's answers mean for a person.

The Hub's client is imported inside the functions: only fetch and `make pin` may use the network, and have to say so.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

from finetune.errors import DataError
from finetune.io import CHUNK_BYTES
from finetune.log import logger
from finetune.runtime import caller_is_offline

RepoType = Literal["dataset", "model"]
Result = TypeVar("Result")

ATTEMPTS = 4
FIRST_WAIT_S = 1.0
SHA256_DIGITS = 64
# What the caller's environment may set otherwise; huggingface_hub reads them once, when it is first imported.
CLIENT_SETTINGS = {
    # Seconds until a silent connection counts as lost.
    "HF_HUB_DOWNLOAD_TIMEOUT": "10",
    "HF_HUB_ETAG_TIMEOUT": "10",
    # Plain HTTP resumes by range and ends in bounded time, which the tests prove; hf_xet has rules of its own.
    "HF_HUB_DISABLE_XET": "1",
}
# User and password of an address, and its query, where a storage server's signature stands.
URL_PARTS = re.compile(r"(https?://)(?:[^\s/'\"@]*@)?([^\s'\"?]*)(?:\?[^\s'\"]*)?")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")


@dataclass(frozen=True)
class Repo:
    """A repository at a revision: a commit of 40 hex digits, but for `make pin`, which asks for that of a branch."""

    repo_id: str
    repo_type: RepoType
    revision: str

    def where(self) -> str:
        """How an error names it."""
        return f"{self.repo_type} {self.repo_id} at {self.revision}"

    def page(self) -> str:
        """Its address in a browser."""
        from huggingface_hub import constants

        folder = "datasets/" if self.repo_type == "dataset" else ""
        return without_secrets(f"{constants.ENDPOINT}/{folder}{self.repo_id}")


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `digest` in hex: SHA-256 of a large file, the id of its git blob for a small one."""

    path: str
    digest: str
    size_bytes: int

    def hasher(self) -> Any:
        """The hash, before the first byte, whose `hexdigest` is to be `digest`."""
        if len(self.digest) == SHA256_DIGITS:
            return hashlib.sha256()
        return hashlib.sha1(f"blob {self.size_bytes}\0".encode(), usedforsecurity=False)


class HubUnreachableError(DataError):
    """The Hub does not answer; asking it about the next repository would only take longer."""


def raise_together(faults: list[DataError], remedy: str) -> None:
    """Raise the one fault, or one DataError that lists them all with their places and remedies; none, nothing."""
    if len(faults) == 1:
        raise faults[0]
    if faults:
        lines = [f"  - {fault.what}\n    where:  {fault.where}\n    remedy: {fault.remedy}" for fault in faults]
        raise DataError(f"{len(faults)} faults:\n" + "\n".join(lines), "fetch in params.yaml", remedy)


def allow_network() -> None:
    """Lift the offline mode that every stage starts in, for this process, unless it is the caller's own wish.

    No request waits longer than the timeouts above for the next byte, and no log line of the client shows a secret.
    """
    if caller_is_offline():
        return
    os.environ["HF_HUB_OFFLINE"] = "0"
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import logging as client_logging
    from huggingface_hub.utils._http import default_client_factory

    constants.HF_HUB_OFFLINE = False

    def bounded_client() -> Any:
        client = default_client_factory()
        client.event_hooks = {"request": [*client.event_hooks["request"], _bounded]}
        return client

    def _bounded(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        for phase in ("connect", "read", "write", "pool"):
            limits[phase] = limits.get(phase) or constants.HF_HUB_DOWNLOAD_TIMEOUT
        request.extensions["timeout"] = limits

    set_client_factory(bounded_client)
    client_logging.get_logger()
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_without_secrets_in)


def commit_of(repo: Repo) -> str:
    """The commit (40 hex digits) that a branch, tag or commit stands for; raises DataError when there is none."""
    from huggingface_hub import HfApi, constants

    ask = partial(
        HfApi().repo_info,
        repo.repo_id,
        repo_type=repo.repo_type,
        revision=repo.revision,
        timeout=constants.HF_HUB_ETAG_TIMEOUT,
        expand=["sha"],
    )
    return str(retried(ask, repo).sha)


def readable_files(repo: Repo, patterns: tuple[str, ...]) -> list[HubFile]:
    """The files that match one of the globs, sorted by path, after a test that they may be read.

    A gated repository is listed for everybody, so the first file is asked for (its header only).
    Raises DataError when the repository, the commit or such files do not exist, or access is refused.
    """
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.hf_api import RepoFile

    if (seen := commit_of(repo)) != repo.revision:
        raise DataError(f"the Hub answered with commit {seen}", repo.where(), "give the full commit as revision")

    def ask() -> list[Any]:
        folder = _common_folder(patterns)
        tree = HfApi().list_repo_tree(
            repo.repo_id, folder, recursive=True, repo_type=repo.repo_type, revision=repo.revision
        )
        return [entry for entry in tree if isinstance(entry, RepoFile)]

    listed = sorted((_hub_file(entry, repo) for entry in _or_none(ask, repo)), key=lambda file: file.path)
    chosen = matching(repo, listed, patterns)
    url = hf_hub_url(repo.repo_id, chosen[0].path, repo_type=repo.repo_type, revision=repo.revision)
    retried(partial(get_hf_file_metadata, url, timeout=constants.HF_HUB_ETAG_TIMEOUT), repo)
    return chosen


def matching(repo: Repo, files: list[HubFile], patterns: tuple[str, ...]) -> list[HubFile]:
    """The files that match one of the globs, in the order given; raises DataError when there are none."""
    chosen = [file for file in files if any(fnmatch(file.path, pattern) for pattern in patterns)]
    if not chosen:
        wanted, names = " or ".join(map(repr, patterns)), ", ".join([file.path for file in files][:20]) or "none there"
        raise DataError(f"no file matches {wanted}; it has: {names}", repo.where(), "mend `files` in params.yaml")
    return chosen


def cached_file(repo: Repo, path: str) -> Path:
    """A file that fetch left in the Hub cache; raises DataError when it is gone. No network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo.repo_id, path, revision=repo.revision, repo_type=repo.repo_type)
    if not isinstance(found, str):
        raise DataError(f"{path} is not in the Hub cache", repo.where(), "run `dvc repro --force fetch`")
    return Path(found)


def digest_of(path: Path, file: HubFile) -> str:
    """The hash of a local file, of the kind that the Hub gives for `file`."""
    digest = HubFile(file.path, file.digest, path.stat().st_size).hasher()
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


def retried(
    ask: Callable[[], Result], repo: Repo, *, attempts: int = ATTEMPTS, tried: tuple[type[Exception], ...] = ()
) -> Result:
    """Call the Hub; errors that a user must mend end at once, those of the network after `attempts` tries.

    `tried`: errors that the client itself has tried to get past before it raised them; they end at once, too.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, XetDownloadError
    from huggingface_hub.utils import httpx

    for attempt in range(1, attempts + 1):
        try:
            return ask()
        except HfHubHTTPError as error:
            if refusal := _refusal(error, repo):
                raise refusal from None
            fault: Exception = error
        except OfflineModeIsEnabled:
            raise DataError(
                "offline mode forbids to ask the Hub", repo.where(), "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
            ) from None
        except (httpx.HTTPError, XetDownloadError, OSError) as error:
            fault = error
        # The client wraps what went wrong in a long text that does not say it.
        cause = fault.__cause__ if isinstance(fault, LocalEntryNotFoundError) and fault.__cause__ else fault
        text = without_secrets((str(cause) or type(cause).__name__).splitlines()[0])
        if isinstance(fault, tried) or attempt == attempts:
            break
        wait_s = FIRST_WAIT_S * 2 ** (attempt - 1)
        logger.warning("%s: %s; try %d of %d in %.0f s", repo.where(), text, attempt + 1, attempts, wait_s)
        time.sleep(wait_s)
    raise HubUnreachableError(
        f"the Hub does not answer, try after try: {text}",
        repo.where(),
        "check the network (or HF_ENDPOINT, if set; HF_HUB_DOWNLOAD_TIMEOUT in seconds for a slow one), "
        "then run `dvc repro fetch` again: files that are complete are kept",
    )


def without_secrets(text: str) -> str:
    """The text without tokens, and without the user, password and query of an address."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "***")
    return TOKEN.sub("***", URL_PARTS.sub(r"\1\2", text))


def _without_secrets_in(record: logging.LogRecord) -> bool:
    record.msg, record.args = without_secrets(record.getMessage()), ()
    return True


def _hub_file(entry: Any, repo: Repo) -> HubFile:
    path = PurePosixPath(entry.path)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"the Hub lists a file {entry.path!r} outside the repository", repo.where(), "do not use it")
    return HubFile(entry.path, entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.size)


def _common_folder(patterns: tuple[str, ...]) -> str | None:
    """The folder below which all that matches lies: some repositories have 100,000 files beside those wanted."""
    folders = {re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0] for pattern in patterns}
    return folders.pop() or None if len(folders) == 1 else None


def _or_none(ask: Callable[[], list[Any]], repo: Repo) -> list[Any]:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    def entries() -> list[Any]:
        try:
            return ask()
        except RemoteEntryNotFoundError:
            return []

    # One try: the client pages through the listing with five of its own.
    return retried(entries, repo, attempts=1)


def _refusal(error: Any, repo: Repo) -> DataError | None:
    """What the user has to do about an answer of the Hub; None where a later try may succeed."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page, status = repo.page(), error.response.status_code
    if isinstance(error, GatedRepoError):
        remedy = f"accept its terms at {page}, then set HF_TOKEN to a token of that account"
        return DataError("access is restricted (gated repository)", repo.where(), remedy)
    if isinstance(error, RevisionNotFoundError):
        what = "the repository has no such commit, branch or tag"
        return DataError(what, repo.where(), f"take one from {page}/commits/main")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        remedy = f"check the name at {page}; if it is private or gated, set HF_TOKEN to a token that may read it"
        return DataError(f"no such repository, or no access to it (HTTP {status})", repo.where(), remedy)
    if status < 500 and status not in (408, 429):
        return DataError(f"the Hub refuses: {without_secrets(str(error))}", repo.where(), f"check it at {page}")
    return None
