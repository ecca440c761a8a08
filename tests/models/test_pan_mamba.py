"""Pan-Mamba and its blocks: their results, their initial weights, their refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.config import ModelConfig
from models.heads.pan_mamba.blocks import CrossMamba, Mamba
from models.heads.pan_mamba.head import PanMamba
from models.registry import check_config, check_sizes


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.double()


def tokens(seed: int = 1, length: int = 21, width: int = 6) -> Tensor:
    return torch.randn(2, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mamba_by_hand(block: Mamba, sequence: Tensor) -> Tensor:
    """Compute the block token by token from its parameters, under mamba_ssm's names."""
    p = dict(block.named_parameters())
    A = -p["A_log"].float().exp().double()
    inner, states = A.shape
    outputs = []
    for sample in sequence:
        x, z = (sample @ p["in_proj.weight"].T).split(inner, dim=-1)
        past = torch.cat([x.new_zeros(3, inner), x])
        h = torch.zeros_like(A)
        for t in range(len(sample)):
            u = F.silu(p["conv1d.bias"] + (past[t : t + 4] * p["conv1d.weight"][:, 0].T).sum(0))
            d, B, C = (p["x_proj.weight"] @ u).tensor_split([len(p["x_proj.weight"]) - 2 * states, -states])
            delta = F.softplus(p["dt_proj.weight"] @ d + p["dt_proj.bias"]).unsqueeze(1)
            h = torch.exp(delta * A) * h + delta * B * u.unsqueeze(1)
            outputs.append(p["out_proj.weight"] @ ((h @ C + p["D"] * u) * F.silu(z[t])))
    return torch.stack(outputs).view(sequence.shape)


def test_a_block_computes_its_equations() -> None:
    block = randomised(Mamba(6))
    torch.testing.assert_close(block(tokens()), mamba_by_hand(block, tokens()))


def test_a_token_sees_itself_and_those_before_it() -> None:
    block = randomised(Mamba(6))
    changed = tokens()
    changed[:, 12] += 1
    differs = (block(tokens()) - block(changed)).abs().amax((0, 2)) > 0
    assert not differs[:12].any()
    assert differs[12:].all()


def test_a_cross_block_is_the_sum_of_two_that_share_their_last_map() -> None:
    cross, first, second = (randomised(block) for block in (CrossMamba(6), Mamba(6), Mamba(6)))
    own = cross.state_dict()
    first.load_state_dict({name: own[name] for name in first.state_dict()})
    others = {"A_log": "A_b_log", "D": "D_b", "in_proj.weight": "in_proj_extra.weight"}
    for name in ("conv1d.weight", "conv1d.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"):
        others[name] = name.replace(".", "_b.")
    second.load_state_dict({name: own[others.get(name, name)] for name in second.state_dict()})
    expected = first(tokens(1)) + second(tokens(2))
    torch.testing.assert_close(cross(tokens(1), tokens(2)), expected)


def test_a_block_begins_as_published() -> None:
    torch.manual_seed(0)
    block = Mamba(32)
    shapes = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    assert shapes == {
        "A_log": (64, 16),
        "D": (64,),
        "in_proj.weight": (128, 32),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "x_proj.weight": (34, 64),
        "dt_proj.weight": (64, 2),
        "dt_proj.bias": (64,),
        "out_proj.weight": (32, 64),
    }
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 17).expand(64, 16))
    assert (block.D == 1).all()
    steps = F.softplus(block.dt_proj.bias)
    assert 0.00099 < steps.min() < 0.005 < steps.median() < 0.02 < steps.max() < 0.101
    assert 0.6 < block.dt_proj.weight.abs().max() < 2**-0.5


def test_steps_are_not_rounded_to_half_precision() -> None:
    block = Mamba(8)
    with torch.no_grad():
        block.dt_proj.bias.fill_(-4.603)  # bfloat16 has -4.59375
        block.dt_proj.weight.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        steps = block.dt_proj(torch.ones(1, 1, 1))
    torch.testing.assert_close(steps, F.softplus(torch.tensor(-4.603)).expand_as(steps))


def head(published: bool) -> PanMamba:
    torch.manual_seed(0)
    return PanMamba(ModelConfig("srcnn", "none", published=published))


def images(height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, 3, height, width, generator=generator), torch.rand(2, 1, height, width, generator=generator)


def test_the_default_computes_what_is_published_without_what_is_idle() -> None:
    published, default = head(published=True), head(published=False)
    idle = default.load_state_dict(published.state_dict(), strict=False).unexpected_keys
    assert sum(published.state_dict()[name].numel() for name in idle) == 6_400
    torch.testing.assert_close(default(*images(9, 8)), published(*images(9, 8)))
    published(*images(9, 8)).sum().backward()
    assert [name for name, p in published.named_parameters() if p.grad is None] == idle


def test_both_images_matter_at_every_pixel_after_them() -> None:
    model = head(published=False)
    ms, pan = images(7, 6)
    for image in (ms, pan):
        reference = model(ms, pan)
        image[:, :, 3, 3] += 1
        assert ((model(ms, pan) - reference).abs() > 0)[:, :, 4:].all()


def test_half_precision_runs() -> None:
    model, (ms, pan) = head(published=False), images(9, 8)
    expected = model(ms, pan)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ms, pan).float(), expected, atol=0.05, rtol=0.1)
    halves = model.bfloat16()(ms.bfloat16(), pan.bfloat16())
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), expected, atol=0.05, rtol=0.1)


@pytest.mark.parametrize("size", [(1, 2), (3, 1)])
def test_small_and_narrow_images_run(size: tuple[int, int]) -> None:
    assert head(published=False)(*images(*size)).isfinite().all()


def test_what_it_cannot_take_is_refused() -> None:
    config = ModelConfig("none", "pan_mamba")
    check_sizes(config, (4, 4), (7, 9))
    with pytest.raises(ValueError, match="Pan-Mamba normalises over the pixels of an image, and a PAN of 1 x 1 has"):
        check_sizes(config, (1, 1), (1, 1))
    published = ModelConfig("none", "pan_mamba", published=True)
    check_sizes(published, (50, 50), (156, 156))
    with pytest.raises(ValueError, match="156 x 156 px and cannot take a PAN of 160 x 156; with published = false"):
        check_sizes(published, (50, 50), (160, 156))
    with pytest.raises(ValueError, match="written for 3 bands and cannot take bands = 4; with published = false"):
        check_config(ModelConfig("none", "pan_mamba", published=True, bands=4))
