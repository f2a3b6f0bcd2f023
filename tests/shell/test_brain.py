"""The brain, a doveadm-server that is played, and a real queue on disk."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest

from dovesyncd.core import dsync_state, retry, schedule
from dovesyncd.core.health import stuck
from dovesyncd.core.model import ChangeKind, JobKey, OutcomeClass, PeerName, User
from dovesyncd.core.retry import Curve
from tests.shell.fake_doveadm_server import Answer, Request
from tests.shell.scene import (
    ANN,
    BOB,
    FLAGS,
    MAIL,
    STATE,
    UNREACHABLE,
    B,
    config,
    prepare,
    scene,
    stored,
    synced,
)
from tests.shell.waiting import settled, until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of waits is kept, their length is not."""
    monkeypatch.setattr(retry, "RETRY", {kind: Curve(0.01, 0.02) for kind in OutcomeClass})
    monkeypatch.setattr(schedule, "PROBE_FIRST", 0.05)
    monkeypatch.setattr(schedule, "PROBE_LAST", 0.1)


# Collecting -----------------------------------------------------------------------------------------


async def test_a_burst_is_one_sync(state: Path) -> None:
    await prepare(state, synced(ANN))
    async with scene(state) as it:
        for _ in range(100):
            it.brain.changed(ANN, FLAGS)
        await it.idle(1)
        (request,) = it.syncs
        assert (request.user, request.option("-s"), request.args[-1]) == ("ann", STATE, "tcp:b:12345")
        assert it.drained == [ANN, ANN], "right before the sync and right after it"
        # The loop is quiet.
        await settled(lambda: it.server.connections == 1, "no further connection")
    (job,) = (await stored(state)).values()
    assert (job.pending, job.last_outcome, job.state) == (False, OutcomeClass.OK, STATE)


async def test_changes_during_a_sync_are_one_more(state: Path) -> None:
    await prepare(state, synced(ANN))
    gate = asyncio.Event()
    async with scene(state, lambda request: Answer.ok(STATE).with_(after=gate)) as it:
        it.brain.changed(ANN, MAIL)
        await it.server.wait_for(lambda: len(it.syncs) == 1)
        for _ in range(20):
            it.brain.changed(ANN, MAIL)
        await settled(lambda: len(it.syncs) == 1, "one at a time")
        gate.set()
        await it.idle(2)


async def test_what_the_drain_finds_belongs_to_the_sync(state: Path) -> None:
    await prepare(state, synced(ANN))
    async with scene(state) as it:
        it.on_drain = lambda: it.brain.changed(ANN, FLAGS) if not it.syncs else None
        it.brain.changed(ANN, MAIL)
        await it.idle(1)


async def test_two_peers(state: Path) -> None:
    await prepare(state, synced(ANN, "b"), synced(ANN, "c", state="QUFBQUFBQUE="))

    def answer(request: Request) -> Answer:
        return Answer.ok("QkJCQkJCQkI=" if request.args[-1] == "tcp:b:12345" else "Q0NDQ0NDQ0M=")

    async with scene(state, answer, config("b", "c")) as it:
        it.brain.changed(ANN, MAIL)
        await it.idle(2)
        assert {(r.args[-1], r.option("-s")) for r in it.syncs} == {
            ("tcp:b:12345", STATE),
            ("tcp:c:12345", "QUFBQUFBQUE="),
        }
        assert it.server.most_open == 1, "never two of one user at once"
    jobs = await stored(state)
    assert {key.peer: job.state for key, job in jobs.items()} == {"b": "QkJCQkJCQkI=", "c": "Q0NDQ0NDQ0M="}


async def test_workers_limit_what_runs_at_once(state: Path) -> None:
    users = tuple(User(f"user{number}") for number in range(12))
    await prepare(state, *map(synced, users))
    gate = asyncio.Event()
    answer = lambda request: Answer.ok(STATE).with_(after=gate)  # noqa: E731
    async with scene(state, answer, config(workers=3), users) as it:
        for user in users:
            it.brain.changed(user, MAIL)
        await it.server.wait_for(lambda: len(it.syncs) == 3)
        await settled(lambda: len(it.syncs) == 3, "no fourth")
        gate.set()
        await it.idle(12)
        assert sorted(it.users()) == sorted(users)
        assert it.server.most_open <= 3


# Kinds of syncs -------------------------------------------------------------------------------------


