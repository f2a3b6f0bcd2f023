"""The daemon's memory: positions in logs and jobs, in SQLite. The only module that knows sqlite3.

Everything is held in RAM by its owners and written behind, in one transaction for all that came together:
a position never gets to disk without the job that its records made. What a crash keeps from being written
is found again, because the position in the log was not written either. So commits need no fsync.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional, TypeVar

from dovesyncd.core.errors import StoreError
from dovesyncd.core.health import Work
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
from dovesyncd.waiting import wait_for_event

log = logging.getLogger(__name__)

FILE_NAME = "dovesyncd.sqlite3"
RETRY_WRITE = 5.0  # seconds
# Seconds that one write may take. Storage that fails over can take minutes, and a restart would wait as well.
_PATIENCE = 300.0
# The database and what SQLite puts beside it.
_SUFFIXES = ("", "-wal", "-shm", "-journal")
# How sqlite3's OperationalError begins where the file isn't what this program wrote: whatever else it says
# (full, locked, I/O error, read-only) may pass by itself.
_FOREIGN = ("no such table", "no such column", "table ", "Could not decode")
_TYPES: dict[str, type] = {"BLOB": bytes, "TEXT": str, "INTEGER": int, "REAL": float}

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

# Each entry takes the schema from version n to n + 1.
MIGRATIONS = (
    """
    CREATE TABLE cursor (
        user BLOB NOT NULL,
        directory BLOB NOT NULL,
        log BLOB NOT NULL,
        inode INTEGER NOT NULL,
        indexid INTEGER NOT NULL,
        file_seq INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        digest INTEGER NOT NULL,
        PRIMARY KEY (user, directory, log)
    ) WITHOUT ROWID;
    CREATE TABLE job (
        user BLOB NOT NULL,
        peer TEXT NOT NULL,
        priority INTEGER NOT NULL,
        reasons TEXT NOT NULL,
        first_change REAL,
        due REAL NOT NULL,
        attempts INTEGER NOT NULL,
        repeats INTEGER NOT NULL,
        wants_full INTEGER NOT NULL,
        last_start REAL,
        last_seconds REAL,
        empty_syncs INTEGER NOT NULL,
        last_success REAL,
        last_pass REAL,
        next_pass REAL NOT NULL,
        last_outcome TEXT,
        last_error TEXT NOT NULL,
        state TEXT NOT NULL,
        base_state TEXT NOT NULL,
        destination TEXT NOT NULL,
        contested_since REAL,
        confirm_at REAL,
        PRIMARY KEY (user, peer)
    ) WITHOUT ROWID;
    """,
)

_SAVE_CURSOR = "INSERT OR REPLACE INTO cursor VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_DROP_CURSOR = "DELETE FROM cursor WHERE user = ? AND directory = ? AND log = ?"
_SAVE_JOB = (
    "INSERT OR REPLACE INTO job VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


class CursorKey(NamedTuple):
    """Which log: its user, its directory relative to the user's index root, and its file name."""

    user: User
    directory: bytes
    log: bytes


class Contents(NamedTuple):
    cursors: dict[CursorKey, LogPosition]
    jobs: dict[JobKey, Job]


