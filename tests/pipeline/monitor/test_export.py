"""Exports of all scalars: their rows, and the files that they may replace."""

from __future__ import annotations

import csv
import logging
import os
import shutil
from pathlib import Path

import pytest
from pyarrow import parquet

from cluster.cli import main
from pipeline.monitor.export import export
from tests.pipeline.monitor.runs import write_run


def rows(path: Path) -> list[dict[str, object]]:
    if path.suffix == ".parquet":
        return list(parquet.read_table(path).to_pylist())
    with path.open(newline="") as file:
        return [
            {**row, "step": int(row["step"]), "seconds": float(row["seconds"]), "value": float(row["value"])}
            for row in csv.DictReader(file)
        ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_row_for_each_value(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(f"{tmp_path}/runs/x,y", [1, 2, 3], {2: [1.0, 3.0]}, ranks=2)
    write_run(f"{tmp_path}/runs/x,y", [3], {3: [5.0]})
    file = tmp_path / f"all{suffix}"
    assert main(["monitor", f"{tmp_path}/runs", "--export", str(file), "--once"]) == 0
    written = rows(file)
    shown = capsys.readouterr().out
    assert f"{len(written):,} values written to {file}" in shown
    assert "x,y" in shown.splitlines()[-1]
    assert {row["run"] for row in written} == {"x,y"}
    losses = {(row["statistic"], row["step"]): row["value"] for row in written if row["tag"] == "loss/train"}
    assert [losses[key] for key in (("all", 2), ("min", 2), ("max", 2), ("rank-1", 2), ("all", 3))] == [2, 1, 3, 3, 5]
    assert ("rank-0", 3) in losses
    assert {row["statistic"] for row in written} == {"all", "min", "max", "p95", "rank-0", "rank-1"}
    # A file of ours is replaced, any other one is not.
    assert main(["monitor", f"{tmp_path}/runs", "--export", str(file)]) == 0
    file.write_text("mine")
    capsys.readouterr()
    assert main(["monitor", f"{tmp_path}/runs", "--export", str(file)]) == 2
    assert f"--export {file} exists, and this program did not write it" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_no_text_of_a_csv_is_a_formula(tmp_path: Path) -> None:
    hostile = ("=1+1", "+1", "-1", "@SUM(1)")
    for name in (*hostile, "a=1"):
        write_run(f"{tmp_path}/runs/{name}", [1])
    export([str(tmp_path / "runs")], tmp_path / "all.csv")
    assert {row["run"] for row in rows(tmp_path / "all.csv")} == {*(f"'{name}" for name in hostile), "a=1"}
    # No spreadsheet computes what a Parquet file holds: names stay as they are.
    export([str(tmp_path / "runs")], tmp_path / "all.parquet")
    assert {row["run"] for row in rows(tmp_path / "all.parquet")} == {*hostile, "a=1"}


def test_folders_beside_the_ranks_with_odd_names_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_run(f"{tmp_path}/runs/good", [1])
    aggregate = tmp_path / "runs/good/events/aggregate"
    for odd in (os.fsdecode(b"caf\xe9"), "\x1b[2J"):
        shutil.copytree(aggregate, aggregate.with_name(odd))
    file = tmp_path / "all.parquet"
    with caplog.at_level(logging.WARNING):
        assert export([str(tmp_path / "runs")], file) > 0
    assert {row["statistic"] for row in rows(file)} == {"all", "min", "max", "p95", "rank-0"}
    assert [line.split(" ")[:3] for line in caplog.messages] == [
        ["not", "exported:", "'\\x1b[2J'"],
        ["not", "exported:", "'caf\\udce9'"],
    ]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--export", "{tmp}/all.txt"], "neither .csv nor .parquet"),
        (["--export", "{tmp}/no/all.csv"], "no existing folder"),
        (["--export", "{tmp}/all.csv"], "no run is in {tmp}"),
        (["--once"], "no run is in {tmp}"),
    ],
)
def test_refusals(arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["monitor", str(tmp_path), *(text.format(tmp=tmp_path) for text in arguments)]) == 2
    assert word.format(tmp=tmp_path) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
