"""Starting: the port, the data directory, the settings and the log."""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from api import cli
from api.logs import configure_logs, quiet_logs
from api.ports import bind_port
from api.serve import only_service
from provisioner.errors import SettingsError, SetupError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def _handlers_as_before() -> Iterator[None]:
    before = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = before
    logging.getLogger().setLevel(logging.WARNING)


def test_a_busy_port_is_one_clear_sentence_naming_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(SetupError) as caught:
            bind_port("127.0.0.1", port)
    assert str(port) in caught.value.message
    assert f"process {os.getpid()}" in caught.value.message
    assert "--port" in (caught.value.resolution or "")


def test_any_free_port_can_be_taken() -> None:
    bound = bind_port("127.0.0.1", 0)
    assert bound[0].getsockname()[1] > 0
    for one in bound:
        one.close()


@pytest.mark.parametrize("host", ["nope.invalid", "192.0.2.1", "\N{SNOWMAN}" * 100])
def test_a_host_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(SettingsError):
        bind_port(host, 0)


def test_a_second_service_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with only_service(tmp_path), pytest.raises(SetupError, match=str(os.getpid())), only_service(tmp_path):
        pass
    with only_service(tmp_path):  # free again
        pass


@pytest.mark.usefixtures("_handlers_as_before")
def test_a_terminal_gets_one_readable_line_an_event() -> None:
    stream = Terminal()
    configure_logs(log_format="auto", stream=stream)
    structlog.get_logger("api.test").info("request", method="GET", status=200)
    [line] = stream.getvalue().splitlines()
    assert "request" in line
    assert not line.startswith("{")


def test_commands_say_warnings_only_on_what_standard_error_is_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    before, now = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stderr", before)
    quiet_logs()
    monkeypatch.setattr("sys.stderr", now)
    before.close()
    log = structlog.get_logger("provisioner.test")
    log.info("of no interest")
    log.warning("take note")
    assert "take note" in now.getvalue()
    assert "of no interest" not in now.getvalue()


@pytest.mark.usefixtures("_handlers_as_before")
def test_elsewhere_and_in_the_file_it_is_json(tmp_path: Path) -> None:
    stream = io.StringIO()
    configure_logs(log_format="auto", directory=tmp_path / "logs", stream=stream)
    structlog.get_logger("api.test").info("request", method="GET", status=200)
    logging.getLogger("somebody.else").warning("said %s", "this")
    logging.getLogger("somebody.else").info("not said")
    entries = [json.loads(line) for line in stream.getvalue().splitlines()]
    kept = [json.loads(line) for line in (tmp_path / "logs" / "machineuse.log").read_text().splitlines()]
    assert [entry["event"] for entry in kept] == [entry["event"] for entry in entries]
    assert [entry["event"] for entry in entries] == ["request", "said this"]
    assert entries[0] | {"method": "GET", "status": 200, "level": "info", "logger": "api.test"} == entries[0]
    assert stat.S_IMODE((tmp_path / "logs").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MACHINEUSE_PORT": "x"}, "MACHINEUSE_PORT"),
        ({"MACHINEUSE_TOKENS": "abc"}, "MACHINEUSE_TOKENS"),
        ({"MACHINEUSE_HOST": "0.0.0.0"}, "loopback"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_clear_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["machineuse", "serve", "--data-dir", "/nonexistent/nowhere"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert said in capsys.readouterr().err


def test_without_a_ledger_there_are_no_instances_to_list(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["machineuse", "instances", "--data-dir", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "There is no ledger" in capsys.readouterr().err


def test_the_environment_is_printed_for_a_shell(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["env", "--data-dir", str(tmp_path / "a b"), "--cluster", "other"])
    assert result.exit_code == 0
    assert "export PULUMI_STACK=other" in result.output
    assert f"export MACHINEUSE_DATA_DIR='{tmp_path}/a b'" in result.output
