"""The protocol of engines that train a network, the state by parameter name, and code shared by both engines.

`DeepSpeedEngine` shards optimizer state, gradients and weights over ranks (ZeRO 0 to 3). `TorchEngine` is plain
PyTorch: one process, or DistributedDataParallel. Both run the same forward pass and the same fused Adam, and hold the
same state.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.satfusion import Fusion, SatFusion
from pipeline.config import TrainConfig
from pipeline.data.batches import Batch
from pipeline.engines.recompute import recompute_blocks
from pipeline.world import World

logger = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
FACTOR = "rate_factor"
"""Key of an optimizer's group: the factor of its learning rate."""


@dataclass(frozen=True)
class TrainState:
    """State that training needs to resume, by parameter name; equal for every engine, world size and ZeRO stage."""

    weights: dict[str, Tensor]
    """fp32 parameters and buffers by name."""
    moments: dict[str, dict[str, Tensor]]
    """Adam's fp32 ``exp_avg`` and ``exp_avg_sq`` by parameter name."""
    step: int
    """Optimizer steps taken."""
    ema: dict[str, Tensor] = field(default_factory=dict)
    """Moving average of the weights by name, if one is kept."""
    arrived: torch.cuda.Event | None = None
    """End of the copies from a GPU, before which nothing here may be read; None if there is nothing to wait for."""

    def wait(self) -> None:
        """Wait until the copies have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()


def compiled(function: Any) -> Any:
    """Return ``function`` compiled as one graph of fixed shapes."""
    # Without the reordering, which has let inductor read a gradient before it was written (torch 2.13).
    return torch.compile(function, dynamic=False, fullgraph=True, options={"reorder_for_peak_memory": False})


def make_adam(network: nn.Module, config: TrainConfig) -> torch.optim.Adam:
    """Return the optimizer: one fused kernel over all parameters, instead of several kernels for each.

    Parameters with another factor of the learning rate are groups of their own; `set_rate` sets all rates.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trained(network):
        groups.setdefault(_rate_factor(name, config), []).append(parameter)
    described = [{"params": parameters, FACTOR: factor} for factor, parameters in groups.items()]
    return torch.optim.Adam(described, config.learning_rate, weight_decay=config.weight_decay, fused=True)


def set_rate(groups: Sequence[dict[str, Any]], learning_rate: float) -> None:
    """Set the learning rate of the optimizer's groups, each by its factor."""
    for group in groups:
        group["lr"] = learning_rate * group[FACTOR]


def trained(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that are trained, by name: all but those of a frozen stage."""
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]


def _rate_factor(name: str, config: TrainConfig) -> float:
    stage = name.partition(".")[0]
    return {"encoder": config.encoder_rate, "upsampler": config.encoder_rate, "head": config.head_rate}.get(stage, 1.0)


def make_moments(adam: torch.optim.Adam, parameters: Sequence[Tensor], step: int) -> None:
    """Create the state that the optimizer would create at its first step, as if ``step`` steps were taken."""
    for parameter in parameters:
        zeros = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        taken = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
        adam.state[parameter] = {"step": taken, **zeros}


def clip_gradients(network: nn.Module, bound: float) -> Tensor:
    """Return the L2 norm of all gradients, a scalar on the device; scale them down to ``bound`` unless it is 0."""
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if bound:
        torch.nn.utils.clip_grads_with_norm_(network.parameters(), bound, norm)
    return norm


def plain_state(network: nn.Module, adam: torch.optim.Adam, step: int, *, moments: bool) -> TrainState:
    """Return the state of a network whose parameters and moments are whole on this rank."""
    weights = {name: to_cpu(value) for name, value in (*network.named_buffers(), *network.named_parameters())}
    gathered: dict[str, dict[str, Tensor]] = {}
    if moments:
        for name, parameter in trained(network):
            gathered[name] = {moment: to_cpu(adam.state[parameter][moment]) for moment in MOMENTS}
    device = next(network.parameters()).device
    return TrainState(weights, gathered, step, arrived=arrival(device))


def to_cpu(value: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU, for a checkpoint; from a GPU it arrives later (`arrival`), page-locked."""
    if not value.is_cuda:
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value.detach(), non_blocking=True)


def arrival(device: torch.device) -> torch.cuda.Event | None:
    """Return an event at the end of all copies so far from a device; None from the CPU, where they are done."""
    if device.type != "cuda":
        return None
    arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
    arrived.record()
    return arrived


