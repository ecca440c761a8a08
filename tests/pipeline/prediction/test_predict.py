"""The command `predict`: GeoTIFFs in their place, kept or refused, the same after a kill."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rio_cogeo.cogeo import cog_validate

from models.config import ModelConfig
from models.published import to_published
from models.registry import build_model
from pipeline.config import RunConfig
from pipeline.jobs import PredictJob
from pipeline.prediction import Fusion, preparation
from pipeline.prediction.export import export_run
from pipeline.prediction.inputs import find_inputs
from pipeline.prediction.predict import SUFFIXES, Prediction, open_job
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError
from sharding.format.index import Index
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.sources.options import SourceOptions
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import LocalStorage, StorageUnavailableError, open_storage
from tests.conftest import S3, SMALL
from tests.in_process import run_here
from tests.pipeline.test_cli import refused, satfusion
from tests.sharding.sources.sensors import write_rgbn


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("source")
    names = write_worldstrat(folder, 4, seed=9, revisits=2, hr_side=80)
    (folder / "hr_dataset" / names[2] / f"{names[2]}_ps.tiff").unlink()
    return folder, names


@pytest.fixture(scope="module")
def source(scenes: tuple[Path, list[str]]) -> Path:
    """Return a folder with four AOIs; the second has a border without data, the third no target."""
    return scenes[0]


@pytest.fixture(scope="module")
def aois(scenes: tuple[Path, list[str]]) -> list[str]:
    return scenes[1]


@pytest.fixture(scope="module")
def run(world: World, make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    run_training(make_config(folder, "train.max_steps=2", "train.checkpoint_every=2"))
    return str(folder)


@pytest.fixture(scope="module")
def outputs(run: str, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    report = fuse(run, source, folder)
    assert (len(report.made), report.kept, report.skipped) == (4, [], [])
    return folder


def fuse(run: str | None, source: Path | str, output: Path | str, **options: Any) -> Prediction:
    return open_job(PredictJob(run, input=str(source), output=str(output), **options)).predict()


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_geotiffs_are_valid_and_in_their_place(outputs: Path, aois: list[str], source: Path) -> None:
    for aoi in aois:
        path = outputs / f"{aoi}.tif"
        valid, errors, warnings = cog_validate(path, strict=True, quiet=True)
        assert (valid, errors, warnings) == (True, [], [])
        with rasterio.open(source / "lr_dataset" / aoi / "L2A" / f"{aoi}-1-L2A_data.tiff") as revisit:
            bounds, crs = revisit.bounds, revisit.crs
        with rasterio.open(path) as fused:
            assert (fused.shape, fused.count, fused.crs) == ((200, 200), 3, crs)
            pixel = (bounds.right - bounds.left) / 200
            assert np.allclose(fused.bounds, bounds, rtol=0, atol=0.1 * pixel)
            assert (fused.descriptions, fused.nodata) == (("red", "green", "blue"), 0)
            assert (fused.dtypes[0], fused.scales) == ("uint16", (1e-4,) * 3)
            assert fused.tags()["SATFUSION_AOI"] == aoi
        with Image.open(outputs / f"{aoi}.png") as preview:
            assert preview.size == (200, 200)


def test_no_data_stays_no_data(outputs: Path, aois: list[str]) -> None:
    for aoi, bordered in zip(aois, (False, True, False, False), strict=True):
        with rasterio.open(outputs / f"{aoi}.tif") as fused:
            image = fused.read()
        assert bool((image == 0).any()) == bordered
        if bordered:
            empty = (image == 0).all(axis=0)
            assert empty[:20, :5].all()  # two of 80 px, at 2.5 px each
            assert not empty[:, 8:].any()
            assert not empty[190:].any()


def test_the_sidecar_says_where_it_comes_from(outputs: Path, aois: list[str], source: Path, run: str) -> None:
    sidecar = json.loads((outputs / f"{aois[0]}.json").read_text())
    name = f"{aois[0]}_pan.tiff"
    pan = (source / "hr_dataset" / aois[0] / name).read_bytes()
    assert sidecar["input"]["sources"][name] == hashlib.sha256(pan).hexdigest()
    assert len(sidecar["input"]["revisits"]) == 2
    assert sidecar["input"]["revisits"][0]["date"]
    assert sidecar["weights"]["model"]["encoder"] == "srcnn"
    assert sidecar["file"]["sha256"] == digests(outputs)[f"{aois[0]}.tif"]


def test_a_dataset_gives_the_same_as_its_source(
    run: str, source: Path, outputs: Path, aois: list[str], tmp_path: Path
) -> None:
    shard_folder(source, open_storage(tmp_path / "data"), ShardOptions(SMALL))
    report = fuse(run, tmp_path / "data", tmp_path / "out")
    assert sorted(report.made) == sorted((*aois[:2], aois[3]))  # the third, without target, is in no dataset
    for name, digest in digests(tmp_path / "out").items():
        assert name.endswith(".json") or digest == digests(outputs)[name]


def test_a_killed_run_resumes_to_the_same_bytes(
    run: str, source: Path, outputs: Path, aois: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LocalStorage.upload
    uploads = []

    def killed(self: LocalStorage, key: str, path: Path) -> None:
        uploads.append(key)
        if len(uploads) == 2:
            raise KeyboardInterrupt  # sidecar and preview are written, the GeoTIFF is not
        whole(self, key, path)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "upload", killed)
        with pytest.raises(KeyboardInterrupt):
            fuse(run, source, tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".tif"]) == 1
    report = fuse(run, source, tmp_path)
    assert (len(report.made), len(report.kept)) == (3, 1)
    assert digests(tmp_path) == digests(outputs)
    damaged = tmp_path / f"{aois[0]}.tif"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert fuse(run, source, tmp_path).made == [aois[0]]
    assert digests(tmp_path) == digests(outputs)


def test_other_outputs_are_not_replaced(run: str, source: Path, outputs: Path, aois: list[str], tmp_path: Path) -> None:
    shutil.copytree(outputs, tmp_path / "out")
    floats: dict[str, Any] = {"pixels": "float32", "aoi": tuple(aois[1:2])}
    with pytest.raises(UserError, match="give --overwrite to replace it"):
        fuse(run, source, tmp_path / "out", **floats)
    assert digests(tmp_path / "out") == digests(outputs)
    fuse(run, source, tmp_path / "out", overwrite=True, **floats)
    with rasterio.open(tmp_path / "out" / f"{aois[1]}.tif") as fused, rasterio.open(outputs / f"{aois[1]}.tif") as old:
        image, steps = fused.read(), old.read()
    assert image.dtype == np.float32
    assert (np.isnan(image) == (steps == 0)).all()
    seen = steps > 1
    assert np.abs(image[seen] - steps[seen] * 1e-4).max() <= 0.51e-4
    for name in (f"{aois[0]}.tif", f"{aois[0]}.json"):
        mine = tmp_path / name.rpartition(".")[2]
        mine.mkdir()
        (mine / name).write_text("of mine")
        with pytest.raises(UserError, match="was not written by predict"):
            fuse(run, source, mine, pixels="float32", overwrite=True, aoi=tuple(aois[:1]))
        assert [path.name for path in mine.iterdir()] == [name]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"fingerprint": {}}', '{"fingerprint": "0", "file": 5}', "\0"])
def test_a_sidecar_that_is_none_is_refused(run: str, source: Path, aois: list[str], tmp_path: Path, text: str) -> None:
    (tmp_path / f"{aois[0]}.json").write_text(text)
    with pytest.raises(UserError, match=r"\.json was not written by predict: move it away"):
        fuse(run, source, tmp_path, overwrite=True, aoi=tuple(aois[:1]))
    assert [path.name for path in tmp_path.iterdir()] == [f"{aois[0]}.json"]


def test_scenes_on_s3(run: str, source: Path, outputs: Path, aois: list[str], s3: S3) -> None:
    place = open_storage(s3.prefix())
    fuse(run, source, place.uri, aoi=tuple(aois[:1]))
    assert {stored.key for stored in place.list()} == {aois[0] + suffix for suffix in SUFFIXES}
    assert hashlib.sha256(place.read(f"{aois[0]}.tif")).hexdigest() == digests(outputs)[f"{aois[0]}.tif"]


def test_the_command(run: str, source: Path, outputs: Path, aois: list[str], tmp_path: Path) -> None:
    options = ["--input", str(source), "--output", str(tmp_path / "out")]
    ended = satfusion("predict", run, *options, "--aoi", *aois[:2])
    assert ended.returncode == 0, ended.stderr
    assert f"2 made, 0 kept, 0 skipped: {tmp_path / 'out'}" in ended.stdout
    assert digests(tmp_path / "out").items() <= digests(outputs).items()
    ended = satfusion("predict", run, *options, "--aoi", aois[0], "--precision", "bf16", "--overwrite")
    assert ended.returncode == 0, ended.stderr
    sidecar = json.loads((tmp_path / "out" / f"{aois[0]}.json").read_text())
    assert sidecar["options"]["precision"] == "bf16"


def test_bad_input_is_refused(run: str, source: Path, aois: list[str], small_uri: str, tmp_path: Path) -> None:
    without_pan = tmp_path / "source"
    shutil.copytree(source, without_pan)
    (without_pan / "hr_dataset" / aois[0] / f"{aois[0]}_pan.tiff").unlink()
    output = ["--output", str(tmp_path / "out")]
    cases = [
        ([run, "--input", str(without_pan), "--aoi", aois[0]], ["cannot be fused", f"{aois[0]}_pan.tiff is missing"]),
        ([run, "--input", str(source), "--aoi", "Amnesty POI-2-2-1"], ["--aoi", f"did you mean '{aois[1]}'"]),
        ([run, "--input", str(source), "--split", "test"], ["--split test is for a dataset"]),
        ([run, "--input", str(tmp_path / "none")], ["is no folder", "hr_dataset"]),
        (["--input", str(source)], ["needs the run folder RUN, or --published-checkpoint FILE"]),
        ([run, "--input", str(source), "--model", "srcnn+pnn"], ["--model is only for --published-checkpoint"]),
    ]
    for arguments, words in cases:
        sentence = refused("predict", *arguments, *output)
        for word in words:
            assert word in sentence
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_refused_before_any_work(run: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = ["predict", str(tmp_path / "no-run"), "--input", str(source), "--output"]
    # Of the two faults the output's is found first: no weights are looked for.
    assert f"cannot use {tmp_path}/file/out: Not a directory" in refused(*arguments, str(tmp_path / "file" / "out"))
    assert "no-run" in refused(*arguments, str(tmp_path / "out"))
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_an_unusable_aoi_is_skipped(run: str, source: Path, aois: list[str], tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    (tmp_path / "source" / "hr_dataset" / aois[0] / f"{aois[0]}_pan.tiff").unlink()
    report = fuse(run, tmp_path / "source", tmp_path / "out")
    assert [aoi for aoi, _ in report.skipped] == [aois[0]]
    assert report.lines()[-1].startswith("3 made, 0 kept, 1 skipped")


def test_a_damaged_sample_of_a_dataset_is_skipped_and_the_others_are_fused(
    run: str, small_uri: str, tmp_path: Path
) -> None:
    shutil.copytree(small_uri, tmp_path / "data")
    index = Index.load(open_storage(tmp_path / "data"))
    (shard, entry), *others = index.samples("train")
    with (tmp_path / "data" / shard.name).open("r+b") as file:
        file.seek(entry.offset + entry.size // 2)
        file.write(b"damaged")
    report = fuse(run, tmp_path / "data", tmp_path / "out", split="train")
    assert [(aoi, error.reason) for aoi, error in report.skipped] == [(entry.aoi, "unreadable")]
    assert f"{shard.name}: sample {entry.key!r}" in report.lines()[0]
    assert report.made == [other.aoi for _, other in others]
    with pytest.raises(UserError, match=rf"AOI '{re.escape(entry.aoi)}' cannot be fused \(.+: repair it"):
        fuse(run, tmp_path / "data", tmp_path / "out", aoi=(entry.aoi,))


@pytest.fixture(scope="module")
def four_bands(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a dataset of red, green, blue, nir at ratio 4, two revisits, in chips of 30 px."""
    folder = tmp_path_factory.mktemp("four_bands")
    write_rgbn(folder / "in", 4, side=240, dates=2)
    options = ShardOptions(SampleOptions(revisits=2), source=SourceOptions(source="scenes", chip=30))
    shard_folder(folder / "in", open_storage(folder / "out"), options)
    return str(folder / "out")


