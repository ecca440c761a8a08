"""Keeps every server of a local cluster on a loopback address.

Ray's GCS, raylets, agents and workers, and torch's TCPStore, listen on all interfaces unless the node's address
is literally 127.0.0.1, which Ray does not accept for a node and which would make all nodes one. No flag of theirs
changes that. So the nodes are started with a small library in ``LD_PRELOAD`` that turns the address "any" of
a ``bind`` into the node's own; the processes they start inherit it.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from sharding.errors import UserError

ADDRESS_VARIABLE = "SATFUSION_BIND_ADDRESS"
_SOURCE = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

typedef int (*bind_function)(int, const struct sockaddr *, socklen_t);

/* Only stream sockets serve here; a datagram socket bound to "any" is often a client's. */
static int is_stream(int fd) {
    int type = 0;
    socklen_t size = sizeof type;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM;
}

int bind(int fd, const struct sockaddr *address, socklen_t length) {
    bind_function next = (bind_function)dlsym(RTLD_NEXT, "bind");
    const char *text = getenv("SATFUSION_BIND_ADDRESS");
    struct in_addr own;
    if (!address || !text || inet_pton(AF_INET, text, &own) != 1 || !is_stream(fd))
        return next(fd, address, length);
    if (address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
        struct sockaddr_in changed;
        memcpy(&changed, address, sizeof changed);
        if (changed.sin_addr.s_addr == htonl(INADDR_ANY))
            changed.sin_addr = own;
        return next(fd, (struct sockaddr *)&changed, sizeof changed);
    }
    if (address->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
        struct sockaddr_in6 changed;
        memcpy(&changed, address, sizeof changed);
        if (IN6_IS_ADDR_UNSPECIFIED(&changed.sin6_addr)) {
            int only_v6 = 0;
            socklen_t size = sizeof only_v6;
            getsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only_v6, &size);
            changed.sin6_addr = in6addr_loopback;
            if (!only_v6) { /* A socket for both families: the node's address in its IPv6 spelling. */
                memset(&changed.sin6_addr, 0, 10);
                memset(changed.sin6_addr.s6_addr + 10, 0xff, 2);
                memcpy(changed.sin6_addr.s6_addr + 12, &own, 4);
            }
        }
        return next(fd, (struct sockaddr *)&changed, sizeof changed);
    }
    return next(fd, address, length);
}
"""


def build_library(folder: Path) -> Path:
    """Compile the library into ``folder`` and return its path.

    Raises:
        UserError: There is no C compiler, it fails, or the path cannot stand in ``LD_PRELOAD``.
    """
    library = folder.resolve() / "loopback.so"
    if any(letter.isspace() or letter == ":" for letter in str(library)):
        raise UserError(
            f"the state folder {str(folder)!r} holds a space or a colon, which the dynamic linker takes for the "
            "end of a name: choose another --state"
        )
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang", "g++"))), None)
    if compiler is None:
        raise UserError("a local cluster needs a C compiler to keep Ray on loopback: install gcc or clang")
    command = [compiler, "-x", "c", "-O1", "-shared", "-fPIC", "-o", str(library), "-", "-ldl"]
    result = subprocess.run(command, input=_SOURCE, text=True, capture_output=True, check=False)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{compiler} could not build the library that keeps Ray on loopback: {last}")
    return library


def confined(environment: Mapping[str, str], library: Path, address: str) -> dict[str, str]:
    """Return ``environment`` with what keeps a node at ``address``, and all it starts, on loopback.

    Gloo and NCCL look for the interface of the host's name, which is not loopback, so they are told.
    """
    if not ipaddress.IPv4Address(address).is_loopback:
        raise ValueError(f"{address} is no loopback address")
    before = environment.get("LD_PRELOAD")
    return {
        **environment,
        "LD_PRELOAD": os.pathsep.join(filter(None, (str(library), before))),
        ADDRESS_VARIABLE: address,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
