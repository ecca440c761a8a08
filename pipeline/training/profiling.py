"""A profile of a few training steps, for TensorBoard's profiler page and for Perfetto (https://ui.perfetto.dev)."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.reporting.run_folder import TEMPORARY_SUFFIX
from sharding.scratch import scratch_folder

logger = logging.getLogger(__name__)

SKIPPED = 3
"""Steps before the profile: first allocations, compilation, choice of kernels."""
WARM_UP = 1
"""Steps that the profiler discards, because starting it distorts them."""


class StepProfiler:
    """Profiler of ``num_steps`` optimizer steps, on the CPU and any GPU, which writes one gzipped trace."""

    def __init__(self, folder: Path, rank: int, num_steps: int) -> None:
        """Begin with the next step.

        Args:
            folder: Folder of ``rank-<r>.pt.trace.json.gz``, the name that TensorBoard's plugin expects.
            rank: This process's rank.
            num_steps: Steps to record; 0 records nothing and costs nothing.
        """
        self._path = folder / f"rank-{rank}.pt.trace.json.gz"
        self._profile: profile | None = None
        if num_steps:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            plan = schedule(wait=SKIPPED, warmup=WARM_UP, active=num_steps, repeat=1)
            self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
            self._profile.start()

    def step(self) -> None:
        """Count a finished step."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """Stop; a profile that is incomplete when training ends is written as it is."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, recorded: profile) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(TEMPORARY_SUFFIX)
        with scratch_folder("profile") as folder:
            trace = Path(folder, self._path.name)  # the profiler compresses if the name ends in .gz
            recorded.export_chrome_trace(str(trace))
            shutil.copyfile(trace, beside)
        os.replace(beside, self._path)
        logger.info("profile written: %s", self._path)
