"""What the targets begin with, and how an input of theirs is taken apart.

An input for the logs is ``cut cut length older newer``: two places at which the writing of each log pauses,
the size of the rotated log, and the bytes of both. The other inputs are a place and the bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from tests.core.logdata import VERSIONS, cases, transaction_logs

_LOGS = struct.Struct("<HHI")
_CUT = struct.Struct("<H")


def pack_logs(older: bytes, newer: bytes, *cuts: int) -> bytes:
    return _LOGS.pack(*cuts, len(older)) + older + newer


def unpack_logs(data: bytes) -> tuple[bytes, bytes, list[int]]:
    """The older log, the newer one, and the places. What is too short is padded."""
    one, other, length = _LOGS.unpack(data[: _LOGS.size].ljust(_LOGS.size, b"\0"))
    logs = data[_LOGS.size :]
    return logs[:length], logs[length:], [one, other]


def unpack(data: bytes) -> tuple[bytes, list[int]]:
    return data[_CUT.size :], list(_CUT.unpack(data[: _CUT.size].ljust(_CUT.size, b"\0")))


def logs() -> Iterator[bytes]:
    for case in transaction_logs():
        data = case.file.read_bytes()
        yield pack_logs(data, b"", len(data) // 3, 0)
        yield pack_logs(b"", data, 0, 0)
    for version in VERSIONS:
        pair = {
            case.path: case.data for case in cases(version=version, row="rotation", side="a", phase="action")
        }
        (after,) = cases(version=version, row="after-rotation", side="a", phase="action")
        for older in pair.values():
            yield pack_logs(older, after.data, 100, len(older) - 40)
    for data in {case.file.read_bytes() for case in cases(kind="mailbox")}:
        yield pack_logs(data, b"", 25, 50)


READY = b"VERSION\tdoveadm-client\t1\t2\n+\n"


def doveadm_wire() -> Iterator[bytes]:
    for place, data in enumerate(
        (
            READY + b"\0\0\0\0\x0eAQAAAHm4+Jk=\t\n\0\0\0\0\x02+\n",
            READY + b"L\0\0\0\x0b\x04some text\n\0\0\0\0\x09\n-NOUSER\n",
            READY + b'\0\0\0\0\x1c{"userList":["ann","bob"]}\n+\n',
            READY + b"L\0\0\0\x03\x03ab\0\0\0\0\x05a\x01tb\t\0\0\0\0\x03\n+\nL\0\0\0\x02c\n",
            READY[:-2] + b"-\n",
            b"VERSION\tdoveadm-client\t1\t3\n+\n\0\xff\xff\xff\xffa",
            b"ann\tsync\t-1\x01",
        )
    ):
        yield _CUT.pack(place * 9) + data


def userdb_wire() -> Iterator[bytes]:
    for data in (
        b'{"userList":["ann","b\\u00fcb","\\ud800"]}',
        b'{"ann":{"uid":"1000","gid":"8","home":"/home/ann"},"bob":{"error":"no"}}',
        b'{"ann":{"uid":1,"home":null,"x":[{"y":1e9}]}}',
        b"field\tvalue\nuid\t1\ngid\t2\nhome\t/h\nmail\tx\n\nuserdb lookup: user bob doesn't exist\n",
        b"user\tann@example.com\nuid\t1\nhome\t/h\nuser\tbob\nuid\t2\nhome\t/b\n",
        b"ann\nbob\nann@example.com\n",
    ):
        yield _CUT.pack(3) + data


SEEDS: dict[str, Callable[[], Iterator[bytes]]] = {
    "logs": logs,
    "doveadm_wire": doveadm_wire,
    "userdb_wire": userdb_wire,
}
