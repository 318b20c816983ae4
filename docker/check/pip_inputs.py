"""pip's configuration of this machine -> build secrets with which pip inside a build finds the same packages.

Folders of wheels are offered over loopback, which a chroot shares; a certificate becomes a secret of its own. Nothing
of it is in the repository, and a secret is in no layer.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CERTIFICATE = "/run/secrets/ca.pem"


class Quiet(SimpleHTTPRequestHandler):
    """Answers without a line of log for each request."""

    def log_message(self, format: str, *_: Any) -> None:
        """Say nothing."""


def settings() -> dict[str, str]:
    """Key -> value of pip's global and environment configuration; the environment wins, as it does for pip."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    pairs = [line.partition("=") for line in listed.splitlines()]
    ordered = sorted(pairs, key=lambda pair: pair[0].startswith(":env:"))
    return {name.rpartition(".")[2]: value.strip("'") for name, _, value in ordered}


@contextmanager
def pip_secrets(work: Path, token: str, *, loopback: bool) -> Iterator[dict[str, Path]]:
    """Secret id -> file, while the wheels are served; `token` is planted in the configuration, as a password is."""
    pip, lines, servers = settings(), ["[global]", f"# {token}"], []
    secrets = {"pip.conf": work / "pip.conf"}
    if loopback:
        for folder in pip.get("find-links", "").split():
            if Path(folder).is_dir():
                server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
                threading.Thread(target=server.serve_forever, daemon=True).start()
                servers.append(server)
        if servers:
            links = " ".join(f"http://127.0.0.1:{server.server_port}/" for server in servers)
            lines.append(f"find-links = {links}")
        if "cert" in pip:
            secrets["ca.pem"] = Path(pip["cert"])
            lines.append(f"cert = {CERTIFICATE}")
        # Local indexes cannot be reached from inside.
        for key in ("index-url", "extra-index-url"):
            if remote := [url for url in pip.get(key, "").split() if url.startswith("http")]:
                lines.append(f"{key} = {' '.join(remote)}")
    secrets["pip.conf"].write_text("\n".join(lines) + "\n")
    try:
        yield secrets
    finally:
        secrets["pip.conf"].unlink()
        for server in servers:
            server.shutdown()
