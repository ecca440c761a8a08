"""The golden cases on the GPU: in float32, and how far bfloat16 autocast is from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.golden import cases

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("full_float32")]

AMPLIFYING = ("PSIT", "Pan_Mamba")
"""Published heads that amplify rounding, INNformer and Pan-Mamba."""


def amplifies(case: str) -> bool:
    return case.split("+")[1] in AMPLIFYING


def images(case: str, device: torch.device) -> Callable[[], dict[str, Tensor]]:
    """Return a function that computes a case's images."""
    model = cases.golden_model(case).to(device).eval()
    lr, pan = (value.to(device) for value in cases.golden_inputs())

    @torch.no_grad()
    def compute() -> dict[str, Tensor]:
        return {name: image for name, image in model(lr, pan)._asdict().items() if image is not None}

    return compute


@pytest.mark.parametrize("case", cases.CONFIGS)
def test_float32(case: str, device: torch.device, record_property: Callable[[str, object], None]) -> None:
    golden = {name: array for name, array in cases.published(case).outputs.items() if not name.endswith("64")}
    ours = images(case, device)()
    assert ours.keys() >= golden.keys() >= {"fused"}
    error = max(cases.distance(ours[name], expected) for name, expected in golden.items())
    record_property("error", error)
    assert error <= (5e-3 if amplifies(case) else 1e-4)


@pytest.mark.parametrize("case", cases.CONFIGS)
def test_bfloat16(case: str, device: torch.device, record_property: Callable[[str, object], None]) -> None:
    compute = images(case, device)
    exact = compute()
    with torch.autocast(device.type, torch.bfloat16):
        rounded = compute()
    errors = [(torch.dist(rounded[name].float(), exact[name]) / exact[name].norm()).item() for name in exact]
    record_property("relative_l2", max(errors))
    assert all(image.isfinite().all() for image in rounded.values())
    assert max(errors) <= 3e-2 or amplifies(case)
