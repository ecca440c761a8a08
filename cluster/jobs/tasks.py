"""Tasks of a Ray cluster: one function for many items, on the nodes that are left when others are lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from cluster.logs import configure_logging
from sharding.errors import UserError
from sharding.storage import StorageUnavailableError

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES = 3
"""Number of retries of a task whose node was lost or whose store did not answer."""


def on_ray(
    function: Callable[[Item], Result], items: Sequence[Item], remedy: str, workers: int | None = None
) -> Iterator[Result]:
    """Yield the function's result for each item as it arrives, from the cluster that this process has joined.

    A lost node loses no work: Ray runs its tasks again on other nodes.

    Args:
        function: Function of a module, which is sent by its name.
        items: The items, such as names.
        remedy: What the user can do if a task is lost again and again.
        workers: Tasks at a time; None for as many as fit, one a CPU.

    Raises:
        UserError: From a task, or one was lost on each retry.
    """
    import ray  # Ray is slow to import

    remote = ray.remote(num_cpus=1, max_retries=RETRIES, retry_exceptions=[StorageUnavailableError])(_call)
    waiting, running = list(reversed(items)), list[object]()
    while waiting or running:
        while waiting and (workers is None or len(running) < workers):
            running.append(remote.remote(function, waiting.pop()))
        done, running = ray.wait(running)
        for reference in done:
            result: Result = _result(reference, remedy)
            yield result


def _call(function: Callable[[Item], Result], item: Item) -> Result:
    """Run a task in a Ray worker, on the worker's one core."""
    import torch  # slow to import, and the driver does not need it

    configure_logging(rank=1)
    torch.set_num_threads(1)
    return function(item)


def _result(reference: object, remedy: str) -> Any:
    import ray  # Ray is slow to import

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):  # the original error; ray's own text is a traceback
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a task was lost {RETRIES + 1} times ({type(error).__name__}), most often for lack of memory: {remedy}"
        ) from None
