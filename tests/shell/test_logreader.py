"""Reading real recorded logs from disk, whole, in pieces, rotated, damaged, and things that are no logs."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovesyncd import logreader
from dovesyncd.core.classify import News
from dovesyncd.core.model import ChangeKind, LogPosition
from dovesyncd.logreader import Reading
from tests.core.logdata import VERSIONS, LogCase, cases, transaction_logs
from tests.core.test_fuzz import LOGS, damaged
from tests.core.test_translog import size_field
from tests.fuzz.checks import LogFiles

GAP = frozenset({ChangeKind.LOG_GAP})
NOTHING: frozenset[ChangeKind] = frozenset()
INDEX_LOGS = [case for case in transaction_logs() if case.kind == "index"]
ONE = INDEX_LOGS[0]


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[int]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def read(directory: Path, position: Optional[LogPosition] = None) -> Optional[Reading]:
    with opened(directory) as fd:
        return logreader.read_index_log(fd, position)


def news(directory: Path, position: Optional[LogPosition] = None) -> Reading:
    reading = read(directory, position)
    assert reading is not None
    return reading


def continued(directory: Path, position: LogPosition) -> bool:
    with opened(directory) as fd:
        return logreader.is_continued(fd, position)


def unchanged(directory: Path, position: LogPosition) -> bool:
    with opened(directory) as fd:
        return logreader.unchanged(fd, position)


def log(directory: Path) -> Path:
    return directory / "dovecot.index.log"


def log_2(directory: Path) -> Path:
    return directory / "dovecot.index.log.2"


def append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


@pytest.mark.parametrize("case", INDEX_LOGS, ids=lambda case: case.name)
def test_in_pieces_as_in_one(case: LogCase, tmp_path: Path) -> None:
    """However the bytes arrive, the news are the same, and no position is ever within a record."""
    log(tmp_path).write_bytes(case.data)
    whole = news(tmp_path)
    assert (whole.position.offset, whole.trouble) == (len(case.data), "")
    log(tmp_path).unlink()
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    ends = {case.dump.header.hdr_size} | {record.offset + record.size for record in case.dump.records}
    collected: News = News(frozenset())
    position, at = None, 0
    while at < len(case.data):
        step = dice.choice((1, 3, 8, 40, 300))
        append(log(tmp_path), case.data[at : at + step])
        at += step
        reading = read(tmp_path, position)
        if reading is not None:
            assert reading.trouble == ""
            assert reading.position.offset in ends
            collected |= reading.news
            position = reading.position
    assert position is not None
    assert position._replace(inode=0) == whole.position._replace(inode=0)
    assert collected == whole.news


def test_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(tmp_path).write_bytes(ONE.data)
    whole = news(tmp_path)
    for chunk in (8, 20, 64, 100):
        monkeypatch.setattr(logreader, "_CHUNK", chunk)
        assert news(tmp_path) == whole
        assert continued(tmp_path, whole.position)


def test_an_endless_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logreader, "_CHUNK", 64)
    monkeypatch.setattr(logreader, "_MAX_PENDING", 1024)
    size = ONE.dump.header.hdr_size
    log(tmp_path).write_bytes(ONE.data[:size] + b"\x80\xff\xff\xff" + bytes(4000))
    reading = news(tmp_path)
    assert reading.news.kinds == GAP
    assert "more than 1024 bytes" in reading.trouble
    assert reading.position.offset == size + 4004


@settings(deadline=None, print_blob=True, max_examples=60)
@given(st.one_of(st.just(b""), damaged(LOGS)), damaged(LOGS), st.lists(st.integers(0, 1 << 16), max_size=4))
def test_damaged_logs_in_files(older: bytes, newer: bytes, cuts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as directory, contextlib.closing(LogFiles(Path(directory))) as files:
        files.live(older, newer, cuts)


# Rotation -----------------------------------------------------------------------------------------


class Rotation:
    """A log as it was before its rotation, the rotated one, and its successor."""

    def __init__(self, version: str) -> None:
        (before,) = cases(version=version, row="before-rotation", phase="action", side="a")
        (rotated,) = (
            case
            for case in cases(version=version, row="rotation", phase="action", side="a")
            if case.path.endswith(".log.2")
        )
        (after,) = cases(version=version, row="after-rotation", phase="action", side="a")
        self.before, self.rotated, self.after = before.data, rotated.data, after.data
        assert self.rotated.startswith(self.before)
        assert len(self.rotated) > len(self.before)


@pytest.fixture(params=VERSIONS)
def rotation(request: pytest.FixtureRequest) -> Rotation:
    return Rotation(request.param)


def rotated(rotation: Rotation, directory: Path) -> LogPosition:
    """The position before the rotation, which is done on disk as Dovecot does it."""
    log(directory).write_bytes(rotation.before)
    position = news(directory).position
    append(log(directory), rotation.rotated[len(rotation.before) :])
    log(directory).rename(log_2(directory))
    log(directory).write_bytes(rotation.after)
    return position


def test_rotation_loses_nothing(rotation: Rotation, tmp_path: Path) -> None:
    position = rotated(rotation, tmp_path)
    # The same without a rotation: the rest of the old one, then the new one, each for itself.
    other = tmp_path / "other"
    other.mkdir()
    log(other).write_bytes(rotation.before)
    before = news(other).position
    append(log(other), rotation.rotated[len(rotation.before) :])
    rest = news(other, before).news
    log(other).unlink()
    log(other).write_bytes(rotation.after)
    after = news(other).news
    assert rest.kinds
    assert after.kinds
    reading = news(tmp_path, position)
    assert reading.news == rest | after
    assert ChangeKind.LOG_GAP not in reading.news.kinds
    assert reading.position == news(tmp_path).position
    assert news(tmp_path, reading.position).news.kinds == NOTHING


def test_rotation_after_everything_was_read(rotation: Rotation, tmp_path: Path) -> None:
    log(tmp_path).write_bytes(rotation.rotated)
    position = news(tmp_path).position
    log(tmp_path).unlink()
    log(tmp_path).write_bytes(rotation.after)
    # .log.2 is not even needed.
    assert news(tmp_path, position).news == news(tmp_path).news


@pytest.mark.parametrize("what", ["missing", "link", "short", "other sequence", "other mailbox", "no log"])
def test_without_the_rotated_log_there_is_a_gap(rotation: Rotation, tmp_path: Path, what: str) -> None:
    position = rotated(rotation, tmp_path)
    data = log_2(tmp_path).read_bytes()
    log_2(tmp_path).unlink()
    if what == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        log_2(tmp_path).symlink_to(tmp_path / "elsewhere")
    elif what == "short":
        log_2(tmp_path).write_bytes(data[: position.offset - 8])
    elif what == "other sequence":
        log_2(tmp_path).write_bytes(data[:8] + b"\x77" + data[9:])
    elif what == "other mailbox":
        log_2(tmp_path).write_bytes(data[:4] + b"\x77" + data[5:])
    elif what == "no log":
        log_2(tmp_path).write_bytes(b"garbage" * 100)
    reading = news(tmp_path, position)
    assert reading.news.kinds == GAP | news(tmp_path).news.kinds
    assert reading.position == news(tmp_path).position


def test_two_rotations_at_once_are_a_gap(rotation: Rotation, tmp_path: Path) -> None:
    position = rotated(rotation, tmp_path)._replace(file_seq=77)
    assert ChangeKind.LOG_GAP in news(tmp_path, position).news.kinds


# Damage -------------------------------------------------------------------------------------------


def test_truncated(tmp_path: Path) -> None:
    log(tmp_path).write_bytes(ONE.data)
    position = news(tmp_path).position
    os.truncate(log(tmp_path), position.offset - 8)
    assert ChangeKind.LOG_GAP in news(tmp_path, position).news.kinds


BAD = b"\x80\x80\x80\x83" + b"\xff" * 32
FLAG_STEP = next(
    case
    for case in cases(version="2.4.1", storage="maildir", row="store-flag", phase="action", kind="index")
    if case.side == "a"
)


def later(path: Path) -> None:
    """Gives the file a time that it has not had, however coarse the clock of the file system is."""
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 10**9))


@pytest.mark.parametrize("left", [b"", b"\x80\x80\x81\x80"], ids=["whole", "within a record"])
def test_behind_a_corrupt_record_every_change_is_a_gap(left: bytes, tmp_path: Path) -> None:
    """Wherever the file ended when it was found out, and told once."""
    case = FLAG_STEP
    log(tmp_path).write_bytes(case.data[: case.start])
    position = news(tmp_path).position
    assert position.offset == case.start
    append(log(tmp_path), BAD + left)
    reading = news(tmp_path, position)
    assert reading.news.kinds == GAP
    assert str(case.start) in reading.trouble
    assert reading.position.offset == case.start + len(BAD + left)
    for _ in range(3):
        assert unchanged(tmp_path, reading.position)
        assert news(tmp_path, reading.position) == (News(NOTHING), reading.position, "")
        append(log(tmp_path), case.news)
        assert not unchanged(tmp_path, reading.position)
        reading = news(tmp_path, reading.position)
        assert (reading.news.kinds, reading.trouble) == (GAP, "")
        later(log(tmp_path))
        assert not unchanged(tmp_path, reading.position)
        reading = news(tmp_path, reading.position)
        assert (reading.news.kinds, reading.trouble) == (GAP, "")
    assert not continued(tmp_path, reading.position), "nobody knows what it had in it"


def test_a_corrupt_record_that_dovecot_cuts_off(tmp_path: Path) -> None:
    """mail_transaction_log_file_sync() truncates what it can't read; the log is a good one again."""
    case = FLAG_STEP
    log(tmp_path).write_bytes(case.data[: case.start] + BAD)
    corrupt = news(tmp_path)
    assert corrupt.trouble
    os.truncate(log(tmp_path), case.start)
    again = news(tmp_path, corrupt.position)
    assert again.news.kinds >= GAP
    assert (again.trouble, again.position.offset) == ("", case.start)
    append(log(tmp_path), case.news)
    assert news(tmp_path, again.position).news.kinds == {ChangeKind.FLAGS}


