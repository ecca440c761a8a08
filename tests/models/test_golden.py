"""Models equal the published ones: outputs, parameter counts, state dicts."""

from __future__ import annotations

import pytest
import torch

from models.published import to_published
from models.registry import build_model
from tests.golden import cases

# Read off the instantiated published modules, so a count that the JSON got wrong would show.
COUNTS = {
    "SRCNN+None": 1_778_766,
    "HighResNet+None": 1_627_981,
    "None+PNN": 76_043,
    "None+PANNet": 308_683,
    "SRCNN+PNN": 1_853_201,
    "HighResNet+PANNet": 1_935_056,
}


@pytest.mark.parametrize("case", cases.CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "suffix", "tolerance"),
    [(torch.float64, "64", 1e-6), (torch.float32, "", 1e-4)],
    ids=["64", "32"],
)
def test_outputs(case: str, dtype: torch.dtype, suffix: str, tolerance: float) -> None:
    model = cases.golden_model(case, dtype).eval()
    with torch.no_grad():
        fusion = model(*cases.golden_inputs(dtype))
    golden = {k: v for k, v in cases.published(case).outputs.items() if k.endswith("64") == (suffix == "64")}
    ours = {name + suffix: image for name, image in fusion._asdict().items() if image is not None}
    assert ours.keys() >= golden.keys() >= {f"fused{suffix}"}
    for name, expected in golden.items():
        assert cases.distance(ours[name], expected) <= tolerance, name


@pytest.mark.parametrize("case", cases.CONFIGS)
def test_parameters_and_state_dict(case: str) -> None:
    model = build_model(cases.CONFIGS[case])
    golden = cases.published(case)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == golden.parameters == COUNTS[case]
    state = [(name, list(v.shape), str(v.dtype).removeprefix("torch.")) for name, v in to_published(model).items()]
    assert state == golden.state


@pytest.mark.parametrize("case", ["SRCNN+None", "HighResNet+None"])
def test_the_last_copy_wins_and_all_are_written(case: str) -> None:
    name, last = {
        "SRCNN+None": (
            "MISR.blockMISR.doubleconv2d.doubleconv2d.0.bias",
            "MISR.blockMISR.fusion_SRCNN.0.doubleconv2d.0.bias",
        ),
        "HighResNet+None": ("MISR.blockMISR.fusion.0.fuse.1.bias", "MISR.blockMISR.fusion.2.fuse.1.bias"),
    }[case]
    state = to_published(cases.golden_model(case))
    assert torch.equal(state[name], state[last])
    assert torch.equal(state[last], cases.weight(last, state[last]))
    assert not torch.equal(state[name], cases.weight(name, state[name]))
