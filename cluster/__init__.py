"""Local Ray clusters, job submission and the command line; they decide where training runs, not its results."""

__version__ = "0.1.0"
