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


@dataclass
class PeerState:
    """What the schedule knows about a peer. While it is down (``down_since`` set) its jobs wait untouched,
    and one at a time may start as a probe, with growing pauses in seconds."""

    workers: int
    running: int = 0
    down_since: Optional[float] = None
    next_probe: float = 0.0
    pause: float = 0.0
    ready: list[tuple[float, int, JobKey]] = field(default_factory=list)

    def opens_at(self, now: float) -> Optional[float]:
        """When the next job may start; None if only the end of a running one can tell."""
        if self.down_since is not None:
            return None if self.running else max(now, self.next_probe)
        return now if self.running < self.workers else None


class Schedule:
    """The jobs in the order of their work. It is told of every change (``put``, ``remove``), start and
    end; two jobs of one user never run at once, whatever their peers."""

    def __init__(self, workers: Mapping[PeerName, int]) -> None:
        self.peers = {peer: PeerState(count) for peer, count in workers.items()}
        self.jobs: dict[JobKey, Job] = {}
        self.running: dict[User, JobKey] = {}
        # Heaps hold (when or rank, token, key); an entry counts only while its token is the key's last.
        self._waiting: list[tuple[float, int, JobKey]] = []
        self._token: dict[JobKey, int] = {}
        self._tokens = itertools.count()
        self._blocked: defaultdict[User, set[JobKey]] = defaultdict(set)

    def put(self, job: Job) -> None:
        """Takes the job as it is now in place of what was known of it."""
        if job.key.peer not in self.peers:
            return
        self.jobs[job.key] = job
        token = self._token[job.key] = next(self._tokens)
        heapq.heappush(self._waiting, (job.due if job.pending else job.next_duty, token, job.key))

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
                heapq.heappush(self.peers[key.peer].ready, (rank(job), token, key))
        times = [self._waiting[0][0]] if self._waiting else []
        for peer in self.peers.values():
            opens = peer.opens_at(now)
            ready = None if opens is None else self._first_ready(peer)
            if opens is None or ready is None:
                continue
            if opens <= now:
                return Start(ready)
            times.append(opens)
        return SleepUntil(min(times) if times else None)

    def _first_ready(self, peer: PeerState) -> Optional[JobKey]:
        while peer.ready:
            _, token, key = peer.ready[0]
            if self._token.get(key) == token:
                if key.user not in self.running:
                    return key
                self._blocked[key.user].add(key)
            heapq.heappop(peer.ready)
        return None

    def started(self, key: JobKey) -> None:
        self.running[key.user] = key
        self.peers[key.peer].running += 1

    def ended(self, key: JobKey) -> None:
        """To be followed by a ``put`` of the job as its end left it."""
        del self.running[key.user]
        self.peers[key.peer].running -= 1
        for other in self._blocked.pop(key.user, ()):
            if other in self.jobs:
                self.put(self.jobs[other])

    def peer_failed(self, name: PeerName, now: float) -> bool:
        """The peer could not be used. True if that is news."""
        peer = self.peers[name]
        news = peer.down_since is None
        if news:
            peer.down_since = now
            peer.pause = PROBE_FIRST
        elif now >= peer.next_probe:
            peer.pause = min(peer.pause * 2, PROBE_LAST)
        peer.next_probe = now + peer.pause
        return news

    def peer_answered(self, name: PeerName) -> Optional[float]:
        """The peer was reached. Returns since when it had been down, if that is news."""
        peer = self.peers[name]
        down_since, peer.down_since = peer.down_since, None
        return down_since


def rank(job: Job) -> float:
    """What the ready jobs are ordered by, lowest first: the age of the oldest change, and its priority."""
    return (job.first_change or 0.0) - _AHEAD[job.priority]
