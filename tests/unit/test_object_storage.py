"""What a server answers that no server here can be made to: a full quota, keys of another kind, its own encryption."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from botocore.stub import ANY, Stubber

from provisioner import object_storage
from provisioner.errors import ObjectMissing, ObjectStorageError, SettingsError
from provisioner.object_storage import Bucket
from provisioner.snapshots.location import parse_s3_url
from provisioner.snapshots.s3 import S3Store


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return Bucket(parse_s3_url("s3://profiles?endpoint=http://127.0.0.1:1&sse=aws:kms&kms_key=alias/mu"))


@pytest.mark.parametrize(
    ("code", "status", "said", "advice"),
    [
        ("InsufficientStorage", 507, "no room left", "Free some space"),
        ("QuotaExceeded", 403, "no room left", "quota"),
        ("XMinioStorageFull", 507, "no room left", "Free some space"),
        ("AccessDenied", 403, "refuses our keys", "AWS_SECRET_ACCESS_KEY"),
        ("ExpiredToken", 400, "refuses our keys", "profile"),
        ("RequestTimeTooSkewed", 403, "clock", "NTP"),
        ("NoSuchBucket", 404, "does not exist", "Create the bucket"),
        ("InternalError", 500, "InternalError", "server's log"),
    ],
)
def test_what_the_server_refuses_is_one_clear_sentence(
    bucket: Bucket, code: str, status: int, said: str, advice: str
) -> None:
    with Stubber(bucket._client) as stub:
        stub.add_response("create_multipart_upload", {"UploadId": "u"})
        stub.add_client_error("upload_part", code, "words", http_status_code=status)
        upload = bucket.begin_upload("key")
        upload.write(b"x")
        with pytest.raises(ObjectStorageError, match=said) as caught:
            upload.complete()
    assert "s3://profiles" in caught.value.message
    assert advice in (caught.value.resolution or "")
    assert f"upload part 1 of key: {code} ({status}) words" == caught.value.detail


def test_everything_is_sent_with_the_encryption_that_is_set_and_a_checksum(bucket: Bucket) -> None:
    sealed = {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "alias/mu", "Bucket": "profiles", "Key": "key"}
    checksum = "LXEWQrcmsEQBYnyp+6wy9chTD7GQPMTbAiWHF5IaSIE="
    with Stubber(bucket._client) as stub:
        stub.add_response("create_multipart_upload", {"UploadId": "u"}, {**sealed, "ChecksumAlgorithm": "SHA256"})
        bucket.begin_upload("key")
        body = {"Body": b"x", "ChecksumSHA256": checksum}
        stub.add_response("put_object", {}, {**sealed, **body})
        bucket.put("key", b"x")
        # A server that knows no conditions is asked again without.
        stub.add_client_error("put_object", "NotImplemented", expected_params={**sealed, **body, "IfNoneMatch": "*"})
        stub.add_response("put_object", {}, {**sealed, **body})
        bucket.put("key", b"x", new=True)
        stub.assert_no_pending_responses()


@pytest.mark.parametrize(("length", "outcome"), [(1, None), (2, ObjectMissing)])
def test_a_completion_whose_answer_was_lost_is_found_done(
    bucket: Bucket, length: int, outcome: type[Exception] | None
) -> None:
    with Stubber(bucket._client) as stub:
        stub.add_response("create_multipart_upload", {"UploadId": "u"})
        stub.add_response("upload_part", {"ETag": "e"})
        stub.add_client_error("complete_multipart_upload", "NoSuchUpload", http_status_code=404)
        stub.add_response("head_object", {"ContentLength": length, "ETag": "e"}, {"Bucket": ANY, "Key": "key"})
        upload = bucket.begin_upload("key")
        upload.write(b"x")
        if outcome is None:
            upload.complete()
        else:
            with pytest.raises(outcome):
                upload.complete()


def test_a_completion_that_the_server_is_still_at_is_waited_for(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versitygw does: asked a second time while it copies the parts together, it says that all is well."""
    monkeypatch.setattr(object_storage, "_LOOK_S", 0)
    with Stubber(bucket._client) as stub:
        stub.add_response("create_multipart_upload", {"UploadId": "u"})
        stub.add_response("upload_part", {"ETag": "e"})
        stub.add_response("complete_multipart_upload", {})
        for _ in range(3):
            stub.add_client_error("head_object", "404", http_status_code=404)
        stub.add_response("head_object", {"ContentLength": 1, "ETag": "whole"})
        upload = bucket.begin_upload("key")
        upload.write(b"x")
        upload.complete()
        stub.assert_no_pending_responses()
    assert upload.etag == "whole"


