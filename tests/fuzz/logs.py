"""The transaction log: the parser on the bytes, and the reader on files that grow and are rotated."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["dovesyncd"]):
    from tests.fuzz import checks
from tests.fuzz.seeds import unpack_logs

_files = checks.LogFiles(Path(tempfile.mkdtemp()))


def one(data: bytes) -> None:
    older, newer, cuts = unpack_logs(data)
    checks.transaction_log(older, cuts)
    checks.mailbox_log(older, cuts)
    _files.live(older, newer, cuts)


atheris.Setup(sys.argv, one)
atheris.Fuzz()
