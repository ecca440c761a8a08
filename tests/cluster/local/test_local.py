"""A real cluster of two Ray nodes, started once, and real jobs on it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.cli import main
from cluster.jobs.placement import Placement
from cluster.jobs.server import follow
from cluster.jobs.submit import build_request, send
from cluster.local import nodes as local
from cluster.local.nodes import LocalCluster
from cluster.local.objectstore import ObjectStore
from cluster.local.processes import is_running, running_with
from cluster.token import authorization, token_file
from pipeline.config import RunConfig, load_config
from pipeline.signals import STOPPED_STATUS
from sharding.run.dataset import ShardOptions, shard_folder
from sharding.sources.synthetic.rasters import write_worldstrat
from sharding.storage import open_storage
from tests.cluster.local.conftest import MARK, Watch
from tests.command import column, last_checkpoint, run_command
from tests.conftest import SMALL, TINY
from tests.listening import is_loopback
from tests.strangers import as_stranger

pytestmark = pytest.mark.distributed


def custom_job(cluster: LocalCluster, entrypoint: str) -> str:
    request = build_request(load_config("srcnn_pnn"), Placement(1), {}, Path("/"))
    return send(dataclasses.replace(request, entrypoint=entrypoint), cluster.address)


def test_two_nodes_with_addresses_of_their_own(
    cluster: LocalCluster, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert local.alive_nodes(cluster) == ["127.0.0.2", "127.0.0.3"]
    assert main(["cluster", "status", "--state", str(state)]) == 0
    assert cluster.address in capsys.readouterr().out


def test_up_twice_says_it_is_up(cluster: LocalCluster, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "up", "--state", str(state)]) == 2
    assert f"already up at {cluster.address}" in capsys.readouterr().err


def test_each_line_once_and_the_drivers_status(cluster: LocalCluster) -> None:
    script = "import time; [(print('line', i, flush=True), time.sleep(0.002)) for i in range(500)]; raise SystemExit(3)"
    output = io.StringIO()
    assert follow(cluster.address, custom_job(cluster, f'python -c "{script}"'), output) == 3
    assert re.findall(r"^line (\d+)$", output.getvalue(), re.M) == [str(number) for number in range(500)]


def test_training_takes_a_rank_on_each_node(
    cluster: LocalCluster,
    watch: Watch,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_worldstrat(tmp_path / "worldstrat", aois=3, seed=1, revisits=2, hr_side=80)
    shard_folder(tmp_path / "worldstrat", open_storage(str(tmp_path / "shards")), ShardOptions(SMALL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")  # An option on the command line overrides it.
    overrides = ["data.uri=shards", "output.uri=run", *TINY, "train.max_steps=2"]
    arguments = ["submit", "srcnn_pnn", "--address", cluster.address, "--workers", "2", *overrides]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    places = dict(re.findall(r"rank (\d) of 2 runs on node ([\d.]+)", output))
    assert sorted(places) == ["0", "1"]
    assert sorted(places.values()) == list(cluster.nodes)
    assert output.count("checkpoint step-2 written") == 1
    assert (tmp_path / "run/metrics.csv").exists()


def test_gpus_of_a_node_are_hidden_from_a_job_that_asks_for_none(cluster: LocalCluster) -> None:
    look = "ray.remote(lambda: os.environ.get('CUDA_VISIBLE_DEVICES')).remote()"
    script = f"import os, ray; ray.init(); print('seen', repr(ray.get({look})))"
    output = io.StringIO()
    assert follow(cluster.address, custom_job(cluster, f'python -c "{script}"'), output) == 0
    assert re.findall(r"^seen (.*)$", output.getvalue(), re.M) == ["''"]


@pytest.mark.slow
def test_more_than_the_cluster_has_is_refused(cluster: LocalCluster, capsys: pytest.CaptureFixture[str]) -> None:
    """The cluster has two nodes of one CPU each."""
    for workers, each in (("5", ()), ("1", ("--cpus-per-worker", "2"))):
        arguments = ["submit", "srcnn_pnn", "--address", cluster.address, "--workers", workers, *each]
        assert main([*arguments, "train.global_batch=20"]) == 2
        output = capsys.readouterr().out
        assert output.count("satfusion: error: --workers is") == 1
        assert "Traceback" not in output


def test_the_port_of_rays_own_service_is_no_job_server(
    cluster: LocalCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "srcnn_pnn", "--address", f"http://{cluster.gcs}", "--workers", "2"]) == 2
    assert capsys.readouterr().err.startswith(f"satfusion: error: no Ray job server answers at http://{cluster.gcs}")


STRANGER = """
import json, sys, urllib.error, urllib.request