class ForwardPass(nn.Module):
    """The network's forward pass: under bfloat16 autocast, and compiled in training, if ``config`` says so.

    It is a module because DeepSpeed disables an autocast outside of its module.
    """

    def __init__(self, network: SatFusion, config: TrainConfig, device_type: str) -> None:
        super().__init__()
        self.network = network
        self._device_type = device_type
        self._bf16 = config.precision == "bf16"
        self._compiled: Any = compiled(self._fuse) if config.compile else None

    def forward(self, lr: Tensor, pan: Tensor, revisit: Tensor) -> tuple[Tensor, ...]:
        """Return the network's images: the result, then those of its stages."""
        # Evaluation takes one chip at a time: another graph to compile, for a small part of the run.
        if self._compiled is not None and self.training and self.network.is_settled:
            images: tuple[Tensor, ...] = self._compiled(lr, pan, revisit)
            return images
        return self._fuse(lr, pan, revisit)

    def _fuse(self, lr: Tensor, pan: Tensor, revisit: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._bf16):
            fusion: Fusion = self.network(lr, pan, revisit)
        # A plain tuple of tensors, because ZeRO 3 rebuilds outputs to attach its hooks to them.
        return tuple(image for image in fusion if image is not None)

    def images(self, outputs: Sequence[Tensor]) -> Fusion:
        """Return the outputs of `forward` as named images."""
        fused, *stages = outputs
        if len(stages) == 2:
            return Fusion(fused, *stages)
        # The image of a single stage is the result; ZeRO 3 returns it as a separate tensor.
        return Fusion(fused, fused if self.network.encoder else None, fused if self.network.head else None)


def widened(images: Fusion) -> Fusion:
    """Return images in float32."""
    fused, mfif, msif = images
    return Fusion(fused.float(), None if mfif is None else mfif.float(), None if msif is None else msif.float())


def use_tf32(enabled: bool) -> None:
    """Allow or forbid CUDA to round inputs of float32 matrix products and convolutions to 10 bits of mantissa.

    PyTorch's default allows it in convolutions only.
    """
    precision = "tf32" if enabled else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    # torch.export reads the older setting, and refuses one that contradicts the two below.
    torch.backends.cudnn.allow_tf32 = enabled
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
    torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]


class Engine(ABC):
    """One network in training. At ZeRO 0 only `state` and `predict` make the host wait for the device."""

    def __init__(self, network: SatFusion, config: TrainConfig, world: World, state: TrainState | None) -> None:
        """Load the weights, and make the optimizer and the forward pass; arguments as of `make.make_engine`."""
        if state is not None:
            # Before DeepSpeed copies the weights into its flat fp32 partitions.
            network.load_state_dict(state.weights)
        if config.recompute and not recompute_blocks(network) and world.is_main:
            logger.warning("train.recompute = true saves nothing: this network has no blocks that could compute again")
        self._network = network
        self._clip_norm = config.clip_norm
        self._adam = make_adam(network, config)
        self._forward = ForwardPass(network, config, world.device.type)
        self._grad_norm = torch.zeros((), device=world.device)

    @property
    def grad_norm(self) -> Tensor:
        """Return the L2 norm of the last step's reduced gradient before clipping, a scalar on the device."""
        return self._grad_norm

    def begin_step(self, step: int) -> None:
        """Tell the network, before the forward passes of an optimizer step, the number of steps taken."""
        self._network.at_step(step)

    @abstractmethod
    def forward(self, batch: Batch) -> Fusion:
        """Return the images [B, C, H, W] with their graph, in training mode, in the forward pass's precision."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a micro-batch's mean loss; the last of a step reduces it over ranks."""

    @abstractmethod
    def update(self, learning_rate: float) -> None:
        """Count a micro-batch, and after the last of a global batch update the weights."""

    @abstractmethod
    def predict(self, batch: Batch) -> Fusion:
        """Return the images [B, C, H, W] in evaluation mode, float32."""

    @abstractmethod
    def state(self, step: int, *, moments: bool = True, keep: bool = True) -> TrainState:
        """Gather the weights, and the moments unless excluded, on the CPU; all ranks call it together.

        The host does not wait for copies from a GPU (`TrainState.wait`); later steps do not change them.

        Args:
            step: Optimizer steps taken.
            moments: False to leave the moments out.
            keep: False on a rank that takes part without using the result, which is then empty.
        """
