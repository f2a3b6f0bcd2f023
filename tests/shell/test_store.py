"""The store on a real disk: what survives, what is refused, and what a crash can't part."""

from __future__ import annotations

import asyncio
import os
import sqlite3
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


async def filled(directory: Path, rows: int = 500) -> None:
    """Writes that many jobs and positions."""
    store = Store(str(directory))
    for number in range(rows):
        store.put_job(replace(FULL_JOB, key=JobKey(User(f"user{number}"), PEER)))
        store.put_cursor(key(f"user{number}"), LogPosition(1, 1, 1, number, 1))
    await store.close()


def aside(directory: Path) -> list[str]:
    """The files that have been set aside."""
    return sorted(path.name for path in directory.iterdir() if "unreadable" in path.name)


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


# Other files in its place -----------------------------------------------------------------------------


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
