"""Exponential moving average of a network's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pipeline.engines.engine import to_cpu


class WeightAverage:
    """Average of the parameters over optimizer steps; buffers are the network's own.

    Each rank keeps it whole, and computes it from the same weights, so it does not depend on the number of ranks.
    Early steps count less: after n steps the decay is at most (1 + n) / (10 + n), so that the initial weights vanish.
    """

    def __init__(self, network: nn.Module, decay: float, values: Mapping[str, Tensor]) -> None:
        """Begin at the network's weights, or resume.

        Args:
            network: Network whose parameters are whole on this rank.
            decay: Weight of the average so far, in [0, 1).
            values: Averages of an earlier `state`, or nothing.
        """
        self._decay = decay
        self._parameters = dict(network.named_parameters())
        self._average = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        for name, value in values.items():
            self._average[name].copy_(value)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the weights after optimizer step ``step``, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), list(self._parameters.values()), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Give the network the averaged weights for a while."""
        kept = [parameter.detach().clone() for parameter in self._parameters.values()]
        self._copy(list(self._average.values()))
        try:
            yield
        finally:
            self._copy(kept)

    def state(self) -> dict[str, Tensor]:
        """Return a copy on the CPU, by parameter name."""
        return {name: to_cpu(value) for name, value in self._average.items()}

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        torch._foreach_copy_(list(self._parameters.values()), values)
