"""Which sync starts next, or how long there is nothing to start. The one place that computes a sleep."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Optional, Union

from dovesyncd.core.model import Job, JobKey, PeerName, Priority, User

# How much older than it is a job may claim to be, in seconds: the next class is served first, but
# starves the one below for no longer than the difference. The order of 2.3's replicator-queue.c.
_AHEAD = {Priority.NONE: 0, Priority.LOW: 900, Priority.HIGH: 1800, Priority.SYNC: 2700}

PROBE_FIRST = 2.0
PROBE_LAST = 60.0


class Start(NamedTuple):
    """The pending job of ``key`` may start now."""

    key: JobKey


class Duty(NamedTuple):
    """Nothing is pending for ``key``, but its background pass or its confirmation is due."""

    key: JobKey


class SleepUntil(NamedTuple):
    """Nothing can start before ``time`` (Unix seconds), or before something happens if it is None."""

    time: Optional[float]


Action = Union[Start, Duty, SleepUntil]

# When or rank, token, key: what lies in a heap counts only while its token is the key's last.
Entry = tuple[float, int, JobKey]
# Entries that no longer count before a heap is built anew, besides as many as there are jobs.
_STALE = 1000


@dataclass
class PeerState:
    """What the schedule knows about a peer. While it is down (``down_since`` set) its jobs wait untouched;
    now and then one may start as a probe, with growing pauses in seconds."""

    workers: int
    running: int = 0
    down_since: Optional[float] = None
    next_probe: float = 0.0
    pause: float = 0.0
    last_probe: Optional[JobKey] = None
    ready: list[Entry] = field(default_factory=list)

    def opens_at(self, now: float) -> Optional[float]:
        """When the next job may start; None if only the end of a running one can tell."""
        if self.running >= self.workers:
            return None
        if self.down_since is None:
            return now
        # The clock may have been set back.
        return max(now, min(self.next_probe, now + PROBE_LAST))


class Schedule:
    """The jobs in the order of their work. It is told of every change (``put``, ``remove``), start and
    end; two jobs of one user never run at once, whatever their peers."""

    def __init__(self, workers: Mapping[PeerName, int]) -> None:
        self.peers = {peer: PeerState(count) for peer, count in workers.items()}
        self.jobs: dict[JobKey, Job] = {}
        self.running: dict[User, JobKey] = {}
        self._waiting: list[Entry] = []
        self._token: dict[JobKey, int] = {}
        self._tokens = itertools.count()
        self._blocked: defaultdict[User, set[JobKey]] = defaultdict(set)

    def put(self, job: Job) -> None:
        """Takes the job as it is now in place of what was known of it."""
        if job.key.peer not in self.peers:
            return
        self.jobs[job.key] = job
        token = self._token[job.key] = next(self._tokens)
        self._push(self._waiting, (job.due if job.pending else job.next_duty, token, job.key))

    def _push(self, heap: list[Entry], entry: Entry) -> None:
        if len(heap) > 2 * len(self.jobs) + _STALE:
            heap[:] = [(at, token, key) for at, token, key in heap if self._token.get(key) == token]
            heapq.heapify(heap)
        heapq.heappush(heap, entry)

    def remove(self, key: JobKey) -> None:
        self.jobs.pop(key, None)
        self._token.pop(key, None)

    def next_action(self, now: float) -> Action:
        while self._waiting:
            when, token, key = self._waiting[0]
            current = self._token.get(key) == token
            if current and when > now:
                break
            heapq.heappop(self._waiting)
            if current:
                job = self.jobs[key]
                if not job.pending:
                    return Duty(key)
                self._push(self.peers[key.peer].ready, (rank(job), token, key))
        times = [self._waiting[0][0]] if self._waiting else []
        startable: list[Entry] = []
        for peer in self.peers.values():
            opens = peer.opens_at(now)
            first = None if opens is None else self._first_ready(peer)
            if opens is None or first is None:
                continue
            if opens <= now:
                startable.append(first)
            times.append(opens)
        if startable:
            return Start(min(startable)[2])
        return SleepUntil(min(times) if times else None)

    def _first_ready(self, peer: PeerState) -> Optional[Entry]:
        """The first of the peer's ready jobs that may start. A user over whom the peer's side died last
        time makes it look down: another one is the better probe."""
        first = self._top(peer)
        if first is None or peer.down_since is None or first[2] != peer.last_probe:
            return first
        heapq.heappop(peer.ready)
        second = self._top(peer)
        heapq.heappush(peer.ready, first)
        return second or first

    def _top(self, peer: PeerState) -> Optional[Entry]:
        while peer.ready:
            _, token, key = peer.ready[0]
            if self._token.get(key) == token:
                if key.user not in self.running:
                    return peer.ready[0]
                self._blocked[key.user].add(key)
            heapq.heappop(peer.ready)
        return None

    def started(self, key: JobKey, now: float) -> None:
        self.running[key.user] = key
        peer = self.peers[key.peer]
        peer.running += 1
        if peer.down_since is not None:
            # Not at the end of the probe: it may be a user's first sync, and take an hour.
            peer.last_probe = key
            peer.pause = min(peer.pause * 2, PROBE_LAST)
            peer.next_probe = now + peer.pause

    def ended(self, key: JobKey) -> None:
        """To be followed by a ``put`` of the job as its end left it."""
        del self.running[key.user]
        self.peers[key.peer].running -= 1
        for other in self._blocked.pop(key.user, ()):
            if other in self.jobs:
                self.put(self.jobs[other])

    def peer_failed(self, name: PeerName, key: JobKey, now: float) -> bool:
        """The peer could not be used for the job of ``key``. True if that is news."""
        peer = self.peers[name]
        if peer.down_since is not None:
            return False
        peer.down_since = now
        peer.last_probe = key
        peer.pause = PROBE_FIRST
        peer.next_probe = now + PROBE_FIRST
        return True

    def peer_answered(self, name: PeerName) -> Optional[float]:
        """The peer was reached. Returns since when it had been down, if that is news."""
        peer = self.peers[name]
        down_since, peer.down_since = peer.down_since, None
        return down_since


def rank(job: Job) -> float:
    """What the ready jobs are ordered by, lowest first: the age of the oldest change, and its priority."""
    return (job.first_change or 0.0) - _AHEAD[job.priority]
