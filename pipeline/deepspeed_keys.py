"""A user's own keys of DeepSpeed, the section ``[deepspeed]`` of a run: their schema, and the keys that are ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from sharding.errors import UserError, nearest

DeepSpeedKeys = dict[str, Any]
"""Keys by section, as DeepSpeed's JSON has them."""

OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "train.clip_norm",
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.overlap_comm": "this program, because overlap changes the order of sums between runs",
    "zero_optimization.ignore_unused_parameters": "this program, for models of one stage",
    "optimizer": "train.learning_rate and train.weight_decay",
    "scheduler": "train.schedule",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "steps_per_print": "train.log_every",
    "wall_clock_breakdown": "train.profile",
    "timers.throughput.enabled": "this program, because DeepSpeed's timer waits for the device",
}
"""Keys of DeepSpeed that this program sets, by what sets them; a section stands for all its keys."""

_Count = Annotated[int, Meta(ge=0, le=10**15)]
_Size = Annotated[int, Meta(gt=0, le=10**15)]


class _Zero(Struct, forbid_unknown_fields=True):
    """Keys of ``zero_optimization``."""

    reduce_bucket_size: _Size | UnsetType = UNSET
    allgather_bucket_size: _Size | UnsetType = UNSET
    contiguous_gradients: bool | UnsetType = UNSET
    reduce_scatter: bool | UnsetType = UNSET
    allgather_partitions: bool | UnsetType = UNSET
    use_multi_rank_bucket_allreduce: bool | UnsetType = UNSET
    round_robin_gradients: bool | UnsetType = UNSET
    sub_group_size: _Size | UnsetType = UNSET
    stage3_prefetch_bucket_size: _Count | UnsetType = UNSET
    stage3_param_persistence_threshold: _Count | UnsetType = UNSET
    stage3_model_persistence_threshold: _Count | UnsetType = UNSET
    stage3_max_live_parameters: _Count | UnsetType = UNSET
    stage3_max_reuse_distance: _Count | UnsetType = UNSET


class _CommsLogger(Struct, forbid_unknown_fields=True):
    """Keys of ``comms_logger``."""

    enabled: bool | UnsetType = UNSET
    verbose: bool | UnsetType = UNSET
    prof_all: bool | UnsetType = UNSET
    debug: bool | UnsetType = UNSET


class _Keys(Struct, forbid_unknown_fields=True):
    """Keys that a user may set; those without effect on training by this program are not among them."""

    zero_optimization: _Zero | UnsetType = UNSET
    comms_logger: _CommsLogger | UnsetType = UNSET
    prescale_gradients: bool | UnsetType = UNSET
    gradient_predivide_factor: Annotated[float, Meta(gt=0, le=1e6)] | UnsetType = UNSET
    memory_breakdown: bool | UnsetType = UNSET
    dump_state: bool | UnsetType = UNSET


_SECTIONS: dict[str, type[Struct]] = {"zero_optimization": _Zero, "comms_logger": _CommsLogger}


def check_keys(keys: Mapping[str, Any], engine: str) -> None:
    """Refuse keys that this program sets, that it does not know, or whose value has another type.

    Args:
        keys: The section ``[deepspeed]``.
        engine: ``train.engine``.

    Raises:
        UserError: It names the key, and what sets it or the nearest valid key.
    """
    if keys and engine != "deepspeed":
        raise UserError(f"[deepspeed] sets {min(keys)!r}, and train.engine = {engine!r} does not use DeepSpeed")
    for name in _dotted(keys):
        for ours, setter in OURS.items():
            if name == ours or name.startswith(f"{ours}.") or ours.startswith(f"{name}."):
                raise UserError(f"deepspeed.{name} conflicts with a key that is set by {setter}: remove it")
        section, _, key = name.rpartition(".")
        known = _SECTIONS.get(section, _Keys).__struct_fields__
        if (section and section not in _SECTIONS) or key not in known:
            wanted = section.partition(".")[0] if section and section not in _SECTIONS else key
            known = _Keys.__struct_fields__ if wanted != key else known
            raise UserError(f"unknown key 'deepspeed.{name}'{nearest(wanted, known)}")
    try:
        msgspec.convert(keys, _Keys, strict=True)
    except msgspec.ValidationError as error:
        raise UserError(f"[deepspeed]: {error}") from None


def merged(ours: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return our configuration of DeepSpeed with a user's keys, which `check_keys` has accepted."""
    both = dict(ours)
    for name, value in keys.items():
        both[name] = merged(both.get(name, {}), value) if isinstance(value, Mapping) else value
    return both


def _dotted(keys: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the names of all values, ``section.key``."""
    names: list[str] = []
    for name, value in keys.items():
        inner = isinstance(value, Mapping) and value
        names += _dotted(value, f"{prefix}{name}.") if inner else [prefix + name]
    return names