class Store:
    """``put_*`` take effect at once for the caller and on disk a moment later; ``close`` writes the rest.

    ``failing_since`` (Unix seconds) and ``last_error`` are set while writing fails and is tried again:
    nothing leaves the memory before it is on disk. What trying again can't heal comes out of ``run``.
    """

    def __init__(self, directory: str) -> None:
        directory = os.path.abspath(directory)
        self.path = os.path.join(directory, FILE_NAME)
        # What is not yet known to be on disk.
        self._cursors: dict[CursorKey, Optional[LogPosition]] = {}
        self._jobs: dict[JobKey, Job] = {}
        self._thread = ThreadPoolExecutor(1, "store")
        self._writing: Optional[asyncio.Task[None]] = None
        self._trying_since: Optional[float] = None
        self._closing = asyncio.Event()
        self._failed = asyncio.Event()
        self._failure: Optional[BaseException] = None
        self._abandoned = False
        self.failing_since: Optional[float] = None
        self.last_error = ""
        self._lock_fd = self._lock(directory)
        try:
            self._db = self._open()
        except StoreError:
            os.close(self._lock_fd)
            raise

    def _lock(self, directory: str) -> int:
        lock = os.path.join(directory, "lock")
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            _check(directory, stat.S_IFDIR)
            for path in (lock, *(self.path + suffix for suffix in _SUFFIXES)):
                _check(path, stat.S_IFREG)
            fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise StoreError(directory, error.strerror or str(error)) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise StoreError(
                directory, "in use by another dovesyncd", "one state directory serves one daemon"
            ) from error
        return fd

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if not isinstance(error, sqlite3.OperationalError):
                return self._begin_anew(error)
            # SQLite has a wrong word for this one where it makes the file for shared memory.
            free = os.statvfs(os.path.dirname(self.path))
            full = free.f_bavail * free.f_frsize < 65536
            raise StoreError(self.path, str(error), "the file system is full" if full else "") from error

    def _begin_anew(self, why: Exception) -> sqlite3.Connection:
        aside = self._set_aside()
        log.error(
            "The database can't be read (%s): kept as %s, and begun anew. "
            "Every user gets a background pass; nothing else is lost.",
            why,
            aside,
        )
        try:
            return self._connect()
        except sqlite3.Error as error:
            raise StoreError(self.path, str(error)) from error

    def _set_aside(self) -> str:
        """Renames the file, which nobody has open any more, and returns its new path."""
        aside = f"{self.path}.unreadable-{int(time.time())}"
        try:
            for suffix in _SUFFIXES:
                if os.path.lexists(self.path + suffix):
                    os.replace(self.path + suffix, aside + suffix)
        except OSError as error:
            raise StoreError(self.path, f"can't be set aside: {error.strerror}") from error
        return aside

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > len(MIGRATIONS):
                raise StoreError(
                    self.path,
                    f"written by a newer dovesyncd (schema {version}, this one knows {len(MIGRATIONS)})",
                    "move the file away to begin with one background pass over all users",
                )
            for number, script in enumerate(MIGRATIONS[version:], version + 1):
                db.executescript(f"BEGIN;{script};PRAGMA user_version = {number};COMMIT;")
            self._opened = self._identity()
        except (sqlite3.Error, UnicodeDecodeError, StoreError):
            db.close()
            raise
        return db

    def _identity(self) -> tuple[tuple[int, int], ...]:
        """Which files lie where this database was opened. SQLite would go on with removed ones."""
        try:
            found = [os.lstat(self.path + suffix) for suffix in ("", "-wal")]
        except FileNotFoundError as error:
            raise StoreError(error.filename, "is missing") from error
        return tuple((status.st_dev, status.st_ino) for status in found)

    def load(self) -> Contents:
        """Everything that is on disk. For the start, before anything is put."""
        try:
            cursors = {
                CursorKey(User(os.fsdecode(user)), directory, name): _position(*position)
                for user, directory, name, *position in self._rows("cursor")
            }
            jobs = {job.key: job for job in map(_job, self._rows("job"))}
        except (sqlite3.Error, ValueError, KeyError, TypeError) as error:
            if isinstance(error, sqlite3.OperationalError) and not _damaged(error):
                raise StoreError(self.path, str(error)) from error
            self._db.close()
            self._db = self._begin_anew(error)
            return Contents({}, {})
        return Contents(cursors, jobs)

    def _rows(self, table: str) -> list[tuple[Any, ...]]:
        """Raises TypeError for a value of another type than its column, which SQLite lets pass."""
        # Never a cursor that an error leaves open: a connection is not closed before its last one, and would
        # then remove the WAL of the new database.
        columns = self._db.execute(f"PRAGMA table_info({table})").fetchall()
        types = [
            _TYPES[declared] if notnull else (_TYPES[declared], type(None))
            for _, _, declared, notnull, _, _ in columns
        ]
        rows = self._db.execute(f"SELECT * FROM {table}").fetchall()  # noqa: S608
        for row in rows:
            if not all(map(isinstance, row, types)):
                raise TypeError(f"a row of {table} holds what it can't hold")
        return rows

    def put_cursor(self, key: CursorKey, position: Optional[LogPosition]) -> None:
        """Remembers a position, or forgets it."""
        if not self._abandoned:
            self._cursors[key] = position
            self._wake()

    def put_job(self, job: Job) -> None:
        if not self._abandoned:
            self._jobs[job.key] = job
            self._wake()

    @property
    def unwritten(self) -> int:
        """Rows that are not yet known to be on disk."""
        return len(self._cursors) + len(self._jobs)

    @property
    def work(self) -> Work:
        """A try that failed and waits for the next one is work done."""
        return Work("store", self._trying_since, _PATIENCE)

    async def run(self) -> None:
        """Raises the error that ends all writing, when it comes: StoreError if the database is gone or
        damaged, anything else is an error of the program. Its cancellation interrupts no write."""
        await self._failed.wait()
        if self._failure is not None:
            raise self._failure

    def _wake(self) -> None:
        ended = self._failed.is_set() or self._closing.is_set()
        if not ended and (self._writing is None or self._writing.done()):
            self._trying_since = time.monotonic()
            self._writing = asyncio.get_running_loop().create_task(self._write(), name="write")
            self._writing.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._failure = task.exception()
            self._failed.set()

    async def _write(self) -> None:
        # Everything of the callback that woke this belongs into the same transaction.
        await asyncio.sleep(0)
        while self.unwritten and not self._closing.is_set():
            if not await self._try():
                await wait_for_event(self._closing, RETRY_WRITE)

    async def _try(self) -> bool:
        """Writes all there is in one transaction; False if that has to be tried again."""
        cursors, jobs = dict(self._cursors), dict(self._jobs)
        self._trying_since = time.monotonic()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, cursors, jobs)
        except (sqlite3.OperationalError, OSError) as error:
            self.last_error = str(error)
            if self.failing_since is None:
                self.failing_since = time.time()
                log.error("%s: %s; kept in memory, and tried again", self.path, error)
            return False
        finally:
            self._trying_since = None
        _forget(self._cursors, cursors)
        _forget(self._jobs, jobs)
        if self.failing_since is not None:
            self.failing_since, self.last_error = None, ""
            log.warning("%s: writing works again, nothing was lost", self.path)
        return True

    def _commit(self, cursors: dict[CursorKey, Optional[LogPosition]], jobs: dict[JobKey, Job]) -> None:
        """Runs in the thread. Raises StoreError for what trying again can't heal."""
        if self._identity() != self._opened:
            raise StoreError(self.path, "replaced while it was in use")
        try:
            self._transaction(cursors, jobs)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            if not _damaged(error):
                raise
            self._db.close()
            raise StoreError(
                self.path,
                f"{error}; kept as {self._set_aside()}",
                "the next start begins anew, with a background pass over all users; nothing else is lost",
            ) from error

    def _transaction(self, cursors: dict[CursorKey, Optional[LogPosition]], jobs: dict[JobKey, Job]) -> None:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany(
                _SAVE_CURSOR,
                (
                    (os.fsencode(key.user), key.directory, key.log, _signed(position.inode), *position[1:])
                    for key, position in cursors.items()
                    if position is not None
                ),
            )
            db.executemany(
                _DROP_CURSOR,
                (
                    (os.fsencode(key.user), key.directory, key.log)
                    for key, position in cursors.items()
                    if position is None
                ),
            )
            db.executemany(_SAVE_JOB, map(_row, jobs.values()))
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")

    def abandon(self) -> None:
        """Forgets what is not yet on disk, for good: it may be half of what belongs together. The logs still
        tell what happened."""
        self._abandoned = True
        self._cursors.clear()
        self._jobs.clear()

    async def close(self) -> None:
        """Writes what is left, once, and closes. Raises StoreError if something could not be written, and
        what ``run`` raises unless that was followed by ``abandon``."""
        self._closing.set()
        try:
            if self._writing is not None:
                await asyncio.wait({self._writing})
                # Its callback may not have been called yet.
                self._written(self._writing)
            while self._failure is None and self.unwritten and await self._try():
                pass
        finally:
            self._thread.shutdown()
            self._db.close()
            os.close(self._lock_fd)
        if self._failure is not None and not self._abandoned:
            raise self._failure
        if self.unwritten:
            raise StoreError(self.path, f"{self.unwritten} rows could not be written", self.last_error)