async def test_a_new_user_begins_without_state(state: Path) -> None:
    async with scene(state) as it:
        await it.idle(1)
        assert it.syncs[0].option("-s") == ""
        assert "-f" not in it.syncs[0].args
        it.brain.changed(ANN, MAIL)
        await it.idle(2)
        assert it.syncs[1].option("-s") == STATE
        assert it.brain.follow([ANN]) == set()
        assert it.brain.follow([ANN, BOB]) == {BOB}
        await it.idle(3)
        assert (it.syncs[2].user, it.syncs[2].option("-s")) == ("bob", "")
    assert all(job.next_pass > time.time() for job in (await stored(state)).values())


async def test_a_failure_climbs_the_ladder(state: Path) -> None:
    await prepare(state, synced(ANN))
    answers = [Answer.failed("TEMPFAIL", "Error: it broke")] * 3 + [Answer.ok(STATE)]
    async with scene(state, lambda request: answers.pop(0)) as it:
        it.brain.changed(ANN, MAIL)
        await it.idle(4)
        assert [(r.option("-s"), "-f" in r.args) for r in it.syncs] == [
            (STATE, False),
            ("", False),
            ("", True),
            ("", False),
        ]
        for request in it.syncs:
            assert (request.option("-l"), request.option("-T")) == ("30", "300")
        it.brain.changed(ANN, MAIL)
        answers.append(Answer.ok(STATE))
        await it.idle(5)
        assert (it.syncs[4].option("-s"), "-f" in it.syncs[4].args) == (STATE, False)


async def test_the_next_sync_may_begin_before_the_end_of_the_last_was_noted(state: Path) -> None:
    """The loop runs the brain and a finished task's callbacks in any order."""
    gate = asyncio.Event()
    await prepare(state, synced(ANN))
    async with scene(state, lambda request: Answer.ok(STATE).with_(after=gate)) as it:
        it.brain.changed(ANN, MAIL)
        await it.server.wait_for(lambda: len(it.syncs) == 1)
        key = JobKey(ANN, B)
        running = it.brain._syncs[key]
        last = asyncio.ensure_future(asyncio.sleep(0))
        await last
        it.brain._ended(key, last, asyncio.get_running_loop().call_later(3600, print))
        assert it.brain._syncs[key] is running
        gate.set()
        await it.idle(1)


