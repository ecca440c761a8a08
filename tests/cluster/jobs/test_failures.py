"""What Ray's errors mean for a job; errors of the types that Ray raises, with its texts."""

from __future__ import annotations

import pytest
import torch
from ray.exceptions import ActorDiedError, RayTaskError
from ray.train import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.preemption import PreemptionInfo

from cluster.jobs.failures import Failure, killed_for_memory, understand
from sharding.errors import UserError
from sharding.storage import StorageUnavailableError

MEMORY = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.7, ID: 4c) where the task (actor ID: 8f, name=RayTrainWorker.__init__, pid=311, memory \
used=9.41GB) was running was 30.50GB / 32.00GB (0.953125), which exceeds the memory usage threshold of 0.95. Ray \
killed this worker (ID: b2) because it was the most recently scheduled task; to see more information about memory \
usage on this node, use `ray logs raylet.out -ip 10.0.0.7`. Top 10 memory users:
PID\tMEM(GB)\tCOMMAND
311\t9.41\tray::RayTrainWorker
298\t9.38\tray::RayTrainWorker
12\t0.20\t/usr/bin/python -m other
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io."""

SEVERAL = """8 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.2, ID: bb) \
was 14.72GB used / 23.54GB limit (0.625317)
OOM kill reason: Memory usage 15622352896B exceeded threshold of 15602913280B (61.7% of 25276063744B limit)
Ray killed 8 worker(s) based on the killing policy
Total non-selected idle workers: 0
To see more information about memory usage on this node, use `ray logs raylet.out -ip 127.0.0.2`
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
29761\t1.86\tpython -m other
5088\t0.43\tray::RayTrainWorker
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io."""
"""What Ray 2.60 says since it kills several processes at once, as read from a job, shortened."""


def lost(text: str) -> Exception:
    return WorkerHealthCheckFailedError("A worker health check failed.", RuntimeError(text))


def group(*failures: Exception) -> WorkerGroupError:
    return WorkerGroupError("ranks failed", dict(enumerate(failures)))


AWAY, MISTAKE = StorageUnavailableError("the store is away"), UserError("the mistake")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (group(ConnectionError("reset"), lost("The worker died")), Failure("failure", "rank 1 was lost")),
        (
            group(lost("The actor died because its node has died."), ConnectionError("reset")),
            Failure("failure", "the node of rank 0 was lost"),
        ),
        (group(ConnectionError("reset"), ValueError("bug")), Failure("failure", "rank 0, 1 failed")),
        (group(lost("died"), AWAY), Failure("failure", "the store is away", AWAY)),
        (group(AWAY, MISTAKE), Failure("mistake", "the mistake", MISTAKE)),
        (
            ControllerError(WorkerGroupStartupTimeoutError(4)),
            Failure("busy", "the ranks did not start in time, since their resources were not free"),
        ),
        (ControllerError(WorkerGroupStartupFailedError("died")), Failure("failure", "Ray Train failed (died)")),
        (
            PreemptionError(PreemptionInfo(1, {"b": [2], "a": [0, 1]}), drain_timed_out=True),
            Failure("failure", "the node of rank 0, 1, 2 was drained, and its time ended before the ranks stopped"),
        ),
        (ActorDiedError(), Failure("failure", "Ray Train's controller was lost")),
    ],
)
def test_each_end_of_an_attempt_has_its_kind(error: Exception, expected: Failure) -> None:
    assert understand(error) == expected


TRIED = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB."
ON_CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
REMEDY = "lower train.micro_batch, set train.recompute=true, or lower model.hidden"


def in_task(error: Exception) -> Exception:
    """Return an error as Ray brings it from a task: a type made from both, with the traceback as text."""
    text = f"\x1b[36mray::train()\x1b[39m (pid=7, ip=10.0.0.7)\n  File a.py\ntorch.OutOfMemoryError: {error}\nnext line"
    return RayTaskError("train", text, error).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (group(torch.OutOfMemoryError(TRIED)), f"rank 0 ran out of GPU memory ({TRIED[:-1]}): {REMEDY}"),
        (
            group(ConnectionError("reset"), in_task(torch.OutOfMemoryError(TRIED))),
            f"rank 1 ran out of GPU memory ({TRIED[:-1]}): {REMEDY}",
        ),
        (
            group(torch.OutOfMemoryError("Allocation on device")),
            f"rank 0 ran out of GPU memory (Allocation on device): {REMEDY}",
        ),
        (
            group(*[RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be")] * 2),
            f"rank 0, 1 ran out of GPU memory (CUDA error: out of memory): {REMEDY}",
        ),
        (
            group(RuntimeError(f"[enforce fail at alloc_cpu.cpp:127] err == 0. {ON_CPU}.")),
            f"rank 0 ran out of memory ({ON_CPU}): {REMEDY}",
        ),
    ],
)
def test_a_rank_without_device_memory_is_not_killed_by_ray(error: Exception, words: str) -> None:
    """The error of torch has the name of Ray's."""
    assert understand(error) == Failure("failure", words)
    assert killed_for_memory(f"torch.OutOfMemoryError: {TRIED}") == ""


def test_a_kill_for_memory_is_named_with_what_used_it() -> None:
    failure = understand(group(ConnectionError("reset"), lost(MEMORY)))
    assert failure.kind == "failure"
    assert failure.reason == (
        "Ray's memory monitor killed a rank (30.50GB / 32.00GB; PID, GB and command of the largest: "
        "311 9.41 ray::RayTrainWorker; 298 9.38 ray::RayTrainWorker; 12 0.20 /usr/bin/python -m other)"
    )
    assert killed_for_memory(SEVERAL) == (
        "Ray's memory monitor killed a rank (14.72GB / 23.54GB; PID, GB and command of the largest: "
        "29761 1.86 python -m other; 5088 0.43 ray::RayTrainWorker)"
    )
    assert killed_for_memory("The worker died") == ""
    assert killed_for_memory("OutOfMemoryError") == (
        "Ray's memory monitor killed a rank (its node was short of memory)"
    )
