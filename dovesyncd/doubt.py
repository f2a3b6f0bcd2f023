"""Finds out whether a peer is to blame for slow syncs: what waits for a silent one would wait for hours."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from dovesyncd.core.model import PeerName
from dovesyncd.core.schedule import Schedule
from dovesyncd.waiting import end

# Seconds for a peer's greeting, and before it is listened for again while syncs are slow.
GREETING, AGAIN = 10.0, 30.0


class Doubt:
    """``silence`` is `peer.silence`. ``on_answer(name, problem)`` is told what it found; ``is_slow(name)``
    says whether there is still reason to doubt; ``on_end`` gets each task, for its errors."""

    def __init__(
        self,
        schedule: Schedule,
        silence: Callable[[Sequence[str], float], Awaitable[str]],
        is_slow: Callable[[PeerName], bool],
        on_answer: Callable[[PeerName, str], None],
        on_end: Callable[[asyncio.Task[None]], None],
    ) -> None:
        self._schedule = schedule
        self._silence = silence
        self._is_slow = is_slow
        self._on_answer = on_answer
        self._on_end = on_end
        self._tasks: dict[PeerName, asyncio.Task[None]] = {}

    def about(self, name: PeerName, destination: Sequence[str]) -> None:
        """A sync with this peer was slow, or is."""
        if name not in self._tasks:
            work = self._listen(name, destination)
            task = asyncio.get_running_loop().create_task(work, name=f"doubt {name}")
            task.add_done_callback(self._on_end)
            self._tasks[name] = task

    async def _listen(self, name: PeerName, destination: Sequence[str]) -> None:
        state = self._schedule.peers[name]
        try:
            while state.down_since is None and state.workers:
                # Nobody has to give way meanwhile for what may be the peer's fault.
                state.doubted = True
                try:
                    problem = await self._silence(destination, GREETING)
                finally:
                    state.doubted = False
                self._on_answer(name, problem)
                if not self._is_slow(name):
                    break
                await asyncio.sleep(AGAIN)
        finally:
            del self._tasks[name]

    async def stop(self) -> None:
        await end(list(self._tasks.values()))
