from __future__ import annotations

import hashlib
import json
import math
import signal
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import webdataset

from sharding.errors import UserError
from sharding.format.index import INDEX_NAME, SPLITS, Index
from sharding.format.sample import Sample, decode_sample, fetch_sample
from sharding.prepare.options import STEP, SampleOptions
from sharding.run.dataset import Report
from sharding.run.dataset import shard_folder as run_sharding
from sharding.run.job import ShardOptions
from sharding.run.plan import PlanOptions
from sharding.run.splits import SPLIT_SEED, seeded_split
from sharding.run.verify import verify
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.sources.worldstrat.layout import SPLIT_FILE
from sharding.storage import LocalStorage, Storage, StorageUnavailableError, open_storage
from tests.datasets import TWO_A_SHARD
from tests.sharding.conftest import TINY, Dataset, World, aois_of, digests, generation

HALF_STEP = STEP / 2


def shard_folder(folder: Path, output: Storage, options: ShardOptions, **more: object) -> Index:
    """Shard, and return the index."""
    report: Report = run_sharding(folder, output, options, **more)  # type: ignore[arg-type]
    return report.index


def samples(storage: Storage, index: Index) -> Iterator[Sample]:
    for split in SPLITS:
        for shard, entry in index.samples(split):
            yield fetch_sample(storage, shard, entry)


def test_shards_have_the_bytes_that_they_have_always_had(shared: Path, tmp_path: Path) -> None:
    """On native grids: resizing rounds in other ways on other processors."""
    options = ShardOptions(SampleOptions(lr_size=None, hr_size=None), PlanOptions(splits="seeded"))
    index = shard_folder(shared / "worldstrat-sample", open_storage(tmp_path / "out"), options)
    assert {split: [shard.sha256 for shard in index.splits[split]] for split in SPLITS} == {
        "train": ["5b87b046cc0a06ba6a3f2d92e9656bedd72a0a3279e0978876262fcc527c2202"],
        "val": ["1d13068b2427d439f4888d77ea7abea2146d59d67599ec710d65a85cd0d65006"],
        "test": ["10800c3ca4f3989f18f684b250c0b126ea8d9335a39994818a19529bf8e3978b"],
    }


def test_chips_equal_the_golden_ones_after_a_round_trip(shared: Path, output: Storage) -> None:
    golden = np.load(shared / "golden" / "chips.npz")
    index = shard_folder(shared / "worldstrat-sample", output, ShardOptions())
    seen = set()
    for sample in samples(output, Index.load(output)):
        for chip in range(9):
            column, row = divmod(chip, 3)
            x, y = 50 * column, 50 * row
            hr_x, hr_y = round(x * 3.125), round(y * 3.125)
            windows = {
                "lr": sample.lr[..., y : y + 50, x : x + 50] * STEP,
                "lrc": sample.clm[..., y : y + 50, x : x + 50],
                "hr": sample.hr[None, :, hr_y : hr_y + 156, hr_x : hr_x + 156] * STEP,
                "hr_pan": sample.pan[None, :, hr_y : hr_y + 156, hr_x : hr_x + 156] * STEP,
            }
            for name, window in windows.items():
                key = f"{sample.aoi}/{chip}/{name}"
                assert np.abs(window[..., ::5, ::5] - golden[key]).max() <= HALF_STEP + 1e-7, key
                seen.add(key)
    assert seen == set(golden.files)
    assert [len(index.samples(split)) for split in SPLITS] == [4, 1, 1]
    assert index.split_rule == "published"
    assert [entry.aoi for _, entry in index.samples("test")] == ["Landcover-655933"]


def test_repetition_does_not_change_a_byte(world: World, dataset: Dataset, tmp_path: Path) -> None:
    """Nor does the number of workers: ``tests/test_shard_cli.py`` shows that on the real command."""
    again = open_storage(tmp_path / "again")
    index = shard_folder(world.folder, again, TWO_A_SHARD)
    assert index.digest == dataset.index.digest
    assert digests(again) == digests(dataset.storage)


