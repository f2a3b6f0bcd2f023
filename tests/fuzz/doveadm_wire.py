"""The protocol of doveadm-server: replies in any pieces, and requests with any fields."""

from __future__ import annotations

import sys

import atheris

with atheris.instrument_imports(include=["dovesyncd"]):
    from tests.fuzz import checks
from tests.fuzz.seeds import unpack


def one(data: bytes) -> None:
    stream, cuts = unpack(data)
    checks.reply_stream(stream, cuts)
    checks.reply_stream(stream, range(len(stream) if len(stream) < 1000 else 0))
    fields = [field.decode("utf-8", "surrogateescape") for field in stream.split(b"/")]
    checks.request([*fields, "", "", ""])


atheris.Setup(sys.argv, one)
atheris.Fuzz()
