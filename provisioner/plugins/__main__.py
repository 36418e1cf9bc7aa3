"""`python -m provisioner.plugins PACKAGE [ENGINE]`: one plugin as a process, for a plain `pulumi up`.

The engine starts it, reads the port from its first line of output, and keeps its standard input open for as long as it
lives: when that ends, so does the plugin, even if the engine was killed.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading

from provisioner.errors import MachineuseError
from provisioner.plugins.host import PluginServer
from provisioner.plugins.wiring import build_plugin

PACKAGES = ("docker", "machineuse")


def main(arguments: list[str]) -> int:
    """Serve until the engine is gone or the process is told to stop; return the exit status."""
    if not arguments or arguments[0] not in PACKAGES:
        print(f"usage: python -m provisioner.plugins {{{','.join(PACKAGES)}}} [ENGINE_ADDRESS]", file=sys.stderr)  # noqa: T201
        return 2
    engine_address = arguments[-1] if len(arguments) > 1 else ""  # after options for logs that we don't write
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    try:
        server = PluginServer(build_plugin(arguments[0], engine_address=engine_address))
        port = server.start()
    except MachineuseError as error:
        print(error.explain(), file=sys.stderr)  # noqa: T201
        return 1
    print(port, flush=True)  # noqa: T201
    if engine_address:
        threading.Thread(target=_await_engine_end, args=(stopped,), daemon=True).start()
    stopped.wait()
    server.stop()
    # What goes with the process needs no collecting, which takes longer than all else. The engine ends one plugin after
    # the other, two for every node, gives them five seconds together, and reports those that are too late as crashed.
    gc.freeze()
    return 0


def _await_engine_end(stopped: threading.Event) -> None:
    # Not through sys.stdin: its lock, held by a daemon thread, would be waited for when the process ends.
    while os.read(0, 4096):
        pass
    stopped.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
