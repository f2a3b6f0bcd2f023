"""The recorded logs are what the tests that read them take them for."""

from __future__ import annotations

import pytest

from tests.core.logdata import (
    VERSIONS,
    Dump,
    DumpHeader,
    DumpRecord,
    LogCase,
    cases,
    parse_dump,
    parse_mailbox_log_dump,
    transaction_logs,
)

ALL = cases()
TRANSACTION_LOGS = [case for case in ALL if case.kind != "mailbox"]
MAILBOX_LOGS = [case for case in ALL if case.kind == "mailbox"]


def name(case: LogCase) -> str:
    return case.name


def test_both_series_are_recorded() -> None:
    assert {version.rpartition(".")[0] for version in VERSIONS} == {"2.3", "2.4"}


@pytest.mark.parametrize("case", TRANSACTION_LOGS, ids=name)
def test_dump_covers_the_log_without_gaps(case: LogCase) -> None:
    header, records = case.dump
    position = header.hdr_size
    for record in records:
        assert record.offset == position
        position += record.size
    assert position == case.end == len(case.data)


@pytest.mark.parametrize("case", TRANSACTION_LOGS, ids=name)
def test_start_is_a_record_boundary(case: LogCase) -> None:
    header, records = case.dump
    assert case.start in {header.hdr_size, *(record.offset + record.size for record in records)}


@pytest.mark.parametrize("case", TRANSACTION_LOGS, ids=name)
def test_dump_is_of_these_bytes(case: LogCase) -> None:
    header = case.dump.header
    assert case.data[0] == 1
    assert int.from_bytes(case.data[2:4], "little") == header.hdr_size
    assert int.from_bytes(case.data[4:8], "little") == header.indexid != 0
    assert int.from_bytes(case.data[8:12], "little") == header.file_seq


@pytest.mark.parametrize("case", MAILBOX_LOGS, ids=name)
def test_mailbox_log_dump_covers_the_log(case: LogCase) -> None:
    assert case.start % 24 == 0
    assert [record.offset for record in case.mailbox_log] == list(range(case.start, case.end, 24))
    for record in case.mailbox_log:
        assert case.data[record.offset + 4 : record.offset + 20].hex() == record.guid


@pytest.mark.parametrize("version", VERSIONS)
def test_phases_of_one_file_follow_each_other(version: str) -> None:
    ends: dict[object, int] = {}
    for case in cases(version=version):
        assert ends.get(case.file, 0) <= case.start <= case.end
        ends[case.file] = case.end


@pytest.mark.parametrize("version", VERSIONS)
def test_every_action_is_there(version: str) -> None:
    rows = {case.row for case in cases(version=version, storage="maildir", phase="action")}
    assert rows >= {
        *("lmtp", "append", "copy", "move", "select-new", "fetch-headers", "fetch-body", "pop3"),
        *("store-flag", "store-keyword", "remove-keyword", "expunge", "status", "examine", "idle"),
        *("create", "subscribe", "unsubscribe", "rename", "delete", "setmetadata", "setacl"),
        *("putscript", "setactive", "force-resync", "noop"),
    }
    assert {case.storage for case in transaction_logs(version=version)} >= {"fs", "mdbox", "sdbox"}


@pytest.mark.parametrize("version", VERSIONS)
def test_rotation_leaves_a_pair(version: str) -> None:
    before, *_ = cases(version=version, row="before-rotation", kind="index", side="a")
    pair = cases(version=version, row="rotation", kind="index", side="a", phase="action")
    new, old = sorted(pair, key=lambda case: case.path)
    assert old.moved_from == new.path == before.path
    assert old.data.startswith(before.data)
    assert old.dump.header.file_seq == new.dump.header.prev_file_seq == new.dump.header.file_seq - 1


@pytest.mark.parametrize("version", VERSIONS)
def test_rename_takes_the_history_along(version: str) -> None:
    (case,) = cases(version=version, storage="maildir", row="rename", phase="action", kind="index")
    (created,) = cases(version=version, storage="maildir", row="create", phase="action", kind="index")
    assert (case.moved_from, case.path) == (created.path, "Maildir/.Job/dovecot.index.log")
    assert case.data.startswith(created.data)
    assert "append" in {record.type for record in case.dump.records if record.offset < case.start}


def test_parse_dump() -> None:
    text = """\
version = 1.3
hdr size = 40
index id = 17
file seq = 3
prev file = 2/9000
create stamp = 18
initial modseq = 5
compat flags = 1
record: offset=40, type=expunge-guid (ext) (sync), size=28, modseq=6
 - uid=1 (guid 00)
record: offset=68, type=boundary, size=12
"""
    assert parse_dump(text) == Dump(
        DumpHeader(40, 17, 3, 2, 9000, 18, 5),
        (
            DumpRecord(40, 28, "expunge-guid", True, True, 6, ("uid=1 (guid 00)",)),
            DumpRecord(68, 12, "boundary", False, False, None, ()),
        ),
    )
    with pytest.raises(ValueError, match="not a record"):
        parse_dump(text + "something else\n")


def test_parse_mailbox_log_dump_refuses_a_type_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="not a record"):
        parse_mailbox_log_dump("#0:  00040bab8a787438c2c0cf5248ac0256 (2026-11-22 13:45:17)\n")
