"""A client that uses an instance's browser by CDP, as users do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from playwright.sync_api import Page, sync_playwright


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
