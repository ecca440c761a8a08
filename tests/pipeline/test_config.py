"""Configurations: they are read back as written, and errors name the wrong key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import RunConfig, load_config, recipe_names
from sharding.errors import UserError


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    path = tmp_path / "again.toml"
    path.write_text(config.to_toml())
    assert load_config(str(path)) == config
    assert RunConfig.from_dict(config.to_dict()) == config


def test_overrides_are_typed() -> None:
    config = load_config(
        "srcnn_pnn", ["train.learning_rate=3e-4", "train.weight_decay=0", "model.head=pannet", "data.rotate_flip=false"]
    )
    assert config.train.learning_rate == 3e-4
    assert isinstance(config.train.weight_decay, float)
    assert config.model.head == "pannet"
    assert config.data.rotate_flip is False


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", ("train.learning_rat", "'learning_rate'")),
        ("trian.epochs=1", ("trian", "'train'")),
        ("train.epochs=0", ("train.epochs = 0", "from 1 to 1,000,000,000")),
        (f"train.seed={2**70}", ("train.seed = 1180591620717411303424", "from 0 to 9,223,372,036,854,775,807")),
        (f"train.seed={'9' * 5000}", ("train.seed = '999", "must be a whole number")),
        (f"model.hidden={2**40}", ("hidden = 1099511627776", "from 1 to 65,536")),
        ("data.cache_dir_gib=inf", ("data.cache_dir_gib = inf", "above 0 and up to 1,073,741,824")),
        ("data.cache_dir_gib=nan", ("data.cache_dir_gib = nan", "above 0")),
        ("train.threads_per_rank=1000000", ("train.threads_per_rank = 1000000", "from 0 to 1,024")),
        ("train.learning_rate=nan", ("train.learning_rate = nan", "above 0")),
        ("output.sync_seconds=inf", ("output.sync_seconds = inf", "above 0 and up to 1,000,000")),
        ("loss.mse=nan", ("loss.mse = nan", "from 0 to 1")),
        ("train.epochs=two", ("train.epochs = 'two'", "whole number")),
        ("train.epochs=true", ("train.epochs = True", "whole number")),
        ("train.epochs=1.5", ("train.epochs = 1.5", "whole number")),
        ("train.schedule=cosin", ("train.schedule = 'cosin'", "known", "warmup_cosine")),
        ("train.schedule=warmup_cosin", ("did you mean 'warmup_cosine'",)),
        ("train.zero_stage=4", ("train.zero_stage = 4",)),
        ("train.precision=fp16", ("train.precision", "bf16")),
        ("model.encoder=srcn", ("encoder", "'srcnn'")),
        ("model.encoder=none", None),
        ("loss.registration=centered", ("loss.registration", "'centred'")),
        ("loss.mse=0.9", ("sum to",)),
        ("model=srcnn", ("section.key=value",)),
        ("train.epochs", ("section.key=value",)),
    ],
)
def test_a_bad_override_is_refused_by_name(override: str, words: tuple[str, ...] | None) -> None:
    if words is None:
        assert load_config("srcnn_pnn", [override]).model.encoder == "none"
        return
    with pytest.raises(UserError) as refused:
        load_config("srcnn_pnn", [override])
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("text", ["2026-11-27", "12", "true", "1e3", "'2026-11-27'", '"2026-11-27"', "a b"])
def test_a_bare_value_of_a_string_is_a_string(text: str) -> None:
    assert load_config("srcnn_pnn", [f"output.uri={text}"]).output.uri == text.strip("'\"")


def test_a_byte_order_mark_is_no_part_of_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf[train]\r\nepochs = 3\r\n")
    assert load_config(str(path)).train.epochs == 3


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'srcnn_pnn'"):
        load_config("srcnn_pn")


def test_broken_toml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[train\nepochs = 1")
    with pytest.raises(UserError, match=r"broken\.toml is not valid TOML"):
        load_config(str(path))


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.toml' cannot be read as text in UTF-8"):
        load_config(str(path))


def test_local_paths_are_made_absolute_and_stores_left_alone(tmp_path: Path) -> None:
    config = load_config("srcnn_pnn", ["data.uri=s3://bucket/data", "output.uri=~/runs/x"])
    absolute = config.with_absolute_uris(tmp_path)
    assert absolute.data.uri == "s3://bucket/data"
    assert absolute.output.uri == str(Path.home() / "runs/x")
    here = load_config("srcnn_pnn", ["output.uri=runs/x"]).with_absolute_uris(tmp_path)
    assert here.output.uri == str(tmp_path / "runs/x")
    assert here.data.uri == ""