def test_the_index_tells_the_truth_about_the_shards(dataset: Dataset) -> None:
    found = digests(dataset.storage)
    listed = {shard.name: shard for shards in dataset.index.splits.values() for shard in shards}
    copy = f"{generation(dataset.storage)}{INDEX_NAME}"
    assert set(found) == {INDEX_NAME, copy, *listed, *(f"{name}.json" for name in listed)}
    for name, shard in listed.items():
        data = dataset.storage.read(name)
        assert (len(data), found[name]) == (shard.bytes, shard.sha256)
        assert sum(entry.size for entry in shard.samples) <= shard.bytes
        for entry in shard.samples:
            decode_sample(entry, data[entry.offset : entry.offset + entry.size])
    assert [len(dataset.index.splits[split]) for split in SPLITS] == [2, 1, 1]


def test_plain_webdataset_reads_the_integers_and_the_json(dataset: Dataset) -> None:
    ours = {sample.key: sample for sample in samples(dataset.storage, dataset.index)}
    for shards in dataset.index.splits.values():
        for shard in shards:
            path = str(dataset.folder / shard.name)
            read = list(webdataset.WebDataset(path, shardshuffle=False).decode())
            assert [item["__key__"] for item in read] == [entry.key for entry in shard.samples]
            for item in read:
                sample = ours.pop(item["__key__"])
                for name in ("lr", "clm", "hr", "pan"):
                    assert item[f"{name}.npy"].dtype == getattr(sample, name).dtype
                    assert np.array_equal(item[f"{name}.npy"], getattr(sample, name))
                assert item["json"] == sample.meta
                assert item["json"]["step"] == STEP
    assert ours == {}


def test_headers_are_ustar_and_tell_nothing_of_the_writer(dataset: Dataset) -> None:
    path = dataset.folder / dataset.index.splits["train"][0].name
    assert path.read_bytes()[257:263] == b"ustar\0"
    with tarfile.open(path) as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "bigdata")}


def test_statistics_are_those_of_the_training_split(dataset: Dataset) -> None:
    train = [fetch_sample(dataset.storage, *pair) for pair in dataset.index.samples("train")]
    for name in ("lr", "hr", "pan"):
        pixels = np.concatenate(
            [np.moveaxis(getattr(s, name), -3, 0).reshape(getattr(s, name).shape[-3], -1) for s in train], axis=1
        ).astype(np.float64)
        statistics = dataset.index.statistics[name]
        assert statistics["mean"] == pytest.approx(pixels.mean(1) * STEP, rel=1e-9)
        assert statistics["std"] == pytest.approx(pixels.std(1) * STEP, rel=1e-9)
        assert statistics["min"] == pytest.approx(pixels.min(1) * STEP)
        assert statistics["max"] == pytest.approx(pixels.max(1) * STEP)


def test_the_json_tells_where_a_sample_comes_from(world: World, dataset: Dataset) -> None:
    aois = {aoi.name: aoi for aoi in aois_of(world.folder)}
    for sample in samples(dataset.storage, dataset.index):
        meta = json.loads(json.dumps(sample.meta))
        files = {file.name: file for item in aois[sample.aoi].revisits.values() for file in item.values()}
        files |= {file.name: file for file in aois[sample.aoi].hr.values()}
        for name, digest in meta["sources"].items():
            assert hashlib.sha256(files[name].read()).hexdigest() == digest
        assert [revisit["number"] for revisit in meta["revisits"]] == list(range(1, 9))
        west, south, east, north = meta["bounds"]
        for key, size in (("lr_transform", 160), ("hr_transform", 500)):
            a, _, c, _, e, f = meta[key]
            assert (c, f) == (west, north)
            assert math.isclose(c + a * size, east)
            assert math.isclose(f + e * size, south)
        assert meta["crs"] == "EPSG:4326"
        bordered = [s.meta["nodata_fraction"]["hr"] for s in samples(dataset.storage, dataset.index)]  # type: ignore[index]
    assert sum(fraction > 0 for fraction in bordered) == 2


def test_saturated_values_are_counted(spoilt: World, tmp_path: Path) -> None:
    import rasterio

    aoi = aois_of(spoilt.folder)[0]
    path = Path(aoi.revisits[1]["L2A_data"].path)
    with rasterio.open(path, "r+") as file:
        image = file.read(4)
        image[10:20, 10:20] = 3.0
        file.write(image, 4)
    storage = open_storage(tmp_path / "out")
    index = shard_folder(spoilt.folder, storage, TINY)
    found = {s.aoi: s.meta["saturated"]["lr"] for s in samples(storage, index)}  # type: ignore[index]
    assert found.pop(aoi.name) > 100
    assert set(found.values()) == {0}


