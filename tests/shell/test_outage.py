"""Hours and days without the peer, and users who hang: what it costs, and what comes after."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from dovesyncd.core import schedule
from dovesyncd.core.model import ChangeKind, JobKey, OutcomeClass, User
from tests.shell.fake_doveadm_server import Answer, Request
from tests.shell.leap import leaping
from tests.shell.scene import FLAGS, MAIL, STATE, UNREACHABLE, B, Scene, config, prepare, scene, synced
from tests.shell.waiting import until

HOUR = 3600.0


class Peer:
    """Is down at first. ``attempts`` counts who asked in vain, ``order`` is who was synced then."""

    def __init__(self) -> None:
        self.down = True
        self.attempts = 0
        self.order: list[str] = []

    def answer(self, request: Request) -> Answer:
        if self.down:
            self.attempts += 1
            return Answer.failed("TEMPFAIL", UNREACHABLE)
        self.order.append(request.user)
        return Answer.ok(STATE)


def pending(it: Scene) -> int:
    return sum(job.pending for job in it.brain.jobs.values()) + len(it.brain.schedule.running)


def test_an_hour_with_ten_thousand_changed_users(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print(f"SEED={seed}")
    rng = random.Random(seed)
    users = tuple(User(f"user{number}@example.org") for number in range(10_000))
    mails = set(rng.sample(users, 2_000))
    peer = Peer()

    async def change(it: Scene, some: list[User], seconds: float) -> None:
        """The users change in the course of so many seconds."""
        for start in range(0, len(some), 50):
            for user in some[start : start + 50]:
                it.brain.changed(user, MAIL if user in mails else FLAGS)
            await asyncio.sleep(seconds * 50 / len(some))

    async def outage() -> None:
        await prepare(state, *map(synced, users))
        some = list(users)
        rng.shuffle(some)
        half = len(some) // 2
        async with scene(state, peer.answer, config(), users) as it:
            began = time.time()
            await change(it, some[:half], HOUR / 2)
        # The daemon is restarted in the middle of it.
        async with scene(state, peer.answer, config(), users) as it:
            await change(it, some[half:], HOUR / 2)
            assert time.time() - began >= HOUR
            assert pending(it) == len(users)
            peer.down = False
            await until(lambda: not pending(it), "everyone is synced", seconds=HOUR, pause=1)

    leaping(outage(), monkeypatch)
    assert set(Counter(peer.order).values()) == {1}
    assert len(peer.order) == len(users)
    assert peer.attempts < 100
    first = peer.order[: len(mails) // 2]
    assert sum(user in mails for user in first) > 0.9 * len(first), "new mail first"


@pytest.mark.parametrize(("minutes", "state_used"), [(3, True), (6, False)])
def test_after_a_long_outage_no_state_is_used(
    state: Path, monkeypatch: pytest.MonkeyPatch, minutes: int, state_used: bool
) -> None:
    """The peer may have been restored or emptied meanwhile, also for users who did not change."""
    users = (User("ann"), User("bob"))
    peer = Peer()

    async def outage() -> None:
        later = time.time() + 365 * 24 * HOUR
        await prepare(state, *(synced(user, next_pass=later) for user in users))
        async with scene(state, peer.answer, config(), users) as it:
            it.brain.changed(users[0], MAIL)
            await asyncio.sleep(minutes * 60)
            assert it.brain.schedule.peers[B].down_since is not None
            peer.down = False
            await until(lambda: not pending(it), "synced", seconds=HOUR, pause=1)
            it.brain.changed(users[1], MAIL)
            await until(lambda: not pending(it), "synced", seconds=HOUR, pause=1)
            last = {request.user: request.option("-s") for request in it.syncs}
            assert last == dict.fromkeys(users, STATE if state_used else "")

    leaping(outage(), monkeypatch)
    assert peer.order == list(users)


def test_a_state_older_than_the_logs_is_not_used(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after days in which the daemon was stopped."""

    async def late() -> None:
        long_ago = time.time() - 2 * 24 * HOUR
        user = User("ann")
        await prepare(state, synced(user, next_pass=time.time() + HOUR, last_success=long_ago))
        async with scene(state, users=(user,)) as it:
            it.brain.changed(user, MAIL)
            await until(lambda: not pending(it), "synced", seconds=HOUR, pause=1)
            assert [request.option("-s") for request in it.syncs] == [""]

    leaping(late(), monkeypatch)


