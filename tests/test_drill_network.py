"""A network of namespaces whose hosts reach each other, until one is cut off, and again afterwards."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.drill_network import Network, available, network
from sharding.errors import UserError

SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], 0)) as server:
    print(server.getsockname()[1], flush=True)
    while True:
        server.accept()[0].close()
"""
CLIENT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=float(sys.argv[3]))"


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    if not available():
        pytest.skip("network namespaces need root and the command `ip`")
    try:
        with network(2) as made:
            yield made
    except UserError as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")


@pytest.mark.slow  # it changes the machine's network interfaces, and a firewall of the machine can forbid it
def test_a_host_that_is_cut_off_is_not_reached_until_it_is_back(net: Network) -> None:
    first, second = net.hosts
    server = subprocess.Popen(
        [*first.enter, sys.executable, "-c", SERVER, first.address], stdout=subprocess.PIPE, text=True
    )
    with server:
        try:
            assert server.stdout is not None
            port = server.stdout.readline().strip()

            def reached(seconds: float) -> bool:
                command = [*second.enter, sys.executable, "-c", CLIENT, first.address, port, str(seconds)]
                return subprocess.run(command, capture_output=True, check=False).returncode == 0

            assert reached(60)
            net.cut(1)
            assert not reached(0.5)
            net.heal(1)
            # The addresses of the link, which could not be found meanwhile, are asked for again after a second or so.
            assert any(reached(10) for _ in range(6))
        finally:
            server.kill()
