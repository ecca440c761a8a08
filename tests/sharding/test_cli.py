from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest
from PIL import Image

from sharding.cli import add_verbs
from sharding.errors import UserError
from sharding.schema import INDEX_NAME, Index
from sharding.storage import open_storage
from tests.sharding.conftest import Dataset, World, aois_of


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_verbs(parser.add_subparsers(required=True))
    args = parser.parse_args([str(argument) for argument in arguments])
    status: int = args.run(args)
    return status


def test_shard_then_inspect_then_picture(spoilt: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = aois_of(spoilt.folder)[0]
    Path(lost.hr["pan"].path).unlink()
    uri, png = tmp_path / "out", tmp_path / "sheet.png"
    assert run("shard", "--input", spoilt.folder, "--output", uri, "--revisits", 3, "--workers", 1) == 0
    printed = capsys.readouterr().out
    assert "split test was empty" in printed
    assert run("inspect", uri, "--png", png) == 0
    printed = capsys.readouterr().out
    index = Index.load(open_storage(uri))
    assert index.digest in printed
    for words in ("train-00000.tar", "val-00000.tar", "test-00000.tar", "seeded, seed 386564310", "mean"):
        assert words in printed
    assert f"{lost.name}  missing-file: {lost.name}_pan.tiff is missing" in printed
    with Image.open(png) as image:
        rows, tiles = 5, 3 + 2
        assert image.height > rows * 200
        assert image.width > tiles * 150


def test_options_reach_the_dataset(tiny: World, tmp_path: Path) -> None:
    options = ("--hr", "rgbn", "--revisits", 2, "--splits", "seeded", "--seed", 9, "--shard-size", 1, "--strict")
    assert run("shard", "--input", tiny.folder, "--output", tmp_path, "--workers", 1, *options) == 0
    index = Index.load(open_storage(tmp_path))
    assert (index.preparation.hr_source, index.preparation.revisits) == ("rgbn", 2)
    assert (index.split_rule, index.split_seed) == ("seeded", 9)
    assert [len(index.splits[split]) for split in ("train", "val", "test")] == [4, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--input", "no/such/folder"), "--input no/such/folder is no folder"),
        (("--workers", "0"), "--workers 0 is too small"),
        (("--hr", "pan"), "--hr 'pan' is unknown"),
        (("--revisits", "99"), "0 usable AOIs"),
        (("--splits", "published"), "--splits published needs"),
        (("--output", "gs://bucket"), "local path or starts with s3://"),
    ],
)
def test_bad_options_are_refused(tiny: World, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    usual = ("--input", str(tiny.folder), "--output", str(tmp_path), "--revisits", "3", "--workers", "1")
    with pytest.raises(UserError, match=words):
        run("shard", *usual, *arguments)
    assert not (tmp_path / INDEX_NAME).exists()


def test_s3_refusals_come_before_any_work(tiny: World, s3: object) -> None:
    with pytest.raises(UserError, match="bucket 'no-such-bucket' does not exist"):
        run("shard", "--input", tiny.folder, "--output", "s3://no-such-bucket/x", "--revisits", 3)


def test_inspect_needs_a_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no index\.json"):
        run("inspect", tmp_path)


def test_inspect_tells_a_damaged_shard(dataset: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset.folder, copy)
    with (copy / "train-00000.tar").open("r+b") as file:
        file.seek(100_000)
        file.write(b"\xff\x00\xff")
    with pytest.raises(UserError, match=r"train-00000\.tar: .*CRC-32"):
        run("inspect", copy, "--png", tmp_path / "sheet.png")


def test_inspect_refuses_a_picture_that_cannot_be_written(dataset: Dataset, tmp_path: Path) -> None:
    for name in ("none/sheet.png", "sheet.what"):
        with pytest.raises(UserError, match="cannot write --png"):
            run("inspect", dataset.folder, "--png", tmp_path / name)
