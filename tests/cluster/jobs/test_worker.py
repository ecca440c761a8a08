"""Failures after which a job resumes; Ray's answers are simulated instead of a cluster."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, TrainingFailedError
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

from cluster.jobs import notice, room
from cluster.jobs import train_job as worker
from cluster.jobs.notice import Stopped
from cluster.jobs.placement import Placement
from cluster.jobs.train_job import Job, run_job
from pipeline.config import load_config
from sharding.errors import UserError
from sharding.storage import StorageUnavailableError, retries

AWAY = StorageUnavailableError("the store is away")
MISTAKE = UserError("the mistake")
BROKEN = ConnectionError("broken by another rank")


def failure(*failures: Exception) -> TrainingFailedError:
    error = TrainingFailedError("ranks failed")
    error.worker_failures = dict(enumerate(failures))
    return error


End = Exception | Callable[[], None] | None
"""End of an attempt: an error, an action after which the ranks stop at a checkpoint, or None for a complete run."""


def node(cpus: float, name: str = "n") -> dict[str, object]:
    """Return a node as in `ray.nodes`."""
    return {"NodeID": name, "NodeManagerAddress": f"address of {name}", "Alive": True, "Resources": {"CPU": cpus}}


class SilentNotice:
    """The actor's handle, without an actor."""

    begin = ask = SimpleNamespace(remote=lambda: None)


