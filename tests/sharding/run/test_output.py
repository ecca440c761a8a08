"""What an output holds already: this program's is resumed, repaired or overwritten, anything else is left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from sharding.errors import UserError
from sharding.format.index import INDEX_NAME, Index
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import shard_folder
from sharding.run.job import ShardOptions
from sharding.run.plan import PlanOptions
from sharding.run.verify import verify
from sharding.storage import LocalStorage, NotFoundError, Storage, open_storage
from tests.conftest import S3
from tests.sharding.conftest import TINY, World, aois_of, digests

FEWER = replace(TINY, sample=SampleOptions(revisits=2))
"""Another plan, whose files have the same names."""
KEYS = {f"{split}-00000.tar{suffix}" for split in ("train", "val", "test") for suffix in ("", ".json")} | {INDEX_NAME}
"""Of a dataset of `TINY`."""


@pytest.fixture(scope="module")
def made(tiny: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of `TINY`. Tests must not change it."""
    folder = tmp_path_factory.mktemp("made")
    shard_folder(tiny.folder, open_storage(folder), TINY)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("key", "content"),
    [
        ("train-00000.tar", b"x\n"),
        ("train-00009.tar", b"x\n"),
        ("train-00000.tar.json", b"{}"),
        ("val-00007.tar.json", b'{"fingerprint": "x"}'),
        ("test-00000.tar/part", b"x\n"),
        (INDEX_NAME, b'{"version": 1, "shards": []}'),
        (INDEX_NAME, b"["),
        (INDEX_NAME, b"[" * 100_000),
        (f"{INDEX_NAME}/part", b"x\n"),
    ],
)
def test_a_foreign_file_is_named_and_stays(tiny: World, output: Storage, key: str, content: bytes) -> None:
    output.write(key, content)
    with pytest.raises(UserError, match=rf"--output {output.uri} holds '{key}'.*(move|give another --output)"):
        shard_folder(tiny.folder, output, TINY)
    with pytest.raises(UserError, match=f"holds '{key}'"):
        shard_folder(tiny.folder, output, TINY, overwrite=True)
    assert {item.key: output.read(item.key) for item in output.list()} == {key: content}


@pytest.mark.parametrize("key", ["train-00009.tar", "val-00000.tar.json.json", "test-00001.tar.json"])
def test_overwriting_does_not_excuse_it(tiny: World, copy: Path, key: str) -> None:
    (copy / key).write_text("mine")
    before = digests(open_storage(copy))
    if key.endswith(".json.json"):  # no name of ours
        shard_folder(tiny.folder, open_storage(copy), FEWER, overwrite=True)
        assert (copy / key).read_text() == "mine"
        return
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"holds '{key}', which this program did not write"):
            shard_folder(tiny.folder, open_storage(copy), FEWER, overwrite=overwrite)
    assert digests(open_storage(copy)) == before


def test_all_of_them_are_counted(tiny: World, tmp_path: Path) -> None:
    for number in range(5, 9):
        (tmp_path / f"train-{number:05d}.tar").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'train-00005\.tar' and 3 more files, which this program did not write"):
        shard_folder(tiny.folder, open_storage(tmp_path), TINY)


def test_other_files_are_not_in_the_way(tiny: World, output: Storage) -> None:
    others = ["notes.txt", "train-00000.tar.bak", "train-1.tar", "below/train-00009.tar", f"old-{INDEX_NAME}"]
    for key in others:
        output.write(key, b"mine")
    shard_folder(tiny.folder, output, replace(TINY, plan=PlanOptions(shard_bytes=1)))
    shard_folder(tiny.folder, output, TINY, overwrite=True)
    assert {item.key for item in output.list()} == KEYS | set(others)
    assert {output.read(key) for key in others} == {b"mine"}


@pytest.mark.parametrize("lost", ["sidecar", "shard", "both"])
def test_an_interrupted_run_is_resumed(tiny: World, made: Path, copy: Path, lost: str) -> None:
    """Killed between sidecar and shard, or by a version that wrote the shard first."""
    (copy / INDEX_NAME).unlink()
    if lost != "shard":
        (copy / "val-00000.tar.json").unlink()
    if lost != "sidecar":
        (copy / "val-00000.tar").unlink()
    report = shard_folder(tiny.folder, open_storage(copy), TINY)
    assert report.shards == ({"kept": 3} if lost == "sidecar" else {"kept": 2, "made": 1})
    assert digests(open_storage(copy)) == digests(open_storage(made))


