"""What is news and what is not: in tables, and in the recorded logs of real servers."""

from __future__ import annotations

import struct

import pytest

from dovesyncd.core import classify, mailboxlog, translog
from dovesyncd.core.model import ChangeKind, Priority
from dovesyncd.core.translog import Record
from tests.core import logdata

NEW_MAIL, FLAGS, KEYWORDS, EXPUNGE = (
    ChangeKind.NEW_MAIL,
    ChangeKind.FLAGS,
    ChangeKind.KEYWORDS,
    ChangeKind.EXPUNGE,
)


def flag_update(*entries: tuple[int, int, int]) -> bytes:
    """Entries of (added, removed, modseq_inc_flag)."""
    return b"".join(struct.pack("=IIBBBx", 1, 1, *entry) for entry in entries)


# type, body: news with no flag, EXTERNAL, SYNC
TABLE = [
    (translog.APPEND, b"", NEW_MAIL, NEW_MAIL),
    (translog.FLAG_UPDATE, flag_update((0x08, 0, 0)), FLAGS, FLAGS),
    (translog.FLAG_UPDATE, flag_update((0, 0x10, 0)), FLAGS, FLAGS),
    (translog.FLAG_UPDATE, flag_update((0, 0, 1)), FLAGS, FLAGS),
    (translog.FLAG_UPDATE, flag_update((0x40, 0, 0), (0, 0x80, 0)), None, None),
    (translog.FLAG_UPDATE, flag_update((0x40, 0, 0), (0x01, 0, 0)), FLAGS, FLAGS),
    (translog.FLAG_UPDATE, b"", FLAGS, FLAGS),
    (translog.KEYWORD_UPDATE, b"", KEYWORDS, KEYWORDS),
    (translog.KEYWORD_RESET, b"", KEYWORDS, KEYWORDS),
    (translog.EXPUNGE, b"", EXPUNGE, None),
    (translog.EXPUNGE_GUID, b"", EXPUNGE, None),
    (translog.HEADER_UPDATE, b"", None, None),
    (translog.EXT_INTRO, b"", None, None),
    (translog.EXT_RESET, b"", None, None),
    (translog.EXT_HDR_UPDATE, b"", None, None),
    (translog.EXT_HDR_UPDATE32, b"", None, None),
    (translog.EXT_REC_UPDATE, b"", None, None),
    (translog.EXT_ATOMIC_INC, b"", None, None),
    (translog.MODSEQ_UPDATE, b"", None, None),
    (translog.INDEX_DELETED, b"", None, None),
    (translog.INDEX_UNDELETED, b"", None, None),
    (translog.BOUNDARY, b"\0\0\0\0", None, None),
    (0x00200000, b"", ChangeKind.LOG_GAP, ChangeKind.LOG_GAP),
]


@pytest.mark.parametrize(("kind", "body", "plain", "external"), TABLE)
def test_record_types(kind: int, body: bytes, plain: ChangeKind | None, external: ChangeKind | None) -> None:
    def news(external: bool, sync: bool) -> frozenset[ChangeKind]:
        return classify.changes([Record(40, 8 + len(body), kind, external, sync, body)]).kinds

    assert news(False, False) == ({plain} if plain else set())
    assert news(True, False) == ({external} if external else set())
    assert news(False, True) == set()
    assert news(True, True) == set()


def test_the_table_is_complete() -> None:
    types = {
        value
        for name, value in vars(translog).items()
        if name.isupper()
        and not name.startswith("_")
        and name not in {"MAJOR_VERSION"}
        and not name.endswith("_SIZE")
    }
    assert types - {translog.ATTRIBUTE_UPDATE} == {row[0] for row in TABLE} - {0x00200000}


@pytest.mark.parametrize(
    ("before", "updates", "left"),
    [
        ((), [("k", False)], ["k"]),
        ((), [("k", False), ("k", True)], []),
        (("k",), [("k", True)], []),
        # dsync's record first: the user's comes after it and stands.
        ((), [("k", True), ("k", False)], ["k"]),
        # Two updates, of which dsync claims one.
        ((), [("k", False), ("k", False), ("k", True)], ["k"]),
        (("k",), [("other", True)], ["k"]),
    ],
)
def test_unconfirmed_attributes(
    before: tuple[str, ...], updates: list[tuple[str, bool]], left: list[str]
) -> None:
    found = classify.unconfirmed(
        [name.encode() for name in before], [(name.encode(), sync) for name, sync in updates]
    )
    assert found == tuple(name.encode() for name in left)


def news_of(case: logdata.LogCase) -> set[ChangeKind]:
    if case.kind == "mailbox":
        return set(mailboxlog.scan(case.news, case.start).kinds)
    scan = translog.scan(case.news, case.start)
    news = classify.changes(scan.records)
    kinds = set(news.kinds)
    if classify.unconfirmed((), news.attributes):
        kinds.add(ChangeKind.ATTRIBUTE)
    return kinds


