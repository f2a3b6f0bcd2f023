"""What follows from an outcome."""

from __future__ import annotations

from dataclasses import replace
from typing import Optional

import pytest

from dovesyncd.core import debounce, dsync_state, retry, schedule
from dovesyncd.core.model import (
    DUTIES,
    PEER_OUTCOMES,
    ChangeKind,
    Job,
    JobKey,
    Outcome,
    OutcomeClass,
    PeerName,
    SyncKind,
    Timings,
    User,
)

KEY = JobKey(User("u@example.org"), PeerName("b"))
DAY = 86400.0
S1, S2, S3 = (
    dsync_state.render({b"A" * 16: b"A" * 43 + bytes([n]), b"B" * 16: b"B" * 44}) for n in (1, 2, 3)
)
STATEFUL, STATELESS, FULL = SyncKind.STATEFUL, SyncKind.STATELESS, SyncKind.FULL
PENDING = debounce.merge(
    Job(KEY, state="old", next_pass=5000.0), {ChangeKind.FLAGS}, 100, Timings(0, 0, 0), idle=True
)
STARTED = debounce.clear(PENDING)


def after(
    kind: OutcomeClass,
    sync: SyncKind = STATEFUL,
    job: Job = STARTED,
    state: str = "",
    wants_full: bool = False,
) -> Job:
    return retry.after(job, PENDING, sync, Outcome(kind, "text", state, wants_full), 0.1, 200.0, 0.0, DAY)


@pytest.mark.parametrize(
    ("job", "kind"),
    [
        (Job(KEY), STATELESS),
        (Job(KEY, state="s"), STATEFUL),
        (Job(KEY, state="s", reasons=(ChangeKind.FLAGS, ChangeKind.BACKGROUND)), STATELESS),
        (Job(KEY, state="s", reasons=(ChangeKind.NEW_USER,)), STATELESS),
        (Job(KEY, attempts=1), STATELESS),
        (Job(KEY, attempts=2), FULL),
        (Job(KEY, attempts=3), STATELESS),
        (Job(KEY, attempts=4), STATELESS),
        (Job(KEY, attempts=5), FULL),
        (Job(KEY, attempts=5, last_outcome=OutcomeClass.OTHER), FULL),
        (Job(KEY, attempts=5, last_outcome=OutcomeClass.CRASH), FULL),
        *((Job(KEY, attempts=5, last_outcome=kind), STATELESS) for kind in PEER_OUTCOMES),
        (Job(KEY, attempts=5, last_outcome=OutcomeClass.TIMEOUT), STATELESS),
        (Job(KEY, attempts=5, last_outcome=OutcomeClass.NOUSER_REMOTE), STATELESS),
        (Job(KEY, attempts=5, last_outcome=OutcomeClass.QUOTA), STATELESS),
        (Job(KEY, attempts=50), FULL),
        (Job(KEY, state="s", wants_full=True), FULL),
    ],
)
def test_kind(job: Job, kind: SyncKind) -> None:
    assert retry.kind_of(job) is kind


def test_success_keeps_the_new_state() -> None:
    job = after(OutcomeClass.OK, state="new", job=replace(STARTED, attempts=4, repeats=2))
    assert (job.pending, job.state, job.attempts, job.repeats) == (False, "new", 0, 0)
    assert (job.last_success, job.last_pass, job.next_pass) == (200, None, 5000)


@pytest.mark.parametrize("kind", [STATELESS, FULL])
def test_a_comparison_of_everything_is_a_pass(kind: SyncKind) -> None:
    job = after(OutcomeClass.OK, kind, state="new")
    assert job.last_pass == 200
    assert 200 + DAY / 2 <= job.next_pass < 200 + DAY * 3 / 2


def arriving(job: Job) -> Job:
    """With a change that came while the sync ran."""
    return debounce.merge(debounce.clear(job), {ChangeKind.NEW_MAIL}, 150, Timings(1, 1, 1), idle=False)


