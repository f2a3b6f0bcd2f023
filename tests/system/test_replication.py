"""Each thing that a user can do, on either node: it is on the other, for the price of one sync."""

from __future__ import annotations

import imaplib
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Optional

from tests.system.clients import Imap, message, ok, quoted
from tests.system.mailstate import diff, snapshot, wait_until_equal
from tests.system.node import Node
from tests.system.pair import Pair
from tests.system.syncs import count, syncs, wait_first_passes, wait_quiet
from tests.system.waiting import wait_until

REST = 60.0  # seconds without a sync after the last change
SCRIPT = 'require "fileinto";\r\nfileinto "Work";\r\n'

Action = Callable[[Node, str], None]


class Row(NamedTuple):
    """``syncs`` is the most that both nodes together may start for it; a row that is only a look has 0.
    ``prepare`` runs long before ``act``. What snapshots don't show is read by ``look``."""

    name: str
    syncs: int
    act: Action
    look: Optional[Callable[[Node, str], object]] = None
    prepare: Optional[Action] = None


def _imap(work: Callable[[Imap], object], mailbox: str = "INBOX") -> Action:
    def act(node: Node, user: str) -> None:
        with node.imap(user) as imap:
            ok(imap.select(quoted(mailbox)))
            work(imap)

    return act


def _metadata(node: Node, user: str) -> object:
    with node.imap(user) as imap:
        return imap.getmetadata("Work", "/private/comment")


def _acl(node: Node, user: str) -> object:
    with node.imap(user) as imap:
        return sorted(ok(imap.getacl("Work")))


def _scripts(node: Node, user: str) -> object:
    with node.sieve(user) as sieve:
        return {name: (active, sieve.get(name)) for name, active in sieve.scripts().items()}


def _put(node: Node, user: str) -> None:
    with node.sieve(user) as sieve:
        sieve.put("main", SCRIPT)


def _activate(node: Node, user: str) -> None:
    with node.sieve(user) as sieve:
        sieve.activate("main")


def _delete_script(node: Node, user: str) -> None:
    with node.sieve(user) as sieve:
        sieve.delete("main")


def _pop3(node: Node, user: str) -> None:
    with node.pop3(user) as pop3:
        pop3.retr(1)
        pop3.dele(1)


def _idle(imap: Imap) -> None:
    tag = imap._new_tag()  # imaplib has no IDLE before 3.14
    imap.send(tag + b" IDLE\r\n")
    imap.readline()
    imap.send(b"DONE\r\n")
    while not imap.readline().startswith(tag):
        pass


def _expunge(imap: Imap) -> None:
    ok(imap.store("1", "+FLAGS", r"(\Deleted)"))
    ok(imap.expunge())


ROWS = (
    Row("LMTP delivery", 1, lambda node, user: node.deliver(user, message("delivered"))),
    Row("APPEND", 1, _imap(lambda i: ok(i.append("INBOX", "", "", message("appended"))))),
    Row(
        "APPEND with flags", 1, _imap(lambda i: ok(i.append("INBOX", r"(\Seen $L)", "", message("flagged"))))
    ),
    Row("COPY", 1, _imap(lambda i: ok(i.copy("1", "Work")))),
    Row("MOVE", 1, _imap(lambda i: ok(i.uid("MOVE", "1", "Work")))),
    Row("SELECT", 0, _imap(lambda i: ok(i.noop()))),
    Row("FETCH of headers", 0, _imap(lambda i: ok(i.fetch("1", "(FLAGS BODY.PEEK[HEADER])")))),
    Row("STATUS", 0, _imap(lambda i: ok(i.status("Work", "(MESSAGES UNSEEN)")))),
    Row("IDLE", 0, _imap(_idle)),
    Row("FETCH of the body", 1, _imap(lambda i: ok(i.fetch("1", "(BODY[])")))),
    Row("STORE of flags", 1, _imap(lambda i: ok(i.store("1", "+FLAGS", r"(\Flagged \Answered)")))),
    Row("STORE of a keyword", 1, _imap(lambda i: ok(i.store("1", "+FLAGS", "($Todo)")))),
    Row("removal of a keyword", 1, _imap(lambda i: ok(i.store("1", "-FLAGS", "($Old)")))),
    Row("EXPUNGE", 1, _imap(_expunge)),
    Row("POP3 RETR and DELE", 1, _pop3),
    Row("CREATE", 2, _imap(lambda i: ok(i.create("Fresh")))),
    Row("SUBSCRIBE", 2, _imap(lambda i: ok(i.subscribe("Work")))),
    Row("UNSUBSCRIBE", 2, _imap(lambda i: ok(i.unsubscribe("Read")))),
    Row("RENAME", 2, _imap(lambda i: ok(i.rename("Work", "Job")))),
    Row("RENAME with children", 2, _imap(lambda i: ok(i.rename("Tree", "Wood")))),
    Row("DELETE", 2, _imap(lambda i: ok(i.delete("Work")))),
    Row(
        "SETMETADATA",
        1,
        _imap(lambda i: i.setmetadata("Work", "/private/comment", "a note")),
        _metadata,
    ),
    Row("SETACL", 1, _imap(lambda i: ok(i.setacl("Work", "ann@example.org", "lr"))), _acl),
    Row("PUTSCRIPT", 1, _put, _scripts),
    Row("SETACTIVE", 1, _activate, _scripts, _put),
    Row("DELETESCRIPT", 1, _delete_script, _scripts, _put),
)


