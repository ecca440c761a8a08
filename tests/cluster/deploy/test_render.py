"""Structure and values of what is rendered, and that files of others stay."""

from __future__ import annotations

import json
import re
import subprocess
from importlib import metadata, util
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.cli import main
from cluster.deploy.render import TARGETS, render
from cluster.deploy.text import MARK, header, to_yaml
from cluster.jobs.train_job import Job
from pipeline.config import RunConfig
from sharding.errors import UserError
from tests.cluster.deploy.examples import WHOLE, spec_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    return render(spec_of(WHOLE, tmp_path), list(TARGETS))


def documents(text: str) -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def container(group: dict[str, Any]) -> dict[str, Any]:
    (found,) = group["template"]["spec"]["containers"]
    return dict(found)


def secrets_of(part: dict[str, Any]) -> dict[str, tuple[str, str]]:
    references = {entry["name"]: entry["valueFrom"]["secretKeyRef"] for entry in part["env"]}
    return {name: (reference["name"], reference["key"]) for name, reference in references.items()}


def test_every_target_has_its_files_and_every_file_the_mark(texts: dict[str, str]) -> None:
    assert set(texts) == {
        *("rayjob.yaml", "raycluster.yaml", "slurm.sh", "job.json", "aws.yaml"),
        *("Dockerfile", "Dockerfile.dockerignore", "apptainer.def"),
    }
    for name, text in texts.items():
        assert any(MARK in line for line in text.splitlines()[:2]), name
        assert max(map(len, text.splitlines())) < 200, name


def test_the_modules_that_files_run_exist(texts: dict[str, str]) -> None:
    modules = {
        name for text in texts.values() for name in re.findall(r"python3? -m ((?:cluster|pipeline)[\w.]+)", text)
    }
    assert modules >= {"cluster.jobs.train_job", "pipeline.engines.build_op"}
    assert all(util.find_spec(name) for name in modules), modules


@pytest.mark.parametrize("target", ["slurm", "aws"])
def test_the_job_that_is_mounted_is_read(tmp_path: Path, target: str) -> None:
    text = render(spec_of(WHOLE, tmp_path), [target])["job.json"]
    assert Job.from_json(text).config["output"]["uri"].startswith("s3://")


def test_every_file_says_what_it_costs_and_exposes(texts: dict[str, str]) -> None:
    for name, text in texts.items():
        if name not in ("job.json", "Dockerfile.dockerignore"):
            assert "# Costs: " in text, name
            assert "# Exposes: " in text, name


def test_the_rayjob(texts: dict[str, str]) -> None:
    found = documents(texts["rayjob.yaml"])
    job, mounted = found["RayJob"], found["ConfigMap"]
    spec = job["spec"]
    assert job["metadata"]["name"] == "fusion"
    assert {part["metadata"]["namespace"] for part in found.values()} == {"ml"}
    assert spec["entrypoint"] == "python -m cluster.jobs.train_job /etc/satfusion/job.json"
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (3, 9000)
    environment = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert environment["AWS_ENDPOINT_URL"] == "https://s3.example.org"
    assert environment["SATFUSION_JOB"] == "kuberay-ml-fusion", "a retry would wait for the lock of the attempt before"
    rules = [(*rule["condition"].items(), rule["policy"]) for rule in spec["deletionStrategy"]["deletionRules"]]
    assert rules == [
        (("jobStatus", "SUCCEEDED"), ("ttlSeconds", 30), "DeleteCluster"),
        (("jobStatus", "FAILED"), ("ttlSeconds", 30), "DeleteCluster"),
        (("jobDeploymentStatus", "Failed"), ("ttlSeconds", 30), "DeleteCluster"),
    ]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["volumes"] == [{"name": "job", "configMap": {"name": mounted["metadata"]["name"]}}]
    assert head["containers"][0]["volumeMounts"] == [{"name": "job", "mountPath": "/etc/satfusion", "readOnly": True}]
    sent = Job.from_json(mounted["data"]["job.json"])
    assert RunConfig.from_dict(sent.config).train.global_batch == 64
    assert (sent.placement.workers, sent.placement.gpus_per_worker, sent.placement.max_failures) == (8, 1.0, 4)