def test_a_change_under_a_sync_is_confirmed_from_the_state_before() -> None:
    """However many contested syncs there were, and as soon as it has been quiet for a while."""
    job = Job(KEY, state=S1)
    for state in (S2, S3):
        job = after(OutcomeClass.OK, job=retry.contested(arriving(job), 200), state=state)
    assert (job.base_state, job.state) == (S1, S3)
    assert (job.contested_since, job.confirm_at) == (200, 200 + retry.CONFIRM_AFTER)
    assert not retry.confirmation_due(job, job.confirm_at - 0.1)
    assert retry.confirmation_due(job, job.confirm_at)
    confirming = replace(job, reasons=(ChangeKind.CONFIRMATION,))
    assert retry.kind_of(confirming) is STATEFUL
    assert retry.state_for(confirming) == dsync_state.common(S1, S3)
    assert retry.state_for(job) == S3
    begun = retry.begun(confirming, STATEFUL, 299)
    good = Outcome(OutcomeClass.OK, "", S2)
    done = retry.after(begun, confirming, STATEFUL, good, 0.1, 300.0, 0.0, DAY)
    assert (done.contested_since, done.confirm_at, done.base_state) == (None, None, "")
    # A contest during the confirmation is the next one.
    done = retry.after(retry.contested(begun, 299.5), confirming, STATEFUL, good, 0.1, 300.0, 0.0, DAY)
    assert (done.contested_since, done.base_state, done.state) == (299.5, S3, S2)


@pytest.mark.parametrize("outcome", [OutcomeClass.BUSY, OutcomeClass.PEER_DOWN, OutcomeClass.OTHER])
def test_a_confirmation_that_failed_is_still_due(outcome: OutcomeClass) -> None:
    confirming = replace(retry.contested(PENDING, 100), reasons=(ChangeKind.CONFIRMATION,))
    begun = retry.begun(confirming, STATEFUL, 200)
    job = retry.after(begun, confirming, STATEFUL, Outcome(outcome, "text"), 0.1, 200.0, 0.0, DAY)
    assert ChangeKind.CONFIRMATION in job.reasons
    assert job.base_state == "old"
    assert job.confirm_at is not None


def test_a_failed_sync_is_a_contest() -> None:
    job = after(OutcomeClass.OTHER)
    assert (job.state, job.base_state, job.contested_since) == ("", "old", 200)


def test_a_contest_that_does_not_end_is_confirmed_all_the_same() -> None:
    job, now = PENDING, 100.0
    while now < 200:
        job = retry.contested(job, now)
        now += 1
    assert job.confirm_at == 100 + retry.CONFIRM_WITHIN


def test_without_an_older_state_everything_is_compared() -> None:
    job = after(OutcomeClass.OK, STATELESS, job=retry.contested(arriving(Job(KEY)), 200), state=S1)
    confirming = replace(job, reasons=(ChangeKind.CONFIRMATION,))
    assert retry.state_for(confirming) == dsync_state.EMPTY


def test_what_arrived_meanwhile_stays_pending() -> None:
    job = after(OutcomeClass.OK, job=arriving(STARTED), state="new")
    assert (job.pending, job.first_change, job.due, job.reasons) == (
        True,
        150,
        151,
        (ChangeKind.NEW_MAIL,),
    )


@pytest.mark.parametrize("outcome", [kind for kind in OutcomeClass if kind is not OutcomeClass.OK])
def test_any_other_outcome_keeps_the_change_pending(outcome: OutcomeClass) -> None:
    job = after(outcome)
    assert job.pending
    assert job.first_change == PENDING.first_change
    assert job.due >= 200
    assert (job.last_outcome, job.last_error) == (outcome, "text")


@pytest.mark.parametrize(
    "outcome",
    sorted(
        set(OutcomeClass) - {OutcomeClass.OK, OutcomeClass.BUSY, OutcomeClass.CHANGED} - PEER_OUTCOMES,
        key=lambda o: o.value,
    ),
)
def test_failures_drop_the_state(outcome: OutcomeClass) -> None:
    assert after(outcome).state == ""


@pytest.mark.parametrize("outcome", [OutcomeClass.BUSY, OutcomeClass.PEER_DOWN, OutcomeClass.AUTH])
def test_what_says_nothing_about_the_user_costs_no_attempt(outcome: OutcomeClass) -> None:
    job = after(outcome)
    assert (job.attempts, job.state) == (0, "old")


