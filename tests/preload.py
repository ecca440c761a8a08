"""What the process loads that ranks are forked from: seconds of imports, once for all tests of a worker."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pipeline.evaluation.evaluate
import pipeline.training.loop  # noqa: F401
from pipeline.engines.deepspeed_engine import import_deepspeed

import_deepspeed()