def status(path, method="GET", body=None, **headers):
    headers["Content-Type"] = "application/json"
    request = urllib.request.Request(sys.argv[1] + path, method=method, data=body, headers=headers)
    try:
        return urllib.request.urlopen(request, timeout=120).status
    except urllib.error.HTTPError as error:
        return error.code

job = json.dumps({"entrypoint": "id"}).encode()
made_up = {"Authorization": "Bearer " + "0" * 64}
paths = ("/api/jobs/", "/api/version", "/nodes?view=summary", "/api/v0/logs", "/api/cluster_status", "/metrics")
print(json.dumps({
    "read": [status(path) for path in paths],
    "submit": status("/api/jobs/", "POST", job),
    "submit with another token": status("/api/jobs/", "POST", job, **made_up),
    "stop": status("/api/jobs/" + sys.argv[3] + "/stop", "POST"),
    "delete": status("/api/jobs/" + sys.argv[3], "DELETE"),
    "upload code": status("/api/packages/gcs/_ray_pkg_0.zip", "PUT", b"x"),
}))
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[2]).internal_kv_put(b"key", b"value", True, namespace=b"n")
except Exception as error:
    print(type(error).__name__)
"""


def test_another_user_is_refused_by_job_server_dashboard_and_gcs(cluster: LocalCluster, state: Path) -> None:
    job = custom_job(cluster, "python -c 'print(1)'")
    ended = as_stranger(["-c", STRANGER, cluster.address, cluster.gcs, job])
    statuses, gcs = ended.stdout.splitlines()[:2] if ended.stdout.count("\n") >= 2 else (ended.stderr, "")
    assert json.loads(statuses) == {
        "read": [401] * 6,
        "submit": 401,
        "submit with another token": 403,
        "stop": 401,
        "delete": 401,
        "upload code": 401,
    }
    assert gcs == "AuthenticationError"
    assert follow(cluster.address, job, io.StringIO()) == 0


def test_another_users_commands_are_refused_in_a_sentence(cluster: LocalCluster, state: Path) -> None:
    submit = ["submit", "srcnn_pnn", "--address", cluster.address, "--workers", "2"]
    for arguments, words in (
        (submit, f"the Ray job server at {cluster.address} refuses requests without its token"),
        (["cluster", "status", "--state", str(state)], f"the state folder {state} belongs to another user"),
        (["cluster", "down", "--state", str(state)], f"the state folder {state} belongs to another user"),
    ):
        ended = as_stranger(["-m", "cluster.cli", *arguments])
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"satfusion: error: {words}")
        assert ended.stderr.count("\n") == 1


def test_the_token_is_in_one_private_file_and_in_no_record(cluster: LocalCluster, state: Path) -> None:
    path = Path(cluster.token_file)
    assert path.parent == state.resolve()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {stat.S_IMODE((state / name).stat().st_mode) for name in ("ray", "logs")} == {0o700}
    token = path.read_bytes()
    assert len(token) == 64
    holders = {file for file in state.rglob("*") if file.is_file() and token in file.read_bytes()}
    assert holders == {state / "token"}
    assert authorization(path) == {"Authorization": f"Bearer {token.decode()}"}
    assert token_file(f"{cluster.address}/") == path
    assert token_file("http://127.0.0.1:9") is None
    request = urllib.request.Request(f"{cluster.address}/api/jobs/", headers=authorization(path))
    with urllib.request.urlopen(request, timeout=120) as answer:
        records = answer.read()
    assert b"entrypoint" in records
    assert token not in records


def kill_ranks(cluster: LocalCluster, run: Path, step: int, only: int | None = None) -> None:
    """SIGKILL the job's ranks (or the first ``only`` of them) once the run has taken ``step`` steps."""
    deadline = time.monotonic() + 400
    while not ((run / "metrics.csv").exists() and len(column(run, "step")) >= step):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    ranks = [
        process.pid
        for process in running_with(MARK, cluster.mark)
        if b"RayTrainWorker" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    ]
    assert len(ranks) == 2
    for pid in ranks[:only]:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_training_submitted_again_ends_bit_for_bit(
    cluster: LocalCluster, make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Epochs have 9 steps and checkpoints come every 5: only epoch 1 ends at the step of a kill."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    options = ("train.max_steps=15", "train.checkpoint_every=5", "model.dropout=published", "train.zero_stage=2")
    config = tmp_path / "config.toml"
    config.write_text(make_config(undisturbed, *options).to_toml())
    run_command(2, ["train", str(config)])

    def submit(max_failures: int) -> str:
        request = build_request(make_config(killed, *options), Placement(2, max_failures=max_failures), {}, Path("/"))
        return send(request, cluster.address)

    log = io.StringIO()
    first = submit(0)
    kill_ranks(cluster, killed, 7)
    assert follow(cluster.address, first, log) == 1
    # A busy machine lets the ranks get further before the signal, but not past the next checkpoint.
    assert 7 <= int(column(killed, "step")[-1]) < 10

    second = submit(1)
    kill_ranks(cluster, killed, 11, only=1)
    assert follow(cluster.address, second, log) == 0
    # The second kill came after step 10 and before step 15, the next checkpoint and the end.
    going_on = re.findall(r"resuming from \S+/checkpoints/(\S+)", log.getvalue())
    assert going_on == ["step-5", "step-10"]
    assert column(killed, "chips", "batches.csv") == column(undisturbed, "chips", "batches.csv")
    assert column(killed, "train/loss") == column(undisturbed, "train/loss")
    ours, theirs = last_checkpoint(killed), last_checkpoint(undisturbed)
    assert ours.position.step == 15
    assert all(torch.equal(ours.state.weights[n], theirs.state.weights[n]) for n in theirs.state.weights)


class Reacting(io.StringIO):
    """A log that calls a function when some words first appear."""

    def __init__(self, *reactions: tuple[str, Callable[[], None]]) -> None:
        super().__init__()
        self.reactions = list(reactions)

    def write(self, text: str) -> int:
        length = super().write(text)
        while self.reactions and self.reactions[0][0] in self.getvalue():
            self.reactions.pop(0)[1]()
        return length


@pytest.mark.slow
def test_a_store_that_is_away_is_waited_for_and_costs_a_restart_when_it_stays_away(
    cluster: LocalCluster, store: ObjectStore, make_config: Callable[..., RunConfig]
) -> None:
    """The run may restart once: if the short absence had used the restart, the long one would end the run."""
    store.start()
    store.create_bucket("outage")
    config = make_config("s3://outage/run", "train.max_steps=40", "train.checkpoint_every=5")
    log = Reacting(
        ("checkpoint step-5 written", store.stop),
        ("attempt 8 follows", store.start),
        ("checkpoint step-10 written", store.stop),
        ("restart 1 of 1", store.start),
    )
    job = send(build_request(config, Placement(2, max_failures=1), store.environment, Path("/")), cluster.address)
    assert follow(cluster.address, job, log) == 0, log.getvalue()
    assert log.reactions == []
    short, long = log.getvalue().split("checkpoint step-10 written")
    assert "restart" not in short
    assert "the S3 endpoint does not answer" in long
    (name,) = re.findall(r"resuming from s3://outage/run/checkpoints/(\S+)", long)
    assert int(name.removeprefix("step-")) >= 10
    assert "checkpoint step-40 written" in long
    store.stop()


def test_a_store_that_does_not_answer_at_the_start_is_refused(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    arguments = ["submit", "srcnn_pnn", "--address", cluster.address, "--workers", "2"]
    assert main([*arguments, "data.uri=s3://bucket/shards", "output.uri=s3://bucket/run"]) == 2
    output = capsys.readouterr().out
    assert output.count("satfusion: error:") == 1
    assert "s3://bucket/shards" in output
    assert "Traceback" not in output
    assert "rank 0" not in output


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_stop_ends_it_at_a_checkpoint(
    cluster: LocalCluster,
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "config.toml"
    options = ("train.epochs=10000", "train.checkpoint_every=100000")
    config.write_text(make_config(tmp_path / "run", *options).to_toml())
    arguments = ["submit", str(config), "--address", cluster.address, "--workers", "1..2"]
    with subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        job_id = process.stdout.readline().split()[1]
        while "starting at step 0" not in (line := process.stdout.readline()):
            assert line, "the log ended"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert f"job {job_id} runs on" in errors
    assert f"`satfusion stop --address {cluster.address} {job_id}`" in errors
    assert f"`satfusion logs --address {cluster.address} --follow {job_id}`" in errors
    assert "Traceback" not in errors

    # Sent again it is followed, and with other settings it is refused.
    assert main([*arguments, "--no-wait"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == job_id
    assert main([*arguments, "--no-wait", "train.learning_rate=0.5"]) == 2
    assert "another train.learning_rate (0.001, now 0.5)" in capsys.readouterr().err
    assert main(["jobs", "--address", cluster.address]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if job_id in line]
    assert row.split()[1] == "running"
    assert row.endswith(str(tmp_path / "run"))

    # The only checkpoint of the run is the one it writes when it is stopped.
    assert main(["stop", "--address", cluster.address, job_id]) == 0
    assert capsys.readouterr().out == f"job {job_id}: stopped\n"
    assert main(["logs", "--address", cluster.address, job_id]) == 0
    log = capsys.readouterr().out
    assert "the job was stopped, at its newest checkpoint" in log
    last = last_checkpoint(tmp_path / "run").position.step
    assert last == int(column(tmp_path / "run", "step")[-1])
    assert follow(cluster.address, job_id, io.StringIO()) == STOPPED_STATUS


def test_a_users_mistake_inside_the_job_is_one_sentence_and_status_2(
    cluster: LocalCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = tmp_path / "absent"
    arguments = ["submit", "srcnn_pnn", "--address", cluster.address, "--workers", "1", "--no-wait"]
    assert main([*arguments, f"data.uri={dataset}", f"output.uri={tmp_path / 'run'}"]) == 0
    printed = capfd.readouterr().out
    job_id = printed.splitlines()[0]
    assert f"satfusion logs --address {cluster.address} --follow {job_id}" in printed
    log = io.StringIO()
    assert follow(cluster.address, job_id, log) == 2
    sentences = [line for line in log.getvalue().splitlines() if line.startswith("satfusion: error:")]
    assert len(sentences) == 1
    assert f"{dataset} holds no index.json" in sentences[0]
    assert "Traceback" not in log.getvalue()


def test_everything_listens_on_loopback_alone(cluster: LocalCluster, watch: Watch) -> None:
    # The head's service, two raylets with two ports each, the agents, the dashboard, and workers of the jobs above.
    assert len(watch.seen) > 15
    assert [(address, port) for address, port in watch.seen if not is_loopback(address)] == []


def test_down_ends_what_up_started_and_nothing_else(
    cluster: LocalCluster, watch: Watch, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch.done.set()
    assert {process for process in watch.processes if is_running(process)}
    assert main(["cluster", "down", "--state", str(state)]) == 0
    assert {process.pid for process in watch.processes if is_running(process)} == set()
    assert running_with(MARK, cluster.mark) == []
    assert not state.exists()
    assert main(["cluster", "down", "--state", str(state)]) == 0
    assert "no cluster is up" in capsys.readouterr().out
    assert main(["cluster", "status", "--state", str(state)]) == 1
