"""Which sync starts next."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from dovesyncd.core.model import ChangeKind, Job, JobKey, OutcomeClass, PeerName, Priority, User
from dovesyncd.core.schedule import (
    PROBE_FIRST,
    PROBE_LAST,
    SLOW_AFTER,
    Action,
    Duty,
    GiveWay,
    Schedule,
    SleepUntil,
    Start,
)

DOWN = OutcomeClass.PEER_DOWN
B, C = PeerName("b"), PeerName("c")
FAR = 10.0**9


def key(user: str, peer: PeerName = B) -> JobKey:
    return JobKey(User(user), peer)


def job(
    user: str,
    due: float = 0,
    priority: Priority = Priority.LOW,
    first: float = 0,
    peer: PeerName = B,
) -> Job:
    return Job(key(user, peer), priority, (ChangeKind.FLAGS,), first, due, next_pass=FAR)


def idle(user: str, next_pass: float) -> Job:
    return Job(key(user), next_pass=next_pass)


def schedule_of(*jobs: Job, **workers: int) -> Schedule:
    schedule = Schedule({PeerName(name): count for name, count in (workers or {"b": 10}).items()}, 0)
    for one in jobs:
        schedule.put(one)
    return schedule


def started(schedule: Schedule, now: float) -> list[JobKey]:
    """Starts whatever may start, as the brain does; returns it in order."""
    order = []
    while True:
        action = schedule.next_action(now)
        if not isinstance(action, Start):
            return order
        order.append(action.key)
        schedule.started(action.key, now)
        schedule.remove(action.key)


@pytest.mark.parametrize(
    ("jobs", "now", "action"),
    [
        ([], 5, SleepUntil(None)),
        ([job("u", due=5)], 5, Start(key("u"))),
        ([job("u", due=5)], 4, SleepUntil(5)),
        ([job("u", due=9), job("v", due=7)], 4, SleepUntil(7)),
        ([idle("u", 50)], 4, SleepUntil(50)),
        ([idle("u", 50)], 50, Duty(key("u"))),
        ([idle("u", 50), job("v", due=9)], 4, SleepUntil(9)),
    ],
)
def test_next_action(jobs: list[Job], now: float, action: Action) -> None:
    assert schedule_of(*jobs).next_action(now) == action


@pytest.mark.parametrize(
    ("jobs", "order"),
    [
        ([job("low"), job("high", priority=Priority.HIGH)], ["high", "low"]),
        ([job("young", first=20), job("old", first=10)], ["old", "young"]),
        # The boost is worth a quarter of an hour: after that the older one is first.
        ([job("low", first=0), job("high", priority=Priority.HIGH, first=899)], ["high", "low"]),
        ([job("low", first=0), job("high", priority=Priority.HIGH, first=901)], ["low", "high"]),
        (
            [job(p.name, priority=p) for p in Priority],
            ["SYNC", "HIGH", "LOW", "NONE"],
        ),
    ],
)
def test_order(jobs: list[Job], order: list[str]) -> None:
    assert [k.user for k in started(schedule_of(*jobs), 1000)] == order


def test_no_more_than_the_workers() -> None:
    schedule = schedule_of(*(job(f"u{n}") for n in range(5)), b=2)
    assert len(started(schedule, 1)) == 2
    schedule.ended(next(iter(schedule.running.values())))
    assert len(started(schedule, 1)) == 1


def test_one_sync_of_a_user_whatever_the_peer() -> None:
    schedule = schedule_of(job("u"), job("u", peer=C), b=2, c=2)
    (first,) = started(schedule, 1)
    schedule.ended(first)
    (second,) = started(schedule, 1)
    assert {first.peer, second.peer} == {B, C}


def test_a_change_while_the_user_is_synced_waits_for_the_end() -> None:
    schedule = schedule_of(job("u"))
    assert started(schedule, 1) == [key("u")]
    schedule.put(job("u", due=2))
    assert schedule.next_action(3) == SleepUntil(None)
    schedule.ended(key("u"))
    assert started(schedule, 3) == [key("u")]


def test_a_job_put_again_counts_once_and_as_it_is_now() -> None:
    schedule = schedule_of(job("u", due=1), job("u", due=9), job("u", due=5))
    assert schedule.next_action(4) == SleepUntil(5)
    assert started(schedule, 5) == [key("u")]
    assert started(schedule, 100) == []


def test_a_removed_job_is_gone() -> None:
    schedule = schedule_of(job("u", due=1))
    assert isinstance(schedule.next_action(2), Start)
    schedule.remove(key("u"))
    assert schedule.next_action(2) == SleepUntil(None)


def test_a_job_of_an_unknown_peer_is_not_scheduled() -> None:
    assert schedule_of(job("u", peer=C)).next_action(2) == SleepUntil(None)


def test_a_peer_that_is_down_is_probed_now_and_then() -> None:
    schedule = schedule_of(*(job(f"u{n}") for n in range(5)))
    running = started(schedule, 100)
    assert schedule.peer_failed(B, running[0], DOWN, 100)
    for one in running:
        assert not schedule.peer_failed(B, one, DOWN, 100)
        schedule.ended(one)
        schedule.put(job(one.user))
    now = 100 + PROBE_FIRST
    assert schedule.next_action(100) == SleepUntil(now)
    assert len(started(schedule, now)) == 1
    # A probe that takes its time does not keep others from finding out that the peer is back.
    assert schedule.next_action(now) == SleepUntil(now + 2 * PROBE_FIRST)
    assert len(started(schedule, now + 2 * PROBE_FIRST)) == 1


def test_probes_pause_longer_up_to_the_last() -> None:
    schedule = schedule_of(job("u"))
    now, pauses = 0.0, []
    schedule.peer_failed(B, key("v"), DOWN, now)
    for _ in range(10):
        sleep = schedule.next_action(now)
        assert isinstance(sleep, SleepUntil)
        assert sleep.time is not None
        pauses.append(sleep.time - now)
        now = sleep.time
        assert started(schedule, now) == [key("u")]
        schedule.ended(key("u"))
        schedule.put(job("u"))
        schedule.peer_failed(B, key("u"), DOWN, now)
    assert pauses[:3] == [PROBE_FIRST, PROBE_FIRST * 2, PROBE_FIRST * 4]
    assert pauses[-1] == PROBE_LAST


def test_the_user_over_whom_the_peer_failed_is_not_its_only_probe() -> None:
    schedule = schedule_of(job("bad", first=1), job("good", first=50))
    schedule.peer_failed(B, key("bad"), DOWN, 100)
    assert started(schedule, 100 + PROBE_FIRST) == [key("good")]
    # Where there is no other, it is.
    schedule = schedule_of(job("bad"))
    schedule.peer_failed(B, key("bad"), DOWN, 100)
    assert started(schedule, 100 + PROBE_FIRST) == [key("bad")]


def test_a_clock_that_is_set_back_does_not_stop_the_probes() -> None:
    schedule = schedule_of(job("u"))
    schedule.peer_failed(B, key("v"), DOWN, 1_000_000)
    sleep = schedule.next_action(1000)
    assert sleep == SleepUntil(1000 + PROBE_LAST)


def test_the_older_change_goes_first_whatever_its_peer() -> None:
    schedule = schedule_of(job("u", first=50), job("v", first=10, peer=C), b=1, c=1)
    assert started(schedule, 100) == [key("v", C), key("u")]


def test_a_busy_user_reaches_both_peers() -> None:
    """He changes something during each sync, so he is due for the first peer whenever one ends."""
    schedule = schedule_of(job("u"), job("u", peer=C), b=1, c=1)
    peers = []
    for now in range(1, 21):
        (running,) = started(schedule, now)
        peers.append(running.peer)
        schedule.put(job("u", due=now, first=now, peer=running.peer))
        schedule.ended(running)
        schedule.put(job("u", due=now, first=now, peer=running.peer))
    assert peers.count(B) == peers.count(C) == 10


def test_what_no_longer_counts_does_not_pile_up() -> None:
    schedule = schedule_of(*(job(f"u{n}") for n in range(100)))
    schedule.peer_failed(B, key("x"), DOWN, 0)
    for n in range(20_000):
        schedule.put(job(f"u{n % 100}", due=0))
        schedule.next_action(0)
        schedule.put(idle(f"v{n % 100}", FAR))
    assert len(schedule._waiting) < 3000
    assert len(schedule.peers[B].ready) < 3000


def test_after_the_peer_is_back_all_flow_again() -> None:
    schedule = schedule_of(*(job(f"u{n}") for n in range(3)))
    schedule.peer_failed(B, key("x"), DOWN, 50)
    assert schedule.peer_answered(B, 99) == 50
    assert schedule.peer_answered(B, 99) is None
    assert len(started(schedule, 50)) == 3


def test_one_peer_down_does_not_stop_the_other() -> None:
    schedule = schedule_of(job("u"), job("v", peer=C), b=1, c=1)
    schedule.peer_failed(B, key("x"), DOWN, 1)
    assert started(schedule, 1) == [key("v", C)]


def test_nothing_is_lost_whatever_happens() -> None:
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print(f"SEED={seed}")
    rng = random.Random(seed)
    schedule = schedule_of(b=3, c=2)
    pending: set[JobKey] = set()
    running: set[JobKey] = set()
    now = 0.0
    for _ in range(3000):
        now += rng.random()
        what = rng.randrange(4)
        one = key(f"u{rng.randrange(12)}", rng.choice((B, C)))
        if what == 0:
            schedule.put(
                job(one.user, due=now + rng.random(), peer=one.peer, priority=rng.choice(list(Priority)))
            )
            pending.add(one)
        elif what == 1 and running:
            ended = rng.choice(sorted(running))
            running.discard(ended)
            schedule.ended(ended)
        else:
            for start in started(schedule, now):
                assert start in pending
                pending.discard(start)
                running.add(start)
        assert len({k.user for k in running}) == len(running)
        assert sum(k.peer == B for k in running) <= 3
    while running or pending:
        now += 10
        for start in started(schedule, now):
            pending.remove(start)
            running.add(start)
        assert running, f"{pending} never start"
        for ended in sorted(running):
            schedule.ended(ended)
        running.clear()


def slow(user: str, due: float = 0) -> Job:
    return replace(job(user, due), last_outcome=OutcomeClass.TIMEOUT, last_seconds=SLOW_AFTER)


@pytest.mark.parametrize(
    ("workers", "known_slow", "others", "begun"),
    [
        (4, 8, 0, 2),
        (4, 8, 8, 4),
        (5, 8, 0, 2),
        (2, 3, 3, 2),
        # With one slot, half of it is all of it: nobody is locked out for ever.
        (1, 3, 0, 1),
    ],
)
def test_known_slow_users_have_half_of_the_slots(
    workers: int, known_slow: int, others: int, begun: int
) -> None:
    jobs = [slow(f"s{n}") for n in range(known_slow)] + [job(f"u{n}", first=1) for n in range(others)]
    schedule = schedule_of(*jobs, b=workers)
    running = started(schedule, 5)
    assert len(running) == begun
    assert sum(one.user.startswith("s") for one in running) == max(1, workers // 2)


def test_a_success_and_a_quick_failure_end_it() -> None:
    schedule = schedule_of(
        replace(slow("a"), last_outcome=OutcomeClass.OK),
        replace(slow("b"), last_seconds=SLOW_AFTER - 1),
        replace(slow("c"), last_outcome=OutcomeClass.OTHER),
        slow("d"),
        b=2,
    )
    assert {one.user for one in started(schedule, 5)} == {"a", "b"}


def test_syncs_that_become_slow_give_way_beyond_half_of_the_slots() -> None:
    schedule = schedule_of(*(job(f"h{n}", first=n) for n in range(4)), b=4)
    for now in range(4):
        action = schedule.next_action(now)
        assert action == Start(key(f"h{now}"))
        schedule.started(key(f"h{now}"), now)
        schedule.remove(key(f"h{now}"))
    # Nobody waits: they may take as long as they need.
    assert schedule.next_action(100) == SleepUntil(None)
    schedule.put(job("u", due=5))
    # The third of them is one too many as soon as it is slow.
    assert schedule.next_action(5) == SleepUntil(2 + SLOW_AFTER)
    assert schedule.next_action(2 + SLOW_AFTER) == GiveWay(key("h2"))
    assert schedule.next_action(100) == GiveWay(key("h3"))
    schedule.gives_way(key("h3"))
    # One at a time.
    assert schedule.next_action(100) == SleepUntil(None)
    schedule.ended(key("h3"))
    schedule.put(slow("h3", due=101))
    assert schedule.next_action(100) == Start(key("u"))


def test_nobody_gives_way_while_the_peer_may_be_to_blame() -> None:
    schedule = schedule_of(*(job(f"h{n}") for n in range(4)), b=4)
    assert len(started(schedule, 0)) == 4
    schedule.put(job("u", due=5))
    schedule.peers[B].doubted = True
    assert schedule.next_action(100) == SleepUntil(None)
    schedule.peers[B].doubted = False
    assert isinstance(schedule.next_action(100), GiveWay)


def test_slow_users_who_wait_make_nobody_give_way() -> None:
    schedule = schedule_of(*(job(f"h{n}") for n in range(4)), b=4)
    assert len(started(schedule, 0)) == 4
    schedule.put(slow("s"))
    assert schedule.next_action(100) == SleepUntil(None)


def test_known_slow_ones_keep_their_slots() -> None:
    schedule = schedule_of(slow("s0"), slow("s1"), job("h0"), job("h1"), b=4)
    assert len(started(schedule, 0)) == 4
    schedule.put(job("u", due=1))
    assert schedule.next_action(SLOW_AFTER) in (GiveWay(key("h0")), GiveWay(key("h1")))


def test_after_an_outage_the_order_is_that_of_priority() -> None:
    """However long some have waited: nobody could have been served before."""
    old, young = job("old", first=0), job("mail", priority=Priority.HIGH, first=3600)
    schedule = schedule_of(old, young, b=1)
    schedule.peer_failed(B, key("x"), DOWN, 1)
    assert schedule.next_action(5000) == Start(key("old"))
    schedule.peer_answered(B, 5000)
    assert schedule.next_action(5000) == Start(key("mail"))
    schedule.put(job("late", first=5000))
    schedule.put(job("mail", priority=Priority.HIGH, first=5901, due=5901))
    # From then on the old ones grow older.
    assert [one.user for one in started(schedule_of(*schedule.jobs.values(), b=10), 6000)][:2] == [
        "old",
        "late",
    ]
