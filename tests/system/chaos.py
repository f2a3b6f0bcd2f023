"""Faults in a seeded random order, while other things go on: daemons, Dovecot and the network fail."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Optional

from dovesyncd.store import FILE_NAME
from tests.system.churn import EXPECTED, Churn
from tests.system.hosts import Host
from tests.system.pair import Pair
from tests.system.waiting import wait_until

_QUEUED_EVENTS = Path("/proc/sys/fs/inotify/max_queued_events")
# inotify(7): one number for all of the machine, taken over by each instance when it is made.
_DEFAULT_QUEUED_EVENTS = 16384
_SHORT_QUEUE = (16, 64)
OVERFLOW = "inotify lost events"
_TRIES = 5


class Fault(NamedTuple):
    """``kind`` is a method of Chaos. It comes ``after`` seconds of rest and lasts ``length`` seconds;
    ``size`` from 0 to 1 is whatever else the kind has to choose."""

    kind: str
    after: float
    length: float
    size: float


# The shortest and the longest of each, in seconds, and how often it comes in each round.
KINDS = {
    "kill": (0.0, 2.0, 3),
    "dovecot": (0.0, 2.0, 2),
    "cut": (1.0, 8.0, 2),
    "overflow": (0.0, 1.0, 1),
    "freeze": (0.0, 1.5, 2),
    "forget": (0.0, 2.0, 1),
    "hup": (0.0, 0.0, 1),
}


def plan(seed: int, node: str) -> Iterator[Fault]:
    """The faults of one node, without end. Each round holds every kind."""
    rng = random.Random(f"{seed} faults {node}")
    while True:
        kinds = [kind for kind, (_, _, count) in KINDS.items() for _ in range(count)]
        rng.shuffle(kinds)
        for kind in kinds:
            shortest, longest, _ = KINDS[kind]
            length = rng.uniform(shortest, longest)
            yield Fault(kind, rng.uniform(0.5, 3.0), length, rng.random())


class Chaos:
    """Meanwhile each host has its own faults, so that several can come together. On exit all are lifted and
    both daemons run; what went wrong with a fault itself is raised then."""

    def __init__(self, pair: Pair, churn: Churn, seed: int, config: str) -> None:
        self._pair = pair
        self._churn = churn
        self._seed = seed
        self._config = config
        self.began = time.time()
        # Unix time, host, what was done.
        self.story: list[tuple[float, str, str]] = []
        self.done: list[str] = []
        # When a host's daemon last began with an empty database (Unix seconds).
        self.forgotten: dict[Host, float] = {}
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(2)
        self._runs: list[Future[None]] = []

    def __enter__(self) -> Chaos:
        self._runs = [self._pool.submit(self._run, _host(node)) for node in self._pair]
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self._end.set()
        self._pool.shutdown()
        if value is None:
            for run in self._runs:
                run.result()

    def _run(self, host: Host) -> None:
        faults: dict[str, Callable[[Host, Fault], None]] = {
            "kill": self._kill,
            "dovecot": self._dovecot,
            "cut": self._cut,
            "overflow": self._overflow,
            "freeze": self._freeze,
            "forget": self._forget,
            "hup": self._hup,
        }
        try:
            for fault in plan(self._seed, host.name):
                if self._end.wait(fault.after):
                    return
                faults[fault.kind](host, fault)
                self.done.append(fault.kind)
        finally:
            self._lift(host)

    def _tell(self, host: Host, text: str) -> None:
        self.story.append((time.time(), host.name, text))

    def _lift(self, host: Host) -> None:
        """What a fault that failed may have left."""
        host.heal()
        host.start_dovecot()
        if host.daemon_pid() is None:
            self._start(host)

    def _start(self, host: Host) -> None:
        host.start_daemon(self._config + self._pair.peer_table(host))
        self._tell(host, "daemon started")

    @contextlib.contextmanager
    def _killed(self, host: Host) -> Iterator[None]:
        """kill -9; started again afterwards."""
        self._tell(host, "daemon killed")
        host.kill_daemon()
        yield
        self._start(host)

    def _kill(self, host: Host, fault: Fault) -> None:
        with self._killed(host):
            self._end.wait(fault.length)

    def _forget(self, host: Host, fault: Fault) -> None:
        with self._killed(host):
            for file in host.daemon_state.glob(f"{FILE_NAME}*"):
                file.unlink()
            self._tell(host, "database deleted")
            self._end.wait(fault.length)
            self.forgotten[host] = time.time()

    def _dovecot(self, host: Host, fault: Fault) -> None:
        self._tell(host, "Dovecot is stopped")
        host.stop_dovecot()
        self._tell(host, "Dovecot is down")
        self._end.wait(fault.length)
        host.start_dovecot()
        self._tell(host, "Dovecot started")

    def _cut(self, host: Host, fault: Fault) -> None:
        silent = fault.size < 0.5
        self._tell(host, "cut off silently" if silent else "cut off")
        host.cut(silent)
        self._end.wait(fault.length)
        host.heal()
        self._tell(host, "network restored")

    def _hup(self, host: Host, fault: Fault) -> None:
        self._tell(host, "SIGHUP")
        os.kill(_pid(host), signal.SIGHUP)

    def _freeze(self, host: Host, fault: Fault) -> None:
        with self._frozen(host):
            self._end.wait(fault.length)

    @contextlib.contextmanager
    def _frozen(self, host: Host) -> Iterator[None]:
        pid = _pid(host)
        self._tell(host, "daemon frozen")
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)
            self._tell(host, "daemon goes on")

    def _overflow(self, host: Host, fault: Fault) -> None:
        """The queue of the daemon is short from here to its next start."""
        shortest, longest = _SHORT_QUEUE
        length = shortest + int(fault.size * (longest - shortest))
        self._tell(host, "daemon killed")
        host.kill_daemon()
        with _queued_events(length):
            self._start(host)
        since = time.time()
        self._tell(host, f"inotify queue of {length} events")
        # At first the daemon may have no watches yet.
        for _ in range(_TRIES):
            with self._frozen(host):
                self._end.wait(fault.length)
                self._fill_queue(host)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: self._has_overflown(host, since), 3, OVERFLOW)
                return
        raise AssertionError(f"no overflow of inotify on {host.name}")

    def _fill_queue(self, host: Host) -> None:
        # Each in a log of its own, so that the kernel does not merge the events.
        for user in (*self._churn.users, *self._churn.users):
            with contextlib.suppress(*EXPECTED):
                self._churn.deliver(host, user)

    @staticmethod
    def _has_overflown(host: Host, since: float) -> bool:
        return any(OVERFLOW in text for _, text in host.daemon_journal(since))


def _host(node: object) -> Host:
    assert isinstance(node, Host), "a host with a network that can be cut"
    return node


def _pid(host: Host) -> int:
    pid = host.daemon_pid()
    assert pid is not None, "the daemon does not run"
    return pid


@contextlib.contextmanager
def _queued_events(count: int) -> Iterator[None]:
    """fs.inotify.max_queued_events. The lock: other runs on this machine do the same."""
    with open(_QUEUED_EVENTS) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = int(file.read())
        if before <= _SHORT_QUEUE[1]:
            # A killed run left it.
            before = _DEFAULT_QUEUED_EVENTS
        _QUEUED_EVENTS.write_text(f"{count}\n")
        try:
            yield
        finally:
            _QUEUED_EVENTS.write_text(f"{before}\n")
