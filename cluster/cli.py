"""The command ``satfusion``: the verbs of sharding and pipeline, and the verbs of the cluster."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pipeline.cli
import sharding.cli
from cluster import __version__
from cluster.jobs.cli import add_job_verbs
from cluster.jobs.placement import Placement
from cluster.logs import configure_logging
from cluster.output import BROKEN_PIPE, ReaderGoneError, end, guard_output
from cluster.sweep.options import SweepOptions
from pipeline.signals import sigterm_as_interrupt
from sharding.arguments import add_options, add_path, read_options
from sharding.errors import UserError
from sharding.names import refuse_secrets
from sharding.storage import open_storage
from sharding.terminal import say

if TYPE_CHECKING:
    from cluster.local import nodes as local
    from pipeline.jobs import EvaluateJob, PredictJob
    from sharding.run.job import ShardJob

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a user error, 130 for Ctrl-C and SIGTERM."""
    arguments = sys.argv[1:] if argv is None else argv
    guard_output()
    try:
        refuse_secrets(arguments)  # before argparse, which repeats arguments that it does not recognise
        args = _parse(arguments)
        configure_logging(rank=int(os.environ.get("RANK", "0")))
        with sigterm_as_interrupt():
            status: int = args.run(args)
    except UserError as error:
        return end(2, f"satfusion: error: {error}")
    except KeyboardInterrupt:
        return end(_INTERRUPTED, "satfusion: interrupted")
    except (BrokenPipeError, ReaderGoneError):
        return end(BROKEN_PIPE)
    except SystemExit:  # argparse has printed the help, or what is wrong
        if end(0) == 2:  # standard output cannot be written
            return 2
        raise
    return end(status)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    _take_overrides(parser, args, rest)
    return args


