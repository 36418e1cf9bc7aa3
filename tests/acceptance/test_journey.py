"""What a new user does first: create a browser, use it, see it in the stack, delete it."""

from __future__ import annotations

from playwright.sync_api import sync_playwright

from tests.support.service import Service


def test_a_created_browser_is_real_shown_and_a_resource(service: Service) -> None:
    instance = service.create()
    assert instance["status"] == "running", service.log()[-4000:]
    with sync_playwright() as playwright:
        browser = playwright.chromium.connect_over_cdp(f"http://127.0.0.1:{instance['debug_port']}")
        page = browser.contexts[0].new_page()
        page.set_content("<h1 id=x>hello</h1>")
        assert page.inner_text("#x") == "hello"
        browser.close()
    urns = service.urns()
    for name in (instance["id"], f"{instance['id']}-home", f"{instance['id']}-browser"):
        assert any(urn.endswith(f"::{name}") for urn in urns)
    assert service.delete(instance["id"]).status_code == 200
    assert service.http.get(f"/v2/instances/{instance['id']}").status_code == 404
    assert not any(instance["id"] in urn for urn in service.urns())
    assert service.volumes() == []


def test_a_plain_preview_of_an_untouched_cluster_shows_no_changes(service: Service) -> None:
    instance = service.create()
    service.assert_unchanged()
    assert service.get(instance["id"])["status"] == "running"
