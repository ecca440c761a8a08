"""Two `shard` commands with different options at once, from two network namespaces: one whole dataset remains."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.local import objectstore
from cluster.local.objectstore import ObjectStore
from sharding.format.index import Index
from sharding.run.verify import verify
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage

ROUNDS = 10


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass(frozen=True)
class Namespaces:
    """Two network namespaces, each with a link of its own to this one."""

    names: tuple[str, str]
    host: str
    """Address of this side of the first link, which both namespaces reach."""


@pytest.fixture(scope="module")
def namespaces() -> Iterator[Namespaces]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command `ip`")
    pid = os.getpid()
    network = f"10.{128 + (pid >> 8) % 128}.{pid % 256}"
    with contextlib.ExitStack() as made:
        names = (f"sf{pid}a", f"sf{pid}b")
        for number, name in enumerate(names):
            try:
                ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
            made.callback(ip, "netns", "del", name)  # its link goes with it
            here, there = f"{network}.{4 * number + 1}", f"{network}.{4 * number + 2}"
            ip("link", "add", f"{name}0", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("addr", "add", f"{here}/30", "dev", f"{name}0")
            ip("link", "set", f"{name}0", "up")
            for words in (f"addr add {there}/30 dev eth0", "link set eth0 up", "link set lo up"):
                ip("-n", name, *words.split())
            ip("-n", name, "route", "add", "default", "via", here)
        yield Namespaces(names, f"{network}.1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    write_worldstrat(folder, 6, seed=6, revisits=2, hr_side=80)
    return folder


def start(namespace: str, source: Path, output: str, seed: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cluster.cli", "shard", "--input", str(source), "--output", output]
    options = ["--revisits", "2", "--shard-size", "2.5", "--workers", "1", "--seed", str(seed)]
    return subprocess.Popen(
        ["ip", "netns", "exec", namespace, *command, *options],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def bucket(namespaces: Namespaces, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URI of a bucket whose server both namespaces reach; its endpoint and keys are in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectstore, "_HOST", namespaces.host)
        with ObjectStore(tmp_path_factory.mktemp("s3"), bucket="rounds") as store:
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_ENDPOINT_URL_S3"):
                patch.delenv(name, raising=False)
            for name, value in store.environment.items():
                patch.setenv(name, value)
            yield "s3://rounds"


def check_round(namespaces: Namespaces, source: Path, uri: str) -> None:
    """Run both commands at once into one output: one makes its dataset, the other is refused."""
    both = [start(name, source, uri, seed) for seed, name in enumerate(namespaces.names)]
    try:
        ended = [(process.communicate(timeout=500)[0], process.returncode) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert sorted(status for _, status in ended) == [0, 2], ended
    refusal = next(output for output, status in ended if status == 2)
    assert re.search("is being written by `satfusion shard` of|holds another dataset|others try to", refusal)
    assert verify(open_storage(uri), deep=True).problems == ()
    assert Index.load(open_storage(uri)).split_seed == next(seed for seed in (0, 1) if ended[seed][1] == 0)
    assert not [item for item in open_storage(uri).list() if item.key.startswith(".lock/")]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ROUNDS))
def test_in_a_shared_folder(namespaces: Namespaces, source: Path, tmp_path: Path, number: int) -> None:
    check_round(namespaces, source, str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(ROUNDS))
def test_on_one_s3_server(namespaces: Namespaces, source: Path, bucket: str, number: int) -> None:
    check_round(namespaces, source, f"{bucket}/{number}")
