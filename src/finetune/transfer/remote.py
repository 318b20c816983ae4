"""A folder of GGUF files, by DVC's hash of it -> those of its files that are wanted, from the cache here or the remote.

    python -m finetune.transfer.remote ROOT FOLDER_MD5 TARGET MAX_BYTES REMOTE [NAME...]

is the process that `fetch_files` starts. What a remote raises is its library's own (asyncssh, botocore, ...); in a
process of its own all of it ends as the last line of a message.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import DataError
from finetune.lineage import without_passwords
from finetune.transfer.hashes import ASK, parse_folder
from finetune.transfer.limits import largest_file, require_room, shown_growth

NO_REMOTE, NOT_THERE, NOT_A_LIST, NO_NAME = 3, 4, 5, 6
MAX_LIST_BYTES = 1 << 20
SHOWN_CHARACTERS = 300


def fetch_files(
    root: Path, folder_md5: str, names: Sequence[str], target: Path, *, max_bytes: int, remote: str, title: str
) -> None:
    """Write the files `names` (none: all) of the folder into `target`, each of `max_bytes` at most.

    `remote`: its name, "" for the default one. Raises DataError where there is no remote, where it lacks a file, where
    the disk has no room, and for what its server or library says. The contents are not verified here.
    """
    arguments = [str(root), folder_md5, str(target), str(max_bytes), remote, *names]
    command = [sys.executable, "-m", "finetune.transfer.remote", *arguments]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        try:
            announced = child.stdout.readline().strip() if child.stdout else ""
            if announced.isdigit():
                require_room(target, int(announced))
                with shown_growth(target, int(announced), f"GGUF of {title} by DVC"):
                    child.wait()
            child.wait()
        finally:
            child.kill()
        errors.seek(0)
        said = without_passwords((errors.read().strip() or "nothing").splitlines()[-1])[:SHOWN_CHARACTERS]
    if child.returncode:
        raise _refusal(child.returncode, said, root, remote, title)


def _refusal(code: int, said: str, root: Path, remote: str, title: str) -> DataError:
    shown, config = f"remote {remote}" if remote else "the default remote", root / ".dvc/config"
    if code == NO_REMOTE:
        what = f"the registry does not hold the files of {title}, and no DVC remote is set here to have them from"
        remedy = "dvc remote add --local --default team ssh://server/folder (or s3://bucket/folder): docs/remotes.md"
        return DataError(what, config, remedy)
    if code == NOT_THERE:
        remedy = "`make push` on the machine that made it; REMOTE=name takes another remote (`dvc remote list`)"
        return DataError(f"{shown} does not have the files of {title}", f"object {said}", remedy)
    if code == NOT_A_LIST:
        return DataError(f"DVC's list of the GGUF files of {title} holds something else", shown, ASK)
    if code == NO_NAME:
        return DataError(f"{title} has no {said} in its dvc.lock", "dvc.lock", ASK)
    remedy = "check it with `dvc remote list` and `dvc status --cloud`; docs/remotes.md shows each kind"
    return DataError(f"{shown} failed: {said}", config, remedy)


def copy_files(root: Path, folder_md5: str, target: Path, max_bytes: int, remote: str, names: Sequence[str]) -> int:
    """Copy the files, after a line with the sum of their sizes on stdout; returns the exit code."""
    from dvc.config import NoRemoteError  # type: ignore[import-untyped]
    from dvc.repo import Repo  # type: ignore[import-untyped]

    listing = target / "list.json"
    with Repo(str(root)) as repo:
        try:
            stores = _Stores(repo, remote)
            stores.copy(folder_md5, listing, MAX_LIST_BYTES)
            entries = parse_folder(listing.read_bytes(), folder_md5)
            listing.unlink()
            if entries is None:
                return NOT_A_LIST
            if unknown := [name for name in names if name not in entries]:
                sys.stderr.write(unknown[0])
                return NO_NAME
            wanted = {name: entries[name] for name in names or entries}
            sys.stdout.write(f"{sum(stores.size_bytes(digest) for digest in wanted.values())}\n")
            sys.stdout.flush()
            for name, digest in wanted.items():
                stores.copy(digest, target / name, max_bytes)
        except NoRemoteError:
            return NO_REMOTE
        except FileNotFoundError as fault:
            sys.stderr.write(str(fault))
            return NOT_THERE
    return 0


class _Stores:
    """The cache of a repository and, once something is not in it, the remote."""

    def __init__(self, repo: Any, remote: str) -> None:
        self._repo, self._name = repo, remote
        self._remote: Any = None

    def copy(self, digest: str, target: Path, max_bytes: int) -> None:
        """Copy an object; raises FileNotFoundError where it is nowhere."""
        cached = self._cached(digest)
        store = None if cached.is_file() else self._far()
        with largest_file(max_bytes):
            if store is None:
                shutil.copyfile(cached, target)
            else:
                store.fs.get_file(store.oid_to_path(digest), str(target))

    def size_bytes(self, digest: str) -> int:
        """The size of an object, as its store says."""
        cached = self._cached(digest)
        if cached.is_file():
            return cached.stat().st_size
        return int(self._far().fs.size(self._far().oid_to_path(digest)) or 0)

    def _cached(self, digest: str) -> Path:
        return Path(self._repo.cache.local.oid_to_path(digest))

    def _far(self) -> Any:
        if self._remote is None:
            self._remote = self._repo.cloud.get_remote_odb(self._name or None, "fetch")
            try:
                # Connects; the file of a key that is missing must not read as an object that is.
                self._remote.fs.exists(self._remote.path)
            except FileNotFoundError as fault:
                raise ConnectionError(str(fault)) from fault
        return self._remote


def main(arguments: Sequence[str]) -> int:
    """Copy the files; returns the exit code."""
    root, folder_md5, target, max_bytes, remote, *names = arguments
    return copy_files(Path(root), folder_md5, Path(target), int(max_bytes), remote, names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
