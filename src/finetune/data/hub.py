"""A repository of the Hub at one commit -> its files in the Hub cache, each checked against the Hub's own hash.

The Hub's client is imported inside the functions: only fetch may use the network, and it has to say so first.
Where the caller has set HF_HUB_OFFLINE=1, the files are those that the cache holds.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, TypeVar

from finetune.data.sources import RawFile
from finetune.errors import DataError
from finetune.io import CHUNK_BYTES, sha256_file
from finetune.log import logger
from finetune.runtime import caller_is_offline

RepoType = Literal["dataset", "model"]
Result = TypeVar("Result")

ATTEMPTS = 4
FIRST_WAIT_S = 1.0
BLOB_ID_DIGITS, SHA256_DIGITS = 40, 64
# Never pickles (.bin, .pt, .pth): loading one runs whatever code it holds.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
# A second copy of the same weights in the maker's own layout.
MODEL_FILES_LEFT_OUT = ("consolidated*", "*/*")


@dataclass(frozen=True)
class Repo:
    """A repository at a commit of 40 hex digits."""

    repo_id: str
    repo_type: RepoType
    revision: str

    def where(self) -> str:
        """How an error names it."""
        return f"{self.repo_type} {self.repo_id} at {self.revision}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `digest` in hex: SHA-256 of a large file, the id of its git blob for a small one."""

    path: str
    digest: str


def allow_network() -> None:
    """Lift the offline mode that every stage starts in, for this process, unless it is the caller's own wish.

    Only fetch calls it.
    """
    if caller_is_offline():
        return
    os.environ["HF_HUB_OFFLINE"] = "0"
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = False


def download(repo: Repo, pattern: str) -> list[tuple[str, Path]]:
    """Download the files that match; returns (path in the repository, path in the cache), sorted.

    Offline by the caller's wish, the files that match are those in the cache, which may be fewer.
    Raises DataError when the repository, the commit or the files do not exist, access is refused, the Hub cannot be
    reached after ATTEMPTS tries, or a file differs from the hash that the Hub gives for it.
    """
    files = _listed(repo)
    chosen = [file for file in files if fnmatch(file.path, pattern)]
    if not chosen:
        names = ", ".join([file.path for file in files][:20])
        raise DataError(f"no file matches {pattern!r}; it has: {names}", repo.where(), "mend `files` in params.yaml")
    return _fetched(repo, chosen)


def download_model(repo: Repo) -> list[RawFile]:
    """Download configuration, tokenizer and safetensors weights into the Hub cache; returns what was downloaded."""
    files = _listed(repo)
    chosen = [file for file in files if _is_model_file(file.path)]
    if not any(file.path.endswith(".safetensors") for file in chosen):
        raise DataError(
            "it has no safetensors weights, and pickled weights (.bin, .pt, .pth) are not loaded",
            repo.where(),
            "give fetch.base_model a revision that has *.safetensors",
        )
    return [RawFile(path, sha256_file(cached), cached.stat().st_size) for path, cached in _fetched(repo, chosen)]


