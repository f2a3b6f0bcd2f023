"""dsync's state, taken apart."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovesyncd.core import dsync_state

A1, A2, B1 = b"A" * 16 + b"1" * 28, b"A" * 16 + b"2" * 28, b"B" * 16 + b"1" * 28
# Printed by doveadm sync -s of 2.3.19.1 and 2.4.1 for a user with two mailboxes.
REAL = (
    "AQAAAJiZaC4m/QJrDzQAAC35iMkm/QJrAQAAAAIAAAAAAAAAAAAAAAAAAAABAAAA2g+CLyb9AmsRNAAALfmIySf9AmsAAAAAAQAAAAAA"
    "AAAAAAAAAAAAAAAAAAB2mJP4",
    "AQAAAPgJpy4q/QJrYAAAAC35iMkq/QJrAQAAAAIAAAAAAAAAAAAAAAAAAAABAAAAiABpMSr9AmtiAAAALfmIySv9AmsAAAAAAQAAAAAA"
    "AAAAAAAAAAAAAAAAAAC9j539",
)


def state(*entries: bytes) -> str:
    return dsync_state.render({entry[:16]: entry for entry in entries})


def test_the_empty_one_is_dovecots() -> None:
    assert dsync_state.EMPTY == "AQAAAHm4+Jk="


@pytest.mark.parametrize("real", REAL)
def test_real_states(real: str) -> None:
    entries = dsync_state.parse(real)
    assert entries is not None
    assert len(entries) == 2
    assert dsync_state.render(entries) == real
    first = next(iter(entries))
    assert dsync_state.common(real, dsync_state.render({first: entries[first]})) == dsync_state.render(
        {first: entries[first]}
    )


@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (state(A1, B1), state(A1, B1), state(A1, B1)),
        (state(A1, B1), state(A2, B1), state(B1)),
        (state(A1), state(A1, B1), state(A1)),
        (state(A1, B1), state(A1), state(A1)),
        (state(A1), state(B1), dsync_state.EMPTY),
        ("", state(A1), dsync_state.EMPTY),
        (state(A1), "", dsync_state.EMPTY),
        ("nonsense", state(A1), dsync_state.EMPTY),
        (state(A1)[:-4] + "AAA=", state(A1), dsync_state.EMPTY),
    ],
)
def test_common(one: str, other: str, common: str) -> None:
    assert dsync_state.common(one, other) == common


@given(st.text() | st.binary().map(lambda data: base64.b64encode(data).decode()))
def test_whatever_it_is_given(text: str) -> None:
    assert dsync_state.parse(text) is None or text.startswith("AQAAA")
