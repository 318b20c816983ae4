"""HTTP server at 127.0.0.1:5000 -> exit status 0 if it answers a search under the name that clients use.

/health stays 200 while every client is refused for its Host header, so it proves nothing. A server with users is asked
as its administrator, whose name and password are in its environment.
"""

from __future__ import annotations

import base64
import http.client
import os
import sys

PORT, TIMEOUT_S = 5000, 5


def headers(host: str) -> dict[str, str]:
    """What a client that calls the server `host` sends."""
    sent = {"Content-Type": "application/json", "Host": host}
    user = os.environ.get("MLFLOW_AUTH_ADMIN_USERNAME")
    if user is not None:
        words = f"{user}:{os.environ.get('MLFLOW_AUTH_ADMIN_PASSWORD', '')}"
        sent["Authorization"] = f"Basic {base64.b64encode(words.encode()).decode()}"
    return sent


def main(host: str) -> None:
    """Ask for one experiment as `host`; exits 1 when the server refuses, raises OSError when it is not there."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=TIMEOUT_S)
    connection.request("POST", "/api/2.0/mlflow/experiments/search", body=b'{"max_results": 1}', headers=headers(host))
    answer = connection.getresponse()
    if answer.status != http.client.OK:
        sys.stderr.write(f"healthcheck: {answer.status} for Host {host}\n")
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1])
