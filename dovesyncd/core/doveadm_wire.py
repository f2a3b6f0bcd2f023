"""The line protocol of Dovecot's doveadm-server, without I/O.

The client speaks minor version 1: from then on the server sends the log lines of the command beside
its reply, multiplexed (src/doveadm/client-connection-tcp.c, src/lib/ostream-multiplex.c, 2.3 and 2.4)::

    C: VERSION doveadm-server 1 1
    S: VERSION doveadm-client 1 <minor>
    S: +                                   or "-": a password is wanted
    C: <flags> <user> <command> <args>...
    S: packets of <channel u8> <length u32 big-endian> <payload>
         channel 0:   <value> TAB ... LF  then  + LF  or  -<WORD> LF
         channel 'L': <level 1..6> <prefix> <text> LF

Fields are separated by TAB and escaped with 0x01 (src/lib/strescape.c).
"""

from __future__ import annotations

import enum
import re
from collections import deque
from collections.abc import Sequence
from typing import Optional

from dovesyncd.core.model import LogLine, Reply

HANDSHAKE = b"VERSION\tdoveadm-server\t1\t1\n"
# The server closes the connection on a longer line (MAX_INBUF_SIZE, client-connection-tcp.c).
REQUEST_LIMIT = 1024 * 1024

OUTPUT_LIMIT = 4 * 1024 * 1024
LOG_LINE_LIMIT = 8 * 1024
LOG_EDGE = 100
_HANDSHAKE_LINE_LIMIT = 1024
_WORD_LIMIT = 1024
_PACKET_HEADER = 5
_REPLY_CHANNEL = 0
_LOG_CHANNEL = ord("L")

# DOVEADM_EX_UNKNOWN: the server has no word for its exit code. 2.3 says it for 2 (changed), 73 and 78.
EXIT_UNKNOWN = -1
# src/lib-doveadm/doveadm-protocol.c; NOREPLICATE is in 2.3 only, REFERRAL and EXPIRED in 2.4 only.
EXIT_CODES = {
    b"UNKNOWN": EXIT_UNKNOWN,
    b"CHANGED": 2,
    b"USAGE": 64,
    b"DATAERR": 65,
    b"NOUSER": 67,
    b"NOTFOUND": 68,
    b"TEMPFAIL": 75,
    b"PROTOCOL": 76,
    b"NOPERM": 77,
    b"NOREPLICATE": 1001,
    b"REFERRAL": 1002,
    b"EXPIRED": 1003,
}

# Reply.failure where the connection ended without a reply. A doveadm-server of 2.3 ends so when the peer
# can't be reached (i_fatal in doveadm-util.c); one of 2.4 answers that, and ends so only when it dies.
DISCONNECTED = "disconnected"
DIED = "doveadm-server died"
_FIRST_MINOR_OF_24 = 3

_LEVELS = ("debug", "info", "warning", "error", "fatal", "panic")
_ESCAPES = {b"\x00": b"\x010", b"\x01": b"\x011", b"\t": b"\x01t", b"\r": b"\x01r", b"\n": b"\x01n"}
_UNESCAPES = {escaped: plain for plain, escaped in _ESCAPES.items()}


def escape(text: str) -> bytes:
    """One field of a line. ``text`` is UTF-8 with other bytes as surrogates, as from ``os.fsdecode``."""
    return re.sub(
        rb"[\x00\x01\t\r\n]", lambda found: _ESCAPES[found[0]], text.encode("utf-8", "surrogateescape")
    )


def unescape(field: bytes) -> str:
    """The inverse of `escape`. Like Dovecot, any other escaped byte stands for itself and a lone 0x01
    at the end for nothing."""
    plain = re.sub(rb"\x01(?s:.?)", lambda found: _UNESCAPES.get(found[0], found[0][1:]), field)
    return plain.decode("utf-8", "surrogateescape")


