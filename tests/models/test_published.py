"""Published state dicts are read and written completely, or refused."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.config import ModelConfig
from models.published import identify, load_published, read_published, to_published
from models.registry import build_model

SMALL = ModelConfig("highresnet", "pannet", bands=2, revisits=5, hidden=8)


def test_round_trip_through_a_training_checkpoint() -> None:
    source, copy = build_model(SMALL), build_model(SMALL)
    state = {f"backbone.{name}": value for name, value in to_published(source).items()}
    state |= {
        "shifter.conv2d_shift.weight": torch.ones(81, 1, 11, 11),
        "shifter.shift_kernels": torch.ones(1),
    }
    load_published(copy, state)
    for name, value in source.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value), name


@pytest.mark.parametrize("revisits", [1, 2, 3, 6, 9])
def test_one_copy_of_the_fusion_a_level(revisits: int) -> None:
    model = build_model(ModelConfig("highresnet", "none", revisits=revisits, hidden=4))
    levels = {name.split(".")[3] for name in to_published(model) if ".fusion." in name}
    assert len(levels) == {1: 0, 2: 1, 3: 2, 6: 3, 9: 4}[revisits]


def test_missing_and_left_over_names_are_named() -> None:
    model = build_model(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in to_published(model).items()}
    with pytest.raises(ValueError, match=r"lacks MISR\.sr\.upsample\.3\.weight"):
        load_published(model, {k: v for k, v in state.items() if k != "MISR.sr.upsample.3.weight"})
    with pytest.raises(ValueError, match=r"beyond what this model has, MISR\.extra"):
        load_published(model, state | {"MISR.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"upsample\.1\.bias of shape \[3\] where this model needs \[2\]"):
        load_published(model, state | {"MISR.sr.upsample.1.bias": torch.zeros(3)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_idle_parameters_are_passed_over_and_written_as_zeros() -> None:
    config = ModelConfig("highresnet", "none", hidden=8)
    published, ours = build_model(replace(config, published=True)), build_model(config)
    state = to_published(published)
    assert ours.refinement is None
    load_published(ours, state)
    written = to_published(ours)
    assert list(written) == list(state)
    for name, value in state.items():
        expected = torch.zeros_like(value) if name.startswith("color_correct") else value
        assert torch.equal(written[name], expected), name


@pytest.mark.parametrize("wrapping", ["bare", "state_dict", "backbone_state_dict"])
def test_a_file_is_read_however_it_was_saved(wrapping: str, tmp_path: Path) -> None:
    state = to_published(build_model(SMALL))
    prefixed = {f"backbone.{name}": value for name, value in state.items()}
    content: dict[str, object] = {
        "bare": dict(state),
        "state_dict": {"epoch": 3, "optimizer_states": [{"lr": 0.1}], "state_dict": prefixed},
        "backbone_state_dict": {"backbone_state_dict": state, "config": {"scale": 3}},
    }[wrapping]
    torch.save(content, tmp_path / "weights.ckpt")
    copy = build_model(SMALL)
    load_published(copy, read_published(tmp_path / "weights.ckpt"))
    assert all(torch.equal(value, state[name]) for name, value in to_published(copy).items())


class Malicious:
    """Object that pickles into a call which writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.write_text, (self.target, "executed")


