"""The RayJob's entrypoint, word for word, on a local cluster whose head has the file that Kubernetes would mount."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from cluster.deploy.render import render
from cluster.jobs.server import follow
from cluster.jobs.submit import JobRequest, send
from cluster.jobs.train_job import Job
from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster, NodeOptions
from pipeline.training.checkpoint import complete_checkpoints
from sharding.storage import open_storage
from tests.cluster.deploy.examples import spec_of
from tests.conftest import TINY

if TYPE_CHECKING:
    from tests.conftest import S3

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture
def cluster(s3: S3) -> Iterator[LocalCluster]:
    """Start one node, with the keys of the S3 server in its environment as in a pod's."""
    # pytest's own folder is too long for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="sf-") as name:
        yield local.up(NodeOptions(nodes=1, cpus_per_node=1), Path(name) / "state")
        local.down(Path(name) / "state")


def test_the_entrypoint_runs_as_it_stands(cluster: LocalCluster, s3: S3, small_uri: str, tmp_path: Path) -> None:
    data, output = s3.prefix(), s3.prefix()
    for path in sorted(Path(small_uri).rglob("*.*")):
        open_storage(data).upload(str(path.relative_to(small_uri)), path)
    overrides = [f"data.uri={data}", f"output.uri={output}", *TINY, "train.max_steps=2"]
    text = f"""
    image = "unused:1"
    job_folder = "{tmp_path / "mounted"}"
    run.overrides = {overrides}
    run.wait_for_resources = 300.0
    workers = {{gpus = 0, cpus = 1}}
    storage = {{endpoint = "{s3.environment["AWS_ENDPOINT_URL"]}", secret = "keys"}}
    """
    mounted, job = yaml.safe_load_all(render(spec_of(text, tmp_path), ["kuberay"])["rayjob.yaml"])
    (tmp_path / "mounted").mkdir()
    for name, content in mounted["data"].items():
        (tmp_path / "mounted" / name).write_text(content)

    # A pod has the code in its image; `send` sends it.
    request = JobRequest(
        job=Job.from_json(mounted["data"]["job.json"]),
        environment=yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"],
        metadata=job["spec"]["metadata"],
        entrypoint=job["spec"]["entrypoint"],
    )
    job_id = send(request, cluster.address)
    log = io.StringIO()
    assert follow(cluster.address, job_id, log) == 0, log.getvalue()
    assert "rank 0 of 1 runs on node" in log.getvalue()
    assert complete_checkpoints(open_storage(output), "step") == [2]
