"""Network namespaces: a switch, hosts on it, and sockets made inside a host's namespace."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system import node

_CLONE_NEWNET = 0x40000000
# tcp(7). Dovecot asks for SO_KEEPALIVE on both ends of its connections (lib/net.c), but by default the kernel
# looks for a vanished peer only after two hours: dsync would wait until its own timeout, up to ten minutes,
# and may hold the user's lock so long.
_KEEPALIVE = {"tcp_keepalive_time": 30, "tcp_keepalive_intvl": 10, "tcp_keepalive_probes": 3}
_libc = ctypes.CDLL(None, use_errno=True)


class Switch:
    """A bridge in a namespace of its own. Nothing connects it to the machine's networks."""

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._namespace = f"{run_id}-switch"
        self._hosts: list[str] = []
        _ip("netns", "add", self._namespace)
        self._switch_ip("link", "add", "br0", "type", "bridge")
        self._switch_ip("link", "set", "br0", "up")

    def attach(self, name: str, address: str) -> str:
        """Make a namespace for host ``name`` with eth0 on this switch; returns the namespace's name."""
        namespace = f"{self._run_id}-{name}"
        _ip("netns", "add", namespace)
        port = f"port-{name}"
        self._switch_ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        self._switch_ip("link", "set", port, "master", "br0", "up")
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        with _inside(namespace):
            for name_below, value in _KEEPALIVE.items():
                Path("/proc/sys/net/ipv4", name_below).write_text(str(value))
        self._hosts.append(namespace)
        return namespace

    def forget_neighbours(self) -> None:
        """Empty the hosts' ARP caches: who is not there is noticed at the next packet."""
        for namespace in self._hosts:
            _ip("-n", namespace, "neighbour", "flush", "dev", "eth0")

    def set_link(self, name: str, up: bool) -> None:
        self._switch_ip("link", "set", f"port-{name}", "up" if up else "down")

    def _switch_ip(self, *arguments: str) -> None:
        _ip("-n", self._namespace, *arguments)


def namespace_path(namespace: str) -> Path:
    return Path("/run/netns") / namespace


def connect(namespace: str, address: str, port: int) -> socket.socket:
    """A TCP connection made inside ``namespace``; the socket stays there."""
    with _inside(namespace):
        return node.connect(address, port)


@contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """The calling thread, and only it, is in ``namespace`` meanwhile."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(namespace_path(namespace), os.O_RDONLY | os.O_CLOEXEC)
        try:
            _setns(there)
        finally:
            os.close(there)
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr}")
