"""When a change's sync is due."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dovesyncd.core import debounce
from dovesyncd.core.model import ChangeKind, Job, JobKey, PeerName, Priority, Timings, User

KEY = JobKey(User("u@example.org"), PeerName("b"))
TIMINGS = Timings(settle=1, settle_low=3, longest_wait=10)
MAIL, FLAGS, DELETE = ChangeKind.NEW_MAIL, ChangeKind.FLAGS, ChangeKind.DELETE


def merged(job: Job, *kinds: ChangeKind, now: float, idle: bool = True) -> Job:
    return debounce.merge(job, kinds, now, TIMINGS, idle)


@pytest.mark.parametrize(
    ("kinds", "idle", "due"),
    [
        ([MAIL], True, 100),
        ([MAIL, FLAGS], True, 100),
        ([MAIL], False, 101),
        ([DELETE], True, 101),
        ([FLAGS], True, 103),
        ([FLAGS], False, 103),
        ([ChangeKind.CREATE, ChangeKind.SUBSCRIBE], True, 103),
        ([FLAGS, DELETE], True, 101),
    ],
)
def test_first_change(kinds: list[ChangeKind], idle: bool, due: float) -> None:
    job = merged(Job(KEY), *kinds, now=100, idle=idle)
    assert (job.first_change, job.due) == (100, due)
    assert job.pending


@pytest.mark.parametrize(
    ("changes", "due"),
    [
        # Each change waits for what may follow.
        ([(100, FLAGS), (102, FLAGS)], 105),
        # But not for ever.
        ([(100, FLAGS), (102, FLAGS), (104.5, FLAGS), (107, FLAGS), (109, FLAGS)], 110),
        # New mail of an idle user does not wait for the flags that came before it.
        ([(100, FLAGS), (101, MAIL)], 101),
        # Flags that follow new mail which is due wait for nothing.
        ([(100, MAIL), (100.5, FLAGS)], 100),
        # A deletion shortens the wait.
        ([(100, FLAGS), (101, DELETE)], 102),
    ],
)
def test_what_follows(changes: list[tuple[float, ChangeKind]], due: float) -> None:
    job = Job(KEY)
    for now, kind in changes:
        job = merged(job, kind, now=now)
    assert job.due == due


def test_priority_only_rises_and_reasons_stay() -> None:
    job = merged(merged(merged(Job(KEY), FLAGS, now=1), DELETE, now=2), FLAGS, now=3)
    assert job.priority is Priority.HIGH
    assert job.reasons == (FLAGS, DELETE)


def test_a_waiting_retry_keeps_its_time() -> None:
    job = merged(Job(KEY), FLAGS, now=1)
    job = merged(replace(job, attempts=2, due=500), MAIL, now=10)
    assert (job.due, job.priority, job.first_change) == (500, Priority.HIGH, 1)


def test_join_puts_the_undone_in_front() -> None:
    undone = merged(Job(KEY), MAIL, now=1)
    job = debounce.join(merged(Job(KEY), FLAGS, MAIL, now=5), undone)
    assert (job.reasons, job.first_change, job.priority) == ((MAIL, FLAGS), 1, Priority.HIGH)


def test_join_with_nothing_undone() -> None:
    job = merged(Job(KEY), FLAGS, now=5)
    assert debounce.join(job, Job(KEY)) == job


def test_clear() -> None:
    job = debounce.clear(replace(merged(Job(KEY), MAIL, now=1), state="s", attempts=3))
    assert job == Job(KEY, state="s", attempts=3)
    assert not job.pending
