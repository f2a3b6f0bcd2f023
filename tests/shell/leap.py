"""An event loop in which waiting takes no time: when nothing else can happen, the clocks leap on.

Sockets, files and the store are real. What other threads do takes its real time, during which clocks stand.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, Optional

import pytest

_real_monotonic, _real_time = time.monotonic, time.time
# Real seconds that an answer from another thread gets before a leap.
_GRACE = 0.0005


class _Selector(selectors.DefaultSelector):
    """Waits for nobody but who is ready. ``leapt`` is by how many seconds the clocks are ahead."""

    leapt = 0.0

    def select(self, timeout: Optional[float] = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        ready = super().select(min(timeout, _GRACE))
        if not ready:
            self.leapt += timeout
        return ready


def leaping(work: Coroutine[Any, Any, None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs ``work``; time.time(), time.monotonic() and the loop's clock leap together meanwhile."""
    selector = _Selector()
    monkeypatch.setattr(time, "monotonic", lambda: _real_monotonic() + selector.leapt)
    monkeypatch.setattr(time, "time", lambda: _real_time() + selector.leapt)
    loop = asyncio.SelectorEventLoop(selector)
    try:
        loop.run_until_complete(work)
    finally:
        loop.close()
        monkeypatch.undo()
