"""Images with a shell and no browser: what a person may name besides the catalogue, made without a download.

The few programs in them, with the libraries that they load, are taken from the browser image.
"""

from __future__ import annotations

import io
import secrets
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import docker

from stacks.spec import BROWSER_IMAGE

WAITS = ("/bin/sh", "-c", "trap exit TERM; while :; do sleep 60 & wait $!; done")
"""A command that goes on until it is told to stop; a plain shell is deaf to that."""

PACK = """
set -e
# ldd names each program it looks at, and then what that one loads.
files=$(ldd /bin/sh /bin/sleep /bin/cat /bin/id | grep --only-matching '/[^ :]*' | sort --unique)
tar --create --dereference --hard-dereference --file /tmp/root.tar $files
"""


@contextmanager
def shell_image(engine: docker.DockerClient, *, command: Sequence[str] = WAITS) -> Iterator[str]:
    """Give the name of a new image that runs `command`; it is removed afterwards."""
    name = f"machineuse-test-{secrets.token_hex(4)}:latest"
    quoted = ", ".join(f'"{word}"' for word in command)
    engine.api.import_image_from_data(
        _pack_root(engine), repository=name.partition(":")[0], tag="latest", changes=[f"CMD [{quoted}]"]
    )
    try:
        yield name
    finally:
        engine.images.remove(name, force=True)


def _pack_root(engine: docker.DockerClient) -> bytes:
    """Return a root file system as tar: a shell, and what it needs."""
    packer = engine.containers.create(BROWSER_IMAGE, entrypoint=["sh", "-c", PACK], labels={"machineuse.test": "pack"})
    try:
        packer.start()
        done = packer.wait(timeout=60)
        assert done["StatusCode"] == 0, packer.logs()
        chunks, _ = packer.get_archive("/tmp/root.tar")
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as outer:
            root = outer.extractfile("root.tar")
            assert root is not None
            return root.read()
    finally:
        packer.remove(force=True)
