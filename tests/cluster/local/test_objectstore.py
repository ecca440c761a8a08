from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from cluster.local import objectstore
from cluster.local.objectstore import ObjectStore
from cluster.local.processes import identify
from sharding.errors import UserError
from tests.conftest import S3
from tests.listening import listening


def test_stores_objects_and_checks_keys_and_buckets(s3: S3) -> None:
    client = boto3.client("s3")
    bucket = s3.bucket().removeprefix("s3://")
    client.put_object(Bucket=bucket, Key="a/b", Body=b"payload")
    assert client.get_object(Bucket=bucket, Key="a/b")["Body"].read() == b"payload"

    with pytest.raises(ClientError, match="NoSuchBucket"):
        client.put_object(Bucket="absent", Key="a", Body=b"")
    with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
        boto3.client(
            "s3", aws_access_key_id=s3.environment["AWS_ACCESS_KEY_ID"], aws_secret_access_key="wrong"
        ).list_objects_v2(Bucket=bucket)


def test_listens_on_loopback_alone(s3: S3) -> None:
    assert s3.store.pid is not None
    sockets = listening([s3.store.pid])
    assert len(sockets) >= 8
    assert {address for address, _ in sockets} == {"127.0.0.1"}


def test_keys_are_private(s3: S3) -> None:
    config = s3.store.log_file.with_name("s3.json")
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in s3.store.log_file.read_text()


def test_starts_again_over_the_buckets_of_an_earlier_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ObjectStore(tmp_path, bucket="kept") as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        client = boto3.session.Session().client("s3")
        client.put_object(Bucket="kept", Key="a/b", Body=b"payload")
        client.create_bucket(Bucket="ready-probe")  # the state after a start that was killed
        store.stop()
        store.start()
        assert client.get_object(Bucket="kept", Key="a/b")["Body"].read() == b"payload"
        assert {bucket["Name"] for bucket in client.list_buckets()["Buckets"]} == {"kept"}


def test_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib; from cluster.local.objectstore import ObjectStore\n"
        f"store = ObjectStore(pathlib.Path({str(tmp_path)!r})); store.start(); print(store.pid, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = identify(int(parent.stdout.readline()))
        assert server is not None
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while identify(server.pid) == server and time.monotonic() < deadline:
        time.sleep(0.05)
    assert identify(server.pid) != server


def test_a_server_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "weed"
    failing.write_text("#!/bin/sh\necho no room left on the disk; exit 7\n")
    failing.chmod(0o755)
    monkeypatch.setattr(objectstore, "_find_weed", lambda: str(failing))
    store = ObjectStore(tmp_path)
    with pytest.raises(UserError, match="status 7: no room left on the disk"):
        store.start()
    assert store.pid is None
