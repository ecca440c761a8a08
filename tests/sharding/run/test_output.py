"""What an output holds already: this program's is resumed, repaired or overwritten, anything else is left alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from sharding.errors import UserError
from sharding.format.index import INDEX_NAME, Index, damage_of
from sharding.prepare.options import SampleOptions
from sharding.run.dataset import shard_folder
from sharding.run.job import ShardOptions
from sharding.run.output import generation_of
from sharding.run.plan import PlanOptions
from sharding.run.prune import prune
from sharding.run.verify import verify
from sharding.storage import LocalStorage, Storage, open_storage
from sharding.storage.lock import Holder, LockedError
from tests.conftest import S3
from tests.sharding.conftest import TINY, World, aois_of, digests, generation

FEWER = replace(TINY, sample=SampleOptions(revisits=2))
"""Another plan, whose files have the same names."""
NAMES = {f"{split}-00000.tar{suffix}" for split in ("train", "val", "test") for suffix in ("", ".json")} | {INDEX_NAME}
"""Files of a generation of `TINY`."""


def keys(storage: Storage) -> set[str]:
    """Return the keys of a dataset of `TINY`: the published index, and its generation."""
    return {INDEX_NAME, *(generation(storage) + name for name in NAMES)}


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


@pytest.mark.parametrize("key", ["train-00009.tar", "test-00001.tar.json"])
@pytest.mark.parametrize("below", [True, False])
def test_overwriting_does_not_excuse_it(tiny: World, made: Path, copy: Path, key: str, below: bool) -> None:
    """Neither beside the index nor in the folder of the generation that would be written."""
    other = shard_folder(tiny.folder, open_storage(copy / "other"), FEWER).index.plan
    shutil.rmtree(copy / "other")
    key = f"{generation_of(other)}/{key}" if below else key
    open_storage(copy).write(key, b"mine")
    before = digests(open_storage(copy))
    with pytest.raises(UserError, match=f"holds '{key}', which this program did not write"):
        shard_folder(tiny.folder, open_storage(copy), FEWER, overwrite=True)
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
    prune(output)
    assert {item.key for item in output.list()} == keys(output) | set(others)
    assert {output.read(key) for key in others} == {b"mine"}


@pytest.mark.parametrize("lost", ["sidecar", "shard", "both"])
def test_an_interrupted_run_is_resumed(tiny: World, made: Path, copy: Path, lost: str) -> None:
    folder = copy / generation(open_storage(copy))
    (copy / INDEX_NAME).unlink()
    if lost != "shard":
        (folder / "val-00000.tar.json").unlink()
    if lost != "sidecar":
        (folder / "val-00000.tar").unlink()
    report = shard_folder(tiny.folder, open_storage(copy), TINY)
    assert report.shards == ({"kept": 3} if lost == "sidecar" else {"kept": 2, "made": 1})
    assert digests(open_storage(copy)) == digests(open_storage(made))


def test_a_shard_that_nothing_describes_is_not_replaced(tiny: World, copy: Path) -> None:
    folder = copy / generation(open_storage(copy))
    for path in (copy / INDEX_NAME, folder / INDEX_NAME, folder / "val-00000.tar.json"):
        path.unlink()
    before = digests(open_storage(copy))
    with pytest.raises(UserError, match=r"holds 'plan-.*/val-00000\.tar', which this program did not write"):
        shard_folder(tiny.folder, open_storage(copy), TINY)
    assert digests(open_storage(copy)) == before


def test_a_shard_of_another_size_is_damaged(tiny: World, copy: Path, made: Path) -> None:
    """While an index lists it."""
    with (copy / generation(open_storage(copy)) / "test-00000.tar").open("ab") as file:
        file.write(b"x")
    assert shard_folder(tiny.folder, open_storage(copy), TINY).shards == {"repaired": 1, "kept": 2}
    assert digests(open_storage(copy)) == digests(open_storage(made))


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
    assert before.items() <= digests(output).items()
    assert verify(output, deep=True).problems == ()


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
    again = shard_folder(spoilt.folder, other, TINY, overwrite=True).index
    assert (again.plan, again.splits) == (index.plan, index.splits)


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

    def __init__(self, root: Path, changes: int | list[int]) -> None:
        super().__init__(root)
        self.left = [changes] if isinstance(changes, int) else changes

    def child(self, name: str) -> LocalStorage:
        return Killed(Path(self.uri) / name, self.left)

    def _change(self) -> None:
        if self.left[0] == 0:
            raise KeyboardInterrupt
        self.left[0] -= 1

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


def test_overwriting_leaves_a_whole_dataset_wherever_it_was_killed(tiny: World, made: Path, tmp_path: Path) -> None:
    expected = open_storage(tmp_path / "expected")
    new = shard_folder(tiny.folder, expected, FEWER).index.digest
    old = Index.load(open_storage(made)).digest
    kept = {key: digest for key, digest in digests(open_storage(made)).items() if key != INDEX_NAME}
    for changes in range(100):
        folder = Path(shutil.copytree(made, tmp_path / str(changes)))
        storage = open_storage(folder)
        try:
            shard_folder(tiny.folder, Killed(folder, changes), FEWER, overwrite=True)
        except KeyboardInterrupt:
            pass
        else:
            assert changes > 8  # the lock, three sidecars and shards, two copies of an index, the index
            break
        assert Index.load(storage).digest in {old, new}
        assert verify(storage, deep=True).problems == ()
        assert {key: digest for key, digest in digests(storage).items() if key in kept} == kept
        shard_folder(tiny.folder, storage, FEWER, overwrite=True)
        prune(storage)
        assert digests(storage) == digests(expected), changes
    else:
        pytest.fail("it never ended")


def test_prune_removes_older_generations_and_names_them(tiny: World, made: Path, output: Storage) -> None:
    shard_folder(tiny.folder, output, FEWER)
    first, foreign = generation(output), f"{generation(output)}train-00077.tar"
    shard_folder(tiny.folder, output, TINY, overwrite=True)
    output.write(foreign, b"mine")
    found = prune(output)
    assert [(item.folder, item.files) for item in found.removed] == [(first.rstrip("/"), 7)]
    assert found.removed[0].bytes > 100_000
    assert found.foreign == (foreign,)
    assert {item.key for item in output.list()} == keys(output) | {foreign}
    assert list(prune(output).lines()) == [
        f"nothing to remove: {output.uri} holds only what its index lists",
        f"left {foreign!r}, which this program did not write",
    ]
    output.delete(foreign)
    assert digests(output) == digests(open_storage(made))


def test_prune_of_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train-00000.tar").write_text("mine")
    with pytest.raises(UserError, match="holds no dataset"):
        prune(open_storage(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.tar"]


def test_a_dataset_is_read_to_its_end_while_another_one_replaces_it(tiny: World, output: Storage) -> None:
    index = shard_folder(tiny.folder, output, TINY).index
    shard_folder(tiny.folder, output, FEWER, overwrite=True)
    for shard in (shard for shards in index.splits.values() for shard in shards):
        assert damage_of(output, shard) is None


def test_of_two_writers_the_second_is_refused(tiny: World, output: Storage) -> None:
    other = replace(Holder.here("shard"), job="another", born="").to_bytes()
    output.write(".lock/000001.json", other)
    with pytest.raises(LockedError, match=r"is being written by `satfusion shard` of"):
        shard_folder(tiny.folder, output, TINY)
    assert {item.key: output.read(item.key) for item in output.list()} == {".lock/000001.json": other}


def test_a_missing_bucket_is_said(tiny: World, s3: S3) -> None:
    with pytest.raises(UserError, match="bucket 'no-such-bucket' does not exist"):
        shard_folder(tiny.folder, open_storage("s3://no-such-bucket/x"), TINY)
