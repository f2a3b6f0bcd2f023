"""Waiting that can be cancelled at any instant. asyncio's wait_for() can't: before Python 3.12 it loses a
cancellation that comes together with what was waited for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Any, Optional

log = logging.getLogger(__name__)

# Seconds after which a task that is still there is cancelled once more, and named.
_AGAIN = 5.0


async def wait_for_event(event: asyncio.Event, seconds: Optional[float]) -> None:
    """Until ``event`` is set, but no longer than ``seconds``, or for ever if that is None."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({waiting}, timeout=seconds)
    finally:
        waiting.cancel()


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancels ``tasks`` until every one has ended. A cancellation can get lost in what a task waits for:
    a daemon that is told to stop must not depend on that."""
    pending = {task for task in tasks if not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN)
        if pending:
            log.warning("still ending: %s", ", ".join(sorted(task.get_name() for task in pending)))
