"""Two nodes under random work on both sides are equal soon after it ends."""

from __future__ import annotations

import os
import random
import time
from collections import Counter

import pytest

from tests.system.churn import Churn
from tests.system.clients import message, ok
from tests.system.mailstate import wait_until_equal
from tests.system.pair import Pair
from tests.system.syncs import syncs, wait_first_passes

USERS = 10
SECONDS = float(os.environ.get("CHURN_SECONDS", "15"))
RUNS = int(os.environ.get("CHURN_RUNS", "1"))
DEBUG = '[daemon]\nlog_level = "debug"\n'
# Within so many seconds of the end both nodes are equal.
EQUAL_WITHIN = 10.0


def _seed(run: int) -> int:
    """SEED repeats one run, printed by the one that failed."""
    return int(os.environ["SEED"]) + run if "SEED" in os.environ else random.randrange(1 << 32)


def _existing_users(pair: Pair) -> list[str]:
    """Users that exist on both nodes, with a folder."""
    users = pair.fresh_users(USERS)
    for user in users:
        pair.a.deliver(user, message("first"))
        with pair.a.imap(user) as imap:
            ok(imap.create("Start"))
    pair.a.start_daemon(DEBUG + pair.peer_table(pair.a))
    wait_until_equal(pair.a, pair.b, users, timeout=30)
    pair.b.start_daemon(DEBUG + pair.peer_table(pair.b))
    wait_first_passes(pair, users)
    return users


def _check(pair: Pair, users: list[str], seed: int, churn: Churn) -> None:
    began = time.monotonic()
    print(f"\n{pair.version} SEED={seed}: {dict(churn.done)}, refused {dict(churn.refused)}")
    try:
        wait_until_equal(pair.a, pair.b, users, timeout=EQUAL_WITHIN)
    except AssertionError as error:
        user = str(error).partition(" ")[0]
        story = [f"{node.name}: {line}" for node in pair for line in node.daemon_log() if user in line]
        print("\n".join([f"SEED={seed} failed", str(error), *story]))
        raise
    outcomes = Counter((sync.kind, sync.outcome) for node in pair for sync in syncs(node))
    print(f"equal after {time.monotonic() - began:.1f} s; syncs {dict(outcomes)}")
    assert sum(churn.done.values()) > 5 * SECONDS, "that was no work"


@pytest.mark.parametrize("run", range(RUNS))
def test_equal_after_random_work(pair: Pair, run: int) -> None:
    seed = _seed(run)
    users = _existing_users(pair)
    churn = Churn(pair, users, seed, common_names=pair.version == "2.4")
    churn.run(SECONDS)
    _check(pair, users, seed, churn)


@pytest.mark.parametrize("run", range(RUNS))
def test_equal_when_the_users_are_born_on_both_nodes(pair: Pair, run: int) -> None:
    if pair.version != "2.4":
        pytest.skip("2.3.19 can't merge mailboxes that were born on both nodes")
    seed = _seed(run)
    users = pair.fresh_users(USERS)
    pair.start_daemons(DEBUG)
    churn = Churn(pair, users, seed, common_names=True)
    churn.run(SECONDS)
    _check(pair, users, seed, churn)


@pytest.mark.parametrize("run", range(RUNS))
def test_equal_though_the_daemons_are_killed(pair: Pair, run: int) -> None:
    seed = _seed(run)
    users = _existing_users(pair)
    rng = random.Random(seed)
    churn = Churn(pair, users, seed, common_names=pair.version == "2.4")
    for _ in range(4):
        churn.run(SECONDS / 4)
        node = rng.choice([pair.a, pair.b])
        node.kill_daemon()
        churn.run(0.5)
        node.start_daemon(DEBUG + pair.peer_table(node))
    _check(pair, users, seed, churn)
