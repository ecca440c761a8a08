"""Compiles DeepSpeed's CPU communication op, so that the first training does not wait for it.

Run as ``python -m pipeline.build_op`` when the environment is made; it does nothing where CUDA is at hand.
"""

from __future__ import annotations

import sys

import torch

from pipeline.engine import import_deepspeed


def build() -> bool:
    """Build and load the op; return whether it is there."""
    if torch.cuda.is_available():
        return False
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().create_op_builder("ShareMemCommBuilder").load() is not None


if __name__ == "__main__":
    sys.exit(0 if build() or torch.cuda.is_available() else 1)
