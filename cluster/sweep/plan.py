"""Plan of a sweep: the configuration of each of its runs, as pure functions of the options."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.sweep.options import ALL, SweepOptions
from models.config import ModelConfig
from models.registry import ABSENT, ENCODERS, HEADS
from pipeline.config import RunConfig
from pipeline.values import require_one_of
from sharding.errors import UserError
from sharding.schema import JobFile


@dataclass(frozen=True)
class SweepJob(JobFile):
    """Complete description of a sweep, for a driver on a cluster."""

    config: Mapping[str, Any]
    """Configuration that the runs share, `RunConfig.to_dict`; its run folder is the sweep's."""
    options: SweepOptions
    """Options of the sweep."""

    def cells(self) -> list[RunConfig]:
        """Return the configuration of each run: all pairs with the first seed, then with the next one.

        Raises:
            UserError: A pair cannot be built with this configuration.
        """
        return plan(RunConfig.from_dict(self.config), self.options)


def plan(base: RunConfig, options: SweepOptions) -> list[RunConfig]:
    """Return the configuration of each run of a sweep below ``base.output.uri`` (`SweepJob.cells`)."""
    for option, names, known in (("--encoders", options.encoders, ENCODERS), ("--heads", options.heads, HEADS)):
        for name in names:
            require_one_of(option, name, [*known, ABSENT, ALL])
    pairs = [
        pair
        for pair in itertools.product(_named(options.encoders, ENCODERS), _named(options.heads, HEADS))
        if pair != (ABSENT, ABSENT)
    ]
    if not pairs:
        raise UserError(f"--encoders {ABSENT} --heads {ABSENT} is no model: name an encoder or a head")
    return [
        replace(
            base,
            model=_built(base, encoder, head),
            train=replace(base.train, seed=seed),
            output=replace(base.output, uri=f"{base.output.uri.rstrip('/')}/{encoder}+{head}/seed-{seed}"),
        )
        for seed in range(base.train.seed, base.train.seed + options.seeds)
        for encoder, head in pairs
    ]


def _built(base: RunConfig, encoder: str, head: str) -> ModelConfig:
    try:
        return replace(base, model=replace(base.model, encoder=encoder, head=head)).model
    except ValueError as error:
        raise UserError(f"{encoder}+{head} cannot be swept: {error}") from None


def _named(names: Sequence[str], known: Mapping[str, object]) -> list[str]:
    """Return the names without repeats, and all known ones in place of ``all``."""
    return list(dict.fromkeys(one for name in names for one in (known if name == ALL else (name,))))
