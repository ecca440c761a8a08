"""Contracts of models: sizes, revisits, composition, dropout, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.blocks import resize
from models.config import ModelConfig
from models.encoders.srcnn import lower_median
from models.registry import ENCODERS, HEADS, all_pairs, build_model, check_config
from models.satfusion import SatFusion

STAGES = all_pairs()


def small(encoder: str, head: str, **changes: int | str) -> SatFusion:
    torch.manual_seed(0)
    return build_model(ModelConfig(encoder, head, **({"hidden": 8, "bands": 2, "revisits": 3} | changes)))


def inputs(batch: int = 2, revisits: int = 3, size: int = 9, pan: tuple[int, int] = (31, 26)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    lr = torch.rand(batch, revisits, 2, size, size + 2, generator=generator)
    return lr, torch.rand(batch, 1, *pan, generator=generator)


@pytest.mark.parametrize(("encoder", "head"), STAGES)
@pytest.mark.parametrize("pan", [(31, 26), (12, 15)])
def test_the_output_lies_on_the_grid_of_pan(encoder: str, head: str, pan: tuple[int, int]) -> None:
    fusion = small(encoder, head)(*inputs(pan=pan))
    assert fusion.fused.shape == (2, 2, *pan)
    assert (fusion.mfif is None) == (encoder == "none")
    assert (fusion.msif is None) == (head == "none")


@pytest.mark.parametrize(("encoder", "head"), STAGES)
def test_samples_do_not_mix(encoder: str, head: str) -> None:
    # In evaluation mode, because batch norms mix the samples in training, as intended.
    model = small(encoder, head).double().eval()
    lr, pan = (x.double() for x in inputs())
    both = model(lr, pan).fused
    alone = torch.cat([model(lr[:1], pan[:1]).fused, model(lr[1:], pan[1:]).fused])
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize(("encoder", "head"), STAGES)
def test_every_parameter_gets_a_gradient(encoder: str, head: str) -> None:
    model = small(encoder, head)
    model(*inputs()).fused.square().sum().backward()
    # A forward pass uses one of the kernels of an adaptive convolution.
    idle = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is None and ".convs." not in name}
    assert not idle


@pytest.mark.parametrize(("encoder", "head"), STAGES)
def test_the_published_model_always_has_upsampler_and_refinement(encoder: str, head: str) -> None:
    stages = {name for name, _ in small(encoder, head, published=True, bands=3).named_children()}
    assert stages >= {"upsampler", "refinement"}


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("revisits", [1, 2, 5])
def test_any_number_of_revisits(encoder: str, revisits: int) -> None:
    lr, pan = inputs(revisits=revisits)
    assert small(encoder, "none", revisits=revisits)(lr, pan).fused.isfinite().all()


def test_a_pair_refines_the_sum_of_its_stages() -> None:
    model = small("srcnn", "pannet")
    fusion = model(*inputs())
    torch.testing.assert_close(fusion.fused, model.refinement(fusion.mfif + fusion.msif))


@pytest.mark.parametrize("head", HEADS)
def test_a_head_alone_takes_the_chosen_revisit(head: str) -> None:
    model = small("none", head)
    lr, pan = inputs()
    fused = model(lr, pan, torch.tensor([2, 1])).fused
    chosen = torch.stack([lr[0, 2], lr[1, 1]]).unsqueeze(1)
    torch.testing.assert_close(fused, model(chosen, pan).fused)
    assert not torch.allclose(fused, model(lr, pan).fused)


@pytest.mark.parametrize(("head", "adds"), [("pnn", False), ("pannet", True)])
def test_only_some_heads_alone_add_their_input(head: str, adds: bool) -> None:
    model = small("none", head)
    for parameter in model.head.conv3.parameters():
        torch.nn.init.zeros_(parameter)
    lr, pan = inputs()
    resized = F.interpolate(lr[:, 0], size=pan.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(lr, pan).fused, resized if adds else torch.zeros_like(resized))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_dropout_is_off_unless_published(encoder: str) -> None:
    rates = {"rams": set(), "trnet": {0.1}, "trnet_pan": {0.1}}.get(encoder, {0.5})
    off, published = small(encoder, "none"), small(encoder, "none", dropout="published")
    batch = inputs()
    assert torch.equal(off.train()(*batch).fused, off.eval()(*batch).fused)
    assert torch.equal(published.train()(*batch).fused, published(*batch).fused) == (not rates)
    assert torch.equal(published.eval()(*batch).fused, off(*batch).fused)
    assert {m.p for m in published.modules() if isinstance(m, torch.nn.Dropout)} == rates


@pytest.mark.parametrize(("revisits", "rank"), [(1, 0), (4, 1), (5, 2), (8, 3)])
def test_the_median_is_the_lower_one(revisits: int, rank: int) -> None:
    order = torch.randperm(revisits, generator=torch.Generator().manual_seed(2)).float()
    lr = order.view(1, -1, 1, 1, 1).expand(1, revisits, 2, 3, 3)
    assert (lower_median(lr) == rank).all()


def test_highresnet_lets_the_unpaired_revisit_pass_or_as_published_fills_up_with_empty_features() -> None:
    model = small("highresnet", "none", revisits=4)
    assert model.encoder.fuse is not None
    fuse = model.encoder.fuse
    lr, pan = inputs(revisits=3)
    first, second, third = model.encoder.encode(lr.flatten(0, 1)).unflatten(0, (2, 3)).unbind(1)
    pair = fuse(torch.stack([first, third], dim=1))[:, 0]
    torch.testing.assert_close(model.encoder(lr, pan), fuse(torch.stack([pair, second], dim=1))[:, 0])
    published = small("highresnet", "none", revisits=4, published=True)
    filled = torch.stack([first, second, third, torch.zeros_like(first)], dim=1)
    torch.testing.assert_close(published.encoder(lr, pan), fuse(fuse(filled))[:, 0])


@pytest.mark.parametrize(("encoder", "head"), STAGES)
def test_channels_last_computes_the_same(encoder: str, head: str) -> None:
    results = []
    for last in (False, True):
        model = small(encoder, head, kernel_freeze_step=0).double()
        model.at_step(0)
        lr, pan = (x.double() for x in inputs(pan=(12, 15)))
        if last:
            model.channels_last()
            lr = lr.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, lr.shape[:2])
        fused = model(lr, pan).fused
        fused.square().sum().backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append(torch.cat([fused.detach().flatten(), *gradients]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_shrinking_blurs_first() -> None:
    checkerboard = (torch.arange(40).view(-1, 1) + torch.arange(40)).remainder(2).float().view(1, 1, 40, 40)
    ramp = torch.arange(40.0).expand(1, 1, 40, 40) / 40
    assert (resize(checkerboard, (12, 12)) - 0.5).abs().max() < 0.05
    torch.testing.assert_close(resize(ramp, (10, 10))[..., 2:-2], F.avg_pool2d(ramp, 4)[..., 2:-2], atol=1e-5, rtol=0)
    flat = torch.full((1, 2, 30, 20), 0.3)
    torch.testing.assert_close(resize(flat, (11, 40)), torch.full((1, 2, 11, 40), 0.3))


def test_bfloat16_and_autocast_run() -> None:
    lr, pan = inputs()
    assert small("srcnn", "pnn").bfloat16()(lr.bfloat16(), pan.bfloat16()).fused.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert small("highresnet", "pannet")(lr, pan).fused.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "SRCN"}, "encoder = 'SRCN' is unknown; did you mean 'srcnn'"),
        ({"encoder": "highres"}, "did you mean 'highresnet'"),
        ({"head": "PSIT"}, "head = 'PSIT' is called 'innformer' here"),
        ({"head": "zzz"}, f"head = 'zzz' is unknown; known: {', '.join(HEADS)}, none"),
        ({"encoder": "none", "head": "none"}, "at least one of them"),
        ({"dropout": "on"}, "dropout = 'on' is unknown"),
        ({"bands": 0}, "bands = 0 is out of range"),
        ({"revisits": -1}, "revisits = -1 is out of range"),
        ({"hidden": 30}, "hidden = 30 cannot be shuffled into zoom = 2"),
    ],
)
def test_a_wrong_configuration_is_refused(changes: dict[str, int | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(ModelConfig(**changes))


def test_a_wrong_input_is_refused() -> None:
    lr, pan = inputs()
    srcnn = small("srcnn", "pnn")
    with pytest.raises(ValueError, match="built for 3 revisits and was given 2"):
        srcnn(lr[:, :2], pan)
    with pytest.raises(ValueError, match=r"lr must be \[B, R, 2, h, w\] for 2 bands"):
        srcnn(lr[:, :, :1], pan)
    with pytest.raises(ValueError, match=r"pan must be \[2, 1, H, W\]"):
        srcnn(lr, pan[:1])
    with pytest.raises(ValueError, match="at least 2 x 2 px, and these are 9 x 1"):
        srcnn(lr[..., :1], pan)
    with pytest.raises(ValueError, match="single revisit"):
        small("highresnet", "none", revisits=1)(lr, pan)
    with pytest.raises(ValueError, match="one index a sample"):
        small("none", "pnn")(lr, pan, torch.zeros(3, dtype=torch.int64))
