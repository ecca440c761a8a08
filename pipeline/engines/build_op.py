"""Compilation of DeepSpeed's CPU communication op, so that the first training need not wait for it.

Run ``python -m pipeline.engines.build_op`` when the environment is created; it does nothing if CUDA is available.
"""

from __future__ import annotations

from pipeline.engines.deepspeed_engine import import_deepspeed

if __name__ == "__main__":
    import_deepspeed()
