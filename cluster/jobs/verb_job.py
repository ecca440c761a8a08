"""Verbs as tasks of a Ray cluster: the driver (``python -m cluster.jobs.verb_job VERB FILE``) and its tasks.

`shard` builds a shard a task, `predict` fuses an AOI, `evaluate` scores one. A task opens weights and data by itself;
a worker keeps them for the next task of the same job.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import pipeline.cli
import sharding.cli
from cluster.jobs.tasks import on_ray
from cluster.logs import configure_logging
from pipeline.jobs import EvaluateJob, PredictJob
from sharding.errors import UserError
from sharding.files import read_text
from sharding.run.job import ShardJob
from sharding.terminal import say

if TYPE_CHECKING:
    from pipeline.evaluation.evaluate import EvaluateOptions, Job
    from pipeline.evaluation.scoring import Found
    from pipeline.prediction.predict import Outcome, Predictor

NAME_STEP = "name the checkpoint's step (--checkpoint STEP)"
AGAIN = "start the same command again on nodes with more memory"


def shard(text: str) -> int:
    """Run `shard` on the cluster."""
    from sharding.run.build import build_shard  # needs rasterio, and other verbs must run without it

    job = ShardJob.from_json(text)
    remedy = "shard again with fewer --workers; finished shards are kept"
    return sharding.cli.run_shard(job, lambda tasks: on_ray(build_shard, tasks, remedy, job.workers))


def predict(text: str) -> int:
    """Run `predict` on the cluster."""
    remedy = f"{AGAIN}; finished AOIs are kept"
    return pipeline.cli.run_predict(
        PredictJob.from_json(text),
        lambda predictor, aois: on_ray(partial(_predict_aoi, text, predictor.fusion.digest), aois, remedy),
    )


def evaluate(text: str) -> int:
    """Run `evaluate` on the cluster."""

    def spread(number: int, job: Job, aois: int) -> Iterable[Found]:
        return on_ray(partial(_score_aoi, text, number, _inputs(job), aois), range(aois), AGAIN)

    return pipeline.cli.run_evaluate(EvaluateJob.from_json(text), spread)


VERBS: Mapping[str, Callable[[str], int]] = {"shard": shard, "predict": predict, "evaluate": evaluate}


def _predict_aoi(text: str, weights: str, aoi: str) -> Outcome:
    """Fuse an AOI with the weights that the driver has found."""
    predictor = _predictor(text)
    if predictor.fusion.digest != weights:
        raise UserError(f"the weights have changed meanwhile: {NAME_STEP}, and start the command again")
    return predictor.predict_one(aoi)


@lru_cache(maxsize=1)
def _predictor(text: str) -> Predictor:
    from pipeline.prediction.predict import open_job  # slow: imports torch

    return open_job(PredictJob.from_json(text))


def _inputs(job: Job) -> tuple[str, str]:
    """Return which weights and which state of the dataset a job has found."""
    return job.name, job.dataset.index.digest


def _score_aoi(text: str, number: int, inputs: tuple[str, str], aois: int, aoi: int) -> Found:
    """Score an AOI with the weights and the dataset that the driver has found."""
    from pipeline.evaluation.evaluate import part  # slow: imports torch

    options, jobs = _evaluation(text)
    if _inputs(jobs[number]) != inputs:
        raise UserError(f"the weights or the dataset have changed meanwhile: {NAME_STEP}, and start the command again")
    return part(jobs[number], options, aoi, aois)


@lru_cache(maxsize=1)
def _evaluation(text: str) -> tuple[EvaluateOptions, list[Job]]:
    from pipeline.evaluation.command import open_jobs, options_of  # slow: imports torch

    job = EvaluateJob.from_json(text)
    options = options_of(job)
    return options, open_jobs(job, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job in a file and return its exit status: 0, 2 for a user's mistake."""
    verb, path = sys.argv[1:] if arguments is None else arguments
    configure_logging()
    import ray  # Ray is slow to import

    try:
        text = read_text("the job's file", path)
        ray.init(address="auto", logging_level=logging.WARNING)
        return VERBS[verb](text)
    except UserError as error:
        say(f"satfusion: error: {error}", sys.stderr)
        return 2


if __name__ == "__main__":
    # Under the module's own name, so that workers import the functions and their caches instead of getting a copy.
    from cluster.jobs import verb_job

    sys.exit(verb_job.main())
