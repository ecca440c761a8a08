"""Command-line verbs of one run: train, evaluate, predict, export, monitor, models."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.jobs import EvaluateJob, PredictJob
from pipeline.signals import STOPPED_STATUS, stop_on_sigterm
from pipeline.training.device_memory import out_of_memory
from sharding.arguments import add_path, read_options
from sharding.errors import UserError
from sharding.schema import check_range
from sharding.storage import open_storage
from sharding.terminal import say

if TYPE_CHECKING:
    from pipeline.evaluation.command import Spread
    from pipeline.prediction.predict import Runner


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``train``, ``evaluate``, ``predict``, ``export``, ``monitor`` and ``models`` to the command."""
    _add_train(verbs)
    _add_evaluate(verbs)
    _add_predict(verbs)
    _add_export(verbs)
    _add_monitor(verbs)
    _add_models(verbs)


def _add_train(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    train = verbs.add_parser(
        "train", help="train in this process group", description="Train alone, or in each process under torchrun."
    )
    add_config_arguments(train)
    train.set_defaults(run=_train)


def _add_evaluate(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    evaluate = verbs.add_parser(
        "evaluate",
        help="measure a checkpoint on a split",
        description="Print metrics beside baselines, with intervals; write CSVs and panels to the run. Under "
        "torchrun the ranks share the chips.",
    )
    _add_run_or_file(evaluate)
    evaluate.add_argument("--split", default="test", choices=("train", "val", "test"))
    evaluate.add_argument("--data", default="", metavar="URI", help="dataset to evaluate on (default: the run's own)")
    evaluate.add_argument(
        "--output",
        metavar="URI",
        help="folder for the results (default: evaluation for FILE, the run folder for RUN)",
    )
    evaluate.add_argument(
        "--simulate",
        choices=("off", "shifts", "sensor"),
        help="simulate revisits from the target, for FILE (default off)",
    )
    evaluate.add_argument("--registration", default="centred", choices=("centred", "published"))
    evaluate.add_argument("--panels", type=int, default=9, metavar="N", help="chips drawn as PNG (default 9)")
    evaluate.add_argument(
        "--compare", nargs=2, metavar="RUN", help="score two runs on the same chips and print their differences"
    )
    evaluate.add_argument(
        "--perturb",
        nargs="+",
        default=(),
        choices=("noise", "blur", "shift", "revisits"),
        help="also score revisits that are perturbed in levels",
    )
    add_path(evaluate, "--classes", "FILE", "WorldStrat's split file, to score by land-cover class")
    text = "write a report with charts and pictures, one file that needs no other"
    add_path(evaluate, "--report", "FILE.html", text)
    evaluate.set_defaults(run=lambda args: run_evaluate(evaluate_job(args)))


def _add_monitor(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    monitor = verbs.add_parser(
        "monitor",
        help="show runs in TensorBoard",
        description="Serve TensorBoard on the runs in folders and prefixes, live: runs that begin later appear.",
    )
    monitor.add_argument("uris", nargs="+", metavar="URI", help="runs, or what lies above runs; local or s3://")
    monitor.add_argument("--host", default="127.0.0.1")
    monitor.add_argument("--port", type=int, default=6006)
    monitor.add_argument("--refresh", type=float, default=5.0, metavar="SECONDS", help="time between looks (default 5)")
    monitor.add_argument(
        "--once", action="store_true", help="print each run's last step and figures, and serve nothing"
    )
    add_path(monitor, "--export", "FILE", "write all scalars to FILE, .csv or .parquet, and serve nothing")
    monitor.set_defaults(run=_monitor)


def _add_models(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    models = verbs.add_parser(
        "models",
        help="list every model with its cost",
        description="List every encoder, head and pair with parameters, operations and activation memory for a chip. "
        "A dash means that a model, or its published form, does not support these options.",
    )
    for option, default, what in (
        ("revisits", 8, "revisits a sample"),
        ("bands", 3, "bands"),
        ("hidden", 128, "width of the encoder's features"),
        ("zoom", 2, "factor of the pixel shuffle"),
        ("lr-size", 50, "side of a revisit, px"),
        ("hr-size", 156, "side of PAN and of the result, px"),
    ):
        models.add_argument(f"--{option}", type=int, default=default, metavar="N", help=f"{what} (default {default})")
    models.add_argument("--markdown", action="store_true", help="print the page docs/models.md")
    models.set_defaults(run=_models)


def _add_predict(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    predict = verbs.add_parser(
        "predict",
        help="fuse whole scenes to GeoTIFFs",
        description="Fuse AOIs of a WorldStrat folder, of own GeoTIFFs or of a dataset; no target is needed. Each gets "
        "a Cloud-optimised GeoTIFF, a preview and a sidecar. The same command resumes after an interruption.",
    )
    _add_run_or_file(predict)
    _add_weights(predict)
    predict.add_argument(
        "--input",
        required=True,
        metavar="URI",
        help="folder with hr_dataset and lr_dataset, or with their zips; a scenes.toml, see docs/own-data.md; or a "
        "dataset, local or s3://",
    )
    predict.add_argument("--output", required=True, metavar="URI", help="local folder or s3://BUCKET/PREFIX")
    predict.add_argument("--aoi", nargs="+", default=(), metavar="NAME", help="fuse only these AOIs (default: all)")
    predict.add_argument("--split", choices=("train", "val", "test"), help="split of a dataset (default: all)")
    predict.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="default fp32")
    predict.add_argument(
        "--pixels",
        default="uint16",
        choices=("uint16", "float32"),
        help="uint16 in steps of 1e-4 reflectance, or float32 (default uint16)",
    )
    predict.add_argument("--overwrite", action="store_true", help="replace outputs of other weights or inputs")
    predict.set_defaults(run=lambda args: run_predict(predict_job(args)))


def _add_export(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = verbs.add_parser(
        "export",
        help="write weights for use without a run folder",
        description="Write the weights as safetensors, with their configuration and a model card. They load with "
        "torch, numpy, safetensors and the package `models`.",
    )
    export.add_argument("run_uri", metavar="RUN", help="run folder, local or s3://")
    export.add_argument("--checkpoint", default="best", metavar="best|last|STEP", help="default: best")
    _add_weights(export)
    export.add_argument("--to", required=True, metavar="DIR", help="folder, local or s3://")
    export.add_argument("--program", action="store_true", help="also write model.pt2, a program of torch.export")
    export.add_argument("--overwrite", action="store_true", help="replace another exported model, and an edited card")
    export.set_defaults(run=_export)


def _add_run_or_file(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run_uri", nargs="?", metavar="RUN", help="run folder, local or s3://")
    verb.add_argument("--checkpoint", metavar="best|last|STEP", help="default: best")
    add_path(verb, "--published-checkpoint", "FILE", "weights of the published code, instead of a RUN")
    verb.add_argument("--model", metavar="ENCODER+HEAD", help="model of FILE, for example trnet_pan+u2net")


def _add_weights(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--weights",
        choices=("raw", "ema"),
        help="weights as trained, or their moving average of a run with train.ema (default raw)",
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the configuration and its overrides to a verb; ``train`` and ``submit`` share these arguments."""
    parser.add_argument("config", metavar="CONFIG", help="TOML file, or the name of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example train.epochs=5")


def _train(args: argparse.Namespace) -> int:
    from pipeline.config import load_config  # slow: imports torch

    # Absolute, because the run folder records these paths and may be read from other folders.
    config = load_config(args.config, args.overrides).with_absolute_uris(Path.cwd())
    from pipeline.training.loop import run_training  # slow: imports torch
    from pipeline.world import leave_world

    try:
        with stop_on_sigterm() as stop:
            result = run_training(config, stop=stop)
    except RuntimeError as error:
        if not (words := out_of_memory(error)):
            raise
        rank = os.environ.get("RANK", "0")
        say(f"satfusion: error: rank {rank} {words}", sys.stderr)
        return 1  # as a job on a cluster ends; not 2, since another program may have taken the memory
    finally:
        leave_world()
    if result.stopped:
        say(f"stopped at step {result.step}, as SIGTERM asked; the same command resumes there")
        return STOPPED_STATUS
    return 0


def evaluate_job(args: argparse.Namespace) -> EvaluateJob:
    """Return the arguments of `evaluate` as typed options.

    Raises:
        UserError: For an invalid argument; it names the argument.
    """
    return read_options(EvaluateJob, vars(args))


def run_evaluate(job: EvaluateJob, spread: Spread | None = None) -> int:
    """Run `evaluate`; ``spread`` scores AOIs in place of this process group."""
    from pipeline.evaluation import command  # slow: imports torch

    return command.evaluate(job, spread)


def predict_job(args: argparse.Namespace) -> PredictJob:
    """Return the arguments of `predict` as typed options.

    Raises:
        UserError: For an invalid argument; it names the argument.
    """
    return read_options(PredictJob, vars(args))


def run_predict(job: PredictJob, runner: Runner | None = None) -> int:
    """Run `predict`; ``runner`` fuses scenes in place of this process."""
    # Before anything is loaded: a place that cannot be written to costs no work.
    open_storage(job.output).check_writable()
    from pipeline.prediction import predict  # slow: imports torch and rasterio

    for line in predict.open_job(job).predict(runner).lines():
        say(line)
    return 0


def _export(args: argparse.Namespace) -> int:
    from pipeline.prediction.export import export_run  # slow: imports torch

    folder, names = export_run(
        args.run_uri,
        args.checkpoint,
        args.to,
        weights=args.weights or "raw",
        program=args.program,
        overwrite=args.overwrite,
    )
    say(f"written to {folder}: {', '.join(names)}")
    return 0


def _monitor(args: argparse.Namespace) -> int:
    check_range("--refresh", args.refresh, 0.01, 10**6, " seconds")
    check_range("--port", args.port, 0, 65535)
    from pipeline.monitor import serve  # slow: imports TensorBoard

    if args.export is not None:
        from pipeline.monitor.export import export  # slow: imports pyarrow

        say(f"{export(args.uris, args.export):,} values written to {args.export}")
    if args.once:
        return serve.list_once(args.uris)
    return 0 if args.export is not None else serve.monitor(args.uris, args.host, args.port, args.refresh)


def _models(args: argparse.Namespace) -> int:
    from models.config import ModelConfig  # slow: imports torch
    from pipeline.evaluation import catalogue

    check_range("--lr-size", args.lr_size, 1, 10_000, " px")
    check_range("--hr-size", args.hr_size, 1, 10_000, " px")
    try:
        like = ModelConfig(bands=args.bands, revisits=args.revisits, hidden=args.hidden, zoom=args.zoom)
        entries = catalogue.catalogue(like, args.lr_size, args.hr_size)
        if args.markdown:
            print(catalogue.as_markdown(list(entries), args.lr_size, args.hr_size), end="")
            return 0
        print(catalogue.as_text(catalogue.HEADINGS))
        for entry in entries:
            print(catalogue.as_text(catalogue.cells(entry)), flush=True)
    except ValueError as error:
        raise UserError(str(error)) from None
    return 0
