"""A port for a server that is about to start, which no one else is given meanwhile."""

from __future__ import annotations

import random
import socket
from pathlib import Path

# Linux gives ports of this range to every connection and to whoever asks for any: `ip(7)`, ip_local_port_range.
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST, _TRIES = 15_000, 100


def free_port(address: str = "127.0.0.1") -> int:
    """Choose a free TCP port.

    The kernel's own choice (port 0) may be another connection's before the server binds it, which is what happens
    once in some thousands of times beside jobs whose ranks connect. So it is one that the kernel gives to nobody, as
    far as there are such.

    Raises:
        OSError: The address is not one of this machine.
    """
    try:
        first = int(_EPHEMERAL.read_text(encoding="ascii").split()[0])
    except OSError:  # not on Linux; what IANA says
        first = 49_152
    draws = random.SystemRandom()  # a seed would draw the same in every process
    chosen = (draws.randrange(_LOWEST, first) for _ in range(_TRIES if first > _LOWEST + _TRIES else 0))
    for port in (*chosen, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do
            try:
                probe.bind((address, port))
            except OSError:
                if not port:
                    raise
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("the last one raises")