@pytest.fixture(scope="module")
def averaged(
    world: World, make_config: Callable[..., RunConfig], four_bands: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Return a run on the four bands that keeps the average of its weights."""
    folder = tmp_path_factory.mktemp("averaged")
    more = ("model.bands=4", "train.global_batch=1", "train.ema=0.5", "train.max_steps=2", "train.checkpoint_every=2")
    run_training(make_config(folder, f"data.uri={four_bands}", *more))
    return str(folder)


def test_bands_and_windows_are_those_of_the_dataset(averaged: str, four_bands: str, tmp_path: Path) -> None:
    ended = run_here("predict", averaged, "--input", four_bands, "--output", str(tmp_path), "--split", "test")
    assert ended.returncode == 0, ended.stderr
    (path,) = tmp_path.glob("*.tif")
    with rasterio.open(path) as fused:
        assert fused.descriptions == ("red", "green", "blue", "nir")
    scene = find_inputs(four_bands, SampleOptions, SampleOptions).scenes[0].read()
    assert (scene.bands, scene.rgb) == (("red", "green", "blue", "nir"), (0, 1, 2))
    assert replace(scene, bands=("nir", "blue", "green", "red")).rgb == (3, 2, 1)
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert (sidecar["options"]["window"], sidecar["weights"]["kind"]) == (30, "raw")
    assert Fusion.load(averaged).window == 30


def test_the_average_is_used_on_request_only(averaged: str, run: str, four_bands: str, tmp_path: Path) -> None:
    found = {}
    for weights in ("raw", "ema"):
        out = tmp_path / weights
        options = ["--output", str(out), "--split", "test", "--weights", weights]
        ended = run_here("predict", averaged, "--input", four_bands, *options)
        assert ended.returncode == 0, ended.stderr
        (path,) = out.glob("*.json")
        found[weights] = json.loads(path.read_text())["weights"]
        assert found[weights]["kind"] == weights
        folder, _ = export_run(averaged, "best", str(tmp_path / f"to-{weights}"), weights=weights)
        assert json.loads((Path(folder) / "model.json").read_text())["facts"]["weights"] == weights
    assert found["raw"]["sha256"] != found["ema"]["sha256"] == Fusion.load(averaged, weights="ema").digest
    assert "their moving average, of decay 0.5" in (tmp_path / "to-ema" / "MODEL_CARD.md").read_text()
    for verb in (["predict", run, "--input", four_bands, "--output"], ["export", run, "--to"]):
        sentence = refused(*verb, str(tmp_path / "none"), "--weights", "ema")
        assert "has none (its train.ema is 0): give --weights raw" in sentence
    assert not (tmp_path / "none").exists()


def test_facts_of_a_gone_dataset_are_not_made_up(
    world: World, make_config: Callable[..., RunConfig], four_bands: str, tmp_path: Path
) -> None:
    gone, run = tmp_path / "data", str(tmp_path / "run")
    shutil.copytree(four_bands, gone)
    more = ("model.bands=4", "train.global_batch=1", "train.max_steps=1", "train.checkpoint_every=1")
    run_training(make_config(run, f"data.uri={gone}", *more))
    there, _ = export_run(run, "last", str(tmp_path / "there"))
    facts = json.loads((Path(there) / "model.json").read_text())["facts"]
    assert (facts["bands"], facts["ratio"]) == (["red", "green", "blue", "nir"], 4)
    assert (facts["lr_window"], facts["hr_window"]) == (30, 120)
    shutil.rmtree(gone)
    folder, _ = export_run(run, "last", str(tmp_path / "gone"))
    facts = json.loads((Path(folder) / "model.json").read_text())["facts"]
    unknown = ("source", "bands", "ratio", "lr_window", "hr_window", "preparation")
    assert [facts[name] for name in unknown] == [None] * 6
    assert (Path(folder) / "MODEL_CARD.md").read_text().count("| not known |") == 3
    with pytest.raises(UserError, match="--program needs the size of the training's chips"):
        export_run(run, "last", str(tmp_path / "program"), program=True)
    with pytest.raises(UserError, match="is not known without their dataset: give it as window="):
        Fusion.load(run, "last")
    assert Fusion.load(run, "last", window=30).window == 30
    report = fuse(run, four_bands, tmp_path / "out", checkpoint="last", split="test")
    sidecar = json.loads((tmp_path / "out" / f"{report.made[0]}.json").read_text())
    assert sidecar["options"]["window"] == 30


def test_defaults_do_not_stand_in_for_a_dataset_whose_store_does_not_answer(
    run: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(uri: str, *_: object) -> None:
        raise StorageUnavailableError(f"{uri} does not answer")

    monkeypatch.setattr(preparation, "ChipDataset", away)
    out = tmp_path / "out"
    for verb in (lambda: fuse(run, source, out), lambda: Fusion.load(run), lambda: export_run(run, "best", str(out))):
        with pytest.raises(StorageUnavailableError, match="does not answer"):
            verb()
    assert list(tmp_path.iterdir()) == []


def test_simulated_revisits_are_not_promised(
    world: World, make_config: Callable[..., RunConfig], four_bands: str, source: Path, tmp_path: Path
) -> None:
    more = ("model.bands=4", "model.revisits=3", "data.simulate=shifts", "data.simulated_revisits=3")
    steps = ("train.global_batch=1", "train.max_steps=1", "train.checkpoint_every=1")
    run_training(make_config(tmp_path / "run", f"data.uri={four_bands}", *more, *steps))
    output = ["--output", str(tmp_path / "out"), "--checkpoint", "last"]
    sentence = refused("predict", str(tmp_path / "run"), "--input", four_bands, *output)
    assert "take 3 revisits, which their training simulated from the target and predict does not" in sentence
    assert f"{four_bands} holds 2 a sample" in sentence
    assert "shard again" not in sentence
    assert "the weights take 4 bands" in refused("predict", str(tmp_path / "run"), "--input", str(source), *output)


def test_published_weights_take_the_bands_of_the_dataset(four_bands: str, tmp_path: Path) -> None:
    network = build_model(ModelConfig("srcnn", "pnn", bands=4, revisits=2, published=True))
    torch.save(to_published(network), tmp_path / "weights.ckpt")
    published: dict[str, Any] = {"published_checkpoint": tmp_path / "weights.ckpt", "model": "srcnn+pnn"}
    report = fuse(None, four_bands, tmp_path / "out", split="test", **published)
    with rasterio.open(tmp_path / "out" / f"{report.made[0]}.tif") as fused:
        assert fused.descriptions == ("red", "green", "blue", "nir")


def test_scratch_of_a_killed_prediction_is_removed(
    run: str, source: Path, aois: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    whole = LocalStorage.upload

    def upload(self: LocalStorage, key: str, path: Path) -> None:
        seen.append(path)
        whole(self, key, path)

    monkeypatch.setattr(LocalStorage, "upload", upload)
    fuse(run, source, tmp_path, aoi=tuple(aois[:1]))
    (scene,) = seen
    assert scene.parents[1].name.startswith("satfusion-predict-")  # its lock lets later starts remove it
    assert not scene.parents[1].exists()
