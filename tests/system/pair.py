"""Two nodes that can replicate to each other."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from tests.system.dovecot_conf import MailStorage
from tests.system.hosts import Host
from tests.system.loopback import Instance
from tests.system.network import Switch
from tests.system.node import Node
from tests.system.rundir import RunDirectory

SUITE_OF = {"2.3-hosts": "bookworm", "2.4": "trixie"}
VERSIONS = ("2.3", "2.4", "2.3-hosts")
_PROGRAMS = {
    "debootstrap": "debootstrap",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "mount": "mount",
    "dovecot": "dovecot-imapd dovecot-lmtpd dovecot-pop3d dovecot-sieve dovecot-managesieved",
}


@dataclass
class Pair:
    """``version`` is one of VERSIONS. Iterating gives both nodes."""

    version: str
    a: Node
    b: Node
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __iter__(self) -> Iterator[Node]:
        return iter((self.a, self.b))

    def other(self, node: Node) -> Node:
        return self.b if node is self.a else self.a

    def fresh_users(self, count: int = 1) -> list[str]:
        """New users, the same on both nodes; the users that were are none any more. Nothing of a new
        user exists on disk."""
        names = [f"u{next(self._numbers)}@example.org" for _ in range(count)]
        for node in self:
            node.users(names)
        return names

    def start_daemons(self, config: str = "") -> None:
        """A daemon on each node, with the other node as its peer and ``config`` before that."""
        for node in self:
            node.start_daemon(config + self.peer_table(node))

    def peer_table(self, node: Node) -> str:
        """The [[peer]] table of ``node``'s daemon."""
        other = self.other(node)
        return f'[[peer]]\nname = "{other.name}"\ndestination = "{node.peer_destination(other)}"\n'

    def reset(self) -> None:
        for node in self:
            node.reset()


@contextmanager
def pair(version: str, storage: MailStorage = MailStorage()) -> Iterator[Pair]:  # noqa: B008
    """Two running nodes, a and b, removed with all they left in the end.

    ``version`` "2.3": two instances on loopback of this machine's Dovecot, which has to be that; "loopback":
    the same with whatever it is; "2.4", "2.3-hosts": two hosts with Dovecot 2.4.1 or 2.3.19.1 and systemd.
    """
    on_loopback = version in ("2.3", "loopback")
    require_programs(["dovecot"] if on_loopback else list(_PROGRAMS))
    with ExitStack() as stack:
        run = RunDirectory()
        stack.callback(run.close)
        nodes: list[Node] = []
        if on_loopback:
            for name in ("a", "b"):
                instance = Instance(name, run, storage)
                stack.callback(instance.close)
                nodes.append(instance)
        else:
            switch = Switch(run.id)
            hosts = []
            for name in ("a", "b"):
                host = Host(name, SUITE_OF[version], run, switch, storage)
                stack.callback(host.close)
                hosts.append(host)
            for host in hosts:
                host.wait_booted()
            nodes.extend(hosts)
        a, b = nodes
        if version == "2.3" and a.version != version:
            raise RuntimeError(f"this machine's Dovecot is {a.version}, not 2.3")
        yield Pair(version, a, b)


def require_programs(programs: Sequence[str]) -> None:
    """RuntimeError that names the Debian packages to install."""
    if os.geteuid() != 0:
        raise RuntimeError("system tests have to run as root: they start servers and make network namespaces")
    missing = [_PROGRAMS[program] for program in programs if shutil.which(program) is None]
    if missing:
        raise RuntimeError(f"missing packages: {' '.join(missing)}")