def test_the_split_file_rules_where_it_is(tmp_path: Path) -> None:
    write_worldstrat(tmp_path / "in", 10, seed=1, revisits=1, hr_side=80, split_file=True)
    said: list[str] = []
    options = ShardOptions(SampleOptions(revisits=1))
    index = shard_folder(tmp_path / "in", open_storage(tmp_path / "out"), options, say=said.append)
    assert index.split_rule == "published"
    assert [len(index.samples(split)) for split in SPLITS] == [8, 1, 1]
    assert said == []
    seeded = ShardOptions(SampleOptions(revisits=1), PlanOptions(splits="seeded", seed=5))
    index = shard_folder(tmp_path / "in", open_storage(tmp_path / "out"), seeded, overwrite=True)
    assert (index.split_rule, index.split_seed) == ("seeded", 5)


def test_the_seeded_split_does_not_read_the_file(spoilt: World, tmp_path: Path) -> None:
    (spoilt.folder / SPLIT_FILE).write_bytes(b"\xff\xfe")
    storage = open_storage(tmp_path / "out")
    with pytest.raises(UserError, match="--splits seeded"):
        shard_folder(spoilt.folder, storage, TINY)
    assert shard_folder(spoilt.folder, storage, replace(TINY, plan=PlanOptions(splits="seeded"))).split_rule == "seeded"


def test_moves_are_said(tiny: World, tmp_path: Path) -> None:
    said: list[str] = []
    shard_folder(tiny.folder, open_storage(tmp_path), TINY, say=said.append)
    assert len(said) == 2
    assert all("was empty: AOI" in line and "from train" in line for line in said)


def test_unusable_aois_are_left_out_with_their_reason(spoilt: World, tmp_path: Path) -> None:
    aois = aois_of(spoilt.folder)
    Path(aois[0].hr["pan"].path).unlink()
    Path(aois[1].hr["ps"].path).write_bytes(Path(aois[1].hr["ps"].path).read_bytes()[:5000])
    storage = open_storage(tmp_path / "out")
    index = shard_folder(spoilt.folder, storage, TINY)
    assert [(item.aoi, item.reason) for item in index.skipped] == [
        (aois[0].name, "missing-file"),
        (aois[1].name, "unreadable"),
    ]
    assert {sample.aoi for sample in samples(storage, index)} == {aoi.name for aoi in aois[2:]}


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_strict_refuses_an_unusable_aoi(spoilt: World, tmp_path: Path, damage: str) -> None:
    aoi = aois_of(spoilt.folder)[1]
    path = Path(aoi.hr["pan"].path)
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:5000])
    storage = open_storage(tmp_path / "out")
    with pytest.raises(UserError, match=f"AOI '{aoi.name}' is unusable .*_pan.tiff"):
        shard_folder(spoilt.folder, storage, replace(TINY, strict=True))
    assert not storage.exists(INDEX_NAME)


