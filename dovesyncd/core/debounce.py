"""Merges changes into a user's job, so that what belongs together is one sync."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dovesyncd.core.model import ChangeKind, Job, Priority, Timings

# Syncs in a row that were for a user's change and changed nothing on either side: more of them are a loop,
# and pauses begin, in seconds, which double up to the longest one.
EMPTY_ALLOWED = 20
LONGEST_PAUSE = 60.0


def merge(job: Job, kinds: Iterable[ChangeKind], now: float, timings: Timings, idle: bool) -> Job:
    """The job with ``kinds`` added to what is pending.

    New mail of a user who is ``idle`` (no sync runs or has just run) is due at once. Everything else waits
    until no more follows: ``settle`` after a change of high priority, ``settle_low`` after others, and at
    most ``longest_wait`` from the first. Priority only rises. A job that waits for its next try after a
    failure keeps that time. A user whose syncs are a loop has pauses between them.
    """
    new = [kind for kind in _ordered(kinds) if kind not in job.reasons]
    priority = max([job.priority, *(kind.priority for kind in new)])
    first_change = now if job.first_change is None else job.first_change
    if job.pending and job.attempts:
        due = job.due
    elif idle and ChangeKind.NEW_MAIL in new:
        due = now
    else:
        settle = timings.settle if priority >= Priority.HIGH else timings.settle_low
        due = min(now + settle, first_change + timings.longest_wait)
        if job.pending and job.due <= now:
            due = job.due
    if job.empty_syncs >= EMPTY_ALLOWED and job.last_start is not None:
        pause = min(LONGEST_PAUSE, 2.0 ** min(job.empty_syncs - EMPTY_ALLOWED, 10))
        due = max(due, min(job.last_start, now) + pause)
    return replace(job, priority=priority, reasons=(*job.reasons, *new), first_change=first_change, due=due)


def join(job: Job, undone: Job) -> Job:
    """The job with what a sync did not achieve put back in front of what arrived while it ran."""
    if undone.first_change is None:
        return job
    later = tuple(kind for kind in job.reasons if kind not in undone.reasons)
    return replace(
        job,
        priority=max(job.priority, undone.priority),
        reasons=(*undone.reasons, *later),
        first_change=undone.first_change,
        wants_full=job.wants_full or undone.wants_full,
    )


def clear(job: Job) -> Job:
    """The job with nothing pending."""
    return replace(job, priority=Priority.NONE, reasons=(), first_change=None, due=0.0)


def _ordered(kinds: Iterable[ChangeKind]) -> list[ChangeKind]:
    """The weightiest first, so that the reason people read starts with it."""
    order = list(ChangeKind)
    return sorted(kinds, key=lambda kind: (-kind.priority, order.index(kind)))
