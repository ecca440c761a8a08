"""Where training runs, never what it computes: local Ray clusters, job submission, the command line."""

__version__ = "0.1.0"
