"""Imports of the process from which workers are forked; this module has no other purpose."""

import signal

# Ctrl-C reaches all processes of a terminal: this one ignores it and ends with the command.
signal.signal(signal.SIGINT, signal.SIG_IGN)

import sharding.run.build  # noqa: E402, F401
