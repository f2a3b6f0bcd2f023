"""What follows from the outcome of a sync: when the user's next one is, and of which kind."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import NamedTuple

from dovesyncd.core import debounce, dsync_state
from dovesyncd.core.model import (
    DUTIES,
    PEER_OUTCOMES,
    ChangeKind,
    Job,
    JobKey,
    Outcome,
    OutcomeClass,
    SyncKind,
)

# Mailboxes that change under a sync's hands are synced again at once, so often.
MAX_REPEATS = 3
# Every third try, from the failure with this number on, dsync is told to look at every mail: some conflicts
# are healed by nothing less (a renamed folder with an emptied twin, Dovecot 2.4.1).
FULL_FROM_ATTEMPT, FULL_EVERY = 2, 3
# A full sync is no remedy for these.
_NOT_HEALED_BY_FULL = PEER_OUTCOMES | {
    OutcomeClass.BUSY,
    OutcomeClass.NOUSER_LOCAL,
    OutcomeClass.NOUSER_REMOTE,
    OutcomeClass.QUOTA,
    OutcomeClass.TIMEOUT,
}
# Seconds of outage after which a peer may have been restored or emptied: no state of before is used then.
LONG_OUTAGE = 300.0

# Seconds for which a state can be used. Dovecot keeps the logs that it refers to for two days
# (mail_index_log2_max_age).
STATE_KEEPS = 36 * 3600.0

# Seconds within which a sync that changed nothing follows another one, to be counted with it.
EMPTY_WITHIN = 300.0

# Seconds before a sync that the daemon ended is tried again.
CALLED_OFF_PAUSE = 5.0

# Seconds without contest before a contested user's mailboxes are confirmed, and the longest delay of it.
CONFIRM_AFTER = 2.0
CONFIRM_WITHIN = 30.0


class Curve(NamedTuple):
    """Seconds before the next try: ``first`` doubles with each failure in a row up to ``cap``."""

    first: float
    cap: float

    def delay(self, attempts: int, jitter: float) -> float:
        """``attempts`` is 1 after the first failure; ``jitter`` from 0 to 1 adds up to a quarter."""
        return float(min(self.cap, self.first * 2 ** min(attempts - 1, 30)) * (1 + jitter / 4))


RETRY = {
    OutcomeClass.CHANGED: Curve(1, 300),
    OutcomeClass.BUSY: Curve(1, 30),
    OutcomeClass.DOVECOT_DOWN: Curve(1, 60),
    # It grows with the user's own outcomes in a row: on 2.3 a doveadm that died over one user looks like
    # a peer that is down.
    OutcomeClass.PEER_DOWN: Curve(3, 60),
    OutcomeClass.AUTH: Curve(3, 60),
    OutcomeClass.NOUSER_LOCAL: Curve(5, 3600),
    OutcomeClass.NOUSER_REMOTE: Curve(5, 3600),
    OutcomeClass.QUOTA: Curve(60, 3600),
    OutcomeClass.CONFIG: Curve(60, 600),
    OutcomeClass.TIMEOUT: Curve(5, 900),
    OutcomeClass.CRASH: Curve(1, 900),
    OutcomeClass.OTHER: Curve(0.5, 900),
}

# These can't come from a peer that is down: dsync locks the user after the handshake with it.
PEER_ANSWERED = frozenset(
    {
        OutcomeClass.OK,
        OutcomeClass.CHANGED,
        OutcomeClass.BUSY,
        OutcomeClass.NOUSER_REMOTE,
        OutcomeClass.QUOTA,
    }
)


def kind_of(job: Job) -> SyncKind:
    """How the next sync of ``job`` has to compare: with the state, without it, or everything."""
    stubborn = job.attempts >= FULL_FROM_ATTEMPT and (job.attempts - FULL_FROM_ATTEMPT) % FULL_EVERY == 0
    if job.wants_full or (stubborn and job.last_outcome not in _NOT_HEALED_BY_FULL):
        return SyncKind.FULL
    if ChangeKind.CONFIRMATION in job.reasons:
        return SyncKind.STATEFUL
    if not job.state or ChangeKind.NEW_USER in job.reasons or ChangeKind.BACKGROUND in job.reasons:
        return SyncKind.STATELESS
    return SyncKind.STATEFUL


def may_be_guids(job: Job) -> bool:
    """Whether syncs of the user end with CHANGED so persistently that a mailbox may have two GUIDs."""
    return job.last_outcome is OutcomeClass.CHANGED and (job.repeats > 1 or job.attempts > 0)


def begun(job: Job, kind: SyncKind, now: float) -> Job:
    """The job from the moment on that a sync of ``kind`` carries all that is pending."""
    started = replace(debounce.clear(job), last_start=now)
    if ChangeKind.CONFIRMATION in job.reasons or kind is SyncKind.FULL:
        return replace(started, contested_since=None, confirm_at=None, base_state="")
    return started


def without_state(job: Job) -> Job:
    """The job whose next sync can't be a stateful one."""
    return replace(job, state="", base_state="")


def without_old_state(job: Job, now: float, destination: str) -> Job:
    """The job without a state of before an outage that Dovecot's logs don't reach back over, or of another
    peer than is at ``destination`` now."""
    age = 0.0 if job.last_success is None else now - job.last_success
    if job.destination == destination and age <= STATE_KEEPS:
        return job
    return replace(without_state(job), destination=destination)


