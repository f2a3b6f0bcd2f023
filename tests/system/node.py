"""A Dovecot node as a test sees it, whether it is a whole host or an instance on loopback."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.system.clients import TIMEOUT, Imap, Lmtp, Pop3, Sieve
from tests.system.dovecot_conf import PASSWORD, MailStorage, Ports
from tests.system.waiting import wait_until

CHECKOUT = Path(__file__).resolve().parents[2]
CLEAN_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}


class Node(ABC):
    """Paths are as seen from outside; ``base_dir`` and ``daemon_state`` only exist inside the node."""

    name: str
    version: str
    address: str
    ports: Ports
    storage: MailStorage
    # Dovecot's base_dir, as the node sees it.
    base_dir: Path
    # The daemon's /var/lib/dovesyncd and configuration file.
    daemon_state: Path
    daemon_config: Path
    _mail: Path
    _index: Path
    _users_file: Path
    _log_file: Path

    def __init__(self) -> None:
        self._user_lists = itertools.count()
        self._log_start = 0

    # Dovecot

    @abstractmethod
    def run(
        self, *command: str, check: bool = True, stdin: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the node and wait. With ``check``, RuntimeError when it fails."""

    @abstractmethod
    def doveadm(
        self, *arguments: str, check: bool = False, stdin: str = "", timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run doveadm against this node's Dovecot."""

    @abstractmethod
    def connect(self, port: int) -> socket.socket:
        """A TCP connection to the node."""

    @abstractmethod
    def configure(self, storage: MailStorage) -> None:
        """Restart Dovecot with other storage settings."""

    def users(self, names: Sequence[str]) -> None:
        """Make ``names`` this node's users, and return when Dovecot knows them."""
        # Dovecot reads the file again when size or mtime (in seconds) differ, so no two may have one size.
        padding = "#" * (1 + next(self._user_lists)) + "\n"
        new = self._users_file.with_suffix(".new")
        new.write_text(padding + "".join(f"{name}:{{PLAIN}}{PASSWORD}::::::\n" for name in names))
        new.chmod(0o644)
        new.rename(self._users_file)
        for name in names:
            wait_until(lambda name=name: self._knows(name), 10, f"{self.name} knows {name}")  # type: ignore[misc]

    def _knows(self, user: str) -> bool:
        return self.doveadm("user", user).returncode == 0

    @contextmanager
    def imap(self, user: str) -> Iterator[Imap]:
        with Imap(lambda: self.connect(self.ports.imap)) as client:
            client.login(user, PASSWORD)
            yield client

    @contextmanager
    def pop3(self, user: str) -> Iterator[Pop3]:
        with Pop3(lambda: self.connect(self.ports.pop3)) as client:
            client.user(user)
            client.pass_(PASSWORD)
            yield client

    @contextmanager
    def lmtp(self) -> Iterator[Lmtp]:
        with Lmtp(lambda: self.connect(self.ports.lmtp)) as client:
            yield client

    def sieve(self, user: str) -> Sieve:
        return Sieve(lambda: self.connect(self.ports.sieve), user, PASSWORD)

    def deliver(self, user: str, mail: bytes) -> None:
        with self.lmtp() as client:
            client.deliver([user], mail)

    def home(self, user: str) -> Path:
        local, _, domain = user.rpartition("@")
        return self._mail / domain / local

    def maildir(self, user: str) -> Path:
        """The mail root, also of the other drivers."""
        return self.home(user) / self.storage.directory

    def index_root(self, user: str) -> Path:
        return self._index / user if self.storage.separate_index else self.maildir(user)

    def has_inbox(self, user: str) -> bool:
        return (self.maildir(user) / self.storage.inbox).exists()

    def dovecot_log(self) -> list[str]:
        """Lines that Dovecot logged since the last reset()."""
        try:
            with open(self._log_file, "rb") as file:
                file.seek(self._log_start)
                return file.read().decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return []

    def peer_destination(self, other: Node) -> str:
        """What dsync on this node calls the other one."""
        return f"tcp:{other.address}:{other.ports.doveadm}"

    # The daemon

    @abstractmethod
    def start_daemon(
        self,
        config: str = "",
        *,
        ready: bool = True,
        timeout: float = 30,
        environment: dict[str, str] | None = None,
    ) -> None:
        """Write ``config`` as the daemon's configuration file and start it.

        Returns when the daemon has said READY=1, or at once when ``ready`` is False. RuntimeError, with
        what it logged, when it ends instead.
        """

    @abstractmethod
    def stop_daemon(self) -> None:
        """SIGTERM, and wait for the end. Nothing happens when it does not run."""

    @abstractmethod
    def kill_daemon(self) -> None:
        """SIGKILL to the main process only, and wait for its end."""

    @abstractmethod
    def daemon_pid(self) -> int | None:
        """The main process, as the outer system numbers it; None when the daemon does not run."""

    @abstractmethod
    def daemon_log(self) -> list[str]:
        """What the daemon logged since it was last started."""

    def reset(self) -> None:
        """Back to a node without users, mail and daemon state."""
        self.stop_daemon()
        self.users([])
        self.doveadm("kick", "*")
        for directory in (self._mail, self._index, self.daemon_state):
            _empty(directory)
        self.daemon_config.unlink(missing_ok=True)
        shutil.rmtree(self.daemon_config.with_suffix(".toml.d"), ignore_errors=True)
        self._log_start = self._log_file.stat().st_size if self._log_file.exists() else 0

    @abstractmethod
    def close(self) -> None:
        """End everything that belongs to the node."""


def _empty(directory: Path) -> None:
    if not directory.is_dir():
        return
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


def completed(
    command: Sequence[str], *, check: bool, stdin: str, timeout: float, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, env=environment, input=stdin, capture_output=True, text=True, errors="surrogateescape",
        timeout=timeout, check=False,
    )  # fmt: skip
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr or done.stdout}")
    return done


def connect(address: str, port: int) -> socket.socket:
    return socket.create_connection((address, port), timeout=TIMEOUT)