@pytest.mark.parametrize("kind", ["RayJob", "RayCluster"])
def test_head_and_workers(texts: dict[str, str], kind: str) -> None:
    spec = documents(texts[f"{kind.lower()}.yaml"])[kind]["spec"]
    cluster = spec["rayClusterSpec"] if kind == "RayJob" else spec
    assert cluster["rayVersion"] == metadata.version("ray")
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token", "secretName": "token-of-ray"}
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0", "a rank would run on the head"
    assert "nvidia.com/gpu" not in container(head)["resources"]["limits"]
    assert container(workers)["resources"]["limits"] == {"cpu": "24", "memory": "80Gi", "nvidia.com/gpu": 4}
    assert container(workers)["resources"]["requests"] == container(workers)["resources"]["limits"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (0, 0, 2)
    worker = workers["template"]["spec"]
    assert worker["terminationGracePeriodSeconds"] == 90
    assert worker["automountServiceAccountToken"] is False, "a rank could talk to Kubernetes"
    for group in (head, workers):
        assert container(group)["image"] == "registry.example.org/satfusion:1"
        assert secrets_of(container(group)) == {
            name: ("keys-of-s3", name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        }


def test_the_raycluster_outlives_its_head_and_a_rayjob_is_tried_again(texts: dict[str, str], tmp_path: Path) -> None:
    spec = documents(texts["raycluster.yaml"])["RayCluster"]["spec"]
    assert spec["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis.ml:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "password-of-redis", "key": "password"}}},
    }
    assert "gcsFaultToleranceOptions" not in documents(texts["rayjob.yaml"])["RayJob"]["spec"]["rayClusterSpec"]
    without = spec_of(WHOLE.replace("redis_", "# redis_"), tmp_path)
    assert "gcsFaultToleranceOptions" not in render(without, ["kuberay"])["raycluster.yaml"]


def test_a_queued_rayjob_waits_for_all_its_nodes_and_does_not_grow(tmp_path: Path) -> None:
    spec = spec_of(WHOLE.replace('namespace = "ml"', 'namespace = "ml"\nqueue = "gpus"'), tmp_path)
    job = documents(render(spec, ["kuberay"])["rayjob.yaml"])["RayJob"]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert (job["spec"]["suspend"], job["spec"]["shutdownAfterJobFinishes"]) == (True, True)
    assert job["spec"]["ttlSecondsAfterFinished"] == 30
    assert "deletionStrategy" not in job["spec"]
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"] is False
    assert "autoscalerOptions" not in cluster
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (2, 2, 2)


def test_a_run_on_cpus_asks_for_no_gpu(tmp_path: Path) -> None:
    texts = render(spec_of(WHOLE.replace("cpus = 6", "cpus = 6\ngpus = 0"), tmp_path), list(TARGETS))
    assert "nvidia.com/gpu" not in texts["rayjob.yaml"]
    assert "--gpus-per-node" not in texts["slurm.sh"]
    ranks = yaml.safe_load(texts["aws.yaml"])["available_node_types"]["ranks"]
    assert ranks["resources"] == {"CPU": 24}
    assert "CUDA_VISIBLE_DEVICES" in texts["rayjob.yaml"]


def test_the_launcher_of_aws_fits_rays_own_schema(texts: dict[str, str]) -> None:
    found = util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    schema = json.loads((Path(found.origin).parent / "autoscaler/ray-schema.json").read_text())
    values = yaml.safe_load(texts["aws.yaml"])
    jsonschema.validate(values, schema)
    ranks, head = (values["available_node_types"][name] for name in ("ranks", "head"))
    assert (ranks["min_workers"], ranks["max_workers"], values["max_workers"]) == (0, 2, 2)
    assert ranks["resources"] == {"CPU": 24, "GPU": 4}
    assert head["resources"] == {"CPU": 0}
    assert ranks["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert values["file_mounts"]["/etc/satfusion/job.json"] == "job.json"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**values, "head_type": "head"}, schema)


def test_the_batch_script(texts: dict[str, str], tmp_path: Path) -> None:
    script = texts["slurm.sh"]
    directives = re.findall(r"^#SBATCH --(.*)$", script, re.M)
    assert set(directives) == {
        *("job-name=fusion", "output=fusion-%j.log", "open-mode=append", "nodes=2", "ntasks-per-node=1"),
        *("cpus-per-task=24", "mem=88G", "time=150", "requeue", "signal=B:USR1@90", "gpus-per-node=4"),
        *("partition=gpu", "account=team", "exclusive"),
    }
    assert "export AWS_ENDPOINT_URL=https://s3.example.org\n" in script
    assert "export AWS_SHARED_CREDENTIALS_FILE=~/keys-of-s3\n" in script
    assert "export PATH=/shared/venv/bin:$PATH\n" in script
    assert "@" not in re.sub(r"USR1@90|\$@", "", script), "a placeholder was left"
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    other = WHOLE.replace('environment = "/shared/venv"', 'container = "/shared/fusion.sif"')
    inside = render(spec_of(other, tmp_path), ["slurm"])["slurm.sh"]
    command = 'apptainer exec --nv --bind "$SLURM_SUBMIT_DIR" /shared/fusion.sif ray symmetric-run '
    assert f"srun --wait=30 {command}" in inside


def test_the_images_have_what_the_checkout_has(texts: dict[str, str]) -> None:
    copied = re.findall(r"^COPY (.*) \S+$", texts["Dockerfile"], re.M)
    allowed = set(re.findall(r"^!(.*)$", texts["Dockerfile.dockerignore"], re.M))
    files = {name for line in copied for name in line.split()}
    assert files == allowed
    assert files == set(re.findall(r"^    (\S+) /opt/satfusion/", texts["apptainer.def"], re.M))
    for name in files:
        assert (ROOT / name).exists(), name
    assert texts["Dockerfile"].index("torch numpy") < texts["Dockerfile"].index("--no-build-isolation")
    assert re.search(r"^USER 1000$", texts["Dockerfile"], re.M)
    assert texts["apptainer.def"].startswith("Bootstrap: docker\n")


def test_no_secret_of_the_machine_that_renders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "HIDDEN")
    assert "HIDDEN" not in "".join(render(spec_of(WHOLE, tmp_path), list(TARGETS)).values())


def test_files_are_replaced_and_those_of_others_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deploy.toml").write_text(WHOLE)
    to = tmp_path / "to"
    command = ["cluster", "render", str(tmp_path / "deploy.toml"), "--to", str(to)]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(to / name) for name in render(spec_of(WHOLE, tmp_path), TARGETS)
    ]
    (tmp_path / "deploy.toml").write_text(WHOLE.replace("hours = 2.5", "hours = 3"))
    assert main(command) == 0
    assert "#SBATCH --time=180\n" in (to / "slurm.sh").read_text()
    (to / "slurm.sh").write_text("#!/bin/bash\necho mine\n")
    (tmp_path / "deploy.toml").write_text(WHOLE)
    capsys.readouterr()
    assert main(command) == 2
    assert f"{to / 'slurm.sh'} exists and was not rendered" in capsys.readouterr().err
    assert (to / "slurm.sh").read_text() == "#!/bin/bash\necho mine\n"
    assert "activeDeadlineSeconds: 10800" in (to / "rayjob.yaml").read_text(), "something was written all the same"
    assert main([*command, "--target", "kuberay"]) == 0
    assert "activeDeadlineSeconds: 9000" in (to / "rayjob.yaml").read_text()
    assert not list(to.glob(".*"))


def test_links_and_folders_in_the_way_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deploy.toml").write_text(WHOLE)
    ours = tmp_path / "ours"
    ours.write_text(header())
    (tmp_path / ".rayjob.yaml.new").write_text("of mine")
    command = ["cluster", "render", str(tmp_path / "deploy.toml"), "--target", "kuberay", "--to", str(tmp_path)]
    assert main(command) == 0
    assert (tmp_path / ".rayjob.yaml.new").read_text() == "of mine"
    capsys.readouterr()
    for name in ("link", "folder"):
        (tmp_path / name).mkdir()
    (tmp_path / "link" / "rayjob.yaml").symlink_to(ours)
    (tmp_path / "folder" / "rayjob.yaml").mkdir()
    for to in (tmp_path / "link", tmp_path / "folder", ours):
        command = ["cluster", "render", str(tmp_path / "deploy.toml"), "--target", "kuberay", "--to", str(to)]
        assert main(command) == 2
        assert str(to) in capsys.readouterr().err
    assert ours.read_text() == header()


@pytest.mark.parametrize("target", ["kuberay", "aws"])
def test_a_shared_folder_serves_slurm_alone(target: str, tmp_path: Path) -> None:
    spec = spec_of(WHOLE.replace("s3://bucket/runs/1", "/shared/runs/1"), tmp_path)
    assert "/shared/runs/1" in render(spec, ["slurm"])["job.json"]
    with pytest.raises(UserError, match=f"output.uri = '/shared/runs/1'.*--target {target}"):
        render(spec, [target])


def test_an_unknown_target_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "render", str(tmp_path), "--to", str(tmp_path), "--target", "kube"]) == 2
    assert "--target = 'kube' is not known; did you mean 'kuberay'?" in capsys.readouterr().err


def test_equal_values_are_written_out_and_texts_are_blocks() -> None:
    shared = {"a": 1}
    assert to_yaml([{"x": shared, "y": shared, "text": "one\ntwo\n"}]) == (
        "x:\n  a: 1\ny:\n  a: 1\ntext: |\n  one\n  two\n"
    )


@pytest.mark.parametrize("option", ["--to", "--crds"])
def test_a_folder_that_is_elsewhere_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "render", "deploy.toml", "--to", "here", option, "s3://bucket/there"]) == 2
    assert f"{option} 's3://bucket/there' is no local path" in capsys.readouterr().err
