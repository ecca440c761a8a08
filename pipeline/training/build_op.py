"""Compiles DeepSpeed's CPU communication op, so that the first training does not wait for it.

Run as ``python -m pipeline.training.build_op`` when the environment is made; it does nothing where CUDA is at hand.
"""

from __future__ import annotations

from pipeline.training.deepspeed_engine import import_deepspeed

if __name__ == "__main__":
    import_deepspeed()