def build_parser() -> argparse.ArgumentParser:
    """Build the command from the packages' verbs."""
    parser = argparse.ArgumentParser(
        prog="satfusion", description="Shard WorldStrat, train SatFusion on a Ray cluster, watch it, evaluate it."
    )
    parser.add_argument("--version", action="version", version=f"satfusion {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    sharding.cli.add_verbs(verbs)
    pipeline.cli.add_verbs(verbs)
    add_verbs(verbs)
    return parser


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``submit``, ``jobs``, ``sweep``, ``demo`` and others to the command, and ``--address`` to others."""
    for verb, run, sees in (
        ("shard", _shard, "--input"),
        ("predict", _predict, "the weights, --input and --output"),
        ("evaluate", _evaluate, "the weights and the dataset"),
    ):
        text = f"{verb} on a Ray cluster by its job server, http://HOST:8265; it sees {sees}"
        verbs.choices[verb].add_argument("--address", metavar="URL", help=text)
        verbs.choices[verb].set_defaults(run=run)
    _add_submit(verbs)
    _add_sweep(verbs)
    add_job_verbs(verbs)
    demo = verbs.add_parser(
        "demo",
        help="run all steps on this machine, in minutes",
        description="Start an S3 server and two Ray nodes, shard, train, evaluate, and stop everything it started. "
        "Exit status 1 unless the fused image's PSNR lies above both baselines'.",
    )
    demo.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the recipe demo")
    add_path(demo, "--output", "DIR", "default demo-output", default=Path("demo-output"))
    add_path(demo, "--worldstrat", "DIR", "real data (default: generated scenes)")
    demo.set_defaults(run=_demo)
    cluster = verbs.add_parser(
        "cluster",
        help="a local multi-node Ray cluster: up, status, down; deploy files for others: render",
        description="Run real Ray nodes on this machine, each on its own loopback address, or render deploy files.",
    )
    actions = cluster.add_subparsers(metavar="ACTION", required=True)
    up = actions.add_parser("up", help="start the nodes and the job server")
    up.add_argument("--nodes", type=int, default=2, metavar="N", help="Ray nodes (default 2)")
    up.add_argument("--cpus-per-node", type=int, metavar="C", help="default: this machine's CPUs divided by the nodes")
    up.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="default 0")
    up.add_argument(
        "--object-store-mb", type=int, default=200, metavar="MB", help="Ray's shared memory a node (default 200)"
    )
    up.set_defaults(run=_up)
    status = actions.add_parser("status", help="show the running nodes; exit status 1 unless every node is up")
    status.set_defaults(run=_status)
    down = actions.add_parser("down", help="stop exactly the processes that `up` started")
    down.set_defaults(run=_down)
    _add_render(actions)
    for action in (up, status, down):
        add_path(action, "--state", "DIR", "state folder, one per cluster")


def _add_render(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    render = actions.add_parser(
        "render",
        help="write deploy files for KubeRay, Slurm, AWS, Docker and Apptainer",
        description="Write the files that run a training elsewhere, from one short TOML file (docs/deploy.md).",
    )
    render.add_argument("file", type=Path, metavar="FILE", help="TOML file of the deployment")
    add_path(render, "--to", "DIR", "folder of the files", required=True)
    render.add_argument(
        "--target", action="append", metavar="TARGET", help="kuberay, slurm, docker, apptainer or aws; default all"
    )
    add_path(render, "--crds", "DIR", "compare with the custom resource definitions of a KubeRay release")
    render.set_defaults(run=_render)


def _add_submit(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    submit = verbs.add_parser(
        "submit",
        help="train on a Ray cluster",
        description="Send a training job to a Ray cluster, follow its log, and exit with the job's exit status.",
    )
    pipeline.cli.add_config_arguments(submit)
    submit.add_argument("--address", metavar="URL", help="Ray's job server, http://HOST:8265")
    add_options(submit, Placement)
    submit.add_argument("--dry-run", action="store_true", help="print what would be sent, and send nothing")
    submit.add_argument("--no-wait", action="store_true", help="print the job's id and how to follow it, and exit")
    submit.set_defaults(run=_submit)


def _add_sweep(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    sweep = verbs.add_parser(
        "sweep",
        help="train every pair of some encoders and heads, and write one table",
        description="Train and evaluate each pair with each seed, on a Ray cluster or on this machine, and write "
        "sweep.md and sweep.csv to output.uri. The same command again keeps what is done and runs the rest.",
    )
    pipeline.cli.add_config_arguments(sweep)
    sweep.add_argument("--address", metavar="URL", help="Ray's job server, http://HOST:8265 (default: this machine)")
    add_options(sweep, SweepOptions)
    sweep.set_defaults(run=_sweep)


def _take_overrides(parser: argparse.ArgumentParser, args: argparse.Namespace, rest: list[str]) -> None:
    """Add the overrides that follow a verb's options, which argparse does not consume."""
    if any(text.startswith("-") for text in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]


def _submit(args: argparse.Namespace) -> int:
    from cluster.jobs.dry_run import describe  # imports torch
    from cluster.jobs.server import how_to_follow
    from cluster.jobs.submit import already_sent, build_request, run, send
    from pipeline.config import load_config

    placement = read_options(Placement, vars(args))
    config = load_config(args.config, args.overrides)
    request = build_request(config, placement, os.environ, Path.cwd())
    if args.dry_run:
        print(describe(request, config.with_absolute_uris(Path.cwd()), placement))
        return 0
    if args.address is None:
        raise UserError("--address is missing: give the URL of Ray's job server, http://HOST:8265, or --dry-run")
    if not args.no_wait:
        return run(request, args.address, sys.stdout)
    job_id = already_sent(request, args.address) or send(request, args.address)
    say(job_id)
    say(how_to_follow(args.address, job_id))
    return 0


def _sweep(args: argparse.Namespace) -> int:
    """Sweep in processes of this machine, or as a job of a Ray cluster."""
    from cluster.sweep.plan import SweepJob  # slow: imports torch
    from pipeline.config import load_config

    options = read_options(SweepOptions, vars(args))
    config = load_config(args.config, args.overrides).with_absolute_uris(Path.cwd())
    job = SweepJob(config.to_dict(), options)
    job.cells()  # refuses pairs that cannot be built before anything is sent
    if args.address is None:
        from cluster.sweep.here import cells_here  # imports torch
        from cluster.sweep.run import run_sweep

        return run_sweep(job, cells_here(options.parallel, options.split))
    from cluster.jobs.submit import build_sweep_request, run  # Ray is slow to import

    return run(build_sweep_request(job, os.environ), args.address, sys.stdout)


def _shard(args: argparse.Namespace) -> int:
    """Shard in processes of this machine, or as a job of a Ray cluster."""
    job = sharding.cli.shard_job(args)  # refuses invalid options before anything is sent
    if args.address is None:
        return sharding.cli.run_shard(job)
    open_storage(job.output, job.storage)  # refuses invalid options too
    return _send(job, args.address)


def _predict(args: argparse.Namespace) -> int:
    """Predict in this process, or as a job of a Ray cluster."""
    job = pipeline.cli.predict_job(args)
    return pipeline.cli.run_predict(job) if args.address is None else _send(job, args.address)


def _evaluate(args: argparse.Namespace) -> int:
    """Evaluate in this process group, or as a job of a Ray cluster."""
    job = pipeline.cli.evaluate_job(args)
    return pipeline.cli.run_evaluate(job) if args.address is None else _send(job, args.address)


def _send(job: ShardJob | PredictJob | EvaluateJob, address: str) -> int:
    from cluster.jobs.submit import build_verb_request, run  # other verbs send nothing

    return run(build_verb_request(job, os.environ, Path.cwd()), address, sys.stdout)


def _demo(args: argparse.Namespace) -> int:
    from cluster.local.demo import run_demo  # other verbs do not use a local cluster

    return run_demo(args.output, args.worldstrat, args.overrides)


def _up(args: argparse.Namespace) -> int:
    from cluster.local import nodes as local  # other verbs do not use a local cluster

    options = local.NodeOptions(args.nodes, args.cpus_per_node, args.gpus_per_node, args.object_store_mb)
    cluster = local.up(options, args.state or local.default_state())
    print(f"{len(cluster.nodes)} Ray nodes are up: {', '.join(cluster.nodes)} ({_size(cluster)})")
    print(f"satfusion submit CONFIG --address {cluster.address} --workers {len(cluster.nodes)}")
    print(f"for Ray's own commands: export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={shlex.quote(cluster.token_file)}")
    return 0


def _status(args: argparse.Namespace) -> int:
    from cluster.local import nodes as local  # other verbs do not use a local cluster

    cluster = local.read_state(args.state or local.default_state())
    if cluster is None:
        print("no cluster is up")
        return 1
    alive = local.alive_nodes(cluster)
    print(f"job server {cluster.address}")
    for node in cluster.nodes:
        print(f"node {node}: {f'alive, {_size(cluster)}' if node in alive else 'does not answer'}")
    return 0 if set(cluster.nodes) <= set(alive) else 1


def _render(args: argparse.Namespace) -> int:
    # Other verbs render nothing.
    from cluster.deploy.render import TARGETS, render, write
    from cluster.deploy.spec import load_spec
    from pipeline.values import require_one_of

    for target in args.target or ():
        require_one_of("--target", target, list(TARGETS))
    texts = render(load_spec(args.file), args.target or list(TARGETS), args.crds)
    write(texts, args.to)
    for name in texts:
        print(args.to / name)
    return 0


def _down(args: argparse.Namespace) -> int:
    from cluster.local import nodes as local  # other verbs do not use a local cluster

    cluster = local.down(args.state or local.default_state())
    print("no cluster is up" if cluster is None else f"took down the {len(cluster.nodes)} nodes of {cluster.address}")
    return 0


def _size(cluster: local.LocalCluster) -> str:
    gpus = f" and {cluster.gpus_per_node} GPU" if cluster.gpus_per_node else ""
    return f"{cluster.cpus_per_node} CPU{gpus} each"


if __name__ == "__main__":
    sys.exit(main())
