"""Keeps the screen and the browser up, and ends them in the order that keeps the profile whole.

The screen (Xvnc: X server and VNC server in one) comes first, Chromium on it second. Whichever dies is started again:
at once, or after a pause that doubles while it keeps dying young. Chromium is ended by SIGINT, because SIGTERM makes
it drop the cookies of the last seconds, and it counts as ended when its process is gone, not when its locks are.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

CDP_HOST, CDP_PORT = "127.0.0.1", 9223
"""Where Chromium itself listens; it binds loopback whatever it is told, hence the door on 9222."""

VNC_SOCKET = Path("/tmp/.machineuse-vnc")  # a socket file: pages in the browser can't reach it, as they could a port
_DISPLAY = ":1"
_X_FILES = (Path("/tmp/.X1-lock"), Path("/tmp/.X11-unix/X1"), VNC_SOCKET)
_DEBIAN_CHROMIUM = Path("/usr/lib/chromium/chromium")  # behind a wrapper script that costs start time
_CHROMIUM_STOP_S = 8.0
_SCREEN_STOP_S = 1.0
_YOUNG_S = 10.0
_LARGEST_PAUSE_S = 10.0
_SMALL_SHM_BYTES = 200 * 1024 * 1024

_DISABLED_FEATURES = (
    "Translate",
    "OptimizationHints",
    "MediaRouter",
    "DialMediaRouteProvider",
    "AutofillServerCommunication",
    "DownloadBubble",
)


def log(event: str, **fields: object) -> None:
    """Write one line to the container's log."""
    sys.stdout.write(" ".join([event, *(f"{name}={value}" for name, value in fields.items())]) + "\n")
    sys.stdout.flush()


def chromium_command(*, home: Path, screen: str, restore_tabs: bool) -> list[str]:
    """Return Chromium's command line. No flag here weakens its sandbox."""
    program = str(_DEBIAN_CHROMIUM) if _DEBIAN_CHROMIUM.exists() else shutil.which("chromium") or "chromium"
    shm = os.statvfs("/dev/shm")
    command = [
        program,
        f"--remote-debugging-port={CDP_PORT}",
        f"--user-data-dir={home / 'chromium'}",
        f"--window-size={screen.replace('x', ',')}",
        "--window-position=0,0",
        "--use-angle=swiftshader",  # no GPU here: say so, or Chromium asks GLX first
        "--no-first-run",
        "--no-default-browser-check",
        "--password-store=basic",
        "--hide-crash-restore-bubble",
        "--noerrdialogs",
        "--disable-breakpad",
        "--disable-component-update",
        "--disable-background-networking",
        "--disable-domain-reliability",
        "--disable-sync",
        "--no-pings",
        "--disk-cache-size=67108864",
        "--log-level=3",
        f"--disable-features={','.join(_DISABLED_FEATURES)}",
    ]
    if shm.f_frsize * shm.f_blocks < _SMALL_SHM_BYTES:
        command.append("--disable-dev-shm-usage")
    command.append("--restore-last-session" if restore_tabs else "about:blank")
    return command


def screen_command(*, screen: str, display_fd: int) -> list[str]:
    """Return the command line of Xvnc, which writes to `display_fd` once it can be used."""
    return [
        "Xvnc",
        _DISPLAY,
        "-displayfd",
        str(display_fd),
        "-geometry",
        screen,
        "-depth",
        "24",
        "-desktop",
        "Machineuse",
        "-SecurityTypes",
        "None",
        "-AlwaysShared",
        "-AcceptSetDesktopSize=0",
        "-rfbport",
        "-1",
        "-rfbunixpath",
        str(VNC_SOCKET),
        "-nolisten",
        "tcp",
        "-noreset",
    ]


def pause_s(lived_s: float, deaths_in_a_row: int) -> float:
    """Return how long to wait before the next start: nothing for one that lived, doubling for one that dies young."""
    if lived_s >= _YOUNG_S or deaths_in_a_row <= 1:
        return 0.0
    return float(min(0.1 * 2 ** (deaths_in_a_row - 1), _LARGEST_PAUSE_S))


