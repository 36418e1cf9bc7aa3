"""Starts everything: `python3 -m machineuse_agent`, as the image's entry point does.

The doors open before the browser is up, so that a client that is early waits instead of being turned away. SIGTERM or
SIGINT (`docker stop`) ends the browser cleanly, then the screen, then this program, with 0.
"""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path

from machineuse_agent.activity import Activity, Door
from machineuse_agent.doors import CdpDoor, LiveDoor
from machineuse_agent.home import HomeSize
from machineuse_agent.supervisor import CDP_HOST, CDP_PORT, VNC_SOCKET, Supervisor, log

_CDP_DOOR_PORT, _LIVE_DOOR_PORT = 9222, 6080
_WWW = Path("/usr/share/machineuse/www")
_BUFFER_BYTES = 256 * 1024


async def run() -> None:
    """Serve until a signal says stop."""
    home = Path(os.environ.get("HOME", "/home/machine"))
    supervisor = Supervisor(home=home, screen=os.environ.get("MACHINEUSE_SCREEN", "1280x800"))
    activity = Activity()
    size = HomeSize(home)

    async def status() -> dict[str, object]:
        return {
            "ready": supervisor.cdp_up.is_set(),
            "cdp_connections": activity.connections[Door.CDP],
            "live_connections": activity.connections[Door.LIVE],
            "cdp_client_bytes": activity.client_bytes[Door.CDP],
            "live_client_bytes": activity.client_bytes[Door.LIVE],
            "last_activity_s": round(activity.idle_s, 3),
            "chromium_restarts": supervisor.chromium_restarts,
            "uptime_s": round(activity.uptime_s, 3),
            "home_bytes": await size.read(),
        }

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)

    to_chromium = partial(asyncio.open_connection, CDP_HOST, CDP_PORT, limit=_BUFFER_BYTES)
    to_screen = partial(asyncio.open_unix_connection, str(VNC_SOCKET), limit=_BUFFER_BYTES)
    cdp = CdpDoor(activity=activity, status=status, browser_up=supervisor.cdp_up, connect=to_chromium)
    live = LiveDoor(activity=activity, status=status, www=_WWW, connect=to_screen)
    await asyncio.start_server(cdp.serve, "0.0.0.0", _CDP_DOOR_PORT, limit=_BUFFER_BYTES)
    await asyncio.start_server(live.serve, "0.0.0.0", _LIVE_DOOR_PORT, limit=_BUFFER_BYTES)
    log("doors open", cdp=_CDP_DOOR_PORT, live=_LIVE_DOOR_PORT)
    await supervisor.run()
    log("stopped")


if __name__ == "__main__":
    asyncio.run(run())
