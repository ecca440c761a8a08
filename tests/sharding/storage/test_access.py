"""How a bucket is asked: without a key, at the requester's cost, with logins that have expired, at odd endpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import boto3
import pytest

from sharding.errors import UserError
from sharding.storage import StoredObject, open_storage
from tests.conftest import S3
from tests.sharding.storage.test_storage import send, serving


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def public(s3: S3) -> Iterator[str]:
    """A bucket with one object, which everyone may list and read."""
    uri = s3.bucket()
    name = uri.removeprefix("s3://")
    open_storage(uri).write("a/object", b"payload")
    place = [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"]
    allowed = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": place}
    client = boto3.client("s3")
    client.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": [allowed]}))
    yield uri
    client.delete_bucket_policy(Bucket=name)


@pytest.mark.parametrize("yes", ["YES", "true", "1"])
def test_a_public_bucket_is_read_without_a_key(
    public: str, no_keys: None, yes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"there is no S3 key: .* set AWS_NO_SIGN_REQUEST=YES"):
        open_storage(public).read("a/object")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", yes)
    storage = open_storage(public)
    assert storage.read("a/object") == b"payload"
    assert storage.list() == [StoredObject("a/object", 7)]
    for use in (lambda: storage.write("a/object", b""), storage.check_writable):
        with pytest.raises(UserError, match=r"is denied .*; AWS_NO_SIGN_REQUEST is set, so requests carry no key"):
            use()


def test_a_bucket_that_is_not_public_is_denied(s3: S3, no_keys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    with pytest.raises(UserError, match="only public buckets answer them"):
        open_storage(s3.prefix()).read("x")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [("AWS_NO_SIGN_REQUEST", "perhaps", "set it to YES or NO"), ("AWS_REQUEST_PAYER", "me", "set it to requester")],
)
def test_other_values_are_refused(
    s3: S3, variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable} is .*{words}"):
        open_storage(s3.prefix()).exists("x")


def test_the_requester_pays_for_each_request_if_asked(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        said.append(request.headers["x-amz-request-payer"])
        send(request, 200, b"<ListBucketResult/>" if "list-type" in request.path else b"payload")

    with serving(answer) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        open_storage("s3://bucket").list()
        monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
        storage = open_storage("s3://bucket")
        storage.list()
        assert storage.read("x") == b"payload"
    assert set(said[:1]) == {None}
    assert said.count("requester") == len(said) - said.count(None) >= 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.environment["AWS_ENDPOINT_URL"])
    storage = open_storage(s3.prefix())
    storage.upload("file", Path(__file__))
    assert storage.create("other", b"x")
    assert storage.read("file") == Path(__file__).read_bytes()
    storage.delete("other")


def test_a_denial_names_what_may_be_missing(monkeypatch: pytest.MonkeyPatch, s3: S3) -> None:
    def deny(request: BaseHTTPRequestHandler) -> None:
        send(request, 403, b"<Error><Code>AccessDenied</Code></Error>")

    with serving(deny) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(UserError, match="a requester-pays bucket needs AWS_REQUEST_PAYER=requester"):
            open_storage("s3://bucket").read("x")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "stale")
        with pytest.raises(UserError, match="AWS_SESSION_TOKEN must be the key's own and not expired"):
            open_storage("s3://bucket").read("x")


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidToken"])
def test_a_stale_session_token_is_named(code: str, monkeypatch: pytest.MonkeyPatch, s3: S3) -> None:
    def refuse(request: BaseHTTPRequestHandler) -> None:
        send(request, 400, f"<Error><Code>{code}</Code></Error>".encode())

    with serving(refuse) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(UserError, match=f"refused the session token .*{code}.*temporary keys have expired"):
            open_storage("s3://bucket").read("x")


def test_a_stale_session_token_at_a_real_server(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hush")
    with pytest.raises(UserError, match="AWS_SESSION_TOKEN must be the key's own") as caught:
        open_storage(s3.prefix()).read("x")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("absent", "the profile that AWS_PROFILE names is in neither AWS configuration file"),
        ("old", "the profile's SSO login has expired"),
        ("new", "the profile has no SSO login yet: run `aws sso login`"),
        ("half", "only one half of the S3 key is set"),
        ("program", "the profile's program or role gives no S3 key"),
        ("role", "the profile is incomplete"),
    ],
)
def test_a_profile_that_fails_is_named_for_what_it_is(profile: str, words: str, tmp_path: Path) -> None:
    start = "https://old.example/start"
    sso = "sso_region = us-east-1\nsso_account_id = 123456789012\nsso_role_name = reader"
    (tmp_path / "config").write_text(
        f"[profile old]\nsso_start_url = {start}\n{sso}\n[profile new]\nsso_start_url = https://new.example/start\n{sso}\n"
        "[profile half]\naws_access_key_id = x\n[profile program]\ncredential_process = /bin/false\n"
        "[profile role]\nrole_arn = arn:aws:iam::123456789012:role/x\nsource_profile = absent\n"
    )
    cache = tmp_path / ".aws/sso/cache" / f"{hashlib.sha1(start.encode(), usedforsecurity=False).hexdigest()}.json"
    cache.parent.mkdir(parents=True)
    expired = {"startUrl": start, "region": "us-east-1", "accessToken": "hush", "expiresAt": "2020-01-01T00:00:00Z"}
    cache.write_text(json.dumps(expired))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"HOME": str(tmp_path), "AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": profile}
    environment |= {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_REGION": "us-east-1"}
    command = [sys.executable, "-m", "cluster.cli", "verify", "s3://bucket/x"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert "hush" not in ended.stderr


def test_an_endpoint_with_a_path_is_explained(
    s3: S3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = s3.environment["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{endpoint}/shared")
    with pytest.raises(UserError, match=r"has a path that holds the bucket 'shared'.*HOST:PORT alone"):
        open_storage("s3://shared/x").write("key", b"payload")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{endpoint}/another-path")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            open_storage("s3://shared/x").exists("key")
    assert caplog.text.count("has a path, which few servers expect") == 1
    assert "another-path" not in caplog.text
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{endpoint}/")
    assert not open_storage("s3://shared/x").exists("key")


def test_an_endpoint_with_a_secret_is_refused(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.environment["AWS_ENDPOINT_URL"].replace("//", "//me:hush@"))
    with pytest.raises(UserError, match=r"the S3 endpoint .* holds a user name, password") as caught:
        open_storage("s3://shared/x").read("key")
    assert "hush" not in str(caught.value)