def cached_file(repo: Repo, path: str) -> Path:
    """A file that fetch left in the Hub cache; raises DataError when it is gone. No network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo.repo_id, path, revision=repo.revision, repo_type=repo.repo_type)
    if not isinstance(found, str):
        raise DataError(f"{path} is not in the Hub cache", repo.where(), "run `dvc repro --force fetch`")
    return Path(found)


def _is_model_file(path: str) -> bool:
    if any(fnmatch(path, pattern) for pattern in MODEL_FILES_LEFT_OUT):
        return False
    return any(fnmatch(path, pattern) for pattern in MODEL_FILES)


def _listed(repo: Repo) -> list[HubFile]:
    """The files of a repository at its commit, sorted by path; offline, those that the cache holds."""
    if caller_is_offline():
        return _cached(repo)
    from huggingface_hub import HfApi

    def ask() -> Any:
        return HfApi().repo_info(repo.repo_id, repo_type=repo.repo_type, revision=repo.revision, files_metadata=True)

    info = _retried(ask, repo)
    if info.sha != repo.revision:
        raise DataError(f"the Hub answered with commit {info.sha}", repo.where(), "give the full commit as revision")
    files = [HubFile(file.rfilename, file.lfs.sha256 if file.lfs else file.blob_id) for file in info.siblings or []]
    return sorted(files, key=lambda file: file.path)


def _cached(repo: Repo) -> list[HubFile]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(repo.repo_id, repo_type=repo.repo_type, revision=repo.revision, local_files_only=True)
    except LocalEntryNotFoundError:
        raise DataError(
            "the Hub cache does not hold it, and HF_HUB_OFFLINE forbids to download it",
            repo.where(),
            "unset HF_HUB_OFFLINE (and TRANSFORMERS_OFFLINE), or set HF_HOME to a cache that holds it",
        ) from None
    folder = Path(found)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    # The cache keeps each file in a blob that is named by the hash that the Hub gave, where links are possible.
    files = [HubFile(path.relative_to(folder).as_posix(), path.resolve().name) for path in paths]
    if unnamed := next((file.path for file in files if len(file.digest) not in (BLOB_ID_DIGITS, SHA256_DIGITS)), None):
        raise DataError(f"{unnamed} is in the cache without its hash", repo.where(), "unset HF_HUB_OFFLINE")
    logger.warning("%s: offline, taking the %d files in the Hub cache for all it has", repo.where(), len(files))
    return files


def _fetched(repo: Repo, files: list[HubFile]) -> list[tuple[str, Path]]:
    from huggingface_hub import hf_hub_download

    fetched = []
    for file in files:

        def get(name: str = file.path) -> str:
            return str(hf_hub_download(repo.repo_id, name, repo_type=repo.repo_type, revision=repo.revision))

        path = Path(_retried(get, repo))
        _check_hash(path, file, repo)
        fetched.append((file.path, path))
    return fetched


def _check_hash(path: Path, file: HubFile, repo: Repo) -> None:
    seen = sha256_file(path) if len(file.digest) == SHA256_DIGITS else _git_blob_id(path)
    if seen != file.digest:
        raise DataError(
            f"{file.path} has hash {seen}, the Hub says {file.digest}",
            repo.where(),
            f"delete {path} and run `dvc repro fetch` again",
        )


def _git_blob_id(path: Path) -> str:
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _retried(ask: Callable[[], Result], repo: Repo) -> Result:
    """Call the Hub; errors that a user must mend end at once, those of the network after ATTEMPTS tries."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, XetDownloadError
    from huggingface_hub.utils import httpx

    fault: Exception | None = None
    for attempt in range(ATTEMPTS):
        if fault is not None:
            wait_s = FIRST_WAIT_S * 2 ** (attempt - 1)
            logger.warning("%s: %s; try %d of %d in %.0f s", repo.where(), fault, attempt + 1, ATTEMPTS, wait_s)
            time.sleep(wait_s)
        try:
            return ask()
        except HfHubHTTPError as error:
            if refusal := _refusal(error, repo):
                raise refusal from None
            fault = error
        except OfflineModeIsEnabled as error:
            raise DataError(str(error), repo.where(), "fetch needs the network: unset HF_HUB_OFFLINE") from None
        except (httpx.HTTPError, XetDownloadError, OSError) as error:
            fault = error
    raise DataError(
        f"the Hub does not answer after {ATTEMPTS} tries: {fault}",
        repo.where(),
        "check the network (or HF_ENDPOINT, if set), then run `dvc repro fetch` again",
    )


def _refusal(error: Any, repo: Repo) -> DataError | None:
    """What the user has to do about an answer of the Hub; None where a later try may succeed."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    folder = "datasets/" if repo.repo_type == "dataset" else ""
    page = f"{constants.ENDPOINT}/{folder}{repo.repo_id}"
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        remedy = f"accept its terms at {page}, then set HF_TOKEN to a token of that account"
        return DataError("access is restricted (gated repository)", repo.where(), remedy)
    if isinstance(error, RevisionNotFoundError):
        return DataError("the repository has no such commit", repo.where(), f"take a commit from {page}/commits/main")
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        remedy = f"check the name at {page}; if it is private or gated, set HF_TOKEN to a token that may read it"
        return DataError(f"no such repository, or no access to it (HTTP {status})", repo.where(), remedy)
    if status < 500 and status not in (408, 429):
        return DataError(f"the Hub refuses: {error}", repo.where(), f"check the repository at {page}")
    return None