def test_a_corrupt_log_is_rotated(rotation: Rotation, tmp_path: Path) -> None:
    log(tmp_path).write_bytes(rotation.before + BAD)
    position = news(tmp_path).position
    log(tmp_path).write_bytes(rotation.rotated)
    log(tmp_path).rename(log_2(tmp_path))
    log(tmp_path).write_bytes(rotation.after)
    after = news(tmp_path, position)
    assert after.news.kinds == GAP | news(tmp_path).news.kinds
    assert (after.trouble, after.position) == ("", news(tmp_path).position)


def test_a_rotated_log_that_is_not_whole_is_a_gap(rotation: Rotation, tmp_path: Path) -> None:
    position = rotated(rotation, tmp_path)
    with open(log_2(tmp_path), "r+b") as file:
        file.seek(position.offset)
        file.write(bytes(4))
    assert ChangeKind.LOG_GAP in news(tmp_path, position).news.kinds


@pytest.mark.parametrize("size", [(16 << 20) + 4, 0x3FFFFFFC])
def test_no_record_is_waited_for_for_ever(size: int, tmp_path: Path) -> None:
    """A size that no record has is not one that is not all there yet."""
    log(tmp_path).write_bytes(ONE.data + size_field(size) + bytes(60))
    reading = news(tmp_path)
    assert f"record of {size} bytes" in reading.trouble
    assert ChangeKind.LOG_GAP in reading.news.kinds


