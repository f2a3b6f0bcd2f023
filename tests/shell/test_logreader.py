"""Reading real recorded logs from disk, whole, in pieces, rotated, damaged, and things that are no logs."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest

from dovesyncd import logreader
from dovesyncd.core.classify import News
from dovesyncd.core.model import ChangeKind, LogPosition
from dovesyncd.logreader import Reading
from tests.core.logdata import VERSIONS, LogCase, cases, transaction_logs

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
    assert "endless" in reading.trouble
    assert reading.position.offset == size + 4004


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


def test_corrupt_is_a_gap_and_reading_goes_on_behind_it(tmp_path: Path) -> None:
    (case,) = cases(
        version="2.4.1", storage="maildir", row="store-flag", phase="action", side="a", kind="index"
    )
    log(tmp_path).write_bytes(case.data[: case.start])
    position = news(tmp_path).position
    assert position.offset == case.start
    append(log(tmp_path), b"\x80\x80\x80\x83" + b"\xff" * 32)
    reading = news(tmp_path, position)
    assert reading.news.kinds == GAP
    assert str(case.start) in reading.trouble
    assert reading.position.offset == case.start + 36
    assert unchanged(tmp_path, reading.position)
    again = news(tmp_path, reading.position)
    assert (again.news.kinds, again.trouble, again.position) == (NOTHING, "", reading.position)
    append(log(tmp_path), case.news)
    rest = news(tmp_path, reading.position)
    assert (rest.trouble, rest.news.kinds) == ("", {ChangeKind.FLAGS})


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
