"""The browser image for real: containers of it, steered by Playwright over CDP and by a person's way, the live view."""

from __future__ import annotations

import functools
import http.server
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import docker
import httpx
import pytest
from docker.models.containers import Container
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from provisioner.browser_image import BASE_LABEL, CHROMIUM_LABEL, CONTENT_LABEL, ensure_browser_image
from stacks.spec import BROWSER_IMAGE, CDP_PORT, SECCOMP_PROFILE, STREAM_PORT
from tests.support.watched import PATIENCE_S

RUN = f"test-{secrets.token_hex(4)}"
ENGINE = docker.from_env()

PAGE = """<!doctype html><meta charset="utf-8"><title>Test page</title>
<body style="margin:0"><input id="field" style="position:absolute;left:50px;top:50px;width:600px;height:60px">
<button id="popup" style="position:absolute;left:50px;top:200px;width:200px;height:60px"
 onclick="w = open('about:blank', '', 'width=500,height=300'); w.document.title = 'A popup'">popup</button>"""


def until(condition: Callable[[], Any], *, within_s: float = PATIENCE_S, what: str = "condition") -> Any:
    """Poll until the condition holds; return what it returned."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if result := condition():
                return result
        except (httpx.HTTPError, docker.errors.APIError):
            pass
        time.sleep(0.05)
    pytest.fail(f"not within {within_s} s: {what}")


class Machine:
    """One container of the image, with the limits and rights that instances have."""

    def __init__(self, *, volume: str | None = None, memory: str = "1g") -> None:
        self.container: Container = ENGINE.containers.create(
            BROWSER_IMAGE,
            name=f"machineuse-{RUN}-{secrets.token_hex(4)}",
            labels={"machineuse.test": RUN},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges", f"seccomp={SECCOMP_PROFILE.read_text()}"],
            mem_limit=memory,
            memswap_limit=memory,
            shm_size="512m",
            pids_limit=1024,
            network=RUN,
            ports={f"{CDP_PORT}/tcp": ("127.0.0.1", None), f"{STREAM_PORT}/tcp": ("127.0.0.1", None)},
            volumes={volume: {"bind": "/home/machine", "mode": "rw"}} if volume else None,
        )

    def start(self) -> None:
        self.container.start()
        self.container.reload()
        ports = self.container.attrs["NetworkSettings"]["Ports"]
        self.cdp = f"http://127.0.0.1:{ports[f'{CDP_PORT}/tcp'][0]['HostPort']}"
        self.live = f"http://127.0.0.1:{ports[f'{STREAM_PORT}/tcp'][0]['HostPort']}"
        until(lambda: self.status()["ready"], what="browser up")

    @property
    def address(self) -> str:
        networks = self.container.attrs["NetworkSettings"]["Networks"]
        return str(next(iter(networks.values()))["IPAddress"])

    def status(self, door: str | None = None) -> dict[str, Any]:
        answer: dict[str, Any] = (
            httpx.get(f"{door or self.cdp}/machineuse/status", timeout=30).raise_for_status().json()
        )
        return answer

    def run(self, command: str) -> str:
        code, printed = self.container.exec_run(["sh", "-c", command])
        assert code == 0, printed
        return str(printed.decode())

    def has_on_disk(self, key: str) -> bool:
        """Say whether the profile's local storage has the key on disk, where a crash can't take it."""
        storage = "/home/machine/chromium/Default/Local Storage/leveldb"
        return bool(self.container.exec_run(["grep", "-rqa", key, storage])[0] == 0)

    def kill(self, name: str, *, signal: str = "KILL") -> None:
        """Kill the oldest process of that name."""
        self.run(
            f'kill -{signal} $(for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" = {name} ] '
            "&& echo ${p#/proc/}; done | sort -n | head -1)"
        )

    def processes(self) -> list[str]:
        return self.run("cat /proc/[0-9]*/status 2>/dev/null | grep -E '^(Name|State)'").splitlines()


@pytest.fixture(scope="session", autouse=True)
def image() -> str:
    return ensure_browser_image(on_progress=lambda _: None)


@pytest.fixture(scope="module", autouse=True)
def clean_up() -> Iterator[None]:
    network = ENGINE.networks.create(RUN, driver="bridge", labels={"machineuse.test": RUN})
    yield
    for container in ENGINE.containers.list(all=True, filters={"label": f"machineuse.test={RUN}"}):
        container.remove(force=True, v=True)
    network.remove()
    for volume in ENGINE.volumes.list(filters={"label": f"machineuse.test={RUN}"}):
        volume.remove(force=True)


@contextmanager
def running(*, volume: str | None = None, memory: str = "1g") -> Iterator[Machine]:
    machine = Machine(volume=volume, memory=memory)
    try:
        machine.start()
        yield machine
    finally:
        machine.container.remove(force=True, v=True)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with running() as one:
        yield one


@pytest.fixture
def volume() -> str:
    return str(ENGINE.volumes.create(f"machineuse-{RUN}-{secrets.token_hex(4)}", labels={"machineuse.test": RUN}).name)


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as playwright:
        yield playwright


@pytest.fixture
def browser(playwright: Playwright, machine: Machine) -> Iterator[Browser]:
    with connected(playwright, machine) as browser:
        yield browser


@contextmanager
def connected(playwright: Playwright, machine: Machine) -> Iterator[Browser]:
    browser = playwright.chromium.connect_over_cdp(machine.cdp)
    try:
        yield browser
    finally:
        browser.close()


@contextmanager
def new_page(browser: Browser) -> Iterator[Page]:
    page = browser.contexts[0].new_page()
    try:
        yield page
    finally:
        page.close()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Serve the test page where containers reach it, and only while this module runs."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(PAGE.encode())

        def log_message(self, *_: object) -> None: ...

    gateway = ENGINE.networks.list(names=[RUN])[0].attrs["IPAM"]["Config"][0]["Gateway"]
    with http.server.ThreadingHTTPServer((gateway, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://{gateway}:{server.server_port}/"
        server.shutdown()


class TestImage:
    def test_is_built_once(self) -> None:
        progress: list[str] = []
        before = ENGINE.images.get(BROWSER_IMAGE).id
        description = ensure_browser_image(on_progress=progress.append)
        assert progress == []
        assert ENGINE.images.get(BROWSER_IMAGE).id == before
        assert "Chromium" in description

    def test_says_what_really_runs_in_it(self, machine: Machine) -> None:
        labels = ENGINE.images.get(BROWSER_IMAGE).labels
        assert labels["machineuse.home"] == "/home/machine"
        assert len(labels[CONTENT_LABEL]) == 64
        release = machine.run(". /etc/os-release; echo $ID $VERSION_ID").strip()
        assert labels[BASE_LABEL] == release
        version = httpx.get(f"{machine.cdp}/json/version").json()["Browser"].removeprefix("Chrome/")
        assert labels[CHROMIUM_LABEL].startswith(version)

    def test_runs_unprivileged_in_utf8_and_utc(self, machine: Machine) -> None:
        assert machine.run("id -u; id -g; date +%Z; locale charmap; stat -c %u:%g /home/machine").split() == [
            *("1000", "1000", "UTC", "UTF-8", "1000:1000"),
        ]
        assert "CapEff:\t0000000000000000" in machine.run("cat /proc/self/status")

    def test_health_check_follows_the_browser(self, machine: Machine) -> None:
        check = ["bash", "/usr/lib/machineuse/check.sh"]
        assert ENGINE.images.get(BROWSER_IMAGE).attrs["Config"]["Healthcheck"]["Test"] == ["CMD", *check]
        assert machine.container.exec_run(check)[0] == 0
        machine.kill("chromium", signal="STOP")
        try:
            assert machine.container.exec_run(check)[0] != 0
        finally:
            machine.kill("chromium", signal="CONT")


class TestBrowser:
    def test_speaks_cdp_to_playwright(self, browser: Browser, site: str) -> None:
        with new_page(browser) as page:
            page.goto(site)
            assert page.title() == "Test page"
            assert page.screenshot().startswith(b"\x89PNG")

    def test_its_own_sandbox_is_on(self, browser: Browser, machine: Machine) -> None:
        with new_page(browser) as page:
            page.goto("chrome://sandbox")
            assert "You are adequately sandboxed." in page.inner_text("body")
        assert "--no-sandbox" not in machine.run("cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '")

    def test_fills_the_screen(self, browser: Browser) -> None:
        page = browser.contexts[0].pages[0]
        assert page.evaluate("[screenX, screenY, outerWidth, outerHeight]") == [0, 0, 1280, 800]

    def test_webgl_works_without_a_gpu(self, browser: Browser) -> None:
        with new_page(browser) as page:
            assert page.evaluate("!!document.createElement('canvas').getContext('webgl2')")

    def test_leaves_no_zombies(self, browser: Browser, machine: Machine) -> None:
        for _ in range(3):
            with new_page(browser) as page:
                page.goto("about:blank")
        until(lambda: not any("Z (zombie)" in line for line in machine.processes()), what="no zombie")

    def test_a_page_that_eats_all_memory_takes_only_itself(self, playwright: Playwright) -> None:
        with running(memory="700m") as machine, connected(playwright, machine) as browser:
            page = browser.contexts[0].new_page()
            crashed = threading.Event()
            page.on("crash", lambda _: crashed.set())
            page.evaluate(
                "setTimeout(() => { const kept = []; while (true) kept.push(new Uint8Array(32 << 20).fill(1)); }, 0)"
            )
            deadline = time.monotonic() + 60
            while not crashed.is_set() and time.monotonic() < deadline:
                browser.contexts[0].pages[0].wait_for_timeout(100)
            assert crashed.is_set()
            machine.container.reload()
            assert machine.container.status == "running"
            assert until(lambda: machine.status()["ready"])


class TestCrashes:
    def test_a_crashed_browser_is_back_with_its_profile(self, playwright: Playwright, site: str) -> None:
        with running() as machine:
            with connected(playwright, machine) as browser:
                page = browser.contexts[0].pages[0]
                page.goto(site)
                page.evaluate("localStorage.setItem('kept', 'yes')")
                until(lambda: machine.has_on_disk("kept"), what="written")
            machine.kill("chromium")
            until(lambda: machine.status()["chromium_restarts"] == 1 and machine.status()["ready"], what="back")
            with connected(playwright, machine) as browser:
                page = browser.contexts[0].pages[0]
                page.goto(site)
                assert page.evaluate("localStorage.getItem('kept')") == "yes"
                assert page.evaluate("outerWidth") == 1280, "no bubble, no small window"

    def test_a_client_that_comes_during_the_restart_is_let_in(self, machine: Machine) -> None:
        machine.kill("chromium")
        until(lambda: not machine.status()["ready"])
        assert httpx.get(f"{machine.cdp}/json/version", timeout=20).status_code == 200

    def test_a_crashed_screen_is_back_with_a_browser_on_it(self, machine: Machine) -> None:
        before = machine.status()["chromium_restarts"]
        machine.kill("Xtigervnc" if "Xtigervnc" in "".join(machine.processes()) else "Xvnc")
        until(lambda: machine.status()["chromium_restarts"] > before and machine.status()["ready"], what="back")


class TestShutdown:
    def test_stop_is_quick_clean_and_loses_nothing(self, playwright: Playwright, site: str, volume: str) -> None:
        for turn in range(4):
            with running(volume=volume) as machine:
                with connected(playwright, machine) as browser:
                    page = browser.contexts[0].pages[0]
                    page.goto(site)
                    if turn:
                        kept = page.evaluate("[document.cookie, localStorage.getItem('turn')]")
                        assert kept == [f"turn={turn - 1}", str(turn - 1)]
                        assert f"turn{turn - 1}" in json.dumps(page.evaluate("indexedDB.databases()"))
                    page.evaluate(
                        """turn => new Promise(done => {
                            localStorage.setItem('turn', turn);
                            indexedDB.open('turn' + turn).onsuccess = done;
                            document.cookie = `turn=${turn}; max-age=86400`;
                        })""",
                        turn,
                    )
                    machine.container.stop(timeout=10)
                machine.container.reload()
                assert machine.container.attrs["State"]["ExitCode"] == 0
                assert "killed" not in machine.container.logs().decode()
                changed = [change["Path"] for change in machine.container.diff() or []]
                assert not [path for path in changed if not path.startswith("/home")], "nothing left above the image"

    def test_tabs_come_back(self, playwright: Playwright, site: str, volume: str) -> None:
        for turn in range(2):
            with running(volume=volume) as machine:
                with connected(playwright, machine) as browser:
                    if turn:
                        urls = until(lambda: [p.url for p in browser.contexts[0].pages if p.url == site])
                        assert urls == [site]
                    else:
                        browser.contexts[0].pages[0].goto(site)
                machine.container.stop(timeout=10)

    def test_locks_of_another_container_do_not_hinder(self, volume: str) -> None:
        with running(volume=volume) as machine:
            machine.container.kill()
        with running(volume=volume) as machine:
            assert machine.status()["chromium_restarts"] == 0

    def test_a_killed_container_starts_again_with_what_it_left_behind(self) -> None:
        with running() as machine:
            machine.container.kill()
            machine.start()
            assert machine.status()["chromium_restarts"] == 0


class TestStatus:
    def test_both_doors_tell_the_same(self, machine: Machine) -> None:
        assert set(machine.status()) == set(machine.status(machine.live))
        assert machine.status()["home_bytes"] > 0

    def test_asking_is_no_activity_and_a_client_is(self, playwright: Playwright) -> None:
        with running() as machine:
            asked = [machine.status() for _ in range(3)]
            for answer in asked:
                assert answer["last_activity_s"] == pytest.approx(answer["uptime_s"], abs=0.1)
            assert asked[-1]["cdp_connections"] == 0
            with connected(playwright, machine):
                during = machine.status()
                assert during["last_activity_s"] < during["uptime_s"]
                assert during["cdp_connections"] >= 1
            until(lambda: machine.status()["cdp_connections"] == 0, what="connection gone")


class TestLiveView:
    def test_a_person_sees_clicks_types_and_pastes(self, playwright: Playwright, machine: Machine, site: str) -> None:
        """The person's own browser is a second machine's."""
        with running() as person, connected(playwright, person) as theirs, connected(playwright, machine) as browser:
            theirs_page = theirs.contexts[0].pages[0]
            theirs_page.set_viewport_size({"width": 1280, "height": 800})
            page = browser.contexts[0].pages[0]
            page.goto(site)
            above = page.evaluate("outerHeight - innerHeight")
            theirs_page.goto(f"http://{machine.address}:{STREAM_PORT}/")
            until(lambda: machine.status()["live_connections"] == 1, what="viewer connected")
            until(functools.partial(shows_page, theirs_page, above=above), what="picture there")

            theirs_page.mouse.click(100, above + 80)
            theirs_page.keyboard.type("Typed by hand")
            value = functools.partial(page.evaluate, "document.getElementById('field').value")
            until(lambda: value() == "Typed by hand", what="text arrived")
            paste(theirs_page, " äß日本")
            until(lambda: value() == "Typed by hand äß日本", what="paste arrived")

            with page.expect_popup() as opened:
                theirs_page.mouse.click(100, above + 230)
            assert opened.value.evaluate("[outerWidth < 600, outerHeight < 400]") == [True, True]
            opened.value.close()

    def test_an_untouched_viewer_is_no_activity(self, playwright: Playwright, machine: Machine) -> None:
        with running() as person, connected(playwright, person) as theirs:
            theirs_page = theirs.contexts[0].pages[0]
            theirs_page.goto(f"http://{machine.address}:{STREAM_PORT}/")
            until(lambda: machine.status()["live_client_bytes"] > 0 and machine.status()["live_connections"] == 1)
            # The screen changes without a client: the viewer fetches each new picture, and is not there all the same.
            machine.kill("chromium")
            until(lambda: not machine.status()["ready"])
            until(lambda: machine.status()["ready"])
            first = machine.status()
            until(lambda: machine.status()["last_activity_s"] > first["last_activity_s"] + 1)
            theirs_page.mouse.move(300, 300)
            until(lambda: machine.status()["last_activity_s"] < 1, what="a moved mouse counts")

    def test_another_sites_page_cannot_steer(self, browser: Browser, site: str) -> None:
        """Not even a page in the browser itself, which reaches the door by loopback."""
        with new_page(browser) as page:
            page.goto(site)
            outcome = page.evaluate(
                """port => new Promise(done => {
                    const socket = new WebSocket(`ws://127.0.0.1:${port}/websockify`, 'binary');
                    socket.onopen = () => done('open');
                    socket.onerror = () => done('refused');
                })""",
                STREAM_PORT,
            )
            assert outcome == "refused"


def shows_page(viewer: Page, *, above: int) -> bool:
    """Say whether the live view's canvas has been drawn: the middle of the test page is white."""
    return bool(
        viewer.evaluate(
            """above => { const canvas = document.querySelector('canvas');
                if (!canvas || !canvas.width) return false;
                const [r, g, b] = canvas.getContext('2d').getImageData(1000, above + 400, 1, 1).data;
                return r + g + b === 765; }""",
            above,
        )
    )


def paste(viewer: Page, text: str) -> None:
    """Paste into the live view, as the browser does when a person presses the keys for it."""
    viewer.evaluate(
        """text => { const data = new DataTransfer(); data.setData('text/plain', text);
            document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: data, bubbles: true })); }""",
        text,
    )