def test_a_planted_call_is_not_run(tmp_path: Path) -> None:
    state = to_published(build_model(SMALL))
    torch.save({"x": Malicious(tmp_path / "executed"), "state_dict": state}, tmp_path / "bad.ckpt")
    assert read_published(tmp_path / "bad.ckpt").keys() == state.keys()
    torch.save({"state_dict": {**state, "y": Malicious(tmp_path / "executed")}}, tmp_path / "worse.ckpt")
    with pytest.raises(ValueError, match=r"worse\.ckpt holds no state dict"):
        read_published(tmp_path / "worse.ckpt")
    assert not (tmp_path / "executed").exists()


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.pt cannot be read: No such file"):
        read_published(tmp_path / "none.pt")
    for text in ("weights", "step,loss\n1,0.5\n", "hello world", "a quick brown fox"):
        (tmp_path / "text.pt").write_text(text)
        with pytest.raises(ValueError, match=r"text\.pt is cut short, or not a checkpoint"):
            read_published(tmp_path / "text.pt")
    for content in ({"epoch": 1}, {0: torch.zeros(1)}, {"state_dict": {}}, [torch.zeros(1)], torch.zeros(1)):
        torch.save(content, tmp_path / "empty.pt")
        with pytest.raises(ValueError, match="holds no state dict, neither bare nor under"):
            read_published(tmp_path / "empty.pt")
    torch.save(to_published(build_model(SMALL)), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.pt is cut short"):
        read_published(tmp_path / "cut.pt")


def test_damaged_bytes_end_in_a_sentence(tmp_path: Path) -> None:
    torch.save(to_published(build_model(SMALL)), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    start = whole.index(b"data.pkl") + 64
    refused = 0
    for byte in range(start, start + 400, 3):
        damaged = bytearray(whole)
        damaged[byte] ^= 0x24
        (tmp_path / "damaged.pt").write_bytes(damaged)
        # Some bytes do not matter; for those that do, any error but the sentence fails the test.
        with contextlib.suppress(ValueError):
            read_published(tmp_path / "damaged.pt")
            refused -= 1
        refused += 1
    assert refused > 20


def test_a_kernel_size_that_is_none_leaves_the_model_as_it_was() -> None:
    model = build_model(ModelConfig("none", "arconv", published=True))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: torch.zeros_like(value) for name, value in to_published(model).items()}
    kept = {name: torch.full_like(value, 3) for name, value in state.items() if name.endswith("reserved_NXY")}
    kept["Sharpening.blockSharp.rb5.conv2.reserved_NXY"] = torch.tensor([4, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"reserved_NXY = \[4, 4\] is not a kernel size"):
        load_published(model, state | kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_state_dict_is_recognised_by_its_names() -> None:
    for encoder, head in (("srcnn", "pnn"), ("none", "pannet"), ("highresnet", "none")):
        config = ModelConfig(encoder, head, revisits=5)
        state = {f"backbone.{name}": value for name, value in to_published(build_model(config)).items()}
        assert identify(state, SMALL) == replace(SMALL, encoder=encoder, head=head, published=True)
    assert identify({"other": torch.zeros(1)}, SMALL) is None


@pytest.mark.parametrize(("revisits", "recovered"), [(1, 1), (5, 8), (8, 8)])
def test_the_revisits_of_highresnet_are_recovered(revisits: int, recovered: int) -> None:
    state = to_published(build_model(ModelConfig("highresnet", "pnn", revisits=revisits, hidden=4)))
    found = identify(state, ModelConfig(revisits=3, hidden=4))
    assert found == ModelConfig("highresnet", "pnn", revisits=recovered, hidden=4, published=True)


@pytest.mark.parametrize("prefix", ["backbone.", "module.", "_orig_mod.", "model.", "module._orig_mod.backbone.model."])
def test_prefixes_are_recognised_also_stacked(prefix: str) -> None:
    source, copy = build_model(SMALL), build_model(SMALL)
    load_published(copy, {prefix + name: value for name, value in to_published(source).items()})
    assert all(torch.equal(copy.state_dict()[name], value) for name, value in source.state_dict().items())
    doubled = {name: value for each in ("", prefix) for name, value in prefixed(to_published(source), each)}
    with pytest.raises(ValueError, match=r"has \S+ twice, with different prefixes"):
        load_published(copy, doubled)


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> list[tuple[str, torch.Tensor]]:
    return [(prefix + name, value) for name, value in state.items()]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    model = build_model(SMALL)
    state = {name: given.clone() for name, given in to_published(model).items()}
    state["MISR.sr.upsample.1.bias"][0] = value
    with pytest.raises(ValueError, match=r"values that are not finite in MISR\.sr\.upsample\.1\.bias$"):
        load_published(model, state)


@pytest.mark.parametrize(("encoder", "head"), [("highresnet", "none"), ("none", "pannet")])
def test_an_unused_refinement_has_the_published_three_bands(encoder: str, head: str) -> None:
    model = build_model(ModelConfig(encoder, head, bands=4, hidden=8, published=True))
    state = to_published(model)
    assert state["color_correct.conv.0.weight"].shape == (64, 3, 1, 1)
    assert state["color_correct.conv.2.bias"].shape == (3,)
    load_published(build_model(ModelConfig(encoder, head, bands=4, hidden=8)), state)
    pair = build_model(ModelConfig("highresnet", "pannet", bands=4, hidden=8, published=True))
    assert to_published(pair)["color_correct.conv.0.weight"].shape == (64, 4, 1, 1)
