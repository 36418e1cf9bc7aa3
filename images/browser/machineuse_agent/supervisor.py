"""Keeps the screen and the browser up, and ends them in the order that keeps the profile whole.

The screen (Xvnc: X server and VNC server in one) comes first, a small window manager and Chromium on it second.
Whichever dies is started again: at once, or after a pause that doubles while it keeps dying young. Chromium is ended
by SIGINT, because SIGTERM makes it drop the cookies of the last seconds, and it counts as ended when its process is
gone, not when its locks are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Awaitable, Callable
from pathlib import Path

CDP_HOST, CDP_PORT = "127.0.0.1", 9223
"""Where Chromium itself listens; it binds loopback whatever it is told, hence the door on 9222."""

VNC_SOCKET = Path("/tmp/.machineuse-vnc")  # a socket file: pages in the browser can't reach it, as they could a port
_DISPLAY = ":1"
_X_FILES = (Path("/tmp/.X1-lock"), Path("/tmp/.X11-unix/X1"), VNC_SOCKET)
_DEBIAN_CHROMIUM = Path("/usr/lib/chromium/chromium")  # behind a wrapper script that costs start time
_BLACKBOX_SETTINGS = Path("/usr/share/machineuse/blackboxrc")
_CHROMIUM_STOP_S = 8.0
_SCREEN_STOP_S = 1.0
_YOUNG_S = 10.0
_LARGEST_PAUSE_S = 10.0
_SMALL_SHM_BYTES = 200 * 1024 * 1024

_FIRST_PREFERENCES = {
    "browser": {"custom_chrome_frame": True},  # its tabs are its title bar
    "credentials_enable_service": False,  # no "save password?" over the page
    "translate": {"enabled": False},
}
"""What a new profile begins with; from there on they are the person's own settings."""

_DISABLED_FEATURES = (
    "Translate",
    "WebUIOmniboxPopup",  # the address bar's list as a web page: a renderer of its own, 40 MB and 0.6 s of CPU at start
    "WebUIOmniboxAimPopup",
    "OptimizationHints",
    "MediaRouter",
    "DialMediaRouteProvider",
)


def log(event: str, **fields: object) -> None:
    """Write one line to the container's log."""
    sys.stdout.write(" ".join([event, *(f"{name}={value}" for name, value in fields.items())]) + "\n")
    sys.stdout.flush()


def chromium_command(*, home: Path, restore_tabs: bool) -> list[str]:
    """Return Chromium's command line. No flag here weakens its sandbox."""
    program = str(_DEBIAN_CHROMIUM) if _DEBIAN_CHROMIUM.exists() else shutil.which("chromium") or "chromium"
    shm = os.statvfs("/dev/shm")
    command = [
        program,
        f"--remote-debugging-port={CDP_PORT}",
        f"--user-data-dir={home / 'chromium'}",
        "--start-maximized",
        # No GPU here: drawing by the CPU costs a fifth of what it does through an emulated GPU, which only WebGL needs.
        "--disable-gpu",
        "--enable-unsafe-swiftshader",
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


def prepare_profile(profile: Path) -> None:
    """Give a new profile its first settings, and any profile no locks.

    The locks are of a browser that is gone, or that ran on another host: two never share a profile here.
    """
    for lock in profile.glob("Singleton*"):
        lock.unlink(missing_ok=True)
    preferences = profile / "Default" / "Preferences"
    if not preferences.exists():
        preferences.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        preferences.write_text(json.dumps(_FIRST_PREFERENCES))


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


def manager_command() -> list[str]:
    """Return the command line of the window manager: it gives popups their size and a way to close them."""
    return ["blackbox", "-rc", str(_BLACKBOX_SETTINGS)]


def pause_s(lived_s: float, deaths_in_a_row: int) -> float:
    """Return how long to wait before the next start: nothing for one that lived, doubling for one that dies young."""
    if lived_s >= _YOUNG_S or deaths_in_a_row <= 1:
        return 0.0
    return float(min(0.1 * 2 ** (deaths_in_a_row - 1), _LARGEST_PAUSE_S))


async def _read_line(fd: int) -> bytes:
    """Read a pipe until a line is whole, and close it; return nothing when the writer went away before.

    Xvnc writes its number and the line's end apart, and dies if nobody is there to read the second.
    """
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(fd, readable.set)
    line = b""
    try:
        while not line.endswith(b"\n"):
            await readable.wait()
            readable.clear()
            if not (piece := os.read(fd, 64)):
                return b""
            line += piece
        return line
    finally:
        loop.remove_reader(fd)
        os.close(fd)


class Keeper:
    """Keeps one program up."""

    def __init__(
        self,
        name: str,
        *,
        launch: Callable[[], Awaitable[Process]],
        needs: asyncio.Event | None = None,
        on_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._name = name
        self._launch = launch
        self._needs = needs
        self._on_end = on_end
        self._stopping = False
        self._process: Process | None = None
        self.restarts = 0
        self.deaths_in_a_row = 0

    async def keep(self) -> None:
        """Start the program, and start it again whenever it ends, until `end` was called."""
        while not self._stopping:
            if self._needs is not None:
                await self._needs.wait()
            started = time.monotonic()
            self._process = await self._launch()
            code = await self._process.wait()
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)  # helpers that outlived it
            if self._on_end is not None:
                await self._on_end()
            if self._stopping:
                return
            lived_s = time.monotonic() - started
            self.deaths_in_a_row = 1 if lived_s >= _YOUNG_S else self.deaths_in_a_row + 1
            self.restarts += 1
            log(f"{self._name} ended", code=code, after_s=round(lived_s, 1), restarts=self.restarts)
            await asyncio.sleep(pause_s(lived_s, self.deaths_in_a_row))

    async def end(self, *, by: signal.Signals, within_s: float, for_good: bool = True) -> None:
        """End the program and wait until its process is gone; kill it when that takes longer than `within_s`."""
        self._stopping = self._stopping or for_good
        process = self._process
        if process is None or process.returncode is not None:
            return
        # Not process.send_signal: that one reaps a process that has just ended, and takes its exit code from asyncio.
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, by)
        try:
            await asyncio.wait_for(process.wait(), within_s)
        except asyncio.TimeoutError:  # noqa: UP041 - two classes in Python 3.10
            log(f"{self._name} killed", after_s=within_s)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            await process.wait()


