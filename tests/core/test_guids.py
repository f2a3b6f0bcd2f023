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


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ({"x": Identity("7", A)}, {"x": Identity("7", B)}, {"x": A}),
        ({"x": Identity("7", B)}, {"x": Identity("7", A)}, {"x": B}),
        ({"x": Identity("7", A)}, {"x": Identity("7", A)}, {}),
        ({"x": Identity("7", A)}, {"x": Identity("8", B)}, {}),
        ({}, {"x": Identity("7", B)}, {}),
        ({"x": Identity("7", A)}, {}, {}),
    ],
)
def test_exchanged(before: dict[str, Identity], after: dict[str, Identity], wanted: dict[str, str]) -> None:
    assert guids.exchanged(before, after) == wanted


def test_both_nodes_end_with_one_guid() -> None:
    """2.3.19's dsync exchanges the GUIDs, whichever node starts it."""
    for who in (0, 1):
        sides = [A, B]
        before = {"x": Identity("7", sides[who])}
        sides.reverse()
        sides[who] = guids.exchanged(before, {"x": Identity("7", sides[who])})["x"]
        assert sides[0] == sides[1]
