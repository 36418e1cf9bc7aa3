"""The live view: a person opens a web page, sees the browser's screen, clicks and types into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, Playwright, sync_playwright

from tests.support.service import Service
from tests.support.watched import wait_until

# Nothing has the focus, so a person has to click first; the text area is the whole page.
REMOTE_PAGE = """data:text/html,<title>remote</title><style>
body { margin: 0; background: rgb(20, 120, 60) } textarea { position: fixed; inset: 25%25; font: 40px monospace }
</style><textarea></textarea>
<script>var clicks = 0; addEventListener("click", () => clicks++)</script>"""
TEXT = "Hello, World! 42 (it's me) {a_b} <c/d>"


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def service(start_service: Callable[..., Service]) -> Service:
    """Give a service that soon notices who uses its browsers."""
    return start_service(idle_check_s=0.3)


@pytest.fixture(scope="module")
def instance(service: Service) -> dict[str, Any]:
    made = service.create(config={"memory_gb": 1, "cpu_cores": 2})
    assert made["status"] == "running", made
    return made


@pytest.fixture(scope="module")
def remote(playwright: Playwright, instance: dict[str, Any]) -> Page:
    """Give the page that the instance shows, by CDP."""
    client = playwright.chromium.connect_over_cdp(instance["urls"]["debug"])
    page = client.contexts[0].pages[0]
    page.goto(REMOTE_PAGE)
    page.bring_to_front()
    return page


@pytest.fixture(scope="module")
def persons_browser(playwright: Playwright) -> Iterator[Browser]:
    """Give the browser that a person at this machine would use."""
    # Chromium refuses to run as root with its sandbox; this one only opens the live view.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def view(persons_browser: Browser, instance: dict[str, Any], remote: Page) -> Iterator[Page]:
    """Give the live view, connected, as a person sees it, of the remote page."""
    assert remote.title() == "remote"
    page = persons_browser.new_page(viewport={"width": 1000, "height": 700})
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(instance["urls"]["stream"])
    page.wait_for_selector("#screen canvas")
    page.wait_for_function("document.getElementById('note').textContent === ''")
    yield page
    page.close()
    assert problems == []


def colour_of(view: Page, *, x: float, y: float) -> tuple[int, int, int]:
    """Return the colour at a place of the shown screen, given in parts of its width and height."""
    red, green, blue = view.evaluate(
        """([x, y]) => {
            const canvas = document.querySelector("#screen canvas");
            const pixel = canvas.getContext("2d").getImageData(canvas.width * x, canvas.height * y, 1, 1);
            return [...pixel.data.slice(0, 3)];
        }""",
        [x, y],
    )
    return red, green, blue


def test_the_stream_port_is_a_web_page(instance: dict[str, Any]) -> None:
    answer = httpx.get(instance["urls"]["stream"])
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert "<canvas" in answer.text or "live.js" in answer.text


def test_the_view_shows_the_remote_screen_and_fits_the_window(view: Page) -> None:
    wait_until(lambda: colour_of(view, x=0.1, y=0.6) == (20, 120, 60))  # the remote page's own background
    box = view.locator("#screen canvas").bounding_box()
    assert box is not None
    assert box["width"] <= 1000
    assert box["height"] <= 700
    assert box["width"] > 990 or box["height"] > 690


def test_a_person_clicks_and_types_into_the_remote_page(view: Page, remote: Page) -> None:
    remote.evaluate(
        "() => { document.querySelector('textarea').value = ''; clicks = 0; document.activeElement.blur() }"
    )
    view.locator("#screen canvas").click()  # its middle
    wait_until(lambda: remote.evaluate("clicks") == 1)
    view.keyboard.type(TEXT)
    wait_until(lambda: remote.input_value("textarea") == TEXT)
    view.keyboard.press("Backspace")
    view.keyboard.press("Enter")
    view.keyboard.type("end")
    wait_until(lambda: remote.input_value("textarea") == f"{TEXT[:-1]}\nend")


def test_what_a_person_does_shows_on_the_screen(view: Page, remote: Page) -> None:
    remote.evaluate("() => { document.body.style.background = 'rgb(200, 40, 90)' }")
    wait_until(lambda: colour_of(view, x=0.1, y=0.6) == (200, 40, 90))


def test_two_people_see_the_same_screen(view: Page, persons_browser: Browser, instance: dict[str, Any]) -> None:
    other = persons_browser.new_page()
    other.goto(instance["urls"]["stream"])
    other.wait_for_function("document.getElementById('note').textContent === ''")
    wait_until(lambda: colour_of(other, x=0.1, y=0.6) == colour_of(view, x=0.1, y=0.6) != (0, 0, 0))
    other.close()


def test_looking_counts_as_activity(service: Service, instance: dict[str, Any], view: Page) -> None:
    before = service.get(instance["id"])["last_active_at"]

    def seen() -> bool:
        view.mouse.click(300, 300)
        later: bool = service.get(instance["id"])["last_active_at"] > before
        return later

    wait_until(seen)


def test_the_view_comes_back_by_itself_after_the_container_restarts(
    service: Service, instance: dict[str, Any], view: Page
) -> None:
    service.container(instance["id"]).restart(timeout=5)
    view.wait_for_function("document.getElementById('note').textContent !== ''")
    view.wait_for_function("document.getElementById('note').textContent === ''")
