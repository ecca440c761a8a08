"""U2Net: attention without its n x n weights, sizes that cannot be halved, the published form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import ModelConfig
from models.heads.u2net import U2Net, spatial_attention, spectral_attention
from models.published import count_parameters
from models.registry import build_model, check_config, check_sizes


class Largest(TorchDispatchMode):
    """Counter of the values of the largest tensor that any operation creates."""

    values = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return made


def head(**changes: int | bool) -> U2Net:
    torch.manual_seed(0)
    return U2Net(ModelConfig("none", "u2net", **({"bands": 2} | changes)))


def images(height: int, width: int, bands: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    draw = torch.rand(2, bands + 1, height, width, generator=generator).to(dtype)
    return draw[:, :bands], draw[:, bands:]


def materialised(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return spatial attention by its n x n weights, as the paper writes it."""
    return (query @ key.transpose(-2, -1) / 4).softmax(dim=-1) @ value


def test_spatial_attention_equals_the_form_with_n_x_n_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = [torch.randn(2, 3, 70, 16, dtype=torch.float64, generator=generator) * 2 for _ in range(4)]
    query, key, value = (x.requires_grad_() for x in inputs[:3])
    results = []
    for form in (spatial_attention, materialised):
        out = form(query, key, value)
        results.append((out, *torch.autograd.grad(out, (query, key, value), inputs[3])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_spectral_attention_weighs_channels() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 1, 40, 16, dtype=torch.float64, generator=generator) for _ in range(3))
    products = torch.einsum("ni,nj->ij", query[0, 0], key[0, 0])
    weights = torch.softmax(products / 4 / (40 / 16), dim=1)
    expected = torch.einsum("ni,ij->nj", value[0, 0], weights)
    torch.testing.assert_close(spectral_attention(query, key, value)[0, 0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_tensor_has_n_x_n_values(dtype: torch.dtype) -> None:
    ms, pan = images(64, 64, dtype=dtype)
    with Largest() as made:
        head().to(dtype)(ms, pan).square().mean().backward()
    assert made.values < 64**4 / 10


def test_sides_that_four_does_not_divide_are_filled_up_by_repeating_the_edge() -> None:
    model = head()
    ms, pan = images(10, 13)
    whole = (F.pad(image, (0, 3, 0, 2), mode="replicate") for image in (ms, pan))
    torch.testing.assert_close(model(ms, pan), model(*whole)[..., :10, :13])
    assert model(*images(1, 1)).shape == (2, 2, 1, 1)


def test_bfloat16_runs() -> None:
    model = head().bfloat16()
    assert model(*images(9, 14, dtype=torch.bfloat16)).isfinite().all()


def test_only_the_published_form_holds_what_it_does_not_use() -> None:
    with torch.device("meta"):
        published = U2Net(ModelConfig("none", "u2net", published=True))
        ours = U2Net(ModelConfig("none", "u2net"))
    assert count_parameters(published) == 631_203
    assert count_parameters(published) - count_parameters(ours) == 107_056
    assert not [name for name in ours.state_dict() if "idle" in name]


def test_what_the_published_form_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="written for 3 bands and cannot take bands = 4; with published = false"):
        check_config(ModelConfig("none", "u2net", bands=4, published=True))
    config = ModelConfig("none", "u2net", published=True)
    check_sizes(config, (50, 50), (156, 160))
    with pytest.raises(ValueError, match="cannot take a PAN of 156 x 158 px, whose sides 4 does not divide"):
        check_sizes(config, (50, 50), (156, 158))
    with pytest.raises(ValueError, match="with published = false it takes any size"):
        build_model(config)(torch.rand(1, 1, 3, 5, 5), torch.rand(1, 1, 15, 16))
    check_sizes(ModelConfig("none", "u2net"), (50, 50), (157, 158))
