"""Whether the daemon still works: what the watchdog's sign of life depends on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Optional


class Work(NamedTuple):
    """What one of the loops has to do and since when it has not got on with it, in seconds of a steady
    clock; ``since`` is None while it has nothing to do. ``patience`` is how long that may take."""

    name: str
    since: Optional[float]
    patience: float


def stuck(works: Iterable[Work], now: float) -> list[str]:
    """The names of the loops that have something to do and don't do it."""
    return [work.name for work in works if work.since is not None and now - work.since > work.patience]
