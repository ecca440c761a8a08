"""TR-MISR, alone and guided by PAN: attention, tokens, and limits of the published forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.blocks import bilinear, resize
from models.config import ModelConfig
from models.encoders import trnet
from models.encoders.trnet import Attention, PanToken, RevisitFusion, TransformerLayer
from models.published import load_published, to_published
from models.registry import build_model, check_config
from models.satfusion import SatFusion

BOTH = pytest.mark.parametrize("encoder", ["trnet", "trnet_pan"])


def build(encoder: str, bands: int = 3, revisits: int = 8, published: bool = False) -> SatFusion:
    torch.manual_seed(0)
    return build_model(ModelConfig(encoder, "none", bands, revisits, hidden=8, published=published))


def inputs(revisits: int = 4, bands: int = 3, size: tuple[int, int] = (5, 6)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.rand(2, revisits, bands, *size, generator=generator),
        torch.rand(2, 1, 16, 17, generator=generator),
    )


def test_attention_is_the_softmax_written_out_with_the_scale_of_the_whole_width() -> None:
    torch.manual_seed(0)
    attention = Attention(0).double()
    x = torch.randn(7, 5, 64, dtype=torch.float64)
    q, k, v = (attention.qkv.weight[64 * i : 64 * (i + 1)] for i in range(3))
    heads = []
    for channels in torch.arange(64).split(8):
        weights = ((x @ q[channels].T) @ (x @ k[channels].T).mT / 8).softmax(-1)
        heads.append(weights @ (x @ v[channels].T))
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, dim=-1)))


def test_of_the_last_layer_only_the_token_is_made() -> None:
    layer = TransformerLayer(0).double()
    x = torch.randn(3, 6, 64, dtype=torch.float64, requires_grad=True)
    shapes = []
    layer.linear1.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape[1]))
    alone, of_all = layer(x, kept=1), layer(x)[:, :1]
    torch.testing.assert_close(alone, of_all)
    assert shapes == [1, 6]
    gradients = [torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]) for y in (alone, of_all)]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@BOTH
def test_sequences_in_parts_give_the_same(encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = build(encoder).double(), [x.double() for x in inputs()]
    whole = model(*batch).fused
    lengths = []
    for layer in model.encoder.fusion.layers:
        layer.register_forward_pre_hook(lambda _, args: lengths.append(len(args[0])))
    monkeypatch.setattr(trnet, "MAX_SEQUENCES", 7)
    torch.testing.assert_close(model(*batch).fused, whole)
    assert lengths == [7] * (8 * 6) + [4] * 6


@BOTH
def test_revisits_are_a_set(encoder: str) -> None:
    model, (lr, pan) = build(encoder).double(), (x.double() for x in inputs())
    torch.testing.assert_close(model(lr[:, [2, 0, 3, 1]], pan).fused, model(lr, pan).fused)
    assert not torch.allclose(model(lr[:, [2, 0, 3, 3]], pan).fused, model(lr, pan).fused)


@BOTH
@pytest.mark.parametrize("revisits", [1, 2, 5])
@pytest.mark.parametrize("bands", [1, 4])
def test_one_model_takes_any_number_of_revisits(encoder: str, revisits: int, bands: int) -> None:
    lr, pan = inputs(revisits, bands, (3, 7))
    assert build(encoder, bands).encoder(lr, pan).shape == (2, 8, 3, 7)


@BOTH
def test_before_the_last_convolution_each_pixel_hears_only_its_own_revisits(encoder: str) -> None:
    fusion = RevisitFusion(2, 8, 0)
    fusion.encode = torch.nn.Conv2d(2, 64, 1)
    fusion.conv = torch.nn.Conv2d(64, 8, 1)
    lr = torch.rand(2, 3, 2, 4, 5)
    other = lr.clone()
    other[1, 2, :, 3, 1] += 1
    token = torch.randn(1 if encoder == "trnet" else 40, 1, 64)
    changed = (fusion(lr, token) - fusion(other, token)).abs().amax(dim=1)
    assert changed[1, 3, 1] > 1e-4
    changed[1, 3, 1] = 0
    assert changed.max() < 1e-6


def test_pan_guides_only_the_guided_encoder() -> None:
    lr, pan = inputs()
    for encoder, guided in (("trnet", False), ("trnet_pan", True)):
        model = build(encoder)
        assert torch.equal(model(lr, pan).fused, model(lr, pan.flip(-1)).fused) != guided


def test_pan_is_a_band_of_each_revisit_and_makes_the_tokens() -> None:
    model = build("trnet_pan")
    lr, pan = inputs()
    seen = {}
    model.encoder.fusion.register_forward_pre_hook(lambda _, args: seen.update(lr=args[0], token=args[1]))
    model(lr, pan)
    small = resize(pan, (5, 6))
    assert torch.equal(seen["lr"][:, :, :3], lr)
    assert torch.equal(seen["lr"][:, :, 3], small.expand(-1, 4, -1, -1))
    features = model.encoder.pan_conv2(model.encoder.pan_conv1(small).relu())
    assert torch.equal(seen["token"], model.encoder.pan_token(features))


def test_tokens_follow_the_pixels_row_by_row() -> None:
    token = PanToken()
    features = torch.rand(2, 3, 4, 5)
    alone = token(features[1:, :, 2:3, 3:4])
    torch.testing.assert_close(token(features)[20 + 2 * 5 + 3], alone[0])


@pytest.mark.parametrize(("published", "shrink"), [(True, bilinear), (False, resize)])
def test_pan_is_blurred_before_it_shrinks_unless_published(published: bool, shrink: object) -> None:
    assert build("trnet_pan", published=published).encoder.shrink is shrink


@BOTH
def test_published_dropout_stands_behind_the_projection_and_both_layers_of_the_mlp(encoder: str) -> None:
    layer = TransformerLayer(0.1)
    places = []
    layer.dropout.register_forward_hook(lambda _, args, __: places.append(args[0].shape[-1]))
    layer.attention.dropout.register_forward_hook(lambda _, args, __: places.append(args[0].shape[-1]))
    layer(torch.rand(1, 3, 64))
    assert places == [64, 128, 64]
    model = build_model(ModelConfig(encoder, "none", dropout="published"))
    assert sum(isinstance(m, torch.nn.Dropout) and m.p == 0.1 for m in model.modules()) == 12


@BOTH
def test_only_the_published_form_holds_idle_parameters(encoder: str) -> None:
    model = build(encoder, published=True)
    model(*inputs(8, size=(50, 50))).fused.sum().backward()
    idle = sum(p.numel() for p in model.encoder.parameters() if p.grad is None)
    assert idle == {"trnet": 8704, "trnet_pan": 64}[encoder]
    own = build(encoder)
    own(*inputs()).fused.sum().backward()
    assert all(p.grad is not None for p in own.parameters())


def test_both_forms_of_tr_misr_compute_the_same() -> None:
    own, published = build("trnet"), build("trnet", published=True)
    with torch.no_grad():
        for parameter in published.parameters():
            parameter.add_(0.01)
    load_published(own, to_published(published))
    batch = inputs(3, size=(50, 50))
    torch.testing.assert_close(own(*batch).fused, published(*batch).fused)


@BOTH
def test_the_published_size(encoder: str) -> None:
    with pytest.raises(
        ValueError, match=r"published .* to 50 x 50 px and cannot take .* 5 x 6; with published = false"
    ):
        build(encoder, published=True)(*inputs(8))


def test_the_published_guided_encoder_is_bound_to_its_bands_and_revisits() -> None:
    with pytest.raises(ValueError, match=r"published SatFusion\* encoder .* bands = 4; with published = false"):
        check_config(ModelConfig("trnet_pan", "none", bands=4, published=True))
    with pytest.raises(ValueError, match=r"built for 8 revisits.* was given 4: with published = false"):
        build("trnet_pan", published=True)(*inputs(4, size=(50, 50)))
