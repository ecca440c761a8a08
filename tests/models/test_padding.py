"""Padding of convolutions: a choice that changes the border, and neither weights nor their names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.config import ModelConfig, Padding
from models.published import to_published
from models.registry import all_pairs, build_model, check_sizes

PADDED: tuple[Padding, ...] = ("reflect", "replicate")


def fuse(pair: tuple[str, str], padding: Padding, side: int = 8) -> tuple[Tensor, list[str]]:
    torch.manual_seed(1)
    network = build_model(ModelConfig(*pair, revisits=2, hidden=8, padding=padding)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        return network(torch.rand(1, 2, 3, side, side), torch.rand(1, 1, side, side)).fused, list(network.state_dict())


@pytest.mark.parametrize("pair", all_pairs(), ids="+".join)
def test_every_model_takes_every_padding(pair: tuple[str, str]) -> None:
    zeros, names = fuse(pair, "zeros")
    for padding in PADDED:
        fused, others = fuse(pair, padding)
        assert others == names
        # These two encoders alone mirror their revisits always, as published.
        assert torch.equal(fused, zeros) == (pair in {("srcnn", "none"), ("highresnet", "none")})
        assert torch.isfinite(fused).all()


def test_a_constant_image_has_no_frame() -> None:
    torch.manual_seed(1)
    images = torch.full((1, 2, 3, 16, 16), 0.2), torch.full((1, 1, 32, 32), 0.3)
    for padding, has_frame in (("zeros", True), ("reflect", False), ("replicate", False)):
        # Without encoder, whose pixel shuffle leaves a pattern.
        network = build_model(ModelConfig("none", "pnn", revisits=2, hidden=8, padding=padding)).eval()
        with torch.no_grad():
            fused = network(*images).fused
        assert (fused.std(dim=(2, 3)).max().item() > 1e-5) == has_frame


def test_paddings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="padding = 'mirror' is unknown; known: zeros, reflect, replicate"):
        ModelConfig(padding="mirror")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="padding = 'reflect' is not the published one"):
        ModelConfig(padding="reflect", published=True)
    with pytest.raises(ValueError, match="is not the published one"):
        to_published(build_model(ModelConfig(hidden=8, padding="reflect")))
    with pytest.raises(ValueError, match="needs images of at least 8 x 8 px"):
        check_sizes(ModelConfig(padding="reflect"), (7, 50), (156, 156))
    with pytest.raises(ValueError, match="use 'replicate'"):
        build_model(ModelConfig("rams", "none", revisits=1, padding="reflect"))


def test_padding_reaches_the_convolutions_only_that_keep_the_size() -> None:
    network = build_model(ModelConfig("rams", "u2net", revisits=2, hidden=8, padding="replicate"))
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and any(module.padding):
            assert module.padding_mode in {"replicate", "reflect"}
