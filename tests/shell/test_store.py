"""The store on a real disk: what survives, what is refused, and what a crash can't part."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dovesyncd import store as store_module
from dovesyncd.core.errors import StoreError
from dovesyncd.core.model import (
    ChangeKind,
    Job,
    JobKey,
    LogPosition,
    OutcomeClass,
    PeerName,
    Priority,
    User,
)
from dovesyncd.store import FILE_NAME, MIGRATIONS, Contents, CursorKey, Store
from tests.shell.waiting import until
from tests.system.waiting import wait_until

PEER = PeerName("b")
FULL_JOB = Job(
    JobKey(User("ann@example.com"), PEER),
    priority=Priority.HIGH,
    reasons=(ChangeKind.NEW_MAIL, ChangeKind.BACKGROUND),
    first_change=1700000000.25,
    due=1700000001.5,
    attempts=3,
    repeats=2,
    wants_full=True,
    last_start=1700000000.125,
    last_success=1699999999.0,
    last_pass=1699990000.0,
    next_pass=1700080000.75,
    last_outcome=OutcomeClass.NOUSER_REMOTE,
    last_error="Error: \u00fc\n\t'; DROP TABLE job; --",
    state="AQAAAHm4+Jk=",
)
NAMES = (
    "ann",
    "a\u00e9\u4e2d@x",
    os.fsdecode(b"bad\xff\xfe\x80name"),
    "'; DROP TABLE cursor; --",
    "with\nline",
    "x" * 500,
)


def key(user: str, directory: bytes = b"", log: bytes = b"dovecot.index.log") -> CursorKey:
    return CursorKey(User(user), directory, log)


def on_disk(directory: Path) -> tuple[int, int]:
    """How many cursors and jobs another connection sees."""
    with sqlite3.connect(f"file:{directory / FILE_NAME}?mode=ro", uri=True) as db:
        found = tuple(
            db.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in ("cursor", "job")
        )
    db.close()
    return found[0], found[1]


async def reopened(directory: Path) -> Contents:
    store = Store(str(directory))
    contents = store.load()
    await store.close()
    return contents


async def test_everything_survives(state: Path) -> None:
    store = Store(str(state))
    assert store.load() == ({}, {})
    jobs = {}
    for name in NAMES:
        for job in (
            replace(FULL_JOB, key=JobKey(User(name), PEER)),
            Job(JobKey(User(name), PeerName("c.d"))),
        ):
            jobs[job.key] = job
            store.put_job(job)
    cursors = {
        key(name, directory, log): LogPosition(number, 2**32 - 1, 7, 2**40, 2**32 - 1)
        for number, name in enumerate(NAMES)
        for directory in (b"", b".Caf\xe9/\xff", b"/elsewhere/inbox")
        for log in (b"dovecot.index.log", b"dovecot.mailbox.log")
    }
    for cursor, position in cursors.items():
        store.put_cursor(cursor, position)
    await store.close()
    assert store.unwritten == 0
    assert await reopened(state) == (cursors, jobs)


async def test_every_word_of_the_model_survives(state: Path) -> None:
    store = Store(str(state))
    jobs = [
        replace(
            FULL_JOB,
            key=JobKey(User(str(number)), PEER),
            last_outcome=outcome,
            reasons=(kind,),
            priority=priority,
        )
        for number, (outcome, kind, priority) in enumerate(
            [(outcome, ChangeKind.FLAGS, Priority.LOW) for outcome in OutcomeClass]
            + [(OutcomeClass.OK, kind, Priority.LOW) for kind in ChangeKind]
            + [(OutcomeClass.OK, ChangeKind.FLAGS, priority) for priority in Priority]
        )
    ]
    for job in jobs:
        store.put_job(job)
    await store.close()
    assert (await reopened(state)).jobs == {job.key: job for job in jobs}


async def test_words_that_are_not_text_are_kept_readable(state: Path) -> None:
    store = Store(str(state))
    store.put_job(replace(FULL_JOB, last_error="open(/m/\udcff\ud800) failed"))
    await store.close()
    (job,) = (await reopened(state)).jobs.values()
    assert job.last_error == "open(/m/\\udcff\\ud800) failed"


@pytest.mark.parametrize("inode", [2**63 - 1, 2**63, 2**64 - 1])
async def test_inode_numbers_have_64_bits(state: Path, inode: int) -> None:
    """Some file systems use all of them (GlusterFS, overlayfs)."""
    store = Store(str(state))
    position = LogPosition(inode, 1, 2, 3, 4)
    store.put_cursor(key("ann"), position)
    await store.close()
    assert (await reopened(state)).cursors == {key("ann"): position}


async def test_later_put_wins_and_none_forgets(state: Path) -> None:
    store = Store(str(state))
    for offset in (1, 2, 3):
        store.put_cursor(key("ann"), LogPosition(1, 1, 1, offset, 1))
        store.put_cursor(key("bob"), LogPosition(1, 1, 1, offset, 1))
    await until(lambda: not store.unwritten and on_disk(state) == (2, 0), "both written")
    store.put_job(FULL_JOB)
    store.put_job(replace(FULL_JOB, attempts=9))
    store.put_cursor(key("bob"), None)
    await until(lambda: on_disk(state) == (1, 1), "bob forgotten")
    store.put_cursor(key("nobody"), None)
    await store.close()
    contents = await reopened(state)
    assert contents.cursors == {key("ann"): LogPosition(1, 1, 1, 3, 1)}
    assert contents.jobs[FULL_JOB.key].attempts == 9


async def test_what_is_abandoned_is_not_written(state: Path) -> None:
    store = Store(str(state))
    store.put_cursor(key("ann"), LogPosition(1, 1, 1, 1, 1))
    store.abandon()
    store.put_job(FULL_JOB)
    await store.close()
    contents = await reopened(state)
    assert (contents.cursors, contents.jobs) == ({}, {})


async def test_position_and_job_are_one_transaction(state: Path) -> None:
    """Another connection never sees one without the other, while both are written many times."""
    store = Store(str(state))
    reader = sqlite3.connect(str(state / FILE_NAME))
    seen = set()
    for round_ in range(200):
        user = f"user{round_}"
        store.put_cursor(key(user), LogPosition(1, 1, 1, round_, 1))
        store.put_job(replace(FULL_JOB, key=JobKey(User(user), PEER)))
        for _ in range(round_ % 4):
            cursors, jobs = reader.execute(
                "SELECT (SELECT count(*) FROM cursor), (SELECT count(*) FROM job)"
            ).fetchone()
            assert cursors == jobs
            seen.add(cursors)
            await asyncio.sleep(0.0005)
    reader.close()
    await store.close()
    assert len(seen) > 3
    assert on_disk(state) == (200, 200)


WRITER = """
import asyncio, sys
from dataclasses import replace
from dovesyncd.core.model import *
from dovesyncd.store import CursorKey, Store