def _prepare(node: Node, user: str) -> None:
    """What every row starts from."""
    node.deliver(user, message("first"))
    with node.imap(user) as imap:
        for name in ("Work", "Read", "Tree", "Tree/Branch"):
            ok(imap.create(name))
        ok(imap.subscribe("Read"))
        ok(imap.append("Work", r"(\Seen)", "", message("in work")))
        ok(imap.select("INBOX"))
        ok(imap.store("1", "+FLAGS", "($Old)"))


def test_every_action_reaches_the_other_node(pair: Pair) -> None:
    users = pair.fresh_users(2 * len(ROWS))
    cases = [(row, node) for node in pair for row in ROWS]
    for (row, node), user in zip(cases, users):
        _prepare(node, user)
        if row.prepare:
            row.prepare(node, user)
    pair.start_daemons()
    wait_first_passes(pair, users)
    wait_quiet(pair, 2.0)
    for user in users:
        assert diff(snapshot(pair.a, user), snapshot(pair.b, user)) == ""
    wait_quiet(pair, 2.0)
    before = count(pair)

    took = {}
    for (row, node), user in zip(cases, users):
        other, old = pair.other(node), snapshot(node, user)
        began = time.monotonic()
        row.act(node, user)
        if row.syncs:
            arrived = partial(_same, row, node, other, user)
            wait_until(arrived, 10, f"{row.name} on {node.name} is on {other.name}")
            took[row, node.name] = time.monotonic() - began
            assert row.look or snapshot(node, user) != old, f"{row.name} changed nothing"

    wait_until_equal(pair.a, pair.b, users)
    wait_quiet(pair, REST, timeout=REST + 30)
    started = count(pair) - before
    print(f"\n{pair.version}: {'':25} seconds on a, b (acting and looking included)   syncs")
    wrong = []
    for row in ROWS:
        counts = [started[user] for (one, _), user in zip(cases, users) if one is row]
        times = [f"{took[row, name]:.3f}" for name in "ab" if (row, name) in took]
        print(f"{row.name:28} {' '.join(times):20} {counts}")
        least = 1 if row.syncs else 0
        if not all(least <= number <= row.syncs for number in counts):
            wrong.append(f"{row.name}: {counts} syncs, at most {row.syncs} wanted")
    assert not wrong, "\n".join([*wrong, *_story(pair, users)])


def _same(row: Row, node: Node, other: Node, user: str) -> bool:
    look = row.look or snapshot
    try:
        return look(node, user) == look(other, user)
    except imaplib.IMAP4.abort:
        # The mailbox was deleted while it was looked at.
        return False


def _story(pair: Pair, users: list[str]) -> list[str]:
    return [f"{node.name}: {sync}" for node in pair for sync in syncs(node) if sync.user in users]
