"""Slurm: a batch script that starts Ray on its nodes, trains, and is queued again before its time ends."""

from __future__ import annotations

import math
import shlex
import string
from importlib import resources

from cluster.deploy.spec import DeploySpec
from cluster.deploy.text import header
from cluster.jobs.submit import JOB_FILE, TRAIN_DRIVER

_TEMPLATE = "slurm.sh.in"


class _Template(string.Template):
    """Template whose placeholders are ``@{name}``: the shell's own begin with a dollar sign."""

    delimiter = "@"


def batch_script(spec: DeploySpec) -> str:
    """Return the script for `sbatch`.

    Raises:
        UserError: Like `DeploySpec.request`.
    """
    workers, limits = spec.workers, spec.limits
    template = _Template((resources.files("cluster.deploy") / _TEMPLATE).read_text(encoding="utf-8"))
    return template.substitute(
        header=header(
            f"Costs: {spec.cost()}",
            "Exposes: Ray's ports to whoever reaches the nodes and has its token, which is made at each start and is "
            "readable by the user alone; unencrypted. Dashboard and job server listen on the first node's loopback "
            "address alone. This file holds no secret.",
            f"In this folder, on a file system that all nodes see: sbatch slurm.sh (it reads {JOB_FILE} beside it).",
        ),
        name=spec.name,
        nodes=workers.nodes,
        cpus=workers.cpus * workers.per_node,
        gpus=workers.gpus * workers.per_node,
        memory_gib=workers.memory_gib * workers.per_node + spec.head.memory_gib,
        minutes=math.ceil(limits.seconds / 60),
        grace_seconds=limits.grace_seconds,
        retries=limits.retries,
        directives="".join(f"#SBATCH --{directive}\n" for directive in _directives(spec)),
        exports="".join(f"export {line}\n" for line in _exports(spec)),
        container=_container(spec),
        driver=TRAIN_DRIVER,
        job_file=JOB_FILE,
    )


def _directives(spec: DeploySpec) -> list[str]:
    gpus = spec.workers.gpus * spec.workers.per_node
    chosen = {
        f"gpus-per-node={gpus}": gpus,
        f"partition={spec.slurm.partition}": spec.slurm.partition,
        f"account={spec.slurm.account}": spec.slurm.account,
        "exclusive": spec.slurm.exclusive,
    }
    return [directive for directive, given in chosen.items() if given]


def _exports(spec: DeploySpec) -> list[str]:
    lines = [f"{name}={shlex.quote(value)}" for name, value in spec.request().environment.items()]
    if path := spec.storage.credentials_file:
        lines.append(f"AWS_SHARED_CREDENTIALS_FILE={path}")  # Unquoted: the shell expands ~.
    if spec.slurm.environment:
        lines.append(f"PATH={spec.slurm.environment}/bin:$PATH")
    return lines


def _container(spec: DeploySpec) -> str:
    if not spec.slurm.container:
        return ""
    gpus = "--nv " if spec.workers.gpus else ""
    return f'apptainer exec {gpus}--bind "$SLURM_SUBMIT_DIR" {spec.slurm.container} '
