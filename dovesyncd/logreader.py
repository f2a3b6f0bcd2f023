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
_FOUND = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_CHUNK = 1 << 20
# How much is read at once. Dovecot rotates at 1 MiB.
_MAX_PENDING = translog.MAX_SIZE
_MARK = 1 << 62


class Reading(NamedTuple):
    """The news found, the position behind them, and what was wrong with the log, "" if nothing."""

    news: News
    position: LogPosition
    trouble: str = ""


_NOTHING = News(frozenset())
_GAP = News(frozenset({ChangeKind.LOG_GAP}))


@contextlib.contextmanager
def open_directory(root: str, relative: bytes = b"", home: str = "") -> Iterator[int]:
    """A descriptor of the directory ``relative`` to the absolute ``root``. No component below the root may
    be a link, nor the root itself, nor any between the ``home`` of its user, who can change them, and the
    root. If ``relative`` is absolute, it is the root. Raises OSError."""
    if relative.startswith(b"/"):
        root, relative = os.fsdecode(relative), b""
    above, below = _parted(root, home)
    with contextlib.ExitStack() as opened:
        # Whoever administers the machine may have made links above a home, or of one.
        fd = os.open(above, _DIRECTORY & ~os.O_NOFOLLOW if below else _DIRECTORY)
        opened.callback(os.close, fd)
        for name in (*below, *(relative.split(b"/") if relative else ())):
            fd = opened.enter_context(open_below(fd, name))
        yield fd


@contextlib.contextmanager
def open_parent(path: str, home: str) -> Iterator[int]:
    """A descriptor of a directory in which something is expected. Below ``home`` no link is followed; above
    it only administrators can make one. Raises OSError."""
    if path.startswith(home + "/"):
        with open_directory(path, b"", home) as fd:
            yield fd
        return
    fd = os.open(path, _DIRECTORY & ~os.O_NOFOLLOW)
    try:
        yield fd
    finally:
        os.close(fd)


def _parted(root: str, home: str) -> tuple[str, list[bytes]]:
    """``root`` as what is to be opened at once, and the components below that."""
    prefix = home.rstrip("/") + "/"
    if not home or not root.startswith(prefix):
        return root, []
    return prefix, [name for name in os.fsencode(root[len(prefix) :]).split(b"/") if name]


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
    """A descriptor of the log; None if there is no regular file of that name. What is none is not even
    opened: that would wake the other end of a FIFO, or a device."""
    fd = None
    try:
        found = os.open(name, _FOUND, dir_fd=directory_fd)
        try:
            if stat.S_ISREG(os.fstat(found).st_mode):
                fd = os.open(f"/proc/self/fd/{found}", _FILE)
        finally:
            os.close(found)
    except OSError:
        pass
    try:
        yield fd
    finally:
        if fd is not None:
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
    return (status.st_ino, status.st_size) == (position.inode, position.offset) and (
        not _is_mark(position.digest) or position.digest == _mark(status)
    )


def read_index_log(directory_fd: int, position: Optional[LogPosition]) -> Optional[Reading]:
    """What happened in a mailbox since ``position``, or ever if that is None.

    None while there is no log with a whole header. If the log was rotated, the rest of its predecessor is
    read first; where records may be missing between the two, or can't be read, the news are a gap. A log
    that can't be read on is never read again: each change of the file is a gap, until there is another one.
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
            if _is_mark(position.digest):
                return _changed(status, position)
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
        if _is_mark(position.digest) or position.offset > _MAX_PENDING:
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
        if fd is None or _is_mark(position.digest):
            return _GAP
        status = os.fstat(fd)
        previous = translog.parse_header(os.pread(fd, 64, 0))
        if (
            not isinstance(previous, translog.Header)
            or (previous.indexid, previous.file_seq) != (position.indexid, position.file_seq)
            or position.offset > status.st_size
        ):
            return _GAP
        rest = _read_from(fd, status, previous, position.offset, position.digest)
        # What is not whole in a log that was rotated never will be.
        return rest.news if rest.position.offset >= header.prev_file_offset else rest.news | _GAP


def _read_from(fd: int, status: os.stat_result, header: translog.Header, offset: int, digest: int) -> Reading:
    """Reads whole records from ``offset`` to the end, in chunks that grow only for a larger record."""
    news = _NOTHING
    if status.st_size - offset > _MAX_PENDING:
        return _corrupt(fd, header, news, f"more than {_MAX_PENDING} bytes at offset {offset}")
    chunk = _CHUNK
    # What is written meanwhile has an event of its own.
    while True:
        data = os.pread(fd, min(chunk, status.st_size - offset), offset)
        scan = translog.scan(data, offset)
        news |= classify.changes(scan.records)
        if scan.corrupt:
            return _corrupt(fd, header, news, scan.corrupt)
        digest = zlib.crc32(data[: scan.end - offset], digest)
        if len(data) < chunk:
            break
        if scan.end == offset:
            chunk *= 2
        offset = scan.end
    return Reading(news, LogPosition(status.st_ino, header.indexid, header.file_seq, scan.end, digest))


def _mark(status: os.stat_result) -> int:
    """In place of the digest of a log that can't be read on: its time of modification. That is larger than
    any CRC-32, and fits into 64 bits whatever time a user has given the file."""
    return _MARK | (status.st_mtime_ns & (_MARK - 1))


def _is_mark(digest: int) -> bool:
    return digest >= _MARK


def _corrupt(fd: int, header: translog.Header, news: News, why: str) -> Reading:
    """Nothing can be read behind the bad record in this file: nobody knows where the next one begins."""
    status = os.fstat(fd)
    position = LogPosition(status.st_ino, header.indexid, header.file_seq, status.st_size, _mark(status))
    return Reading(news | _GAP, position, why)


def _unreadable(status: os.stat_result, position: Optional[LogPosition], why: str) -> Reading:
    """A file that can't be parsed at all. Of several in a row, as a Dovecot with another format rotates
    them, only the first one's trouble is told."""
    unread = position if position is not None and position.indexid == 0 else None
    if unread is not None and unread.inode == status.st_ino:
        return _changed(status, unread)
    here = LogPosition(status.st_ino, 0, 0, status.st_size, _mark(status))
    return Reading(_GAP, here, why if unread is None else "")


def _changed(status: os.stat_result, position: LogPosition) -> Reading:
    """The same file again, which can't be read on: whether it is as it was."""
    here = position._replace(offset=status.st_size, digest=_mark(status))
    return Reading(_NOTHING if here == position else _GAP, here)


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
