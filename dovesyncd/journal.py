"""Where messages go: to the journal with fields if stderr is the journal, else as plain lines to stderr.
The only module that knows systemd.journal."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Mapping

IDENTIFIER = "dovesyncd"

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")


class _OneLine(logging.Formatter):
    """Names come from outside: none of them may break a line, move a cursor, or fail to be encoded."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _CONTROL.sub(_escape, record.message)
        return super().formatMessage(record)


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


def _is_journal(environ: Mapping[str, str]) -> bool:
    """Whether stderr is the stream that systemd connected to the journal (systemd.exec(5))."""
    status = os.fstat(sys.stderr.fileno())
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def set_up(level: str, environ: Mapping[str, str]) -> None:
    """``level`` is a name of logging's, in lower case."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    if _is_journal(environ):
        try:
            from systemd.journal import JournalHandler
        except ImportError:
            # systemd reads the level from the line (sd-daemon(3)).
            handler.setFormatter(_Prefixed("%(message)s"))
        else:
            handler = JournalHandler(SYSLOG_IDENTIFIER=IDENTIFIER)
            handler.setFormatter(_OneLine("%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Its debug messages name file descriptors by the thousand.
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class _Prefixed(_OneLine):
    _LEVEL: Mapping[int, int] = {
        logging.DEBUG: 7,
        logging.INFO: 6,
        logging.WARNING: 4,
        logging.ERROR: 3,
        logging.CRITICAL: 2,
    }

    def formatMessage(self, record: logging.LogRecord) -> str:
        return f"<{self._LEVEL.get(record.levelno, 6)}>{super().formatMessage(record)}"