def test_a_log_of_holes_costs_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its records are whole and in order, a terabyte of them: who owns the file can make that with ease."""
    header = ONE.data[: ONE.dump.header.hdr_size]
    record_of = 8 << 20
    with open(log(tmp_path), "wb") as file:
        file.write(header)
        for number in range(8):
            file.seek(len(header) + number * record_of)
            file.write(size_field(record_of) + b"\2\0\0\x10")
    os.truncate(log(tmp_path), 1 << 40)
    taken = []
    pread = os.pread

    def counting(fd: int, size: int, offset: int) -> bytes:
        data = pread(fd, size, offset)
        taken.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counting)
    reading = news(tmp_path)
    assert reading.news.kinds == GAP
    assert reading.position.offset == 1 << 40
    assert not continued(tmp_path, reading.position._replace(digest=1))
    os.truncate(log(tmp_path), len(header) + record_of)
    assert news(tmp_path).news.kinds == {ChangeKind.NEW_MAIL}
    assert sum(taken) < 3 * record_of


def test_a_time_beyond_all_bounds(tmp_path: Path) -> None:
    """A user can give his file any time; a position has to fit into a column of 64 bits."""
    log(tmp_path).write_bytes(ONE.data + BAD)
    for seconds in (-(1 << 40), 1 << 34, 1 << 40):
        with contextlib.suppress(OverflowError, OSError):
            os.utime(log(tmp_path), (seconds, seconds))
        position = news(tmp_path).position
        assert 1 << 32 <= position.digest < 1 << 63
        assert unchanged(tmp_path, position)


def test_a_newer_major_version_is_told_once(tmp_path: Path) -> None:
    """Not once a change, nor once a file: its Dovecot rotates it too."""
    log(tmp_path).write_bytes(b"\2" + ONE.data[1:])
    reading = news(tmp_path)
    assert (reading.news.kinds, reading.trouble) == (GAP, "format version 2.3 is not 1.x")
    for _ in range(2):
        append(log(tmp_path), b"something new")
        assert not unchanged(tmp_path, reading.position)
        reading = news(tmp_path, reading.position)
        assert (reading.news.kinds, reading.trouble) == (GAP, "")
        assert unchanged(tmp_path, reading.position)
        later(log(tmp_path))
        assert not unchanged(tmp_path, reading.position), "overwritten in place, perhaps"
        assert news(tmp_path, reading.position).news.kinds == GAP
        log(tmp_path).rename(log_2(tmp_path))
        log(tmp_path).write_bytes(b"\2" + ONE.data[1:])
        reading = news(tmp_path, reading.position)
        assert (reading.news.kinds, reading.trouble) == (GAP, "")
    # And back.
    log(tmp_path).rename(log_2(tmp_path))
    log(tmp_path).write_bytes(ONE.data)
    reading = news(tmp_path, reading.position)
    assert reading.news.kinds > GAP
    assert reading.position == news(tmp_path).position


def test_a_newer_minor_version_is_read(tmp_path: Path) -> None:
    """It may have records of new types: they count as changes, and what follows them is read."""
    case = FLAG_STEP
    new = size_field(12) + b"\0\0\x20\0" + b"1234"
    log(tmp_path).write_bytes(case.data[:1] + b"\x09" + case.data[2 : case.start])
    position = news(tmp_path).position
    append(log(tmp_path), new)
    reading = news(tmp_path, position)
    assert (reading.news.kinds, reading.trouble) == (GAP, "")
    append(log(tmp_path), case.news)
    assert news(tmp_path, reading.position).news.kinds == {ChangeKind.FLAGS}


@pytest.mark.parametrize("damage", ["indexid", "major", "header size"])
def test_an_unreadable_header(tmp_path: Path, damage: str) -> None:
    data = bytearray(ONE.data)
    where = {"indexid": slice(4, 8), "major": slice(0, 1), "header size": slice(2, 4)}[damage]
    log(tmp_path).write_bytes(data)
    good = news(tmp_path).position
    with open(log(tmp_path), "r+b") as file:
        file.seek(where.start)
        file.write(bytes(where.stop - where.start))
    reading = news(tmp_path, good)
    assert reading.news.kinds == GAP
    assert reading.trouble
    assert (again := news(tmp_path, reading.position)).news.kinds == NOTHING
    assert again.trouble == ""
    append(log(tmp_path), b"more")
    assert news(tmp_path, reading.position).news.kinds == GAP
    # Dovecot begins a new one.
    log(tmp_path).rename(tmp_path / "old")
    log(tmp_path).write_bytes(ONE.data)
    assert news(tmp_path, reading.position).news.kinds > GAP


@pytest.mark.parametrize("size", [0, 1, 23])
def test_a_header_that_is_not_all_there(tmp_path: Path, size: int) -> None:
    log(tmp_path).write_bytes(ONE.data[:size])
    assert read(tmp_path) is None
    assert read(tmp_path, LogPosition(1, 2, 3, 4, 5)) is None


@pytest.mark.parametrize("what", ["nothing", "fifo", "link", "directory", "device", "socket"])
def test_what_is_no_file_is_no_log(tmp_path: Path, what: str) -> None:
    """Nothing blocks, nothing is followed."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(ONE.data)
    for path in (log(tmp_path), tmp_path / "dovecot.mailbox.log"):
        if what == "fifo":
            os.mkfifo(path)
        elif what == "link":
            path.symlink_to(elsewhere)
        elif what == "directory":
            path.mkdir()
        elif what == "device":
            try:
                os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
            except PermissionError:
                pytest.skip("making a device takes root")
        elif what == "socket":
            os.mknod(path, 0o600 | 0o140000)
    position = LogPosition(os.stat(elsewhere).st_ino, 1, 1, len(ONE.data), 1)
    assert read(tmp_path) is None
    assert read(tmp_path, position) is None
    assert not continued(tmp_path, position)
    assert not unchanged(tmp_path, position)
    with opened(tmp_path) as fd:
        assert logreader.read_mailbox_log(fd, {}) == (NOTHING, {})


