"""Lists on the command line: for a program that reads them, each thing is one line, in the words that it came with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from api.cli import main
from provisioner.ledger import Ledger
from provisioner.settings import Settings
from tests.support.records import make_record

IMAGE = "registry.example/" + "a-team-with-a-long-name/" * 4 + "[bold]browser:1"


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_program_reads_an_instance_from_one_line(
    columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "argv", ["machineuse", "instances", "--data-dir", str(tmp_path)])
    ledger = Ledger.create(tmp_path / Settings(data_dir=tmp_path).ledger_location)
    ledger.instances.create(lambda _: (make_record(id="mu-1", image_requested=IMAGE), "test"))
    ledger.close()
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("mu-1 ")]
    assert IMAGE in row
