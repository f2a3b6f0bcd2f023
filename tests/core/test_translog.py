"""The reader of the transaction log against ``doveadm dump`` of real logs, and every truncation of them."""

from __future__ import annotations

import os
import random
import struct

import pytest

from dovesyncd.core import translog
from dovesyncd.core.translog import Header, Unreadable
from tests.core import logdata

# As doveadm dump names them (src/doveadm/doveadm-dump-log.c).
NAMES = {
    translog.EXPUNGE: "expunge",
    translog.APPEND: "append",
    translog.FLAG_UPDATE: "flag-update",
    translog.HEADER_UPDATE: "header-update",
    translog.EXT_INTRO: "ext-intro",
    translog.EXT_RESET: "ext-reset",
    translog.EXT_HDR_UPDATE: "ext-hdr",
    translog.EXT_REC_UPDATE: "ext-rec",
    translog.KEYWORD_UPDATE: "keyword-update",
    translog.KEYWORD_RESET: "keyword-reset",
    translog.EXT_ATOMIC_INC: "ext-atomic-inc",
    translog.EXPUNGE_GUID: "expunge-guid",
    translog.MODSEQ_UPDATE: "modseq-update",
    translog.EXT_HDR_UPDATE32: "ext-hdr32",
    translog.INDEX_DELETED: "index-deleted",
    translog.INDEX_UNDELETED: "index-undeleted",
    translog.BOUNDARY: "boundary",
    translog.ATTRIBUTE_UPDATE: "attribute-update",
}
LOGS = logdata.transaction_logs()
assert LOGS


def by_name(case: logdata.LogCase) -> str:
    return f"{case.version}-{case.file.name}"


def record(kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    return size_field(8 + len(body)) + struct.pack("=I", kind | flags) + body


def size_field(size: int) -> bytes:
    units = size >> 2
    return bytes(0x80 | units >> shift & 0x7F for shift in (21, 14, 7, 0))


@pytest.mark.parametrize("case", LOGS, ids=by_name)
def test_reads_what_doveadm_dump_reads(case: logdata.LogCase) -> None:
    data = case.file.read_bytes()
    dump = logdata.parse_dump(case.file.with_name(f"{case.file.name}.dump").read_text())
    header = translog.parse_header(data)
    assert header == Header(
        1,
        3,
        dump.header.hdr_size,
        dump.header.indexid,
        dump.header.file_seq,
        dump.header.prev_file_seq,
        dump.header.prev_file_offset,
    )
    scan = translog.scan(data[header.size :], header.size)
    assert scan.corrupt == ""
    assert scan.end == len(data)
    assert [(r.offset, r.size, NAMES[r.type], r.external, r.sync) for r in scan.records] == [
        (r.offset, r.size, r.type, r.external, r.sync) for r in dump.records
    ]
    assert all(len(r.body) == r.size - 8 for r in scan.records)


@pytest.mark.parametrize("case", LOGS, ids=by_name)
def test_read_byte_by_byte(case: logdata.LogCase) -> None:
    """Every truncation, each resumed where the one before ended: nothing twice, nothing lost."""
    data = case.file.read_bytes()
    pos = size = translog.parse_header(data).size
    records = []
    for cut in range(size, len(data) + 1):
        scan = translog.scan(data[pos:cut], pos)
        assert scan.corrupt == ""
        records += scan.records
        pos = scan.end
    assert records == translog.scan(data[size:], size).records


@pytest.mark.parametrize("case", LOGS, ids=by_name)
def test_truncations_read_from_the_start(case: logdata.LogCase) -> None:
    data = case.file.read_bytes()
    size = translog.parse_header(data).size
    whole = translog.scan(data[size:], size).records
    for cut in range(size, len(data), max(1, len(data) // 50)):
        scan = translog.scan(data[size:cut], size)
        assert scan.corrupt == ""
        assert scan.records == whole[: len(scan.records)]
        assert scan.end <= cut


@pytest.mark.parametrize("length", range(translog.HEADER_MIN_SIZE))
def test_a_header_is_not_there_until_it_is_whole(length: int) -> None:
    assert translog.parse_header(LOGS[0].file.read_bytes()[:length]) is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({0: b"\x02"}, "format version 2.3 is not 1.x"),
        ({2: b"\x10\x00"}, "header size 16 is impossible"),
        ({2: b"\x29\x00"}, "header size 41 is impossible"),
        ({4: b"\0\0\0\0"}, "Dovecot marked the log as corrupted"),
    ],
)
def test_unusable_headers(changed: dict[int, bytes], why: str) -> None:
    data = bytearray(LOGS[0].file.read_bytes()[:40])
    for at, new in changed.items():
        data[at : at + len(new)] = new
    assert translog.parse_header(bytes(data)) == Unreadable(why)


def test_a_newer_minor_version_is_read() -> None:
    data = bytearray(LOGS[0].file.read_bytes()[:40])
    data[1] = 9
    assert isinstance(translog.parse_header(bytes(data)), Header)


APPEND = record(translog.APPEND, b"\1\0\0\0\0\0\0\0", 0x10000000)


@pytest.mark.parametrize(
    ("data", "records", "end", "corrupt"),
    [
        (b"", 0, 100, False),
        (APPEND, 1, 116, False),
        (APPEND + APPEND[:7], 1, 116, False),
        # The size is written last: while its bytes lack the high bit there is no record.
        (APPEND + b"\0\0\0\x04" + APPEND[4:], 1, 116, False),
        (APPEND + b"\x80\x80\x80\x04" + APPEND[4:], 1, 116, False),
        (APPEND + size_field(4) + APPEND[4:], 1, 116, True),
        (APPEND + size_field(0) + APPEND[4:], 1, 116, False),
        # No record has no type, two types, or an expunge without its protection.
        (record(0, b"1234"), 0, 100, True),
        (record(translog.APPEND | translog.KEYWORD_UPDATE, b"1234"), 0, 100, True),
        (record(translog.EXPUNGE, b"12345678"), 0, 100, True),
        (record(translog.EXPUNGE_GUID, b"12345678"), 0, 100, True),
        # A type bit that this version does not know.
        (record(0x00200000, b"1234"), 1, 112, False),
        # A transaction counts when all of it is there.
        (record(translog.BOUNDARY, struct.pack("=I", 12 + 16)) + APPEND, 2, 128, False),
        (record(translog.BOUNDARY, struct.pack("=I", 12 + 17)) + APPEND, 0, 100, False),
        (record(translog.BOUNDARY), 0, 100, True),
    ],
)
def test_three_answers(data: bytes, records: int, end: int, corrupt: bool) -> None:
    scan = translog.scan(data, 100)
    assert (len(scan.records), scan.end, bool(scan.corrupt)) == (records, end, corrupt)


def test_the_largest_size() -> None:
    assert translog.record_size(size_field(0x3FFFFFFC), 0) == 0x3FFFFFFC


def test_damaged_logs_never_raise() -> None:
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print(f"seed {seed}")
    rng = random.Random(seed)
    for case in LOGS:
        data = bytearray(case.file.read_bytes())
        for _ in range(20):
            data[rng.randrange(len(data))] = rng.randrange(256)
            header = translog.parse_header(bytes(data))
            assert header is not None
            scan = translog.scan(bytes(data[40:]), 40)
            assert 40 <= scan.end <= len(data)
            assert sum(r.size for r in scan.records) == scan.end - 40
