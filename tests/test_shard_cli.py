"""`satfusion shard` and `satfusion inspect` as people run them: bad input, and bytes that never differ."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio

from cluster.local.processes import free_ports
from sharding.format.index import INDEX_NAME, Index
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.sources.worldstrat.layout import AoiFiles
from sharding.storage import Storage, open_storage, retries
from tests.conftest import S3
from tests.in_process import run_here
from tests.pipeline.test_cli import satfusion
from tests.sharding.conftest import aois_of

DAMAGES = {"missing": "missing-file", "truncated": "unreadable", "wrong-sized": "size-mismatch"}
"""What can happen to a raster, and the reason that the index then gives."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six AOIs of few pixels. Tests must not change it."""
    folder = tmp_path_factory.mktemp("source")
    write_worldstrat(folder, 6, seed=4, revisits=2, hr_side=80)
    return folder


@pytest.fixture
def spoilt(source: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, tmp_path / "spoilt"))


def refused(*arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run a command that must be refused without a secret on the screen, and return its one sentence."""
    ended = run_here(*map(str, arguments), environment=environment)
    shown = ended.stdout + ended.stderr
    assert ended.returncode == 2, shown
    assert "Traceback" not in shown
    for variables in (os.environ, environment or {}):
        secret = variables.get("AWS_SECRET_ACCESS_KEY")
        assert secret is None or secret not in shown
    errors = [line for line in shown.splitlines() if line.startswith("satfusion: error: ")]
    assert len(errors) == 1, shown
    return errors[0]


def shard(source: Path, output: Path | str, *options: str) -> tuple[str | Path, ...]:
    return ("shard", "--input", source, "--output", output, "--revisits", "2", "--workers", "1", *options)


def damage(aoi: AoiFiles, how: str) -> None:
    if how == "missing":
        Path(aoi.hr["pan"].path).unlink()
    elif how == "truncated":
        data = Path(aoi.hr["pan"].path).read_bytes()
        Path(aoi.hr["pan"].path).write_bytes(data[: len(data) // 2])
    else:
        path = Path(aoi.revisits[2]["L2A_data"].path)
        with rasterio.open(path) as file:
            image, profile = file.read(), file.profile
        with rasterio.open(path, "w", **{**profile, "height": image.shape[1] - 1}) as file:
            file.write(np.ascontiguousarray(image[:, 1:]))


def digests(storage: Storage) -> dict[str, str]:
    return {item.key: hashlib.sha256(storage.read(item.key)).hexdigest() for item in storage.list()}


def test_a_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder, words in (("none", "none is no folder: give the one"), ("empty", "empty holds no AOI: it must hold")):
        sentence = refused(*shard(tmp_path / folder, tmp_path / "out"))
        assert words in sentence
        assert "--input" in sentence
    assert not (tmp_path / "out").exists()


def test_an_absent_ps_names_the_aoi_and_the_way_out(spoilt: Path, tmp_path: Path) -> None:
    for aoi in aois_of(spoilt):
        Path(aoi.hr["ps"].path).unlink()
    sentence = refused(*shard(spoilt, tmp_path / "out"))
    assert repr(aois_of(spoilt)[0].name) in sentence
    assert "--hr rgbn" in sentence
    assert not (tmp_path / "out").exists()


def test_damaged_aois_are_skipped_with_their_reason(spoilt: Path, tmp_path: Path) -> None:
    aois = aois_of(spoilt)
    for aoi, how in zip(aois, DAMAGES, strict=False):
        damage(aoi, how)
    ended = run_here(*map(str, shard(spoilt, tmp_path / "out")))
    assert ended.returncode == 0, ended.stderr
    index = Index.load(open_storage(tmp_path / "out"))
    assert {item.aoi: item.reason for item in index.skipped} == {
        aoi.name: reason for aoi, reason in zip(aois, DAMAGES.values(), strict=False)
    }
    for item in index.skipped:
        assert f"{item.aoi}  {item.reason}: {item.detail}" in ended.stdout


@pytest.mark.parametrize("how", DAMAGES)
def test_strict_refuses_a_damaged_aoi(spoilt: Path, tmp_path: Path, how: str) -> None:
    aoi = aois_of(spoilt)[0]
    damage(aoi, how)
    sentence = refused(*shard(spoilt, tmp_path / "out", "--strict"))
    assert repr(aoi.name) in sentence
    assert DAMAGES[how] in sentence
    assert not (tmp_path / "out" / INDEX_NAME).exists()


@pytest.mark.parametrize("verb", ["shard", "inspect"])
@pytest.mark.parametrize(
    ("change", "bucket", "words"),
    [
        ("endpoint", "shared", "AWS_ENDPOINT_URL"),
        ("key", "shared", "AWS_SECRET_ACCESS_KEY"),
        ("bucket", "no-such-bucket", "bucket 'no-such-bucket' does not exist"),
    ],
    ids=["unreachable", "wrong key", "missing bucket"],
)
def test_a_store_that_refuses(
    verb: str, change: str, bucket: str, words: str, source: Path, s3: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 1.0)
    environment = dict(s3.environment)
    if change == "endpoint":
        environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{free_ports(1)[0]}"
    elif change == "key":
        environment["AWS_SECRET_ACCESS_KEY"] = "wrong-secret-0123456789"
    uri = f"s3://{bucket}/refused-{verb}"
    arguments = shard(source, uri) if verb == "shard" else ("inspect", uri)
    assert words in refused(*arguments, environment=environment)
    assert open_storage("s3://shared").child(f"refused-{verb}").list() == []


def test_inspect_of_a_place_without_an_index_is_refused(tmp_path: Path, s3: S3) -> None:
    for uri in (str(tmp_path), s3.prefix()):
        assert f"{uri} holds no index.json, so it is not a dataset: run `satfusion shard" in refused("inspect", uri)


def test_what_is_not_ours_stays_and_what_is_needs_overwrite(source: Path, s3: S3) -> None:
    """In folders too: ``tests/sharding/run/test_output.py``."""
    uri = s3.prefix()
    storage = open_storage(uri)
    storage.write("train-00009.tar", b"mine")
    assert f"--output {uri} holds 'train-00009.tar', which this program did not" in refused(*shard(source, uri))
    assert [(item.key, item.size) for item in storage.list()] == [("train-00009.tar", 4)]
    storage.delete("train-00009.tar")
    assert run_here(*map(str, shard(source, uri))).returncode == 0
    before = digests(storage)
    other = shard(source, uri, "--revisits", "1")
    assert "(--revisits is 2 there and 1 here): give --overwrite" in refused(*other)
    assert digests(storage) == before
    assert run_here(*map(str, other), "--overwrite").returncode == 0
    assert Index.load(storage).preparation.revisits == 1


def test_one_process_and_two_give_the_same_bytes(tmp_path: Path) -> None:
    """With the threads that each has by default: many for one process, one each for two."""
    # Big enough for torch to share out one image among threads.
    write_worldstrat(tmp_path / "in", 6, seed=3, hr_side=264)
    found = []
    for workers in ("1", "2"):
        output = tmp_path / workers
        options = ("--input", str(tmp_path / "in"), "--output", str(output), "--shard-size", "7", "--workers", workers)
        ended = satfusion("shard", *options)
        assert ended.returncode == 0, ended.stderr
        found.append(digests(open_storage(output)))
    assert found[0] == found[1]
    folder = f"plan-{Index.load(open_storage(tmp_path / '1')).plan[:16]}/"
    shards = {folder + name for name in ("train-00000.tar", "train-00001.tar", "val-00000.tar", "test-00000.tar")}
    assert set(found[0]) == {INDEX_NAME, folder + INDEX_NAME, *shards, *(f"{name}.json" for name in shards)}
