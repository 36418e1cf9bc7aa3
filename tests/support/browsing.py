"""A client that uses an instance's browser by CDP, as users do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
from playwright.sync_api import Page, sync_playwright


def version_of(instance: Mapping[str, Any]) -> dict[str, str]:
    """Return what an instance's browser says of itself; whoever asks uses it."""
    answer = httpx.get(f"{instance['urls']['debug']}/json/version", trust_env=False, timeout=60).raise_for_status()
    version: dict[str, str] = answer.json()
    return version


@contextmanager
def new_page(instance: Mapping[str, Any], *, host: str = "127.0.0.1") -> Iterator[Page]:
    """Give a new page in the instance's browser, in its own profile; it is closed afterwards."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.connect_over_cdp(f"http://{host}:{instance['debug_port']}")
        page = browser.contexts[0].new_page()
        try:
            yield page
        finally:
            page.close()
            browser.close()