async def test_changed_is_repeated_at_once_three_times(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth would come after a pause."""
    monkeypatch.setattr(retry, "RETRY", {kind: Curve(3600, 3600) for kind in OutcomeClass})
    await prepare(state, synced(ANN))
    async with scene(state, lambda request: Answer.failed("CHANGED")) as it:
        it.brain.changed(ANN, MAIL)
        await until(lambda: len(it.syncs) == 4 and not it.brain.schedule.running, "four syncs")
        await settled(lambda: len(it.syncs) == 4, "no fifth")
        job = it.brain.jobs[JobKey(ANN, B)]
        assert job.pending
        assert job.due > time.time() + 1000
        assert job.last_outcome is OutcomeClass.CHANGED


async def test_background_pass(state: Path) -> None:
    await prepare(state, synced(ANN, next_pass=time.time() - 1), synced(BOB))
    async with scene(state, users=(ANN, BOB)) as it:
        await it.idle(1)
        assert (it.syncs[0].user, it.syncs[0].option("-s")) == ("ann", "")
        assert it.brain.jobs[JobKey(ANN, B)].next_pass > time.time() + 3600


async def test_an_empty_state_keeps_the_next_one_stateless(state: Path) -> None:
    await prepare(state, synced(ANN))
    async with scene(state, lambda request: Answer.ok("")) as it:
        it.brain.changed(ANN, MAIL)
        await it.idle(1)
        it.brain.changed(ANN, MAIL)
        await it.idle(2)
        assert [request.option("-s") for request in it.syncs] == [STATE, ""]


# Peers that are down --------------------------------------------------------------------------------


async def test_a_peer_that_is_down_is_one_fact(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    users = tuple(User(f"user{number}") for number in range(50))
    await prepare(state, *map(synced, users))
    down = True
    reached: list[str] = []

    def answer(request: Request) -> Answer:
        if down:
            return Answer.failed("TEMPFAIL", UNREACHABLE)
        reached.append(request.user)
        return Answer.ok(STATE)

    async with scene(state, answer, config(workers=3), users) as it:
        for user in users:
            it.brain.changed(user, MAIL)
        # The first three, which ran already, and then one at a time.
        await it.server.wait_for(lambda: len(it.syncs) == 6)
        assert it.brain.schedule.peers[B].down_since is not None
        assert it.server.open <= 1
        assert all(job.attempts == 0 and job.state == STATE for job in it.brain.jobs.values())
        down = False
        await until(
            lambda: not it.brain.schedule.running and not any(job.pending for job in it.brain.jobs.values()),
            "everyone is synced",
        )
        assert sorted(reached) == sorted(users), "exactly once"
    assert caplog.text.count("can't be used, its users wait") == 1
    assert caplog.text.count("peer b is back") == 1


async def test_one_peer_down_does_not_stop_another(state: Path) -> None:
    await prepare(state, synced(ANN, "b"), synced(ANN, "c"))

    def answer(request: Request) -> Answer:
        ok = request.args[-1] == "tcp:c:12345"
        return Answer.ok(STATE) if ok else Answer.failed("TEMPFAIL", UNREACHABLE)

    async with scene(state, answer, config("b", "c"), grace=0) as it:
        for _ in range(2):
            it.brain.changed(ANN, FLAGS)
            await until(lambda: not it.brain.jobs[JobKey(ANN, PeerName("c"))].pending, "synced with c")
        assert it.brain.jobs[JobKey(ANN, B)].pending


# Stopping -------------------------------------------------------------------------------------------


async def test_a_stop_leaves_what_hangs_on_disk(state: Path) -> None:
    await prepare(state, synced(ANN), synced(BOB))
    async with scene(state, lambda request: Answer.hanging(), users=(ANN, BOB), grace=0.01) as it:
        it.brain.changed(ANN, MAIL)
        await it.server.wait_for(lambda: len(it.syncs) == 1)
        it.brain.changed(ANN, FLAGS)
    jobs = await stored(state)
    ann = jobs[JobKey(ANN, B)]
    assert ann.reasons == (ChangeKind.NEW_MAIL, ChangeKind.FLAGS)
    assert ann.pending
    assert not jobs[JobKey(BOB, B)].pending
    async with scene(state, users=(ANN, BOB)) as it:
        await it.idle(1)
        assert it.users() == ["ann"]


async def test_a_stop_waits_for_what_ends(state: Path) -> None:
    await prepare(state, synced(ANN))
    gate = asyncio.Event()
    async with scene(state, lambda request: Answer.ok("QkJCQkJCQkI=").with_(after=gate)) as it:
        it.brain.changed(ANN, MAIL)
        await it.server.wait_for(lambda: len(it.syncs) == 1)
        asyncio.get_running_loop().call_soon(gate.set)
        await it.brain.stop(5)
        it.brain.changed(ANN, MAIL)
        await settled(lambda: len(it.syncs) == 1, "nothing starts after a stop")
    (job,) = (await stored(state)).values()
    assert (job.state, job.pending) == ("QkJCQkJCQkI=", True)


async def test_a_killed_daemon_continues(state: Path) -> None:
    """Right before and during a sync the queue on disk says that it is to be done."""
    await prepare(state, synced(ANN), synced(BOB))
    async with scene(state, lambda request: Answer.hanging(), users=(ANN, BOB), grace=0) as it:
        it.brain.changed(ANN, MAIL)
        await it.server.wait_for(lambda: len(it.syncs) == 1)
        # What a kill would leave is what another connection sees.
        other = sqlite3.connect(it.store.path)
        pending = "SELECT user FROM job WHERE first_change IS NOT NULL"
        await until(lambda: other.execute(pending).fetchall() == [(b"ann",)], "ann's job is on disk")
        assert it.brain.schedule.running
        other.close()


# Users ----------------------------------------------------------------------------------------------


async def test_who_leaves_keeps_his_jobs(state: Path) -> None:
    await prepare(state, synced(ANN), synced(BOB))
    async with scene(state, users=(ANN, BOB)) as it:
        it.brain.follow([BOB])
        it.brain.changed(ANN, MAIL)
        it.brain.changed(User("stranger"), MAIL)
        it.brain.changed(BOB, MAIL)
        await until(lambda: it.users() == ["bob"], "bob's")
        await settled(lambda: it.users() == ["bob"], "not ann's")
        it.brain.follow([ANN, BOB])
        await it.idle(2)
        assert it.users() == ["bob", "ann"]
        assert it.syncs[1].option("-s") == STATE


async def test_after_a_gap_in_a_log_everything_is_compared(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index may have been rebuilt: dsync would take low modseqs for changes that both sides have."""
    monkeypatch.setattr(retry, "CONFIRM_AFTER", 0.05)
    await prepare(state, synced(ANN))
    async with scene(state) as it:
        it.brain.changed(ANN, {ChangeKind.LOG_GAP})
        await it.idle(2)
        assert [request.option("-s") for request in it.syncs] == [STATE, dsync_state.EMPTY]


async def test_the_clock_is_set_back(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was to be tried again in a minute is not tried again in a year and a minute."""
    await prepare(state, synced(ANN))
    broken = True
    now = time.time
    async with scene(
        state, lambda request: Answer.failed("TEMPFAIL", "Error: x") if broken else Answer.ok(STATE)
    ) as it:
        monkeypatch.setattr(retry, "RETRY", {kind: Curve(60, 60) for kind in OutcomeClass})
        it.brain.changed(ANN, MAIL)
        await until(lambda: it.brain.jobs[JobKey(ANN, B)].attempts == 1, "a failure")
        broken = False
        monkeypatch.setattr(time, "time", lambda: now() - 365 * 86400)
        it.brain.changed(ANN, FLAGS)
        await until(lambda: "The clock was set back" in caplog.text, "the message")
        assert it.brain.jobs[JobKey(ANN, B)].due < time.time() + 100
        monkeypatch.setattr(time, "time", lambda: now() - 365 * 86400 + 100)
        it.brain.changed(ANN, FLAGS)
        await until(lambda: not it.brain.jobs[JobKey(ANN, B)].pending, "synced")


async def test_who_is_unknown_to_dovecot_is_reported_and_kept(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await prepare(state, synced(ANN), synced(BOB))
    async with scene(state, users=(ANN, BOB)) as it:
        it.brain.follow([ANN], left_out=[BOB])
        assert it.brain.orphans == set()
        for _ in range(2):
            it.brain.follow([ANN])
            assert it.brain.orphans == {BOB}
        assert caplog.text.count("no longer knows 1 users who were replicated: 'bob'; ") == 1
        it.brain.follow([ANN, BOB])
        assert it.brain.orphans == set()
    # After a restart too.
    async with scene(state, users=(ANN,)) as it:
        assert it.brain.orphans == {BOB}
    assert {key.user for key in await stored(state)} == {ANN, BOB}


async def test_names_that_are_no_text(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = User("bad\udcff\nname")
    caplog.set_level("INFO")
    async with scene(state, users=(name,)) as it:
        seen: set[str] = set()
        it.on_drain = lambda: seen.update(task.get_name() for task in asyncio.all_tasks())
        await it.idle(1)
        assert it.users() == [name]
        # Log records carry the name of their task (3.12), and the journal takes text only.
        assert all(task.isascii() and task.isprintable() for task in seen)
    (record,) = (record for record in caplog.records if hasattr(record, "DOVESYNC_USER"))
    assert record.DOVESYNC_USER == b"bad\xff\nname"
    assert record.DOVESYNC_OUTCOME == "ok"
    assert set(await stored(state)) == {JobKey(name, B)}


async def test_no_doveadm_at_all(state: Path) -> None:
    await prepare(state, synced(ANN))
    async with scene(state, grace=0) as it:
        await it.server.stop()
        it.brain.changed(ANN, MAIL)
        await until(lambda: it.brain.jobs[JobKey(ANN, B)].last_outcome is not None, "an outcome")
        job = it.brain.jobs[JobKey(ANN, B)]
        assert job.pending
        assert "/nonexistent/doveadm" in job.last_error
        await it.server.start()
        await it.idle(1)


async def test_work_is_not_stuck_by_a_long_rest(state: Path) -> None:
    """Between the wake-up after an hour and the first turn of the loop, the watchdog may look."""
    await prepare(state, synced(ANN))
    async with scene(state) as it:
        await until(lambda: it.brain.work.since is None, "at rest")
        it.brain._woken_at -= 3600
        it.brain.changed(ANN, MAIL)
        assert it.brain.work.since is not None
        assert stuck([it.brain.work], time.monotonic()) == []
        await it.idle(1)


async def test_an_error_of_the_program_ends_the_brain(state: Path) -> None:
    await prepare(state, synced(ANN))
    async with scene(state) as it:

        def broken() -> None:
            raise LookupError("a bug")

        it.on_drain = broken
        it.brain.changed(ANN, MAIL)
        assert it.task is not None
        task = it.task
        await until(task.done, "the end")
        with pytest.raises(LookupError, match="a bug"):
            task.result()
