"""A KMS server of the tests' own: moto on loopback, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote

import boto3
from moto.server import ThreadedMotoServer

REGION = "eu-west-1"


@dataclass(frozen=True)
class KmsServer:
    """A running server, and one key on it."""

    endpoint: str
    arn: str

    def url(self, file: str, *, arn: str | None = None) -> str:
        """Return what MACHINEUSE_SNAPSHOT_KEYS would be."""
        return f"aws-kms://{arn or self.arn}?endpoint={quote(self.endpoint)}&file={quote(file)}"

    def client(self) -> object:
        """Return a client, for what an administrator does."""
        return boto3.client("kms", endpoint_url=self.endpoint, region_name=REGION)


@contextmanager
def kms_server() -> Iterator[KmsServer]:
    """Run the server. Needs keys in the environment; any do."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        client = boto3.client("kms", endpoint_url=endpoint, region_name=REGION)
        yield KmsServer(endpoint, client.create_key()["KeyMetadata"]["Arn"])
    finally:
        server.stop()
