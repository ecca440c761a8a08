"""Perturbed inputs: revisits with noise, blur, shifts, or fewer of them, in levels, to see how far a fusion holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from pipeline.data.batches import Batch
from pipeline.data.simulate import apply, blur, gaussian, move, uniform
from pipeline.order import random_words

Kind = Literal["noise", "blur", "shift", "revisits"]
KINDS: tuple[Kind, ...] = ("noise", "blur", "shift", "revisits")

LEVELS: dict[Kind, tuple[float, ...]] = {
    "noise": (0.005, 0.01, 0.02, 0.04),
    "blur": (0.5, 1.0, 1.5, 2.0),
    "shift": (0.25, 0.5, 1.0, 2.0),
}
"""Levels beside the unperturbed one; those of ``revisits`` depend on how many there are."""
UNITS: dict[Kind, str] = {
    "noise": "standard deviation, reflectance",
    "blur": "standard deviation of the Gaussian, LR pixels",
    "shift": "largest shift of a revisit along each axis, LR pixels",
    "revisits": "revisits kept",
}


def levels(kind: Kind, revisits: int) -> tuple[float, ...]:
    """Return the levels of a kind that perturb: of ``revisits`` half of them, a quarter and so on, down to one."""
    if kind != "revisits":
        return LEVELS[kind]
    kept = []
    while revisits > 1:
        revisits //= 2
        kept.append(float(revisits))
    return tuple(kept)


def unperturbed(kind: Kind, revisits: int) -> float:
    """Return the level of the inputs as they are."""
    return float(revisits) if kind == "revisits" else 0.0


def perturb(batch: Batch, kind: Kind, level: float) -> Batch:
    """Return a batch of one chip with perturbed revisits; PAN and target stay.

    The random numbers depend on the chip and the kind alone: levels differ by a factor, and every run, rank and
    network gets the same inputs.

    Args:
        batch: The chip.
        kind: Kind of perturbation.
        level: Its level, in UNITS.
    """
    return PERTURBATIONS[kind](batch, level)


def _generator(batch: Batch, kind: Kind) -> torch.Generator:
    return torch.Generator().manual_seed(int(random_words(1, 0, 0, batch.chips[0], f"perturb {kind}")[0]) >> 1)


def _noise(batch: Batch, level: float) -> Batch:
    noise = torch.randn(batch.lr.shape, generator=_generator(batch, "noise"))
    return replace(batch, lr=batch.lr + level * noise.to(batch.lr.device))


def _blur(batch: Batch, level: float) -> Batch:
    deviation = torch.tensor([level], dtype=torch.float64)
    most = min(batch.lr.shape[-2:]) - 1  # what mirroring can give
    taps = gaussian(deviation, (3 * deviation + 0.5).floor().clamp(1, most))
    rows, columns = (blur(move(side, 0 * deviation), taps) for side in batch.lr.shape[-2:])
    return replace(batch, lr=_each(rows, columns, batch.lr))


def _shift(batch: Batch, level: float) -> Batch:
    generator = _generator(batch, "shift")
    rows, columns = (move(side, level * uniform(batch.lr.shape[1], -1, 1, generator)) for side in batch.lr.shape[-2:])
    return replace(batch, lr=_each(rows, columns, batch.lr))


def _each(rows: Tensor, columns: Tensor, lr: Tensor) -> Tensor:
    """Multiply the revisits [1, R, C, h, w] of one chip by a matrix per axis, each [R, h, h] or [1, h, h]."""
    return apply(rows, columns, lr[0]).unsqueeze(0)


def _revisits(batch: Batch, level: float) -> Batch:
    """Keep the clearest revisit and the first others, repeated to the number that a network expects."""
    number, clearest = batch.lr.shape[1], int(batch.revisit[0])
    others = [revisit for revisit in range(number) if revisit != clearest]
    kept = sorted([clearest, *others[: int(level) - 1]])
    chosen = [kept[place % len(kept)] for place in range(number)]
    return replace(batch, lr=batch.lr[:, chosen], revisit=torch.full_like(batch.revisit, kept.index(clearest)))


PERTURBATIONS: dict[Kind, Callable[[Batch, float], Batch]] = {
    "noise": _noise,
    "blur": _blur,
    "shift": _shift,
    "revisits": _revisits,
}
