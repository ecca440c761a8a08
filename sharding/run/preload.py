"""What the process loads that workers are forked from; importing it is its only purpose."""

import signal

# Ctrl-C reaches all processes of a terminal: this one ends when the command does, and says nothing.
signal.signal(signal.SIGINT, signal.SIG_IGN)

import sharding.run.build  # noqa: E402, F401
