"""All scalars of runs in one file, for pandas, DuckDB or a spreadsheet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import csv, parquet

from pipeline.monitor.curves import Curves
from pipeline.monitor.discover import EVENTS, Discovery, check_name
from pipeline.monitor.feed import Feed, restarted
from pipeline.reporting.events import AGGREGATE
from pipeline.reporting.tags import shown
from sharding.errors import UserError
from sharding.run.named_file import check_file
from sharding.scratch import scratch_folder
from sharding.storage import LocalStorage, Storage

logger = logging.getLogger(__name__)

SCHEMA = pyarrow.schema(
    [
        ("run", pyarrow.string()),
        ("statistic", pyarrow.string()),
        ("tag", pyarrow.string()),
        ("step", pyarrow.int64()),
        ("seconds", pyarrow.float64()),
        ("value", pyarrow.float64()),
    ]
)
"""Columns: ``statistic`` is ``all`` ranks' one value, ``min``, ``max``, ``p95``, or a rank; seconds are since 1970."""
_WRITERS: Mapping[str, Callable[[str, pyarrow.Schema], Any]] = {
    ".csv": csv.CSVWriter,
    ".parquet": parquet.ParquetWriter,
}
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""First characters by which a spreadsheet takes the text of a cell for a formula."""
_HEADER = ",".join(f'"{name}"' for name in SCHEMA.names)


def export(uris: Sequence[str], path: Path) -> int:
    """Write all scalars of the runs to a .csv or .parquet file, a row for each value; return the number of rows.

    Args:
        uris: Runs, or places above runs.
        path: The file; one that this function wrote is replaced.

    Raises:
        UserError: Another suffix, a file that is not ours, no run, or a store that does not answer.
    """
    if path.suffix not in _WRITERS:
        raise UserError(f"--export {path} ends in neither .csv nor .parquet: give a name that does")
    check_file("--export", path, _is_export)
    discovery = Discovery(uris)
    with ThreadPoolExecutor() as pool:
        runs = discovery.look(pool)
    if not runs:
        raise UserError(f"no run is in {discovery.places}: name a run folder, or a folder or prefix above runs")
    rows = 0
    with scratch_folder("export") as folder:
        written = folder / path.name
        with _WRITERS[path.suffix](str(written), SCHEMA) as writer:
            for run in runs:
                events = run.storage.child(EVENTS)
                for name in events.folders():
                    try:
                        check_name(name, events.uri)
                    except UserError as error:
                        logger.warning("not exported: %s", error)
                        continue
                    key = f"{EVENTS}/{name}"
                    rank = "" if key == AGGREGATE else name
                    table = _table(run.name, rank, run.storage.child(key), path.suffix == ".csv")
                    writer.write_table(table)
                    rows += table.num_rows
        LocalStorage(path.absolute().parent).upload(path.name, written)
    return rows


def _table(run: str, rank: str, folder: Storage, plain: bool) -> pyarrow.Table:
    """Return the rows of an events folder, of one rank or with the empty name of all.

    With ``plain`` an apostrophe is before each text that a spreadsheet would compute: names of runs and tags may come
    from somebody else, and a formula can send what a sheet holds.
    """
    curves = Curves()
    for event in Feed(folder).events():
        first_void = restarted(event)
        if first_void is not None:
            curves.drop(first_void)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                place = shown(value.tag)
                curves.add(f"{rank or place.statistic} {place.tag}", event.step, event.wall_time, value.simple_value)
    tables = []
    for key, curve in sorted(curves.by_key.items()):
        statistic, _, tag = key.partition(" ")
        texts = [f"'{text}" if plain and text.startswith(_FORMULA_STARTS) else text for text in (run, statistic, tag)]
        names = [pyarrow.repeat(text, len(curve.steps)) for text in texts]
        numbers = [pyarrow.array(part) for part in (curve.steps, curve.seconds, curve.values)]
        tables.append(pyarrow.table([*names, *numbers], schema=SCHEMA))
    return pyarrow.concat_tables([SCHEMA.empty_table(), *tables])


def _is_export(path: Path) -> bool:
    try:
        if path.suffix == ".parquet":
            return bool(parquet.read_schema(path).equals(SCHEMA))
        with path.open(encoding="utf-8") as file:
            return file.readline(len(_HEADER) + 1).rstrip("\n") == _HEADER
    except (OSError, ValueError, pyarrow.ArrowException):
        return False
