"""The two Dovecot instances of record.py, and what users do on them."""

from __future__ import annotations

import base64
import os
import poplib
import re
import smtplib
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import NamedTuple

PASSWORD = "secret"
UID = 2000
KIND_OF_NAME = {
    "dovecot.index.log": "index",
    "dovecot.list.index.log": "list",
    "dovecot.map.index.log": "map",
    "dovecot.mailbox.log": "mailbox",
}

ROTATE_SOON = (
    "mail_index_log_rotate_min_size=2k",
    "mail_index_log_rotate_max_size=3k",
    "mail_index_log_rotate_min_age=0",
    "mail_index_rewrite_min_log_bytes=512",
    "mail_index_rewrite_max_log_bytes=1k",
)
USERS_23 = {
    "maildir": (),
    "fs": ("mail=maildir:~/Maildir:LAYOUT=fs",),
    "sdbox": ("mail=sdbox:~/sdbox",),
    "mdbox": ("mail=mdbox:~/mdbox",),
    "rotate": ROTATE_SOON,
}
USERS_24 = {
    "maildir": (),
    "fs": ("mailbox_list_layout=fs",),
    "sdbox": ("mail_driver=sdbox", "mail_path=~/sdbox"),
    "mdbox": ("mail_driver=mdbox", "mail_path=~/mdbox"),
    "rotate": ROTATE_SOON,
}


class Snapshot(NamedTuple):
    inode: int
    data: bytes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.01)


