"""Downloads the official Pulumi CLI; run as a process of its own: `python -m provisioner.toolchain.official_cli V DIR`.

The Automation API brings the download. It sets no time limits, and on a network without a way out it may hang for
minutes, so a short look whether the site answers comes first, and the caller can end this process.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import urllib.error
import urllib.request

from pulumi.automation import PulumiCommand
from semver import VersionInfo

_SITE = "https://get.pulumi.com/"
_LOOK_TIMEOUT_S = 5.0


def main(version: str, root: str) -> int:
    """Install the CLI as `root`/bin/pulumi; print why not, and return 1, where that fails."""
    refusal = _look()
    if refusal is not None:
        print(refusal)  # noqa: T201 - our caller reads it
        return 1
    try:
        PulumiCommand.install(root=root, version=VersionInfo.parse(version))
    except subprocess.CalledProcessError as error:
        print((error.output or b"").decode(errors="replace").strip() or error)  # noqa: T201
        return 1
    except OSError as error:
        print(error)  # noqa: T201
        return 1
    return 0


def _look() -> str | None:
    """Return None if the download site answers, else why not; looking a name up has no time limit but this one."""
    answer: list[str | None] = [f"no answer from {_SITE} within {_LOOK_TIMEOUT_S:.0f} seconds"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(_SITE, method="HEAD"), timeout=_LOOK_TIMEOUT_S):
                answer[0] = None
        except urllib.error.HTTPError as error:
            # A proxy that refuses answers too; anything but a refusal means that the site is there.
            refused = error.code in (401, 403, 407) or error.code >= 500
            answer[0] = f"{_SITE} answers {error.code}" if refused else None
        except OSError as error:
            answer[0] = f"{_SITE}: {error}"

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_LOOK_TIMEOUT_S)
    return answer[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
