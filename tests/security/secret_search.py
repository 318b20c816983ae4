"""Secrets to plant in the environment of a run, and the search for them in every byte that it wrote."""

from __future__ import annotations

import base64
import gzip
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from pyarrow import ArrowInvalid, parquet

# Each is unlike any other text, and has the form in which such a secret is known.
PLANTED = {
    "MLFLOW_TRACKING_USERNAME": "planted-mlflow-user",
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow/p@ssword",
    "MLFLOW_TRACKING_TOKEN": "planted-mlflow-token",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret+key",
    "PGPASSWORD": "planted-postgres",
    "OPENAI_API_KEY": "sk-planted-openai",
    "PIP_EXTRA_INDEX_URL": "https://ann:planted-index@127.0.0.1:9/simple",
    "HTTPS_PROXY": "http://ann:planted-proxy@127.0.0.1:9",
}
# What is searched for: of an address only its password, as the rest may be shown. MLflow notes who made a run.
WORDS = {
    name: value.rpartition("@")[0].rpartition(":")[2] if "://" in value else value
    for name, value in PLANTED.items()
    if name != "MLFLOW_TRACKING_USERNAME"
}


def forms(secret: str) -> set[bytes]:
    """A secret as it is, percent-encoded, in JSON, and in base64 at any of the three places that a text may begin."""
    plain = secret.encode()
    encoded = {base64.b64encode(b"x" * shift + plain)[4:-4] for shift in range(3)}
    return {plain, quote(secret, safe="").encode(), secret.replace("/", "\\/").encode(), *encoded}


def contents(file: Path) -> Iterable[bytes]:
    """The bytes of a file, and of what it holds in compressed form."""
    raw = file.read_bytes()
    yield raw
    if raw[:2] == b"\x1f\x8b":
        yield gzip.decompress(raw)
    if raw[:4] == b"PAR1":
        try:
            yield str(parquet.read_table(file).to_pylist()).encode()
        except ArrowInvalid:
            return
    if raw[:1] == b"\x78":
        yield zlib.decompressobj().decompress(raw)


def leaks(folder: Path, secrets: Mapping[str, str], but: Iterable[str] = ()) -> list[str]:
    """`name in path` for each secret in each file below a folder; `but`: relative paths that may hold them."""
    found = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        place = file.relative_to(folder).as_posix()
        if any(f"{place}/".startswith(f"{each}/") for each in but):
            continue
        held = list(contents(file))
        found += [
            f"{name} in {place}"
            for name, secret in secrets.items()
            if any(form in content for form in forms(secret) for content in held)
        ]
    return found


def shown(text: str, secrets: Mapping[str, str]) -> list[str]:
    """The names of the secrets in what a program printed."""
    return [name for name, secret in secrets.items() if any(form in text.encode() for form in forms(secret))]
