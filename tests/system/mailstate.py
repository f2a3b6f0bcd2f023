"""What a user has on a node, in a form in which two nodes can be compared."""

from __future__ import annotations

import hashlib
import imaplib
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from tests.system.clients import Imap, ok, quoted
from tests.system.node import Node


class Message(NamedTuple):
    """``flags`` are sorted system flags and keywords without \\Recent; ``identity`` is the Message-ID,
    or a hash of the whole header where there is none."""

    flags: tuple[str, ...]
    identity: str


@dataclass(frozen=True)
class Mailbox:
    guid: str
    uidvalidity: int
    messages: dict[int, Message]


@dataclass(frozen=True)
class Snapshot:
    """``mailboxes`` by name and ``subscriptions``, both with names as they stand on the wire (mUTF-7)."""

    mailboxes: dict[str, Mailbox]
    subscriptions: frozenset[str]


EMPTY = Snapshot({}, frozenset())


def snapshot(node: Node, user: str) -> Snapshot:
    """Everything of one user, read over IMAP without changing it (EXAMINE, BODY.PEEK).

    A user without an INBOX on disk is EMPTY: to look at it over IMAP would create the INBOX, with
    a GUID of its own.
    """
    if not node.has_inbox(user):
        return EMPTY
    with node.imap(user) as imap:
        names = sorted(listed(imap, "LIST"))
        mailboxes = {}
        for name in names:
            mailbox = _mailbox(imap, name)
            if mailbox:
                mailboxes[name] = mailbox
        return Snapshot(mailboxes, frozenset(listed(imap, "LSUB")))


def diff(a: Snapshot, b: Snapshot) -> str:
    """One line a difference, "" when there is none."""
    return "\n".join(_differences(a, b))


def wait_until_equal(a: Node, b: Node, users: Iterable[str], timeout: float = 10.0) -> None:
    """Until all ``users`` are the same on both nodes; AssertionError with the differences otherwise."""
    deadline = time.monotonic() + timeout
    for user in users:
        while True:
            try:
                found = diff(snapshot(a, user), snapshot(b, user))
            except imaplib.IMAP4.error as error:
                # A mailbox went away under the session that looked at it.
                found = str(error)
            if not found:
                break
            assert time.monotonic() < deadline, f"{user} differs after {timeout:g} s:\n{found}"
            time.sleep(0.05)


def _differences(a: Snapshot, b: Snapshot) -> Iterator[str]:
    for name in sorted(a.mailboxes.keys() | b.mailboxes.keys()):
        left, right = a.mailboxes.get(name), b.mailboxes.get(name)
        if left is None or right is None:
            yield f"{name}: only on {'b' if left is None else 'a'}"
            continue
        for field in ("guid", "uidvalidity"):
            if getattr(left, field) != getattr(right, field):
                yield f"{name}: {field} {getattr(left, field)} on a, {getattr(right, field)} on b"
        for uid in sorted(left.messages.keys() | right.messages.keys()):
            one, other = left.messages.get(uid), right.messages.get(uid)
            if one != other:
                yield f"{name}: uid {uid}: {_described(one)} on a, {_described(other)} on b"
    for name in sorted(a.subscriptions ^ b.subscriptions):
        yield f"{name}: subscribed only on {'a' if name in a.subscriptions else 'b'}"


def _described(message: object) -> str:
    if not isinstance(message, Message):
        return "nothing"
    return f"{message.identity} ({' '.join(message.flags)})"


def listed(imap: Imap, command: str) -> Iterator[str]:
    """The selectable mailboxes (``command`` LIST) or the subscriptions (LSUB)."""
    method = imap.list if command == "LIST" else imap.lsub
    for row in ok(method('""', "*")):
        if row is None:
            continue
        head, literal = row if isinstance(row, tuple) else (row, None)
        match = re.match(rb"\(([^)]*)\) (?:NIL|\"(?:[^\"\\]|\\.)*\") (.*)$", head, re.DOTALL)
        assert match, row
        if command == "LIST" and re.search(rb"\\(?:noselect|nonexistent)", match.group(1), re.IGNORECASE):
            continue
        yield (literal if literal is not None else _unquoted(match.group(2))).decode(
            "utf-8", "surrogateescape"
        )


def _unquoted(atom: bytes) -> bytes:
    if atom.startswith(b'"'):
        return re.sub(rb"\\(.)", rb"\1", atom[1:-1])
    return atom


def _mailbox(imap: Imap, name: str) -> Mailbox | None:
    """None when the mailbox vanished since it was listed."""
    status, _ = imap.select(quoted(name), readonly=True)
    if status != "OK":
        return None
    uidvalidity = int(imap.response("UIDVALIDITY")[1][0])
    status, guid = imap.status(quoted(name), "(X-GUID)")
    if status != "OK":
        return None
    found = re.search(rb"X-GUID ([0-9a-f]+)", _joined(guid[0]))
    assert found, guid
    return Mailbox(found.group(1).decode(), uidvalidity, _messages(imap))


def _joined(part: Any) -> bytes:
    return b"".join(part) if isinstance(part, tuple) else part


def _messages(imap: Imap) -> dict[int, Message]:
    rows = ok(imap.uid("FETCH", "1:*", "(FLAGS BODY.PEEK[HEADER.FIELDS (MESSAGE-ID)])"))
    messages = {}
    for row in rows:
        # The closing parenthesis of a row with a literal comes as a row of its own.
        if not isinstance(row, tuple):
            continue
        uid_found = re.search(rb"UID (\d+)", row[0])
        flags_found = re.search(rb"FLAGS \(([^)]*)\)", row[0])
        assert uid_found, row
        assert flags_found, row
        uid = int(uid_found.group(1))
        flags = sorted(flag for flag in flags_found.group(1).decode().split() if flag != "\\Recent")
        identity = row[1].partition(b":")[2].strip().decode("utf-8", "replace")
        messages[uid] = Message(tuple(flags), identity or _header_hash(imap, uid))
    return messages


def _header_hash(imap: Imap, uid: int) -> str:
    rows = ok(imap.uid("FETCH", str(uid), "(BODY.PEEK[HEADER])"))
    header = next((row[1] for row in rows if isinstance(row, tuple)), b"")
    return hashlib.sha256(header).hexdigest()
