"""Mailboxes with two GUIDs."""

from __future__ import annotations

import pytest

from dovesyncd.core import guids
from dovesyncd.core.guids import Identity

A, B = "a" * 32, "b" * 32


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ((), {}),
        (("INBOX", "7", A), {"INBOX": Identity("7", A)}),
        (("x guid=y", "7", A, "", "8", B), {"x guid=y": Identity("7", A), "": Identity("8", B)}),
        ((f"sp ace uidvalidity=7 guid={A}",), {"sp ace": Identity("7", A)}),
        (
            (f"a uidvalidity=7 guid={A}", "nonsense", f"b uidvalidity=8 guid={B}"),
            {"a": Identity("7", A), "b": Identity("8", B)},
        ),
        (("INBOX", "7"), {}),
    ],
)
def test_parse(output: tuple[str, ...], found: dict[str, Identity]) -> None:
    assert guids.parse(output) == found


A7, B7, B8 = Identity("7", A), Identity("7", B), Identity("8", B)


@pytest.mark.parametrize(
    ("before", "after", "seen", "wanted"),
    [
        ({"x": A7}, {"x": B7}, set(), {"x": A7}),
        ({"x": B7}, {"x": A7}, set(), {"x": B7}),
        ({"x": A7}, {"x": A7}, {("x", A7)}, {}),
        # Perhaps made anew, until it is seen again.
        ({"x": A7}, {"x": B8}, {("x", A7)}, {}),
        ({"x": A7}, {"x": B8}, {("x", A7), ("x", B8)}, {"x": A7}),
        ({"x": A7}, {"x": B8}, {("y", B8)}, {}),
        ({}, {"x": B7}, set(), {}),
        ({"x": A7}, {}, set(), {}),
    ],
)
def test_exchanged(
    before: dict[str, Identity],
    after: dict[str, Identity],
    seen: set[tuple[str, Identity]],
    wanted: dict[str, Identity],
) -> None:
    assert guids.exchanged(before, after, seen) == wanted


def test_both_nodes_end_with_one_identity() -> None:
    """2.3.19's dsync exchanges both, whichever node starts it."""
    for who in (0, 1):
        sides = [A7, B8]
        seen = set()
        while sides[0] != sides[1]:
            before = {"x": sides[who]}
            sides.reverse()
            after = {"x": sides[who]}
            sides[who] = guids.exchanged(before, after, seen).get("x", sides[who])
            seen |= {*before.items(), *after.items()}
            assert len(seen) <= 2
