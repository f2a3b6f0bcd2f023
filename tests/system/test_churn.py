"""Two nodes under random work on both sides are equal soon after it ends."""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice

import pytest

from tests.system.chaos import KINDS, OVERFLOW, Chaos, plan
from tests.system.churn import Churn
from tests.system.clients import message, ok
from tests.system.hosts import Host
from tests.system.mailstate import snapshot, wait_until_equal
from tests.system.node import Node
from tests.system.pair import Pair
from tests.system.syncs import syncs, wait_first_passes
from tests.system.waiting import wait_until

USERS = 10
SECONDS = 15.0
RUNS = int(os.environ.get("CHURN_RUNS", "1"))
DEBUG = '[daemon]\nlog_level = "debug"\n'
# Seconds after the end in which both nodes become equal; how many it were is printed, 1 to 4 on a machine
# that does nothing else. A dsync that stalls in Dovecot holds its user up for as long as lock_timeout, 30 s.
EQUAL_WITHIN = 75.0
CHAOS_SECONDS = float(os.environ.get("CHAOS_SECONDS", "60"))
# After the last fault is lifted: a peer that was down is asked again after a minute at most.
EQUAL_AFTER_FAULTS = 150.0
_SYNC = re.compile(r"(?P<user>\S+) -> \S+: (?P<reason>[a-z ,]+): \w+ sync (?P<outcome>[a-z-]+) in ")


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


def test_a_seed_repeats_the_faults() -> None:
    first, again, other = (list(islice(plan(seed, "a"), 50)) for seed in (7, 7, 8))
    assert first == again != other
    assert {fault.kind for fault in first[: len(first) // 2]} == set(KINDS)


@pytest.mark.parametrize("run", range(RUNS))
def test_equal_and_nothing_lost_after_faults(hosts: Pair, run: int) -> None:
    seed = _seed(run)
    users = _existing_users(hosts)
    churn = Churn(hosts, users, seed, common_names=hosts.version == "2.4", keepers=users[::2])
    chaos = Chaos(hosts, churn, seed, DEBUG)
    print(f"\n{hosts.version} SEED={seed}: {CHAOS_SECONDS:g} s of faults")
    try:
        with chaos:
            churn.run(CHAOS_SECONDS)
        print(f"faults {dict(Counter(chaos.done))}; {dict(churn.done)}, refused {dict(churn.refused)}")
        _equal_and_complete(hosts, churn, chaos)
    except BaseException as error:
        user = str(error).partition(" ")[0]
        print(f"SEED={seed} failed: {error}\n" + "\n".join(_story(hosts, churn, chaos, user)))
        raise
    assert churn.done["deliver"] > CHAOS_SECONDS / 2, "that was no work"
    logged = [text for node in hosts for _, text in _host(node).daemon_journal(chaos.began)]
    assert any(OVERFLOW in text for text in logged)
    back = sum(" is back after " in text for text in logged)
    outcomes = Counter(found["outcome"] for found in map(_SYNC.search, logged) if found)
    print(f"peers came back {back} times; syncs {dict(outcomes)}")


def _equal_and_complete(pair: Pair, churn: Churn, chaos: Chaos) -> None:
    began = time.monotonic()
    wait_until_equal(pair.a, pair.b, churn.users, timeout=EQUAL_AFTER_FAULTS)
    print(f"equal {time.monotonic() - began:.1f} s after the last fault")
    for user in churn.keepers:
        assert churn.accepted[user], f"{user} got no mail"
        for node in pair:
            lost = churn.accepted[user] - _identities(node, user)
            assert not lost, f"{user} lost on {node.name} what LMTP accepted: {sorted(lost)}"
    for host, since in chaos.forgotten.items():
        _wait_passes(host, churn.users, since)
    print(f"all passes {time.monotonic() - began:.1f} s after the last fault")


def _wait_passes(host: Host, users: Sequence[str], since: float) -> None:
    """Until the first pass over each of ``users`` has succeeded after the database was deleted."""

    def passed() -> set[str]:
        found = [_SYNC.search(text) for _, text in host.daemon_journal(since)]
        ended = [one for one in found if one and one["outcome"] == "ok" and "new user" in one["reason"]]
        return {one["user"] for one in ended}

    wait_until(lambda: passed() >= set(users), EQUAL_AFTER_FAULTS, f"pass over all users on {host.name}")


def _identities(node: Node, user: str) -> set[str]:
    """The Message-IDs of all mails of a user."""
    mailboxes = snapshot(node, user).mailboxes.values()
    return {message.identity for mailbox in mailboxes for message in mailbox.messages.values()}


def _story(pair: Pair, churn: Churn, chaos: Chaos, user: str) -> list[str]:
    """The faults, what clients did and what the daemons logged about ``user``, in the order of time."""
    rows = [(at, f"{name}: *** {text}") for at, name, text in chaos.story]
    rows += [(at, text) for at, whose, text in churn.story if whose == user]
    for node in pair:
        for at, text in _host(node).daemon_journal(chaos.began):
            about_others = "@example.org" in text and user not in text
            if not about_others or text.startswith("peer "):
                rows.append((at, f"{node.name}: {text}"))
    lines = [f"{at - chaos.began:8.3f} {text}" for at, text in sorted(rows)]
    return lines + [
        f"{node.name}: {line}" for node in pair for line in node.dovecot_log() if _grave(line, user)
    ]


def _grave(line: str, user: str) -> bool:
    return "Panic" in line or (user in line and any(word in line for word in ("Error", "Warning")))


def _host(node: Node) -> Host:
    assert isinstance(node, Host)
    return node
