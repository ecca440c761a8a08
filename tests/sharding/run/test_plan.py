from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.errors import UserError
from sharding.format.index import SPLITS
from sharding.run.plan import Plan, PlanOptions, evenly, make_plan
from sharding.run.splits import natural_key

MB = 1_000_000


def names(count: int) -> list[str]:
    return [f"Landcover-{i}" for i in range(count)]


def plan(count: int, options: PlanOptions, rows: list[tuple[str, str]] | None = None) -> Plan:
    return make_plan(names(count), names(count), rows, 3 * MB, options)


def sizes(of: Plan, split: str) -> list[int]:
    return [len(shard.aois) for shard in of.shards if shard.split == split]


@given(st.integers(3, 400), st.integers(0, 99), st.integers(1, 40), st.integers(1, 16))
def test_every_aoi_is_in_one_shard_and_shards_are_even(count: int, seed: int, per_shard: int, ranks: int) -> None:
    options = PlanOptions(splits="seeded", seed=seed, shard_bytes=3 * MB * per_shard, for_ranks=ranks)
    made = plan(count, options)
    assert sorted(itertools.chain.from_iterable(shard.aois for shard in made.shards)) == sorted(names(count))
    for split in SPLITS:
        found = sizes(made, split)
        assert max(found) - min(found) <= 1
        assert max(found) <= per_shard
        assert [s.name for s in made.shards if s.split == split] == [f"{split}-{i:05d}.tar" for i in range(len(found))]
    train = sizes(made, "train")
    assert len(train) % ranks == 0 or len(train) == sum(train)


def test_the_whole_of_worldstrat_takes_some_two_hundred_shards() -> None:
    made = make_plan(names(3889), names(3889), None, 3_450_000, PlanOptions())
    assert len(made.shards) == 217
    assert max(len(shard.aois) for shard in made.shards) == 18


def test_ranks_get_as_many_training_shards_each() -> None:
    assert len(sizes(plan(100, PlanOptions(for_ranks=8)), "train")) == 8
    assert len(sizes(plan(100, PlanOptions(for_ranks=3)), "train")) == 6
    assert len(sizes(plan(10, PlanOptions(for_ranks=64)), "train")) == 8


def test_the_published_seed_gives_the_published_order(shared: Path) -> None:
    golden = json.loads((shared / "golden" / "chips.json").read_text())
    aois = sorted(golden["scene_order"], key=natural_key)
    made = make_plan(aois, aois, None, MB, PlanOptions(splits="seeded", seed=golden["seed"]))
    assert list(itertools.chain.from_iterable(shard.aois for shard in made.shards)) == golden["scene_order"]


def test_published_splits_are_shuffled_by_the_seed() -> None:
    rows = [(name, ("train", "train", "val", "test")[i % 4]) for i, name in enumerate(names(40))]
    one, again, other = (plan(40, PlanOptions(seed=seed), rows) for seed in (1, 1, 2))
    assert one == again
    assert one.rule == "published"
    first, second = (next(s.aois for s in made.shards if s.split == "train") for made in (one, other))
    assert sorted(first) == sorted(second)
    assert first != second
    assert list(first) != sorted(first, key=natural_key)


def test_the_order_of_the_input_does_not_matter() -> None:
    backward = names(30)[::-1]
    assert make_plan(backward, backward, None, MB, PlanOptions()) == make_plan(
        names(30), names(30), None, MB, PlanOptions()
    )


@given(st.lists(st.integers(), max_size=50), st.integers(1, 60))
def test_evenly_cuts_in_order(items: list[int], parts: int) -> None:
    cut = evenly([str(item) for item in items], parts)
    assert len(cut) == parts
    assert list(itertools.chain.from_iterable(cut)) == [str(item) for item in items]


def test_the_published_split_needs_its_file() -> None:
    with pytest.raises(UserError, match="--splits published needs stratified_train_val"):
        plan(5, PlanOptions(splits="published"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"splits": "random"}, "--splits 'random' is unknown"),
        ({"fractions": (0.9, 0.2, 0.1)}, "--fractions 0.9,0.2,0.1 is invalid"),
        ({"fractions": (0.5, 0.5)}, "--fractions 0.5,0.5 is invalid"),
        ({"fractions": (1.5, -0.5, 0.0)}, "--fractions 1.5,-0.5,0 is invalid"),
        ({"seed": -1}, "--seed -1 is out of range"),
        ({"shard_bytes": 0}, "--shard-size 0 is out of range"),
        ({"for_ranks": 0}, "--for-ranks 0 is out of range"),
    ],
)
def test_options_are_checked(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        PlanOptions(**options)  # type: ignore[arg-type]
