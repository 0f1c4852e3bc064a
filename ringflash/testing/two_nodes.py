"""Two nodes on one machine: network namespaces joined by a link of a known speed. Needs root and iproute2 (`ip`, `tc`)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000
INTERFACE = "node"
"""Of each namespace, towards the other."""


def missing() -> str:
    """Why this machine cannot join two namespaces by a shaped link; empty if it can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if not (shutil.which("ip") and shutil.which("tc")):
        return "needs `ip` and `tc` (iproute2)"
    try:
        with shaped_link(1_000_000):
            return ""
    except subprocess.CalledProcessError as error:
        return f"needs network namespaces, veth and tbf: {error.stderr.decode().strip()}"


def _shell(command: str) -> None:
    subprocess.run(command, shell=True, check=True, capture_output=True)


@contextlib.contextmanager
def shaped_link(bits_per_s: int) -> Iterator[tuple[str, str]]:
    """Names of two network namespaces, each with one interface to the other that lets so much through, in each direction.

    Raises CalledProcessError where the machine does not allow it.
    """
    names = f"ringflash{os.getpid()}a", f"ringflash{os.getpid()}b"
    # What is let through at once, and what a socket has under way at a time: a ms of the link, and half of one, since NCCL has a
    # dozen of them. With more, whatever is sent next waits behind tens of ms of the link.
    burst = max(64 << 10, bits_per_s // 8 // 1000)
    most = max(256 << 10, bits_per_s // 8 // 2000)
    try:
        for name in names:
            _shell(f"ip netns add {name}")
        _shell(f"ip link add name {INTERFACE} netns {names[0]} type veth peer name {INTERFACE} netns {names[1]}")
        for i, name in enumerate(names):
            _shell(f"ip -n {name} addr add 10.77.0.{i + 1}/24 dev {INTERFACE}")
            for interface in ("lo", INTERFACE):
                _shell(f"ip -n {name} link set {interface} up")
            # Nor does a connection forget what the link carries while it has nothing to send, as those of clusters do not.
            bounds = " ".join(f'net.ipv4.tcp_{x}mem="4096 65536 {most}"' for x in "rw")
            settings = f"net.ipv4.tcp_congestion_control=reno net.ipv4.tcp_slow_start_after_idle=0 {bounds}"
            _shell(f"ip netns exec {name} sysctl -w {settings}")
            _shell(f"tc -n {name} qdisc add dev {INTERFACE} root tbf rate {bits_per_s} burst {burst} limit {64 << 20}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def enter(namespace: str) -> None:
    """Moves the calling thread, and those it starts from now on, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
