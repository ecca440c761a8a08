from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cli import main
from sharding.errors import UserError
from tests.cluster.deploy.examples import WHOLE, spec_of

IMAGE = 'image = "satfusion:1"\n'


def test_one_line_is_enough_beside_the_run(tmp_path: Path) -> None:
    spec = spec_of(IMAGE + '[run]\noverrides = ["data.uri=s3://b/d", "output.uri=s3://b/r"]', tmp_path)
    assert (spec.name, spec.workers.nodes, spec.placement.workers, spec.placement.gpus_per_worker) == (
        *("satfusion", 1, 1),
        1.0,
    )
    assert spec.config().data.uri == "s3://b/d"


def test_the_cost_is_what_all_attempts_can_take(tmp_path: Path) -> None:
    assert spec_of(WHOLE, tmp_path).cost() == (
        "At most 8 GPUs on 2 nodes for 2.5 h in each of 4 attempts: 80 GPU-hours, and the head."
    )
    on_cpus = spec_of(WHOLE.replace("cpus = 6", "cpus = 6\ngpus = 0"), tmp_path)
    assert "At most 48 CPUs" in on_cpus.cost()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no container image"),
        ("image = 1", "image = 1 must be a string"),
        (IMAGE + "wrkers = 2", "unknown key 'wrkers'; did you mean 'workers'?"),
        (IMAGE + "[workers]\ngpu = 2", "unknown key 'workers.gpu'; did you mean 'gpus'?"),
        (IMAGE + "workers = 2", "'workers' is a section"),
        (IMAGE + "[workers]\ncount = 0", "workers.count = 0 is out of range"),
        (IMAGE + "[workers]\ncount = 3\nper_node = 2", "workers.per_node = 2 is out of range: it must be a divisor"),
        (IMAGE + "[workers]\ncpus = 1.5", "workers.cpus = 1.5 must be a whole number"),
        (IMAGE + "[run]\noverrides = 'a.b=1'", "run.overrides = 'a.b=1' must be a list of strings"),
        (IMAGE + "[limits]\nhours = inf", "limits.hours = inf is out of range"),
        (IMAGE + "[limits]\nhours = nan", "limits.hours = nan is out of range"),
        (IMAGE + 'name = "Fusion"', "name = 'Fusion' is out of range"),
        (IMAGE + f'name = "{"a" * 48}"', "at most 47 characters"),
        ('image = "x; rm -rf /"', "image = 'x; rm -rf /' is out of range"),
        (IMAGE + '[slurm]\npartition = "a b"', "slurm.partition = 'a b'"),
        (IMAGE + '[slurm]\npartition = "$(id)"', "slurm.partition"),
        (IMAGE + '[slurm]\nenvironment = "venv"', "slurm.environment = 'venv' is out of range: it must be an absolute"),
        (IMAGE + '[slurm]\nenvironment = "/a"\ncontainer = "/b.sif"', "slurm.container"),
        (IMAGE + '[storage]\nendpoint = "s3.example.org"', "storage.endpoint = 's3.example.org'"),
        (IMAGE + '[kuberay]\nredis_address = "redis"', "kuberay.redis_address = 'redis' is out of range"),
        (IMAGE + '[kuberay]\nredis_secret = "x"', "kuberay.redis_secret"),
        (IMAGE + '[aws]\nworker_type = ""', "aws.worker_type"),
        ("image = ", "is not valid TOML"),
    ],
)
def test_a_mistake_is_one_sentence(
    text: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deploy.toml"
    path.write_text(text)
    assert main(["cluster", "render", str(path), "--to", str(tmp_path / "to")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("satfusion: error: ")
    assert sentence in line
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    "text",
    [
        '[storage]\nsecret = "AKIAHIDDEN/WITH+SLASH"',
        '[kuberay]\ntoken_secret = "HIDDEN token"',
        '[storage]\nendpoint = "https://me:HIDDEN@s3.example.org"',
        '[run]\noverrides = ["data.uri=s3://KEY:HIDDEN@bucket/x"]',
    ],
)
def test_a_secret_in_place_of_its_name_is_refused_and_not_repeated(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "deploy.toml"
    path.write_text(IMAGE + text)
    assert main(["cluster", "render", str(path), "--to", str(tmp_path / "to")]) == 2
    shown = capsys.readouterr()
    assert "HIDDEN" not in shown.out + shown.err


@pytest.mark.parametrize("override", ["data.uri=shards", "output.uri=~/run"])
def test_a_path_that_means_nothing_elsewhere_is_refused(override: str, tmp_path: Path) -> None:
    text = f'{IMAGE}[run]\noverrides = ["data.uri=s3://b/d", "output.uri=s3://b/r", "{override}"]'
    with pytest.raises(UserError, match=override.split("=")[0]):
        spec_of(text, tmp_path).config()


def test_what_is_no_description_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (2**20 + 1))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for path in (large, tmp_path / "binary.toml", tmp_path / "absent.toml", tmp_path):
        assert main(["cluster", "render", str(path), "--to", str(tmp_path / "to")]) == 2
        assert str(path) in capsys.readouterr().err
