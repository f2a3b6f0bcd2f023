"""What has to hold for any input whatever: each check feeds one parser and raises AssertionError if not.

``cuts`` are places at which the input is taken apart; a parser must not care how its input arrives.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Optional

from dovesyncd import logreader
from dovesyncd.core import classify, doveadm_wire, mailboxlog, translog, userdb_wire
from dovesyncd.core.doveadm_wire import LOG_EDGE, LOG_LINE_LIMIT, OUTPUT_LIMIT, ReplyStream, State
from dovesyncd.core.errors import DovecotError
from dovesyncd.core.model import ChangeKind, LogPosition, Reply
from dovesyncd.logreader import Reading


def ends(cuts: Iterable[int], size: int) -> list[int]:
    """The places in order, within the input, and its end."""
    return [*sorted(cut % (size + 1) for cut in cuts), size]


def pieces(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    start = 0
    for end in ends(cuts, len(data)):
        yield data[start:end]
        start = end


def encodable(text: str) -> bool:
    """Whether the text is bytes that were read, and so can be written again."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


# Logs -------------------------------------------------------------------------------------------------


def transaction_log(data: bytes, cuts: Iterable[int] = (), base: int = 0) -> None:
    header = translog.parse_header(data)
    if header is None:
        assert len(data) < translog.HEADER_MIN_SIZE
    elif isinstance(header, translog.Unreadable):
        assert header.why
    else:
        assert header.major == 1
        assert header.indexid
        assert header.size >= translog.HEADER_MIN_SIZE
        records(data[header.size :], header.size, cuts)
    records(data, base, cuts)


def records(data: bytes, base: int, cuts: Iterable[int]) -> None:
    scan = translog.scan(data, base)
    at = base
    for record in scan.records:
        assert (record.offset, record.size) == (at, 8 + len(record.body))
        assert 0 < record.type < 1 << 28
        at += record.size
    assert at == scan.end <= base + len(data)
    assert sum(len(record.body) for record in scan.records) <= len(data)
    news(classify.changes(scan.records))
    found: list[translog.Record] = []
    end, corrupt = base, ""
    for cut in ends(cuts, len(data)):
        part = translog.scan(data[end - base : max(cut, end - base)], end)
        found += part.records
        end, corrupt = part.end, part.corrupt
        if corrupt:
            break
    assert (found, end, corrupt) == scan


def news(found: classify.News) -> None:
    assert all(isinstance(kind, ChangeKind) for kind in found.kinds)
    left = classify.unconfirmed((), found.attributes)
    assert len(left) <= len(found.attributes)
    assert set(left) <= {name for name, sync in found.attributes if not sync}


def mailbox_log(data: bytes, cuts: Iterable[int] = (), base: int = 0) -> None:
    scan = mailboxlog.scan(data, base)
    assert base <= scan.end <= base + len(data) < scan.end + mailboxlog.RECORD_SIZE
    end = base
    kinds: frozenset[ChangeKind] = frozenset()
    for cut in ends(cuts, len(data)):
        part = mailboxlog.scan(data[end - base : max(cut, end - base)], end)
        kinds |= part.kinds
        end = part.end
    assert (kinds, end) == scan


def is_crc(position: LogPosition) -> bool:
    """Or else the log can't be read on."""
    return position.digest < 1 << 32


