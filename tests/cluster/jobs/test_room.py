"""Room that an attempt has taken, on a real Ray node."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from cluster.jobs.room import release_room
from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster, NodeOptions
from cluster.token import MODE_VARIABLE, PATH_VARIABLE

DRIVER = """
import sys
import ray
from ray.util import placement_group, placement_group_table
from cluster.jobs.room import release_room

ray.init(address=sys.argv[1], logging_level="ERROR")
group = placement_group([{"CPU": 1}], lifetime="detached")
ray.get(group.ready())
if "release" in sys.argv:
    release_room()
    release_room()  # what is removed already is no error
print(*sorted(known["state"] for known in placement_group_table().values()))
"""


def driver(cluster: LocalCluster, *words: str) -> str:
    """Take one CPU of the cluster as a driver of its own, and return the states of all placement groups."""
    token = {MODE_VARIABLE: "token", PATH_VARIABLE: cluster.token_file}
    command = [sys.executable, "-c", DRIVER, cluster.gcs, *words]
    done = subprocess.run(command, env={**os.environ, **token}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.distributed
def test_an_ended_attempt_frees_what_it_has_taken_and_nothing_of_other_jobs() -> None:
    with tempfile.TemporaryDirectory(prefix="sf-") as name:  # short enough for Ray's sockets
        cluster = local.up(NodeOptions(nodes=1, cpus_per_node=2), Path(name, "state"))
        try:
            assert driver(cluster) == "CREATED"
            assert driver(cluster, "release") == "CREATED REMOVED"
            # The freed CPU can be taken again, the other one not.
            assert driver(cluster, "release") == "CREATED REMOVED REMOVED"
        finally:
            local.down(Path(name, "state"))


def test_a_head_that_does_not_answer_ends_no_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def table() -> None:
        raise ray.exceptions.GetTimeoutError("the head is slow")

    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "01000000"))
    monkeypatch.setattr(ray.util, "placement_group_table", table)
    release_room()
    assert "resources of the attempt before may still be taken: the head is slow" in caplog.text