def test_a_peer_that_fails_over_one_user_hears_less_and_less_of_him() -> None:
    job, delays = STARTED, []
    for _ in range(6):
        job = after(OutcomeClass.PEER_DOWN, job=debounce.clear(job))
        delays.append(job.due - 200)
    assert delays == [3, 6, 12, 24, 48, 60]
    assert after(OutcomeClass.OK, job=debounce.clear(job), state="s").repeats == 0


def test_times_that_no_rule_sets() -> None:
    """Set while the clock was a year ahead."""
    far = 1e9
    job = retry.plausible(replace(PENDING, due=far, next_pass=far, confirm_at=far), 1000, DAY)
    assert (job.due, job.next_pass, job.confirm_at) == (1000 + 4500, 1000 + 1.5 * DAY, 1000 + 30)
    assert retry.plausible(PENDING, 100, DAY) == PENDING


def test_changed_is_repeated_at_once_three_times() -> None:
    job, dues = STARTED, []
    for _ in range(4):
        job = after(OutcomeClass.CHANGED, job=debounce.clear(job))
        dues.append((job.due, job.repeats, job.attempts))
    assert dues == [(200, 1, 0), (200, 2, 0), (200, 3, 0), (201, 0, 1)]


def test_changed_is_repeated_from_the_same_state() -> None:
    job = after(OutcomeClass.CHANGED)
    assert (job.state, retry.kind_of(job)) == ("old", STATEFUL)


@pytest.mark.parametrize(
    ("job", "suspect"),
    [
        (Job(KEY), False),
        (Job(KEY, last_outcome=OutcomeClass.CHANGED, repeats=1), False),
        (Job(KEY, last_outcome=OutcomeClass.CHANGED, repeats=2), True),
        (Job(KEY, last_outcome=OutcomeClass.CHANGED, attempts=1), True),
        (Job(KEY, last_outcome=OutcomeClass.OTHER, attempts=1), False),
    ],
)
def test_persistent_change_may_be_two_guids(job: Job, suspect: bool) -> None:
    assert retry.may_be_guids(job) is suspect


def test_the_ladder() -> None:
    job, seen = PENDING, []
    for _ in range(6):
        kind = retry.kind_of(job)
        job = after(OutcomeClass.OTHER, kind, job=debounce.clear(job))
        seen.append((kind, job.due - 200))
    assert seen == [(STATEFUL, 0.5), (STATELESS, 1), (FULL, 2), (STATELESS, 4), (STATELESS, 8), (FULL, 16)]


def test_a_full_sync_that_dovecot_asks_for() -> None:
    job = after(OutcomeClass.OTHER, STATEFUL, wants_full=True)
    assert (job.due, retry.kind_of(job)) == (200, STATELESS)
    job = after(OutcomeClass.OTHER, STATELESS, job=debounce.clear(job), wants_full=True)
    assert (job.due > 200, retry.kind_of(job)) == (True, FULL)


def test_every_failure_has_a_curve() -> None:
    assert set(retry.RETRY) == set(OutcomeClass) - {OutcomeClass.OK}


@pytest.mark.parametrize("outcome", list(retry.RETRY))
def test_curves_grow_to_their_cap(outcome: OutcomeClass) -> None:
    curve = retry.RETRY[outcome]
    delays = [curve.delay(attempts, 0) for attempts in range(1, 40)]
    assert delays == sorted(delays)
    assert (delays[0], delays[-1]) == (curve.first, curve.cap)
    assert curve.delay(1, 1) == curve.first * 1.25


