"""Who may call: tokens where there are any, else programs of this machine only."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from api.auth import check_binding
from provisioner.errors import SettingsError
from provisioner.settings import Settings
from tests.unit.api.conftest import ServicesMaker


@pytest.fixture
def guarded(make_services: ServicesMaker) -> TestClient:
    return make_services(tokens=("first-secret", "second-secret"), host="0.0.0.0").client(base_url="http://any.host")


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Bearer first-secret x",
        "Bearer first-secre",
        "Basic first-secret",
        "first-secret",
        b"Bearer \xff\x00",
    ],
)
@pytest.mark.parametrize("path", ["/v2/instances", "/v2/nope", "/openapi.json", "/docs", "/metrics", "/health/x"])
def test_without_a_valid_token_everything_is_401(
    guarded: TestClient, authorization: str | bytes | None, path: str
) -> None:
    answer = guarded.get(path, headers={"Authorization": authorization} if authorization is not None else {})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["code"] == "unauthorized"


@pytest.mark.parametrize("authorization", ["Bearer first-secret", "bearer second-secret", "BEARER  second-secret "])
def test_each_token_is_valid(guarded: TestClient, authorization: str) -> None:
    assert guarded.get("/v2/instances", headers={"Authorization": authorization}).status_code == 200


def test_health_needs_no_token(guarded: TestClient) -> None:
    assert guarded.get("/health").status_code == 200


def test_with_a_token_any_page_and_name_may_call(guarded: TestClient) -> None:
    headers = {"Authorization": "Bearer first-secret", "Origin": "https://elsewhere.example"}
    assert guarded.get("/v2/instances", headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:9", "[::1]:8000", "127.8.8.8"])
def test_without_tokens_the_names_of_this_machine_are_fine(client: TestClient, host: str) -> None:
    assert client.get("/v2/instances", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example:8000", "10.0.0.1", "[::2]", "[", "a b"])
def test_without_tokens_a_foreign_host_name_is_403(client: TestClient, host: str) -> None:
    answer = client.get("/v2/instances", headers={"Host": host})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden_origin")


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3000", "http://localhost:8000.evil.example"]
)
def test_without_tokens_a_page_of_another_site_is_403_and_changes_nothing(client: TestClient, origin: str) -> None:
    answer = client.post("/v2/instances", json={}, headers={"Origin": origin})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden_origin")
    assert client.get("/v2/instances").json()["total"] == 0


def test_without_tokens_a_page_of_our_own_may_call(client: TestClient) -> None:
    assert client.get("/v2/instances", headers={"Origin": "http://localhost:8000"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_serving_other_machines_without_a_token_is_refused(host: str) -> None:
    with pytest.raises(SettingsError, match="loopback") as caught:
        check_binding(Settings(host=host))
    assert "MACHINEUSE_TOKENS" in (caught.value.resolution or "")
    check_binding(Settings(host=host, tokens=("a-secret",)))  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_needs_no_token(host: str) -> None:
    check_binding(Settings(host=host))


def test_an_empty_token_is_refused() -> None:
    with pytest.raises(SettingsError, match="empty"):
        check_binding(Settings(tokens=("good", " ")))  # type: ignore[arg-type]
