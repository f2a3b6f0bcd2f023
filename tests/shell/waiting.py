"""Waiting inside an event loop."""

from __future__ import annotations

import asyncio
from typing import Callable


async def until(
    condition: Callable[[], object], what: str, seconds: float = 10.0, pause: float = 0.002
) -> None:
    """Returns once ``condition`` holds, which is looked at every ``pause`` seconds. AssertionError, naming
    ``what``, after ``seconds``."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not condition():
        assert loop.time() < deadline, f"not within {seconds:g} s: {what}"
        await asyncio.sleep(pause)


async def settled(condition: Callable[[], object], what: str, turns: int = 20) -> None:
    """``condition`` holds now and in each of the next ``turns`` turns of the loop."""
    for _ in range(turns):
        assert condition(), what
        await asyncio.sleep(0)
