"""Blocks of Mamba: a sequence of tokens, mixed causally by a selective scan."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads.pan_mamba.scan import selective_scan

STATE = 16
EXPANSION = 2
CONV_TAPS = 4
RANK_DIVISOR = 16
STEP_RANGE = (0.001, 0.1)
LEAST_STEP = 1e-4


class Mamba(nn.Module):
    """Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752, section 3.4.

    [x, z] = W_in tokens; x through a causal convolution, SiLU and the scan, gated by SiLU(z), and W_out of it. The
    parameters have the names and shapes of ``mamba_ssm.Mamba(width)``.

    Args:
        width: Channels of a token; the scan runs on twice as many.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = EXPANSION * width
        rank = math.ceil(width / RANK_DIVISOR)
        self.A_log = nn.Parameter(initial_A_log(inner))
        self.D = nn.Parameter(torch.ones(inner))
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = CausalConv1d(inner)
        self.x_proj = nn.Linear(inner, rank + 2 * STATE, bias=False)
        self.dt_proj = StepProjection(rank, inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B, n, width] to the same shape; a token sees itself and those before it."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)
        y = scan_branch(x, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        return cast(Tensor, self.out_proj(y * F.silu(z)))


class CrossMamba(nn.Module):
    """Two sequences scanned side by side, each with its own input projection, gate and scan, then summed.

    He et al., "Pan-Mamba: Effective Pan-Sharpening with State Space Model", arXiv 2402.12192, section 3.4. The names of
    the second branch are those of the backward one in Zhu et al., "Vision Mamba", arXiv 2401.09417; as published with
    SatFusion it also scans forwards.

    Args:
        width: Channels of a token of either sequence.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = EXPANSION * width
        rank = math.ceil(width / RANK_DIVISOR)
        self.A_log = nn.Parameter(initial_A_log(inner))
        self.D = nn.Parameter(torch.ones(inner))
        self.A_b_log = nn.Parameter(initial_A_log(inner))
        self.D_b = nn.Parameter(torch.ones(inner))
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = CausalConv1d(inner)
        self.x_proj = nn.Linear(inner, rank + 2 * STATE, bias=False)
        self.dt_proj = StepProjection(rank, inner)
        self.conv1d_b = CausalConv1d(inner)
        self.x_proj_b = nn.Linear(inner, rank + 2 * STATE, bias=False)
        self.dt_proj_b = StepProjection(rank, inner)
        self.in_proj_extra = nn.Linear(width, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, tokens: Tensor, extra: Tensor) -> Tensor:
        """Map ``tokens`` and ``extra``, both [B, n, width], to [B, n, width]."""
        x, z = self.in_proj(tokens).chunk(2, dim=-1)
        y = scan_branch(x, self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        x_b, z_b = self.in_proj_extra(extra).chunk(2, dim=-1)
        y_b = scan_branch(x_b, self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)
        return cast(Tensor, self.out_proj(y * F.silu(z) + y_b * F.silu(z_b)))


class CausalConv1d(nn.Conv1d):
    """A convolution of each channel alone over the present token and the three before it, zeros before the first."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, CONV_TAPS, groups=channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [B, n, channels] to the same shape."""
        return super().forward(F.pad(tokens.mT, (CONV_TAPS - 1, 0))).mT


class StepProjection(nn.Linear):
    """Step sizes of the scan: softplus(W x + b), in float32 or wider.

    The bias is initialised so that the steps are log-uniform in [0.001, 0.1]. The sum with the bias is not computed in
    a narrower type, where its error would be a percent.
    """

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__(rank, channels)
        nn.init.uniform_(self.weight, -(rank**-0.5), rank**-0.5)
        low, high = (math.log(step) for step in STEP_RANGE)
        steps = torch.empty_like(self.bias).uniform_(low, high).exp().clamp(min=LEAST_STEP)
        with torch.no_grad():
            self.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, n, rank] to step sizes [B, n, channels], positive."""
        exponent = F.linear(x, self.weight)
        return F.softplus(exponent.to(torch.promote_types(exponent.dtype, torch.float32)) + self.bias)


def initial_A_log(channels: int) -> Tensor:
    """Return log(1, 2, ..., 16) for each channel, [channels, 16]: S4D-real."""
    return torch.arange(1, STATE + 1, dtype=torch.float32).log().repeat(channels, 1)


def scan_branch(
    x: Tensor, conv1d: CausalConv1d, x_proj: nn.Linear, dt_proj: StepProjection, A_log: Tensor, D: Tensor
) -> Tensor:
    """Map [B, n, inner] to the same shape: convolution, SiLU, and the scan whose steps, B and C depend on the input."""
    x = F.silu(conv1d(x))
    steps, B, C = x_proj(x).split([dt_proj.in_features, STATE, STATE], dim=-1)
    # In float32 also if all else is float64, as in mamba_ssm: thirty scans in a row would show the difference. For the
    # same reason its exponential is rounded from float64: processors differ in the last bit of float32's.
    A = -A_log.float().double().exp().float()
    return selective_scan(x, dt_proj(steps), A, B, C, D)
