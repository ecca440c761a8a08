"""Library that keeps every server of a local cluster on a loopback address.

Ray's GCS, raylets, agents and workers, and torch's TCPStore, listen on all interfaces unless the node's address is
literally 127.0.0.1, which Ray does not accept for a node and which would make all nodes one. They have no option to
change that. So the nodes are started with a small library in ``LD_PRELOAD``; the processes they start inherit it. It
turns the address "any" of a ``bind`` into the node's own. A server on "any" can be reached at 127.0.0.1 too, and parts
of Ray rely on that among themselves; so a ``connect`` to a port of 127.0.0.1 on which nothing listens goes to the
node's own address instead.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from sharding.errors import UserError

ADDRESS_VARIABLE = "SATFUSION_BIND_ADDRESS"
LIBRARY = "loopback.so"
"""Name of the library in the folder that it is compiled into."""
_SOURCE = resources.files(__package__) / "bind.c"


def build_library(folder: Path) -> Path:
    """Compile the library into ``folder`` and return its path.

    Raises:
        UserError: There is no C compiler, it fails, or ``LD_PRELOAD`` cannot hold the path.
    """
    library = folder.resolve() / LIBRARY
    if any(letter.isspace() or letter == ":" for letter in str(library)):
        raise UserError(
            f"the state folder {str(folder)!r} holds a space or a colon, which the dynamic linker takes for the "
            "end of a name: choose another --state"
        )
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "g++"))), None)
    if compiler is None:
        raise UserError("a local cluster needs a C compiler to keep Ray on loopback: install gcc or clang")
    command = [compiler, "-x", "c", "-O1", "-Wall", "-shared", "-fPIC", "-o", str(library), "-", "-ldl"]
    result = subprocess.run(  # noqa: S603 - a compiler of the PATH and our own words, no shell
        command, input=_SOURCE.read_text(encoding="utf-8"), text=True, capture_output=True, check=False
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{compiler} could not build the library that keeps Ray on loopback: {last}")
    return library


def confined(environment: Mapping[str, str], library: Path, address: str) -> dict[str, str]:
    """Return ``environment`` with the variables that keep a node at ``address``, and all its processes, on loopback.

    Gloo and NCCL look for the interface of the host's name, which is not loopback, so a variable names the interface.
    """
    if not ipaddress.IPv4Address(address).is_loopback:
        raise ValueError(f"{address} is not a loopback address")
    before = environment.get("LD_PRELOAD")
    return {
        **environment,
        "LD_PRELOAD": os.pathsep.join(filter(None, (str(library), before))),
        ADDRESS_VARIABLE: address,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
