from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from sharding.cli import add_verbs
from sharding.errors import UserError
from sharding.format.entries import Skipped
from sharding.format.index import INDEX_NAME, SPLITS, Index
from sharding.format.sample import fetch_sample
from sharding.format.writer import NewSample, ShardWriter
from sharding.inspection.page import write_html
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
    assert (index.preparation.hr, index.preparation.revisits) == ("rgbn", 2)
    assert (index.split_rule, index.split_seed) == ("seeded", 9)
    assert [len(index.splits[split]) for split in ("train", "val", "test")] == [4, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--input", "no/such/folder"), "--input no/such/folder is no folder"),
        (("--workers", "0"), "--workers 0 is out of range"),
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


def test_inspect_tells_a_damaged_sample_and_draws_the_others(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(dataset.folder, copy)
    with next(copy.glob("plan-*/train-00000.tar")).open("r+b") as file:
        file.seek(100_000)
        file.write(b"\xff\x00\xff")
    assert run("inspect", copy, "--png", tmp_path / "sheet.png") == 0
    told = re.findall(r"train-00000\.tar: sample .* \(AOI '(.*)'\) fails its CRC-32", caplog.text)
    assert len(told) == 1
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.height > 2 * 200
    with pytest.raises(UserError, match=r"train-00000\.tar: .*CRC-32"):
        run("inspect", copy, "--aoi", told[0], "--png", tmp_path / "one.png")


def test_inspect_refuses_a_picture_that_cannot_be_written(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_bytes(b"mine")
    for name, words in (
        ("none/sheet.png", "is in no existing folder"),
        ("sheet.what", "does not end in .png"),
        ("mine.png", "exists, and this program did not write it"),
    ):
        with pytest.raises(UserError, match=rf"--png .*{words}"):
            run("inspect", dataset.folder, "--png", tmp_path / name)


def shard(tiny: World, output: Path, *options: object) -> Index:
    usual = ("--input", tiny.folder, "--output", output, "--revisits", 2, "--workers", 1)
    assert run("shard", *usual, *options) == 0
    return Index.load(open_storage(output))


def test_options_of_samples_reach_the_dataset(tiny: World, tmp_path: Path) -> None:
    options = ("--bands", "all", "--select", "clearest", "--dtype", "float32", "--max-cloud", 100)
    index = shard(tiny, tmp_path, "--lr-size", 40, "--hr-size", 50, *options)
    preparation = index.preparation
    assert preparation.band_numbers == tuple(range(1, 13))
    assert (preparation.select, preparation.dtype, preparation.max_cloud) == ("clearest", "float32", 100)
    pairs = index.samples("train")
    sample = fetch_sample(open_storage(tmp_path), *pairs[0])
    assert (sample.lr.shape, sample.hr.shape, sample.pan.shape) == ((2, 12, 40, 40), (3, 50, 50), (1, 50, 50))
    assert sample.lr.dtype == sample.hr.dtype == "float32"
    assert 0 < index.statistics["hr"]["percentiles"]["50"][0] < 1


def test_native_grids_keep_their_sizes(tiny: World, tmp_path: Path) -> None:
    index = shard(tiny, tmp_path, "--native")
    assert (index.preparation.lr_size, index.preparation.hr_size) == (None, None)
    sample = fetch_sample(open_storage(tmp_path), *index.samples("train")[0])
    assert sample.hr.shape == (3, 80, 80)


def test_a_list_of_aois_and_a_report(tiny: World, tmp_path: Path) -> None:
    (tmp_path / "aois.txt").write_text("\n".join(tiny.names[:4]) + "\n\n", encoding="utf-8")
    options = ("--aois", tmp_path / "aois.txt", "--report", tmp_path / "report.json", "--fractions", "0.5,0.25,0.25")
    index = shard(tiny, tmp_path / "out", *options)
    assert [len(index.samples(split)) for split in SPLITS] == [2, 1, 1]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["index_sha256"] == index.digest
    assert report["shards"] == {"made": 3}
    assert (report["aois"], report["skipped"]) == ({"train": 2, "val": 1, "test": 1}, {})
    assert report["bytes_in"] > 0
    shard(tiny, tmp_path / "out", *options)
    assert json.loads((tmp_path / "report.json").read_text())["shards"] == {"kept": 3}


def test_verify_says_what_is_wrong_and_ends_with_1(
    tiny: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = shard(tiny, tmp_path)
    capsys.readouterr()
    assert run("verify", tmp_path, "--deep", "--input", tiny.folder, "--num-aois", 2) == 0
    said = capsys.readouterr().out
    assert "6 samples decoded, 2 AOIs prepared again and compared: all as written" in said
    name = index.splits["val"][0].name
    data = bytearray((tmp_path / name).read_bytes())
    data[2000] ^= 1
    (tmp_path / name).write_bytes(data)
    assert run("verify", tmp_path) == 1
    said = capsys.readouterr().out
    assert f"{name}: does not match the SHA-256" in said
    assert index.splits["val"][0].samples[0].aoi in said
    assert "2 problems: shard again to repair them" in said


def test_inspect_shows_one_place(tiny: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = shard(tiny, tmp_path / "out")
    aoi = index.samples("test")[0][1].aoi
    capsys.readouterr()
    assert run("inspect", tmp_path / "out", "--aoi", aoi, "--png", tmp_path / "one.png") == 0
    assert f"AOI {aoi!r} in test, {index.splits['test'][0].name}" in capsys.readouterr().out
    with Image.open(tmp_path / "one.png") as image:
        assert 200 < image.height < 300
    with pytest.raises(UserError, match="--aoi 'Nowhere' is not in this dataset"):
        run("inspect", tmp_path / "out", "--aoi", "Nowhere")


@pytest.mark.parametrize(
    ("verb", "options", "words"),
    [
        ("shard", ("--native", "--lr-size", "160"), "--native keeps both grids"),
        ("shard", ("--fractions", "a,b"), "--fractions a,b is invalid"),
        ("shard", ("--aois", "no/such/file"), "--aois 'no/such/file' cannot be read"),
        ("shard", ("--sse", "AES256"), "--sse AES256 is for s3:// only"),
        ("verify", ("--input", "x"), "--input needs --deep"),
        ("verify", ("--num-aois", "0"), "--num-aois 0 is out of range"),
    ],
)
def test_more_bad_options_are_refused(
    tiny: World, tmp_path: Path, verb: str, options: tuple[str, ...], words: str
) -> None:
    usual = ("--input", tiny.folder, "--output", tmp_path) if verb == "shard" else (tmp_path,)
    with pytest.raises(UserError, match=re.escape(words)):
        run(verb, *usual, *options)


class _Page(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_page_shows_every_aoi(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "page.html"
    assert run("inspect", dataset.folder, "--html", path) == 0
    assert f"page: {path}" in capsys.readouterr().out
    text = path.read_text()
    page = _Page(text)
    shown = "".join(page.texts)
    for split in SPLITS:
        for _, entry in dataset.index.samples(split):
            assert entry.aoi in page.texts
            assert entry.content is not None
            assert f"{split}, agreement {entry.content.correlation:.3f}" in shown
    assert "160 x 160 LR px, 500 x 500 PAN px, ratio 3.125" in page.texts
    assert "EPSG:" in shown
    # Three bands of revisits and target each, nine chips, one footprint, for each of six AOIs.
    assert sum(tag == "polyline" for tag, _ in page.tags) == 6 * 3 * 2
    assert sum(tag == "rect" for tag, _ in page.tags) == 6 * 9 + 6
    # Nothing is loaded from elsewhere.
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    sources = [values[name] or "" for _, values in page.tags for name in ("src", "href") if name in values]
    assert len(sources) == 12
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert len(text) < 200_000
    # It may be written again, another file may not.
    assert run("inspect", dataset.folder, "--html", path) == 0
    path.write_text("<!doctype html> mine")
    with pytest.raises(UserError, match="exists, and this program did not write it"):
        run("inspect", dataset.folder, "--html", path)
    with pytest.raises(UserError, match=r"does not end in \.html"):
        run("inspect", dataset.folder, "--html", tmp_path / "page.png")
    with pytest.raises(UserError, match="give it without --aoi"):
        run("inspect", dataset.folder, "--html", tmp_path / "other.html", "--aoi", "x")


def test_a_page_escapes_what_a_dataset_says(dataset: Dataset, tmp_path: Path) -> None:
    """Names, places and dates of a dataset are text, whatever they hold; a damaged sample is told."""
    evil = "</td><script>alert(1)</script>" + "x" * 1000
    writer = ShardWriter((tmp_path / "a.tar").open("wb"))
    for number, split in enumerate(SPLITS):
        sample = fetch_sample(dataset.storage, *dataset.index.samples(split)[0])
        images = {name: getattr(sample, name) for name in ("lr", "clm", "hr", "pan")}
        meta = {**sample.meta, "crs": evil, "revisits": [{"date": evil}, 7], "bounds": [evil]}
        writer.add(NewSample(f"{evil[:40]}{number}", images, meta))
    shard = writer.finish("a.tar")
    writer._file.close()
    splits = {split: (replace(shard, samples=(entry,)),) for split, entry in zip(SPLITS, shard.samples, strict=True)}
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[shard.samples[2].offset + 2000] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    index = replace(dataset.index, splits=splits, skipped=(Skipped(evil, "r", evil),), appended=())
    path = tmp_path / "page.html"
    assert write_html(index, open_storage(tmp_path), path) == 0
    page = _Page(path.read_text())
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "x" * 400 not in path.read_text()
    assert "fails its CRC-32" in "".join(page.texts)


def test_a_page_is_bounded(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The AOIs that agree least are shown."""
    monkeypatch.setattr("sharding.inspection.page.MOST_AOIS", 2)
    path = tmp_path / "page.html"
    assert write_html(dataset.index, dataset.storage, path) == 4
    found = [entry for split in SPLITS for _, entry in dataset.index.samples(split)]
    least = sorted(found, key=lambda entry: entry.content.correlation if entry.content else 2)[:2]
    page = _Page(path.read_text())
    titles = [text for text in page.texts if text in {entry.aoi for entry in found}]
    assert list(dict.fromkeys(titles[-2:])) == [entry.aoi for entry in least]


def test_help_and_prune_need_no_heavy_library(tmp_path: Path) -> None:
    code = (
        "import sys; from cluster.cli import main\n"
        "for heavy in ('torch', 'rasterio', 'ray', 'deepspeed', 'webdataset'): sys.modules[heavy] = None\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    for arguments, status, words in (
        (["--help"], 0, "Shard WorldStrat"),
        (["prune", str(tmp_path)], 2, "holds no dataset with a valid index.json"),
    ):
        ended = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert ended.returncode == status, ended.stderr
        assert words in ended.stdout + ended.stderr
