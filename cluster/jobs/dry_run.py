"""What `satfusion submit --dry-run` prints: the request, the arithmetic of the batch and the resources."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from cluster.jobs.placement import Placement, worlds
from cluster.jobs.submit import JobRequest
from cluster.logs import PACKAGES
from pipeline.config import RunConfig
from pipeline.engines.deepspeed_config import deepspeed_config
from pipeline.order import BatchPlan

_SHOWN = 12


def describe(request: JobRequest, config: RunConfig, placement: Placement) -> str:
    """Return what would be sent, for a person to read: the resolved configuration last, as TOML.

    Args:
        request: Request of the job, as `build_request` returns it.
        config: Configuration with absolute paths, as in the request.
        placement: Ranks and their resources.
    """
    train = config.train
    sizes = worlds(placement, train.global_batch, train.micro_batch)
    plan = BatchPlan.create(train.global_batch, train.micro_batch, sizes[-1])
    total = {name: amount * sizes[-1] for name, amount in placement.resources.items()}
    elastic = {"ranks": f"{_numbers(sizes)}, the largest of these that fits"} if placement.elastic else {}
    rows = {
        "entrypoint": request.entrypoint,
        "code": f"the packages {', '.join(PACKAGES)} of this installation",
        **{f"environment {name}": value or '""' for name, value in request.environment.items()},
        **{f"metadata {name}": value for name, value in request.metadata.items()},
        **elastic,
        "batch": f"{plan.global_batch} chips a step = {plan.world_size} ranks x {plan.grad_accum} forward passes x "
        f"{plan.micro_batch} chips",
        "resources of a rank": _amounts(placement.resources),
        "resources of all": f"{_amounts(total)}, spread over the nodes, {placement.backend} between ranks",
        "engine": f"{train.engine}, ZeRO stage {train.zero_stage}, {train.precision}",
        "restarts": f"{placement.max_failures} at most; {placement.wait_for_resources:g} s to wait for resources",
    }
    if train.engine == "deepspeed":
        rows["DeepSpeed"] = json.dumps(deepspeed_config(train, plan, config.deepspeed))
    width = max(map(len, rows))
    lines = "".join(f"{name.ljust(width)}  {value}\n" for name, value in rows.items())
    return f"{lines}\n{config.to_toml()}\nNothing was sent."


def _numbers(sizes: Sequence[int]) -> str:
    shown = [str(ranks) for ranks in sizes]
    return ", ".join(shown if len(shown) <= _SHOWN else [*shown[: _SHOWN // 2], "...", *shown[-_SHOWN // 2 :]])


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
