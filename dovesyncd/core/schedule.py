"""Which sync starts next, or how long there is nothing to start. The one place that computes a sleep."""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Optional, Union

from dovesyncd.core.model import PEER_OUTCOMES, Job, JobKey, OutcomeClass, PeerName, Priority, User

# How much longer than it has a job may claim to wait, in seconds: the next class is served first, but
# starves the one below for no longer than the difference. The order of 2.3's replicator-queue.c.
_AHEAD = {Priority.NONE: 0, Priority.LOW: 900, Priority.HIGH: 1800, Priority.SYNC: 2700}

PROBE_FIRST = 2.0
PROBE_LAST = 60.0

# Seconds after which a sync is slow. Slow ones have at most half of a peer's slots while others wait.
SLOW_AFTER = 10.0


class Start(NamedTuple):
    """The pending job of ``key`` may start now."""

    key: JobKey


class Duty(NamedTuple):
    """Nothing is pending for ``key``, but its background pass or its confirmation is due."""

    key: JobKey


class GiveWay(NamedTuple):
    """The sync of ``key`` is to be ended: it is slow, and one too many of those."""

    key: JobKey


class SleepUntil(NamedTuple):
    """Nothing can start before ``time`` (Unix seconds), or before something happens if it is None."""

    time: Optional[float]


Action = Union[Start, Duty, GiveWay, SleepUntil]

# When or rank, token, key: what lies in a heap counts only while its token is the key's last.
Entry = tuple[float, int, JobKey]
# Entries that no longer count before a heap is built anew, besides as many as there are jobs.
_STALE = 1000


