"""A sweep from start to end: what is done is kept, what is not is run, and the table is written after each run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cluster.sweep.cell import Result, read_result
from cluster.sweep.plan import SweepJob
from cluster.sweep.table import PAGE_START, TABLE_START, as_csv, as_markdown, rows
from pipeline.config import RunConfig
from sharding.errors import UserError
from sharding.storage import NotFoundError, Storage, open_storage
from sharding.storage.lock import Lock
from sharding.terminal import say

logger = logging.getLogger(__name__)

PAGE, TABLE, MARK = "sweep.md", "sweep.csv", "sweep-plan.json"
"""Files in the sweep's folder; the last one, the plan, is written first, and marks the others as ours."""
_LARGEST_PLAN = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """End of a run."""

    cell: RunConfig
    """Its configuration."""
    failure: str
    """Why it failed; empty if it did not."""


Runner = Callable[[Sequence[RunConfig]], Iterator[Outcome]]


def run_sweep(job: SweepJob, runner: Runner) -> int:
    """Run what is not done of a sweep, write its table and print it; return 1 if a run failed, else 0.

    Args:
        job: Configuration and options.
        runner: Function that trains runs and yields how each ended.

    Raises:
        UserError: The dataset does not fit a model, or the folder holds another sweep or other files.
    """
    # Slow: they import torch.
    from pipeline.data import ChipDataset
    from pipeline.training.resume import refuse_mixed

    cells = job.cells()
    config = RunConfig.from_dict(job.config)
    dataset = ChipDataset(config.data.uri, "train", config.data)
    for cell in cells:
        dataset.check_fits(cell.model)
    place = open_storage(config.output.uri)
    with Lock(place, "sweep"):
        _refuse_foreign(place)
        kept = ((cell.output.uri, _done(cell, dataset.index.digest, job)) for cell in cells)
        results = {uri: found for uri, found in kept if found is not None}
        missing = [cell for cell in cells if cell.output.uri not in results]
        for cell in missing:
            refuse_mixed(open_storage(cell.output.uri), cell, dataset.index.digest)
        say(f"{len(cells)} runs, {len(results)} of them done, in {place.uri}")
        if missing or not place.exists(MARK):
            place.write(MARK, job.to_json().encode())
        failed: dict[str, str] = {}
        for outcome in runner(missing) if missing else ():
            uri = outcome.cell.output.uri
            if outcome.failure:
                failed[uri] = " ".join(outcome.failure.split())
            elif found := read_result(open_storage(uri)):
                results[uri] = found
            say(f"{len(results)} of {len(cells)} runs done, {len(failed)} failed: {uri} {failed.get(uri, 'is done')}")
            _write(place, cells, results, job, failed)
        page = _write(place, cells, results, job, failed)
    for line in page.splitlines():
        if line.startswith("|"):
            say(line)
    say(f"written to {place.uri}: {PAGE}, {TABLE}")
    return 1 if failed else 0


def _write(
    place: Storage, cells: Sequence[RunConfig], results: dict[str, Result], job: SweepJob, failed: dict[str, str]
) -> str:
    """Write the table where it changed, and return its page."""
    table = rows(cells, results)
    texts = {TABLE: as_csv(table), PAGE: as_markdown(table, cells, job.options.split, failed)}
    for name, text in texts.items():
        if not place.exists(name) or place.read(name) != text.encode():
            place.write(name, text.encode())
    return texts[PAGE]


def _done(cell: RunConfig, index_digest: str, job: SweepJob) -> Result | None:
    """Return the figures of a run that is done.

    Raises:
        UserError: They are those of another configuration or dataset.
    """
    uri = cell.output.uri
    found = read_result(open_storage(uri))
    if found is not None and not found.is_of(cell, index_digest, job.options.split):
        raise UserError(
            f"{uri} holds the figures of another configuration, dataset or split: name another output.uri, or give the"
            " same ones to keep what is done"
        )
    return found


def _refuse_foreign(place: Storage) -> None:
    """Refuse files that no sweep wrote: a plan of another schema, and a page or table that begins differently.

    Raises:
        UserError: There is one; it is named.
    """
    begun = _holds_plan(place)
    for name, start in ((PAGE, PAGE_START.encode()), (TABLE, TABLE_START.encode())):
        found = _start_of(place, name, len(start))
        if found is not None and not (begun and found == start):
            raise _foreign(place, name, "" if begun else f" and no {MARK}")


def _holds_plan(place: Storage) -> bool:
    """Return True if there is a plan, False if there is none; refuse another file of its name."""
    text = _start_of(place, MARK, _LARGEST_PLAN)
    if text is None:
        return False
    try:
        SweepJob.from_json(text.decode())
    except (UserError, ValueError):
        raise _foreign(place, MARK) from None
    return True


def _start_of(place: Storage, name: str, length: int) -> bytes | None:
    try:
        return place.read_range(name, 0, length)
    except NotFoundError:
        return None


def _foreign(place: Storage, name: str, reason: str = "") -> UserError:
    return UserError(
        f"{place.uri} holds {name!r}{reason}: no sweep wrote it, and nothing was changed; move it away, or name another"
        " output.uri"
    )