def test_passes_lie_evenly_in_the_interval() -> None:
    now = 1_000_000.0
    keys = [JobKey(User(f"user{n}@example.org"), PeerName("b")) for n in range(10_000)]
    passes = [retry.next_pass(key, now, DAY) for key in keys]
    assert all(now + DAY / 2 <= time < now + DAY * 3 / 2 for time in passes)
    hours = [0] * 24
    for time in passes:
        hours[int(time % DAY // 3600)] += 1
    assert min(hours) > 10_000 / 24 * 0.8
    assert max(hours) < 10_000 / 24 * 1.2
    # A pass that came late keeps its user's place.
    key = keys[0]
    assert (retry.next_pass(key, passes[0] + 77, DAY) - passes[0]) % DAY == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("age", "destination", "kept"),
    [
        (retry.STATE_KEEPS, "tcp:b", True),
        (retry.STATE_KEEPS + 1, "tcp:b", False),
        (0.0, "tcp:c", False),
        (None, "tcp:b", True),
    ],
)
def test_a_state_has_its_time_and_its_peer(age: Optional[float], destination: str, kept: bool) -> None:
    now = 1e6
    last_success = None if age is None else now - age
    job = Job(KEY, state="s", base_state="b", destination="tcp:b", last_success=last_success)
    now_job = retry.without_old_state(job, now, destination)
    assert (now_job.state, now_job.base_state) == (("s", "b") if kept else ("", ""))
    assert now_job.destination == destination


def test_who_gives_way_has_not_failed() -> None:
    job = retry.called_off(STARTED, PENDING, Outcome(OutcomeClass.TIMEOUT, "slow"), 12.0, 200.0)
    assert (job.attempts, job.pending, job.first_change) == (0, True, 100)
    assert (job.state, job.due) == ("", 200 + retry.CALLED_OFF_PAUSE)
    assert (job.last_outcome, job.last_seconds) == (OutcomeClass.TIMEOUT, 12)
    assert job.confirm_at is not None, "it may have come halfway"
    assert schedule.is_slow(job)


def synced(job: Job, now: float, state: str, *kinds: ChangeKind, kind: SyncKind = STATEFUL) -> Job:
    """The job after one more sync for ``kinds`` that left ``state``."""
    pending = debounce.merge(job, kinds, now, Timings(0, 0, 0), idle=True)
    begun = retry.begun(pending, kind, now)
    return retry.after(begun, pending, kind, Outcome(OutcomeClass.OK, "", state), 0.1, now, 0.0, DAY)


def test_syncs_that_change_nothing_are_counted() -> None:
    job = Job(KEY, state=S1, last_success=0.0)
    for number in range(3):
        job = synced(job, 1.0 + number, S1, ChangeKind.FLAGS)
        assert job.empty_syncs == number + 1
    assert synced(job, 5, S2, ChangeKind.FLAGS).empty_syncs == 0
    assert synced(job, 5, "", ChangeKind.FLAGS).empty_syncs == 0
    assert synced(job, 5 + retry.EMPTY_WITHIN, S1, ChangeKind.FLAGS).empty_syncs == 0
    # What the daemon does by itself does not count either way.
    for duty in DUTIES:
        assert synced(job, 5, S1, duty).empty_syncs == 3
    assert synced(job, 5, S1, ChangeKind.FLAGS, kind=STATELESS).empty_syncs == 3


def test_who_is_in_doubt_is_compared_mail_by_mail() -> None:
    job = retry.in_doubt(replace(Job(KEY), state=S1, base_state=S2), 100.0)
    done = synced(job, 101, S3, ChangeKind.LOG_GAP)
    assert retry.confirmation_due(done, 102)
    confirming = debounce.merge(done, {ChangeKind.CONFIRMATION}, 102, Timings(0, 0, 0), idle=True)
    assert (retry.kind_of(confirming), retry.state_for(confirming)) == (STATEFUL, dsync_state.EMPTY)
    # A first pass comes before that.
    new = debounce.merge(
        retry.in_doubt(Job(KEY), 100), {ChangeKind.NEW_USER}, 100, Timings(0, 0, 0), idle=True
    )
    assert not retry.confirmation_due(new, 1000)
    assert retry.kind_of(new) is STATELESS


def test_a_loop_gets_pauses() -> None:
    job = Job(KEY, state=S1, last_success=0.0)
    due = []
    now = 1.0
    for _ in range(debounce.EMPTY_ALLOWED + 10):
        pending = debounce.merge(job, {ChangeKind.NEW_MAIL}, now, Timings(0, 0, 0), idle=True)
        due.append(pending.due - now)
        now = pending.due
        job = synced(job, now, S1, ChangeKind.NEW_MAIL)
    pauses = due[debounce.EMPTY_ALLOWED :]
    assert set(due[: debounce.EMPTY_ALLOWED]) == {0}
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