def test_a_silent_peer_is_a_peer_that_is_down(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Every sync hangs, but only those that were begun before it was noticed are begun at all."""
    users = tuple(User(f"user{number}") for number in range(20))
    silent = True

    def answer(request: Request) -> Answer:
        return Answer.hanging() if silent else Answer.ok(STATE)

    async def hush() -> None:
        nonlocal silent
        await prepare(state, *map(synced, users))
        async with scene(state, answer, config(workers=4), users) as it:
            it.problem = "b:12345: no greeting within 10 s"
            for user in users:
                it.brain.changed(user, MAIL)
            await asyncio.sleep(HOUR)
            assert len(it.syncs) == 4
            assert it.server.open == 0, "nothing waits for it"
            assert pending(it) == len(users)
            assert all(job.attempts == 0 for job in it.brain.jobs.values())
            silent, it.problem = False, ""
            await until(lambda: not pending(it), "everyone is synced", seconds=HOUR, pause=1)
            assert sorted(it.users()[4:]) == sorted(users)

    leaping(hush(), monkeypatch)
    text = caplog.text
    assert text.count("peer b can't be used, its users wait: b:12345: no greeting within 10 s") == 1
    assert text.count("peer b is back after") == 1


def test_slow_syncs_with_a_peer_that_greets_go_on(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = User("ann")

    async def slow() -> None:
        gate = asyncio.Event()
        await prepare(state, synced(user))
        answer = Answer.ok(STATE).with_(after=gate)
        async with scene(state, lambda request: answer, config(), (user,)) as it:
            it.brain.changed(user, MAIL)
            await asyncio.sleep(600)
            gate.set()
            await until(lambda: not pending(it), "synced", pause=1)
            assert len(it.syncs) == 1

    leaping(slow(), monkeypatch)


def test_users_who_hang_leave_the_others_alone(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight of them with four slots: first they take all, then half."""
    hanging = [User(f"hanging{number}") for number in range(8)]
    others = [User(f"user{number}") for number in range(100)]

    def answer(request: Request) -> Answer:
        return Answer.hanging() if request.user in hanging else Answer.ok(STATE)

    async def hang() -> None:
        users = (*hanging, *others)
        await prepare(state, *map(synced, users))
        async with scene(state, answer, config(workers=4), users, grace=0) as it:
            began = time.monotonic()
            for user in hanging:
                it.brain.changed(user, MAIL)
            await until(lambda: len(it.brain.schedule.running) == 4, "every slot hangs")
            for user in others:
                it.brain.changed(user, MAIL)
            await until(
                lambda: it.users().count("user99") == 1, "the last of the others", seconds=1000, pause=0.1
            )
            # The first two slots that became free are enough: no more than half hang from now on.
            assert time.monotonic() - began < 10 * schedule.SLOW_AFTER
            assert all(job.attempts == 0 for job in it.brain.jobs.values())
            # They go on hanging, in all slots while nobody waits, and in their half then.
            for turn in range(3):
                await asyncio.sleep(20 * 60)
                for user in others:
                    it.brain.changed(user, FLAGS)
                await until(
                    lambda: sum(name.startswith("user") for name in it.users()) == (turn + 2) * len(others),  # noqa: B023
                    "the others",
                    seconds=5,
                )
            gave_way = [
                job
                for job in it.brain.jobs.values()
                if job.last_outcome is OutcomeClass.TIMEOUT and job.pending and job.key.user in hanging
            ]
            assert gave_way, "their changes wait for their turn"
            assert not any(job.pending for job in it.brain.jobs.values() if job.key.user in others)

    leaping(hang(), monkeypatch)


def test_a_loop_is_slowed_down_and_reported(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Something that takes every sync for a user's change."""
    user = User("ann")

    async def loop() -> None:
        await prepare(state, synced(user))
        async with scene(state, users=(user,)) as it:
            began = time.time()
            count = 0
            while time.time() < began + HOUR:
                it.brain.changed(user, {ChangeKind.ATTRIBUTE})
                await until(lambda: not pending(it), "a sync", seconds=HOUR, pause=1)
                count += 1
            assert len(it.syncs) == count
            # Twenty, and then no more than one a minute.
            assert count < 20 + 6 + 60 + 2
            # Who is quiet for a while is a user like others.
            await asyncio.sleep(2 * HOUR)
            it.brain.changed(user, MAIL)
            await until(lambda: not pending(it), "a sync", seconds=200, pause=0.1)
            assert it.brain.jobs[JobKey(user, B)].empty_syncs == 0

    leaping(loop(), monkeypatch)
    said = [record.getMessage() for record in caplog.records if "slowed down" in record.getMessage()]
    assert len(said) == 1
    assert "ann: 20 syncs in a row for attribute changed nothing" in said[0]
