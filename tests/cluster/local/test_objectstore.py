from __future__ import annotations

import http.client
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
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


def ask(port: int, path: str, method: str = "GET", body: bytes | None = None) -> int:
    """Send a request without a signature and return the status, or 0 for a port that speaks no HTTP."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data=body, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return 0


def test_no_port_reads_writes_or_deletes_objects_without_a_signature(s3: S3) -> None:
    client = boto3.client("s3")
    bucket = s3.bucket().removeprefix("s3://")
    large = os.urandom(5 << 20)  # a file of the volume server; small objects may lie in the filer's own table
    client.put_object(Bucket=bucket, Key="small", Body=b"payload")
    client.put_object(Bucket=bucket, Key="large", Body=large)
    assert s3.store.pid is not None
    ports = {port for _, port in listening([s3.store.pid])}
    for port in ports:
        for name in ("small", "large"):
            # The path of S3 and that of the filer.
            for path in (f"/{bucket}/{name}", f"/buckets/{bucket}/{name}"):
                for method, body in (("GET", None), ("PUT", b"x"), ("POST", b"x"), ("DELETE", None)):
                    assert ask(port, path, method, body) not in range(200, 400), (port, method, path)
        # What masters and volume servers answer: files' places and tokens, a write, the end of a bucket, a file.
        for path in ("/dir/assign", "/dir/lookup?fileId=1,01637037d6", "/submit", f"/col/delete?collection={bucket}"):
            assert ask(port, path, "POST", b"x") not in range(200, 400), (port, path)
        assert ask(port, "/1,01637037d6") not in range(200, 300)
    statuses = {port: (ask(port, "/1,01637037d6"), ask(port, "/1,01637037d6", "DELETE")) for port in ports}
    assert (401, 401) in statuses.values()  # the volume server, which knows no other way than its token
    assert client.get_object(Bucket=bucket, Key="small")["Body"].read() == b"payload"
    assert client.get_object(Bucket=bucket, Key="large")["Body"].read() == large
    assert {item["Key"] for item in client.list_objects_v2(Bucket=bucket)["Contents"]} == {"small", "large"}


def test_other_users_cannot_read_the_data(s3: S3) -> None:
    assert stat.S_IMODE(s3.store.log_file.with_name("data").stat().st_mode) == 0o700


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
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = identify(int(parent.stdout.readline()))
        assert server is not None
        os.kill(parent.pid, signal.SIGKILL)
    deadline = time.monotonic() + 120
    while identify(server.pid) == server and time.monotonic() < deadline:
        time.sleep(0.05)
    assert identify(server.pid) != server


def test_a_killed_server_leaves_what_the_next_start_removes(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path)
    before = set(Path("/tmp").glob("seaweedfs-*.sock"))
    store.start()
    assert store.pid is not None
    sockets = {path for port in store._ports for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")}
    assert sockets - before
    os.kill(store.pid, signal.SIGKILL)  # as if its parent were killed: nobody stops it
    assert all(path.exists() for path in sockets)
    with ObjectStore(tmp_path):
        assert not any(path.exists() for path in sockets)
    store.stop()


def test_a_server_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "weed"
    failing.write_text("#!/bin/sh\necho no room left on the disk; exit 7\n")
    failing.chmod(0o755)
    monkeypatch.setattr(objectstore, "_find_weed", lambda: str(failing))
    store = ObjectStore(tmp_path)
    with pytest.raises(UserError, match="status 7: no room left on the disk"):
        store.start()
    assert store.pid is None
