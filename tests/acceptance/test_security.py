"""Who may call: everybody on this machine where there is no token, and whoever has one where there is."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
import pytest

from tests.support.service import Service

TOKEN, OTHER = "first-secret-of-the-test", "second-secret-of-the-test"


@pytest.fixture(scope="module")
def locked(start_service: Callable[..., Service]) -> Service:
    """Give a service that asks for a token, one of two."""
    return start_service(tokens=f'["{TOKEN}", "{OTHER}"]')


PATHS = [
    ("GET", "/v2/instances"),
    ("POST", "/v2/instances"),
    ("GET", "/v2/instances/mu-nowhere"),
    ("DELETE", "/v2/instances/mu-nowhere"),
    ("POST", "/v2/instances/mu-nowhere/dormant"),
    ("POST", "/v2/instances/mu-nowhere/revive"),
    ("GET", "/v2/nodes"),
    ("GET", "/v2/nodes/local"),
    ("GET", "/v2/metrics"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/path"),
]


def assert_refused(answer: httpx.Response) -> None:
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["code"] == "unauthorized"
    assert TOKEN not in answer.text


# ---- with tokens


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_without_a_token_everything_but_health_is_401(locked: Service, method: str, path: str) -> None:
    assert_refused(locked.http.request(method, path))


@pytest.mark.parametrize(
    "authorization",
    [
        "Bearer wrong",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer",
        f"Bearer {TOKEN} {TOKEN}",
    ],
)
def test_a_wrong_token_is_401(locked: Service, authorization: str) -> None:
    assert_refused(locked.http.get("/v2/instances", headers={"Authorization": authorization}))


@pytest.mark.parametrize("authorization", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"Bearer {OTHER}"])
def test_each_of_the_tokens_opens(locked: Service, authorization: str) -> None:
    answer = locked.http.get("/v2/instances", headers={"Authorization": authorization})
    assert answer.status_code == 200
    assert answer.json()["total"] == 0


def test_a_token_is_looked_for_in_no_other_place(locked: Service) -> None:
    assert_refused(locked.http.get("/v2/instances", params={"token": TOKEN, "access_token": TOKEN}))
    assert_refused(locked.http.get("/v2/instances", headers={"Cookie": f"token={TOKEN}"}))


def test_health_stays_open(locked: Service) -> None:
    answer = locked.http.get("/health")
    assert answer.status_code == 200
    assert answer.json()["status"] == "healthy"


def test_no_token_is_ever_logged(locked: Service) -> None:
    locked.http.get("/v2/instances", headers={"Authorization": f"Bearer {TOKEN}"})
    assert "/v2/instances" in locked.log()
    kept = "".join(path.read_text() for path in (locked.settings.data_dir / "logs").iterdir())
    assert "/v2/instances" in kept
    for secret in (TOKEN, OTHER):
        assert secret not in locked.log()
        assert secret not in kept


# ---- without a token


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_a_token_the_service_refuses_to_be_reached_from_elsewhere(service: Service, host: str) -> None:
    began = time.monotonic()
    done = service.machineuse("serve", "--host", host, "--port", "0")
    assert done.returncode == 1
    assert "MACHINEUSE_TOKENS" in done.stderr
    assert host in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert time.monotonic() - began < 30  # it ended by itself, and did not serve


def test_an_empty_token_is_refused(service: Service) -> None:
    done = service.machineuse("serve", "--port", "0", MACHINEUSE_TOKENS='[""]')
    assert done.returncode == 1
    assert "MACHINEUSE_TOKENS" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://elsewhere.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Host": "rebound.example"},
        {"Host": "rebound.example:8000", "Origin": "http://rebound.example:8000"},
    ],
)
def test_a_page_of_another_web_site_is_refused(service: Service, headers: dict[str, str]) -> None:
    answer = service.http.post("/v2/instances", json={}, headers=headers)
    assert answer.status_code == 403
    assert answer.json()["code"] == "forbidden_origin"
    assert service.http.get("/v2/instances").json()["total"] == 0


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_this_machines_own_names_are_let_in(service: Service, name: str) -> None:
    own = {"Host": f"{name}:{service.port}", "Origin": f"http://{name}:{service.port}"}
    assert service.http.get("/v2/instances", headers=own).status_code == 200
