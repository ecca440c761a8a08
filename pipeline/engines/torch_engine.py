"""Training by plain PyTorch: one process, or DistributedDataParallel over several."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from models.satfusion import Fusion, SatFusion
from pipeline.config import TrainConfig
from pipeline.data.batches import Batch
from pipeline.engines.engine import (
    MOMENTS,
    Engine,
    ForwardPass,
    TrainState,
    clip_gradients,
    make_moments,
    plain_state,
    set_rate,
    trained,
    widened,
)
from pipeline.order import BatchPlan
from pipeline.world import World


class TorchEngine(Engine):
    """Training of one network by PyTorch alone (Li et al., "PyTorch Distributed", VLDB 2020)."""

    def __init__(
        self, network: SatFusion, config: TrainConfig, plan: BatchPlan, world: World, state: TrainState | None = None
    ) -> None:
        """Wrap ``network``; the arguments are those of `pipeline.engines.make.make_engine`."""
        super().__init__(network, config, world, state)
        # Before the moments, which take the layout of their weights.
        if config.channels_last:
            network.channels_last()
        self._accum = plan.grad_accum
        self._micro_steps = 0
        make_moments(self._adam, [parameter for _, parameter in trained(network)], state.step if state else 0)
        if state is not None and state.step > 0:
            self._load_moments(state)
        self._parallel = _parallel(self._forward, world) if world.size > 1 else None

    def forward(self, batch: Batch) -> Fusion:
        """Return the images [B, C, H, W] with their graph, in training mode, in the forward pass's precision."""
        self._forward.train()
        if self._parallel is None:
            return self._forward.images(self._forward(batch.lr, batch.pan, batch.revisit))
        # DistributedDataParallel reads it in the forward pass; gradients are reduced only with a step's last
        # micro-batch.
        self._parallel.require_backward_grad_sync = self._is_last
        return self._forward.images(self._parallel(batch.lr, batch.pan, batch.revisit))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss; the last of a step reduces it over ranks."""
        (loss / self._accum).backward()  # type: ignore[no-untyped-call]
        if self._is_last:
            self._grad_norm = clip_gradients(self._network, self._clip_norm)

    def update(self, learning_rate: float) -> None:
        """Count a micro-batch, and after the last of a global batch update the weights."""
        last = self._is_last
        self._micro_steps += 1
        if not last:
            return
        set_rate(self._adam.param_groups, learning_rate)
        self._count_idle()
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Fusion:
        """Return the images [B, C, H, W] in evaluation mode, float32."""
        self._forward.eval()
        return widened(self._forward.images(self._forward(batch.lr, batch.pan, batch.revisit)))

    def state(self, step: int, *, moments: bool = True, keep: bool = True) -> TrainState:
        """Return copies of the weights, and of the moments unless excluded, on the CPU (`Engine.state`)."""
        if not keep:
            return TrainState({}, {}, step)
        return plain_state(self._network, self._adam, step, moments=moments)

    @property
    def _is_last(self) -> bool:
        """Return whether the current micro-batch is the last of its optimizer step."""
        return (self._micro_steps + 1) % self._accum == 0

    def _count_idle(self) -> None:
        """Count the step also for parameters without gradient, which Adam skips: one count serves all."""
        idle = [self._adam.state[p]["step"] for _, p in trained(self._network) if p.grad is None]
        if idle:
            torch._foreach_add_(idle, 1)

    def _load_moments(self, state: TrainState) -> None:
        for name, parameter in trained(self._network):
            for moment in MOMENTS:
                self._adam.state[parameter][moment].copy_(state.moments[name][moment])


def _parallel(forward: ForwardPass, world: World) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # PyTorch 2.13 asks for `forward_sync_buffers`, which 2.11 does not have.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            forward,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            # All ranks begin with equal weights, and buffers that are averaged over ranks average themselves.
            init_sync=False,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # Costs a walk over the graph; needed if a step may leave parameters without gradient.
            find_unused_parameters=forward.network.may_leave_idle,
        )