def test_an_object_that_never_comes_is_not_waited_for_for_ever(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_storage, "COMPLETE_S", 0)
    with Stubber(bucket._client) as stub:
        stub.add_response("create_multipart_upload", {"UploadId": "u"})
        stub.add_response("upload_part", {"ETag": "e"})
        stub.add_response("complete_multipart_upload", {})
        stub.add_client_error("head_object", "404", http_status_code=404)
        upload = bucket.begin_upload("key")
        upload.write(b"x")
        with pytest.raises(ObjectStorageError, match="put no object together within"):
            upload.complete()


def _parts(now: datetime, *, hours_ago: tuple[int, ...]) -> dict[str, Any]:
    written = (now - timedelta(hours=age) for age in hours_ago)
    return {"Parts": [{"PartNumber": number, "LastModified": at} for number, at in enumerate(written, 1)]}


def test_an_upload_that_still_gets_parts_is_not_cleaned_up_nor_what_belongs_to_it(bucket: Bucket) -> None:
    """However long ago it began: an archive may take days to a server that is far away."""
    now = datetime.now(UTC)
    slow, dead = "mu-1/1/rootfs.tar.zst", "mu-2/1/home.tar.zst"
    uploads = [{"Key": key, "UploadId": key[:4], "Initiated": now - timedelta(days=3)} for key in (slow, dead)]
    objects = [{"Key": key, "LastModified": now - timedelta(days=2)} for key in ("mu-1/1/home.tar.zst", dead)]
    where = {"Bucket": "profiles", "Key": dead}
    with Stubber(bucket._client) as stub:
        stub.add_response("list_multipart_uploads", {"Uploads": uploads})
        stub.add_response("list_parts", _parts(now, hours_ago=(60, 1)))
        stub.add_response("list_parts", _parts(now, hours_ago=(60, 50)))
        stub.add_response("abort_multipart_upload", {}, {**where, "UploadId": "mu-2"})
        stub.add_response("list_objects_v2", {"Contents": objects})
        stub.add_response("delete_object", {}, where)
        assert S3Store(bucket).clean_up(older_than=timedelta(days=1)) == 1
        stub.assert_no_pending_responses()


def test_a_profile_that_is_not_there_is_a_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "not-there")
    with pytest.raises(SettingsError, match="can't be set up"):
        Bucket(parse_s3_url("s3://profiles"))


def test_a_url_is_taken_apart() -> None:
    location = parse_s3_url("s3://profiles/a/b/?endpoint=https://s3.example.org:9000/&region=eu&sse=AES256")
    found: dict[str, Any] = vars(location)
    assert found == {
        "bucket": "profiles",
        "prefix": "a/b",
        "endpoint": "https://s3.example.org:9000",
        "region": "eu",
        "encryption": "AES256",
        "kms_key": None,
    }
    assert str(location) == "s3://profiles/a/b"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://", "names no bucket"),
        ("s3://Bucket", "names no bucket"),
        ("s3://key:s3cr3t@bucket", "must not contain keys"),
        ("s3://bucket?secret_key=s3cr3t", "unknown option 'secret_key'"),
        ("s3://bucket?region=a&region=b", "twice"),
        ("s3://bucket?region=", "without a value"),
        ("s3://bucket?region", "is no URL"),
        ("s3://bucket/a/../b", "prefix"),
        ("s3://bucket/a b", "prefix"),
        ("s3://bucket?sse=rot13", "unknown 'sse'"),
        ("s3://bucket?kms_key=x", "but not sse=aws:kms"),
        ("s3://bucket?endpoint=localhost:9000", "like https://host:port"),
        ("s3://bucket?endpoint=http://key:s3cr3t@host", "like https://host:port"),
        ("s3://bucket?endpoint=http://host:port", "no URL"),
        ("s3://bucket#part", "'#'"),
    ],
)
def test_a_wrong_url_is_told_without_repeating_secrets(url: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        parse_s3_url(url)
    assert "s3cr3t" not in f"{caught.value.message} {caught.value.detail} {caught.value.resolution}"
