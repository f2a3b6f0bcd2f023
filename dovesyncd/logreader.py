"""Reads what is new in a user's logs. Names below a mail root are the user's: no link is followed,
nothing but a regular file is opened, and nothing blocks."""

from __future__ import annotations

import contextlib
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Optional

from dovesyncd.core import classify, mailboxlog, translog
from dovesyncd.core.classify import News
from dovesyncd.core.model import ChangeKind, LogPosition

INDEX_LOG = b"dovecot.index.log"
INDEX_LOG_2 = b"dovecot.index.log.2"
MAILBOX_LOG = b"dovecot.mailbox.log"
MAILBOX_LOG_2 = b"dovecot.mailbox.log.2"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CHUNK = 1 << 20
# Dovecot rotates at 1 MiB; a record is never larger than a small multiple of that.
_MAX_PENDING = 64 << 20


class Reading(NamedTuple):
    """The news found, the position behind them, and what was wrong with the log, "" if nothing."""

    news: News
    position: LogPosition
    trouble: str = ""


_NOTHING = News(frozenset())
_GAP = News(frozenset({ChangeKind.LOG_GAP}))


@contextlib.contextmanager
def open_directory(root: str, relative: bytes = b"") -> Iterator[int]:
    """A descriptor of the directory ``relative`` to the absolute ``root``. No component below the root may
    be a link, nor the root itself. If ``relative`` is absolute, it is the root. Raises OSError."""
    if relative.startswith(b"/"):
        root, relative = os.fsdecode(relative), b""
    with contextlib.ExitStack() as opened:
        fd = os.open(root, _DIRECTORY)
        opened.callback(os.close, fd)
        for name in relative.split(b"/") if relative else ():
            fd = opened.enter_context(open_below(fd, name))
        yield fd


@contextlib.contextmanager
def open_below(directory_fd: int, name: bytes) -> Iterator[int]:
    """A descriptor of the directory ``name`` in another one. Raises OSError, also if it is a link."""
    fd = os.open(name, _DIRECTORY, dir_fd=directory_fd)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _open_log(directory_fd: int, name: bytes) -> Iterator[Optional[int]]:
    """A descriptor of the log; None if there is no regular file of that name."""
    try:
        fd = os.open(name, _FILE, dir_fd=directory_fd)
    except OSError:
        yield None
        return
    try:
        yield fd if stat.S_ISREG(os.fstat(fd).st_mode) else None
    finally:
        os.close(fd)


def inode(directory_fd: int, name: bytes) -> Optional[int]:
    """The inode number of a directory's entry; None if there is none."""
    try:
        return os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_ino
    except OSError:
        return None


def unchanged(directory_fd: int, position: LogPosition) -> bool:
    """Whether the index log is still the file of ``position`` and ends there."""
    try:
        status = os.stat(INDEX_LOG, dir_fd=directory_fd, follow_symlinks=False)
    except OSError:
        return False
    return status.st_ino == position.inode and status.st_size == position.offset


def read_index_log(directory_fd: int, position: Optional[LogPosition]) -> Optional[Reading]:
    """What happened in a mailbox since ``position``, or ever if that is None.

    None while there is no log with a whole header. If the log was rotated, the rest of its predecessor is
    read first; where records may be missing between the two, or can't be read, the news are a gap.
    """
    with _open_log(directory_fd, INDEX_LOG) as fd:
        if fd is None:
            return None
        status = os.fstat(fd)
        header = translog.parse_header(os.pread(fd, 64, 0))
        if header is None:
            return None
        if isinstance(header, translog.Unreadable):
            return _unreadable(status, position, header.why)
        if status.st_size < header.size:
            return None
        if (
            position is not None
            and (position.inode, position.indexid, position.file_seq)
            == (status.st_ino, header.indexid, header.file_seq)
            and position.offset <= status.st_size
        ):
            return _read_from(fd, status, header, position.offset, position.digest)
        before = _NOTHING if position is None else _rest_of_previous(directory_fd, header, position)
        reading = _read_from(fd, status, header, header.size, zlib.crc32(os.pread(fd, header.size, 0)))
        return reading._replace(news=before | reading.news)


