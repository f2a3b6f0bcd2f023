"""How long new mail takes to reach the peer while other users' syncs hang in three of four slots.

usage: python -m tests.bench.hanging [2.3|2.4] [DELIVERIES]
"""

from __future__ import annotations

import fcntl
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.system.clients import message
from tests.system.mailstate import wait_until_equal
from tests.system.node import Node
from tests.system.pair import Pair, pair
from tests.system.syncs import wait_first_passes, wait_quiet
from tests.system.waiting import wait_until

WORKERS, HANGING = 4, 3


def inbox_size(node: Node, user: str) -> int:
    directory = node.maildir(user)
    return sum(
        len(list((directory / part).iterdir())) for part in ("new", "cur") if (directory / part).is_dir()
    )


def latencies(nodes: Pair, users: Sequence[str], deliveries: int) -> list[float]:
    """Seconds from LMTP's answer on a until the mail is in the maildir on b, one mail after the other."""
    found = []
    for number in range(deliveries):
        user = users[number % len(users)]
        before = inbox_size(nodes.b, user)
        nodes.a.deliver(user, message(f"mail {number}"))
        began = time.monotonic()
        while inbox_size(nodes.b, user) == before:
            if time.monotonic() > began + 60:
                raise AssertionError(f"{user}: not within a minute")
            time.sleep(0.001)
        found.append(time.monotonic() - began)
        # Beyond the settle time, so that each is the first mail of an idle user.
        time.sleep(0.05)
    return found


def locked(home: Path) -> int:
    """Holds the lock that keeps other dsyncs of a user out: DSYNC_LOCK_FILENAME, dsync-brain.c."""
    fd = os.open(home / ".dovecot-sync.lock", os.O_RDWR | os.O_CREAT, 0o600)
    owner = home.stat()
    os.fchown(fd, owner.st_uid, owner.st_gid)
    fcntl.lockf(fd, fcntl.LOCK_EX)
    return fd


def told(name: str, seconds: Sequence[float]) -> None:
    ordered = sorted(seconds)
    print(
        f"{name:28} median {statistics.median(ordered) * 1000:6.0f} ms   "
        f"95 % {ordered[int(len(ordered) * 0.95)] * 1000:6.0f} ms   "
        f"worst {ordered[-1] * 1000:6.0f} ms   ({len(ordered)} mails)",
        flush=True,
    )


def main(version: str, deliveries: int) -> None:
    with pair(version) as nodes:
        everyone = nodes.fresh_users(20 + HANGING)
        users, hanging = everyone[HANGING:], everyone[:HANGING]
        for user in everyone:
            nodes.a.deliver(user, message("first"))
        nodes.a.start_daemon(nodes.peer_table(nodes.a) + f"workers = {WORKERS}\n")
        wait_until_equal(nodes.a, nodes.b, everyone, timeout=60)
        nodes.b.start_daemon(nodes.peer_table(nodes.b) + f"workers = {WORKERS}\n")
        wait_first_passes(nodes, everyone)
        wait_quiet(nodes, 3.0)
        told("nobody hangs", latencies(nodes, users, deliveries))
        # dsync of these users waits for the lock that is held here, as behind a dsync that hangs.
        locks = [locked(nodes.a.home(user)) for user in hanging]
        waiting = {user: inbox_size(nodes.b, user) for user in hanging}
        for user in hanging:
            nodes.a.deliver(user, message("waits"))
        time.sleep(2)
        assert not any(user in line for user in hanging for line in nodes.a.daemon_log()[-HANGING:]), "failed"
        assert all(inbox_size(nodes.b, user) == size for user, size in waiting.items()), "they do not hang"
        told("three of four slots hang", latencies(nodes, users, deliveries))
        assert all(inbox_size(nodes.b, user) == size for user, size in waiting.items()), "they did not hang"
        for lock in locks:
            os.close(lock)
        wait_until(
            lambda: all(inbox_size(nodes.b, user) > size for user, size in waiting.items()), 90, "their mail"
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "2.3", int(sys.argv[2]) if len(sys.argv) > 2 else 60)
