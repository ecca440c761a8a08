"""Models equal the published ones: outputs, parameter counts, state dicts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from models.config import ModelConfig
from models.published import count_parameters, to_published
from models.registry import ABSENT, all_pairs, build_model
from tests.golden import cases

# Counts of all 41 published models, read off the instantiated modules: encoders across, heads down.
ENCODERS = ("none", "srcnn", "highresnet", "rams", "trnet", "trnet_pan")
COUNTS = {
    "none": (None, 1_778_766, 1_627_981, 338_055, 470_350, 471_040),
    "pnn": (76_043, 1_853_201, 1_702_416, 412_490, 544_785, 545_475),
    "pannet": (308_683, 2_085_841, 1_935_056, 645_130, 777_425, 778_115),
    "innformer": (64_295, 1_841_453, 1_690_668, 400_742, 533_037, 533_727),
    "u2net": (632_811, 2_409_969, 2_259_184, 969_258, 1_101_553, 1_102_243),
    "pan_mamba": (479_475, 2_256_633, 2_105_848, 815_922, 948_217, 948_907),
    "arconv": (15_922_443, 17_699_601, 17_548_816, 16_258_890, 16_391_185, 16_391_875),
}
MODELS = [
    (encoder, head, count)
    for head, row in COUNTS.items()
    for encoder, count in zip(ENCODERS, row, strict=True)
    if count is not None
]

ROUNDING = {"PSIT": 2e-3, "Pan_Mamba": 2e-3}
"""Relative tolerance of float32 results, by published head; 1e-4 for the others."""


def precisions() -> Iterator[object]:
    """Yield the cases in both precisions; what rounds in a pair does so in its stages, which are cases too."""
    for case, config in cases.CONFIGS.items():
        pair = ABSENT not in (config.encoder, config.head)
        yield pytest.param(case, torch.float64, id=f"64-{case}")
        yield pytest.param(case, torch.float32, id=f"32-{case}", marks=pytest.mark.slow if pair else ())


@pytest.mark.parametrize(("case", "dtype"), list(precisions()))
def test_outputs(case: str, dtype: torch.dtype) -> None:
    double = dtype == torch.float64
    tolerance = 1e-6 if double else ROUNDING.get(case.split("+")[1], 1e-4)
    model = cases.golden_model(case, dtype).eval()
    with torch.no_grad():
        fusion = model(*cases.golden_inputs(dtype))
    golden = {k.removesuffix("64"): v for k, v in cases.published(case).outputs.items() if k.endswith("64") == double}
    ours = {name: image for name, image in fusion._asdict().items() if image is not None}
    assert ours.keys() >= golden.keys() >= {"fused"}
    for name, expected in golden.items():
        assert cases.distance(ours[name], expected) <= tolerance, name


@pytest.mark.parametrize("case", cases.CONFIGS)
def test_state_dict(case: str) -> None:
    golden = cases.published(case)
    own = to_published(build_model(cases.CONFIGS[case]))
    state = [(name, list(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in own.items()]
    assert state == golden.state


@pytest.mark.parametrize(("encoder", "head", "count"), MODELS)
def test_parameters(encoder: str, head: str, count: int) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(encoder, head, published=True))
    assert count_parameters(model) == count


def test_the_table_is_of_all_models() -> None:
    assert {(encoder, head) for encoder, head, _ in MODELS} == set(all_pairs())


def test_golden_counts_agree_with_the_table() -> None:
    table = {(encoder, head): count for encoder, head, count in MODELS}
    for case, config in cases.CONFIGS.items():
        assert cases.published(case).parameters == table[config.encoder, config.head]


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
