"""``dovecot.mailbox.log``: the changes to a user's tree of mailboxes.

24-byte records without a header, lib-index/mailbox-log.h (2.3.19 to 2.4.4): type, 3 bytes of padding,
GUID (16), time stamp (4, big-endian). The creation of a mailbox is not in it.
"""

from __future__ import annotations

from typing import NamedTuple

from dovesyncd.core.model import ChangeKind

RECORD_SIZE = 24

# enum mailbox_log_record_type; CREATE_DIR (6) is defined but never written.
_KIND = {
    1: ChangeKind.DELETE,
    2: ChangeKind.DELETE,
    3: ChangeKind.RENAME,
    4: ChangeKind.SUBSCRIBE,
    5: ChangeKind.UNSUBSCRIBE,
    6: ChangeKind.CREATE,
}


class MailboxLogScan(NamedTuple):
    """The kinds of changes found, and the offset behind the last whole record. A record of an unknown
    type counts as a gap: something happened, and only a comparison can say what."""

    kinds: frozenset[ChangeKind]
    end: int


def scan(data: bytes, base: int) -> MailboxLogScan:
    """Reads the whole records of ``data``, which starts at offset ``base`` of its file."""
    whole = len(data) - len(data) % RECORD_SIZE
    kinds = frozenset(_KIND.get(data[pos], ChangeKind.LOG_GAP) for pos in range(0, whole, RECORD_SIZE))
    return MailboxLogScan(kinds, base + whole)
