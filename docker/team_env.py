"""Random secrets of a team's server -> `.cache/team.env`, for `docker compose --env-file`; never over an older one.

`.cache` is ignored by git, by DVC and by the image's build. Only the owner may read the file.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

TARGET = Path(".cache/team.env")
BYTES = 32


def lines() -> list[str]:
    """NAME=value; hexadecimal, which needs no quoting in an address or a shell."""
    return [
        "MLFLOW_AUTH_ADMIN_USERNAME=admin",
        f"MLFLOW_AUTH_ADMIN_PASSWORD={secrets.token_hex(BYTES)}",
        f"MLFLOW_FLASK_SERVER_SECRET_KEY={secrets.token_hex(BYTES)}",
        f"POSTGRES_PASSWORD={secrets.token_hex(BYTES)}",
        f"S3_ACCESS_KEY={secrets.token_hex(BYTES // 4)}",
        f"S3_SECRET_KEY={secrets.token_hex(BYTES)}",
    ]


def main() -> int:
    """Write the file; returns 1 where there is one, since PostgreSQL keeps the password of its first start."""
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(TARGET, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        sys.stderr.write(
            f"team_env: {TARGET} is there, and the databases were made with its passwords\n"
            f"  remedy: keep it; to begin anew, remove the volumes with docker compose down --volumes, then the file\n"
        )
        return 1
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write("\n".join(lines()) + "\n")
    sys.stderr.write(f"team_env: {TARGET} written; the administrator's name and password are in it\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