def is_continued(directory_fd: int, position: LogPosition) -> bool:
    """Whether the index log begins with the very bytes that led to ``position``: the same mailbox under
    another name. Creation times are too coarse to tell, and inodes are used again."""
    with _open_log(directory_fd, INDEX_LOG) as fd:
        if fd is None or os.fstat(fd).st_ino != position.inode or os.fstat(fd).st_size < position.offset:
            return False
        digest = 0
        for start in range(0, position.offset, _CHUNK):
            digest = zlib.crc32(os.pread(fd, min(_CHUNK, position.offset - start), start), digest)
        return digest == position.digest


def _rest_of_previous(directory_fd: int, header: translog.Header, position: LogPosition) -> News:
    """What the rotated log holds behind ``position``; a gap if that is not the log before ``header``'s."""
    if header.prev_file_seq != position.file_seq or header.indexid != position.indexid:
        return _GAP
    if header.prev_file_offset == position.offset:
        return _NOTHING
    with _open_log(directory_fd, INDEX_LOG_2) as fd:
        if fd is None:
            return _GAP
        previous = translog.parse_header(os.pread(fd, 64, 0))
        if (
            not isinstance(previous, translog.Header)
            or (previous.indexid, previous.file_seq) != (position.indexid, position.file_seq)
            or position.offset > os.fstat(fd).st_size
        ):
            return _GAP
        return _read_from(fd, os.fstat(fd), previous, position.offset, position.digest).news


def _read_from(fd: int, status: os.stat_result, header: translog.Header, offset: int, digest: int) -> Reading:
    """Reads whole records from ``offset`` to the end, in chunks that grow only for a larger record."""
    news = _NOTHING
    chunk = _CHUNK
    while True:
        data = os.pread(fd, chunk, offset)
        scan = translog.scan(data, offset)
        news |= classify.changes(scan.records)
        if scan.corrupt:
            return _corrupt(fd, status, header, news, scan.corrupt)
        digest = zlib.crc32(data[: scan.end - offset], digest)
        if len(data) < chunk:
            break
        if scan.end == offset:
            if chunk >= _MAX_PENDING:
                return _corrupt(fd, status, header, news, f"endless record at offset {offset}")
            chunk *= 2
        offset = scan.end
    return Reading(news, LogPosition(status.st_ino, header.indexid, header.file_seq, scan.end, digest))


def _corrupt(fd: int, status: os.stat_result, header: translog.Header, news: News, why: str) -> Reading:
    """Nothing can be read behind the bad record in this file: the position is its end, a gap the news."""
    size = os.fstat(fd).st_size
    position = LogPosition(status.st_ino, header.indexid, header.file_seq, size, 0)
    return Reading(news | _GAP, position, why)


def _unreadable(status: os.stat_result, position: Optional[LogPosition], why: str) -> Reading:
    """A file that can't be parsed at all: any growth of it counts as a change."""
    here = LogPosition(status.st_ino, 0, 0, status.st_size, 0)
    if here == position:
        return Reading(_NOTHING, here)
    return Reading(_GAP, here, why)


def read_mailbox_log(
    directory_fd: int, positions: Mapping[bytes, LogPosition]
) -> tuple[frozenset[ChangeKind], dict[bytes, LogPosition]]:
    """What happened to a user's tree of mailboxes since ``positions``, which are by file name, and the new
    ones. Both files are looked at: for a minute after a rotation some processes still write to the older."""
    known = {position.inode: position.offset for position in positions.values()}
    kinds: frozenset[ChangeKind] = frozenset()
    found: dict[bytes, LogPosition] = {}
    for name in (MAILBOX_LOG, MAILBOX_LOG_2):
        with _open_log(directory_fd, name) as fd:
            if fd is None:
                continue
            status = os.fstat(fd)
            start = known.get(status.st_ino, 0)
            if start > status.st_size:
                start = 0
            scan = mailboxlog.scan(os.pread(fd, _CHUNK, start), start)
            kinds |= scan.kinds
            found[name] = LogPosition(status.st_ino, 0, 0, scan.end, 0)
    return kinds, found
