"""Driver of a sweep on a Ray cluster: ``python -m cluster.sweep.job FILE``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from cluster.jobs.notice import Stopped
from cluster.logs import configure_logging
from cluster.sweep.on_ray import cells_on_ray
from cluster.sweep.plan import SweepJob
from cluster.sweep.run import run_sweep
from pipeline.signals import STOPPED_STATUS
from sharding.errors import UserError
from sharding.files import read_text
from sharding.terminal import say

logger = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep in a file and return its exit status: 0, 1 if a run failed, 2 for a user error, 75 if stopped."""
    (path,) = sys.argv[1:] if arguments is None else arguments
    configure_logging()
    import ray  # Ray is slow to import

    try:
        job = SweepJob.from_json(read_text("the job's file", path))
        ray.init(address="auto", logging_level=logging.WARNING)
        return run_sweep(job, cells_on_ray(job.options))
    except UserError as error:
        say(f"satfusion: error: {error}", sys.stderr)
        return 2
    except Stopped:
        logger.warning("the sweep was stopped, its runs at their newest checkpoints: the same sweep resumes them")
        return STOPPED_STATUS


if __name__ == "__main__":
    # Run under the module's own name, so that the workers import the function instead of getting a copy of this module.
    from cluster.sweep import job as sweep

    sys.exit(sweep.main())
