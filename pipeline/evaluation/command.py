"""The verb ``evaluate``: its arguments to an evaluation or a comparison, and their output."""

from __future__ import annotations

import argparse

import torch.distributed as dist

from pipeline.evaluation.classes import read_classes
from pipeline.evaluation.compare import compare_runs
from pipeline.evaluation.evaluate import EvaluateOptions, Job, measure, published_job, run_job
from pipeline.evaluation.report import comparison_page, evaluation_page
from pipeline.world import current_world, leave_world
from sharding.errors import UserError
from sharding.run.named_file import check_page, write_file
from sharding.terminal import say


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate a run or a published file, or compare two runs, and print the result; return the exit status.

    Raises:
        UserError: Options that exclude each other, or an input that cannot be used.
    """
    if args.report:
        check_page("--report", args.report)
    options = EvaluateOptions(
        args.registration,
        args.panels,
        tuple(dict.fromkeys(args.perturb)),
        read_classes(args.classes) if args.classes else {},
    )
    joined = dist.is_initialized()  # the caller's group stays
    try:
        return _compare(args, options) if args.compare else _measure(args, options)
    finally:
        if not joined:
            leave_world()


def _measure(args: argparse.Namespace, options: EvaluateOptions) -> int:
    job = _published_job(args, options) if args.published_checkpoint else _run_job(args, options)
    result = measure(job, options)
    if current_world().is_main:
        print(result.table())
        say(f"written to {result.folder}: chips.csv, aois.csv, groups.csv, panel-*.png")
        if args.report:
            _write(args, evaluation_page(result, job.picture))
    return 0


def _compare(args: argparse.Namespace, options: EvaluateOptions) -> int:
    for name, value in (("RUN", args.run_uri), ("--published-checkpoint", args.published_checkpoint)):
        if value is not None:
            raise UserError(f"--compare names both runs: drop {name} {value}")
    for name in ("model", "simulate", "perturb"):
        if getattr(args, name):
            raise UserError(f"--{name} has no part in a comparison of two runs: drop it")
    first, second = args.compare
    found = compare_runs(
        (first, second),
        args.split,
        args.checkpoint or "best",
        data_uri=args.data,
        output=args.output or "",
        options=options,
    )
    if current_world().is_main:
        print(found.table())
        say(f"written to {found.first.folder} and {found.second.folder}")
        if args.report:
            _write(args, comparison_page(found))
    return 0


def _write(args: argparse.Namespace, page: bytes) -> None:
    write_file("--report", args.report, page)
    say(f"report: {args.report}")


def _run_job(args: argparse.Namespace, options: EvaluateOptions) -> Job:
    if args.run_uri is None:
        raise UserError("evaluate needs the run folder RUN, or --published-checkpoint FILE, or --compare RUN RUN")
    for option in ("model", "simulate"):
        if getattr(args, option) is not None:
            raise UserError(f"--{option} is only for --published-checkpoint: a run has its own")
    return run_job(
        args.run_uri,
        args.split,
        args.checkpoint or "best",
        data_uri=args.data,
        output=args.output or "",
        options=options,
    )


def _published_job(args: argparse.Namespace, options: EvaluateOptions) -> Job:
    refuse_both(args)
    for option in ("model", "data"):
        if not getattr(args, option):
            raise UserError(f"--published-checkpoint needs --{option} {'ENCODER+HEAD' if option == 'model' else 'URI'}")
    return published_job(
        args.published_checkpoint,
        args.model,
        args.data,
        args.split,
        args.output or "evaluation",
        simulate=args.simulate or "off",
        options=options,
    )


def refuse_both(args: argparse.Namespace) -> None:
    """Refuse a run or its checkpoint beside a published file.

    Raises:
        UserError: Both are given.
    """
    if args.run_uri is not None or args.checkpoint is not None:
        given = "--checkpoint" if args.run_uri is None else f"RUN {args.run_uri}"
        raise UserError(f"{given} and --published-checkpoint exclude each other: a published file is not a run")