def test_a_store_that_does_not_answer_keeps_its_index(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds is not known then; and it is waited for once."""
    storage = open_storage(tmp_path / "out")
    shard_folder(world.folder, storage, TINY)
    asked = []

    def away(_: LocalStorage, key: str) -> bytes:
        asked.append(key)
        raise StorageUnavailableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(LocalStorage, "read", away)
        with pytest.raises(StorageUnavailableError, match="away"):
            shard_folder(world.folder, storage, replace(TINY, sample=replace(TINY.sample, lr_size=151)))
    assert asked == [INDEX_NAME]
    assert storage.exists(INDEX_NAME)


def test_a_split_that_loses_all_its_aois_is_filled_again(spoilt: World, tmp_path: Path) -> None:
    aois = {aoi.name: aoi for aoi in aois_of(spoilt.folder)}
    lost = seeded_split(spoilt.names, SPLIT_SEED).splits["test"][0]
    Path(aois[lost].hr["pan"].path).write_bytes(b"not a raster")
    storage = open_storage(tmp_path / "out")
    index = shard_folder(spoilt.folder, storage, TINY)
    assert [len(index.samples(split)) for split in SPLITS] == [3, 1, 1]
    assert [item.aoi for item in index.skipped] == [lost]
    assert {s.aoi for s in samples(storage, index)} == set(spoilt.names) - {lost}
    # What is there is what sharding without the AOI gives.
    assert index.splits == shard_folder(spoilt.folder, storage, TINY).splits


def test_missing_ps_names_the_aoi_and_the_way_out(spoilt: World, tmp_path: Path) -> None:
    aoi = aois_of(spoilt.folder)[2]
    Path(aoi.hr["ps"].path).unlink()
    storage = open_storage(tmp_path / "out")
    index = shard_folder(spoilt.folder, storage, TINY)
    left_out = f"{aoi.name}_ps.tiff is missing; `--hr rgbn` takes all targets from the 6 m rasters"
    assert [(item.aoi, item.detail) for item in index.skipped] == [(aoi.name, left_out)]
    with pytest.raises(UserError, match=f"AOI '{aoi.name}' is unusable .*_ps.tiff is missing"):
        shard_folder(spoilt.folder, storage, replace(TINY, strict=True))
    for other in aois_of(spoilt.folder):
        Path(other.hr["ps"].path).unlink() if "ps" in other.hr else None
    with pytest.raises(UserError, match=r"and all others cannot be used: .*_ps.tiff is missing; `--hr rgbn` takes"):
        shard_folder(spoilt.folder, storage, TINY)
    six_metres = replace(TINY, sample=replace(TINY.sample, hr="rgbn"))
    index = shard_folder(spoilt.folder, storage, six_metres, overwrite=True)
    assert index.preparation.hr == "rgbn"
    assert len(list(samples(storage, index))) == 6


def test_fewer_than_three_usable_aois_are_refused(tmp_path: Path) -> None:
    write_worldstrat(tmp_path / "in", 2, seed=0, revisits=1, hr_side=80)
    with pytest.raises(UserError, match="2 usable AOIs cannot fill"):
        shard_folder(tmp_path / "in", open_storage(tmp_path / "out"), ShardOptions(SampleOptions(revisits=1)))
    with pytest.raises(UserError, match="0 usable AOIs cannot fill"):
        shard_folder(tmp_path / "in", open_storage(tmp_path / "out"), ShardOptions(SampleOptions(revisits=8)))


class Breaking(LocalStorage):
    """Fails at the n-th upload, as a full disk or a lost network would."""

    def __init__(self, root: Path, uploads: list[int]) -> None:
        super().__init__(root)
        self.left = uploads

    def child(self, name: str) -> LocalStorage:
        return Breaking(Path(self.uri) / name, self.left)

    def upload(self, key: str, path: Path) -> None:
        if self.left[0] == 0:
            raise UserError("no space left")
        self.left[0] -= 1
        super().upload(key, path)


def test_an_interrupted_overwriting_leaves_the_dataset_as_it_was(tiny: World, tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    index = shard_folder(tiny.folder, storage, TINY)
    before = digests(storage)
    other = replace(TINY, sample=SampleOptions(revisits=2))
    with pytest.raises(UserError, match="no space left"):
        shard_folder(tiny.folder, Breaking(tmp_path, [1]), other, overwrite=True)
    assert before.items() <= digests(storage).items()
    assert Index.load(storage).digest == index.digest
    assert verify(storage, deep=True).problems == ()


def test_worker_failures_reach_the_user(spoilt: World, tmp_path: Path) -> None:
    Path(aois_of(spoilt.folder)[0].hr["ps"].path).write_bytes(b"")
    with pytest.raises(UserError, match="is unusable"):
        shard_folder(spoilt.folder, open_storage(tmp_path / "out"), replace(TINY, strict=True), workers=2)


def test_an_interrupt_waits_until_the_workers_have_started(
    tiny: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While they are forked; one whose start is broken off would fail with a trace of its own."""
    read, begun, done = forkserver.read_signed, [], []

    def interrupted(descriptor: int) -> object:
        begun.append(descriptor)
        signal.raise_signal(signal.SIGINT)
        done.append(descriptor)
        return read(descriptor)

    monkeypatch.setattr(forkserver, "read_signed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shard_folder(tiny.folder, open_storage(tmp_path / "out"), TINY, workers=2)
    assert len(begun) == len(done) > 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
