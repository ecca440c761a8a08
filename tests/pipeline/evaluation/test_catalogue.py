"""The page docs/models.md equals the output of `satfusion models --markdown`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cli import main
from models.config import ModelConfig
from models.registry import ENCODERS, HEADS, all_pairs
from pipeline.evaluation.catalogue import cells, entry

PAGE = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_page_has_a_line_for_each_model_and_stage() -> None:
    rows = [tuple(line.strip("| ").split(" | ")) for line in PAGE.splitlines() if line.startswith("| ")]
    assert [(encoder, head) for encoder, head, *_ in rows[1:]] == all_pairs()
    for name in (*ENCODERS, *HEADS):
        assert f"- **{name}**: " in PAGE


@pytest.mark.parametrize("pair", [("none", "pan_mamba"), ("trnet_pan", "none"), ("srcnn", "u2net")])
def test_the_page_is_of_these_models(pair: tuple[str, str]) -> None:
    assert f"| {' | '.join(cells(entry(ModelConfig(*pair), 50, 156)))} |" in PAGE


@pytest.mark.slow
def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--markdown"]) == 0
    assert capsys.readouterr().out == PAGE


def test_what_cannot_take_the_size_has_dashes() -> None:
    assert cells(entry(ModelConfig("trnet", "innformer"), 4, 7))[2:] == ("-", "-", "-", "-", "yes")
    assert cells(entry(ModelConfig("none", "pnn"), 4, 7))[2] == "74,435"


def test_what_cannot_be_published_has_a_dash() -> None:
    assert cells(entry(ModelConfig("trnet", "none"), 40, 156))[3] == "-"
    assert cells(entry(ModelConfig("rams", "none", bands=1), 4, 12))[3] == "-"
    # 62,465 of the head; upsampler and refinement, which only the published form holds here, have 1,091 and 451
    # (of three bands, as the published one has it whatever the bands are).
    assert cells(entry(ModelConfig("none", "pnn", bands=1), 4, 12))[2:4] == ("62,465", "64,007")
