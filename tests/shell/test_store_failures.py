"""What can happen to the store: crashes, power loss, full disks, damage, files of others in its place."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dovesyncd import store as store_module
from dovesyncd.core.errors import StoreError
from dovesyncd.core.model import Job, JobKey, LogPosition, User
from dovesyncd.store import FILE_NAME, Contents, Store
from tests.shell.conftest import open_files
from tests.shell.test_store import FULL_JOB, PEER, aside, filled, key, on_disk, reopened
from tests.shell.waiting import until

WAL_NAME = f"{FILE_NAME}-wal"
# https://www.sqlite.org/fileformat2.html#walformat
WAL_HEADER, FRAME_HEADER, PAGE = 32, 24, 4096
FRAME = FRAME_HEADER + PAGE
USERS = 17

FIRST = LogPosition(1, 1, 1, 1, 1)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root")


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
    print(f"SEED={seed}")
    return random.Random(seed)


# A history of pairs ---------------------------------------------------------------------------------
#
# Pair n is a position and a job that belong together, of one of a few users.


def user_of(number: int) -> User:
    return User(f"user{number % USERS}")


def put_pair(store: Store, number: int, state: str = "") -> None:
    user = user_of(number)
    store.put_cursor(key(user), LogPosition(number, 1, 1, number, 1))
    store.put_job(Job(JobKey(user, PEER), first_change=float(number), state=state))


async def write_pairs(store: Store, numbers: range, rng: random.Random) -> None:
    """One transaction each, of several sizes."""
    for number in numbers:
        put_pair(store, number, "A" * rng.choice((0, 40, 400, 9000)))
        await until(lambda: not store.unwritten, "the pair is written")


def assert_history(contents: Contents, length: int) -> None:
    """Exactly the first ``length`` pairs were written."""
    latest = {user_of(number): number for number in range(1, length + 1)}
    assert {cursor.user: position.offset for cursor, position in contents.cursors.items()} == latest
    assert {job.user: contents.jobs[job].first_change for job in contents.jobs} == latest


def commits(wal: bytes) -> int:
    """How many transactions end in ``wal``: their last frames say how large the database is then."""
    starts = range(WAL_HEADER, len(wal) - FRAME + 1, FRAME)
    return sum(int.from_bytes(wal[start + 4 : start + 8], "big") != 0 for start in starts)


def intact(image: bytes, wal: bytes) -> bytes:
    """The whole frames of ``wal`` that ``image`` begins with."""
    if image[:WAL_HEADER] != wal[:WAL_HEADER]:
        return b""
    end = WAL_HEADER
    while end < len(wal) and image[end : end + FRAME] == wal[end : end + FRAME]:
        end += FRAME
    return wal[:end]


async def assert_restored(place: Path, database: bytes, wal: bytes, length: int) -> None:
    """What a power loss left is the first ``length`` pairs, and can be written on."""
    place.mkdir()
    (place / FILE_NAME).write_bytes(database)
    (place / WAL_NAME).write_bytes(wal)
    store = Store(str(place))
    contents = store.load()
    assert_history(contents, length)
    put_pair(store, length + 1)
    await store.close()
    assert_history(await reopened(place), length + 1)
    assert aside(place) == []
    shutil.rmtree(place)


def sampled_cuts(length: int, rng: random.Random) -> list[int]:
    """Frame boundaries, and places inside of frames and of the header."""
    boundaries = [0, *range(WAL_HEADER, length + 1, FRAME)]
    inside = [rng.randrange(length) for _ in range(30)]
    return sorted({*rng.sample(boundaries, min(len(boundaries), 80)), *inside, 1, WAL_HEADER, length})


async def test_every_prefix_of_the_wal_is_a_prefix_of_history(state: Path, rng: random.Random) -> None:
    source = state / "source"
    store = Store(str(source))
    schema = commits((source / WAL_NAME).read_bytes())
    await write_pairs(store, range(1, 151), rng)
    database, wal = (source / FILE_NAME).read_bytes(), (source / WAL_NAME).read_bytes()
    await store.close()
    assert commits(wal) == schema + 150
    for cut in sampled_cuts(len(wal), rng):
        prefix = wal[:cut]
        await assert_restored(state / "restored", database, prefix, max(0, commits(prefix) - schema))


async def test_a_damaged_end_of_the_wal_is_ignored(state: Path, rng: random.Random) -> None:
    """Blocks that were not yet written hold zeros or what was there before; the last one may be torn."""
    source = state / "source"
    store = Store(str(source))
    schema = commits((source / WAL_NAME).read_bytes())
    await write_pairs(store, range(1, 61), rng)
    database, wal = (source / FILE_NAME).read_bytes(), (source / WAL_NAME).read_bytes()
    await store.close()
    for number in range(60):
        start = len(wal) - rng.randrange(1, 6 * FRAME) if number % 2 else rng.randrange(len(wal))
        length = rng.choice((1, 8, 512, PAGE, len(wal)))
        old = wal[start : start + length]
        new = rng.choice((bytes(len(old)), rng.randbytes(len(old))))
        damaged = wal[:start] + new + wal[start + length :]
        await assert_restored(
            state / "restored", database, damaged, max(0, commits(intact(damaged, wal)) - schema)
        )


async def test_a_wal_that_is_written_over_again(state: Path, rng: random.Random) -> None:
    """After a checkpoint it begins anew and keeps its old frames behind the new ones."""
    source = state / "source"
    store = Store(str(source))
    await write_pairs(store, range(1, 101), rng)
    other = sqlite3.connect(str(source / FILE_NAME))
    assert other.execute("PRAGMA wal_checkpoint(RESTART)").fetchone()[0] == 0
    other.close()
    database, old = (source / FILE_NAME).read_bytes(), (source / WAL_NAME).read_bytes()
    await write_pairs(store, range(101, 131), rng)
    new = (source / WAL_NAME).read_bytes()
    assert len(new) == len(old), "the new frames lie before the old ones"
    assert (source / FILE_NAME).read_bytes() == database
    await store.close()
    end = next(at for at in range(len(new), 0, -1) if new[at - 1] != old[at - 1])
    new_frames = new[: end + FRAME - (end - WAL_HEADER) % FRAME]
    assert commits(new_frames) in (30, 31)
    for cut in sampled_cuts(len(new_frames), rng):
        image = new[:cut] + old[cut:]
        length = 100 + min(30, commits(intact(image, new_frames)))
        await assert_restored(state / "restored", database, image, length)


async def test_power_loss_during_a_checkpoint(state: Path, rng: random.Random) -> None:
    """Any sectors of the database may be old or new while the WAL is whole."""
    source = state / "source"
    store = Store(str(source))
    await write_pairs(store, range(1, 101), rng)
    before, wal = (source / FILE_NAME).read_bytes(), (source / WAL_NAME).read_bytes()
    await store.close()
    after = (source / FILE_NAME).read_bytes()
    assert len(after) > len(before)
    for _ in range(30):
        size = rng.randrange(len(before), len(after) + 1)
        sectors = range(0, size, 512)
        torn = b"".join(rng.choice((before, after))[at : at + 512].ljust(512, b"\0") for at in sectors)
        await assert_restored(state / "restored", torn, wal, 100)


# Killed ---------------------------------------------------------------------------------------------

WRITER = """
import asyncio, random, sys
from dovesyncd.store import Store
from tests.shell.test_store_failures import put_pair