def _check(path: str, file_type: int) -> None:
    """Refuses what somebody else may have put at ``path`` for the daemon to follow or to believe."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if stat.S_IFMT(status.st_mode) != file_type:
        expected = "directory" if file_type == stat.S_IFDIR else "regular file"
        raise StoreError(path, f"is {stat.filemode(status.st_mode)}, expected a {expected}")
    if status.st_uid != os.geteuid():
        raise StoreError(
            path,
            f"belongs to uid {status.st_uid}, expected {os.geteuid()}",
            "change its owner, or move it away",
        )


def _damaged(error: Exception) -> bool:
    """Whether the file holds no database, or not one of this program. SQLITE_CORRUPT and SQLITE_NOTADB are of
    no subclass, and sqlite3 can't decode every message about a damaged schema."""
    if isinstance(error, sqlite3.OperationalError):
        return str(error).startswith(_FOREIGN)
    return type(error) is sqlite3.DatabaseError or isinstance(error, UnicodeDecodeError)


def _forget(pending: dict[_Key, _Value], written: dict[_Key, _Value]) -> None:
    """Takes from ``pending`` what has not changed since."""
    for key, value in written.items():
        if key in pending and pending[key] is value:
            del pending[key]


def _signed(inode: int) -> int:
    """Some file systems use all 64 bits of an inode number; SQLite's integers have a sign."""
    return inode - 2**64 if inode >= 2**63 else inode


