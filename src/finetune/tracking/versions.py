"""`name@alias` or `name/number` -> what the registry says of that version, and files of its run.

A registry is written by others: nothing that is read here may be believed before its hash is compared.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from finetune.errors import TrackingError
from finetune.lineage import first_line, shown_uri, tracking_uri
from finetune.tracking.client import FAULTS, PATIENT, SQLITE, connect
from finetune.transfer.limits import largest_file

# What `register` takes as a name, and MLflow as an alias or a number.
NAME = re.compile(
    r"(?P<model>[a-z0-9][a-z0-9._-]{0,79})(?:@(?P<alias>[\w.-]{1,255})|/(?P<number>[0-9]{1,9}))", re.ASCII
)
NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
CONNECTION_REMEDY = (
    "start the server, or correct MLFLOW_TRACKING_URI (and, where it asks, MLFLOW_TRACKING_USERNAME and _PASSWORD)"
)
# Where the artifacts of a run may lie. MLflow's client sends the user's name, password or token to any http address
# that a run names as its own, and mlflow-artifacts://HOST/ is one.
STORES = ("", "file", "s3", "gs", "wasbs", "abfss")
PROXIED = "mlflow-artifacts"
# The largest text of a run that is read; dvc.lock of twelve stages has 68 kB.
MAX_TEXT_BYTES = 8 << 20


@dataclass(frozen=True)
class Version:
    """A registered version: its model's name, its number, the run that it points to, its tags."""

    model: str
    number: str
    run_id: str
    tags: Mapping[str, str]

    def title(self) -> str:
        """The version as messages name it."""
        return f"{self.model} version {self.number}"


def open_registry() -> Any:
    """A client of MLFLOW_TRACKING_URI, or of mlflow.db here, whose store has answered; TrackingError after 10 s."""
    uri = tracking_uri()
    if uri.startswith(SQLITE) and not Path(uri.removeprefix(SQLITE)).is_file():
        remedy = "export MLFLOW_TRACKING_URI=http://server:5000, the address of the server that has the version"
        raise TrackingError("there is no registry", shown_uri(), remedy)
    # A bar of its own is shown, with rate and remaining time.
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    try:
        return connect(PATIENT)
    except TrackingError as fault:
        raise TrackingError(fault.what, fault.where, CONNECTION_REMEDY) from fault


def find_version(client: Any, name: str, example: str) -> Version:
    """The version of this name; raises TrackingError, with the names that exist, where there is none.

    `example`: what to type, for a name that is none.
    """
    found = NAME.fullmatch(name.removeprefix("models:/"))
    if found is None:
        raise TrackingError("a version is name@alias or name/number", repr(name), example)
    model, alias, number = found["model"], found["alias"], found["number"]
    try:
        by_alias = client.get_model_version_by_alias
        entry = by_alias(model, alias) if alias else client.get_model_version(model, number)
    except FAULTS as fault:
        if getattr(fault, "error_code", "") not in NOT_FOUND:
            raise _refusal(fault) from fault
        raise TrackingError(f"the registry has no version {name}", shown_uri(), _known(client, model)) from fault
    return Version(model, str(entry.version), str(entry.run_id or ""), dict(entry.tags))


def list_files(client: Any, version: Version, folder: str) -> dict[str, int]:
    """Name -> size in bytes of the files in a folder of the version's run ("": its root); empty where there is none.

    The names are the server's: compare them with those that are expected before they are used. Raises TrackingError
    where the run keeps its files at an address that would be sent the user's password.
    """
    with _refusals():
        address = urlsplit(client.get_run(version.run_id).info.artifact_uri)
        if not (address.scheme in STORES or (address.scheme == PROXIED and not address.netloc)):
            shown = f"{address.scheme}://{address.hostname}"
            what = f"the run of {version.title()} keeps its files at {shown}, which would be sent your password"
            raise TrackingError(what, shown_uri(), "ask who registered it; MLFLOW_TRACKING_URI may name that server")
        entries = client.list_artifacts(version.run_id, folder or None)
    return {str(each.path).rpartition("/")[2]: int(each.file_size or 0) for each in entries if not each.is_dir}


def download(client: Any, version: Version, path: str, target: Path, max_bytes: int) -> None:
    """Write the file `path` of the version's run to `target`, `max_bytes` of it at most.

    Raises TrackingError where the server sends something else than this one file, or more than so many bytes.
    """
    folder = target.with_name(f".{target.name}.download")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        try:
            with largest_file(max_bytes):
                sent = Path(client.download_artifacts(version.run_id, path, str(folder)))
        except FAULTS as fault:
            # MLflow does not say which of the two it was.
            what = f"{path} could not be downloaded, or has more than the {max_bytes:,} bytes announced"
            raise TrackingError(
                f"{what}: {first_line(fault)}", shown_uri(), f"try again; {CONNECTION_REMEDY}"
            ) from fault
        expected = folder / path.rpartition("/")[2]
        if sent != expected or expected.is_symlink() or not expected.is_file():
            what = f"the registry sent something else than the one file {path}"
            raise TrackingError(what, shown_uri(), "ask who runs the server")
        expected.replace(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_text(client: Any, version: Version, path: str, folder: Path) -> str | None:
    """A small text of the version's run, by way of a file in `folder`; None where the run has none such."""
    parent, _, name = path.rpartition("/")
    size_bytes = list_files(client, version, parent).get(name)
    if size_bytes is None:
        return None
    if size_bytes > MAX_TEXT_BYTES:
        what = f"{path} of {version.title()} has {size_bytes:,} bytes, where some thousands are expected"
        raise TrackingError(what, shown_uri(), "ask who registered it")
    target = folder / name
    download(client, version, path, target, MAX_TEXT_BYTES)
    try:
        return target.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        what = f"{path} of {version.title()} is no UTF-8"
        raise TrackingError(what, shown_uri(), "ask who registered it") from None


def _known(client: Any, model: str) -> str:
    with _refusals():
        models = sorted(found.name for found in client.search_registered_models(max_results=100))
        if model not in models:
            return f"name one of its models: {', '.join(models)}" if models else "it has none yet: `make register`"
        aliases = sorted(client.get_registered_model(model).aliases)
        numbers = sorted(int(entry.version) for entry in client.search_model_versions(f"name = '{model}'"))
    names = [f"{model}@{alias}" for alias in aliases] + [f"{model}/{number}" for number in numbers]
    return f"name one of these: {', '.join(names[:20])}"


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except FAULTS as fault:
        raise _refusal(fault) from fault


def _refusal(fault: BaseException) -> TrackingError:
    return TrackingError(f"MLflow failed: {first_line(fault)}", shown_uri(), CONNECTION_REMEDY)
