"""Coming back from dormancy, by both methods: everything that was there is there, or nothing is touched and it is told.

The page is served inside the browser's container, at the same address before and after: a profile belongs to an origin.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Error, Page

from tests.support.browsing import new_page
from tests.support.service import Service
from tests.support.watched import wait_until

SMALL = {"memory_gb": 0.5, "cpu_cores": 1}
PAGE = "http://127.0.0.1:8099"
SERVER = """
import http.server
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        if self.path == "/visit":
            self.send_header("Set-Cookie", "visit=first; Max-Age=86400; HttpOnly; Path=/")
        self.end_headers()
        self.wfile.write(self.headers.get("Cookie", "no cookie").encode())
http.server.ThreadingHTTPServer(("127.0.0.1", 8099), Page).serve_forever()
"""
WRITE = """() => new Promise((resolve, reject) => {
    localStorage.setItem("visit", "first");
    const opening = indexedDB.open("visits", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("visits");
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => {
        const writing = opening.result.transaction("visits", "readwrite");
        writing.objectStore("visits").put("first", "visit");
        writing.oncomplete = () => { opening.result.close(); resolve(); };
        writing.onerror = () => reject(writing.error);
    };
})"""
READ = """() => new Promise((resolve, reject) => {
    const opening = indexedDB.open("visits", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("visits");
    opening.onerror = () => reject(opening.error);
    opening.onsuccess = () => {
        const reading = opening.result.transaction("visits").objectStore("visits").get("visit");
        reading.onerror = () => reject(reading.error);
        reading.onsuccess = () => {
            opening.result.close();
            resolve({ localStorage: localStorage.getItem("visit"), indexedDB: reading.result ?? null });
        };
    };
})"""
WRITE_FILES = """
set -e
mkdir ~/notes
echo first > ~/notes/visit
chmod 640 ~/notes/visit
ln -s notes/visit ~/latest
echo first > /var/tmp/by-the-user
"""
CHANGE_THE_IMAGE = """
set -e
mkdir /opt/added
echo first > /opt/added/by-root
echo changed > /etc/issue.net
rm /etc/issue
"""
READ_FILES = """
cat ~/latest; readlink ~/latest; stat -c '%U %a' ~/notes/visit
cat /var/tmp/by-the-user; stat -c %U /var/tmp/by-the-user
cat /opt/added/by-root; stat -c %U /opt/added/by-root
cat /etc/issue.net; ls /etc/issue 2>&1
"""
FILES = """\
first
notes/visit
machine 640
first
machine
first
root
changed
ls: cannot access '/etc/issue': No such file or directory
"""


@pytest.fixture(scope="module")
def instance(service: Service) -> dict[str, Any]:
    """Give an instance that has been used: in the browser, in its home, and above its image."""
    instance = service.create(config=SMALL)
    with visit(service, instance) as page:
        page.goto(f"{PAGE}/visit")
        page.evaluate(WRITE)
    assert run(service, instance, WRITE_FILES) == ""
    assert run(service, instance, CHANGE_THE_IMAGE, user="0") == ""
    return instance


def run(service: Service, instance: Mapping[str, Any], script: str, *, user: str = "1000") -> str:
    """Run a shell script in the instance's container and return what it prints."""
    output: bytes = service.container(instance["id"]).exec_run(["sh", "-c", script], user=user).output
    return output.decode()


@contextmanager
def visit(service: Service, instance: Mapping[str, Any]) -> Iterator[Page]:
    """Serve the page inside the instance's container and show it in its browser."""
    service.container(instance["id"]).exec_run(["python3", "-c", SERVER], detach=True)
    with new_page(instance) as page:

        def reached() -> bool:
            try:
                page.goto(PAGE)
            except Error as error:
                if "ERR_CONNECTION_REFUSED" not in error.message:
                    raise
                return False
            return True

        wait_until(reached, what="the page is served")
        yield page


def assert_all_there(service: Service, instance: Mapping[str, Any]) -> None:
    with visit(service, instance) as page:
        assert page.inner_text("body") == "visit=first"
        assert page.evaluate(READ) == {"localStorage": "first", "indexedDB": "first"}
    assert run(service, instance, READ_FILES) == FILES


def put_to_sleep(service: Service, instance: Mapping[str, Any]) -> dict[str, Any]:
    """Make the instance dormant, unless it is."""
    if service.get(instance["id"])["status"] != "dormant":
        answer = service.post(f"{instance['id']}/dormant")
        assert answer.status_code == 200, answer.text
    dormant = service.get(instance["id"])
    assert dormant["status"] == "dormant"
    assert [snapshot["state"] for snapshot in dormant["snapshots"]] == ["verified"]
    return dormant


def revive(service: Service, instance: Mapping[str, Any], **body: str) -> dict[str, Any]:
    answer = service.post(f"{instance['id']}/revive", **body)
    assert answer.status_code == 200, answer.text
    revived: dict[str, Any] = answer.json()
    assert revived["status"] == "running", revived
    assert (revived["id"], revived["subdomain"]) == (instance["id"], instance["subdomain"])
    return revived


def archive_of(service: Service, dormant: Mapping[str, Any], part: str) -> Path:
    generation = dormant["snapshots"][0]["generation"]
    return service.project / ".machineuse/snapshots" / dormant["id"] / str(generation) / part


def remove_copy(service: Service) -> None:
    for volume in service.volumes():
        assert "-copy-" in volume
        service.docker.volumes.get(volume).remove()


def flip_a_byte(path: Path) -> None:
    """Change one bit in the middle of a file; doing so again mends it."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def assert_refused_as_damaged(service: Service, dormant: Mapping[str, Any], *, method: str) -> None:
    """Check that a revive is refused, and that it changed nothing: in Docker, in the stack, in the store."""
    volumes = service.volumes()
    answer = service.post(f"{dormant['id']}/revive", method=method)
    assert (answer.status_code, answer.json()["code"]) == (409, "snapshot_corrupt"), answer.text
    assert "nothing was restored" in answer.json()["detail"]

    def settled() -> dict[str, Any] | None:
        now = service.get(dormant["id"])
        return now if now["operation"] is None else None

    now = wait_until(settled, what="it is dormant again")
    assert (now["status"], now["error"]["code"]) == ("dormant", "snapshot_corrupt")
    assert now["snapshots"] == dormant["snapshots"]
    mine = {"label": f"machineuse.cluster={service.cluster}"}
    assert service.docker.api.containers(all=True, filters=mine) == []
    assert service.volumes() == volumes
    state = json.loads(service.pulumi("stack", "export", "--stack", service.cluster).stdout)
    types = [resource["type"] for resource in state["deployment"]["resources"] if dormant["id"] in resource["urn"]]
    assert sorted(types) == ["machineuse:index:Instance", "machineuse:index:Snapshot"]


@pytest.mark.parametrize("method", ["quick_start", "full_restore"])
def test_everything_is_there_after_dormancy(service: Service, instance: dict[str, Any], method: str) -> None:
    put_to_sleep(service, instance)
    revived = revive(service, instance, method=method)
    assert (revived["restored_by"], revived["restore_note"]) == (method, None)
    assert_all_there(service, revived)


def test_with_a_damaged_archive_a_full_restore_is_refused_and_a_quick_start_works(
    service: Service, instance: dict[str, Any]
) -> None:
    dormant = put_to_sleep(service, instance)
    flip_a_byte(archive_of(service, dormant, "home.tar.zst"))
    assert_refused_as_damaged(service, dormant, method="full_restore")
    revived = revive(service, instance, method="quick_start")
    assert (revived["restored_by"], revived["restore_note"], revived["error"]) == ("quick_start", None, None)
    assert_all_there(service, revived)


@pytest.mark.parametrize("part", ["home.tar.zst", "rootfs.tar.zst"])
def test_without_a_copy_a_damaged_archive_is_told_whatever_is_asked_for(
    service: Service, instance: dict[str, Any], part: str
) -> None:
    dormant = put_to_sleep(service, instance)
    remove_copy(service)
    flip_a_byte(archive_of(service, dormant, part))
    assert_refused_as_damaged(service, dormant, method="quick_start")
    flip_a_byte(archive_of(service, dormant, part))


def test_a_quick_start_without_a_copy_restores_the_archive_and_says_so(
    service: Service, instance: dict[str, Any]
) -> None:
    put_to_sleep(service, instance)
    remove_copy(service)
    revived = revive(service, instance)  # a quick start is what is done unless something else is asked for
    assert revived["restored_by"] == "full_restore"
    assert "no copy" in revived["restore_note"]
    events = service.events_of(instance["id"])
    told = [event["message"] for event in events if event["kind"] == "restored"]
    assert told[-1] == f"restored by full_restore: {revived['restore_note']}"
    assert_all_there(service, revived)
