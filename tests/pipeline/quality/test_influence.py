"""Shares of the revisits in a fused image, with fusions whose weights are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipeline.quality.influence import revisit_shares


def shares(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the shares of even revisits of these values, fused by a weighted sum."""
    lr = torch.tensor(values).reshape(1, -1, 1, 1, 1).expand(1, -1, 2, 3, 3)

    def fuse(revisits: Tensor) -> Tensor:
        return torch.einsum("brchw,r->bchw", revisits, torch.tensor(weights))

    return revisit_shares(lr, fuse(lr), fuse)


def test_a_share_is_the_change_of_the_image_without_the_revisit() -> None:
    # The medians of the others are 0.3, 0.25 and 0.15.
    assert shares([0.1, 0.2, 0.4], [1.0, 2.0, 0.0]) == pytest.approx([2 / 3, 1 / 3, 0.0])


def test_a_revisit_without_data_has_no_share_and_is_in_no_median() -> None:
    assert shares([0.1, 0.3, 0.0], [1.0, 1.0, 5.0]) == pytest.approx([0.5, 0.5, 0.0])


def test_revisits_that_show_the_same_have_no_share_each() -> None:
    assert shares([0.2, 0.2, 0.2], [1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]


def test_a_single_revisit_is_all() -> None:
    assert shares([0.2], [1.0]) == [1.0]
