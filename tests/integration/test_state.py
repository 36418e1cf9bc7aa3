"""Where the stack's state may be kept, with the real CLI; whole services are in tests/acceptance/test_backends.py."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer
from pydantic import SecretStr

from provisioner.engine import Engine
from provisioner.errors import EngineError, LedgerUnavailable, SettingsError
from provisioner.lease import Lease
from provisioner.ledger import Ledger
from provisioner.settings import Settings
from tests.support.ports import free_port

CHECKOUT = Path(__file__).resolve().parent.parent.parent
MakeEngine = Callable[..., Engine]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    (tmp_path / "Pulumi.yaml").write_text((CHECKOUT / "Pulumi.yaml").read_text())
    ledger = Ledger.create(tmp_path / "ledger.db")
    lease = Lease(ledger, duration_s=60)
    lease.seek()
    engines: list[Engine] = []

    def make(**fields: Any) -> Engine:
        settings = Settings(project_dir=tmp_path, cluster="test", **fields)
        engines.append(Engine(settings, debug_providers="", lease=lease))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    lease.close()
    ledger.close()


def test_a_key_in_a_kms_encrypts_instead_of_a_passphrase(
    make_engine: MakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    server = ThreadedMotoServer("127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        url = f"http://127.0.0.1:{port}"
        kms = boto3.client(
            "kms", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
        )
        key = kms.create_key()["KeyMetadata"]["KeyId"]
        for name, value in {
            "AWS_ENDPOINT_URL_KMS": url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            monkeypatch.setenv(name, value)
        engine = make_engine(secrets_provider=f"awskms://{key}?region=us-east-1")
        assert engine.ensure_stack()
        assert not engine.ensure_stack()
    finally:
        server.stop()
    assert "encryptedkey" in (tmp_path / "Pulumi.test.yaml").read_text()
    assert not (tmp_path / ".machineuse" / "passphrase").exists()


def test_a_state_that_is_away_is_told_without_its_password(make_engine: MakeEngine) -> None:
    engine = make_engine(state=f"postgres://somebody:geheim@127.0.0.1:{free_port()}/x?sslmode=disable")
    with pytest.raises(EngineError, match="can't be read") as caught:
        engine.ensure_stack()
    assert "geheim" not in f"{caught.value.detail}"
    assert "somebody:****@" in f"{caught.value.detail}"
    assert "MACHINEUSE_STATE" in caught.value.explain()


def test_no_cli_goes_on_that_the_ledger_could_not_be_told_of(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(state=f"postgres://somebody@127.0.0.1:{free_port()}/x?sslmode=disable&connect_timeout=600")

    def refuse(*_: object) -> None:
        raise LedgerUnavailable("away")

    monkeypatch.setattr(Ledger, "write_fact", refuse)
    with pytest.raises(LedgerUnavailable):
        engine.ensure_stack()
    assert engine._process is not None
    assert engine._process.returncode == -signal.SIGKILL


def test_a_kind_of_state_that_the_cli_lacks_is_told_as_such(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PULUMI_ACCESS_TOKEN", raising=False)
    monkeypatch.setattr("provisioner.settings._STATE_SCHEMES", ("nowhere://",))
    engine = make_engine(state=SecretStr("nowhere://x"))
    with pytest.raises(EngineError, match="can't keep state at nowhere:// URLs"):
        engine.ensure_stack()


def test_a_passphrase_file_that_was_named_must_be_there(make_engine: MakeEngine, tmp_path: Path) -> None:
    """One that was made here would be another one than that of the other services on the same state."""
    engine = make_engine(passphrase_file=tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="MACHINEUSE_PASSPHRASE_FILE"):
        engine.ensure_stack()
    (tmp_path / "nowhere").write_text("secret")
    assert engine.ensure_stack()
