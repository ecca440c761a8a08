from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import UserError
from sharding.format.index import SPLITS
from sharding.run.splits import (
    SPLIT_SEED,
    Split,
    describe_split,
    natural_key,
    permutation,
    published_split,
    seeded_split,
)


def placed(split: Split) -> list[str]:
    return list(itertools.chain.from_iterable(split.splits.values()))


def names(count: int) -> list[str]:
    return [f"Landcover-{i}" for i in range(count)]


def test_digits_of_other_scripts_are_letters() -> None:
    assert sorted(["Zone 10²", "Zone 9²"], key=natural_key) == ["Zone 9²", "Zone 10²"]


def test_the_permutation_is_the_published_one(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "chips.json").read_text())
    aois = sorted(golden["scene_order"], key=natural_key)
    assert [aois[k] for k in permutation(len(aois), golden["seed"])] == golden["scene_order"]
    assert golden["seed"] == SPLIT_SEED


def test_natural_order_compares_numbers() -> None:
    assert sorted(["a-10", "a-9", "A-2", "a-9-b"], key=natural_key) == ["A-2", "a-9", "a-9-b", "a-10"]


def test_six_aois_give_four_one_one() -> None:
    split = seeded_split(names(6), SPLIT_SEED)
    assert [len(split.splits[name]) for name in SPLITS] == [4, 1, 1]
    assert len(describe_split(split)) == 2
    assert "was empty" in describe_split(split)[0]


def test_the_published_sizes_and_the_rest_in_train() -> None:
    split = seeded_split(names(3889), SPLIT_SEED)
    assert [len(split.splits[name]) for name in SPLITS] == [3113, 388, 388]
    assert split.moved == ()


@given(st.integers(3, 300), st.integers(0, 2**32))
def test_every_aoi_is_in_exactly_one_split(count: int, seed: int) -> None:
    split = seeded_split(names(count), seed)
    assert sorted(placed(split)) == sorted(names(count))
    assert all(split.splits[name] for name in SPLITS)


def test_the_order_of_the_input_does_not_matter() -> None:
    shuffled = names(40)
    random.Random(1).shuffle(shuffled)
    assert seeded_split(shuffled, 5) == seeded_split(names(40), 5)
    assert seeded_split(names(40), 5) != seeded_split(names(40), 6)


def test_an_unusable_aoi_moves_no_other() -> None:
    found = names(40)
    usable = [name for name in found if name != "Landcover-7"]
    whole, part = seeded_split(found, 5), seeded_split(usable, 5, found=found)
    for split in SPLITS:
        assert part.splits[split] == [name for name in whole.splits[split] if name != "Landcover-7"]


def test_fractions_cut_by_position() -> None:
    split = seeded_split(names(20), 5, (0.5, 0.25, 0.25))
    assert [len(split.splits[name]) for name in SPLITS] == [10, 5, 5]


def test_too_few_aois_are_refused() -> None:
    with pytest.raises(UserError, match="2 usable AOIs cannot fill train, val and test"):
        seeded_split(names(2), 0)


def test_an_aoi_in_two_splits_goes_to_the_rarer() -> None:
    rows = [(name, "train") for name in "abcdef"] + [("a", "test"), ("g", "test"), ("b", "val"), ("g", "test")]
    split = published_split(list("abcdefg"), rows)
    assert split.splits == {"train": list("cdef"), "val": ["b"], "test": ["a", "g"]}
    assert split.moved == ()
    assert describe_split(split) == [
        "AOI 'a' is listed in test and train: assigned to test",
        "AOI 'b' is listed in train and val: assigned to val",
    ]


def test_an_aoi_that_the_file_does_not_list_is_left_out() -> None:
    rows = [("a", "train"), ("b", "val"), ("c", "test")]
    assert published_split(list("abcd"), rows).left_out == ("d",)


def test_an_empty_published_split_takes_from_train() -> None:
    rows = [(name, "train") for name in "abcd"] + [("e", "test")]
    split = published_split(list("abcde"), rows)
    assert split.splits == {"train": list("abc"), "val": ["d"], "test": ["e"]}
    assert split.moved == (("d", "train", "val"),)


def test_an_empty_train_takes_from_the_largest() -> None:
    split = published_split(list("abcd"), [(name, "test") for name in "abcd"])
    assert sorted(len(aois) for aois in split.splits.values()) == [1, 1, 2]
    assert sorted(placed(split)) == list("abcd")


def test_an_unknown_split_name_is_refused() -> None:
    with pytest.raises(UserError, match="names the split 'dev'"):
        published_split(["a"], [("a", "dev")])


def test_the_published_file_keeps_every_aoi_in_one_split(shared: Path) -> None:
    from sharding.sources.worldstrat.files import open_source
    from sharding.sources.worldstrat.layout import read_split_file

    rows = read_split_file(open_source(shared / "worldstrat-sample", "l2a"))
    assert rows is not None
    assert len(rows) == 3927
    split = published_split(sorted({aoi for aoi, _ in rows}), rows)
    assert len(placed(split)) == len(set(placed(split))) == 3889
    assert len(split.disputed) == 11