def test_a_lone_shard_of_the_same_size_is_not_replaced(tiny: World, copy: Path) -> None:
    """Nor described by a sidecar, which would make it this program's, nor is anything written before it is seen."""
    for path in copy.iterdir():
        if path.name != "val-00000.tar":
            path.unlink()
    path = copy / "val-00000.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(UserError, match=r"holds 'val-00000\.tar', which is not what this command makes"):
            shard_folder(tiny.folder, open_storage(copy), TINY)
        assert [item.name for item in copy.iterdir()] == ["val-00000.tar"]
    assert path.read_bytes() == content


def test_a_shard_of_another_size_is_not_the_sidecars(tiny: World, copy: Path) -> None:
    """Without an index, which would list it: then it is damaged, and repaired."""
    with (copy / "test-00000.tar").open("ab") as file:
        file.write(b"x")
    index = (copy / INDEX_NAME).read_bytes()
    (copy / INDEX_NAME).unlink()
    with pytest.raises(UserError, match=r"holds 'test-00000\.tar', which this program did not write"):
        shard_folder(tiny.folder, open_storage(copy), TINY)
    (copy / INDEX_NAME).write_bytes(index)
    assert shard_folder(tiny.folder, open_storage(copy), TINY).shards == {"repaired": 1, "kept": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (FEWER, "--revisits is 3 there and 2 here"),
        (replace(TINY, sample=replace(TINY.sample, bands="all")), r"--bands is \[4, 3, 2\] there and \[1, 2, "),
        (replace(TINY, sample=replace(TINY.sample, hr="rgbn")), "--hr is ps there and rgbn here"),
        (replace(TINY, plan=PlanOptions(seed=5)), "--seed is 386564310 there and 5 here"),
        (replace(TINY, plan=PlanOptions(shard_bytes=1)), "source's files, the AOIs, or --fractions, --shard-size"),
    ],
)
def test_another_plan_needs_overwrite(tiny: World, output: Storage, options: ShardOptions, words: str) -> None:
    shard_folder(tiny.folder, output, TINY)
    before = digests(output)
    with pytest.raises(UserError, match=rf"holds another dataset \(.*{words}.*\): give --overwrite to replace it"):
        shard_folder(tiny.folder, output, options)
    assert digests(output) == before
    index = shard_folder(tiny.folder, output, options, overwrite=True).index
    assert Index.load(output).digest == index.digest
    assert index.digest not in before.values()
    # The same options again keep all.
    assert set(shard_folder(tiny.folder, output, options).shards) == {"kept"}


def test_other_aois_need_overwrite(tiny: World, copy: Path, made: Path) -> None:
    with pytest.raises(UserError, match="the AOIs"):
        shard_folder(tiny.folder, open_storage(copy), replace(TINY, aois=tuple(tiny.names[:4])))
    assert digests(open_storage(copy)) == digests(open_storage(made))


def test_a_source_without_a_usable_aoi_costs_no_dataset(spoilt: World, output: Storage) -> None:
    shard_folder(spoilt.folder, output, TINY)
    before = digests(output)
    for aoi in aois_of(spoilt.folder):
        Path(aoi.hr["pan"].path).write_bytes(b"not a raster")
    with pytest.raises(UserError, match="give --overwrite"):
        shard_folder(spoilt.folder, output, TINY)
    with pytest.raises(UserError, match="0 usable AOIs cannot fill"):
        shard_folder(spoilt.folder, output, TINY, overwrite=True)
    assert digests(output) == before


def test_an_aoi_that_was_repaired_needs_overwrite(spoilt: World, tmp_path: Path) -> None:
    """Where it was alone in its split, so that all was planned again without it."""
    storage = open_storage(tmp_path / "out")
    index = shard_folder(spoilt.folder, storage, TINY).index
    lost = next(aoi for aoi in aois_of(spoilt.folder) if aoi.name == index.samples("test")[0][1].aoi)
    path = Path(lost.hr["pan"].path)
    whole = path.read_bytes()
    path.write_bytes(b"not a raster")
    other = open_storage(tmp_path / "other")
    assert [item.aoi for item in shard_folder(spoilt.folder, other, TINY).index.skipped] == [lost.name]
    before = digests(other)
    assert shard_folder(spoilt.folder, other, TINY).shards == {"kept": 3}
    assert digests(other) == before
    path.write_bytes(whole)
    with pytest.raises(UserError, match="the source's files"):
        shard_folder(spoilt.folder, other, TINY)
    assert digests(other) == before
    assert shard_folder(spoilt.folder, other, TINY, overwrite=True).index.splits == index.splits