def test_directories_behind_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "root" / "a" / "b").mkdir(parents=True)
    (tmp_path / "root" / "link").symlink_to("a")
    (tmp_path / "linked-root").symlink_to("root")
    root = str(tmp_path / "root")
    for relative in (b"", b"a", b"a/b", os.fsencode(tmp_path / "root" / "a")):
        with logreader.open_directory(root, relative) as fd:
            assert os.path.isdir(f"/proc/self/fd/{fd}")
    for refused, relative in (
        (root, b"link"),
        (root, b"link/b"),
        (str(tmp_path / "linked-root"), b""),
        (str(tmp_path / "linked-root"), b"a"),
        (root, os.fsencode(tmp_path / "linked-root")),
    ):
        with pytest.raises(OSError), logreader.open_directory(refused, relative):
            pytest.fail("opened")
    with logreader.open_directory(root) as fd, pytest.raises(OSError), logreader.open_below(fd, b"link"):
        pytest.fail("opened")
    with pytest.raises(FileNotFoundError), logreader.open_directory(root, b"a/missing"):
        pytest.fail("opened")


# The same log under another name ----------------------------------------------------------------------


def test_a_renamed_log_is_recognised(tmp_path: Path) -> None:
    half = ONE.dump.records[3].offset
    for name in ("a", "c"):
        (tmp_path / name).mkdir()
    log(tmp_path / "a").write_bytes(ONE.data[:half])
    position = news(tmp_path / "a").position
    (tmp_path / "a").rename(tmp_path / "b")
    assert continued(tmp_path / "b", position)
    append(log(tmp_path / "b"), ONE.data[half:])
    assert continued(tmp_path / "b", position), "it may have grown"
    # A copy is another file.
    log(tmp_path / "c").write_bytes(ONE.data)
    assert not continued(tmp_path / "c", position)