class Attempts:
    """Outcomes of the attempts; a job removes those it has taken from ``left``."""

    def __init__(self) -> None:
        self.left: list[End] = []
        self.workers: int | str = 2
        self.worlds: list[int] = []
        self.released = 0

    def release(self) -> None:
        self.released += 1

    def run(self, max_failures: int, *ends: End) -> None:
        self.left = list(ends)
        run_job(Job(load_config("srcnn_pnn").to_dict(), Placement(self.workers, max_failures=max_failures)))

    def fit(self, job: Job, function: object, world: int) -> bool:
        self.worlds.append(world)
        assert self.released == len(self.worlds), "what the attempt before has left is freed first"
        end = self.left.pop(0)
        if isinstance(end, Exception):
            raise end
        if end is not None:
            end()
            return False
        return True


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Attempts:
    attempts = Attempts()
    monkeypatch.setattr(ray, "init", lambda **options: None)
    monkeypatch.setattr(ray, "nodes", lambda: [node(2.0)])
    monkeypatch.setattr(room, "draining_nodes", frozenset)
    monkeypatch.setattr(worker, "_RESTART_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 100.0})
    monkeypatch.setattr(worker, "start_notice", SilentNotice)
    monkeypatch.setattr(worker, "release_room", attempts.release)
    monkeypatch.setattr(worker, "_fit", attempts.fit)
    return attempts


def test_lost_ranks_and_a_store_that_is_away_are_tried_again(attempts: Attempts) -> None:
    attempts.run(3, failure(), failure(BROKEN, AWAY), failure(BROKEN), None)
    assert attempts.left == []


def test_a_store_that_stays_away_ends_the_job_in_its_own_words(attempts: Attempts) -> None:
    with pytest.raises(StorageUnavailableError, match="the store is away"):
        attempts.run(1, failure(AWAY), failure(AWAY), None)
    assert attempts.left == [None]


def test_ranks_that_are_lost_too_often_end_the_job(attempts: Attempts) -> None:
    with pytest.raises(TrainingFailedError):
        attempts.run(1, failure(AWAY), failure(BROKEN), None)
    assert attempts.left == [None]


@pytest.mark.parametrize("failures", [(BROKEN, MISTAKE), (AWAY, MISTAKE), (MISTAKE, AWAY)])
def test_a_users_mistake_is_found_among_its_consequences_and_not_tried_again(
    attempts: Attempts, failures: tuple[Exception, ...]
) -> None:
    with pytest.raises(UserError, match="the mistake"):
        attempts.run(3, failure(*failures), None)
    assert attempts.left == [None]


def test_a_store_that_does_not_answer_at_the_start_is_refused_before_a_rank_is_started(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("srcnn_pnn", ["data.uri=s3://bucket/shards", "output.uri=/nowhere/run"])
    monkeypatch.setattr(worker, "_fit", lambda job, function, world: pytest.fail("a rank was started"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(retries, "FIRST_CONTACT_S", 0.5)
    with pytest.raises(StorageUnavailableError, match="s3://bucket/shards"):
        run_job(Job(config.to_dict(), Placement(2)))


def test_keys_are_the_ranks_matter(attempts: Attempts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The driver's node may have no keys while the ranks' nodes have some."""
    config = load_config("srcnn_pnn", ["data.uri=s3://bucket/shards", "output.uri=s3://bucket/run"])
    began: list[Job] = []
    monkeypatch.setattr(worker, "_fit", lambda job, function, world: not began.append(job))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    run_job(Job(config.to_dict(), Placement(2)))
    assert len(began) == 1


def test_a_small_cluster_may_grow(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [1.0, 1.0, 1.0, 4.0]
    asked: list[object] = []
    monkeypatch.setattr(ray, "nodes", lambda: [node(looks.pop(0))])
    monkeypatch.setattr(ray.util, "placement_group", lambda bundles, strategy: asked.append(bundles))
    monkeypatch.setattr(ray.util, "remove_placement_group", lambda group: asked.append("removed"))
    monkeypatch.setattr(room, "_POLL_SECONDS", 0.0)
    assert room.await_room(Placement(2, wait_for_resources=60), (2,), threading.Event()) == 2
    assert asked == [[{"CPU": 1.0}, {"CPU": 1.0}], "removed"]
    assert looks == []


def test_a_lost_controller_counts_and_ranks_without_resources_do_not(attempts: Attempts) -> None:
    busy = ControllerError(WorkerGroupStartupTimeoutError(2))
    attempts.run(2, ActorDiedError(), busy, busy, busy, failure(BROKEN), None)
    assert attempts.left == []
    with pytest.raises(ActorDiedError):
        attempts.run(1, ActorDiedError(), ActorDiedError(), None)
    assert attempts.left == [None]


def test_an_elastic_job_shrinks_with_the_cluster_and_grows_with_it(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch has 8 chips. A lost node is a failure, and the stop in order to grow is none."""
    nodes = [node(1.0) for _ in range(9)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(worker, "Growth", lambda placement, sizes, world: lambda: False)
    attempts.workers = "2..9"

    class NodesLost(ConnectionError):
        def __str__(self) -> str:
            del nodes[3:]
            return "broken by a lost node"

    def nodes_come() -> None:
        nodes.extend([nodes[0]] * 2)

    attempts.run(1, failure(NodesLost()), nodes_come, None)
    assert attempts.worlds[1:] == [2, 4]
    assert attempts.worlds[0] == 8


def test_an_elastic_job_below_its_least_ends_and_says_so(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "placement_group", lambda bundles, strategy: len(bundles))
    monkeypatch.setattr(ray.util, "remove_placement_group", lambda group: None)
    attempts.workers = "3..8"  # the cluster has room for 2
    with pytest.raises(UserError, match=r"is 3\.\.8 .*\(the least that divides the batch is 4\).* room for 2"):
        attempts.run(2, None)
    assert attempts.worlds == []


def test_sigterm_ends_the_job_at_a_checkpoint(attempts: Attempts) -> None:
    with pytest.raises(Stopped):
        attempts.run(2, lambda: os.kill(os.getpid(), signal.SIGTERM), None)
    assert attempts.left == [None]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_sigterm_after_a_failure_starts_no_other_attempt(attempts: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    def await_room(placement: Placement, sizes: object, stops: threading.Event) -> int:
        if attempts.worlds:
            os.kill(os.getpid(), signal.SIGTERM)
        return 2

    monkeypatch.setattr(worker, "await_room", await_room)
    with pytest.raises(Stopped):
        attempts.run(2, failure(BROKEN), None)
    assert attempts.left == [None]


def test_growth_waits_until_the_room_has_lasted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, cpus = [100.0], [3.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(ray, "nodes", lambda: [node(cpus[0])])
    monkeypatch.setattr(room, "draining_nodes", frozenset)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": cpus[0] - 2})
    sizes = room.Sizes((2, 4))
    grows = room.Growth(Placement("2..4"), sizes, 2)

    def after(seconds: float, total: float) -> bool:
        clock[0] += seconds
        cpus[0] = total
        return grows()

    assert not after(0, 3)  # three ranks do not divide the batch
    assert not after(100, 3)
    assert not after(1, 4)
    assert not after(9, 4)
    assert not after(1, 2)  # it was gone again
    assert not after(1, 4)
    assert not after(9, 4)
    assert after(1, 4)
    assert not room.Growth(Placement("2..4"), sizes, 4)(), "there is nothing larger"


def test_a_job_leaves_a_node_that_is_drained_and_counts_no_failure(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of four nodes one is drained; a rank on another does not matter, and no rank is started on a drained one."""
    leaving: set[str] = set()
    monkeypatch.setattr(ray, "nodes", lambda: [node(1.0, name) for name in "abcd"])
    monkeypatch.setattr(room, "draining_nodes", lambda: frozenset(leaving))
    monkeypatch.setattr(ray, "get", lambda value: value)
    attempts.workers = "1..4"
    attempts.run(0, lambda: leaving.add("b"), None)
    assert attempts.worlds == [4, 2], "three do not divide the batch of 8"

    drain = room.Drain(SimpleNamespace(places=SimpleNamespace(remote=lambda: {"a", "c"})))
    with caplog.at_level("INFO"):
        assert not drain()
        leaving.add("c")
        assert drain()
        leaving.clear()
        assert not drain()
    assert [record.message for record in caplog.records if "drains" in record.message] == [
        "Ray drains node address of c: the ranks stop at a checkpoint, to start again elsewhere"
    ]


def test_the_ranks_tell_their_nodes_and_a_new_attempt_forgets_them() -> None:
    held = notice.Notice()
    held.place("a")
    held.place("b")
    held.ask()
    assert (held.places(), held.asked()) == ({"a", "b"}, True)
    held.begin()
    assert (held.places(), held.asked()) == (set(), False)


def test_an_elastic_job_takes_what_is_free_when_it_stays_so(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resources of the attempt before are free a little later; those of another job are not."""
    free = [2.0, 2.0, 8.0]
    monkeypatch.setattr(room, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(ray, "nodes", lambda: [node(8.0)])
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": free.pop(0) if len(free) > 1 else free[0]})
    assert room.await_room(Placement("2..8"), (2, 4, 8), threading.Event()) == 8
    free[:] = [4.0]
    monkeypatch.setattr(room, "_SETTLE_SECONDS", 0.0)
    assert room.await_room(Placement("2..8"), (2, 4, 8), threading.Event()) == 4


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of `room`, which a test sets."""
    clock = [100.0]
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


def test_an_elastic_job_does_not_ask_twice_at_once_for_room_that_is_split_over_nodes(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """Eight halves of free resources are no room for eight ranks: their start times out, and fewer are tried."""
    monkeypatch.setattr(ray, "nodes", lambda: [node(9.0)])
    attempts.workers = "2..9"
    attempts.run(0, ControllerError(WorkerGroupStartupTimeoutError(8)), None)
    assert attempts.worlds == [8, 4]


def test_an_elastic_job_grows_again_after_a_slow_start(
    attempts: Attempts, monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [node(9.0)])
    growths: list[room.Growth] = []

    class Growth(room.Growth):
        def __init__(self, placement: Placement, sizes: room.Sizes, world: int) -> None:
            super().__init__(placement, sizes, world)
            growths.append(self)

    monkeypatch.setattr(worker, "Growth", Growth)

    def grows_after(seconds: float) -> Callable[[], None]:
        """Let time pass in an attempt, and see that the job grows then and not before."""

        def pass_time() -> None:
            clock[0] += seconds - 1.0
            assert not growths[-1]()
            clock[0] += 1.0
            assert not growths[-1]()
            clock[0] += 10.0  # the room has lasted
            assert growths[-1]()

        return pass_time

    slow = ControllerError(WorkerGroupStartupTimeoutError(8))
    attempts.workers = "4..9"
    # A second slow start makes the pause longer, and a start makes it short again.
    attempts.run(1, slow, grows_after(60.0), slow, grows_after(120.0), failure(BROKEN), slow, grows_after(60.0), None)
    assert attempts.worlds == [8, 4, 8, 4, 8, 8, 4, 8]


def test_a_number_that_does_not_start_is_left_out_for_an_hour_at_most(clock: list[float]) -> None:
    sizes = room.Sizes((2, 4, 8))
    for seconds in (60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 3600.0, 3600.0):
        sizes.failed(8)
        sizes.started(4)
        assert sizes.now() == (2, 4)
        clock[0] += seconds - 1.0
        assert sizes.now() == (2, 4)
        clock[0] += 1.0
        assert sizes.now() == (2, 4, 8)
    sizes.failed(2)
    assert sizes.now() == (2, 4, 8), "none is smaller: all may be tried"


def test_a_head_that_does_not_answer_hides_no_request_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    stops, looked = threading.Event(), threading.Event()

    def may_grow() -> bool:
        looked.set()
        raise ConnectionError("the head restarts")

    monkeypatch.setattr(notice, "_POLL_SECONDS", 0.01)
    handle = SimpleNamespace(ask=SimpleNamespace(remote=asked.set))
    with notice.Watch(handle, stops, may_grow):
        assert looked.wait(60)
        stops.set()
        assert asked.wait(60)