class LogFiles:
    """The life of one mailbox's log in a real directory, as `logreader` sees it: it grows, is rotated into
    ``.log.2``, and its successor grows."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._log = directory / "dovecot.index.log"
        self._fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self._fd)

    def live(self, older: bytes, newer: bytes, cuts: Sequence[int]) -> None:
        for name in os.listdir(self._fd):
            os.unlink(name, dir_fd=self._fd)
        position = self._grow(older, cuts, None)
        if newer:
            if older:
                self._log.rename(self._directory / "dovecot.index.log.2")
            position = self._grow(newer, cuts, position)
        self._whole(newer or older, position)

    def _grow(
        self, data: bytes, cuts: Sequence[int], position: Optional[LogPosition]
    ) -> Optional[LogPosition]:
        for piece in pieces(data, cuts):
            with open(self._log, "ab", buffering=0) as file:
                file.write(piece)
            reading = self._read(position)
            if reading is not None:
                position = reading.position
        return position

    def _read(self, position: Optional[LogPosition]) -> Optional[Reading]:
        """One reading. A second one, with nothing written in between, must find nothing."""
        reading = logreader.read_index_log(self._fd, position)
        if reading is None:
            return None
        status = os.stat(self._log)
        here = reading.position
        assert (here.inode, 0 <= here.offset <= status.st_size) == (status.st_ino, True)
        assert 0 <= here.digest < 1 << 63
        assert not reading.trouble or ChangeKind.LOG_GAP in reading.news.kinds
        assert logreader.unchanged(self._fd, here) == (here.offset == status.st_size)
        if is_crc(here):
            assert logreader.is_continued(self._fd, here)
        again = logreader.read_index_log(self._fd, here)
        assert again == (classify.News(frozenset()), here, "")
        news(reading.news)
        return reading

    def _whole(self, data: bytes, position: Optional[LogPosition]) -> None:
        """What was read in pieces ends where reading it at once does."""
        reading = self._read(None)
        if reading is None:
            header = translog.parse_header(data)
            assert header is None or (isinstance(header, translog.Header) and header.size > len(data))
        if reading is not None and position is not None and position.inode == reading.position.inode:
            assert is_crc(reading.position) == is_crc(position)
            if is_crc(position):
                assert reading.position == position


# What Dovecot says ------------------------------------------------------------------------------------

FINAL = (State.PASSWORD, State.REPLIED, State.BROKEN)


def fed(data: bytes, cuts: Iterable[int] = ()) -> tuple[State, Reply]:
    stream = ReplyStream()
    before = stream.state
    for piece in pieces(data, cuts):
        state = stream.feed(piece)
        assert isinstance(state, State)
        assert before not in FINAL or state is before
        before = state
        # Whatever the packets' lengths promise, this is all that is kept.
        assert len(stream._greeting) + len(stream._header) <= 2048
        assert len(stream._reply) <= OUTPUT_LIMIT + len(piece)
        assert len(stream._log_lines.rest()) <= LOG_LINE_LIMIT
    reply = stream.finish()
    assert stream.finish() == reply
    return stream.state, reply


def reply_stream(data: bytes, cuts: Iterable[int] = ()) -> None:
    state, reply = fed(data)
    assert fed(data, cuts) == (state, reply)
    assert (state is State.REPLIED) == (reply.exit_code is not None) == (reply.failure == "")
    assert len(reply.log) <= 2 * LOG_EDGE + 1
    assert all(len(line.text.encode("utf-8", "surrogateescape")) <= LOG_LINE_LIMIT for line in reply.log)
    assert sum(map(len, reply.output)) <= OUTPUT_LIMIT
    assert all(encodable(text) for text in (*reply.output, *(line.text for line in reply.log)))


def request(fields: Sequence[str]) -> None:
    """Flags, user, command, arguments: whatever is in them, the server finds them again, and no more."""
    flags, user, command, *args = fields
    line = doveadm_wire.request_line(flags, user, command, args)
    assert line.endswith(b"\n")
    assert not set(line[:-1].replace(b"\t", b"")) & set(b"\0\r\n")
    assert line.count(b"\t") == len(fields) - 1
    assert [doveadm_wire.unescape(field) for field in line[:-1].split(b"\t")] == list(fields)


def user_answers(text: str, names: Sequence[str]) -> None:
    """The answers to ``user``, over the socket (one value) and of the program (lines)."""
    for output in ((text,), tuple(text.split("\n"))):
        reply = Reply(0, output)
        with contextlib.suppress(DovecotError):
            assert all(encodable(name) for name in userdb_wire.parse_list(reply))
        found = userdb_wire.parse_lookup(reply, names)
        for name, fields in (found or {}).items():
            assert encodable(name)
            for key, value in fields.items():
                assert isinstance(value, str)
                assert encodable(key)
                assert encodable(value)
        assert userdb_wire.words(reply)
