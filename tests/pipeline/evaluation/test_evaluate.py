"""Evaluation: the metrics are those of the images, the baselines as documented."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.cli import main
from pipeline.config import DataConfig, RunConfig
from pipeline.data import ChipDataset
from pipeline.evaluation import evaluate
from pipeline.evaluation.baselines import BASELINES, baselines
from pipeline.evaluation.evaluate import EvaluateOptions, evaluate_run
from pipeline.evaluation.result import Row
from pipeline.quality.metrics import image_metrics
from pipeline.training.loop import run_training
from pipeline.world import World
from sharding.errors import UserError
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage
from tests.command import column
from tests.conftest import SMALL
from tests.distributed import Rank, run_ranks

NO_PANELS = EvaluateOptions(panels=0)


@pytest.fixture(scope="module")
def run(world: World, make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_training(make_config(folder, "train.max_steps=3", "train.checkpoint_every=2"))
    return folder


def test_baselines_are_bicubic_of_the_clearest_and_of_the_median(dataset_uri: str) -> None:
    batch = ChipDataset(dataset_uri, "test", DataConfig()).evaluation_batch(4)
    images = baselines(batch)
    lr = batch.lr[0].numpy()
    sources = {
        "bicubic_clearest": lr[int(batch.revisit[0])],
        # Eight revisits: the mean of the middle two.
        "bicubic_median": np.sort(lr, axis=0)[3:5].mean(0),
    }
    for name, source in sources.items():
        expected = torch.nn.functional.interpolate(torch.from_numpy(source)[None], size=(156, 156), mode="bicubic")
        assert torch.allclose(images[name], expected, atol=1e-6), name


def test_the_table_is_the_mean_over_chips(run: Path, small_uri: str) -> None:
    result = evaluate_run(str(run), "test", "best", options=EvaluateOptions(panels=2))
    assert len(result.chips) == 9 * len(result.methods)
    folder = Path(result.folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "aois.csv",
        "chips.csv",
        "groups.csv",
        "panel-000.png",
        "panel-001.png",
        "table.txt",
    ]
    with (folder / "chips.csv").open(newline="") as file:
        chips = list(csv.DictReader(file))
    with (folder / "aois.csv").open(newline="") as file:
        (aoi,) = [row for row in csv.DictReader(file) if row["method"] == "bicubic_median"]
    own = [float(row["psnr"]) for row in chips if row["method"] == "bicubic_median"]
    batch = ChipDataset(small_uri, "test", DataConfig()).evaluation_batch(7)
    expected = image_metrics(baselines(batch)["bicubic_median"], batch.hr)["psnr"].item()
    assert own[7] == pytest.approx(expected, rel=1e-6)
    assert float(aoi["psnr"]) == pytest.approx(np.mean(own))
    assert result.means("bicubic_median")["psnr"] == pytest.approx(np.mean(own))
    better = max(result.means(method)["psnr"] for method in BASELINES)
    assert result.margin("psnr") == (result.means("fused")["psnr"], better)
    assert f"{result.means('fused')['psnr']:.4g}" in result.table()


def test_validation_and_evaluation_agree(run: Path) -> None:
    result = evaluate_run(str(run), "val", "last", options=NO_PANELS)
    assert result.checkpoint == "step-3"
    for name in ("psnr", "psnr_adjusted", "sam", "ergas"):
        assert result.means("fused")[name] == pytest.approx(float(column(run, f"val/{name}")[-1]), rel=1e-5)


def test_checkpoints_are_chosen_by_rule_or_step(run: Path) -> None:
    assert evaluate_run(str(run), "val", "2", options=NO_PANELS).checkpoint == "step-2"
    with pytest.raises(UserError, match=r"no checkpoint '5': complete ones are best \(step 3\), 2, 3"):
        evaluate_run(str(run), "val", "5")


def test_what_is_not_as_usual_has_a_folder_of_its_own(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    usual = evaluate_run(str(run), "test", "best", options=NO_PANELS)
    published = evaluate_run(str(run), "test", "best", options=EvaluateOptions("published", 0))
    assert published.means("fused")["mse"] != usual.means("fused")["mse"]
    write_worldstrat(tmp_path / "source", 3, seed=9, revisits=2, hr_side=80)
    shard_folder(tmp_path / "source", open_storage(tmp_path / "other"), ShardOptions(SMALL))
    other = evaluate_run(str(run), "test", "best", data_uri=str(tmp_path / "other"), options=NO_PANELS)
    assert len({usual.folder, published.folder, other.folder}) == 3
    assert "is not the dataset that" in caplog.text


def test_a_dataset_of_other_revisits_is_refused(run: Path, tmp_path: Path) -> None:
    write_worldstrat(tmp_path / "source", 3, seed=9, revisits=4, hr_side=80)
    shard_folder(tmp_path / "source", open_storage(tmp_path / "four"), ShardOptions(replace(SMALL, revisits=4)))
    with pytest.raises(UserError, match=r"model\.revisits = 2, but .+ holds 4 revisits"):
        evaluate_run(str(run), "test", "best", data_uri=str(tmp_path / "four"))


@pytest.mark.distributed
def test_two_ranks_give_the_table_of_one_process(run: Path, tmp_path: Path) -> None:
    # Nine chips: one of the ranks has a filler.
    (alone,) = run_ranks(_evaluate, 1, tmp_path / "one", str(run), str(tmp_path / "alone"), seconds=300)
    both = run_ranks(_evaluate, 2, tmp_path / "two", str(run), str(tmp_path / "both"), seconds=300)
    assert both == [alone, alone]
    ours, theirs = (next((tmp_path / name).iterdir()) for name in ("alone", "both"))
    for name in ("chips.csv", "aois.csv", "groups.csv", "perturbed.csv", "table.txt"):
        assert (theirs / name).read_bytes() == (ours / name).read_bytes(), name


def _evaluate(rank: Rank, run: str, output: str) -> list[Row]:
    options = EvaluateOptions(panels=0, perturb=("revisits",))
    return evaluate_run(run, "test", "last", output=output, options=options).chips


def test_two_runs_are_compared_on_the_same_chips_and_not_on_other_datasets(
    run: Path, make_config: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_training(make_config(tmp_path / "second", "train.max_steps=1"))
    page = tmp_path / "page.html"
    assert main(["evaluate", "--compare", str(run), str(tmp_path / "second"), "--report", str(page)]) == 0
    printed = capsys.readouterr().out
    assert f"first: {run}, checkpoint best-" in printed
    first = evaluate_run(str(run), "test", "best", options=NO_PANELS)
    second = evaluate_run(str(tmp_path / "second"), "test", "best", options=NO_PANELS)
    means = [result.means("fused")["psnr"] for result in (first, second)]
    line = next(line for line in printed.splitlines() if line.startswith("psnr "))
    assert line.split() == ["psnr", *(f"{mean:.4g}" for mean in means), f"{means[1] - means[0]:.4g}", "undecided"]
    assert page.read_bytes().endswith(b"</html>\n")

    write_worldstrat(tmp_path / "source", 6, seed=9, revisits=2, hr_side=80)
    shard_folder(tmp_path / "source", open_storage(tmp_path / "other"), ShardOptions(SMALL))
    run_training(make_config(tmp_path / "third", "train.max_steps=1", f"data.uri={tmp_path / 'other'}"))
    assert main(["evaluate", "--compare", str(run), str(tmp_path / "third")]) == 2
    assert "cannot pair chips: the dataset of the first is" in capsys.readouterr().err
    assert not (tmp_path / "third" / "evaluation").exists()
    assert main(["evaluate", str(run), "--compare", str(run), str(run)]) == 2
    assert f"--compare names both runs: drop RUN {run}" in capsys.readouterr().err


def test_classes_come_from_a_split_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aoi = evaluate_run(str(run), "test", "best", options=NO_PANELS).chips[0]["aoi"]
    table = tmp_path / "split.csv"
    table.write_text(f"tile,IPCC Class,split\n{aoi},Wetland,test\n{aoi},Forest,test\n")
    page = tmp_path / "page.html"
    arguments = ["evaluate", str(run), "--classes", str(table), "--panels", "0", "--report", str(page)]
    assert main([*arguments, "--perturb", "noise"]) == 0
    printed = capsys.readouterr().out
    assert "class Wetland, 1 AOIs: psnr of fused" in printed
    assert "noise (standard deviation, reflectance): psnr of fused" in printed
    assert b"Wetland (1 AOIs)" in page.read_bytes()
    assert page.read_bytes().count(b"data:image/png") == 3
    table.write_text("tile,split\n")
    assert main(arguments) == 2
    assert "lacks the column 'tile' or 'IPCC Class'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [("chips.csv", b"chip,price\n1,2\n"), ("table.txt", b""), ("groups.csv", b"\0"), ("panel-000.png", b"\x89PNG")],
)
def test_files_of_others_stay_and_nothing_is_computed(
    name: str, content: bytes, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "test-best-3"
    folder.mkdir()
    (folder / name).write_bytes(content)
    monkeypatch.setattr(evaluate, "score_part", lambda *_, **__: pytest.fail("something was computed"))
    with pytest.raises(UserError, match=rf"test-best-3 holds '{name}', which no evaluation wrote"):
        evaluate_run(str(run), "test", "best", output=str(tmp_path), options=NO_PANELS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: content}


def test_results_stay_until_others_are_computed_and_are_replaced_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(panels: int) -> None:
        evaluate_run(str(run), "test", "best", output=str(tmp_path), options=EvaluateOptions(panels=panels))

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    again(3)
    (folder,) = tmp_path.iterdir()
    (folder / "notes.txt").write_text("of mine")
    first = contents()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again(2)
    assert contents() == first
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "draw", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again(2)
    assert "table.txt" not in contents()
    again(2)
    assert contents() == {name: data for name, data in first.items() if name != "panel-002.png"}


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
