"""Learning rate as a pure function of the step, so that resuming needs no state."""

from __future__ import annotations

import math

from pipeline.config import TrainConfig


def learning_rate(step: int, steps_per_epoch: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of optimizer step ``step``, counted from 1.

    ``warm_restarts`` is SGDR's cosine (Loshchilov and Hutter, ICLR 2017, equation 5) with periods of
    ``restart_epochs``, constant within an epoch. ``warmup_cosine`` rises linearly over ``warmup_steps``, then follows
    half a cosine to the floor at ``total_steps``.
    """
    floor, peak = config.min_learning_rate, config.learning_rate
    if config.schedule == "warm_restarts":
        epoch = (step - 1) // steps_per_epoch
        share = (epoch % config.restart_epochs) / config.restart_epochs
    elif step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    else:
        share = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * share)) / 2
