"""HTTP server at 127.0.0.1:5000 -> exit status 0 if it answers a search under the name that clients use.

/health stays 200 while every client is refused for its Host header, so it proves nothing.
"""

from __future__ import annotations

import http.client
import sys

PORT, TIMEOUT_S = 5000, 5


def main(host: str) -> None:
    """Ask for one experiment as `host`; exits 1 when the server refuses, raises OSError when it is not there."""
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=TIMEOUT_S)
    connection.request(
        "POST",
        "/api/2.0/mlflow/experiments/search",
        body=b'{"max_results": 1}',
        headers={"Content-Type": "application/json", "Host": host},
    )
    if connection.getresponse().status != http.client.OK:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1])
