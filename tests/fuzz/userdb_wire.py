"""What the command ``user`` prints, as JSON and as text."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["dovesyncd"]):
    from tests.fuzz import checks
from tests.fuzz.seeds import unpack


def one(data: bytes) -> None:
    answer, (place,) = unpack(data)
    text = answer.decode("utf-8", "surrogateescape")
    checks.user_answers(text, ["ann", "bob", text[: place % 50]])


atheris.Setup(sys.argv, one)
atheris.Fuzz()