def _position(inode: int, *rest: int) -> LogPosition:
    """Raises ValueError for numbers that no log has."""
    if min(rest) < 0:
        raise ValueError("a position before the beginning of its log")
    return LogPosition(inode % 2**64, *rest)


def _row(job: Job) -> tuple[object, ...]:
    return (
        os.fsencode(job.key.user),
        job.key.peer,
        int(job.priority),
        ",".join(kind.name for kind in job.reasons),
        job.first_change,
        job.due,
        job.attempts,
        job.repeats,
        int(job.wants_full),
        job.last_start,
        job.last_seconds,
        job.empty_syncs,
        job.last_success,
        job.last_pass,
        job.next_pass,
        None if job.last_outcome is None else job.last_outcome.value,
        # Dovecot's words may hold hostile names: SQLite takes no surrogates.
        job.last_error.encode("utf-8", "backslashreplace").decode(),
        job.state,
        job.base_state,
        job.destination,
        job.contested_since,
        job.confirm_at,
    )


def _job(row: tuple[Any, ...]) -> Job:
    """The reverse of ``_row``. Raises ValueError or KeyError for words that no version wrote."""
    user, peer, priority, reasons, first_change, due, attempts, repeats, wants_full, *history = row
    last_start, last_seconds, empty_syncs, last_success, last_pass, next_pass, outcome, *rest = history
    error, state, base_state, destination, contested_since, confirm_at = rest
    return Job(
        JobKey(User(os.fsdecode(user)), PeerName(peer)),
        priority=Priority(priority),
        reasons=tuple(ChangeKind[name] for name in reasons.split(",") if name),
        first_change=first_change,
        due=due,
        attempts=attempts,
        repeats=repeats,
        wants_full=bool(wants_full),
        last_start=last_start,
        last_seconds=last_seconds,
        empty_syncs=empty_syncs,
        last_success=last_success,
        last_pass=last_pass,
        next_pass=next_pass,
        last_outcome=None if outcome is None else OutcomeClass(outcome),
        last_error=error,
        state=state,
        base_state=base_state,
        destination=destination,
        contested_since=contested_since,
        confirm_at=confirm_at,
    )
