"""INNformer: its search keeps no similarities, its blocks can be inverted, its initial weights are as published."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.config import ModelConfig
from models.heads import innformer
from models.heads.innformer import INNformer, InvertibleBlock, InvertibleConv, PatchTransformer, nearest_patch, transfer
from models.registry import check_sizes

WINDOW = (8, 24, 24)
PATCHES = 24 * 24


class Largest(TorchDispatchMode):
    """Counter of the bytes of the largest tensor that any operation creates."""

    nbytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.nbytes = max(self.nbytes, tensor.nbytes)
        return made


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def transfer_by_the_whole_matrix(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same with all similarities [P, 576, 576] in the graph."""
    queries, keys = F.unfold(query, 3, padding=1), F.unfold(key, 3, padding=1)
    similarity = F.normalize(queries, dim=1).transpose(1, 2) @ F.normalize(keys, dim=1)
    cosine, index = similarity.max(dim=1)
    chosen = queries.gather(2, index.unsqueeze(1).expand_as(queries))
    return F.fold(chosen, WINDOW[1:], 3, padding=1) / 9, cosine.view(-1, 1, *WINDOW[1:])


def test_the_search_equals_the_one_that_keeps_all_similarities() -> None:
    query, key = (draw(3, *WINDOW, seed=seed).requires_grad_() for seed in (0, 1))
    weights = draw(3, *WINDOW, seed=2), draw(3, 1, *WINDOW[1:], seed=3)
    results = []
    for form in (transfer, transfer_by_the_whole_matrix):
        found = form(query, key)
        results.append((*found, *torch.autograd.grad(found, (query, key), weights)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_windows_are_searched_a_few_at_a_time_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = PatchTransformer().double()
    key, query = draw(2, 8, 20, 17), draw(2, 8, 20, 17, seed=1)
    together = transformer(key, query)
    monkeypatch.setattr(innformer, "CHUNK", 3)
    torch.testing.assert_close(transformer(key, query), together)
    monkeypatch.setattr(innformer, "transfer", transfer_by_the_whole_matrix)
    torch.testing.assert_close(transformer(key, query), together)


def test_the_first_of_equal_patches_is_taken() -> None:
    # With single values every cosine is exactly 0 or 1.
    query, key = torch.zeros(2, 1, *WINDOW)
    query[0, 0, 5, 7] = query[0, 0, 18, 3] = key[0, 0, 10, 10] = 1
    index = nearest_patch(query, key).view(24, 24)
    found = {(10 + dy, 10 + dx): 24 * (5 + dy) + 7 + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert {place: index[place].item() for place in found} == found
    assert index.sum() == sum(found.values())


def test_patches_of_zeros_have_a_gradient() -> None:
    query, key = (torch.zeros(1, *WINDOW, requires_grad=True) for _ in range(2))
    texture, cosine = transfer(query, key)
    (texture.sum() + cosine.sum()).backward()
    assert query.grad is not None
    assert key.grad is not None
    assert query.grad.isfinite().all()
    assert key.grad.isfinite().all()


def test_memory_does_not_grow_with_the_similarities() -> None:
    key, query = (draw(1, 8, 96, 96, seed=seed, dtype=torch.float32).requires_grad_() for seed in (0, 1))
    windows = 12**2
    assert windows > 2 * innformer.CHUNK
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    transformer = PatchTransformer()
    with Largest() as made:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = transformer(key, query)
        out.square().sum().backward()
    assert made.nbytes == 4 * innformer.CHUNK * PATCHES**2
    assert sum(kept.values()) < 4 * windows * PATCHES**2 / 5


def test_a_block_can_be_inverted() -> None:
    torch.manual_seed(0)
    block = InvertibleBlock().double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = draw(2, 16, 9, 11)
    with torch.no_grad():
        first, second = block(x).chunk(2, dim=1)
        before = (second - block.shift2(first)) / block.log_scale(first).exp()
        mixed = torch.cat([first - block.shift1(before), before], dim=1)
        torch.testing.assert_close(torch.einsum("ij,bjhw->bihw", block.mix.weight().inverse(), mixed), x)
        assert not torch.allclose(block(x), x)


def test_the_1x1_convolution_begins_orthogonal_and_in_its_factors() -> None:
    torch.manual_seed(4)
    conv = InvertibleConv(16)
    torch.manual_seed(4)
    orthogonal = torch.linalg.qr(torch.randn(16, 16)).Q
    weight = conv.weight()
    torch.testing.assert_close(weight, orthogonal, rtol=0, atol=1e-5)
    assert weight.det().abs().item() == pytest.approx(1, abs=1e-4)
    assert conv.log_s.sum().item() == pytest.approx(0, abs=1e-4)
    assert torch.equal(conv.p.sort(dim=1).values, torch.eye(16)[-1].expand(16, 16))
    assert torch.equal(conv.sign_s.abs(), torch.ones(16))
    torch.testing.assert_close(conv.lower, torch.linalg.lu(orthogonal).L)
    assert torch.equal(conv.upper, conv.upper.triu(1))


def test_only_the_strict_triangles_count_and_p_need_not_be_a_permutation() -> None:
    conv = InvertibleConv(4)
    lower, upper, p = draw(4, 4), draw(4, 4, seed=1), draw(4, 4, seed=2)
    log_s, sign_s = draw(4, seed=3), draw(4, seed=4)
    conv.double().load_state_dict({"lower": lower, "log_s": log_s, "upper": upper, "p": p, "sign_s": sign_s})
    expected = p @ (lower.tril(-1) + torch.eye(4)) @ (upper.triu(1) + torch.diag(sign_s * log_s.exp()))
    torch.testing.assert_close(conv.weight(), expected)


def test_convolutions_of_the_invertible_part_begin_by_xavier() -> None:
    torch.manual_seed(0)
    head = INNformer(ModelConfig("none", "innformer"))
    for conv in [m for m in (*head.blocks.modules(), head.fuse) if isinstance(m, nn.Conv2d)]:
        area = math.prod(conv.kernel_size)
        std = math.sqrt(2 / (area * (conv.in_channels + conv.out_channels)))
        assert conv.bias is not None
        assert not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * conv.weight.numel()))
    assert head.local.weight.abs().max().item() <= 1 / math.sqrt(16 * 9)
    assert head.local.bias is not None
    assert head.local.bias.all()


def test_images_smaller_than_a_window_are_refused() -> None:
    for published in (False, True):
        config = ModelConfig("none", "innformer", published=published)
        with pytest.raises(ValueError, match="at least 8 x 8 px, and this one is 7 x 30"):
            check_sizes(config, (5, 5), (7, 30))
        check_sizes(config, (5, 5), (8, 8))
    assert INNformer(config)(torch.rand(1, 3, 8, 9), torch.rand(1, 1, 8, 9)).shape == (1, 3, 8, 9)


def test_bfloat16_runs() -> None:
    head = INNformer(ModelConfig("none", "innformer")).bfloat16()
    ms, pan = torch.rand(1, 3, 17, 21).bfloat16(), torch.rand(1, 1, 17, 21).bfloat16()
    assert head(ms, pan).isfinite().all()


def test_the_search_is_wide_under_autocast() -> None:
    generator = torch.Generator().manual_seed(4)
    query, key = (torch.randn(2, 8, 24, 24, generator=generator) for _ in range(2))
    expected = nearest_patch(query, key)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_patch(query, key), expected)
