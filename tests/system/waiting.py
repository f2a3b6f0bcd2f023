"""Waiting for a condition, with a deadline."""

from __future__ import annotations

import time
from typing import Callable, TypeVar

Value = TypeVar("Value")
_PAUSE = 0.02


def wait_until(condition: Callable[[], Value], timeout: float, what: str) -> Value:
    """The first true value of ``condition``. AssertionError, naming ``what``, after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what}")
        time.sleep(_PAUSE)