def undone(job: Job, done: Job) -> Job:
    """The job with what a sync for ``done`` did not achieve due again."""
    job = debounce.join(job, done)
    if done.contested_since is None:
        return job
    return replace(
        job,
        contested_since=done.contested_since,
        confirm_at=max(filter(None, (job.confirm_at, done.confirm_at))),
        base_state=done.base_state,
    )


def after(
    job: Job,
    done: Job,
    kind: SyncKind,
    outcome: Outcome,
    seconds: float,
    now: float,
    jitter: float,
    pass_interval: float,
) -> Job:
    """The job after a sync that was started for ``done`` ended after ``seconds``. ``job`` holds what arrived
    meanwhile."""
    job = replace(
        job, last_outcome=outcome.kind, last_error=outcome.text, last_seconds=seconds, wants_full=False
    )
    if outcome.kind is OutcomeClass.OK:
        empty = _empty_syncs(job, done, kind, outcome, now)
        job = replace(job, attempts=0, repeats=0, last_success=now, state=outcome.state, empty_syncs=empty)
        if kind is SyncKind.STATEFUL:
            return job
        return replace(job, last_pass=now, next_pass=next_pass(job.key, now, pass_interval))
    job = undone(job, done)
    if outcome.kind is not OutcomeClass.BUSY and outcome.kind not in PEER_OUTCOMES:
        # It may have come halfway.
        job = contested(job, now)
    if outcome.kind is OutcomeClass.CHANGED and job.repeats < MAX_REPEATS:
        return replace(job, repeats=job.repeats + 1, due=now, wants_full=outcome.wants_full)
    curve = RETRY[outcome.kind]
    if outcome.kind is OutcomeClass.BUSY:
        return replace(job, due=now + curve.delay(1, jitter))
    if outcome.kind in PEER_OUTCOMES:
        return replace(job, repeats=job.repeats + 1, due=now + curve.delay(job.repeats + 1, jitter))
    attempts = job.attempts + 1
    # The first time that Dovecot asks for a full sync, one without state is what it means.
    wants_full = outcome.wants_full and kind is not SyncKind.STATEFUL
    due = now if outcome.wants_full and attempts == 1 else now + curve.delay(attempts, jitter)
    return replace(job, attempts=attempts, repeats=0, due=due, state="", wants_full=wants_full)


def _empty_syncs(job: Job, done: Job, kind: SyncKind, outcome: Outcome, now: float) -> int:
    for_a_change = bool(done.reasons) and not DUTIES.intersection(done.reasons)
    if not for_a_change or kind is not SyncKind.STATEFUL:
        return job.empty_syncs
    recent = job.last_success is not None and now - job.last_success < EMPTY_WITHIN
    return job.empty_syncs + 1 if recent and dsync_state.equal(done.state, outcome.state) else 0


def called_off(job: Job, done: Job, why: Outcome, seconds: float, now: float) -> Job:
    """The job after its sync, started for ``done``, was ended by the daemon, which is no failure of it."""
    job = replace(
        contested(undone(job, done), now),
        last_outcome=why.kind,
        last_error=why.text,
        last_seconds=seconds,
        state="",
    )
    return replace(job, due=now + CALLED_OFF_PAUSE)


def in_doubt(job: Job, now: float) -> Job:
    """The job of a user of whose past something is not known: the database is new, or an index was rebuilt
    and its modseqs began anew. After his next sync all his mailboxes are compared mail by mail."""
    return replace(job, contested_since=now, confirm_at=now + CONFIRM_AFTER, base_state="")


def contested(job: Job, now: float) -> Job:
    """The job after a user changed a mailbox that a dsync was at work on.

    dsync can lose such a change or mix it up with others, and say that all is well: what gets a modseq
    below the one that is then taken for common to both sides is not looked at again (dsync-mailbox-import.c,
    dsync_mailbox_import_deinit()), and a mail that it gives a new UID keeps the flags of the moment before.
    No later sync finds that, even a stateless one, where the modseqs happen to be equal. So once such a
    contest is over, the mailboxes that had any part in it are compared mail by mail.
    """
    since = now if job.contested_since is None else job.contested_since
    confirm_at = min(now + CONFIRM_AFTER, since + CONFIRM_WITHIN)
    base_state = job.state if job.contested_since is None else job.base_state
    return replace(job, contested_since=since, confirm_at=confirm_at, base_state=base_state)


def confirmation_due(job: Job, now: float) -> bool:
    """A user's first pass comes before it."""
    due = job.confirm_at is not None and job.confirm_at <= now
    return due and ChangeKind.NEW_USER not in job.reasons


def state_for(job: Job) -> str:
    """What a stateful sync for ``job`` is given."""
    if ChangeKind.CONFIRMATION in job.reasons:
        return dsync_state.common(job.base_state, job.state)
    return job.state


def plausible(job: Job, now: float, pass_interval: float) -> Job:
    """The job without a time that lies further ahead than any rule puts it: the clock was ahead when it was
    set, or the interval was longer."""
    longest = max(curve.cap for curve in RETRY.values()) * 1.25
    return replace(
        job,
        due=min(job.due, now + longest),
        next_pass=min(job.next_pass, now + pass_interval * 1.5),
        confirm_at=None if job.confirm_at is None else min(job.confirm_at, now + CONFIRM_WITHIN),
    )


def next_pass(key: JobKey, now: float, interval: float) -> float:
    """When the next background pass of a user is due: at his own phase of the interval, so that the
    passes of all users lie evenly in it, and at least half an interval from now."""
    phase = zlib.crc32(f"{key.user}\0{key.peer}".encode("utf-8", "surrogateescape")) / 2**32 * interval
    earliest = now + interval / 2
    return earliest + (phase - earliest) % interval
