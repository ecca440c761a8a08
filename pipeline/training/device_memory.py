"""Errors of memory that a rank could not allocate, on its GPU or on the host: how they are known, and the remedy."""

from __future__ import annotations

import re

# CUDA reports the lack of memory by errors of several types.
_ALLOCATION = re.compile(
    r"torch\.(?:cuda\.)?OutOfMemoryError: (?P<torch>.*)|(?P<device>(?:CUDA|HIP|XPU)(?: error:)? out of memory.*)"
    r"|(?P<cpu>DefaultCPUAllocator: (?:can't allocate|not enough) memory.*)"
)
_SHOWN = 300
REMEDY = "lower train.micro_batch, set train.recompute=true, or lower model.hidden"
"""What takes less memory: the first two leave the model as it is."""


def is_out_of_memory(text: str) -> bool:
    """Return whether a text holds torch's report that it could not allocate memory."""
    return _ALLOCATION.search(text) is not None


def out_of_memory(error: BaseException) -> str:
    """Return what torch could not allocate, as the end of a sentence whose subject is a rank; empty for other errors.

    Args:
        error: An error of torch, or one of Ray whose text has it.
    """
    found = _ALLOCATION.search(f"{type(error).__module__}.{type(error).__name__}: {error}")
    if not found:
        return ""
    kind = "memory" if found["cpu"] else "GPU memory"
    said = " ".join(found[found.lastgroup or 0].split())[:_SHOWN].rstrip(".")
    return f"ran out of {kind} ({said}): {REMEDY}"
