"""A brain at work, with a doveadm-server that is played and a real queue on disk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from dovesyncd.brain import Brain
from dovesyncd.core.model import ChangeKind, Job, JobKey, PeerName, User
from dovesyncd.core.options import Config, parse
from dovesyncd.doveadm import Doveadm
from dovesyncd.store import Store
from tests.shell.fake_doveadm_server import Answer, FakeDoveadmServer, Request
from tests.shell.waiting import settled, until

ANN, BOB = User("ann"), User("bob")
B = PeerName("b")
STATE = "AQAAAHm4+Jk="
MAIL, FLAGS = {ChangeKind.NEW_MAIL}, {ChangeKind.FLAGS}
UNREACHABLE = "Disconnected from remote: connect(10.0.0.1:12345) failed: Connection refused"


def config(*peers: str, workers: int = 10, **sync: object) -> Config:
    given = {
        "sync": {"settle": "20ms", "settle_low": "30ms", "longest_wait": "100ms", **sync},
        "peer": [
            {"name": name, "destination": f"tcp:{name}:12345", "workers": workers} for name in peers or ("b",)
        ],
    }
    found = parse([("test", given)])
    assert found.config is not None, found.problems
    return found.config


def synced(user: User, peer: str = "b", **more: object) -> Job:
    """A user who was synced before and for whom nothing is to be done."""
    now = time.time()
    job = Job(JobKey(user, PeerName(peer)), last_success=now, last_pass=now, next_pass=now + 9999)
    job = replace(job, state=STATE, destination=f"tcp:{peer}:12345")
    return replace(job, **more)  # type: ignore[arg-type]


class Scene:
    """A brain at work."""

    def __init__(self, state: Path, server: FakeDoveadmServer, options: Config) -> None:
        self.server = server
        self.store = Store(str(state))
        self.drained: list[User] = []
        self.on_drain: Callable[[], None] = lambda: None
        doveadm = Doveadm(server.path, "/nonexistent/doveadm")
        doveadm.grace = 0.05
        # What callbacks raised.
        self.broken: list[dict[str, Any]] = []
        # What listening for the peer's greeting finds.
        self.problem = ""
        self.brain = Brain(
            options, self.store, self.store.load().jobs, doveadm, self.drain, silence=self.silence
        )
        self.task: Optional[asyncio.Task[None]] = None

    async def silence(self, destination: Sequence[str], seconds: float) -> str:
        return self.problem

    def drain(self, user: User) -> None:
        self.drained.append(user)
        self.on_drain()

    def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: self.broken.append(context))
        self.task = asyncio.get_running_loop().create_task(self.brain.run())

    @property
    def syncs(self) -> list[Request]:
        return [request for request in self.server.requests if request.command == "sync"]

    def users(self) -> list[str]:
        return [request.user for request in self.syncs]

    async def idle(self, count: int) -> None:
        """Until ``count`` syncs have been asked for and nothing runs or is pending any more."""
        await until(
            lambda: (
                len(self.syncs) >= count
                and not self.brain.schedule.running
                and not any(job.pending for job in self.brain.jobs.values())
            ),
            f"{count} syncs",
        )
        await settled(lambda: len(self.syncs) == count, f"exactly {count} syncs")

    async def close(self, grace: float = 5.0) -> None:
        await self.brain.stop(grace)
        if self.task is not None:
            await asyncio.gather(self.task, return_exceptions=True)
        await self.store.close()
        assert not self.broken


async def stored(state: Path) -> dict[JobKey, Job]:
    store = Store(str(state))
    jobs = store.load().jobs
    await store.close()
    return jobs


async def prepare(state: Path, *jobs: Job) -> None:
    store = Store(str(state))
    for job in jobs:
        store.put_job(job)
    await store.close()


@asynccontextmanager
async def scene(
    state: Path,
    answer: Callable[[Request], Answer] = lambda request: Answer.ok(STATE),
    options: Optional[Config] = None,
    users: tuple[User, ...] = (ANN,),
    grace: float = 5.0,
) -> AsyncIterator[Scene]:
    async with FakeDoveadmServer(str(state / "doveadm-server"), answer) as server:
        it = Scene(state, server, options or config())
        it.brain.follow(users)
        it.run()
        try:
            yield it
        finally:
            await it.close(grace)
