"""Whatever keeps boto3 from having credentials is told as that, by everything that needs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from provisioner.errors import MachineuseError
from provisioner.kms import KmsKey, parse_kms_url
from provisioner.object_storage import Bucket
from provisioner.snapshots.location import S3Location
from provisioner.volumes.ec2 import Ec2, Ec2Options

NOBODY = "http://127.0.0.1:1"
PROFILES = """\
[profile without]
[profile signed-out]
sso_start_url = https://nobody.example/start
sso_region = us-east-1
sso_account_id = 123456789012
sso_role_name = nobody
"""


def ask_s3() -> None:
    next(Bucket(S3Location(bucket="b", endpoint=NOBODY, region="us-east-1"), attempts=1).list(""))


def ask_kms() -> None:
    KmsKey(parse_kms_url(f"aws-kms://arn:aws:kms:us-east-1:1:key/k?endpoint={NOBODY}")).encrypt(b"key", b"test")


def ask_ec2() -> None:
    Ec2("us-east-1", options=Ec2Options(endpoint=NOBODY)).find_volumes({})


@pytest.mark.parametrize("profile", ["without", "signed-out"])
@pytest.mark.parametrize(
    ("ask", "said"),
    [(ask_s3, "There are no keys"), (ask_kms, "There are no AWS keys"), (ask_ec2, "there are no credentials")],
)
def test_without_credentials_it_is_they_that_are_missed(
    ask: Callable[[], None], said: str, profile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "config").write_text(PROFILES)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", profile)
    with pytest.raises(MachineuseError, match=said):
        ask()