async def main():
    rng = random.Random(int(sys.argv[2]))
    store = Store(sys.argv[1])
    number = max((position.offset for position in store.load().cursors.values()), default=0)
    while True:
        for _ in range(rng.randrange(1, 40)):
            number += 1
            put_pair(store, number, "A" * rng.choice((0, 40, 400, 9000)))
        # Without a pause the loop would keep the interpreter from the thread that writes.
        await asyncio.sleep(0.001)
        if not store.unwritten:
            print(number, flush=True)

asyncio.run(main())
"""


async def test_kill_loses_nothing_that_was_on_disk(state: Path, rng: random.Random) -> None:
    """Each writer begins with what the killed one before it left."""
    for _ in range(6):
        command = [sys.executable, "-c", WRITER, str(state), str(rng.randrange(1 << 32))]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        try:
            assert writer.stdout is not None
            reports = [writer.stdout.readline() for _ in range(rng.randrange(1, 60))]
        finally:
            writer.send_signal(signal.SIGKILL)
            rest, _ = writer.communicate()
        reports += [line for line in rest.splitlines(keepends=True) if line.endswith(b"\n")]
        contents = await reopened(state)
        length = max(position.offset for position in contents.cursors.values())
        assert_history(contents, length)
        assert length >= int(reports[-1])
    assert aside(state) == []


# The task -------------------------------------------------------------------------------------------


def hold(state: Path) -> sqlite3.Connection:
    """Another connection that keeps the store from writing until its COMMIT."""
    other = sqlite3.connect(str(state / FILE_NAME), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other


def break_jobs(state: Path) -> sqlite3.Connection:
    """Another connection, after it has made every write of a job fail."""
    other = sqlite3.connect(str(state / FILE_NAME), isolation_level=None)
    other.execute("CREATE TRIGGER broken BEFORE INSERT ON job BEGIN SELECT disk_on_fire(); END")
    return other


async def test_an_error_of_the_program_ends_the_task(state: Path) -> None:
    store = Store(str(state))
    run = asyncio.create_task(store.run())
    store.put_cursor(key("ann"), FIRST)
    store.put_job(replace(FULL_JOB, state=object()))  # type: ignore[arg-type]
    with pytest.raises(sqlite3.Error, match="type"):
        await run
    assert store.unwritten == 2
    assert store.work.since is None
    store.put_cursor(key("bob"), FIRST)
    store.abandon()
    await store.close()
    assert await reopened(state) == ({}, {})


async def test_an_error_that_nobody_saw_comes_out_of_close(state: Path) -> None:
    store = Store(str(state))
    store.put_job(replace(FULL_JOB, state=object()))  # type: ignore[arg-type]
    with pytest.raises(sqlite3.Error, match="type"):
        await store.close()
    assert (await reopened(state)).jobs == {}


@pytest.mark.parametrize("whom", ["store", "write", "both"])
async def test_cancelled_while_it_writes(state: Path, whom: str) -> None:
    store = Store(str(state))
    run = asyncio.create_task(store.run(), name="store")
    other = hold(state)
    put_pair(store, 1)
    await asyncio.sleep(0)
    await until(lambda: store.work.since is not None, "it tries to write")
    for task in asyncio.all_tasks():
        if task.get_name() in ("store", "write") and whom in (task.get_name(), "both"):
            task.cancel()
    await asyncio.sleep(0)
    assert store.unwritten == 2, "not known to be on disk"
    put_pair(store, 1 + USERS)
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    other.execute("COMMIT")
    other.close()
    await closing
    run.cancel()
    await asyncio.wait({run})
    assert store.unwritten == 0
    contents = await reopened(state)
    assert [position.offset for position in contents.cursors.values()] == [1 + USERS]
    assert [job.first_change for job in contents.jobs.values()] == [float(1 + USERS)]


async def test_what_changes_while_it_is_written_is_written_again(state: Path) -> None:
    store = Store(str(state))
    other = hold(state)
    store.put_cursor(key("ann"), FIRST)
    store.put_cursor(key("bob"), FIRST)
    store.put_job(FULL_JOB)
    await asyncio.sleep(0)
    await until(lambda: store.work.since is not None, "it tries to write")
    store.put_cursor(key("ann"), LogPosition(1, 1, 1, 2, 1))
    store.put_cursor(key("bob"), None)
    store.put_job(replace(FULL_JOB, attempts=9))
    assert store.unwritten == 3
    other.execute("COMMIT")
    other.close()
    await until(lambda: not store.unwritten, "everything is written")
    assert on_disk(state) == (1, 1)
    await store.close()
    contents = await reopened(state)
    assert contents.cursors == {key("ann"): LogPosition(1, 1, 1, 2, 1)}
    assert contents.jobs[FULL_JOB.key].attempts == 9


async def test_work_is_what_it_does_not_get_on_with(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "RETRY_WRITE", 0.05)
    store = Store(str(state))
    assert store.work.since is None
    other = break_jobs(state)
    put_pair(store, 1)
    assert store.work.since is not None
    await until(lambda: store.failing_since is not None and store.work.since is None, "it waits after a try")
    assert store.unwritten == 2
    assert store.last_error == "no such function: disk_on_fire"
    other.execute("DROP TRIGGER broken")
    other.close()
    await until(lambda: not store.unwritten, "it is written")
    assert (store.work.since, store.failing_since, store.last_error) == (None, None, "")
    await store.close()


# Errors that pass -----------------------------------------------------------------------------------


async def test_write_error_keeps_everything(
    state: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_module, "RETRY_WRITE", 0.01)
    store = Store(str(state))
    other = break_jobs(state)
    store.put_cursor(key("ann"), FIRST)
    store.put_job(replace(FULL_JOB, attempts=1))
    await until(lambda: store.failing_since is not None, "the error is noticed")
    assert on_disk(state) == (0, 0), "the position was not written either"
    store.put_job(replace(FULL_JOB, attempts=2))
    store.put_cursor(key("bob"), FIRST)
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
    assert sum("disk_on_fire" in message for message in messages) == 1
    assert sum("writing works again" in message for message in messages) == 1


async def test_close_says_what_could_not_be_written(state: Path) -> None:
    store = Store(str(state))
    break_jobs(state).close()
    store.put_job(FULL_JOB)
    with pytest.raises(StoreError, match=r"1 rows could not be written \(no such function: disk_on_fire\)"):
        await store.close()
    # The lock is free again.
    assert (await reopened(state)).jobs == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path, "256k")


@pytest.fixture
def larger_disk(tmp_path: Path) -> Iterator[Path]:
    yield from mounted(tmp_path, "8m")


def mounted(parent: Path, size: str) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("mounting takes root")
    disk = parent / "disk"
    disk.mkdir()
    options = f"size={size},mode=755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Takes what is free there but ``leave`` bytes."""
    ballast = disk / "ballast"
    free = os.statvfs(disk)
    ballast.write_bytes(b"x" * (free.f_bavail * free.f_bsize - leave))
    return ballast


