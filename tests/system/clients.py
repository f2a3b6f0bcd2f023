"""Mail clients that get their socket from a node, wherever that node's network is."""

from __future__ import annotations

import base64
import imaplib
import poplib
import re
import smtplib
import socket
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Callable, Optional

Dial = Callable[[], socket.socket]
TIMEOUT = 30.0


class RefusedError(Exception):
    """A server said no; the text is its answer."""


def message(subject: str, message_id: str = "", body: str = "Hello.") -> bytes:
    """A small mail. Message-ID is made of the subject when there is none."""
    identity = message_id or f"<{subject.replace(' ', '.')}@example.org>"
    return (
        "From: Ann <ann@example.org>\r\nTo: Bob <bob@example.org>\r\n"
        f"Subject: {subject}\r\nMessage-ID: {identity}\r\n"
        f"Date: Mon, 06 Jan 2025 10:00:00 +0000\r\n\r\n{body}\r\n"
    ).encode()


def ok(result: tuple[str, list[Any]]) -> list[Any]:
    """The data of an imaplib result; RefusedError when the server answered NO."""
    status, data = result
    if status != "OK":
        raise RefusedError(repr(data))
    return data


def quoted(name: str) -> str:
    """An IMAP quoted string."""
    return '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'


# imaplib takes a command that it does not know for one of the state in which it is first used.
for _command in ("SETMETADATA", "GETMETADATA"):
    imaplib.Commands[_command] = ("AUTH", "SELECTED")


class Imap(imaplib.IMAP4):
    """imaplib's client with METADATA (RFC 5464). Mailbox names are passed as they stand on the wire."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        super().__init__(timeout=TIMEOUT)

    def _create_socket(self, timeout: Optional[float]) -> socket.socket:
        return self._dial()

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        except imaplib.IMAP4.error:
            # The server was gone already; imaplib leaves the socket open then.
            self.shutdown()

    def setmetadata(self, mailbox: str, entry: str, value: Optional[str]) -> None:
        """``value`` None removes the entry."""
        text = "NIL" if value is None else quoted(value)
        ok(self.xatom("SETMETADATA", quoted(mailbox), f"({entry} {text})"))

    def getmetadata(self, mailbox: str, entry: str) -> Optional[str]:
        ok(self.xatom("GETMETADATA", quoted(mailbox), f"({entry})"))
        for part in self.response("METADATA")[1]:
            if isinstance(part, tuple):
                return str(part[1], "utf-8")
            found = re.search(rb'\(\S+ "((?:[^"\\]|\\.)*)"\)', part or b"")
            if found:
                return re.sub(rb"\\(.)", rb"\1", found.group(1)).decode()
        return None


class Lmtp(smtplib.LMTP):
    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        # Without a name of its own, smtplib would ask the resolver for one.
        super().__init__("node", local_hostname="client.example.org", timeout=TIMEOUT)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        return self._dial()

    def deliver(self, recipients: Iterable[str], mail: bytes) -> None:
        """Raises RefusedError when any recipient was refused."""
        refused = self.sendmail("ann@example.org", list(recipients), mail)
        if refused:
            raise RefusedError(repr(refused))


class Pop3(poplib.POP3):
    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        super().__init__("node", timeout=TIMEOUT)

    def _create_socket(self, timeout: float) -> socket.socket:
        return self._dial()

    def __enter__(self) -> Pop3:
        return self

    def __exit__(self, *_: object) -> None:
        self.quit()


class Sieve:
    """The part of ManageSieve (RFC 5804) that tests need."""

    def __init__(self, dial: Dial, user: str, password: str) -> None:
        self._socket = dial()
        self._file = self._socket.makefile("rb")
        try:
            self._answer()
            token = base64.b64encode(f"\0{user}\0{password}".encode()).decode()
            self._command(f'AUTHENTICATE "PLAIN" "{token}"')
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sieve:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        try:
            if kind is None:
                self._command("LOGOUT")
        finally:
            self.close()

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def put(self, name: str, script: str) -> None:
        self._command(f"PUTSCRIPT {quoted(name)} {{{len(script.encode())}+}}\r\n{script}")

    def activate(self, name: str) -> None:
        """An empty name: no script is active."""
        self._command(f"SETACTIVE {quoted(name)}")

    def delete(self, name: str) -> None:
        self._command(f"DELETESCRIPT {quoted(name)}")

    def get(self, name: str) -> str:
        return self._command(f"GETSCRIPT {quoted(name)}")[0]

    def scripts(self) -> dict[str, bool]:
        """Each script's name, and whether it is the active one."""
        found = {}
        for line in self._command("LISTSCRIPTS"):
            match = re.match(r'"((?:[^"\\]|\\.)*)"( ACTIVE)?', line)
            assert match, line
            found[re.sub(r"\\(.)", r"\1", match.group(1))] = bool(match.group(2))
        return found

    def _command(self, text: str) -> list[str]:
        self._socket.sendall(text.encode() + b"\r\n")
        return self._answer()

    def _answer(self) -> list[str]:
        """The lines before OK; a literal counts as one line."""
        lines: list[str] = []
        while True:
            line = self._file.readline().decode()
            literal = re.match(r"\{(\d+)\+?\}\r\n$", line)
            if literal:
                lines.append(self._file.read(int(literal.group(1))).decode())
                self._file.readline()
            elif line.startswith("OK"):
                return lines
            elif not line or line.startswith(("NO", "BYE")):
                raise RefusedError(line)
            else:
                lines.append(line.rstrip("\r\n"))