def request_line(flags: str, user: str, command: str, args: Sequence[str]) -> bytes:
    """One command. Nothing in ``user`` or ``args`` can end its field or the line."""
    return b"\t".join(escape(field) for field in (flags, user, command, *args)) + b"\n"


class LogTail:
    """Lines of a log in bounded memory: the first and the last ones, and how many are missing between."""

    def __init__(self) -> None:
        self._first: list[LogLine] = []
        self._last: deque[LogLine] = deque(maxlen=LOG_EDGE)
        self._dropped = 0

    def add(self, line: LogLine) -> None:
        if len(self._first) < LOG_EDGE:
            self._first.append(line)
            return
        self._dropped += len(self._last) == LOG_EDGE
        self._last.append(line)

    def lines(self) -> tuple[LogLine, ...]:
        gap = [LogLine("info", f"({self._dropped} lines left out)")] if self._dropped else []
        return (*self._first, *gap, *self._last)


class LineSplitter:
    """Cuts a byte stream into lines. What is beyond ``limit`` bytes of one line is dropped."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._part = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        lines = []
        *ended, rest = data.split(b"\n")
        for end in ended:
            self._keep(end)
            lines.append(bytes(self._part))
            self._part.clear()
        self._keep(rest)
        return lines

    def rest(self) -> bytes:
        """The line that has not ended yet."""
        return bytes(self._part)

    def _keep(self, data: bytes) -> None:
        self._part += data[: self._limit - len(self._part)]


class State(enum.Enum):
    """Where a `ReplyStream` is. PASSWORD, REPLIED and BROKEN are for ever."""

    HANDSHAKE = "waiting for the handshake"
    PASSWORD = "asked for a password"  # noqa: S105
    READY = "waiting for the reply"
    REPLIED = "reply complete, log lines may follow"
    BROKEN = "not the doveadm protocol"


class ReplyStream:
    """What a doveadm-server sends to a client of one command, fed in pieces of any size.

    Log lines that belong to the command may come after its reply (each channel has a buffer of its own),
    so the reply is taken when the stream has ended: `finish`.
    """

    def __init__(self) -> None:
        self.state = State.HANDSHAKE
        self.problem = ""
        self._greeting = bytearray()
        self._minor: Optional[int] = None
        self._header = bytearray()
        self._channel = _REPLY_CHANNEL
        self._left = 0
        self._reply = bytearray()
        self._searched = 0
        self._output: Optional[tuple[str, ...]] = None
        self._exit_code: Optional[int] = None
        self._log = LogTail()
        self._log_lines = LineSplitter(LOG_LINE_LIMIT)

    def feed(self, data: bytes) -> State:
        """Take what was read; answers the state that follows from all bytes so far."""
        rest = data
        while rest and self.state is State.HANDSHAKE:
            rest = self._feed_handshake(rest)
        while rest and self.state in (State.READY, State.REPLIED):
            rest = self._feed_packet(rest)
        return self.state

    def finish(self) -> Reply:
        """The reply, or why there is none, now that nothing more will come."""
        if self._log_lines.rest():
            self._add_log_line(self._log_lines.rest())
            self._log_lines = LineSplitter(LOG_LINE_LIMIT)
        if self._exit_code is not None:
            return Reply(self._exit_code, self._output or (), self._log.lines())
        return Reply(None, log=self._log.lines(), failure=self._failure())

    def _failure(self) -> str:
        if self.state is State.BROKEN:
            return f"protocol error: {self.problem}"
        new = self._minor is not None and self._minor >= _FIRST_MINOR_OF_24
        return DIED if new and self.state is State.READY else DISCONNECTED

    def _break(self, problem: str) -> None:
        self.state = State.BROKEN
        self.problem = problem
        self._reply.clear()

    def _feed_handshake(self, data: bytes) -> bytes:
        before, newline, rest = data.partition(b"\n")
        if len(self._greeting) + len(before) > _HANDSHAKE_LINE_LIMIT:
            self._break("endless line in the handshake")
            return b""
        self._greeting += before
        if newline:
            self._handle_greeting(bytes(self._greeting))
            self._greeting.clear()
        return rest

    def _handle_greeting(self, line: bytes) -> None:
        if self._minor is None:
            version = _VERSION.fullmatch(line)
            if version is None:
                self._break(f"unexpected greeting {_excerpt(line)}")
            else:
                self._minor = int(version[1])
        elif line == b"+":
            self.state = State.READY
        elif line == b"-":
            self.state = State.PASSWORD
        else:
            self._break(f"unexpected line in the handshake: {_excerpt(line)}")

    def _feed_packet(self, data: bytes) -> bytes:
        if not self._left:
            wanted = _PACKET_HEADER - len(self._header)
            self._header += data[:wanted]
            if len(self._header) == _PACKET_HEADER:
                self._channel = self._header[0]
                self._left = int.from_bytes(self._header[1:], "big")
                self._header.clear()
            return data[wanted:]
        payload = data[: self._left]
        self._left -= len(payload)
        if self._channel == _LOG_CHANNEL:
            for line in self._log_lines.feed(payload):
                self._add_log_line(line)
        elif self._channel == _REPLY_CHANNEL and self.state is State.READY:
            self._feed_reply(payload)
        return data[len(payload) :]

    def _add_log_line(self, line: bytes) -> None:
        if not line:
            return
        known = 1 <= line[0] <= len(_LEVELS)
        level = _LEVELS[line[0] - 1] if known else "warning"
        self._log.add(LogLine(level, line[1:].decode("utf-8", "surrogateescape")))

    def _feed_reply(self, payload: bytes) -> None:
        self._reply += payload
        if self._output is None:
            end = self._reply.find(b"\n", self._searched)
            if end < 0:
                self._searched = len(self._reply)
                if self._searched > OUTPUT_LIMIT:
                    self._break(f"output of more than {OUTPUT_LIMIT} bytes")
                return
            self._take_output(bytes(self._reply[:end]))
            del self._reply[: end + 1]
        if self.state is State.READY:
            self._look_for_word()

    def _take_output(self, printed: bytes) -> None:
        if len(printed) > OUTPUT_LIMIT:
            self._break(f"output of more than {OUTPUT_LIMIT} bytes")
            return
        *values, rest = printed.split(b"\t")
        # The server's "user" command prints one JSON object, which nothing ends.
        self._output = tuple(unescape(value) for value in ([*values, rest] if rest else values))

    def _look_for_word(self) -> None:
        line, newline, _ = bytes(self._reply[: _WORD_LIMIT + 1]).partition(b"\n")
        if not newline:
            if len(line) > _WORD_LIMIT:
                self._break("endless reply word")
            return
        if line.startswith(b"+"):
            self._exit_code = 0
        elif line.startswith(b"-"):
            self._exit_code = EXIT_CODES.get(line[1:].split(b" ")[0], EXIT_UNKNOWN)
        else:
            self._break(f"unexpected reply word {_excerpt(line)}")
            return
        self.state = State.REPLIED
        self._reply.clear()


def parse_stderr_line(line: bytes) -> Optional[LogLine]:
    """What the doveadm program logged, None for an empty line. As over the socket, the prefix stays in the
    text and the word of the level does not; a line without such a word (usage, a remote shell) is "info"."""
    text = line.decode("utf-8", "surrogateescape").rstrip("\r")
    if not text:
        return None
    found = _LEVEL_WORD.match(text)
    if found is None:
        return LogLine("info", text)
    return LogLine(found["level"].lower(), found["prefix"] + found["text"])


_VERSION = re.compile(rb"VERSION\tdoveadm-client\t1\t(\d{1,9})")
_LEVEL_WORD = re.compile(
    r"(?P<prefix>|.*?: )(?P<level>Debug|Info|Warning|Error|Fatal|Panic): (?P<text>.*)", re.DOTALL
)


def _excerpt(data: bytes) -> str:
    return repr(data[:60])[1:]