async def test_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "RETRY_WRITE", 0.01)
    store = Store(str(small_disk))
    ballast = fill(small_disk)
    jobs = [
        replace(FULL_JOB, key=JobKey(User(f"user{number}"), PEER), state="A" * 400) for number in range(100)
    ]
    for job in jobs:
        store.put_job(job)
        store.put_cursor(key(job.key.user), FIRST)
    await until(lambda: store.failing_since is not None, "the disk is full")
    assert store.last_error == "database or disk is full"
    assert store.unwritten == 200
    ballast.unlink()
    await until(lambda: not store.unwritten and store.failing_since is None, "there is room again")
    await store.close()
    contents = await reopened(small_disk)
    assert set(contents.jobs.values()) == set(jobs)
    assert len(contents.cursors) == 100


async def test_no_room_for_a_checkpoint(
    larger_disk: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite moves the WAL into the database after 1000 frames, for which the database has to grow."""
    monkeypatch.setattr(store_module, "RETRY_WRITE", 0.01)
    monkeypatch.setattr(sys.modules[__name__], "USERS", 1 << 20)
    store = Store(str(larger_disk))
    database, wal = larger_disk / FILE_NAME, larger_disk / WAL_NAME
    number = 0

    async def write_until(size: int) -> None:
        nonlocal number
        while store.failing_since is None and wal.stat().st_size < size:
            number += 1
            put_pair(store, number, "A" * 9000)
            await until(lambda: not store.unwritten or store.failing_since is not None, "a try")

    await write_until(900 * FRAME)
    ballast = fill(larger_disk, leave=200 * PAGE)
    await write_until(1 << 30)
    assert store.failing_since is not None
    assert store.unwritten == 2
    assert wal.stat().st_size > 1000 * FRAME, "a checkpoint was due"
    # A power loss in this state.
    (state / FILE_NAME).write_bytes(database.read_bytes())
    (state / WAL_NAME).write_bytes(wal.read_bytes())
    assert_history(await reopened(state), number - 1)
    put_pair(store, number + 1)
    ballast.unlink()
    await until(lambda: not store.unwritten and store.failing_since is None, "there is room again")
    await store.close()
    assert not wal.exists(), "the checkpoint was made"
    assert_history(await reopened(larger_disk), number + 1)


@pytest.mark.parametrize("rows", [0, 10])
async def test_read_only_disk(small_disk: Path, rows: int) -> None:
    if rows:
        await filled(small_disk, rows)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="Read-only file system"):
        Store(str(small_disk))


@pytest.mark.parametrize("rows", [0, 10])
async def test_no_room_to_begin(small_disk: Path, rows: int) -> None:
    """Once there is room, nothing is lost."""
    (small_disk / "lock").touch()
    await filled(small_disk, rows) if rows else None
    ballast = fill(small_disk)
    with pytest.raises(StoreError, match="full"):
        Store(str(small_disk))
    ballast.unlink()
    assert len((await reopened(small_disk)).jobs) == rows
    assert aside(small_disk) == []


# Damage ---------------------------------------------------------------------------------------------


def assert_aside_is_closed() -> None:
    """SQLite would remove the new WAL, by name, with the end of a connection to the old file."""
    assert not [path for path in open_files() if "unreadable" in path]


async def assert_begun_anew(directory: Path, damaged: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store = Store(str(directory))
    assert store.load() == ({}, {})
    assert_aside_is_closed()
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
    start = 100 if page == 1 else (page - 1) * PAGE
    data[start : start + 3000] = os.urandom(3000)
    path.write_bytes(data)
    await assert_begun_anew(state, bytes(data), caplog)


@pytest.mark.parametrize("size", [50, 100, 512, 4095, 4096, 4097, 3 * 4096, 5 * 4096 + 100, -4096])
async def test_a_truncated_database_is_set_aside(
    state: Path, caplog: pytest.LogCaptureFixture, size: int
) -> None:
    await filled(state)
    path = state / FILE_NAME
    whole = path.read_bytes()
    assert len(whole) > 6 * PAGE
    path.write_bytes(whole[:size])
    await assert_begun_anew(state, whole[:size], caplog)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE job SET reasons = 'TELEPATHY'",
        "UPDATE job SET due = x'00'",
        "UPDATE job SET state = CAST(x'ff' AS TEXT)",
        "UPDATE job SET attempts = 1.5",
        "UPDATE cursor SET offset = -1",
        "UPDATE cursor SET directory = 'text'",
        "ALTER TABLE cursor ADD COLUMN more INTEGER",
        "DROP TABLE job",
        "ALTER TABLE cursor ADD COLUMN more STRANGE",
    ],
)
async def test_what_no_version_wrote_is_set_aside(
    state: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    await filled(state, 3)
    with sqlite3.connect(str(state / FILE_NAME)) as db:
        db.execute(change)
    db.close()
    damaged = (state / FILE_NAME).read_bytes()
    await assert_begun_anew(state, damaged, caplog)


@pytest.mark.parametrize("content", [b"", b"S"])
async def test_an_empty_file_is_filled(state: Path, content: bytes) -> None:
    """To SQLite, one byte is none."""
    (state / FILE_NAME).write_bytes(content)
    assert await reopened(state) == ({}, {})
    assert aside(state) == []


def damage(whole: bytes, rng: random.Random) -> bytes:
    """Bits that flipped, sectors that were lost, pages in the place of others; not in the file's header."""
    data = bytearray(whole)
    for _ in range(rng.randrange(1, 9)):
        at = rng.randrange(100, len(data))
        kind = rng.randrange(3)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            at = max(512, at - at % 512)
            data[at : at + 512] = bytes(512)
        else:
            to, source = (rng.randrange(1, len(data) // PAGE) * PAGE for _ in range(2))
            data[to : to + PAGE] = data[source : source + PAGE]
    return bytes(data)


async def closed_with_damage(store: Store) -> bool:
    """Whether the last write came upon the damage."""
    try:
        await store.close()
    except StoreError as error:
        if "kept as" not in str(error):
            raise
        return True
    return False


async def test_no_damage_makes_a_crash_loop(state: Path, rng: random.Random) -> None:
    """Damage may go unseen, but no start fails, and what is loaded has the right types. Where writing
    comes upon it, the next start begins anew."""
    source = state / "source"
    await filled(source, 200)
    whole = (source / FILE_NAME).read_bytes()
    for _ in range(100):
        place = state / "damaged"
        place.mkdir()
        (place / FILE_NAME).write_bytes(damage(whole, rng))
        failures = 0
        for number in range(4):
            store = Store(str(place))
            contents = store.load()
            assert_aside_is_closed()
            assert all(min(position) >= 0 for position in contents.cursors.values())
            assert all(
                isinstance(job, Job) and job.due + job.next_pass >= 0 for job in contents.jobs.values()
            )
            for name in range(50):
                store.put_cursor(key(f"user{name * 4}", b"." * 50), None if number % 2 else FIRST)
            failures += await closed_with_damage(store)
        assert failures <= 1
        assert len([name for name in aside(place) if not name.endswith(("-wal", "-shm"))]) <= 1
        shutil.rmtree(place)


# While it is open -----------------------------------------------------------------------------------


async def large(directory: Path, rows: int = 1500) -> Store:
    """A store at work on more than SQLite keeps in memory."""
    store = Store(str(directory))
    for number in range(rows):
        store.put_job(Job(JobKey(User(f"user{number}"), PEER), state="A" * 2000))
    await store.close()
    store = Store(str(directory))
    assert len(store.load().jobs) == rows
    store.put_cursor(key("first"), FIRST)
    await until(lambda: not store.unwritten, "it writes")
    return store


def overwrite(path: Path, start: int) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(start)
        file.write(os.urandom(size - start))


@pytest.mark.parametrize("what", ["overwritten", "all but the first page", "emptied", "halved"])
async def test_damage_while_it_is_open_ends_the_task(
    state: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = await large(state)
    path = state / FILE_NAME
    if what == "emptied":
        os.truncate(path, 0)
    elif what == "halved":
        os.truncate(path, path.stat().st_size // 2)
    else:
        overwrite(path, 0 if what == "overwritten" else PAGE)
    run = asyncio.create_task(store.run())
    for number in range(0, 1500, 7):
        store.put_job(Job(JobKey(User(f"user{number}"), PEER), attempts=1))
    with pytest.raises(
        StoreError, match=r"malformed; kept as .* begins anew, with a background pass"
    ) as info:
        await run
    (kept,) = (name for name in aside(state) if not name.endswith(("-wal", "-shm")))
    assert kept in str(info.value)
    assert not path.exists()
    store.abandon()
    await store.close()
    # No crash loop: from now on all is well.
    for number in range(3):
        store = Store(str(state))
        assert len(store.load().jobs) == number
        store.put_job(Job(JobKey(User(f"user{number}"), PEER)))
        await store.close()
    assert len([name for name in aside(state) if not name.endswith(("-wal", "-shm"))]) == 1


@pytest.mark.parametrize("change", ["DROP TABLE job", "ALTER TABLE job ADD COLUMN more INTEGER"])
async def test_another_schema_while_it_is_open_ends_the_task(state: Path, change: str) -> None:
    store = Store(str(state))
    with sqlite3.connect(str(state / FILE_NAME)) as db:
        db.execute(change)
    db.close()
    store.put_job(FULL_JOB)
    with pytest.raises(StoreError, match=r"table.*job.* kept as"):
        await store.run()
    store.abandon()
    await store.close()
    assert (await reopened(state)).jobs == {}
    assert aside(state)


@pytest.mark.parametrize(
    "suffix, how", [("-wal", "emptied"), ("-wal", "overwritten"), ("-shm", "overwritten")]
)
async def test_damage_beside_it_makes_no_crash_loop(state: Path, suffix: str, how: str) -> None:
    """It may go unseen: SQLite has most of that in memory. A mapped file can't be truncated."""
    store = await large(state, 300)
    path = state / f"{FILE_NAME}{suffix}"
    os.truncate(path, 0) if how == "emptied" else overwrite(path, 0)
    for number in range(300):
        store.put_job(Job(JobKey(User(f"user{number}"), PEER), attempts=1))
    await closed_with_damage(store)
    for _ in range(3):
        assert len((await reopened(state)).jobs) in (0, 300)
    assert len([name for name in aside(state) if not name.endswith(("-wal", "-shm"))]) <= 1


@pytest.mark.parametrize("what", ["directory", "database", "wal", "replaced"])
async def test_removed_while_it_is_open(state: Path, what: str) -> None:
    """SQLite would go on writing into removed files."""
    place = state / "state"
    store = Store(str(place))
    put_pair(store, 1)
    await until(lambda: not store.unwritten, "it writes")
    if what == "directory":
        shutil.rmtree(place)
    elif what == "wal":
        (place / WAL_NAME).unlink()
    else:
        (place / FILE_NAME).unlink()
        if what == "replaced":
            (place / FILE_NAME).touch()
    put_pair(store, 2)
    with pytest.raises(
        StoreError, match="replaced while it was in use" if what == "replaced" else "is missing"
    ):
        await store.run()
    assert store.unwritten == 2
    store.abandon()
    await store.close()
    assert_history(await reopened(place), 1 if what == "wal" else 0)
    assert aside(place) == []


async def test_an_error_of_the_disk_is_tried_again(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory can't be looked at for a while."""
    monkeypatch.setattr(store_module, "RETRY_WRITE", 0.01)
    place = state / "state"
    store = Store(str(place))
    lstat = os.lstat

    def fails(path: str) -> os.stat_result:
        raise OSError(5, "Input/output error", path)

    monkeypatch.setattr(os, "lstat", fails)
    put_pair(store, 1)
    await until(lambda: store.failing_since is not None, "the error is noticed")
    monkeypatch.setattr(os, "lstat", lstat)
    await until(lambda: not store.unwritten, "it is written")
    await store.close()
    assert_history(await reopened(place), 1)


# Files of others ------------------------------------------------------------------------------------

FILES = ["lock", *(FILE_NAME + suffix for suffix in ("", "-wal", "-shm", "-journal"))]
STRANGER = 12345


@needs_root
@pytest.mark.parametrize("name", [".", *FILES])
async def test_what_belongs_to_somebody_else_is_refused(state: Path, name: str) -> None:
    place = state / "state"
    await filled(place, 1)
    path = place if name == "." else place / name
    if name != ".":
        path.touch()
    os.chown(path, STRANGER, STRANGER)
    before = {file.name: file.read_bytes() for file in place.iterdir()}
    with pytest.raises(StoreError) as info:
        Store(f"{place}/")
    assert str(info.value).startswith(f"{path}: belongs to uid {STRANGER}, expected {os.geteuid()}")
    assert {file.name: file.read_bytes() for file in place.iterdir()} == before
    os.chown(path, os.geteuid(), os.getegid())
    assert len((await reopened(place)).jobs) == 1


@pytest.mark.parametrize("kind", ["link", "dangling link", "fifo", "directory"])
@pytest.mark.parametrize("name", FILES)
async def test_what_is_no_file_is_refused(state: Path, name: str, kind: str) -> None:
    place, elsewhere = state / "state", state / "elsewhere"
    await filled(place, 1)
    path = place / name
    path.unlink(missing_ok=True)
    elsewhere.write_bytes(b"precious")
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "dangling link":
        path.symlink_to(state / "nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(StoreError) as info:
        Store(str(place))
    found = stat.filemode(path.lstat().st_mode)
    assert str(info.value) == f"{path}: is {found}, expected a regular file"
    assert elsewhere.read_bytes() == b"precious"
    assert not (state / "nowhere").exists()


@pytest.mark.parametrize("slash", ["", "/"])
async def test_a_link_to_a_directory_is_refused(state: Path, slash: str) -> None:
    place, elsewhere = state / "state", state / "elsewhere"
    elsewhere.mkdir()
    place.symlink_to(elsewhere)
    with pytest.raises(StoreError, match=f"^{place}: is l.*, expected a directory"):
        Store(f"{place}{slash}")
    assert list(elsewhere.iterdir()) == []