async def main():
    store = Store(sys.argv[1])
    print("open", flush=True)
    number = 0
    while True:
        for _ in range(7):
            number += 1
            user = User(f"user{number % 50}")
            store.put_cursor(CursorKey(user, b"", b"log"), LogPosition(number, 1, 1, number, 1))
            store.put_job(Job(JobKey(user, PeerName("b")), first_change=float(number)))
        # Without a pause the loop would keep the interpreter from the thread that writes.
        await asyncio.sleep(0.001)

asyncio.run(main())
"""


async def test_kill_leaves_no_position_without_its_job(state: Path) -> None:
    wal = state / f"{FILE_NAME}-wal"
    for _ in range(5):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(state)], stdout=subprocess.PIPE)
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"open\n"
            wait_until(lambda: os.path.getsize(wal) > 100_000, 10, "the writer writes")
        finally:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        contents = await reopened(state)
        assert contents.cursors
        for cursor, position in contents.cursors.items():
            assert contents.jobs[JobKey(cursor.user, PEER)].first_change == float(position.offset)


# Errors ---------------------------------------------------------------------------------------------


async def test_write_error_keeps_everything(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "RETRY_WRITE", 0.01)
    store = Store(str(state))
    other = sqlite3.connect(str(state / FILE_NAME), isolation_level=None)
    other.execute("CREATE TRIGGER broken BEFORE INSERT ON job BEGIN SELECT RAISE(FAIL, 'disk on fire'); END")
    store.put_cursor(key("ann"), LogPosition(1, 1, 1, 1, 1))
    store.put_job(replace(FULL_JOB, attempts=1))
    await until(lambda: store.failing_since is not None, "the error is noticed")
    assert on_disk(state) == (0, 0), "the position was not written either"
    store.put_job(replace(FULL_JOB, attempts=2))
    store.put_cursor(key("bob"), LogPosition(1, 1, 1, 1, 1))
    assert store.unwritten == 3
    other.execute("DROP TRIGGER broken")
    other.close()
    await until(lambda: store.failing_since is None, "writing works again")
    assert store.unwritten == 0
    await store.close()
    contents = await reopened(state)
    assert set(contents.cursors) == {key("ann"), key("bob")}
    assert contents.jobs[FULL_JOB.key].attempts == 2, "the newer one is not overwritten by the one put back"
    messages = [record.getMessage() for record in caplog.records]
    assert sum("disk on fire" in message for message in messages) == 1
    assert sum("writing works again" in message for message in messages) == 1


async def test_close_says_what_could_not_be_written(state: Path) -> None:
    store = Store(str(state))
    other = sqlite3.connect(str(state / FILE_NAME), isolation_level=None)
    other.execute("CREATE TRIGGER broken BEFORE INSERT ON job BEGIN SELECT RAISE(FAIL, 'disk on fire'); END")
    other.close()
    store.put_job(FULL_JOB)
    with pytest.raises(StoreError, match="1 rows could not be written"):
        await store.close()
    # The lock is free again.
    assert (await reopened(state)).jobs == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


async def test_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "RETRY_WRITE", 0.01)
    store = Store(str(small_disk))
    ballast = small_disk / "ballast"
    free = os.statvfs(small_disk)
    ballast.write_bytes(b"x" * (free.f_bavail * free.f_bsize))
    jobs = [
        replace(FULL_JOB, key=JobKey(User(f"user{number}"), PEER), state="A" * 400) for number in range(100)
    ]
    for job in jobs:
        store.put_job(job)
        store.put_cursor(key(job.key.user), LogPosition(1, 1, 1, 1, 1))
    await until(lambda: store.failing_since is not None, "the disk is full")
    assert store.unwritten == 200
    ballast.unlink()
    await until(lambda: not store.unwritten and store.failing_since is None, "there is room again")
    await store.close()
    contents = await reopened(small_disk)
    assert set(contents.jobs.values()) == set(jobs)
    assert len(contents.cursors) == 100


async def test_read_only_disk(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="Read-only file system"):
        Store(str(small_disk))


async def test_no_room_to_begin(small_disk: Path) -> None:
    (small_disk / "lock").touch()
    free = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_bsize))
    with pytest.raises(StoreError, match="full"):
        Store(str(small_disk))


# Other files in its place -----------------------------------------------------------------------------


async def filled(directory: Path, rows: int = 500) -> None:
    store = Store(str(directory))
    for number in range(rows):
        store.put_job(replace(FULL_JOB, key=JobKey(User(f"user{number}"), PEER)))
        store.put_cursor(key(f"user{number}"), LogPosition(1, 1, 1, number, 1))
    await store.close()


def aside(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if "unreadable" in path.name)


async def assert_begun_anew(directory: Path, damaged: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(str(directory))
    assert store.load() == ({}, {})
    store.put_job(FULL_JOB)
    await store.close()
    assert (await reopened(directory)).jobs == {FULL_JOB.key: FULL_JOB}
    (kept,) = (name for name in aside(directory) if not name.endswith(("-wal", "-shm")))
    assert (directory / kept).read_bytes() == damaged
    (message,) = (record for record in caplog.records if "can't be read" in record.getMessage())
    assert message.levelno == logging.ERROR
    assert kept in message.getMessage()


async def test_a_file_that_is_no_database_is_set_aside(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    garbage = b"not a database at all, " * 1000
    (state / FILE_NAME).write_bytes(garbage)
    await assert_begun_anew(state, garbage, caplog)


@pytest.mark.parametrize("page", [1, 2, 5])
async def test_a_damaged_database_is_set_aside(
    state: Path, caplog: pytest.LogCaptureFixture, page: int
) -> None:
    """Page 1 holds the schema, the others rows."""
    await filled(state)
    path = state / FILE_NAME
    data = bytearray(path.read_bytes())
    start = 100 if page == 1 else (page - 1) * 4096
    data[start : start + 3000] = os.urandom(3000)
    path.write_bytes(data)
    await assert_begun_anew(state, bytes(data), caplog)


async def test_words_that_no_version_wrote_are_set_aside(
    state: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await filled(state, 3)
    with sqlite3.connect(str(state / FILE_NAME)) as db:
        db.execute("UPDATE job SET reasons = 'TELEPATHY'")
    db.close()
    damaged = (state / FILE_NAME).read_bytes()
    await assert_begun_anew(state, damaged, caplog)


async def test_an_empty_file_is_filled(state: Path) -> None:
    (state / FILE_NAME).touch()
    assert await reopened(state) == ({}, {})
    assert aside(state) == []


async def test_a_newer_schema_is_refused_and_left_alone(state: Path) -> None:
    await filled(state, 1)
    with sqlite3.connect(str(state / FILE_NAME)) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    db.close()
    with pytest.raises(StoreError, match=r"written by a newer dovesyncd .* background pass"):
        Store(str(state))
    assert aside(state) == []
    assert on_disk(state) == (1, 1)


async def test_one_directory_serves_one_daemon(state: Path) -> None:
    store = Store(str(state))
    with pytest.raises(StoreError, match="in use by another dovesyncd"):
        Store(str(state))
    await store.close()
    await reopened(state)


async def test_the_lock_is_not_given_to_children(state: Path) -> None:
    store = Store(str(state))
    child = await asyncio.create_subprocess_exec("sleep", "1000", close_fds=False)
    await store.close()
    await reopened(state)
    child.kill()
    await child.wait()


async def test_the_directory_is_made_for_its_owner_only(state: Path) -> None:
    await reopened(state / "new" / "state")
    assert (state / "new" / "state").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("what", ["file", "link"])
async def test_a_place_that_is_no_directory(state: Path, what: str) -> None:
    place = state / "state"
    if what == "file":
        place.touch()
    else:
        place.mkdir()
        (place / "lock").symlink_to(state / "elsewhere")
    with pytest.raises(StoreError):
        Store(str(place))
    assert not (state / "elsewhere").exists()


async def test_migrations_run_once_and_in_order(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(state, 2)
    more = (
        *MIGRATIONS,
        "CREATE TABLE second (x INTEGER); INSERT INTO second VALUES (1);",
        "INSERT INTO second SELECT x + 1 FROM second;",
    )
    monkeypatch.setattr(store_module, "MIGRATIONS", more)
    for _ in range(2):
        assert len((await reopened(state)).jobs) == 2
        with sqlite3.connect(str(state / FILE_NAME)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (len(more),)
            assert db.execute("SELECT x FROM second").fetchall() == [(1,), (2,)]
        db.close()


async def test_a_failing_migration_changes_nothing(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await filled(state, 2)
    broken = (*MIGRATIONS, "CREATE TABLE second (x INTEGER); INSERT INTO nowhere VALUES (1);")
    monkeypatch.setattr(store_module, "MIGRATIONS", broken)
    with pytest.raises(StoreError, match="nowhere"):
        Store(str(state))
    monkeypatch.setattr(store_module, "MIGRATIONS", MIGRATIONS)
    assert len((await reopened(state)).jobs) == 2
    assert aside(state) == []
