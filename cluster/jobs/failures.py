"""What Ray's errors mean for a job: a user's mistake, a failure that a restart may pass, or resources that are busy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from pipeline.training.device_memory import is_out_of_memory, out_of_memory
from sharding.errors import UserError
from sharding.storage import StorageUnavailableError

_MEMORY = re.compile(r"running low on memory|memory usage threshold|OutOfMemory", re.IGNORECASE)
_USED = re.compile(r"was ([\d.]+ ?[GM]i?B)(?: used)? / ([\d.]+ ?[GM]i?B)")
_USERS = re.compile(r"Top \d+ memory users:\s*(PID\b.*)", re.IGNORECASE | re.DOTALL)
_SHOWN_USERS = 4
_SHOWN = 300


@dataclass(frozen=True)
class Failure:
    """End of an attempt to train."""

    kind: Literal["mistake", "failure", "busy"]
    """`mistake`: a restart would fail too. `failure`: counts against the restarts. `busy`: the ranks did not start
    in time because their resources were not free, which does not count."""
    reason: str
    """What happened, in words."""
    mistake: UserError | None = None
    """Error of a rank for the user: the mistake, or the store that does not answer."""


def understand(error: Exception) -> Failure:
    """Return what an error of `TorchTrainer.fit` means.

    Args:
        error: A `ray.train.TrainingFailedError`, or the error of Ray Train's controller that was lost.
    """
    from ray.exceptions import RayActorError  # Ray is slow to import
    from ray.train import ControllerError, PreemptionError

    mistake = user_error(error)
    if mistake and not isinstance(mistake, StorageUnavailableError):
        return Failure("mistake", str(mistake), mistake)
    if mistake:
        return Failure("failure", str(mistake), mistake)
    if memory := _out_of_memory(error):
        return Failure("failure", memory)
    nested = list(_nested(error))
    for inner in nested:
        if memory := killed_for_memory(str(inner)):
            return Failure("failure", memory)
    if isinstance(error, RayActorError):
        return Failure("failure", "Ray Train's controller was lost")
    if any(type(inner).__name__ == "WorkerGroupStartupTimeoutError" for inner in nested):
        return Failure("busy", "the ranks did not start in time, since their resources were not free")
    if isinstance(error, PreemptionError):
        ranks = _numbers(error.preemption_info.preempted_ranks)
        return Failure("failure", f"the node of rank {ranks} was drained, and its time ended before the ranks stopped")
    if isinstance(error, ControllerError):
        return Failure("failure", f"Ray Train failed ({_words(error.controller_failure)})")
    return Failure("failure", _lost_ranks(error))


def user_error(error: Exception) -> UserError | None:
    """Return the `UserError` that a rank raised, if any; prefer a permanent one to one that may pass."""
    # One rank's error often breaks the connections of the others, so check all of them.
    mistakes = [failure for _, failure in sorted(_of_ranks(error).items()) if isinstance(failure, UserError)]
    return min(mistakes, key=lambda mistake: isinstance(mistake, StorageUnavailableError), default=None)


def killed_for_memory(text: str) -> str:
    """Return a sentence for a kill by Ray's memory monitor, with what used the memory; empty for another error.

    Args:
        text: Text of Ray's error, which lists the processes that used most.
    """
    if not _MEMORY.search(text) or is_out_of_memory(text):  # torch's error has the name of Ray's
        return ""
    used = _USED.search(text)
    users = _USERS.search(text)
    lines = users[1].splitlines() if users else []
    # The first line names the columns: PID, memory, command.
    rows = [" ".join(line.split()) for line in lines[1 : _SHOWN_USERS + 1] if re.match(r"\s*\d+\s", line)]
    what = f"; PID, GB and command of the largest: {'; '.join(rows)}" if rows else ""
    memory = f"{used[1]} / {used[2]}" if used else "its node was short of memory"
    return f"Ray's memory monitor killed a rank ({memory}{what})"


def _out_of_memory(error: Exception) -> str:
    """Return a sentence with the remedy if ranks could not allocate memory on their devices; else an empty one."""
    found = {
        rank: words
        for rank, failure in sorted(_of_ranks(error).items())
        if (words := next(filter(None, map(out_of_memory, _nested(failure))), ""))
    }
    return f"rank {_numbers(list(found))} {next(iter(found.values()))}" if found else ""


def failures_of_ranks(error: Exception) -> Mapping[int, str]:
    """Return type and text of each failed rank's error, by rank."""
    return {rank: f"{type(failure).__name__}: {failure}" for rank, failure in sorted(_of_ranks(error).items())}


def _of_ranks(error: Exception) -> Mapping[int, Exception]:
    failures: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    return failures


def _nested(error: Exception) -> Iterator[Exception]:
    """Yield the error, and the errors within that Ray wraps."""
    yield error
    inner = [getattr(error, name, None) for name in ("controller_failure", "health_check_failure")]
    for failure in (*_of_ranks(error).values(), *inner):
        if isinstance(failure, Exception):
            yield from _nested(failure)


def _lost_ranks(error: Exception) -> str:
    """Say which ranks were lost with their process or node, or, if none was, which failed."""
    found = _of_ranks(error)
    lost = {rank: failure for rank, failure in found.items() if type(failure).__name__.startswith("WorkerHealthCheck")}
    nodes = sorted(rank for rank, failure in lost.items() if _node_died(failure))
    if nodes:
        return f"the node of rank {_numbers(nodes)} was lost"
    if lost:
        return f"rank {_numbers(sorted(lost))} was lost"
    return f"rank {_numbers(sorted(found))} failed" if found else "a rank failed or was lost"


def _node_died(failure: Exception) -> bool:
    return bool(re.search(r"node.{0,80}(died|dead|terminated|lost)", str(failure), re.IGNORECASE | re.DOTALL))


def _numbers(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (" and others" if len(ranks) > 8 else "")


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:_SHOWN] or type(error).__name__
