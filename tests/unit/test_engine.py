"""What is read from an update's event log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from provisioner.engine import _without_passwords, read_events

DONE = {"resOutputsEvent": {"metadata": {"op": "create", "urn": "urn:a", "new": {"outputs": {"name": "a"}}}}}
FAILED = {"resOpFailedEvent": {"metadata": {"urn": "urn:b"}}}
SAID = {"diagnosticEvent": {"severity": "error", "urn": "urn:b", "message": "No. [docker_error]\n"}}
UPDATE_FAILED = {"diagnosticEvent": {"severity": "error", "message": "update failed\n"}}
SUMMARY = {"summaryEvent": {"result": "failed"}}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "events.json"


def write(path: Path, *events: dict[str, Any]) -> None:
    path.write_text("".join(f"{json.dumps(event)}\n" for event in events))


def test_each_resource_has_its_outcome(log: Path) -> None:
    write(log, DONE, FAILED, SAID, UPDATE_FAILED, SUMMARY)
    result = read_events(log, duration_s=1)
    assert result is not None
    assert result.outputs == {"urn:a": {"name": "a"}}
    assert result.errors == {"urn:b": "No. [docker_error]"}  # that the update failed says nothing more


def test_a_failure_of_the_whole_is_told_beside_that_of_a_resource(log: Path) -> None:
    program = {"diagnosticEvent": {"severity": "error", "message": "The program broke.\n"}}
    write(log, DONE, FAILED, SAID, program, SUMMARY)
    result = read_events(log, duration_s=1)
    assert result is not None
    assert result.errors[""] == "The program broke."


def test_a_log_that_breaks_off_tells_nothing(log: Path) -> None:
    write(log, DONE, FAILED, SAID)
    assert read_events(log, duration_s=1) is None  # whatever it says was done, the state does not have it
    log.write_text(json.dumps(DONE) + "\n" + json.dumps(SUMMARY)[:9])
    assert read_events(log, duration_s=1) is None
    log.unlink()
    assert read_events(log, duration_s=1) is None


@pytest.mark.parametrize(
    "url", ["postgres://u:geheim@h/d?sslmode=disable", "postgres://h/d?user=u&password=geheim&a=b"]
)
def test_passwords_are_cut_out_of_what_the_cli_says(url: str) -> None:
    said = _without_passwords(
        f"error: open '{url}': no answer\n  {url}: created by root@here (pid 12) at 2026-01-02T03Z"
    )
    assert "geheim" not in said
    assert "created by root@here (pid 12) at 2026-01-02T03Z" in said
    assert said.count("****") == 2
