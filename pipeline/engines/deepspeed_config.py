"""DeepSpeed's configuration of a run, as a pure function of the run's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.config import TrainConfig
from pipeline.deepspeed_keys import merged
from pipeline.order import BatchPlan

BUCKET = 50_000_000
"""Gradients that are reduced at once: all of any network of the family at its published width. DeepSpeed's default, ten
times as many, takes a buffer of 2 GB at ZeRO 1 to 3."""


def deepspeed_config(config: TrainConfig, plan: BatchPlan, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a run, with a user's ``keys``; the optimizer is ours and is not part of it.

    bf16 is not set: it is autocast around the forward pass (`ForwardPass`), so that weights, gradients and their
    reduction stay in fp32 at every ZeRO stage.
    """
    ours = {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.grad_accum,
        # At stage 0 the engine clips by the norm that it logs; DeepSpeed would compute the norm again.
        "gradient_clipping": config.clip_norm if config.zero_stage else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            # Overlap would change the order of sums between runs.
            "overlap_comm": False,
            "reduce_bucket_size": BUCKET,
            # Heads or encoders without partner have parameters without gradients.
            "ignore_unused_parameters": True,
        },
        # DeepSpeed's own progress lines would repeat ours.
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # DeepSpeed's throughput timer waits for the device twice per micro-batch.
        "timers": {"throughput": {"enabled": False}},
    }
    return merged(ours, keys)
