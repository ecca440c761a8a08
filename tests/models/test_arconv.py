"""ARConv: sampling positions, choice of the kernel, damping of gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.config import ModelConfig
from models.heads.arconv import adaptive
from models.heads.arconv.adaptive import AdaptiveConv, sample_taps
from models.registry import build_model, check_sizes
from models.satfusion import SatFusion


def conv(channels: int = 4, follows_batch: bool = False) -> AdaptiveConv:
    torch.manual_seed(0)
    return AdaptiveConv(channels, 0.0, follows_batch).double()


def image(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def set_extents(module: AdaptiveConv, height: float, width: float) -> None:
    """Set every pixel's height and width to these values, in (1, 9)."""
    for branch, extent in ((module.height, height), (module.width, width)):
        last = branch[-1]
        assert isinstance(last, nn.BatchNorm2d)
        share = (extent - 1) / 8
        nn.init.zeros_(last.weight)
        nn.init.constant_(last.bias, math.log(share / (1 - share)))


def head(**changes: int | str | bool) -> SatFusion:
    torch.manual_seed(0)
    return build_model(ModelConfig("none", "arconv", **({"bands": 2, "revisits": 1} | changes)))


def adaptive_convs(model: SatFusion) -> list[AdaptiveConv]:
    return [module for module in model.modules() if isinstance(module, AdaptiveConv)]


def pixel(x: Tensor, row: int, column: int) -> float:
    return x[row, column].item() if 0 <= row < x.shape[0] and 0 <= column < x.shape[1] else 0.0


def bilinear_sample(x: Tensor, row: float, column: float) -> float:
    top, left = math.floor(row), math.floor(column)
    down, right = row - top, column - left
    return (
        (1 - down) * (1 - right) * pixel(x, top, left)
        + (1 - down) * right * pixel(x, top, left + 1)
        + down * (1 - right) * pixel(x, top + 1, left)
        + down * right * pixel(x, top + 1, left + 1)
    )


@pytest.mark.parametrize("kernel", [(3, 5), (7, 3)])
@pytest.mark.parametrize("size", [(4, 6), (1, 3)])
def test_taps_are_sampled_where_the_equation_says(kernel: tuple[int, int], size: tuple[int, int]) -> None:
    x, height, width = image(2, 1, *size), 1 + 8 * image(2, 1, *size), 1 + 8 * image(2, 1, *size).flip(-1)
    taps = sample_taps(x, height, width, kernel)
    assert taps.shape == (2, 1, kernel[0] * size[0], kernel[1] * size[1])
    for b in range(2):
        for r in range(taps.shape[2]):
            for c in range(taps.shape[3]):
                (y, i), (z, j) = divmod(r, kernel[0]), divmod(c, kernel[1])
                row = y + height[b, 0, y, z].item() / kernel[0] * (i - (kernel[0] - 1) / 2)
                column = z + width[b, 0, y, z].item() / kernel[1] * (j - (kernel[1] - 1) / 2)
                expected = bilinear_sample(x[b, 0], row, column)
                assert taps[b, 0, r, c].item() == pytest.approx(expected, abs=1e-12)


def test_a_kernel_as_large_as_its_taps_is_a_plain_convolution() -> None:
    module, x = conv(), image(1, 4, 9, 11)
    set_extents(module, 5, 7)
    module(x)
    chosen = module.convs[adaptive.KERNELS.index((5, 7))]
    assert isinstance(chosen, nn.Conv2d)
    plain = F.conv2d(x, chosen.weight, chosen.bias, padding=(2, 3))
    torch.testing.assert_close(module(x), plain * torch.tanh(module.scale(x)) + module.shift(x))


