"""Hosts on this machine with a network of their own, one of which can be cut off: network namespaces on a bridge."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.local.nodes import Host
from sharding.errors import UserError

# Gloo looks for the interface of the machine's name, which is not in the namespace. With its default of 5 checks, Ray
# declares a silent host dead after 62 to 65 s; with 3, after 36 to 39 s.
_ENVIRONMENT = ("GLOO_SOCKET_IFNAME=eth0", "RAY_health_check_failure_threshold=3")


@dataclass(frozen=True)
class Network:
    """Namespaces and the bridge that connects them with each other and with this process."""

    name: str
    """Name of the bridge; those of the namespaces and links begin with it."""
    hosts: tuple[Host, ...]
    """The namespaces."""

    def cut(self, number: int) -> None:
        """Take a host's link off the bridge: its packets are lost both ways, and no connection is closed."""
        _ip("link", "set", f"{self.name}-{number}", "nomaster")

    def heal(self, number: int) -> None:
        """Put a host's link back on the bridge."""
        _ip("link", "set", f"{self.name}-{number}", "master", self.name)


def available() -> bool:
    """Return whether this process may make network namespaces."""
    return os.geteuid() == 0 and shutil.which("ip") is not None


@contextlib.contextmanager
def network(count: int) -> Iterator[Network]:
    """Make ``count`` hosts for the block, up to 200.

    Raises:
        UserError: This process may not.
    """
    if not available():
        raise UserError("a network that can be cut needs root and the command `ip` (package iproute2)")
    pid = os.getpid()
    name, net = f"sf{pid}", f"10.{128 + (pid >> 8) % 128}.{pid % 256}"
    hosts = []
    with contextlib.ExitStack() as made:
        _ip("link", "add", name, "type", "bridge")
        made.callback(_ip, "link", "del", name)
        _ip("addr", "add", f"{net}.1/24", "dev", name)
        _ip("link", "set", name, "up")
        for number in range(count):
            space, address = f"{name}-{number}", f"{net}.{number + 2}"
            _ip("netns", "add", space)
            made.callback(_ip, "netns", "del", space)
            _ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
            made.callback(_ip, "link", "del", space)  # A namespace lives on while a process of it ends.
            _ip("link", "set", space, "master", name, "up")
            for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
                _ip("-n", space, *words.split())
            hosts.append(Host(address, ("ip", "netns", "exec", space, "env", *_ENVIRONMENT)))
        yield Network(name, tuple(hosts))


def _ip(*words: str) -> None:
    # The command of the PATH and our own words, no shell.
    ended = subprocess.run(["ip", *words], check=False, capture_output=True, text=True)  # noqa: S607
    if ended.returncode:
        raise UserError(f"`ip {' '.join(words)}` failed: {ended.stderr.strip() or ended.returncode}")
