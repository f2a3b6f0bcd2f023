"""The syncs that the daemons ran, read from their logs."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from tests.system.node import Node
from tests.system.pair import Pair
from tests.system.waiting import wait_until

_LINE = re.compile(
    r"(?:[A-Z]+: )?(?P<user>\S+) -> (?P<peer>\S+): (?P<reason>[a-z ,]+): "
    r"(?P<kind>stateful|stateless|full) sync (?P<outcome>[a-z-]+) in (?P<seconds>[0-9.]+) s"
)


class Sync(NamedTuple):
    user: str
    peer: str
    reason: str
    kind: str
    outcome: str
    seconds: float


def syncs(node: Node) -> list[Sync]:
    """Every sync that ``node``'s daemon logged since it was last started."""
    found = (_LINE.match(line) for line in node.daemon_log())
    return [Sync(*match.groups()[:-1], float(match["seconds"])) for match in found if match]


def count(pair: Pair) -> Counter[str]:
    """How many syncs both daemons logged, by user."""
    return Counter(sync.user for node in pair for sync in syncs(node))


def wait_first_passes(pair: Pair, users: Iterable[str], timeout: float = 60.0) -> None:
    """Until every user's first pass has succeeded on both nodes, and its confirmation: both databases have to
    be new."""
    wanted = set(users)

    def compared(node: Node) -> set[str]:
        good = (sync for sync in syncs(node) if sync.outcome == "ok")
        return {sync.user for sync in good if "confirmation" in sync.reason or sync.kind == "full"}

    for node in pair:
        wait_until(
            lambda node=node: wanted <= compared(node),  # type: ignore[misc]
            timeout,
            f"a first pass of all users on {node.name}",
        )


def wait_quiet(pair: Pair, seconds: float, timeout: float = 60.0) -> None:
    """Until neither daemon has logged a sync for ``seconds``."""
    last, since = sum(count(pair).values()), time.monotonic()

    def quiet() -> bool:
        nonlocal last, since
        now = sum(count(pair).values())
        if now != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since >= seconds

    wait_until(quiet, timeout, f"no sync for {seconds:g} s")