def test_positions_keep_their_fractions_in_bfloat16() -> None:
    ramp = (torch.arange(512.0) / 512).expand(1, 1, 2, 512)
    extent = torch.full((1, 1, 2, 512), 2.0)
    taps = sample_taps(ramp.bfloat16(), extent, extent, (3, 3))
    assert taps.dtype == torch.bfloat16
    torch.testing.assert_close(taps.float(), sample_taps(ramp, extent, extent, (3, 3)), atol=2**-8, rtol=0)
    assert adaptive._extent(ramp.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("height", "width", "kernel"),
    [
        (1.01, 4.99, (3, 3)),
        (5.01, 3.0, (5, 3)),
        (6.99, 7.01, (5, 7)),
        (8.99, 5.01, (7, 5)),
    ],
)
def test_the_kernel_follows_the_mean_extents(height: float, width: float, kernel: tuple[int, int]) -> None:
    module, x = conv(), image(1, 4, 5, 6)
    set_extents(module, height, width)
    module(x).sum().backward()
    assert module.reserved_NXY.tolist() == list(kernel)
    used = {k for k, c in zip(adaptive.KERNELS, module.convs, strict=True) if c.weight.grad is not None}
    assert used == {kernel}


def test_a_diverged_network_still_takes_a_kernel() -> None:
    module = conv()
    set_extents(module, 5.5, 5.5)
    nn.init.constant_(module.height[-1].bias, math.nan)
    assert module(image(1, 4, 5, 6)).isnan().all()
    assert module.reserved_NXY.tolist() == [3, 5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("published", [False, True])
def test_images_that_are_no_numbers_take_the_smallest_kernels(value: float, published: bool) -> None:
    # The loop finds a loss that is not finite a step or two later; until then the network must run.
    model = head(published=published, kernel_freeze_step=2)
    for step in range(4):
        model.at_step(step)
        lr, pan = torch.rand(2, 1, 2, 6, 6), torch.rand(2, 1, 8, 8)
        lr[0, 0, 1, 3, 3] = value if step else 0.5
        fused = model(lr, pan).fused
        fused.sum().backward()
        assert fused.isnan().any() == (step > 0)
        if step == 1:
            assert {tuple(module.reserved_NXY.tolist()) for module in adaptive_convs(model)} == {(3, 3)}


def test_evaluation_uses_the_stored_kernel_unless_published() -> None:
    for follows_batch in (False, True):
        module, x = conv(follows_batch=follows_batch), image(1, 4, 5, 6)
        set_extents(module, 5.5, 7.5)
        module.train()(x)
        set_extents(module, 3.5, 3.5)
        kept = module.eval()(x)
        assert module.reserved_NXY.tolist() == [5, 7]
        module.load_state_dict(module.state_dict() | {"reserved_NXY": torch.tensor([3, 3])})
        assert torch.equal(kept, module(x)) == follows_batch


def test_kernels_freeze_at_the_step_and_not_before() -> None:
    model = head(kernel_freeze_step=2)
    lr, pan = torch.rand(1, 1, 2, 6, 6), torch.rand(1, 1, 8, 8)
    chosen = []
    for step, extent in enumerate([3.5, 5.5, 7.5, 3.5]):
        for module in adaptive_convs(model):
            set_extents(module, extent, extent)
        model.at_step(step)
        model(lr, pan)
        model(lr, pan)  # forward passes do not count
        chosen.append({tuple(module.reserved_NXY.tolist()) for module in adaptive_convs(model)})
    assert chosen == [{(3, 3)}, {(5, 5)}, {(5, 5)}, {(5, 5)}]


def test_the_published_form_keeps_its_kernels_between_the_steps_of_a_training() -> None:
    model = head(published=True, bands=3).eval()
    lr, pan = torch.rand(1, 1, 3, 6, 6), torch.rand(1, 1, 8, 8)
    for module in adaptive_convs(model):
        set_extents(module, 5.5, 5.5)
    as_published = model(lr, pan).fused
    model.at_step(1)
    assert not torch.equal(as_published, model(lr, pan).fused)
    model.train()(lr, pan)
    assert {tuple(module.reserved_NXY.tolist()) for module in adaptive_convs(model)} == {(5, 5)}


def test_the_kernel_travels_with_state_dicts_and_copies() -> None:
    module, x = conv(), image(1, 4, 5, 6)
    set_extents(module, 5.5, 7.5)
    module.train()(x)
    expected = module.eval()(x)
    loaded = conv().eval()
    loaded.load_state_dict(module.state_dict())
    for twin in (loaded, copy.deepcopy(module), copy.deepcopy(module).to("cpu")):
        assert torch.equal(twin(x), expected)
        assert twin.reserved_NXY.tolist() == [5, 7]
    with pytest.raises(ValueError, match=r"reserved_NXY = \[4, 3\] is not a kernel size"):
        loaded.load_state_dict(module.state_dict() | {"reserved_NXY": torch.tensor([4, 3])})


@pytest.mark.parametrize("published", [False, True])
def test_evaluation_reads_no_values(published: bool) -> None:
    with torch.device("meta"):
        model = head(published=published, bands=2).eval()
        assert model(torch.empty(1, 1, 2, 6, 6), torch.empty(1, 1, 8, 8)).fused.shape == (1, 2, 8, 8)


def test_any_size_is_filled_up_by_its_edge_and_cut() -> None:
    model = head().eval()
    lr, pan = torch.rand(1, 1, 2, 13, 10), torch.rand(1, 1, 13, 10)
    filled = [F.pad(x, (0, 2, 0, 3), mode="replicate") for x in (lr[:, 0], pan)]
    expected = model(filled[0].unsqueeze(1), filled[1]).fused[..., :13, :10]
    torch.testing.assert_close(model(lr, pan).fused, expected)
    with pytest.raises(ValueError, match=r"cannot take a PAN of 13 x 12 px, whose sides 4 does not divide; with pub"):
        check_sizes(ModelConfig("none", "arconv", published=True), (5, 5), (13, 12))


FACTORS = {
    **dict.fromkeys(("scale.0", "shift.0", "height.0", "width.0"), 0.1),
    **dict.fromkeys(("context.1", "context.4", "context.5"), 0.01),
    "context.0": 0.001,
}


def test_gradients_are_damped_as_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = conv(), image(2, 4, 6, 6)

    def gradients() -> dict[str, Tensor]:
        module.zero_grad()
        module(x).square().sum().backward()
        return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    damped = gradients()
    monkeypatch.setattr(adaptive, "DAMPING", 1.0)
    true = gradients()
    assert any(gradient.abs().max() > 1e-3 for name, gradient in true.items() if name.startswith("context.0"))
    for name, gradient in true.items():
        factor = FACTORS.get(name.rpartition(".")[0], 1.0)
        torch.testing.assert_close(damped[name], factor * gradient, msg=name)


def test_the_input_gets_its_gradient_damped_once_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = conv()

    def gradients() -> list[Tensor]:
        found = []
        for path in (module.scale, module.shift, nn.Sequential(module.context, module.height)):
            x = image(2, 4, 6, 6).requires_grad_()
            found.append(torch.autograd.grad(path(x).square().sum() + path(x)[:, :, 0].sum(), x)[0])
        return found

    damped = gradients()
    module.eval()
    undamped = gradients()
    monkeypatch.setattr(adaptive, "DAMPING", 1.0)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), undamped, strict=True)), "evaluation is not damped"
    module.train()
    for ours, true, factor in zip(damped, gradients(), (0.01, 0.01, 0.0001), strict=True):
        torch.testing.assert_close(ours, factor * true)


def test_dropout_drops_channels_at_the_published_places_alone() -> None:
    rates = [m.p for m in head(dropout="published").modules() if isinstance(m, nn.Dropout2d)]
    assert rates == [0.3] * 5 * 10
    assert {m.p for m in head().modules() if isinstance(m, nn.Dropout2d)} == {0.0}


def test_bfloat16_comes_near() -> None:
    model = head().eval()
    lr, pan = torch.rand(1, 1, 2, 9, 9), torch.rand(1, 1, 18, 15)
    exact = model(lr, pan).fused
    with torch.autocast("cpu", torch.bfloat16):
        assert (model(lr, pan).fused - exact).abs().max() < 0.02
    model.bfloat16()
    assert (model(lr.bfloat16(), pan.bfloat16()).fused - exact).abs().max() < 0.02
