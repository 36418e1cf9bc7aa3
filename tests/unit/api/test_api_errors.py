"""The table of errors, and what happens to those that nobody expected."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from api.errors import status_of
from provisioner import errors
from tests.unit.api.conftest import FakeServices


@pytest.fixture(autouse=True)
def _logs_through_the_standard_library() -> Iterator[None]:
    structlog.configure(logger_factory=structlog.stdlib.LoggerFactory(), cache_logger_on_first_use=False)
    yield
    structlog.reset_defaults()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidRequest, 400),
        (errors.UnknownImage, 400),
        (errors.UnknownNode, 400),
        (errors.NotFound, 404),
        (errors.Conflict, 409),
        (errors.SnapshotFailed, 409),
        (errors.SnapshotCorrupt, 409),
        (errors.SnapshotMissing, 409),
        (errors.NoCapacity, 503),
        (errors.NodeUnreachable, 503),
        (errors.LedgerUnavailable, 503),
        (errors.DockerError, 500),
        (errors.EngineError, 500),
        (errors.LedgerMismatch, 500),
        (errors.MachineuseError, 500),
    ],
)
def test_every_error_has_its_status(error: type[errors.MachineuseError], status: int) -> None:
    assert status_of(error("x")) == status


def break_service(services: FakeServices, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_: str) -> None:
        raise error

    monkeypatch.setattr(services.ledger.instances, "get", fail)


def test_our_own_failure_is_a_500_without_its_detail(services: FakeServices, monkeypatch: pytest.MonkeyPatch) -> None:
    break_service(services, monkeypatch, errors.EngineError("urn:secret failed", detail="/secret/path"))
    answer = services.client().get("/v2/instances/x")
    assert answer.status_code == 500
    assert answer.json()["code"] == "engine_error"
    assert "secret" not in answer.text


def test_a_crash_is_a_500_and_its_stack_trace_goes_to_the_log(
    services: FakeServices, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    break_service(services, monkeypatch, ZeroDivisionError("secret"))
    with caplog.at_level(logging.INFO):
        answer = services.client().get("/v2/instances/x")
    assert answer.status_code == 500
    assert answer.json() == {
        "detail": "Something went wrong inside the service; its log says what.",
        "code": "internal_error",
    }
    assert "ZeroDivisionError" in caplog.text


def test_an_unreachable_node_is_503_with_retry_after(services: FakeServices, monkeypatch: pytest.MonkeyPatch) -> None:
    break_service(services, monkeypatch, errors.NodeUnreachable("Node local does not answer."))
    answer = services.client().get("/v2/instances/x")
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert json.loads(answer.content) == {"detail": "Node local does not answer.", "code": "node_unreachable"}
