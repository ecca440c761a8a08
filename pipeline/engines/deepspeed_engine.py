"""Training by DeepSpeed at ZeRO 0 to 3, with a state that does not depend on ranks or stages."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.cpp_extension import _get_build_directory

from models.satfusion import Fusion, SatFusion
from pipeline.config import TrainConfig
from pipeline.data.batches import Batch
from pipeline.engines.deepspeed_config import deepspeed_config
from pipeline.engines.engine import (
    MOMENTS,
    Engine,
    TrainState,
    arrival,
    clip_gradients,
    make_moments,
    plain_state,
    set_rate,
    to_cpu,
    trained,
    widened,
)
from pipeline.engines.unused_parameters import IdleParameters
from pipeline.order import BatchPlan
from pipeline.world import World
from sharding.errors import UserError


class DeepSpeedEngine(Engine):
    """Training of one network by DeepSpeed (Rajbhandari et al., "ZeRO", SC 2020)."""

    def __init__(
        self,
        network: SatFusion,
        config: TrainConfig,
        plan: BatchPlan,
        world: World,
        state: TrainState | None = None,
        keys: Mapping[str, Any] | None = None,
    ) -> None:
        """Wrap ``network``; ``keys`` are a user's own (`RunConfig.deepspeed`), the others those of `make_engine`."""
        deepspeed = import_deepspeed()
        super().__init__(network, config, world, state)
        self._stage = config.zero_stage
        self._rank, self._world_size, self._device = world.rank, world.size, world.device
        self._engine, *_ = deepspeed.initialize(
            model=self._forward,
            optimizer=self._adam,
            config=deepspeed_config(config, plan, keys or {}),
            dist_init_required=False,
        )
        # Only now: DeepSpeed has sent the weights to all ranks, as bytes in the usual layout.
        if config.channels_last:
            network.channels_last()
        self._make_moments(state.step if state is not None else 0)
        if state is not None and state.step > 0:
            self._load_moments(state)
        self._idle = IdleParameters((parameter for _, parameter in trained(network)), self._adam, self._local_views)

    def forward(self, batch: Batch) -> Fusion:
        """Return the images [B, C, H, W] with their graph, in training mode, in the forward pass's precision."""
        self._engine.train()
        return self._run(batch)

    def _run(self, batch: Batch) -> Fusion:
        return self._forward.images(self._engine(batch.lr, batch.pan, batch.revisit))

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss; the last of a step reduces it over ranks."""
        self._engine.backward(loss)
        if self._stage == 0 and self._engine.is_gradient_accumulation_boundary():
            self._grad_norm = clip_gradients(self._network, self._clip_norm)

    def update(self, learning_rate: float) -> None:
        """Count a micro-batch, and after the last of a global batch update the weights."""
        set_rate(self._engine.optimizer.param_groups, learning_rate)
        boundary = self._engine.is_gradient_accumulation_boundary()
        self._engine.step()
        if boundary:
            self._idle.begin()
            if self._stage == 3:
                # If no new gradient arrives, ZeRO 3 would use this step's gradient for the next step.
                self._engine.optimizer.grad_partitions_flat_buffer.zero_()

    @property
    def grad_norm(self) -> Tensor:
        """Return the L2 norm of the last step's reduced gradient before clipping, a scalar on the device."""
        if self._stage == 0:
            return self._grad_norm
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._device)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Fusion:
        """Return the images [B, C, H, W] in evaluation mode, float32."""
        self._engine.eval()
        return widened(self._run(batch))

    def state(self, step: int, *, moments: bool = True, keep: bool = True) -> TrainState:
        """Gather the weights, and the moments unless excluded, on the CPU; all ranks call it (`Engine.state`)."""
        if self._stage == 0:
            if not keep:
                return TrainState({}, {}, step)
            return plain_state(self._network, self._adam, step, moments=moments)
        # Slow to import, and not needed by the plain PyTorch engine.
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights = {name: to_cpu(buffer) for name, buffer in self._network.named_buffers()}
        gathered: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self._network.named_parameters():
            if not parameter.requires_grad:
                weights[name] = self._whole(parameter)
                continue
            weights[name] = to_cpu(safe_get_full_fp32_param(parameter))
            if not moments:
                continue
            shape = weights[name].shape
            gathered[name] = {
                moment: to_cpu(safe_get_full_optimizer_state(parameter, moment)).reshape(shape) for moment in MOMENTS
            }
        if not keep:
            return TrainState({}, {}, step)
        return TrainState(weights, gathered, step, arrived=arrival(self._device))

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        """Return a frozen parameter, which has no fp32 copy in the optimizer."""
        if self._stage < 3:
            return to_cpu(parameter)
        import deepspeed  # slow to import, and not needed by the plain PyTorch engine

        with deepspeed.zero.GatheredParameters(parameter):
            return to_cpu(parameter)

    def _make_moments(self, step: int) -> None:
        # The inner Adam creates its state at its first step; it must exist before that.
        make_moments(self._adam, self._flat_parameters(), step)
        if self._stage in (1, 2):
            # Set the location of each parameter's moments; DeepSpeed does it after its first step.
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _load_moments(self, state: TrainState) -> None:
        for name, parameter in trained(self._network):
            for moment in MOMENTS:
                self._set_moment(parameter, moment, state.moments[name][moment].to(self._device))

    def _flat_parameters(self) -> list[Tensor]:
        """Return the tensors the inner Adam steps on: the parameters, or this rank's flat fp32 partitions."""
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return [flat for group in self._adam.param_groups for flat in group["params"]]

    def _local_views(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return this rank's parts of a parameter's fp32 weight and moments, in place; none if it holds no part."""
        if self._stage == 0:
            return [parameter.detach(), *(self._adam.state[parameter][moment] for moment in MOMENTS)]
        if self._stage == 3:
            return [self._engine.optimizer.get_local_fp32_param(parameter, key) for key in (None, *MOMENTS)]
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]
        return [] if fragment is None else [fragment.get_hp_fragment(key) for key in (None, *MOMENTS)]

    def _set_moment(self, parameter: nn.Parameter, moment: str, value: Tensor) -> None:
        from deepspeed import utils  # slow to import, and not needed by the plain PyTorch engine

        if self._stage == 0:
            self._adam.state[parameter][moment].copy_(value)
        elif self._stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            # safe_set_full_* truncates if a parameter does not divide by the ranks; partitions are padded.
            part = utils.safe_get_local_optimizer_state(parameter, moment).numel()
            padded = functional.pad(value.flatten(), (0, part * self._world_size - value.numel()))
            own = padded.narrow(0, part * self._rank, part)
            utils.safe_set_local_optimizer_state(parameter, own, moment)


def import_deepspeed() -> Any:
    """Import DeepSpeed with its device set and its CPU op loaded, and without its log messages."""
    # DeepSpeed chooses its device at import; on a machine without CUDA it would otherwise search for a device, and
    # warn.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed requires this variable; torchrun and Ray set it, a single process or a test's group does not.
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed  # slow to import, and not needed by the plain PyTorch engine

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        _load_cpu_op()
    return deepspeed


def _load_cpu_op() -> None:
    """Load the op that DeepSpeed would load, but never wait for a process that was killed while loading it.

    Torch's lock is a file, which remains when its process dies; ours is a kernel lock and ends with the process.

    Raises:
        UserError: The folder of compiled ops, by default in the home folder, cannot be written to.
    """
    from deepspeed.accelerator import get_accelerator  # slow to import, and not needed by the plain PyTorch engine

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    try:
        folder = Path(_get_build_directory(builder.name, verbose=False))
        lock = (folder / "satfusion.lock").open("w")
    except OSError as error:
        raise UserError(
            f"DeepSpeed's op cannot be compiled: {error.filename} cannot be written ({error.strerror}); set "
            "TORCH_EXTENSIONS_DIR to a folder of yours, or train.engine=torch"
        ) from None
    with lock as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        with _own_tools_first():
            builder.load()


@contextlib.contextmanager
def _own_tools_first() -> Iterator[None]:
    """Let this environment's ninja be found before the system's: each compiles again what another version compiled."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), before))
    try:
        yield
    finally:
        os.environ["PATH"] = before
