"""The clients that people use work unchanged against an instance's debug port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import sync_playwright
from selenium import webdriver
from selenium.webdriver.common.by import By

from provisioner.toolchain.test_tools import puppeteer_dir
from tests.support.browsing import version_of
from tests.support.service import Service

PAGE = """data:text/html,<title>a form</title>
<input id=name><button id=go onclick="document.title = 'hello ' + document.getElementById('name').value">go</button>"""


@pytest.fixture(scope="module")
def browser(service: Service) -> dict[str, Any]:
    """Give one browser to all clients."""
    instance = service.create(config={"memory_gb": 1, "cpu_cores": 2})
    assert instance["status"] == "running", instance
    return instance


def test_playwright_connects_and_drives(browser: dict[str, Any], tmp_path: Path) -> None:
    with sync_playwright() as playwright:
        client = playwright.chromium.connect_over_cdp(browser["urls"]["debug"])
        page = client.contexts[0].new_page()
        page.goto(PAGE)
        page.fill("#name", "Playwright")
        page.click("#go")
        assert page.title() == "hello Playwright"
        page.screenshot(path=tmp_path / "page.png")
        assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
        page.close()
        apart = client.new_context()  # a context of its own, with cookies of its own
        assert apart.cookies() == []
        other = apart.new_page()
        other.goto(PAGE)
        assert other.title() == "a form"
        apart.close()
        client.close()


def test_puppeteer_connects_and_drives(browser: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "drive.js"
    script.write_text(
        """
        const puppeteer = require("puppeteer-core");
        (async () => {
          const client = await puppeteer.connect({ browserURL: process.argv[2], defaultViewport: null });
          const page = await client.newPage();
          await page.goto(process.argv[3]);
          await page.type("#name", "Puppeteer");
          await page.click("#go");
          console.log(JSON.stringify({ title: await page.title(), shot: (await page.screenshot()).length }));
          await page.close();
          await client.disconnect();
        })().catch((error) => { console.error(error); process.exit(1); });
        """
    )
    done = subprocess.run(
        ["node", str(script), browser["urls"]["debug"], PAGE],
        env={**os.environ, "NODE_PATH": str(puppeteer_dir() / "node_modules")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["title"] == "hello Puppeteer"
    assert said["shot"] > 1000


def test_selenium_connects_and_drives(browser: dict[str, Any]) -> None:
    options = webdriver.ChromeOptions()
    options.debugger_address = browser["urls"]["debug"].removeprefix("http://")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.switch_to.new_window("tab")
        driver.get(PAGE)
        driver.find_element(By.ID, "name").send_keys("Selenium")
        driver.find_element(By.ID, "go").click()
        assert driver.title == "hello Selenium"
        driver.close()
    finally:
        driver.service.stop()  # not `quit`, which would end the browser


def test_the_browser_outlives_its_clients(service: Service, browser: dict[str, Any]) -> None:
    version = version_of(browser)
    assert version["Browser"].startswith("Chrome/")
    assert "Headless" not in version["User-Agent"]
    assert version["webSocketDebuggerUrl"].startswith(f"ws://127.0.0.1:{browser['debug_port']}/devtools/browser/")
    assert service.get(browser["id"])["status"] == "running"


def test_two_clients_share_a_browser(browser: dict[str, Any]) -> None:
    with sync_playwright() as playwright:
        first = playwright.chromium.connect_over_cdp(browser["urls"]["debug"])
        second = playwright.chromium.connect_over_cdp(browser["urls"]["debug"])
        page = first.contexts[0].new_page()
        page.goto("data:text/html,<title>shared</title>")
        assert "shared" in [seen.title() for seen in second.contexts[0].pages]
        second.close()
        assert page.evaluate("1 + 1") == 2
        page.close()
        first.close()


def test_a_page_of_another_web_site_can_not_drive_the_browser(browser: dict[str, Any]) -> None:
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Origin": "https://elsewhere.example",
    }
    target = version_of(browser)["webSocketDebuggerUrl"]
    assert httpx.get(target.replace("ws://", "http://"), headers=headers).status_code == 403