@dataclass
class PeerState:
    """What the schedule knows about a peer. While it is down (``down_since`` set) its jobs wait untouched;
    now and then one may start as a probe, with growing pauses in seconds. ``running`` says since when."""

    workers: int
    running: dict[JobKey, float] = field(default_factory=dict)
    # Those of them that were slow and failed last time.
    running_slow: set[JobKey] = field(default_factory=set)
    giving_way: Optional[JobKey] = None
    # It is being found out whether the peer is to blame for slow syncs.
    doubted: bool = False
    # Since when jobs could start: nobody waits for anybody else before that.
    up_since: float = 0.0
    down_since: Optional[float] = None
    down_because: Optional[OutcomeClass] = None
    next_probe: float = 0.0
    pause: float = 0.0
    last_probe: Optional[JobKey] = None
    ready: list[Entry] = field(default_factory=list)
    ready_slow: list[Entry] = field(default_factory=list)

    @property
    def slots_for_slow(self) -> int:
        return max(1, self.workers // 2)

    def opens_at(self, now: float) -> Optional[float]:
        """When the next job may start; None if only the end of a running one can tell."""
        if len(self.running) >= self.workers:
            return None
        if self.down_since is None:
            return now
        # The clock may have been set back.
        return max(now, min(self.next_probe, now + PROBE_LAST))


class Schedule:
    """The jobs in the order of their work. It is told of every change (``put``, ``remove``), start and
    end; two jobs of one user never run at once, whatever their peers."""

    def __init__(self, workers: Mapping[PeerName, int], now: float) -> None:
        self.peers: dict[PeerName, PeerState] = {}
        self.jobs: dict[JobKey, Job] = {}
        self.running: dict[User, JobKey] = {}
        self._waiting: list[Entry] = []
        self._token: dict[JobKey, int] = {}
        self._tokens = itertools.count()
        self._blocked: defaultdict[User, set[JobKey]] = defaultdict(set)
        self.resize(workers, now)

    def resize(self, workers: Mapping[PeerName, int], now: float) -> None:
        """Makes these the peers, with so many slots each. What runs for one that is gone runs on."""
        for name in self.peers.keys() - workers.keys():
            self.peers[name].workers = 0
            for key in [key for key in self.jobs if key.peer == name]:
                self.remove(key)
        for name, count in workers.items():
            self.peers.setdefault(name, PeerState(count, up_since=now)).workers = count

    def put(self, job: Job) -> None:
        """Takes the job as it is now in place of what was known of it."""
        if job.key.peer not in self.peers or not self.peers[job.key.peer].workers:
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
                peer = self.peers[key.peer]
                self._push(
                    peer.ready_slow if is_slow(job) else peer.ready, (rank(job, peer.up_since), token, key)
                )
        times = [self._waiting[0][0]] if self._waiting else []
        startable: list[Entry] = []
        for peer in self.peers.values():
            opens = peer.opens_at(now)
            if opens is None:
                crowded = self._crowded_at(peer)
                if crowded is not None and crowded <= now:
                    return GiveWay(self._youngest_slow(peer, now))
                times += [] if crowded is None else [crowded]
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
        heaps = [peer.ready]
        if len(peer.running_slow) < peer.slots_for_slow:
            heaps.append(peer.ready_slow)
        tops = [(top, heap) for top, heap in ((self._top(heap), heap) for heap in heaps) if top is not None]
        if not tops:
            return None
        first, heap = min(tops)
        if peer.down_since is None or first[2] != peer.last_probe:
            return first
        heapq.heappop(heap)
        others = [top for top in map(self._top, heaps) if top is not None]
        heapq.heappush(heap, first)
        return min(others, default=first)

    def _top(self, heap: list[Entry]) -> Optional[Entry]:
        while heap:
            _, token, key = heap[0]
            if self._token.get(key) == token:
                if key.user not in self.running:
                    return heap[0]
                self._blocked[key.user].add(key)
            heapq.heappop(heap)
        return None

    def _crowded_at(self, peer: PeerState) -> Optional[float]:
        """When more than half of the peer's slots, which are all taken, are held by slow syncs while a job
        waits that is not known to be slow; None if that can't come, or is being dealt with."""
        if peer.giving_way or peer.doubted or peer.down_since is not None or peer.workers < 2:
            return None
        if self._top(peer.ready) is None:
            return None
        others = sorted(since for key, since in peer.running.items() if key not in peer.running_slow)
        return others[peer.slots_for_slow - len(peer.running_slow)] + SLOW_AFTER

    @staticmethod
    def _youngest_slow(peer: PeerState, now: float) -> JobKey:
        slow = [
            (since, key)
            for key, since in peer.running.items()
            if key not in peer.running_slow and since + SLOW_AFTER <= now
        ]
        return max(slow)[1]

    def started(self, key: JobKey, now: float) -> None:
        self.running[key.user] = key
        peer = self.peers[key.peer]
        peer.running[key] = now
        if key in self.jobs and is_slow(self.jobs[key]):
            peer.running_slow.add(key)
        if peer.down_since is not None:
            # Not at the end of the probe: it may be a user's first sync, and take an hour.
            peer.last_probe = key
            peer.pause = min(peer.pause * 2, PROBE_LAST)
            peer.next_probe = now + peer.pause

    def ended(self, key: JobKey) -> None:
        """To be followed by a ``put`` of the job as its end left it."""
        del self.running[key.user]
        peer = self.peers[key.peer]
        del peer.running[key]
        peer.running_slow.discard(key)
        if peer.giving_way == key:
            peer.giving_way = None
        for other in self._blocked.pop(key.user, ()):
            if other in self.jobs:
                self.put(self.jobs[other])

    def gives_way(self, key: JobKey) -> None:
        """The sync of ``key`` is being ended. Its slot is free when it has ended."""
        self.peers[key.peer].giving_way = key

    def peer_failed(self, name: PeerName, key: JobKey, why: OutcomeClass, now: float) -> bool:
        """The peer could not be used for the job of ``key``. True if that is news."""
        peer = self.peers[name]
        peer.down_because = why
        if peer.down_since is not None:
            return False
        peer.down_since = now
        peer.last_probe = key
        peer.pause = PROBE_FIRST
        peer.next_probe = now + PROBE_FIRST
        return True

    def peer_answered(self, name: PeerName, now: float) -> Optional[float]:
        """The peer was reached. Returns since when it had been down, if that is news."""
        peer = self.peers[name]
        down_since, peer.down_since = peer.down_since, None
        if down_since is not None:
            peer.up_since = now
            for heap in (peer.ready, peer.ready_slow):
                heap[:] = [
                    (rank(self.jobs[key], now), token, key)
                    for _, token, key in heap
                    if self._token.get(key) == token
                ]
                heapq.heapify(heap)
        return down_since


def is_slow(job: Job) -> bool:
    """Whether the user's last sync took long and did not get to its end."""
    failed = job.last_outcome is not OutcomeClass.OK and job.last_outcome not in PEER_OUTCOMES
    return failed and (job.last_seconds or 0) >= SLOW_AFTER


def rank(job: Job, up_since: float) -> float:
    """What the ready jobs are ordered by, lowest first: the age of the oldest change, and its priority. After
    an outage all have waited since its end, so that the backlog flows in the order of priority."""
    return max(job.first_change or 0.0, up_since) - _AHEAD[job.priority]
