"""The verb ``evaluate``: its job to an evaluation or a comparison, and their output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch.distributed as dist

from pipeline.evaluation.classes import read_classes
from pipeline.evaluation.compare import Comparison, comparison_jobs
from pipeline.evaluation.evaluate import EvaluateOptions, Job, measure, published_job, run_job
from pipeline.evaluation.report import comparison_page, evaluation_page
from pipeline.evaluation.scoring import Found
from pipeline.jobs import EvaluateJob
from pipeline.world import current_world, leave_world
from sharding.run.named_file import check_page, write_file
from sharding.terminal import say

Spread = Callable[[int, Job, int], Iterable[Found]]
"""Function from an evaluation, its number as in `open_jobs`, and its number of AOIs to the scores of each AOI."""


def evaluate(job: EvaluateJob, spread: Spread | None = None) -> int:
    """Evaluate a run or a published file, or compare two runs, and print the result; return the exit status.

    Args:
        job: The options.
        spread: Function that scores AOIs elsewhere (`score_aoi`); None scores them in this process group.

    Raises:
        UserError: An input that cannot be used.
    """
    if job.report:
        check_page("--report", job.report)
    joined = dist.is_initialized()  # the caller's group stays
    try:
        options = options_of(job)
        opened = open_jobs(job, options)
        results = [
            measure(one, options, partial(spread, number, one) if spread else None) for number, one in enumerate(opened)
        ]
        if not current_world().is_main:
            return 0
        if job.compare:
            found = Comparison(results[0], results[1], job.compare)
            _print(job, found.table(), f"{results[0].folder} and {results[1].folder}", lambda: comparison_page(found))
        else:
            (result,) = results
            written = f"{result.folder}: chips.csv, aois.csv, groups.csv, panel-*.png"
            _print(job, result.table(), written, lambda: evaluation_page(result, opened[0].picture))
        return 0
    finally:
        if not joined:
            leave_world()


def options_of(job: EvaluateJob) -> EvaluateOptions:
    """Return the options of a job's evaluations."""
    classes = read_classes(job.classes) if job.classes else {}
    return EvaluateOptions(job.registration, job.panels, tuple(dict.fromkeys(job.perturb)), classes)


def open_jobs(job: EvaluateJob, options: EvaluateOptions) -> list[Job]:
    """Load the networks and open the split: of one evaluation, or of the two of a comparison.

    Raises:
        UserError: No such run, file or dataset, or runs that cannot be compared.
    """
    which, output = job.checkpoint or "best", job.output or ""
    if job.compare:
        return comparison_jobs(job.compare, job.split, which, data_uri=job.data, output=output, options=options)
    if job.published_checkpoint is None:
        assert job.run_uri is not None
        return [run_job(job.run_uri, job.split, which, data_uri=job.data, output=output, options=options)]
    assert job.model is not None
    path, simulate = job.published_checkpoint, job.simulate or "off"
    return [published_job(path, job.model, job.data, job.split, output, simulate=simulate, options=options)]


def _print(job: EvaluateJob, table: str, written: str, page: Callable[[], bytes]) -> None:
    print(table)
    say(f"written to {written}")
    if job.report:
        write_file("--report", job.report, page())
        say(f"report: {job.report}")