def test_another_log_with_the_same_inode_is_not(tmp_path: Path) -> None:
    log(tmp_path).write_bytes(ONE.data)
    position = news(tmp_path).position
    inode = os.stat(log(tmp_path)).st_ino
    changed = bytearray(ONE.data)
    changed[ONE.dump.records[1].offset + 8] ^= 1
    with open(log(tmp_path), "r+b") as file:
        file.write(changed)
    assert os.stat(log(tmp_path)).st_ino == inode
    assert not continued(tmp_path, position)
    os.truncate(log(tmp_path), position.offset - 1)
    assert not continued(tmp_path, position)


# dovecot.mailbox.log ------------------------------------------------------------------------------


def mailbox_record(kind: int) -> bytes:
    return bytes([kind, 0, 0, 0]) + os.urandom(16) + b"\x60\0\0\0"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_recorded_mailbox_log_step_by_step(version: str, tmp_path: Path) -> None:
    positions: dict[bytes, LogPosition] = {}
    words = {
        "subscribe": ChangeKind.SUBSCRIBE,
        "unsubscribe": ChangeKind.UNSUBSCRIBE,
        "rename": ChangeKind.RENAME,
        "delete-mailbox": ChangeKind.DELETE,
        "delete-dir": ChangeKind.DELETE,
    }
    steps = cases(version=version, storage="maildir", side="a", kind="mailbox")
    assert len(steps) > 3
    for case in steps:
        append(tmp_path / "dovecot.mailbox.log", case.news)
        with opened(tmp_path) as fd:
            kinds, positions = logreader.read_mailbox_log(fd, positions)
        assert kinds == {words[record.type] for record in case.mailbox_log}, case.name


def test_the_mailbox_log_rotates_and_is_still_written_to(tmp_path: Path) -> None:
    current, older = tmp_path / "dovecot.mailbox.log", tmp_path / "dovecot.mailbox.log.2"
    positions: dict[bytes, LogPosition] = {}

    def step() -> frozenset[ChangeKind]:
        nonlocal positions
        with opened(tmp_path) as fd:
            kinds, positions = logreader.read_mailbox_log(fd, positions)
        return kinds

    current.write_bytes(mailbox_record(1))
    assert step() == {ChangeKind.DELETE}
    assert step() == NOTHING
    append(current, mailbox_record(4)[:23])
    assert step() == NOTHING, "not a whole record yet"
    append(current, b"\0")
    assert step() == {ChangeKind.SUBSCRIBE}
    current.rename(older)
    assert step() == NOTHING
    current.write_bytes(mailbox_record(3))
    append(older, mailbox_record(5))
    assert step() == {ChangeKind.RENAME, ChangeKind.UNSUBSCRIBE}
    append(current, mailbox_record(99))
    assert step() == GAP
    os.truncate(current, 24)
    assert step() == {ChangeKind.RENAME}, "a shrunk one is read again"
    current.unlink()
    older.unlink()
    assert step() == NOTHING
    assert positions == {}
