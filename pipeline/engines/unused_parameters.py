"""Parameters that a step does not use, and that the optimizer must not change."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class IdleParameters:
    """Guard that keeps an optimizer's step from the parameters without gradient since the step before.

    A PyTorch optimizer skips them. DeepSpeed, at every ZeRO stage, passes zeros for their gradients, to which weight
    decay and momentum still apply: Adam would take nearly a full step of the learning rate each time, until the weights
    that an adaptive convolution does not currently use have vanished.

    Adam keeps one step count for all parameters, while PyTorch alone would keep one for each: a parameter that is first
    used after hundreds of steps begins with steps of up to three times the learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        views: Callable[[nn.Parameter], list[Tensor]],
    ) -> None:
        """Watch the backward passes and the steps.

        Args:
            parameters: All trained parameters.
            optimizer: The optimizer; its state must exist already.
            views: Function that returns this rank's part of a parameter's weight and state, read and written in place.
        """
        self._parameters = list(parameters)
        self._views = views
        self._reached: set[nn.Parameter] = set()
        self._kept: list[tuple[Tensor, Tensor]] = []
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._reached.add)  # type: ignore[no-untyped-call]
        optimizer.register_step_pre_hook(lambda *_: self._keep())
        optimizer.register_step_post_hook(lambda *_: self._put_back())

    def begin(self) -> None:
        """Forget which parameters got gradients: later gradients belong to the next step."""
        self._reached.clear()

    @torch.no_grad()
    def _keep(self) -> None:
        idle = (parameter for parameter in self._parameters if parameter not in self._reached)
        self._kept = [(view, view.clone()) for parameter in idle for view in self._views(parameter)]

    @torch.no_grad()
    def _put_back(self) -> None:
        for view, value in self._kept:
            view.copy_(value)
        self._kept.clear()
