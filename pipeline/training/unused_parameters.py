"""Parameters that a step does not use, which the optimizer is to leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


class IdleParameters:
    """Keeps an optimizer's step from the parameters that got no gradient since the step before.

    A PyTorch optimizer passes over them by itself. DeepSpeed, at every ZeRO stage, gives it zeros for their gradients,
    on which weight decay and momentum go on: Adam would take all but the same full step of the learning rate each
    time, until nothing is left of the weights that an adaptive convolution has no use for today.

    Adam's count of steps stays one for all parameters, where PyTorch alone would keep one for each: a parameter that is
    first used after hundreds of steps begins with steps of up to three times the learning rate.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        views: Callable[[nn.Parameter], list[Tensor]],
    ) -> None:
        """Watch the backward passes and the steps.

        Args:
            parameters: All that are trained.
            optimizer: What steps; its state must stand already.
            views: Where this rank's part of a parameter's weight and state lies, to be read and written in place.
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
        """Forget which parameters got gradients: what comes now belongs to the next step."""
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
