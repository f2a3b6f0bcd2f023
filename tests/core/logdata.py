"""The recorded logs of real Dovecot servers (tests/data/logs, made by tests/data/record.py) as test cases.

for case in cases(version="2.4.1", row="store-flag", phase="action"):
    case.data      # the log's bytes as they were after that phase
    case.start     # where the phase's own records begin
    case.records   # these records, as ``doveadm dump`` prints them
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple, Optional

LOGS = Path(__file__).parent.parent / "data" / "logs"

VERSIONS = tuple(sorted(directory.parent.name for directory in LOGS.glob("*/index.json")))


class DumpRecord(NamedTuple):
    """A record of a transaction log as ``doveadm dump -t log`` prints it.

    ``size`` includes the record's own header of 8 bytes; ``type`` is "append", "flag-update", "expunge-guid"
    and so on; ``external`` and ``sync`` are its "(ext)" and "(sync)". ``details`` are the lines below it,
    without their " - "; header-update, ext-* and boundary records have none in the recorded dumps.
    """

    offset: int
    size: int
    type: str
    external: bool
    sync: bool
    modseq: Optional[int]
    details: tuple[str, ...]


class DumpHeader(NamedTuple):
    """The file header in a dump of a transaction log."""

    hdr_size: int
    indexid: int
    file_seq: int
    prev_file_seq: int
    prev_file_offset: int
    create_stamp: int
    initial_modseq: int


class MailboxLogRecord(NamedTuple):
    """A record of a dovecot.mailbox.log as ``doveadm dump -t mailboxlog`` prints it: ``type`` is
    "delete-mailbox", "delete-dir", "rename", "subscribe" or "unsubscribe", ``guid`` 32 hex digits."""

    offset: int
    type: str
    guid: str


class Dump(NamedTuple):
    header: DumpHeader
    records: tuple[DumpRecord, ...]


class LogCase(NamedTuple):
    """What one phase of one row left in one log.

    ``phase`` is "action", "sync" (the dsync from a to b that follows) or "noop" (one more, with nothing to
    do). The user acts on node ``acts``; the log is of node ``side``. ``kind`` is "index", "list" (the
    list index), "map" (mdbox's map index) or "mailbox" (dovecot.mailbox.log); ``path`` is below the
    user's home. ``moved_from`` is the log's path after the phase before, or "" when it is still there.
    """

    version: str
    storage: str
    row: str
    phase: str
    acts: str
    side: str
    path: str
    kind: str
    file: Path
    start: int
    end: int
    moved_from: str

    @property
    def name(self) -> str:
        """Names the case in pytest's output."""
        return f"{self.version}/{self.storage}/{self.row}/{self.phase}/{self.side}/{self.path}"

    @property
    def data(self) -> bytes:
        return _read(self.file)[: self.end]

    @property
    def news(self) -> bytes:
        return self.data[self.start :]

    @property
    def dump(self) -> Dump:
        """The dump of ``data``."""
        header, records = parse_dump(_dump_text(self.file))
        return Dump(header, tuple(record for record in records if record.offset < self.end))

    @property
    def records(self) -> tuple[DumpRecord, ...]:
        """The records that came in this phase."""
        return tuple(record for record in self.dump.records if record.offset >= self.start)

    @property
    def mailbox_log(self) -> tuple[MailboxLogRecord, ...]:
        """Like ``records``, for the kind "mailbox"."""
        records = parse_mailbox_log_dump(_dump_text(self.file))
        return tuple(record for record in records if self.start <= record.offset < self.end)


@functools.cache
def _read(file: Path) -> bytes:
    return file.read_bytes()


@functools.cache
def _dump_text(file: Path) -> str:
    return file.with_name(f"{file.name}.dump").read_text()


@functools.cache
def _all_cases() -> tuple[LogCase, ...]:
    found = []
    for version in VERSIONS:
        for row in json.loads((LOGS / version / "index.json").read_text()):
            for case in row["cases"]:
                found.append(
                    LogCase(
                        version=version,
                        storage=row["storage"],
                        row=row["row"],
                        phase=case["phase"],
                        acts=row["acts"],
                        side=case["side"],
                        path=case["path"],
                        kind=case["file"].rpartition(".")[2],
                        file=LOGS / version / case["file"],
                        start=case["start"],
                        end=case["end"],
                        moved_from=case.get("moved_from", ""),
                    )
                )
    return tuple(found)


def cases(**wanted: str) -> list[LogCase]:
    """The cases whose fields have the wanted values (``version=``, ``storage=``, ``row=``, ``phase=``,
    ``side=``, ``kind=`` ...), in the order in which they happened."""
    return [case for case in _all_cases() if all(getattr(case, key) == wanted[key] for key in wanted)]


def transaction_logs(**wanted: str) -> list[LogCase]:
    """The last state of every log file that has records: for comparing a reader with whole dumps."""
    last = {case.file: case for case in cases(**wanted) if case.kind != "mailbox"}
    return list(last.values())


_HEADER = re.compile(r"^([a-z ]+) = (.*)$", re.MULTILINE)
_RECORD = re.compile(
    r"record: offset=(\d+), type=([a-z0-9-]+)( \(ext\))?( \(sync\))?, size=(\d+)(?:, modseq=(\d+))?"
)
_MAILBOX_LOG = re.compile(r"#(\d+): ([a-z-]+) ([0-9a-f]{32}) \(.*\)")


@functools.cache
def parse_dump(text: str) -> Dump:
    """Parse the output of ``doveadm dump -t log``. ValueError for a line that it can't place."""
    head, *blocks = re.split(r"^(?=record: )", text, flags=re.MULTILINE)
    fields = dict(_HEADER.findall(head))
    prev_seq, _, prev_offset = fields["prev file"].partition("/")
    header = DumpHeader(
        hdr_size=int(fields["hdr size"]),
        indexid=int(fields["index id"]),
        file_seq=int(fields["file seq"]),
        prev_file_seq=int(prev_seq),
        prev_file_offset=int(prev_offset),
        create_stamp=int(fields["create stamp"]),
        initial_modseq=int(fields["initial modseq"]),
    )
    records = []
    for block in blocks:
        first, *lines = block.splitlines()
        match = _RECORD.fullmatch(first)
        if not match or any(not line.startswith(" - ") for line in lines):
            raise ValueError(f"not a record of a dump: {block!r}")
        offset, kind, external, sync, size, modseq = match.groups()
        records.append(
            DumpRecord(
                offset=int(offset),
                size=int(size),
                type=kind,
                external=bool(external),
                sync=bool(sync),
                modseq=int(modseq) if modseq else None,
                details=tuple(line[3:] for line in lines),
            )
        )
    return Dump(header, tuple(records))


@functools.cache
def parse_mailbox_log_dump(text: str) -> tuple[MailboxLogRecord, ...]:
    """Parse the output of ``doveadm dump -t mailboxlog``. ValueError for a line that it can't place."""
    records = []
    for line in text.splitlines():
        match = _MAILBOX_LOG.fullmatch(line)
        if not match:
            raise ValueError(f"not a record of a mailbox log's dump: {line!r}")
        records.append(MailboxLogRecord(int(match[1]), match[2], match[3]))
    return tuple(records)
