"""What reaches stderr and the journal, whatever names are in it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dovesyncd.journal import _OneLine, _Prefixed

PROGRAM = """
import logging, os, sys
from dovesyncd import journal
if "block" in sys.argv:
    sys.modules["systemd.journal"] = None
environ = dict(os.environ)
if "journal" in sys.argv:
    status = os.fstat(2)
    environ["JOURNAL_STREAM"] = f"{status.st_dev}:{status.st_ino}"
if "other" in sys.argv:
    environ["JOURNAL_STREAM"] = "1:1"
journal.set_up("info", environ)
log = logging.getLogger("test")
log.debug("hidden")
log.info("hello %s", "b\\udcffd\\n<0>forged\\x1b[31m\\u2028")
log.warning("careful")
logging.getLogger("asyncio").info("hidden")
"""
HELLO = r"hello b\udcffd\n<0>forged\x1b[31m\u2028"


def run(*arguments: str) -> list[str]:
    environ = {name: value for name, value in os.environ.items() if name != "JOURNAL_STREAM"}
    environ.update(LC_ALL="C", PYTHONPATH=str(Path(__file__).parents[2]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], env=environ, stderr=subprocess.PIPE, check=True
    )
    return done.stderr.decode("ascii").splitlines()


@pytest.mark.parametrize("arguments", [(), ("other",)])
def test_plain_lines(arguments: tuple[str, ...]) -> None:
    assert run(*arguments) == [f"INFO: {HELLO}", "WARNING: careful"]


def test_the_journal_without_its_library() -> None:
    assert run("journal", "block") == [f"<6>{HELLO}", "<4>careful"]


def test_the_journal_takes_what_the_stream_does_not() -> None:
    pytest.importorskip("systemd.journal")
    # Where no journald listens, the messages are dropped; stderr gets none in either case.
    assert run("journal") == []


@pytest.mark.parametrize("formatter", [_OneLine("%(message)s"), _Prefixed("%(message)s")])
@pytest.mark.parametrize("name", ["\n", "\r", "\0", "\x1b[2J", "\x85", "\u2028", "\u2029", "\ud800"])
def test_one_line(formatter: logging.Formatter, name: str) -> None:
    record = logging.LogRecord("x", logging.INFO, "", 0, "user %s", (f"a{name}b",), None)
    line = formatter.format(record)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    line.encode()
    assert record.message.endswith("b")


@pytest.mark.parametrize(
    ("level", "prefix"), [("DEBUG", 7), ("INFO", 6), ("WARNING", 4), ("ERROR", 3), ("CRITICAL", 2)]
)
def test_prefixes(level: str, prefix: int) -> None:
    record = logging.LogRecord("x", logging.getLevelName(level), "", 0, "text", (), None)
    assert _Prefixed("%(message)s").format(record) == f"<{prefix}>text"
