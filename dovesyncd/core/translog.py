"""Dovecot's transaction log (``dovecot.index.log``): bytes in, records out.

Format 1.x, Dovecot lib-index/mail-transaction-log.h (2.3.19 to 2.4.4). There are three answers to
"what is at this offset": a record, not yet (Dovecot is still writing it), or corrupt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple, Optional

MAJOR_VERSION = 1
HEADER_MIN_SIZE = 24  # MAIL_TRANSACTION_LOG_HEADER_MIN_SIZE
RECORD_HEADER_SIZE = 8
# Of a record and of a transaction, in bytes. A log is rotated at 1 MiB, and even a transaction about each of
# several 100,000 mails is only a few times that; without a limit, "not yet" could be waited for for ever.
MAX_SIZE = 16 << 20

# enum mail_transaction_type
EXPUNGE = 0x00000001
APPEND = 0x00000002
FLAG_UPDATE = 0x00000004
HEADER_UPDATE = 0x00000020
EXT_INTRO = 0x00000040
EXT_RESET = 0x00000080
EXT_HDR_UPDATE = 0x00000100
EXT_REC_UPDATE = 0x00000200
KEYWORD_UPDATE = 0x00000400
KEYWORD_RESET = 0x00000800
EXT_ATOMIC_INC = 0x00001000
EXPUNGE_GUID = 0x00002000
MODSEQ_UPDATE = 0x00008000
EXT_HDR_UPDATE32 = 0x00010000
INDEX_DELETED = 0x00020000
INDEX_UNDELETED = 0x00040000
BOUNDARY = 0x00080000
ATTRIBUTE_UPDATE = 0x00100000

_TYPE_MASK = 0x0FFFFFFF
_EXPUNGE_PROT = 0x0000CD90
_EXTERNAL = 0x10000000
_SYNC = 0x20000000

# Multi-byte fields are in the byte order of the machine that wrote them, sizes excepted.
_HEADER = struct.Struct("=BBHIIII")
_UINT32 = struct.Struct("=I")


@dataclass(frozen=True)
class Header:
    """struct mail_transaction_log_header, as far as a reader needs it."""

    major: int
    minor: int
    size: int
    indexid: int
    file_seq: int
    prev_file_seq: int
    prev_file_offset: int


class Record(NamedTuple):
    """One record. ``type`` is without flags and without the expunge protection bits; ``body`` is what
    follows the 8-byte record header; ``offset`` and ``size`` (bytes, that header included) place it."""

    offset: int
    size: int
    type: int
    external: bool
    sync: bool
    body: bytes


class Scan(NamedTuple):
    """The whole records found, the offset behind the last one, and why reading stopped for good:
    "" means that the rest is not written yet."""

    records: list[Record]
    end: int
    corrupt: str


class Unreadable(NamedTuple):
    """A header that can't be used, and why."""

    why: str


def parse_header(data: bytes) -> Header | Unreadable | None:
    """Reads the header from the first bytes of a log; None if they are too few."""
    if len(data) < HEADER_MIN_SIZE:
        return None
    header = Header(*_HEADER.unpack_from(data))
    if header.major != MAJOR_VERSION:
        return Unreadable(f"format version {header.major}.{header.minor} is not {MAJOR_VERSION}.x")
    if header.size < HEADER_MIN_SIZE or header.size % 4:
        return Unreadable(f"header size {header.size} is impossible")
    if header.indexid == 0:
        return Unreadable("Dovecot marked the log as corrupted")
    return header


def record_size(raw: bytes, pos: int) -> int:
    """The size in bytes of the record at ``pos``, 0 while it is not written.

    lib-index/mail-index-util.c, mail_index_offset_to_uint32(): big-endian, seven bits a byte, the eighth
    always set, in units of four bytes.
    """
    b0, b1, b2, b3 = raw[pos : pos + 4]
    if not b0 & b1 & b2 & b3 & 0x80:
        return 0
    return ((b0 & 0x7F) << 21 | (b1 & 0x7F) << 14 | (b2 & 0x7F) << 7 | (b3 & 0x7F)) << 2


def scan(data: bytes, base: int) -> Scan:
    """Reads all whole records of ``data``, which starts at offset ``base`` of its file at a record boundary.

    A transaction announced by a boundary record counts as written only when all of it is there:
    Dovecot truncates an unfinished one away (mail_transaction_log_file_sync()).
    """
    records: list[Record] = []
    pos = 0
    while len(data) - pos >= RECORD_HEADER_SIZE:
        size = record_size(data, pos)
        if size == 0:
            break
        if not RECORD_HEADER_SIZE <= size <= MAX_SIZE:
            return Scan(records, base + pos, f"record of {size} bytes at offset {base + pos}")
        if size > len(data) - pos:
            break
        raw_type = _UINT32.unpack_from(data, pos + 4)[0]
        kind = _record_type(raw_type)
        if kind is None:
            return Scan(records, base + pos, f"record of type {raw_type:#x} at offset {base + pos}")
        body = data[pos + RECORD_HEADER_SIZE : pos + size]
        if kind == BOUNDARY:
            if len(body) < 4:
                return Scan(records, base + pos, f"short boundary at offset {base + pos}")
            announced = _UINT32.unpack_from(body)[0]
            if announced > MAX_SIZE:
                return Scan(records, base + pos, f"transaction of {announced} bytes at offset {base + pos}")
            if announced > len(data) - pos:
                break
        records.append(
            Record(base + pos, size, kind, bool(raw_type & _EXTERNAL), bool(raw_type & _SYNC), body)
        )
        pos += size
    return Scan(records, base + pos, "")


def _record_type(raw: int) -> Optional[int]:
    """The bare type; None for one that no version writes. A single unknown bit may be a later minor
    version's, which is allowed to add types."""
    kind = raw & _TYPE_MASK
    if kind in (EXPUNGE | _EXPUNGE_PROT, EXPUNGE_GUID | _EXPUNGE_PROT):
        return kind & ~_EXPUNGE_PROT
    if kind in (0, EXPUNGE, EXPUNGE_GUID) or kind & (kind - 1):
        return None
    return kind