class Supervisor:
    """Runs screen and browser until told to stop."""

    def __init__(self, *, home: Path, screen: str) -> None:
        self._home = home
        self._screen = screen
        self._stopping = asyncio.Event()
        self._screen_up = asyncio.Event()
        self._chromium: asyncio.subprocess.Process | None = None
        self._xvnc: asyncio.subprocess.Process | None = None
        self.cdp_up = asyncio.Event()
        self.chromium_restarts = 0

    async def run(self) -> None:
        """Keep both up; return once `stop` was called and both are gone."""
        keepers = [asyncio.create_task(self._keep_screen()), asyncio.create_task(self._keep_chromium())]
        await self._stopping.wait()
        self.cdp_up.clear()
        await self._end(self._chromium, name="chromium", by=signal.SIGINT, within_s=_CHROMIUM_STOP_S)
        await self._end(self._xvnc, name="screen", by=signal.SIGTERM, within_s=_SCREEN_STOP_S)
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    def stop(self) -> None:
        """Begin the end; calling it again changes nothing."""
        self._stopping.set()

    async def _keep_screen(self) -> None:
        deaths = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            await self._run_screen()
            self._screen_up.clear()
            if self._stopping.is_set():
                return
            lived_s = time.monotonic() - started
            deaths = 1 if lived_s >= _YOUNG_S else deaths + 1
            log("screen ended", after_s=round(lived_s, 1))
            if self._chromium is not None:  # it can't go on without its screen
                await self._end(self._chromium, name="chromium", by=signal.SIGINT, within_s=1)
            await asyncio.sleep(pause_s(lived_s, deaths))

    async def _run_screen(self) -> None:
        for path in _X_FILES:  # left by a screen that was killed; no other one runs in this container
            path.unlink(missing_ok=True)
        ready, display_fd = os.pipe()
        try:
            self._xvnc = await asyncio.create_subprocess_exec(
                *screen_command(screen=self._screen, display_fd=display_fd),
                pass_fds=(display_fd,),
                start_new_session=True,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
        finally:
            os.close(display_fd)
        loop = asyncio.get_running_loop()
        announced = asyncio.Event()
        loop.add_reader(ready, announced.set)  # fires for the display's number, and for its death
        try:
            await announced.wait()
            if os.read(ready, 16):
                self._screen_up.set()
        finally:
            loop.remove_reader(ready)
            os.close(ready)
        await self._xvnc.wait()

    async def _keep_chromium(self) -> None:
        deaths = 0
        while not self._stopping.is_set():
            await self._screen_up.wait()
            started = time.monotonic()
            await self._run_chromium(restore_tabs=deaths == 0)
            self.cdp_up.clear()
            if self._stopping.is_set():
                return
            lived_s = time.monotonic() - started
            deaths = 1 if lived_s >= _YOUNG_S else deaths + 1
            self.chromium_restarts += 1
            log("chromium ended", after_s=round(lived_s, 1), restarts=self.chromium_restarts)
            await asyncio.sleep(pause_s(lived_s, deaths))

    async def _run_chromium(self, *, restore_tabs: bool) -> None:
        profile = self._home / "chromium"
        for lock in profile.glob("Singleton*"):  # of a browser that is gone, or of another host's
            lock.unlink(missing_ok=True)
        had_session = restore_tabs and any((profile / "Default").glob("Sessions*/*"))
        self._chromium = await asyncio.create_subprocess_exec(
            *chromium_command(home=self._home, screen=self._screen, restore_tabs=had_session),
            env={**os.environ, "DISPLAY": _DISPLAY, "NO_AT_BRIDGE": "1", "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
            cwd=self._home,
            start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=None,
        )
        watcher = asyncio.create_task(self._announce_cdp())
        try:
            await self._chromium.wait()
        finally:
            watcher.cancel()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._chromium.pid, signal.SIGKILL)  # helpers that outlived it

    async def _announce_cdp(self) -> None:
        while True:
            try:
                _, writer = await asyncio.open_connection(CDP_HOST, CDP_PORT)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            if not self._stopping.is_set():
                self.cdp_up.set()
            return

    async def _end(
        self, process: asyncio.subprocess.Process | None, *, name: str, by: signal.Signals, within_s: float
    ) -> None:
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(by)
        try:
            await asyncio.wait_for(process.wait(), within_s)
        except asyncio.TimeoutError:  # noqa: UP041 - two classes in Python 3.10
            log("killed", name=name, after_s=within_s)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
