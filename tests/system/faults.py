"""What goes wrong in tests: a Dovecot that is not there, a peer that does not answer, mail that is gone."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.system import network
from tests.system.dovecot_conf import PASSWORD
from tests.system.hosts import Host
from tests.system.loopback import Instance
from tests.system.node import Node
from tests.system.waiting import wait_until

# Dovecot's index files of one mailbox, and of the list of mailboxes.
INDEX_FILES = ("dovecot.index*", "dovecot.list.index*", "dovecot.mailbox.log*")
# Maildir: UIDs, the mailbox's GUID and UIDVALIDITY, keywords, subscriptions.
CONTROL_FILES = ("dovecot-uidlist", "dovecot-uidvalidity*", "dovecot-keywords", "subscriptions")


@contextmanager
def dovecot_stopped(node: Node) -> Iterator[None]:
    """The node's Dovecot does not run meanwhile; it answers again afterwards."""
    assert isinstance(node, (Host, Instance))
    node.stop_dovecot()
    try:
        yield
    finally:
        node.start_dovecot()
        wait_until(lambda: _answers(node), 20, f"Dovecot of {node.name} answers")


@contextmanager
def configured(node: Node, lines: str) -> Iterator[None]:
    """The node's Dovecot has these lines at the end of its configuration meanwhile."""
    before = node.storage
    node.configure(replace(before, extra=before.extra + lines))
    try:
        wait_until(lambda: _answers(node), 20, f"Dovecot of {node.name} answers")
        yield
    finally:
        node.configure(before)
        wait_until(lambda: _answers(node), 20, f"Dovecot of {node.name} answers")


@contextmanager
def unplugged(node: Node) -> Iterator[None]:
    """The host is off the network meanwhile."""
    assert isinstance(node, Host)
    node.cut()
    try:
        yield
    finally:
        node.heal()


def _answers(node: Node) -> bool:
    try:
        for port in (node.ports.imap, node.ports.doveadm):
            node.connect(port).close()
    except OSError:
        return False
    return True


def remove_files(root: Path, *patterns: str) -> None:
    for pattern in patterns:
        for path in list(root.rglob(pattern)):
            if path.is_file():
                path.unlink()


def set_homes(node: Node, homes: Mapping[str, Path]) -> None:
    """Make ``homes`` the node's users, each with his home as the node itself sees it."""
    lines = "".join(f"{user}:{{PLAIN}}{PASSWORD}::::{home}::\n" for user, home in homes.items())
    new = node._users_file.with_suffix(".new")
    new.write_text(lines)
    new.chmod(0o644)
    new.rename(node._users_file)
    for user, home in homes.items():
        wait_until(lambda user=user, home=home: home_of(node, user) == home, 10, f"{user} is at {home}")  # type: ignore[misc]


def home_of(node: Node, user: str) -> Path:
    """As the node itself sees it."""
    return Path(node.doveadm("user", "-f", "home", user).stdout.strip())


class SilentPeer:
    """A TCP listener on the node's loopback that accepts and never says a word, until `close`."""

    def __init__(self, node: Node) -> None:
        with network._inside(node._namespace) if isinstance(node, Host) else contextlib.nullcontext():
            self._listener = socket.create_server(("127.0.0.1", 0))
        self.destination = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepted: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def connections(self) -> int:
        """How many there were."""
        return len(self._accepted)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._accepted.append(self._listener.accept()[0])

    def close(self) -> None:
        # A plain close would leave accept() waiting.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for connection in self._accepted:
            connection.close()


def doveadm_servers(node: Node) -> set[int]:
    """The node's doveadm-server processes, as the outer system numbers them."""
    if isinstance(node, Host):
        master = node._outer_pid(node.run("cat", "/run/dovecot/master.pid").stdout.strip())
    else:
        assert isinstance(node, Instance)
        assert node._dovecot is not None
        master = node._dovecot.pid
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, rest = (entry / "stat").read_text().partition("(")[2].rpartition(")")
            state, parent = rest.split()[:2]
            if name.startswith("doveadm") and int(parent) == master and state != "Z":
                found.add(int(entry.name))
    return found


def receivers(node: Node, user: str) -> list[int]:
    """Those that have the user's files open by now."""
    below = f"/{user.rpartition('@')[0]}/"
    return [pid for pid in doveadm_servers(node) if any(below in file for file in _open_files(pid))]


def _open_files(pid: int) -> list[str]:
    found = []
    # It may end meanwhile.
    with contextlib.suppress(OSError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    return found
