"""Runs the syncs: asks the schedule, starts what it says, and puts the outcome back."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Optional

from dovesyncd import doubt
from dovesyncd.core import debounce, guids, outcome, retry
from dovesyncd.core.dsync import sync_args
from dovesyncd.core.guids import Identity
from dovesyncd.core.health import Work
from dovesyncd.core.model import (
    CONTESTABLE,
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
from dovesyncd.core.options import Config, PeerConfig
from dovesyncd.core.schedule import SLOW_AFTER, Duty, GiveWay, PeerState, Schedule, SleepUntil, Start
from dovesyncd.doubt import Doubt
from dovesyncd.doveadm import Doveadm
from dovesyncd.peer import silence
from dovesyncd.store import Store
from dovesyncd.waiting import end, wait_for_event

log = logging.getLogger(__name__)

# Which failures of a user in a row are worth a line: the first and every tenth.
_LOG_EVERY = 10
# Seconds for a doveadm command that only looks or sets one thing.
_SMALL_DEADLINE = 60.0
# Names in a message.
_SHOWN = 10
# The destination of a peer that is not configured.
_NOWHERE = "?"


class Brain:
    """``drain`` makes the intake read what has happened up to now: called right before a sync starts to
    look, so that what it will carry is not taken for a change after it. ``progress`` is told of each end."""

    def __init__(
        self,
        config: Config,
        store: Store,
        jobs: Mapping[JobKey, Job],
        doveadm: Doveadm,
        drain: Callable[[User], None],
        progress: Callable[[], None] = lambda: None,
        silence: Callable[[Sequence[str], float], Awaitable[str]] = silence,
    ) -> None:
        self._store = store
        self._doveadm = doveadm
        self._drain = drain
        self._progress = progress
        self._silence = silence
        self.jobs = dict(jobs)
        self.users: set[User] = set()
        self.orphans: set[User] = set()
        self.schedule = Schedule({}, time.time())
        self._doubts = Doubt(
            self.schedule, silence, lambda name: bool(self._slow(name)), self._doubted, self._check
        )
        self._woken = asyncio.Event()
        # The identities that mailboxes had around the syncs of users for whom dsync may exchange GUIDs.
        self._seen: dict[User, set[tuple[str, Identity]]] = {}
        # The jobs of users whose running sync has been told to look: a change from then on is not in it.
        self._covered: dict[User, Job] = {}
        self._syncs: dict[JobKey, asyncio.Task[None]] = {}
        # Why running syncs are being ended by the daemon itself.
        self._called_off: dict[JobKey, Outcome] = {}
        # Nothing is known of what was before: the database is new.
        self._anew = not jobs
        self._stopping = False
        self._broken: Optional[BaseException] = None
        self._woken_at = time.monotonic()
        self._latest = time.time()
        self._peers: dict[PeerName, PeerConfig] = {}
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Makes ``config`` the one in effect, at the start and at a reload."""
        before, self._peers = self._peers, {peer.name: peer for peer in config.peers}
        self._config = config
        self._timings = Timings(config.sync.settle, config.sync.settle_low, config.sync.longest_wait)
        self.schedule.resize({peer.name: peer.workers for peer in config.peers}, time.time())
        for key in self._syncs:
            now, then = self._peers.get(key.peer), before.get(key.peer)
            if now is None or then is None or now.destination != then.destination:
                self._call_off(key, Outcome(OutcomeClass.TIMEOUT, "the peer was configured anew"))
        for key, job in self.jobs.items():
            if key.peer not in self._peers and job.destination != _NOWHERE:
                # What changes from now on is not noted for it: when it is back, everyone is compared.
                self._put(replace(retry.without_state(job), destination=_NOWHERE))
        for user in self.users:
            self._take_up(user, time.time())
        self._wake()

    # What is to be done ---------------------------------------------------------------------------

    def follow(self, users: Iterable[User], left_out: Collection[str] = ()) -> set[User]:
        """Makes these the users to replicate; returns those who were never seen before. Who is no longer
        among them keeps his jobs, which wait for his return; who is not ``left_out`` on purpose either is an
        orphan."""
        now = time.time()
        users = set(users)
        known = {key.user for key in self.jobs}
        departed, arrived = self.users - users, users - self.users
        self.users = users
        for user in departed:
            log.info("%s: no longer replicated", user)
            for peer in self._peers:
                self.schedule.remove(JobKey(user, peer))
        for user in arrived:
            self._take_up(user, now)
        self._anew = False
        self._note_orphans((known | arrived) - users - set(left_out))
        self._wake()
        return users - known

    def _note_orphans(self, orphans: set[User]) -> None:
        new = sorted(orphans - self.orphans)
        self.orphans = orphans
        if new:
            log.warning(
                "Dovecot no longer knows %d users who were replicated: %s%s; what is known of them is kept, "
                "and nothing of theirs is deleted anywhere",
                len(new),
                ", ".join(map(ascii, new[:_SHOWN])),
                " and others" if len(new) > _SHOWN else "",
            )

    def contested(self, user: User) -> None:
        """A change that is told next was made while a dsync was at work on the same mailbox."""
        for peer in self._peers:
            key = JobKey(user, peer)
            if key in self.jobs:
                self.jobs[key] = retry.contested(self.jobs[key], time.time())

    def changed(self, user: User, kinds: Iterable[ChangeKind]) -> None:
        kinds = frozenset(kinds)
        now = time.time()
        log.debug("%s: %s", user, ", ".join(sorted(kind.value for kind in kinds)))
        for peer in self._peers:
            key = JobKey(user, peer)
            if key in self.jobs:
                if ChangeKind.LOG_GAP in kinds:
                    self.jobs[key] = retry.in_doubt(self.jobs[key], now)
                elif user in self._covered and kinds & CONTESTABLE:
                    self.jobs[key] = retry.contested(self.jobs[key], now)
                self._merge(key, kinds, now)
        self._wake()

    def _merge(self, key: JobKey, kinds: Iterable[ChangeKind], now: float) -> None:
        job = self.jobs[key]
        just_run = job.last_start is not None and 0 <= now - job.last_start < self._timings.settle
        idle = key.user not in self.schedule.running and not just_run
        self._put(debounce.merge(job, kinds, now, self._timings, idle))

    def _put(self, job: Job) -> None:
        self.jobs[job.key] = job
        covered = self._covered.get(job.key.user)
        # On disk, what a running sync carries is pending until it has succeeded.
        carried = covered is not None and covered.key == job.key
        self._store.put_job(retry.undone(job, covered) if covered is not None and carried else job)
        if job.key.user in self.users:
            self.schedule.put(job)

    def _take_up(self, user: User, now: float) -> None:
        """Sees that there is a job for each peer, and that it fits what the peer is now."""
        for peer in self._peers:
            key = JobKey(user, peer)
            job, destination = self.jobs.get(key), self._destination(peer)
            if job is None:
                self.jobs[key] = retry.in_doubt(Job(key), now) if self._anew else Job(key)
                self._merge(key, {ChangeKind.NEW_USER}, now)
            elif key in self._syncs:
                continue
            elif job.destination not in ("", destination):
                # The peer is another one now: everyone is compared with it.
                self._put(retry.without_old_state(replace(job, next_pass=now), now, destination))
            else:
                self._put_plausible(job, now)

    def _destination(self, peer: PeerName) -> str:
        return " ".join(self._peers[peer].destination)

    def _put_plausible(self, job: Job, now: float) -> None:
        plausible = retry.plausible(job, now, self._config.sync.pass_interval)
        if plausible == job:
            self.schedule.put(job)
        else:
            self._put(plausible)

    # Doing it ------------------------------------------------------------------------------------

    async def run(self) -> None:
        while not self._stopping:
            if self._broken is not None:
                raise self._broken
            self._woken_at = time.monotonic()
            now = self._now()
            action = self.schedule.next_action(now)
            if isinstance(action, Start):
                self._start(action.key)
            elif isinstance(action, Duty):
                self._put(replace(self._with_duty(self.jobs[action.key], now), due=now))
            elif isinstance(action, GiveWay):
                self.schedule.gives_way(action.key)
                self._call_off(action.key, Outcome(OutcomeClass.TIMEOUT, "slow: gave way to other users"))
            else:
                await self._sleep(action, now)

    def _now(self) -> float:
        """The time. If the clock was set back, no job keeps a time from before that."""
        now = time.time()
        if now < self._latest - 1:
            log.warning("The clock was set back by %.0f s", self._latest - now)
            for key in [key for key in self.jobs if key.user in self.users]:
                self._put_plausible(self.jobs[key], now)
        self._latest = now
        return now

    def _with_duty(self, job: Job, now: float) -> Job:
        kind = ChangeKind.CONFIRMATION if retry.confirmation_due(job, now) else ChangeKind.BACKGROUND
        return debounce.merge(job, {kind}, now, self._timings, idle=True)

    async def _sleep(self, until: SleepUntil, now: float) -> None:
        timeout = None if until.time is None else max(0.0, until.time - now)
        await wait_for_event(self._woken, timeout)
        self._woken.clear()

    @property
    def work(self) -> Work:
        """``run`` has something to do from the moment that it is woken."""
        return Work("brain", self._woken_at if self._woken.is_set() else None, 60.0)

    def _wake(self) -> None:
        if not self._woken.is_set():
            self._woken_at = time.monotonic()
        self._woken.set()

    def _start(self, key: JobKey) -> None:
        self.schedule.started(key, time.time())
        task = asyncio.get_running_loop().create_task(self._sync(key), name=f"sync {key.user!a}")
        self._syncs[key] = task
        slow = asyncio.get_running_loop().call_later(SLOW_AFTER, self._doubt, key.peer)
        task.add_done_callback(lambda task: self._ended(key, task, slow))

    def _ended(self, key: JobKey, task: asyncio.Task[None], slow: asyncio.TimerHandle) -> None:
        slow.cancel()
        if self._syncs.get(key) is task:
            # Else the next one of the same user has begun already.
            del self._syncs[key]
        if self._called_off.pop(key, None) is not None and not self._stopping:
            # The peer may be another one now.
            self._take_up(key.user, time.time())
        self._check(task)

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            # Not an outcome of a sync but an error of this program: run() must not survive it.
            self._broken = task.exception()
        self._wake()

    def _call_off(self, key: JobKey, why: Outcome) -> None:
        self._called_off[key] = why
        self._syncs[key].cancel()

    def _doubt(self, name: PeerName) -> None:
        if name in self._peers and not self._stopping:
            self._doubts.about(name, self._peers[name].destination)

    def _doubted(self, name: PeerName, problem: str) -> None:
        if problem:
            silent = Outcome(OutcomeClass.PEER_DOWN, problem)
            self._note_peer(JobKey(User(""), name), silent, time.time())
            for key in self._slow(name):
                self._call_off(key, silent)
        self._wake()

    def _slow(self, name: PeerName) -> list[JobKey]:
        """The peer's syncs that have been running for long."""
        since = time.time() - SLOW_AFTER
        running = self.schedule.peers[name].running
        return [key for key, began in running.items() if began <= since and key in self._syncs]

    async def _sync(self, key: JobKey) -> None:
        peer, options = self._peers[key.peer], self._config.sync
        down_since = self.schedule.peers[key.peer].down_since
        if down_since is not None and time.time() - down_since > retry.LONG_OUTAGE:
            self.jobs[key] = retry.without_state(self.jobs[key])
        self.jobs[key] = retry.without_old_state(self.jobs[key], time.time(), self._destination(key.peer))
        if retry.confirmation_due(self.jobs[key], time.time()):
            self._merge(key, {ChangeKind.CONFIRMATION}, time.time())
        kind, state = retry.kind_of(self.jobs[key]), retry.state_for(self.jobs[key])
        args = sync_args(
            kind,
            state,
            lock_timeout=int(options.lock_timeout),
            stall_timeout=int(options.stall_timeout),
            destination=peer.destination,
            namespaces=peer.namespaces,
            all_namespaces=peer.all_namespaces,
            exclude_mailboxes=peer.exclude_mailboxes,
        )
        covered = Job(key)

        def cover() -> None:
            nonlocal covered
            self._drain(key.user)
            job = self.jobs[key]
            # What arrived since and asks for a deeper look than this sync will take stays due.
            if retry.kind_of(job) is kind and retry.state_for(job) == state:
                covered = job
                self.jobs[key] = retry.begun(job, kind, time.time())
                self.schedule.remove(key)
                self._covered[key.user] = job

        began = time.monotonic()
        deadline = asyncio.get_running_loop().time() + options.deadline
        try:
            problem, before = "", {}
            if down_since is not None:
                problem = await self._silence(peer.destination, doubt.GREETING)
            if problem:
                result = Outcome(OutcomeClass.PEER_DOWN, problem)
            else:
                if retry.may_be_guids(self.jobs[key]):
                    before = await self._identities(key.user)
                result = outcome.classify(
                    await self._doveadm.run(key.user, "sync", args, deadline=deadline, before_send=cover)
                )
            if before and result.kind is OutcomeClass.CHANGED:
                await self._settle_guids(key.user, before)
            else:
                self._seen.pop(key.user, None)
        except asyncio.CancelledError:
            self._covered.pop(key.user, None)
            if self._stopping or key not in self._called_off:
                self._put(retry.undone(self.jobs[key], covered))
                raise
            self._end_called_off(key, covered, kind, time.monotonic() - began)
        else:
            self._conclude(key, covered, kind, result, time.monotonic() - began)

    async def _identities(self, user: User) -> dict[str, Identity]:
        reply = await self._doveadm.run(user, "mailbox status", guids.STATUS, deadline=self._soon())
        return guids.parse(reply.output) if reply.exit_code == 0 else {}

    async def _settle_guids(self, user: User, before: Mapping[str, Identity]) -> None:
        """Ends dsync's endless exchange of a mailbox's two GUIDs."""
        seen = self._seen.setdefault(user, set())
        after = await self._identities(user)
        for mailbox, identity in guids.exchanged(before, after, seen).items():
            args = ("--mailbox-guid", identity.guid, "--uid-validity", identity.uidvalidity, "--", mailbox)
            reply = await self._doveadm.run(user, "mailbox update", args, deadline=self._soon())
            log.warning(
                "%s: mailbox %s had another GUID on the peer, which dsync can't merge: set to %s%s",
                user,
                mailbox,
                identity.guid,
                "" if reply.exit_code == 0 else f", which failed: {outcome.classify(reply).text}",
            )
        seen.update(before.items(), after.items())

    @staticmethod
    def _soon() -> float:
        return asyncio.get_running_loop().time() + _SMALL_DEADLINE

    def _conclude(self, key: JobKey, covered: Job, kind: SyncKind, result: Outcome, seconds: float) -> None:
        # Whatever happened while the sync ran must be known before its state is trusted.
        self._drain(key.user)
        now = time.time()
        self._note_peer(key, result, now)
        if result.kind is OutcomeClass.TIMEOUT:
            self._doubt(key.peer)
        job = retry.after(
            self.jobs[key],
            covered,
            kind,
            result,
            seconds,
            now,
            random.random(),
            self._config.sync.pass_interval,
        )
        self._covered.pop(key.user, None)
        self.schedule.ended(key)
        self._put(job)
        self._log(covered, kind, result, seconds, job)
        if job.empty_syncs == debounce.EMPTY_ALLOWED:
            log.warning(
                "%s: %d syncs in a row for %s changed nothing on either side: slowed down; "
                "something writes to his mailboxes again and again",
                key.user,
                job.empty_syncs,
                ", ".join(reason.value for reason in covered.reasons),
            )
        self._progress()

    def _end_called_off(self, key: JobKey, covered: Job, kind: SyncKind, seconds: float) -> None:
        why = self._called_off[key]
        job = retry.called_off(self.jobs[key], covered, why, seconds, time.time())
        self.schedule.ended(key)
        self._put(job)
        self._log(covered, kind, why, seconds, job)
        self._progress()

    def _note_peer(self, key: JobKey, result: Outcome, now: float) -> None:
        name = key.peer
        state = self.schedule.peers[name]
        if result.kind in retry.PEER_ANSWERED:
            down_since = self.schedule.peer_answered(name, now)
            if down_since is not None:
                log.warning(
                    "%s is back after %.0f s", self._whose(state, name), now - down_since,
                    extra={"DOVESYNC_PEER": name},
                )  # fmt: skip
                self._after_outage(key, now - down_since, now)
            return
        failed = result.kind in PEER_OUTCOMES or state.down_since is not None
        if failed and self.schedule.peer_failed(name, key, result.kind, now):
            log.error(
                "%s can't be used, its users wait: %s", self._whose(state, name), result.text,
                extra={"DOVESYNC_PEER": name},
            )  # fmt: skip

    def _after_outage(self, probe: JobKey, seconds: float, now: float) -> None:
        for key in self._slow(probe.peer):
            if key != probe:
                # Its connection may be dead without knowing.
                self._call_off(key, Outcome(OutcomeClass.PEER_DOWN, "begun before the peer was down"))
        if seconds > retry.LONG_OUTAGE:
            for key, job in self.jobs.items():
                if key.peer == probe.peer and job.state and key not in self._syncs:
                    self._put(retry.without_state(job))

    @staticmethod
    def _whose(state: PeerState, name: PeerName) -> str:
        if state.down_because is OutcomeClass.DOVECOT_DOWN:
            return f"the Dovecot of this host, for peer {name},"
        return f"peer {name}"

    def _log(self, covered: Job, kind: SyncKind, result: Outcome, seconds: float, job: Job) -> None:
        reason = ", ".join(reason.value for reason in covered.reasons) or "not begun"
        level = logging.INFO
        if result.kind in PEER_OUTCOMES:
            level = logging.DEBUG
        elif job.attempts:
            level = logging.WARNING if job.attempts % _LOG_EVERY == 1 else logging.DEBUG
        log.log(
            level,
            "%s -> %s: %s: %s sync %s in %.3f s%s",
            covered.key.user,
            covered.key.peer,
            reason,
            kind.value,
            result.kind.value,
            seconds,
            f": {result.text}" if result.text else "",
            extra={
                # As bytes, because a name need not be valid text.
                "DOVESYNC_USER": os.fsencode(covered.key.user),
                "DOVESYNC_PEER": covered.key.peer,
                "DOVESYNC_REASON": reason,
                "DOVESYNC_KIND": kind.value,
                "DOVESYNC_OUTCOME": result.kind.value,
                "DOVESYNC_DURATION_USEC": int(seconds * 1e6),
            },
        )

    async def stop(self, grace: float) -> None:
        """Starts nothing more, gives running syncs ``grace`` seconds, and cancels the rest; their changes
        stay pending."""
        self._stopping = True
        self._wake()
        await self._doubts.stop()
        syncs = set(self._syncs.values())
        if syncs:
            _, late = await asyncio.wait(syncs, timeout=grace)
            await end(late)
