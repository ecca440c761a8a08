"""Keeps every server of a local cluster on a loopback address.

Ray's GCS, raylets, agents and workers, and torch's TCPStore, listen on all interfaces unless the node's address
is literally 127.0.0.1, which Ray does not accept for a node and which would make all nodes one. No flag of theirs
changes that. So the nodes are started with a small library in ``LD_PRELOAD``; the processes they start inherit it. It
turns the address "any" of a ``bind`` into the node's own. What listens on "any" is reached at 127.0.0.1 too, and Ray's
parts count on that among themselves; so a ``connect`` to a port of 127.0.0.1 on which nothing listens goes to the
node's own address instead.
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
#include <errno.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

typedef int (*address_function)(int, const struct sockaddr *, socklen_t);

/* Only stream sockets serve here; a datagram socket bound to "any" is often a client's. */
static int is_stream(int fd) {
    int type = 0;
    socklen_t size = sizeof type;
    return getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM;
}

static int own_address(struct in_addr *own) {
    const char *text = getenv("SATFUSION_BIND_ADDRESS");
    return text && inet_pton(AF_INET, text, own) == 1;
}

/* An IPv4 address in its IPv6 spelling, ::ffff:a.b.c.d, for a socket of both families. */
static void map_address(struct in6_addr *mapped, const struct in_addr *address) {
    memset(mapped, 0, 10);
    memset(mapped->s6_addr + 10, 0xff, 2);
    memcpy(mapped->s6_addr + 12, address, 4);
}

int bind(int fd, const struct sockaddr *address, socklen_t length) {
    address_function next = (address_function)dlsym(RTLD_NEXT, "bind");
    struct in_addr own;
    if (!address || !own_address(&own) || !is_stream(fd))
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
            if (only_v6)
                changed.sin6_addr = in6addr_loopback;
            else
                map_address(&changed.sin6_addr, &own);
        }
        return next(fd, (struct sockaddr *)&changed, sizeof changed);
    }
    return next(fd, address, length);
}

/* On loopback a connection to a port without a listener is refused at once. */
static int refused_at_localhost(address_function next, in_port_t port) {
    struct sockaddr_in target = {.sin_family = AF_INET, .sin_port = port};
    int refused, saved = errno, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    target.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0)
        return 0;
    refused = next(fd, (struct sockaddr *)&target, sizeof target) != 0 && errno == ECONNREFUSED;
    close(fd);
    errno = saved;
    return refused;
}

int connect(int fd, const struct sockaddr *address, socklen_t length) {
    address_function next = (address_function)dlsym(RTLD_NEXT, "connect");
    struct in_addr own, localhost = {.s_addr = htonl(INADDR_LOOPBACK)};
    if (!address || !own_address(&own) || !is_stream(fd))
        return next(fd, address, length);
    if (address->sa_family == AF_INET && length >= sizeof(struct sockaddr_in)) {
        struct sockaddr_in changed;
        memcpy(&changed, address, sizeof changed);
        if (changed.sin_addr.s_addr == localhost.s_addr && refused_at_localhost(next, changed.sin_port))
            changed.sin_addr = own;
        return next(fd, (struct sockaddr *)&changed, sizeof changed);
    }
    if (address->sa_family == AF_INET6 && length >= sizeof(struct sockaddr_in6)) {
        struct sockaddr_in6 changed;
        struct in6_addr mapped;
        memcpy(&changed, address, sizeof changed);
        map_address(&mapped, &localhost);
        if (memcmp(&changed.sin6_addr, &mapped, sizeof mapped) == 0 &&
            refused_at_localhost(next, changed.sin6_port))
            map_address(&changed.sin6_addr, &own);
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
    command = [compiler, "-x", "c", "-O1", "-Wall", "-shared", "-fPIC", "-o", str(library), "-", "-ldl"]
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
