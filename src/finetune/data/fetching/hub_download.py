"""Whole files of the Hub: those of a dataset into a folder, those of a base model into the Hub cache, each checked.

A dataset is on the disk once: it is downloaded beside `data/raw` and renamed into it. The Hub cache would keep a second
copy beside DVC's own, and a hard link into it would let an edit in `data/raw` damage what other programs read there.
Where the caller has set HF_HUB_OFFLINE=1, the files are those that the Hub cache holds, copied.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from finetune.data.fetching.hub import SHA256_DIGITS, HubFile, Repo, digest_of, matching, retried
from finetune.data.fetching.sources import RawFile, copy_verified
from finetune.errors import DataError
from finetune.io import sha256_file
from finetune.log import logger, transfer_bar

BLOB_ID_DIGITS = 40
# Never pickles (.bin, .pt, .pth): loading one runs whatever code it holds.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


def model_files(repo: Repo, files: list[HubFile]) -> list[HubFile]:
    """Of a model's files: configuration, tokenizer and safetensors weights; raises DataError when it has none."""
    # A folder, or `consolidated`, holds a second copy of the same weights in the maker's own layout.
    chosen = [file for file in files if "/" not in file.path and not file.path.startswith("consolidated")]
    if not any(file.path.endswith(".safetensors") for file in chosen):
        raise DataError(
            "it has no safetensors weights, and pickled weights (.bin, .pt, .pth) are not loaded",
            repo.where(),
            "give fetch.base_model a revision that has *.safetensors",
        )
    return matching(repo, chosen, MODEL_FILES)


def download(repo: Repo, file: HubFile, folder: Path | None) -> Path:
    """Download a file, or find it complete: below `folder`, or in the Hub cache if None; returns where it lies.

    A cut connection is taken up where it broke. Raises DataError when the Hub cannot be reached within bounds, or
    the bytes differ from the hash that the Hub gives for them; such a file is removed from `folder`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import httpx

    def get() -> str:
        return str(
            hf_hub_download(
                repo.repo_id,
                file.path,
                repo_type=repo.repo_type,
                revision=repo.revision,
                local_dir=folder,
                tqdm_class=transfer_bar,
            )
        )

    # For these the client has resumed the transfer six times, or looked for the file seven times.
    tried = (httpx.TimeoutException, httpx.ConnectError, httpx.RemoteProtocolError, LocalEntryNotFoundError)
    path = Path(retried(get, repo, tried=tried))
    seen = digest_of(path, file)
    if seen == file.digest:
        return path
    if folder is not None:
        path.unlink()
    remedy = "run `dvc repro fetch` again" if folder is not None else f"delete {path} and run `dvc repro fetch` again"
    raise DataError(f"{file.path} has hash {seen}, the Hub says {file.digest}", repo.where(), remedy)


def raw_file(path: str, local: Path, file: HubFile) -> RawFile:
    """The manifest's row of a downloaded and checked file, under the name `path`."""
    sha256 = file.digest if len(file.digest) == SHA256_DIGITS else sha256_file(local)
    return RawFile(path, sha256, local.stat().st_size)


def place(repo: Repo, file: HubFile, downloaded: Path, raw: Path, path: str) -> RawFile:
    """Put a downloaded file at `raw/path`: renamed, or copied where it lies in the Hub cache, which stays as it is."""
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repo.repo_id, file.path, revision=repo.revision, repo_type=repo.repo_type)
    if str(downloaded) == cached:
        return copy_verified(downloaded, raw, path)
    target = raw / path
    target.parent.mkdir(parents=True, exist_ok=True)
    return raw_file(path, Path(shutil.move(downloaded, target)), file)


def is_complete(repo: Repo, file: HubFile, folder: Path | None) -> bool:
    """Whether a file of the right size is there already, so that nothing is downloaded for it."""
    from huggingface_hub import try_to_load_from_cache

    if folder is not None and (folder / file.path).is_file():
        return (folder / file.path).stat().st_size == file.size_bytes
    found = try_to_load_from_cache(repo.repo_id, file.path, revision=repo.revision, repo_type=repo.repo_type)
    return folder is None and isinstance(found, str)


def cached_files(repo: Repo) -> list[HubFile]:
    """All that the Hub cache holds of a repository, sorted by path; raises DataError when that is nothing."""
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
    files = [_named_by_hash(path, path.relative_to(folder).as_posix()) for path in paths]
    if unnamed := next((file.path for file in files if len(file.digest) not in (BLOB_ID_DIGITS, SHA256_DIGITS)), None):
        raise DataError(f"{unnamed} is in the cache without its hash", repo.where(), "unset HF_HUB_OFFLINE")
    logger.warning("%s: offline, taking the %d files in the Hub cache for all it has", repo.where(), len(files))
    return files


def _named_by_hash(path: Path, name: str) -> HubFile:
    blob: Any = path.resolve()
    return HubFile(name, blob.name, blob.stat().st_size)