def dovecot_version(root: str) -> str:
    command = [*(["chroot", root] if root else []), "dovecot", "--version"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.match(r"\d+\.\d+\.\d+", output)
    if not found:
        raise RuntimeError(f"not a version: {output}")
    return found[0]


class Node:
    """One Dovecot instance. ``root`` is "" or the chroot; ``inner`` its directory as it is seen there."""

    SESSIONS = frozenset({"imap", "pop3", "lmtp", "managesieve", "doveadm-server"})

    def __init__(self, name: str, root: str, inner: str, version: str) -> None:
        self.name, self.root, self.inner = name, root, f"{inner}/{name}"
        self.outer = Path(root + self.inner)
        self.ports = {service: free_port() for service in ("lmtp", "imap", "pop3", "sieve", "doveadm")}
        for directory in ("run", "state", "home"):
            (self.outer / directory).mkdir(parents=True)
        os.chown(self.outer / "home", UID, UID)
        new = not version.startswith("2.3.")
        config = Template((Path(__file__).parent / f"record-{'2.4' if new else '2.3'}.conf.in").read_text())
        (self.outer / "conf").write_text(config.substitute(self.ports, dir=self.inner, name=name))
        users = USERS_24 if new else USERS_23
        (self.outer / "users").write_text(
            "".join(
                f"{user}:{{PLAIN}}{PASSWORD}:{UID}:{UID}::::{' '.join('userdb_' + item for item in extra)}\n"
                for user, extra in users.items()
            )
        )
        self.environment = {**os.environ, "TZ": "UTC", "DOVECOT_HOSTDOMAIN": f"{name}.example.test"}
        self.master = subprocess.Popen(
            self._command("dovecot", "-F", "-c", f"{self.inner}/conf"), env=self.environment
        )
        for service, port in self.ports.items():
            wait_for(partial(self._answers, port), f"{name}: {service}")

    def _answers(self, port: int) -> bool:
        if self.master.poll() is not None:
            raise RuntimeError(f"{self.name}: dovecot ended with {self.master.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def _command(self, *argv: str) -> list[str]:
        return [*(["chroot", self.root] if self.root else []), *argv]

    def doveadm(self, *argv: str, ok: Sequence[int] = (0,)) -> subprocess.CompletedProcess[str]:
        command = self._command("doveadm", "-c", f"{self.inner}/conf", *argv)
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        if result.returncode not in ok:
            raise RuntimeError(f"{self.name}: {argv} ended with {result.returncode}: {result.stderr}")
        return result

    def sync(self, user: str, peer: Node) -> None:
        destination = f"tcp:127.0.0.1:{peer.ports['doveadm']}"
        for _ in range(3):
            result = self.doveadm("sync", "-u", user, "-l", "30", "-s", "", destination, ok=(0, 2))
            if result.returncode == 0:
                return
            print(f"{self.name}: changed during sync of {user}: {result.stderr.strip()}")
        raise RuntimeError(f"{self.name}: sync of {user} does not come to an end")

    def settle(self) -> None:
        """Wait until the processes that served a client have closed their mailboxes and are gone."""

        def no_sessions() -> bool:
            for stat in Path("/proc").glob("[0-9]*/stat"):
                try:
                    name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
                except OSError:
                    continue
                if name in self.SESSIONS and int(rest.split()[1]) == self.master.pid:
                    return False
            return True

        wait_for(no_sessions, f"{self.name}: sessions do not end")

    def home(self, user: str) -> Path:
        return self.outer / "home" / user

    def logs(self, user: str) -> dict[str, Snapshot]:
        self.settle()
        found = {}
        for directory, _, names in os.walk(self.home(user)):
            for name in names:
                if name.removesuffix(".2") in KIND_OF_NAME:
                    path = Path(directory, name)
                    snapshot = Snapshot(path.stat().st_ino, path.read_bytes())
                    found[str(path.relative_to(self.home(user)))] = snapshot
        return found

    def stop(self) -> None:
        self.master.terminate()
        self.master.wait(20)

    # What users do.

    def imap(self, user: str, *commands: str) -> None:
        """Log in, run each command (a literal is written ``{N+}``), log out and wait for the end."""
        with socket.create_connection(("127.0.0.1", self.ports["imap"]), 20) as connection:
            stream = connection.makefile("rwb")
            stream.readline()
            for number, command in enumerate([f"LOGIN {user} {PASSWORD}", *commands, "LOGOUT"]):
                stream.write(f"t{number} {command}\r\n".encode())
                stream.flush()
                while not (line := stream.readline()).startswith(f"t{number} ".encode()):
                    if not line:
                        raise ConnectionError(command)
                    if line.startswith(b"+ idling"):
                        stream.write(b"DONE\r\n")
                        stream.flush()
                if b" OK" not in line[:8]:
                    raise RuntimeError(f"{command}: {line!r}")
            stream.read()

    def deliver(self, user: str, number: int) -> None:
        with smtplib.LMTP("127.0.0.1", self.ports["lmtp"]) as lmtp:
            lmtp.sendmail("sender@example.test", [user], message(number))

    def pop3_take(self, user: str) -> None:
        session = poplib.POP3("127.0.0.1", self.ports["pop3"])
        session.user(user)
        session.pass_(PASSWORD)
        session.retr(1)
        session.dele(1)
        session.quit()

    def managesieve(self, user: str, *commands: str) -> None:
        login = base64.b64encode(f"\0{user}\0{PASSWORD}".encode()).decode()
        with socket.create_connection(("127.0.0.1", self.ports["sieve"]), 20) as connection:
            stream = connection.makefile("rwb")
            for command in ["", f'AUTHENTICATE "PLAIN" "{login}"', *commands, "LOGOUT"]:
                if command:
                    stream.write(f"{command}\r\n".encode())
                    stream.flush()
                while not (line := stream.readline()).startswith(b"OK"):
                    if not line or line.startswith((b"NO", b"BYE")):
                        raise RuntimeError(f"{command}: {line!r}")


def message(number: int) -> str:
    return (
        "From: sender@example.test\r\nTo: user@example.test\r\n"
        f"Date: Thu, 1 Jan 2026 10:00:{number:02d} +0000\r\nMessage-ID: <{number}@example.test>\r\n"
        f"Subject: message {number}\r\n\r\nbody {number}\r\n"
    )
