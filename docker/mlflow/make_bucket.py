"""S3 endpoint and keys of the environment -> the bucket named in MLFLOW_ARTIFACTS_DESTINATION, made if it is not there.

Runs once before the server of compose.team.yaml, and waits for a storage that is still starting.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

WAIT_S, PAUSE_S = 60.0, 1.0


def make(client: Any, name: str) -> str:
    """Make the bucket; returns what was done. Raises ClientError where the keys are refused."""
    try:
        client.head_bucket(Bucket=name)
    except client.exceptions.ClientError as fault:
        # head_bucket has no body: its code is the status of the answer.
        if fault.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        client.create_bucket(Bucket=name)
        return f"bucket {name} made"
    return f"bucket {name} is there"


def main() -> None:
    """Wait for the storage and make the bucket; raises EndpointConnectionError after 60 s without an answer."""
    # By name: only the server's image has them.
    boto3, faults = import_module("boto3"), import_module("botocore.exceptions")
    name = urlsplit(os.environ["MLFLOW_ARTIFACTS_DESTINATION"]).netloc
    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    end = time.monotonic() + WAIT_S
    while True:
        try:
            sys.stderr.write(f"make_bucket: {make(client, name)}\n")
            return
        except faults.ConnectionError:
            if time.monotonic() > end:
                raise
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
