"""The batch script on a real Slurm of one node: given notice, preempted, queued again each time, and the same end."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cluster.deploy.render import render, write
from pipeline.config import RunConfig
from tests.cluster.deploy.examples import spec_of
from tests.command import column, last_checkpoint, run_command
from tests.conftest import TINY

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]
STEPS = 200
CONF = """
ClusterName=test
SlurmctldHost=node1
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that is queued again waits until its credential has expired.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=node1 CPUs=2 RealMemory=4096 State=UNKNOWN
PartitionName=low Nodes=node1 Default=YES PriorityTier=1 GraceTime=10 PreemptMode=REQUEUE
PartitionName=high Nodes=node1 PriorityTier=2 PreemptMode=OFF
"""
TEXT = """
image = "unused:1"
name = "small"
[run]
config = "{config}"
[workers]
gpus = 0
cpus = 1
memory_gib = 1
[head]
memory_gib = 2
[limits]
hours = 0.5
grace_seconds = 30
[slurm]
environment = "{environment}"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Return a folder with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="sf-") as name:
        yield Path(name)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("slurmctld") is None, reason="needs root, and slurm-wlm installed"
)
def test_a_job_is_queued_again_and_ends_the_same(
    folder: Path, small_uri: str, make_config: Callable[..., RunConfig]
) -> None:
    more = ("train.epochs=1000", f"train.max_steps={STEPS}", "train.checkpoint_every=10")
    run_command(1, ["train", "srcnn_pnn", f"data.uri={small_uri}", f"output.uri={folder / 'alone'}", *TINY, *more])
    config = folder / "run.toml"
    config.write_text(make_config(folder / "run", *more).to_toml())
    write(render(spec_of(TEXT.format(config=config, environment=sys.prefix), folder), ["slurm"]), folder / "rendered")
    (folder / "etc").mkdir()
    (folder / "etc/slurm.conf").write_text(CONF.format(folder=folder))
    (folder / "etc/cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")

    namespaces = ["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    script = Path(__file__).with_name("slurm_host.sh")
    ended = subprocess.run(
        [*namespaces, "bash", str(script), str(folder), "15", "50"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        timeout=560,
        check=False,
    )
    log = "".join(path.read_text() for path in (folder / "rendered").glob("small-*.log"))
    assert ended.returncode == 0, ended.stdout + ended.stderr + log
    assert "ended COMPLETED" in ended.stdout, ended.stdout + log
    assert log.count("Head node started.") == 3, log
    assert len(re.findall(r"resuming from \S+/checkpoints/step-\d+", log)) == 2, log
    assert column(folder / "run", "train/loss") == column(folder / "alone", "train/loss")
    assert column(folder / "run", "chips", "batches.csv") == column(folder / "alone", "chips", "batches.csv")
    mine, alone = last_checkpoint(folder / "run"), last_checkpoint(folder / "alone")
    assert mine.position.step == alone.position.step == STEPS
    assert all(torch.equal(mine.state.weights[name], alone.state.weights[name]) for name in alone.state.weights)
    assert not list((folder / "rendered").glob(".small-*")), "a token was left"
