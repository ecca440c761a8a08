"""Measures of opensr-test: the golden values of the package, and cases with a known answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline.quality.opensr import MEASURES, opensr_measures
from tests.golden.opensr_inputs import METHODS, RATIOS, make_case

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "opensr.json").read_text())["values"]
NAMES = {"improvement": "im_metric", "omission": "om_metric", "hallucination": "ha_metric"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_packages_values(ratio: int, method: str) -> None:
    lr, target, images = make_case(ratio)
    found = opensr_measures(*(torch.from_numpy(image)[None] for image in (images[method], lr, target)))
    golden = GOLDEN[f"{method} {ratio}"]
    for name in MEASURES:
        assert found[name].item() == pytest.approx(golden[NAMES.get(name, name)], rel=1e-5, abs=1e-7), name


def test_what_is_true_improves_and_what_is_invented_does_not() -> None:
    lr, target, images = make_case(4)
    shares = {}
    for name, image in {**images, "perfect": target}.items():
        found = opensr_measures(*(torch.from_numpy(part)[None] for part in (image, lr, target)))
        shares[name] = {measure: found[measure].item() for measure in MEASURES[2:]}
        assert sum(shares[name].values()) == pytest.approx(1)
    assert max(shares, key=lambda name: shares[name]["improvement"]) == "perfect"
    assert max(shares, key=lambda name: shares[name]["omission"]) == "enlarged"
    assert max(shares, key=lambda name: shares[name]["hallucination"]) == "invented"


def test_any_ratio_has_values_and_an_image_that_is_all_border_none() -> None:
    random = torch.Generator().manual_seed(0)
    fused, target = (torch.rand(2, 3, 156, 156, generator=random) for _ in range(2))
    found = opensr_measures(fused, torch.rand(2, 3, 50, 50, generator=random), target)
    assert all(value.shape == (2,) and value.isfinite().all() for value in found.values())
    small = opensr_measures(fused[..., :20, :20], torch.rand(2, 3, 5, 5, generator=random), target[..., :20, :20])
    assert all(value.isnan().all() for value in small.values())


def test_pixels_without_data_count_in_no_measure() -> None:
    small, large, made = make_case(4)
    lr, target, fused = (torch.from_numpy(image)[None] for image in (small, large, made["invented"]))
    valid = torch.ones_like(target[:, :1])
    assert opensr_measures(fused, lr, target, valid) == opensr_measures(fused, lr, target)
    side = target.shape[-1] // 3
    valid[..., :side] = 0
    found = opensr_measures(fused, lr, target, valid)
    other, wrong = target.clone(), fused.clone()
    other[..., :side], wrong[..., :side] = 0.7, 0.0
    assert opensr_measures(wrong, lr, other, valid) == found
    assert opensr_measures(wrong, lr, other) != found
    assert all(value.isnan().all() for value in opensr_measures(fused, lr, target, 0 * valid).values())
