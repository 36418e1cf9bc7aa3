"""What the API refuses before anything is decided: always a 4xx in the one shape, never a 422 or a stack trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.intake import MAX_BODY_BYTES
from api.waiting import parse_wait

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"imgae": "x"}', "There is no field 'imgae'."),
        ('{"config": {"memroy_gb": 1}}', "There is no field 'config.memroy_gb'."),
        ('{"config": {"memory_gb": 0}}', "config.memory_gb should be greater than or equal to 0.125."),
        ('{"config": {"memory_gb": true}}', "config.memory_gb should be a valid number."),
        ('{"config": {"memory_gb": "2"}}', "config.memory_gb should be a valid number."),
        ('{"config": {"memory_gb": 1e999}}', "config.memory_gb should be"),
        ('{"config": {"memory_gb": NaN}}', "config.memory_gb should be"),
        ('{"config": {"memory_gb": -Infinity}}', "config.memory_gb should be"),
        ('{"config": {"disk_gb": 1%s}}' % ("0" * 400), "config.disk_gb is out of range."),
        ('{"config": {"cpu_cores": 1%s}}' % ("0" * 400), "config.cpu_cores should be less than"),
        ('{"config": {"cpu_cores": 1%s}}' % ("0" * 5000), "The body can't be read as JSON."),
        ('{"config": {"cpu_cores": 0}}', "config.cpu_cores should be greater than or equal to 1."),
        ('{"config": {"cpu_cores": 1.5}}', "config.cpu_cores should be a valid integer."),
        ('{"config": {"cpu_cores": true}}', "config.cpu_cores should be a valid integer."),
        ('{"config": {"cpu_cores": null}}', "config.cpu_cores should be a valid integer."),
        ('{"config": {"disk_gb": 0}}', "config.disk_gb should be greater than 0."),
        ('{"config": {"idle_timeout_minutes": -1}}', "config.idle_timeout_minutes should be greater than"),
        ('{"config": {"auto_snapshot": 1}}', "config.auto_snapshot should be a valid boolean."),
        ('{"config": []}', "config must be a JSON object."),
        ('{"config": null}', "config must be a JSON object."),
        ('{"image": null}', "image should be a valid string."),
        ('{"image": ""}', "image is not a name that an image can have."),
        ('{"image": "a b"}', "image is not a name that an image can have."),
        ('{"image": "a\\u0000"}', "image is not a name that an image can have."),
        ('{"image": "\\ud800"}', "image is not valid text."),
        ('{"node_preference": ""}', "node_preference must not be empty."),
        ('{"node_preference": "a\\u0000b"}', "There is no node 'a\x00b'"),
        ('{"\\ud800": 1}', "The body has a field whose name is not valid text."),
        ('{"config": {"\\ud800": 1}}', "config is not valid text."),
        ("{", "The body is not JSON"),
        ("[" * 50_000, "The body can't be read as JSON."),
        ("[]", "The body must be a JSON object."),
        ("null", "The body must be a JSON object."),
        ("1", "The body must be a JSON object."),
        ("", "The request needs a body"),
    ],
)
def test_a_body_that_does_not_fit_is_400_in_one_sentence(client: TestClient, body: str, said: str) -> None:
    answer = client.post("/v2/instances", content=body, headers=JSON)
    assert answer.status_code == 400, answer.text
    assert said in answer.json()["detail"]
    assert set(answer.json()) == {"detail", "code"}


def test_bytes_that_are_no_text_are_400(client: TestClient) -> None:
    answer = client.post("/v2/instances", content=b'{"image": "\xff"}', headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_request")


def test_a_whole_number_may_be_written_as_a_float(client: TestClient) -> None:
    answer = client.post("/v2/instances", content='{"config": {"cpu_cores": 2.0, "memory_gb": 1}}', headers=JSON)
    assert answer.status_code == 201
    assert answer.json()["config"]["cpu_cores"] == 2


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=1_0",
        "limit=%201",
        "limit=1.0",
        "limit=",
        "limit=x",
        "limit=true",
        "offset=-1",
        f"offset={2**63}",
        "offset=1" + "0" * 5000,
        "status=gone",
        "status=",
        "status=RUNNING",
    ],
)
def test_a_query_that_does_not_fit_is_400_naming_the_parameter(client: TestClient, query: str) -> None:
    answer = client.get(f"/v2/instances?{query}")
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(f"query parameter {query.partition('=')[0]} ")


@pytest.mark.parametrize("force", ["1", "yes", "on", "", "truth"])
def test_a_flag_is_true_or_false_only(client: TestClient, force: str) -> None:
    assert client.delete("/v2/instances/x", params={"force": force}).status_code == 400


@pytest.mark.parametrize("path", ["/v2/instances", "/v2/instances/x/revive"])
@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "nonsense"])
def test_a_body_that_is_not_declared_as_json_is_415(client: TestClient, path: str, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = client.post(path, content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "APPLICATION/JSON", "application/x+json"])
def test_json_is_json_however_it_is_declared(client: TestClient, content_type: str) -> None:
    assert client.post("/v2/instances", content=b"{}", headers={"content-type": content_type}).status_code == 201


def test_a_body_that_declares_itself_too_large_is_413(client: TestClient) -> None:
    answer = client.post("/v2/instances", content=b" " * (MAX_BODY_BYTES + 1), headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


def test_a_body_that_grows_too_large_is_413(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 1024 + 1):
            yield b" " * 1024

    answer = client.post("/v2/instances", content=chunks(), headers=JSON)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("path", ["/", "/v2", "/v2/instances/", "/v2/nope", "/v2/instances/a/b", "/%00"])
def test_an_unknown_path_is_404_in_the_same_shape(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 404
    assert answer.json()["code"] == "not_found"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/v2/instances", "GET, POST"),
        ("PATCH", "/v2/instances/x", "GET, DELETE"),
        ("GET", "/v2/instances/x/dormant", "POST"),
        ("OPTIONS", "/v2/nodes", "GET"),
        ("TRACE", "/health", "GET"),
        ("NONSENSE", "/health", "GET"),
    ],
)
def test_a_method_that_is_not_offered_is_405_naming_those_that_are(
    client: TestClient, method: str, path: str, allowed: str
) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize(
    ("prefer", "wait_s"),
    [
        (None, None),
        ("wait=5", 5),
        ("WAIT = 5", 5),
        ('wait="5"', 5),
        ("respond-async, wait=7; x=y", 7),
        ("wait=0", 0),
        ("wait=99999", 300),
        ("wait=1, wait=2", 1),
        ("wait=", None),
        ("wait=-1", None),
        ("wait=1.5", None),
        ("wait=\N{SUPERSCRIPT TWO}", None),
        ("wait=99999999999999999999", None),
        ("waiting=5", None),
        ("return=minimal", None),
    ],
)
def test_the_preferred_wait_is_bounded_and_nonsense_is_ignored(prefer: str | None, wait_s: int | None) -> None:
    assert parse_wait(prefer) == wait_s


@pytest.mark.parametrize(("prefer", "applied"), [("wait=0", "wait=0"), ("wait=x", None), (None, None)])
def test_an_answer_says_which_preference_was_kept(client: TestClient, prefer: str | None, applied: str | None) -> None:
    headers: dict[str, Any] = {"Prefer": prefer} if prefer else {}
    answer = client.post("/v2/instances", json={}, headers=headers)
    assert answer.headers.get("preference-applied") == applied
