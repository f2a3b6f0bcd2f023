"""Which loops the watchdog takes for stuck."""

from __future__ import annotations

import pytest

from dovesyncd.core.health import Work, stuck


@pytest.mark.parametrize(
    ("since", "patience", "now", "is_stuck"),
    [
        (None, 60.0, 1e9, False),
        (None, 0.0, 1e9, False),
        (100.0, 60.0, 100.0, False),
        (100.0, 60.0, 160.0, False),
        (100.0, 60.0, 160.001, True),
        # A clock that begins at zero is no "nothing to do".
        (0.0, 60.0, 61.0, True),
        (0.0, 60.0, 59.0, False),
    ],
)
def test_stuck(since: float, patience: float, now: float, is_stuck: bool) -> None:
    assert stuck([Work("brain", since, patience)], now) == (["brain"] if is_stuck else [])


def test_each_has_its_own_patience() -> None:
    works = [Work("a", 0.0, 10.0), Work("b", 0.0, 30.0), Work("c", None, 1.0), Work("d", 15.0, 1.0)]
    assert stuck(works, 20.0) == ["a", "d"]
    assert stuck(iter(works), 31.0) == ["a", "b", "d"]
    assert stuck([], 1.0) == []
