"""The state that ``doveadm sync -s`` prints and takes: what each mailbox was like when both sides were equal.

Base64 of a version (``01 00 00 00``), 44 bytes a mailbox, and their CRC-32 (src/doveadm/dsync/
dsync-mailbox-state.c, the same in 2.3 and 2.4). A mailbox that is not in it is compared mail by mail.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from typing import Optional

_VERSION = b"\x01\0\0\0"
_GUID_SIZE = 16
_ENTRY_SIZE = 44
_CRC_SIZE = 4


def parse(state: str) -> Optional[dict[bytes, bytes]]:
    """The entries by mailbox GUID; None if this is no state of the known version."""
    try:
        data = base64.b64decode(state, validate=True)
    except (binascii.Error, ValueError):
        return None
    entries, crc = data[:-_CRC_SIZE], data[-_CRC_SIZE:]
    if zlib.crc32(entries).to_bytes(_CRC_SIZE, "little") != crc or not entries.startswith(_VERSION):
        return None
    entries = entries[len(_VERSION) :]
    if len(entries) % _ENTRY_SIZE:
        return None
    return {
        entries[pos : pos + _GUID_SIZE]: entries[pos : pos + _ENTRY_SIZE]
        for pos in range(0, len(entries), _ENTRY_SIZE)
    }


def render(entries: dict[bytes, bytes]) -> str:
    data = _VERSION + b"".join(entries.values())
    return base64.b64encode(data + zlib.crc32(data).to_bytes(_CRC_SIZE, "little")).decode()


def equal(one: str, other: str) -> bool:
    """Whether both are states, of the same mailboxes in the same condition: nothing was synced in between."""
    entries = parse(one)
    return entries is not None and entries == parse(other)


# Of no mailbox at all: everything is compared mail by mail.
EMPTY = render({})


def common(one: str, other: str) -> str:
    """The state of the mailboxes for which both agree: what has changed between them is in none of it."""
    entries, others = parse(one), parse(other)
    if entries is None or others is None:
        return EMPTY
    return render({guid: entry for guid, entry in entries.items() if others.get(guid) == entry})
