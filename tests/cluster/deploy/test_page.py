"""The commands of docs/deploy.md: each runs here, or the page says that it was not run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.deploy.spec import load_spec
from tests.cluster.deploy.test_crds import write_definition

PAGE = (Path(__file__).parents[3] / "docs/deploy.md").read_text(encoding="utf-8")
CRDS = "kuberay/helm-chart/kuberay-operator/crds"


def test_the_description_and_the_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    Path("deploy.toml").write_text(text)
    assert load_spec(Path("deploy.toml")).workers.nodes == 2
    Path(CRDS).mkdir(parents=True)
    for kind in ("RayJob", "RayCluster"):
        write_definition(Path(CRDS), kind, {"type": "object", "x-kubernetes-preserve-unknown-fields": True})
    commands = re.findall(r"^satfusion (.*)$", "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)), re.M)
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command, comments=True)) == 0, command
    capsys.readouterr()
    named = set(re.findall(r"`([\w.]+)`", "".join(re.findall(r"^\| Files \|.*$", PAGE, re.M))))
    assert named == {path.name for path in Path("deploy").iterdir()}


def test_other_commands_are_marked_as_not_run() -> None:
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        before = PAGE[: PAGE.index(block)].split("\n\n")[-2]
        others = [
            line for line in block.splitlines() if line.startswith(("docker", "apptainer", "kubectl", "ray", "cd"))
        ]
        # `sbatch` runs in test_slurm.py.
        if others and "sbatch" not in block:
            assert "not run" in block + before, block
