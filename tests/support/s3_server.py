"""A real S3 server of the tests' own: versitygw on loopback, its objects in a directory."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from provisioner.toolchain.test_tools import versitygw_path
from tests.support.ports import free_port


class S3Server:
    """One server with one bucket; `start` and `stop` as often as need be, the objects stay."""

    BUCKET = "snapshots"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.access_key, self.secret_key = secrets.token_hex(8), secrets.token_hex(16)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        (root / "objects" / self.BUCKET).mkdir(parents=True)
        (root / "metadata").mkdir()

    @property
    def environment(self) -> dict[str, str]:
        """Return what lets boto3 use the server, and nothing else that this machine may be set up for."""
        nowhere = str(self.root / "none")
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_CONFIG_FILE": nowhere,
            "AWS_SHARED_CREDENTIALS_FILE": nowhere,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def url(self, prefix: str = "", *, bucket: str = BUCKET) -> str:
        """Return what MACHINEUSE_SNAPSHOT_STORE would be."""
        return f"s3://{bucket}/{prefix}?endpoint={quote(f'http://127.0.0.1:{self.port}')}"

    def start(self) -> None:
        """Start the server and wait until it answers; the port stays the same."""
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL"),  # it must not outlive a run of the tests that was killed
                    *(versitygw_path(), "--quiet", "--port", f"127.0.0.1:{self.port}"),
                    *("posix", "--sidecar", self.root / "metadata", self.root / "objects"),
                ],
                env={**os.environ, "ROOT_ACCESS_KEY": self.access_key, "ROOT_SECRET_KEY": self.secret_key},
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self._process.poll() is None, (self.root / "log").read_text()
                assert time.monotonic() < deadline, "the S3 server never answered"
                time.sleep(0.02)

    def stop(self) -> None:
        """End the server, by kill: what it has acknowledged must be there afterwards."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def objects(self) -> list[str]:
        """Return the keys of the objects, as they are in the server's directory."""
        bucket = self.root / "objects" / self.BUCKET
        return sorted(
            str(path.relative_to(bucket))
            for path in bucket.rglob("*")
            if path.is_file() and not path.relative_to(bucket).parts[0].startswith(".")
        )


@contextmanager
def s3_server(root: Path) -> Iterator[S3Server]:
    """Run a server on an empty directory, with its keys in this process's environment, and no others."""
    server = S3Server(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AWS_PROFILE", raising=False)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.start()
        try:
            yield server
        finally:
            server.stop()
