"""The main job, on real servers: two Dovecots and two daemons on loopback, and what happens on one of
them is on the other. Run by ``make demo``; everything it starts ends with it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.system.clients import message, ok
from tests.system.mailstate import snapshot, wait_until_equal
from tests.system.node import Node
from tests.system.pair import pair
from tests.system.syncs import syncs, wait_first_passes
from tests.system.waiting import wait_until

USER = "ann@example.org"


class Step(NamedTuple):
    what: str
    act: Callable[[Node], None]


def _deliver(node: Node) -> None:
    node.deliver(USER, message(f"delivered on {node.name}"))


def _read(node: Node) -> None:
    with node.imap(USER) as imap:
        ok(imap.select("INBOX"))
        ok(imap.fetch("1:*", "(BODY[])"))


def _flag(node: Node) -> None:
    with node.imap(USER) as imap:
        ok(imap.select("INBOX"))
        ok(imap.store("1", "+FLAGS", r"(\Flagged $Todo)"))


def _create(node: Node) -> None:
    with node.imap(USER) as imap:
        ok(imap.create(f"From-{node.name}"))
        ok(imap.subscribe(f"From-{node.name}"))


def _move(node: Node) -> None:
    with node.imap(USER) as imap:
        ok(imap.select("INBOX"))
        ok(imap.uid("MOVE", "1:*", f"From-{node.name}"))


def _rename(node: Node) -> None:
    with node.imap(USER) as imap:
        ok(imap.rename(f"From-{node.name}", f"Archive-{node.name}"))


def _expunge(node: Node) -> None:
    with node.imap(USER) as imap:
        ok(imap.select(f"Archive-{node.name}"))
        ok(imap.store("1", "+FLAGS", r"(\Deleted)"))
        ok(imap.expunge())


def _delete(node: Node) -> None:
    with node.imap(USER) as imap:
        ok(imap.unsubscribe(f"Archive-{node.name}"))
        ok(imap.delete(f"Archive-{node.name}"))


STEPS = (
    Step("mail is delivered (LMTP)", _deliver),
    Step("mail is read (IMAP)", _read),
    Step("mail is flagged, and gets a keyword", _flag),
    Step("a folder is created and subscribed", _create),
    Step("mail is moved into it", _move),
    Step("the folder is renamed", _rename),
    Step("mail is expunged", _expunge),
    Step("the folder is deleted", _delete),
)


def main() -> int:
    print("starting two Dovecot servers, a and b, on 127.0.0.1, and a dovesyncd beside each")
    with pair("loopback") as nodes:
        for node in nodes:
            node.users([USER])
        _deliver(nodes.a)
        nodes.start_daemons()
        wait_first_passes(nodes, [USER])
        wait_until_equal(nodes.a, nodes.b, [USER], timeout=30)
        print(f"Dovecot {nodes.a.version}; the first pass is done, both have the same mail\n")
        for node in nodes:
            other = nodes.other(node)
            for step in STEPS:
                # Dovecot keeps the times of folder changes in whole seconds: of two in one second it may
                # keep the wrong one, whoever replicates.
                second = int(time.time())
                wait_until(lambda: int(time.time()) > second + 1, 5, "the next second")  # noqa: B023
                print(f"on {node.name}: {step.what:38}", end="", flush=True)
                before = snapshot(node, USER)
                step.act(node)
                began = time.monotonic()
                wait_until_equal(nodes.a, nodes.b, [USER])
                print(f"on {other.name} after {time.monotonic() - began:.3f} s")
                assert snapshot(other, USER) != before, "nothing has changed"
            print()
        for node in nodes:
            for sync in syncs(node):
                how = f"{sync.kind} sync, {sync.outcome}, {sync.seconds} s"
                print(f"dovesyncd on {node.name}: {sync.reason}: {how}")
    print("\nall the same on both; everything is stopped and removed again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
