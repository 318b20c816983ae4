"""The remotes of docs/remotes.md, by the commands that stand there, against servers of this machine."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from registered_files import make_clone, make_files, md5

from finetune.errors import DataError
from finetune.transfer.remote import fetch_files

asyncssh = pytest.importorskip("asyncssh")
pytest.importorskip("dvc_ssh", reason="pip install -r requirements/remotes.txt -c requirements/lock.txt")
pytest.importorskip("dvc_s3", reason="pip install -r requirements/remotes.txt -c requirements/lock.txt")
moto = pytest.importorskip("moto.server", reason="pip install -r requirements/dev.txt -c requirements/lock.txt")

PAGE = Path(__file__).parents[2] / "docs/remotes.md"
BUCKET, KEY, SECRET = "bucket", "ann", "hunter2"


def documented(heading: str) -> list[str]:
    """The commands below a heading of the page."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```sh\n(.*?)```", section, re.DOTALL)[0].splitlines()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server with an empty bucket."""
    # The server's own libraries look for keys and regions too.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()  # noqa: S310
    yield address
    server.stop()


@pytest.fixture
def ssh(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The port of an SSH server that lets one key in, and the file of that key."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(str(tmp_path / "key"))
    key.write_public_key(str(tmp_path / "key.pub"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def listen() -> tuple[object, int]:
        host_key = asyncssh.generate_private_key("ssh-ed25519")
        server = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[host_key],
            authorized_client_keys=str(tmp_path / "key.pub"),
            sftp_factory=True,
        )
        return server, server.get_port()

    _, port = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    yield port, tmp_path / "key"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def type_commands(folder: Path, lines: list[str], **replaced: str) -> dict[str, str]:
    """Type documented lines in a repository, with other addresses; returns the environment that they set."""
    variables: dict[str, str] = {}
    for line in lines:
        words = [replaced.get(word, word) for word in shlex.split(line)]
        if words[0] == "export":
            variables |= dict(word.split("=", 1) for word in words[1:])
        else:
            dvc(folder, *words[1:], **variables)
    return variables


def dvc(folder: Path, *arguments: str, **variables: str) -> str:
    environment = {**os.environ, "DVC_SITE_CACHE_DIR": str(folder / "site"), **variables}
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def push_and_fetch(tmp_path: Path, lines: list[str], patch: pytest.MonkeyPatch, **replaced: str) -> Path:
    """Push GGUF files from one repository by these commands, and fetch them into another; returns the second one."""
    here, there = make_clone(tmp_path / "here", None), make_clone(tmp_path / "there", None)
    make_files(here / "models")
    variables = type_commands(here, lines, **replaced)
    dvc(here, "add", "--quiet", "models/gguf")
    dvc(here, "push", **variables)
    type_commands(there, lines, **replaced)
    for name, value in variables.items():
        patch.setenv(name, value)
    digest = re.search(r"md5: (\w+\.dir)", (here / "models/gguf.dvc").read_text())
    assert digest is not None
    target = tmp_path / "fetched"
    target.mkdir()
    fetch_files(there, digest[1], ["model-Q8_0.gguf"], target, max_bytes=10**6, remote="", title="x")
    assert [file.name for file in target.iterdir()] == ["model-Q8_0.gguf"]
    assert md5((target / "model-Q8_0.gguf").read_bytes()) == md5((here / "models/gguf/model-Q8_0.gguf").read_bytes())
    # What the commands gave belongs to this clone alone.
    assert (there / ".dvc/config").read_text() == "[core]\n    no_scm = true\n    analytics = false\n"
    return there


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_and_fetch(tmp_path, documented("A folder"), monkeypatch, **{"/mnt/team/dvc": str(tmp_path / "store")})


def test_a_server_with_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ssh: tuple[int, Path]) -> None:
    port, key = ssh
    replaced = {
        "ssh://ann@server.example/srv/dvc": f"ssh://ann@127.0.0.1{tmp_path}/store",
        "22": str(port),
        "~/.ssh/id_ed25519": str(key),
    }
    there = push_and_fetch(tmp_path, documented("A server with SSH"), monkeypatch, **replaced)
    other = tmp_path / "other"
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(other))
    dvc(there, "remote", "modify", "--local", "team", "keyfile", str(other))
    with pytest.raises(DataError, match=r"the default remote failed: .*[Pp]ermission denied"):
        fetch_files(there, f"{'0' * 32}.dir", [], tmp_path, max_bytes=10**6, remote="", title="x")


def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str) -> None:
    replaced = {"https://s3.example": s3}
    there = push_and_fetch(tmp_path, documented("S3"), monkeypatch, **replaced)
    assert SECRET not in "".join(path.read_text() for path in (there / ".dvc").glob("config*"))
    dvc(there, "remote", "modify", "--local", "team", "url", "s3://another/dvc")
    with pytest.raises(DataError, match="the default remote does not have the files of x"):
        fetch_files(there, f"{'0' * 32}.dir", [], tmp_path, max_bytes=10**6, remote="", title="x")


def test_a_server_or_a_key_that_is_not_there_is_named(tmp_path: Path, ssh: tuple[int, Path]) -> None:
    clone = make_clone(tmp_path / "clone", None)
    replaced = {
        "ssh://ann@server.example/srv/dvc": "ssh://ann:pw@127.0.0.1/x",
        "22": "9",
        "~/.ssh/id_ed25519": str(ssh[1]),
    }
    type_commands(clone, documented("A server with SSH"), **replaced)
    with pytest.raises(DataError, match=r"the default remote failed: .*[Cc]onnect") as refused:
        fetch_files(clone, f"{'0' * 32}.dir", [], tmp_path, max_bytes=10**6, remote="", title="x")
    assert "pw" not in str(refused.value)
    dvc(clone, "remote", "modify", "--local", "team", "keyfile", str(tmp_path / "no-key"))
    with pytest.raises(DataError, match=r"the default remote failed: .*no-key"):
        fetch_files(clone, f"{'0' * 32}.dir", [], tmp_path, max_bytes=10**6, remote="", title="x")
