"""Golden cases: what the published implementation computes, as measured by a run of it.

``formula.py`` makes weights and inputs from names and shapes, so nothing but the expected outputs is stored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.config import ModelConfig
from models.published import load_published, to_published
from models.registry import build_model
from models.satfusion import SatFusion
from pipeline.quality.losses import LossConfig
from tests.golden import formula

HERE = Path(__file__).parent

CONFIGS = {
    "SRCNN+None": ModelConfig("srcnn", "none", published=True),
    "HighResNet+None": ModelConfig("highresnet", "none", published=True),
    "RAMS+None": ModelConfig("rams", "none", published=True),
    "TRNet+None": ModelConfig("trnet", "none", published=True),
    "TRNet_pan+None": ModelConfig("trnet_pan", "none", published=True),
    "None+PNN": ModelConfig("none", "pnn", published=True),
    "None+PANNet": ModelConfig("none", "pannet", published=True),
    "None+PSIT": ModelConfig("none", "innformer", published=True),
    "None+U2Net": ModelConfig("none", "u2net", published=True),
    "SRCNN+PNN": ModelConfig("srcnn", "pnn", published=True),
    "HighResNet+PANNet": ModelConfig("highresnet", "pannet", published=True),
    "None+Pan_Mamba": ModelConfig("none", "pan_mamba", published=True),
    "TRNet+Pan_Mamba": ModelConfig("trnet", "pan_mamba", published=True),
    "None+ARConv": ModelConfig("none", "arconv", published=True),
    "TRNet_pan+ARConv": ModelConfig("trnet_pan", "arconv", published=True),
    "RAMS+U2Net": ModelConfig("rams", "u2net", published=True),
    "TRNet+PSIT": ModelConfig("trnet", "innformer", published=True),
}
"""A case for each published model; a new one is a row here."""

TRAINING_PAIRS = ("SRCNN+PNN", "HighResNet+PANNet")
TRAINING_STEPS = 10
TRAINING_LOSS = LossConfig(registration="published", bias_adjust=True)
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 1e-4
"""Of plain Adam: decay is added to the gradient."""


@dataclass(frozen=True)
class Published:
    """What is known of a published model."""

    parameters: int
    """Number of parameters, each counted once."""

    state: list[tuple[str, list[int], str]]
    """(name, shape, dtype) of every entry of its state dict, in order."""

    outputs: dict[str, np.ndarray]
    """Every fifth pixel of ``fused``, and of ``mfif`` and ``msif`` if any; suffix 64 for float64."""


def published(case: str) -> Published:
    facts = json.loads((HERE / "models" / f"{case}.json").read_text())
    with np.load(HERE / "models" / f"{case}.npz") as outputs:
        return Published(
            facts["parameters"],
            [(name, shape, dtype) for name, shape, dtype in facts["state"]],
            dict(outputs),
        )


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(HERE / f"{name}.npz") as arrays:
        return dict(arrays)


def golden_model(case: str, dtype: torch.dtype = torch.float32, **changes: int | str) -> SatFusion:
    """Build a case's model with the formula's weights, dropout off; ``changes`` alter its configuration."""
    model = build_model(replace(CONFIGS[case], **changes)).to(dtype)
    state = {n: weight(n, v) if v.is_floating_point() else v for n, v in to_published(model).items()}
    load_published(model, state)
    return model


def weight(name: str, like: Tensor) -> Tensor:
    return torch.from_numpy(formula.weight(name, tuple(like.shape)))


def image(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(formula.image(f"golden:{name}", shape)).to(dtype)


def golden_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return lr [1, 8, 3, 50, 50] and pan [1, 1, 156, 156] of the model cases."""
    return image("lr", 1, 8, 3, 50, 50, dtype=dtype), image("pan", 1, 1, 1, 156, 156, dtype=dtype).squeeze(1)


def training_batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return lr [2, 8, 3, 50, 50], pan [2, 1, 156, 156] and hr [2, 3, 156, 156] of a step, counted from 0."""
    lr = image(f"train:{step}:lr", 2, 8, 3, 50, 50, dtype=dtype)
    pan = image(f"train:{step}:pan", 2, 1, 1, 156, 156, dtype=dtype)
    hr = image(f"train:{step}:hr", 2, 1, 3, 156, 156, dtype=dtype)
    return lr, pan.squeeze(1), hr.squeeze(1)


def golden_optimizer(model: SatFusion) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def distance(ours: Tensor, golden: np.ndarray) -> float:
    """Return max|a - b| / max|b| of an array [B, C, H, W] and the probe [..., C, H / 5, W / 5] of another."""
    expected = torch.from_numpy(golden).to(ours).reshape(*ours.shape[:2], *golden.shape[-2:])
    probe = ours.detach()[..., ::5, ::5]
    return ((probe - expected).abs().max() / expected.abs().max()).item()
