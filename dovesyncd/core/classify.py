"""Which records of a transaction log are news: made by a user or a delivery, and of interest to the peer.

Every dsync, even one that changes nothing, writes into the logs of both sides. What it applied carries
MAIL_TRANSACTION_SYNC; what it and Dovecot note for themselves is of other types. Neither makes a job, or
two nodes would wake each other for ever.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from dovesyncd.core import translog
from dovesyncd.core.model import ChangeKind
from dovesyncd.core.translog import Record

# type: (the change it means, whether it counts with the EXTERNAL flag too).
# An expunge without EXTERNAL is the request; with it, the note that the mail is gone, which dsync's
# expunges leave as well (and without SYNC).
_NEWS = {
    translog.APPEND: (ChangeKind.NEW_MAIL, True),
    translog.FLAG_UPDATE: (ChangeKind.FLAGS, True),
    translog.KEYWORD_UPDATE: (ChangeKind.KEYWORDS, True),
    translog.KEYWORD_RESET: (ChangeKind.KEYWORDS, True),
    translog.EXPUNGE: (ChangeKind.EXPUNGE, False),
    translog.EXPUNGE_GUID: (ChangeKind.EXPUNGE, False),
}

_NOT_NEWS = frozenset(
    {
        # Bookkeeping.
        translog.HEADER_UPDATE,
        translog.EXT_INTRO,
        translog.EXT_RESET,
        translog.EXT_HDR_UPDATE,
        translog.EXT_HDR_UPDATE32,
        translog.EXT_REC_UPDATE,
        translog.EXT_ATOMIC_INC,
        translog.MODSEQ_UPDATE,
        translog.INDEX_DELETED,
        translog.INDEX_UNDELETED,
        translog.BOUNDARY,
        # News, but by ``unconfirmed``.
        translog.ATTRIBUTE_UPDATE,
    }
)

# struct mail_transaction_flag_update: uid1, uid2, add_flags, remove_flags, modseq_inc_flag, padding
_FLAG_UPDATE = struct.Struct("=IIBBBx")
# The flags that clients see: ANSWERED, FLAGGED, DELETED, SEEN, DRAFT (lib-mail/mail-types.h). The bits
# above are the index's own (MAIL_INDEX_MAIL_FLAG_DIRTY and so on).
_CLIENT_FLAGS = 0x1F


class News(NamedTuple):
    """``kinds`` is what happened. ``attributes`` are the names in attribute updates, in order, each with
    whether the record carried SYNC: what they mean takes more than one record, see ``unconfirmed``."""

    kinds: frozenset[ChangeKind]
    attributes: tuple[tuple[bytes, bool], ...] = ()

    def __or__(self, later: object) -> News:
        if not isinstance(later, News):
            return NotImplemented
        return News(self.kinds | later.kinds, self.attributes + later.attributes)


def changes(records: Iterable[Record]) -> News:
    """The news among ``records``. A record of a type that this version of the format does not have is
    taken for news: an extra sync costs little, a missed change much."""
    kinds = set()
    attributes: list[tuple[bytes, bool]] = []
    for record in records:
        if record.type == translog.ATTRIBUTE_UPDATE:
            attributes += [(name, record.sync) for name in _attribute_names(record.body)]
        kind = _change(record)
        if kind is not None:
            kinds.add(kind)
    return News(frozenset(kinds), tuple(attributes))


def unconfirmed(before: Iterable[bytes], attributes: Iterable[tuple[bytes, bool]]) -> tuple[bytes, ...]:
    """The attribute updates that no dsync has claimed, out of those from ``before`` and new ones.

    When dsync applies a Sieve script, Pigeonhole writes a record for the attribute without SYNC, and
    dsync a moment later its own with SYNC (2.3.19, 2.4.1): each of the latter takes back one of the
    former. What is left after that moment was changed by a user.
    """
    left = Counter(before)
    for name, sync in attributes:
        if not sync:
            left[name] += 1
        elif left[name]:
            left[name] -= 1
    return tuple(left.elements())


def _attribute_names(body: bytes) -> list[bytes]:
    """The names with their signs and scopes, like b"+pvendor/...", up to the empty one that ends them."""
    names, _, _ = body.partition(b"\0\0")
    return [name for name in names.split(b"\0") if name]


def _change(record: Record) -> ChangeKind | None:
    if record.sync or record.type in _NOT_NEWS:
        return None
    kind, even_external = _NEWS.get(record.type, (ChangeKind.LOG_GAP, True))
    if record.external and not even_external:
        return None
    if record.type == translog.FLAG_UPDATE and _is_internal(record.body):
        return None
    return kind


def _is_internal(body: bytes) -> bool:
    """Whether no entry of a flag update is visible to clients: MAIL_TRANSACTION_FLAG_UPDATE_IS_INTERNAL,
    lib-index/mail-index-private.h."""
    whole = len(body) - len(body) % _FLAG_UPDATE.size
    return whole > 0 and all(
        not (added | removed) & _CLIENT_FLAGS and not modseq
        for _, _, added, removed, modseq in _FLAG_UPDATE.iter_unpack(body[:whole])
    )
