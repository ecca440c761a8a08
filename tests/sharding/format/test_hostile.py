"""Indexes and arrays that somebody changed by hand, or to do harm, end in one sentence, and take no memory."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import json
import random
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import main
from sharding.errors import UnusableError, UserError
from sharding.format.entries import SampleEntry
from sharding.format.index import INDEX_NAME, Index
from sharding.format.layout import ArrayLayout
from sharding.format.sample import decode_sample, images_of
from sharding.format.sidecar import read_sidecar
from sharding.inspection.describe import describe_sample
from sharding.prepare.inputs import sample_input
from sharding.storage import CorruptedError, open_storage
from tests.limits import limited_memory
from tests.mutations import damaged, mutated
from tests.sharding.conftest import Dataset

Table = dict[str, Any]
GIB = 1 << 30


def first(index: Table, split: str = "train") -> Table:
    sample: Table = index["splits"][split][0]["samples"][0]
    return sample


def change(**values: object) -> Callable[[Table], None]:
    return lambda index: first(index).update(values)


def member(*place: int) -> Callable[[Table], None]:
    return lambda index: first(index)["members"].update({"lr.npy": list(place)})


REFUSED: dict[str, tuple[Callable[[Table], object], str]] = {
    "negative offset": (change(offset=-512), r"splits\.train\[0\]\.samples\[0\]\.offset: expected `int` >= 0"),
    "huge size": (change(size=10**15), r"samples\[0\]\.size: expected `int` <= 1073741824"),
    "size beyond the shard": (change(size=10**9), r"train-00000\.tar: sample '.*' ends at byte 1000000000 of \d+"),
    "text offset": (change(offset="0"), r"samples\[0\]\.offset: expected `int`, got `str`"),
    "float size": (change(size=1.5), r"samples\[0\]\.size: expected `int`, got `float`"),
    "member beyond": (member(10**12, 10), r"member 'lr\.npy' ends at byte 1000000000010 of \d+"),
    "member before": (member(-600, 10), r"members\[\.\.\.\]\[0\]: expected `int` >= 0"),
    "member of other length": (
        lambda i: first(i)["members"]["lr.npy"].__setitem__(1, 10),
        "lr.npy has 10 bytes, and an array u2 .8, 3, 160, 160. takes",
    ),
    "members overlap": (lambda i: first(i)["members"].update(json=[600, 10]), "member 'json' begins at byte 600"),
    "member missing": (lambda i: first(i)["members"].pop("json"), "it has .* where json, .* belong"),
    "samples overlap": (change(offset=512), "sample '.*' (begins|ends) at byte"),
    "climbing name": (
        lambda i: i["splits"]["train"][0].update(name="../../../../etc/passwd"),
        r"the shard name '\.\./\.\./\.\./\.\./etc/passwd' is not a file beside the index",
    ),
    "nul in name": (lambda i: i["splits"]["train"][0].update(name="a\0b"), r"the shard name 'a\\x00b' is not a file"),
    "deep name": (lambda i: i["splits"]["train"][0].update(name="a/b/c.tar"), "the shard name 'a/b/c.tar' is not"),
    "escape in name": (lambda i: i["splits"]["train"][0].update(name="\x1b[2J"), r"the shard name '\\x1b\[2J' is not"),
    "upper-case digest": (
        lambda i: i["splits"]["train"][0].update(sha256="A" * 64),
        r"sha256: expected `str` matching",
    ),
    "text statistics": (lambda i: i["statistics"]["lr"].update(mean="abc"), "mean: expected `array`, got `str`"),
    "statistics of too few bands": (
        lambda i: i["statistics"]["lr"].update(std=[1.0]),
        "statistics.lr: 'std' has not one number for each of 3 bands",
    ),
    "escape in aoi": (change(aoi="\x1b[2J\x1b]0;x\x07 \n21:00 INFO all fine"), r"not that of its AOI '\\x1b\[2J"),
    "no utf-8 in aoi": (change(aoi="\ud800"), "is damaged"),
    "lr_size 1e9": (lambda i: i["preparation"].update(lr_size=10**9), "preparation: lr_size: expected `int` <= 10000"),
    "other lr_size": (lambda i: i["preparation"].update(revisits=5), r"layouts\[0\]: lr is u2 .* is needed"),
    "layout that is not there": (change(layout=1), "it has layout 1 of 1"),
    "layout of objects": (lambda i: i["layouts"][0]["lr"].update(dtype="|O"), "dtype: invalid enum value '|O'"),
    "layout of 1e12 elements": (
        lambda i: i["layouts"][0]["lr"].update(shape=[8, 3, 2**20, 2**20]),
        r"layouts\[0\]: clm is u1 .8, 1, 160, 160. where",
    ),
    "ratio that is another": (lambda i: i["facts"].update(ratio=[4, 1]), "hr has 500 px for 160 of lr, and the ratio"),
    "no radiometry": (lambda i: i["facts"]["radiometry"].update(scale=0.0), "scale: expected `float` > 0.0"),
    "chips without end": (lambda i: i["facts"]["chips"].update(columns=2**40), "columns: expected `int` <= 1048576"),
    "two shards of one name": (
        lambda i: i["splits"]["val"][0].update(name=i["splits"]["train"][0]["name"]),
        "stands there twice with different content",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_changed_index_is_refused_with_the_place(dataset: Dataset, case: str) -> None:
    damage, words = REFUSED[case]
    table = json.loads(dataset.index.data)
    damage(table)
    with limited_memory(GIB), pytest.raises(UserError, match=words) as caught:
        Index.from_json(json.dumps(table))
    assert str(caught.value).startswith("index.json is damaged (")
    assert str(caught.value).endswith("): shard the dataset again")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


REPEATED: dict[str, tuple[Callable[[Table], object], str]] = {
    "sample twice": (lambda i: i["splits"]["train"][0]["samples"].append(first(i)), "is in train and train"),
    "train is val": (lambda i: i["splits"].update(val=i["splits"]["train"]), "is in train and val"),
}


@pytest.mark.parametrize("case", REPEATED)
def test_an_aoi_in_two_places_is_reported_and_not_trained_on(
    dataset: Dataset, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = REPEATED[case]
    table = json.loads(dataset.index.data)
    damage(table)
    for shard in {shard["name"] for shards in table["splits"].values() for shard in shards}:
        (tmp_path / shard).parent.mkdir(exist_ok=True)
        (tmp_path / shard).symlink_to(dataset.folder / shard)
    (tmp_path / INDEX_NAME).write_text(json.dumps(table))
    assert main(["verify", str(tmp_path)]) == 1
    assert words in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 0
    assert words in capsys.readouterr().out
    assert main(["train", "demo", f"data.uri={tmp_path}", f"output.uri={tmp_path / 'run'}"]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_refused_before_the_first_step(
    dataset: Dataset, tmp_path: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = json.loads(dataset.index.data)
    table["splits"][split] = []
    (tmp_path / INDEX_NAME).write_text(json.dumps(table))
    assert main(["train", "demo", f"data.uri={tmp_path}", f"output.uri={tmp_path / 'run'}"]) == 2
    assert f"split '{split}' of {tmp_path} is empty: shard the dataset again" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", [["inspect"], ["verify", "--deep"], ["inspect", "--aoi", "x"]])
def test_the_command_line_refuses_a_changed_index(
    dataset: Dataset, tmp_path: Path, verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    table = json.loads(dataset.index.data)
    first(table).update(offset=-512)
    (tmp_path / INDEX_NAME).write_text(json.dumps(table))
    assert main([*verb, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"satfusion: error: {tmp_path}: index.json is damaged (splits.train[0].samples[0].offset")


def check_index(data: bytes) -> None:
    """Read an index; anything but an index or one sentence fails the test."""
    try:
        index = Index.from_json(data)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017 - one of many sentences
        return
    for shards in index.splits.values():
        for shard in shards:
            for entry in shard.samples:
                assert 0 <= entry.offset <= entry.offset + entry.size <= shard.bytes
                for name, layout in entry.layout.items():
                    assert (layout.bytes or 0) < entry.members[f"{name}.npy"][1] <= entry.size


@given(st.integers(0, 2**64))
@settings(max_examples=100, deadline=None)
def test_any_change_of_an_index_ends_in_an_index_or_a_sentence(dataset: Dataset, seed: int) -> None:
    draw = random.Random(seed)
    with limited_memory(GIB):
        check_index(json.dumps(mutated(json.loads(dataset.index.data), draw)).encode())
        check_index(damaged(dataset.index.data, draw))


@given(st.integers(0, 2**64))
@settings(max_examples=50, deadline=None)
def test_any_change_of_a_sidecar_ends_in_a_result_or_none(dataset: Dataset, tmp_path_factory: Any, seed: int) -> None:
    draw = random.Random(seed)
    storage = open_storage(tmp_path_factory.mktemp("sidecar"))
    path = dataset.folder / f"{dataset.index.splits['val'][0].name}.json"
    name, data = path.name.removesuffix(".json"), path.read_bytes()
    for changed in (json.dumps(mutated(json.loads(data), draw)).encode(), damaged(data, draw)):
        storage.write(f"{name}.json", changed)
        with limited_memory(GIB):
            for options in (dataset.index.preparation, None):
                found = read_sidecar(storage, name, options)
                assert found is None or found[1].entry is None or found[1].entry.name == name


def test_a_compressed_histogram_takes_no_more_than_its_bands(dataset: Dataset, tmp_path: Path) -> None:
    import base64

    path = dataset.folder / f"{dataset.index.splits['train'][0].name}.json"
    name, described = path.name.removesuffix(".json"), json.loads(path.read_bytes())
    described["histograms"]["lr"] = base64.b64encode(zlib.compress(bytes(GIB // 8), 1)).decode()
    storage = open_storage(tmp_path)
    storage.write(f"{name}.json", json.dumps(described).encode())
    with limited_memory(GIB // 10):
        assert read_sidecar(storage, name) is None


def sample_of(array: bytes, layout: ArrayLayout) -> tuple[SampleEntry, bytes]:
    """Return a sample of a single array."""
    text = b'{"clearest": 0}'
    data = bytes(512) + array + text
    members = {"lr.npy": (512, len(array)), "json": (512 + len(array), len(text))}
    return SampleEntry("x", "x", 0, len(data), zlib.crc32(data), members, {"lr": layout}), data


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


GOOD = npy(np.arange(24, dtype="<u2").reshape(2, 3, 2, 2))
LAYOUT = ArrayLayout((2, 3, 2, 2), "<u2")
ARRAYS = {
    "other shape": (npy(np.zeros((2, 3, 4), "<u2")), r"it is u2 \[2, 3, 4\], and the index says u2 \[2, 3, 2, 2\]"),
    "other type": (npy(np.zeros((2, 3, 2, 2), "<f4")), r"it is f4 \[2, 3, 2, 2\], and the index says u2"),
    "big-endian": (npy(np.zeros((2, 3, 2, 2), ">u2")), "its header is not one that this program writes"),
    "objects": (npy(np.array([{"a": 1}], dtype=object)), "holds pickled objects, which are never loaded"),
    "fortran order": (npy(np.asfortranarray(np.zeros((2, 3, 2, 2), "<u2"))), "its values are in Fortran order"),
    "1e12 elements": (GOOD.replace(b"(2, 3, 2, 2), } ", b"(1000000, 1000000), }")[: len(GOOD)], "cannot be read"),
    "long header": (GOOD.replace(b"(2, 3, 2, 2), }", b"(999999999999,)}"), "its header is not one"),
    "header beyond the file": (GOOD[:8] + b"\xff\xff" + GOOD[10:], "its header is not one"),
    "other version": (GOOD.replace(b"\x01\x00", b"\x02\x00", 1), "it is no .npy file of version 1.0"),
    "too short": (GOOD[:-2], "it has 174 bytes, and its header says 176"),
    "cut in its header": (GOOD[:60], "its header is not one"),
    "empty": (b"", "it is no .npy file"),
    "code in its header": (
        GOOD.replace(b"{'descr': '<u2'", b"{'descr':exit()"),
        "its header is not one that this program writes",
    ),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_that_is_not_the_indexs_is_refused(case: str) -> None:
    array, words = ARRAYS[case]
    entry, data = sample_of(array, LAYOUT)
    with limited_memory(GIB), pytest.raises(CorruptedError, match=words) as caught:
        images_of(entry, data)
    assert str(caught.value).startswith("sample 'x' (AOI 'x'): lr.npy cannot be read, since ")


def test_an_array_of_the_index_is_a_view() -> None:
    entry, data = sample_of(GOOD, LAYOUT)
    (image,) = images_of(entry, data).values()
    assert np.array_equal(image, np.arange(24).reshape(2, 3, 2, 2))
    assert not image.flags.owndata
    any_size = dataclasses.replace(entry, layout={"lr": ArrayLayout((2, 3, None, None), "<u2")})
    assert images_of(any_size, data)["lr"].shape == (2, 3, 2, 2)


@given(st.integers(0, 2**64))
@settings(max_examples=200, deadline=None)
def test_any_change_of_an_array_ends_in_an_array_or_a_sentence(seed: int) -> None:
    check_array(random.Random(seed))


def check_array(draw: random.Random) -> None:
    """Read a damaged array; anything but the array of its layout or one sentence fails the test."""
    head = draw.choice((damaged(GOOD[:128], draw) + GOOD[128:], damaged(GOOD, draw)))
    layout = draw.choice((LAYOUT, ArrayLayout((None, None, None, None), "<u2"), ArrayLayout((None,), "<f4")))
    entry, data = sample_of(head, layout)
    with limited_memory(GIB):
        try:
            (image,) = images_of(entry, data).values()
        except CorruptedError as error:
            assert "\n" not in str(error)  # noqa: PT017 - one of many sentences
            return
    assert layout.fits(image.shape, image.dtype.str)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"clearest": -1}', '{"clearest": 2}', '{"clearest": "0"}', "[" * 9999]
)
def test_a_json_that_is_no_samples_is_refused(text: str) -> None:
    entry, data = sample_of(GOOD, LAYOUT)
    offset, _ = entry.members["json"]
    data = data[:offset] + text.encode()
    entry = dataclasses.replace(
        entry,
        size=len(data),
        crc32=zlib.crc32(data),
        members={**entry.members, "json": (offset, len(text))},
    )
    with pytest.raises(CorruptedError, match=r"sample 'x' \(AOI 'x'\): its JSON is damaged"):
        decode_sample(entry, data)


def rewrite_json(dataset: Dataset, folder: Path, change: Callable[[Table], object]) -> str:
    """Copy a dataset, change the JSON of its first sample with all checksums right, and return the sample's AOI.

    What is added replaces the list of the sample's source files, so that its place in the shard stays.
    """
    shutil.copytree(dataset.folder, folder, dirs_exist_ok=True)
    index = json.loads(dataset.index.data)
    shard = index["splits"]["train"][0]
    sample = shard["samples"][0]
    data = bytearray((folder / shard["name"]).read_bytes())
    offset, length = sample["members"]["json"]
    start = sample["offset"] + offset
    meta = json.loads(data[start : start + length])
    meta["sources"] = {}
    changed = change(meta)
    text = changed.encode() if isinstance(changed, str) else json.dumps(meta).encode()
    assert len(text) <= length, "it must fit in the place of the old one"
    data[start : start + length] = text.ljust(length)
    (folder / shard["name"]).write_bytes(data)
    sample["crc32"] = zlib.crc32(data[sample["offset"] : sample["offset"] + sample["size"]])
    shard["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / INDEX_NAME).write_text(json.dumps(index))
    aoi: str = sample["aoi"]
    return aoi


def nested(meta: Table) -> str:
    """Return a JSON that is nested so deeply that one reader takes it and another does not."""
    deep = "[" * 400 + "]" * 400
    return json.dumps(meta | {"deep": 0}).replace('"deep": 0', f'"deep": {deep}')


METAS: dict[str, tuple[Callable[[Table], object], str]] = {
    "no revisits": (lambda meta: meta.pop("revisits"), "object missing required field `revisits`"),
    "too few revisits": (lambda meta: meta["revisits"].pop(), "revisits: expected 8, got 7"),
    "revisits of numbers": (lambda meta: meta.update(revisits=[1] * 8), r"revisits\[0\]: expected `object`, got `int`"),
    "date of a number": (
        lambda meta: meta["revisits"][0].update(date=5),
        r"revisits\[0\]\.date: expected `str \| null`",
    ),
    "no step": (lambda meta: meta.update(step=0), "step: expected `float` > 0.0"),
    "step of text": (lambda meta: meta.update(step="1"), "step: expected `float`, got `str`"),
    "crs of a file": (lambda meta: meta.update(crs="/etc/passwd"), "crs: expected `str` matching"),
    "crs of a projection": (lambda meta: meta.update(crs="+init=/etc/x:1"), "crs: expected `str` matching"),
    "transform of five": (lambda meta: meta["pan_transform"].pop(), "pan_transform: expected `array` of length 6"),
    "transform without end": (
        lambda meta: json.dumps(meta | {"pan_transform": [1, 2, 3, 4, 5, 0]}).replace("5, 0]", "5, 1e999]"),
        "out of range",
    ),
    "nested": (nested, "it is nested too deeply"),
}


@pytest.mark.parametrize("case", METAS)
def test_a_samples_json_with_the_right_checksum_is_checked(
    dataset: Dataset, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, words = METAS[case]
    aoi = rewrite_json(dataset, tmp_path / "data", change)
    # A sample that is asked for by name is refused; a contact sheet names it and shows the others.
    for more, status in ((["--aoi", aoi], 2), (["--png", str(tmp_path / "sheet.png")], 0)):
        assert main(["inspect", str(tmp_path / "data"), *more]) == status
        error = capsys.readouterr().err
        assert re.search(f"sample '{re.escape(aoi)}' .*: its JSON is damaged \\(.*{words}", error), error
        assert error.count("\n") == 1
    assert main(["verify", "--deep", str(tmp_path / "data")]) == 1
    assert "its JSON is damaged" in capsys.readouterr().out
    assert (tmp_path / "sheet.png").exists()


@given(st.integers(0, 2**64))
@settings(max_examples=100, deadline=None)
def test_any_change_of_a_samples_json_ends_in_a_sample_or_a_sentence(dataset: Dataset, seed: int) -> None:
    draw = random.Random(seed)
    shard, entry = dataset.index.samples("val")[0]
    data = dataset.storage.read_range(shard.name, entry.offset, entry.size)
    offset, length = entry.members["json"]
    meta = json.loads(data[offset : offset + length])
    for text in (json.dumps(mutated(meta, draw)).encode(), damaged(data[offset : offset + length], draw)):
        whole = data[:offset] + text
        members = {**entry.members, "json": (offset, len(text))}
        changed = dataclasses.replace(entry, size=len(whole), crc32=zlib.crc32(whole), members=members)
        try:
            sample = decode_sample(changed, whole)
            assert list(describe_sample("val", shard, sample, (0, 1, 2)))
            sample_input(sample, ("red", "green", "blue"))
        except (CorruptedError, UnusableError) as error:
            assert "\n" not in str(error)  # noqa: PT017 - one of many sentences


@pytest.mark.slow
def test_thousands_of_changed_files_end_in_sentences(dataset: Dataset) -> None:
    table = json.loads(dataset.index.data)
    old = copy.deepcopy(table) | {"format_version": 2}
    with limited_memory(GIB):
        for seed in range(3000):
            draw = random.Random(seed)
            check_index(json.dumps(mutated(draw.choice((table, old)), draw)).encode())
            check_index(damaged(dataset.index.data, draw))
            check_array(draw)


def test_an_index_of_4000_aois_opens_at_once(dataset: Dataset) -> None:
    """No time is asserted here; what it takes is measured in benchmarks."""
    index = Index.from_json(large_index(dataset.index, 4000))
    assert len(index.samples("train")) == 4000


def large_index(index: Index, aois: int) -> bytes:
    """Return an index with a training split of ``aois`` samples, 19 a shard."""
    table = json.loads(index.data)
    shard = table["splits"]["train"][0]
    size = shard["samples"][0]["size"]
    shards = []
    for number in range(0, aois, 19):
        names = [f"Landcover-{100000 + aoi}" for aoi in range(number, min(number + 19, aois))]
        samples = [
            {**shard["samples"][0], "aoi": name, "key": name, "offset": place * size}
            for place, name in enumerate(names)
        ]
        shards.append({**shard, "name": f"train-{number:05d}.tar", "bytes": 20 * size, "samples": samples})
    table["splits"]["train"] = shards
    return json.dumps(table, sort_keys=True, separators=(",", ":")).encode()