# What the user does on the acting node, and the news in that node's logs. Rows that are only looks have none.
ACTIONS = {
    "lmtp-first": {NEW_MAIL},
    "lmtp": {NEW_MAIL},
    "append": {NEW_MAIL},
    "append-flags": {NEW_MAIL, KEYWORDS},
    "copy": {NEW_MAIL},
    "move": {NEW_MAIL, EXPUNGE},
    "select-new": set(),
    "fetch-headers": set(),
    "status": set(),
    "examine": set(),
    "idle": set(),
    "noop": set(),
    "noop-from-peer": set(),
    "fetch-body": {FLAGS},
    "store-flag": {FLAGS},
    "remove-flag": {FLAGS},
    "store-deleted": {FLAGS},
    "store-keyword": {KEYWORDS},
    "remove-keyword": {KEYWORDS},
    "expunge": {EXPUNGE},
    "pop3": {EXPUNGE},
    "subscribe": {ChangeKind.SUBSCRIBE},
    "unsubscribe": {ChangeKind.UNSUBSCRIBE},
    "rename": {ChangeKind.RENAME},
    "rename-children": {ChangeKind.RENAME},
    "delete": {ChangeKind.DELETE},
    "setmetadata": {ChangeKind.ATTRIBUTE},
    "setmetadata-server": {ChangeKind.ATTRIBUTE},
    "remove-metadata": {ChangeKind.ATTRIBUTE},
    "setacl": {ChangeKind.ATTRIBUTE},
    "putscript": {ChangeKind.ATTRIBUTE},
    "setactive": {ChangeKind.ATTRIBUTE},
    "deletescript": {ChangeKind.ATTRIBUTE},
    "lmtp-on-peer": {NEW_MAIL},
    "flags-on-peer": {FLAGS, KEYWORDS},
    "expunge-on-peer": {FLAGS, EXPUNGE},
    "appeared": {NEW_MAIL},
    # The creation itself shows as a directory; the files that vanished and the rebuilt index as no request.
    "create": set(),
    "create-on-peer": set(),
    "vanished": set(),
    "force-resync": set(),
}
MAILDIR = [case for case in logdata.cases(storage="maildir") if case.kind in ("index", "mailbox")]
assert MAILDIR


@pytest.mark.parametrize("version", logdata.VERSIONS)
@pytest.mark.parametrize("row", ACTIONS)
def test_user_actions(version: str, row: str) -> None:
    """Looks (SELECT, FETCH of headers, STATUS, IDLE) are no news, whatever they write."""
    cases = [c for c in MAILDIR if (c.version, c.row, c.phase) == (version, row, "action")]
    acting = {kind for case in cases if case.side == case.acts for kind in news_of(case)}
    assert acting == ACTIONS[row]
    assert not any(news_of(case) for case in cases if case.side != case.acts)


# The tree's log tells dsync's records from a user's by nothing: they cost one sync that finds no change.
DSYNC = [c for c in logdata.cases(kind="index") if c.phase != "action"]


def test_every_recorded_row_is_judged() -> None:
    assert {case.row for case in logdata.cases(storage="maildir")} == set(ACTIONS)


@pytest.mark.parametrize("case", DSYNC, ids=lambda c: c.name)
def test_what_dsync_applies_is_no_news(case: logdata.LogCase) -> None:
    assert news_of(case) == set()


def test_priorities() -> None:
    high = {kind for kind in ChangeKind if kind.priority is Priority.HIGH}
    assert high == {NEW_MAIL, ChangeKind.DELETE, ChangeKind.RENAME}


@pytest.mark.parametrize("case", logdata.cases(kind="mailbox"), ids=lambda c: c.name)
def test_mailbox_log_against_doveadm_dump(case: logdata.LogCase) -> None:
    names = {
        "delete-mailbox": ChangeKind.DELETE,
        "delete-dir": ChangeKind.DELETE,
        "rename": ChangeKind.RENAME,
        "subscribe": ChangeKind.SUBSCRIBE,
        "unsubscribe": ChangeKind.UNSUBSCRIBE,
    }
    scan = mailboxlog.scan(case.news, case.start)
    assert scan.kinds == {names[record.type] for record in case.mailbox_log}
    assert scan.end == case.end
    for cut in range(case.start, min(case.end, case.start + 3 * mailboxlog.RECORD_SIZE)):
        part = mailboxlog.scan(case.data[case.start : cut], case.start)
        assert part.end == cut - (cut - case.start) % mailboxlog.RECORD_SIZE


def test_an_unknown_mailbox_log_record_is_a_gap() -> None:
    assert mailboxlog.scan(bytes([9]) + bytes(23), 0).kinds == {ChangeKind.LOG_GAP}