def cut(text: str) -> str:
    return text[: len(text) // 2]


def older(text: str) -> str:
    return json.dumps({**json.loads(text), "format_version": 1})


@pytest.mark.parametrize("damage", [cut, older])
def test_a_damaged_index_is_repaired_and_protects_its_shards(
    tiny: World, copy: Path, made: Path, damage: Callable[[str], str]
) -> None:
    text = (copy / INDEX_NAME).read_text()
    (copy / INDEX_NAME).write_text(damage(text))
    with pytest.raises(UserError, match=r"its index\.json cannot be read\): give --overwrite"):
        shard_folder(tiny.folder, open_storage(copy), FEWER)
    assert shard_folder(tiny.folder, open_storage(copy), TINY).shards == {"kept": 3}
    assert digests(open_storage(copy)) == digests(open_storage(made))


class Killed(LocalStorage):
    """Ends the run before its n-th change."""

    def __init__(self, root: Path, changes: int) -> None:
        super().__init__(root)
        self.left = changes

    def _change(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1

    def write(self, key: str, data: bytes) -> None:
        self._change()
        super().write(key, data)

    def upload(self, key: str, path: Path) -> None:
        self._change()
        super().upload(key, path)

    def create(self, key: str, content: bytes) -> bool:
        self._change()
        return super().create(key, content)

    def delete(self, key: str) -> None:
        self._change()
        super().delete(key)


def test_overwriting_resumes_from_wherever_it_was_killed(tiny: World, made: Path, tmp_path: Path) -> None:
    expected = open_storage(tmp_path / "expected")
    shard_folder(tiny.folder, expected, FEWER)
    for changes in range(100):
        folder = Path(shutil.copytree(made, tmp_path / str(changes)))
        try:
            shard_folder(tiny.folder, Killed(folder, changes), FEWER, overwrite=True)
        except KeyboardInterrupt:
            pass
        else:
            assert changes > 9  # index, and each of three shards deleted, described and uploaded
            break
        # Until it is published, nothing needs to be overwritten.
        shard_folder(tiny.folder, open_storage(folder), FEWER, overwrite=changes == 0)
        assert digests(open_storage(folder)) == digests(expected), changes
    else:
        pytest.fail("it never ended")


def test_a_shard_that_another_run_published_meanwhile_is_not_replaced(tiny: World, copy: Path, tmp_path: Path) -> None:
    """Of another plan: the one that comes later is refused."""

    class Late(LocalStorage):
        def list(self, prefix: str = "") -> list:  # type: ignore[type-arg]
            return []

    (copy / INDEX_NAME).unlink()
    before = digests(open_storage(copy))
    with pytest.raises(UserError, match="is not what this command makes"):
        shard_folder(tiny.folder, Late(copy), FEWER)
    assert digests(open_storage(copy)) == before


@pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")  # ours is silenced for one thread only
def test_two_runs_at_once_end_with_one_whole_dataset(tiny: World, made: Path, output: Storage) -> None:
    with ThreadPoolExecutor(2) as threads:
        reports = list(threads.map(lambda _: shard_folder(tiny.folder, output, TINY), range(2)))
    assert {report.index.digest for report in reports} == {Index.load(open_storage(made)).digest}
    assert digests(output) == digests(open_storage(made))
    assert verify(output, deep=True).problems == ()


def test_a_shard_that_another_run_of_the_plan_publishes_meanwhile_stays_whole(
    tiny: World, made: Path, copy: Path
) -> None:
    """Between the look for it and the upload: it is replaced by the same bytes."""
    uploaded = []

    class Early(LocalStorage):
        def list(self, prefix: str = "") -> list:  # type: ignore[type-arg]
            return []

        def read(self, key: str) -> bytes:
            raise NotFoundError(key)

        def exists(self, key: str) -> bool:
            return False

        def upload(self, key: str, path: Path) -> None:
            uploaded.append(key)
            super().upload(key, path)

    (copy / INDEX_NAME).unlink()
    assert shard_folder(tiny.folder, Early(copy), TINY).shards == {"made": 3}
    assert {f"{key}.json" for key in uploaded} | set(uploaded) | {INDEX_NAME} == KEYS
    assert digests(open_storage(copy)) == digests(open_storage(made))
    assert verify(open_storage(copy), deep=True).problems == ()


def test_a_missing_bucket_is_said(tiny: World, s3: S3) -> None:
    with pytest.raises(UserError, match="bucket 'no-such-bucket' does not exist"):
        shard_folder(tiny.folder, open_storage("s3://no-such-bucket/x"), TINY)