class Supervisor:
    """Runs screen, window manager and browser until told to stop."""

    def __init__(self, *, home: Path, screen: str) -> None:
        self._home = home
        self._screen = screen
        self._stop = asyncio.Event()
        self._screen_up = asyncio.Event()
        self.cdp_up = asyncio.Event()
        self._xvnc = Keeper("screen", launch=self._launch_screen, on_end=self._on_screen_end)
        self._manager = Keeper("window manager", launch=self._launch_manager, needs=self._screen_up)
        self._chromium = Keeper(
            "chromium", launch=self._launch_chromium, needs=self._screen_up, on_end=self._on_chromium_end
        )
        self._watcher: asyncio.Task[None] | None = None

    @property
    def chromium_restarts(self) -> int:
        """Return how often the browser had to be started again."""
        return self._chromium.restarts

    async def run(self) -> None:
        """Keep all up; return once `stop` was called and all are gone."""
        keepers = [asyncio.create_task(keeper.keep()) for keeper in (self._xvnc, self._manager, self._chromium)]
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait([stop, *keepers], return_when=asyncio.FIRST_COMPLETED)
        self.cdp_up.clear()
        await self._chromium.end(by=signal.SIGINT, within_s=_CHROMIUM_STOP_S)
        await self._manager.end(by=signal.SIGTERM, within_s=_SCREEN_STOP_S)
        await self._xvnc.end(by=signal.SIGTERM, within_s=_SCREEN_STOP_S)
        for task in (stop, *keepers):
            task.cancel()
        for result in await asyncio.gather(*keepers, return_exceptions=True):
            if isinstance(result, Exception):  # a program that can't be started at all: the container ends
                raise result

    def stop(self) -> None:
        """Begin the end; calling it again changes nothing."""
        self._stop.set()

    async def _launch_screen(self) -> Process:
        for path in _X_FILES:  # left by a screen that was killed; no other one runs in this container
            path.unlink(missing_ok=True)
        ready, display_fd = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *screen_command(screen=self._screen, display_fd=display_fd),
                pass_fds=(display_fd,),
                start_new_session=True,
                stdout=DEVNULL,
                stderr=DEVNULL,
            )
        finally:
            os.close(display_fd)
        if await _read_line(ready):
            self._screen_up.set()
        return process

    async def _on_screen_end(self) -> None:
        self._screen_up.clear()
        if not self._stop.is_set():  # nothing on it can go on
            await self._chromium.end(by=signal.SIGINT, within_s=1, for_good=False)
            await self._manager.end(by=signal.SIGTERM, within_s=1, for_good=False)

    async def _launch_manager(self) -> Process:
        return await asyncio.create_subprocess_exec(
            *manager_command(),
            env={**os.environ, "DISPLAY": _DISPLAY},
            start_new_session=True,
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=DEVNULL,
        )

    async def _launch_chromium(self) -> Process:
        profile = self._home / "chromium"
        prepare_profile(profile)
        had_session = any((profile / "Default").glob("Sessions*/*"))
        process = await asyncio.create_subprocess_exec(
            *chromium_command(
                home=self._home,
                # Tabs that were open come back, unless it died young with them: one of them may be why.
                restore_tabs=had_session and self._chromium.deaths_in_a_row < 2,
            ),
            env={**os.environ, "DISPLAY": _DISPLAY, "NO_AT_BRIDGE": "1", "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
            cwd=self._home,
            start_new_session=True,
            stdin=DEVNULL,
            stdout=DEVNULL,
        )
        self._watcher = asyncio.create_task(self._announce_cdp())
        return process

    async def _on_chromium_end(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        self.cdp_up.clear()

    async def _announce_cdp(self) -> None:
        while not self._stop.is_set():
            try:
                _, writer = await asyncio.open_connection(CDP_HOST, CDP_PORT)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            self.cdp_up.set()
            return
