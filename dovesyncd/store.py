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
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Optional

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
from dovesyncd.waiting import wait_for_event

log = logging.getLogger(__name__)

FILE_NAME = "dovesyncd.sqlite3"
RETRY_WRITE = 5.0  # seconds

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
        last_success REAL,
        last_pass REAL,
        next_pass REAL NOT NULL,
        last_outcome TEXT,
        last_error TEXT NOT NULL,
        state TEXT NOT NULL,
        base_state TEXT NOT NULL,
        contested_since REAL,
        confirm_at REAL,
        PRIMARY KEY (user, peer)
    ) WITHOUT ROWID;
    """,
)

_SAVE_CURSOR = "INSERT OR REPLACE INTO cursor VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_DROP_CURSOR = "DELETE FROM cursor WHERE user = ? AND directory = ? AND log = ?"
_SAVE_JOB = "INSERT OR REPLACE INTO job VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"


class CursorKey(NamedTuple):
    """Which log: its user, its directory relative to the user's index root, and its file name."""

    user: User
    directory: bytes
    log: bytes


class Contents(NamedTuple):
    cursors: dict[CursorKey, LogPosition]
    jobs: dict[JobKey, Job]


class Store:
    """``put_*`` take effect at once for the caller and on disk a moment later; ``close`` writes the rest."""

    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, FILE_NAME)
        self._cursors: dict[CursorKey, Optional[LogPosition]] = {}
        self._jobs: dict[JobKey, Job] = {}
        self._thread = ThreadPoolExecutor(1, "store")
        self._writing: Optional[asyncio.Task[None]] = None
        self._closing = asyncio.Event()
        self._abandoned = False
        self.failing_since: Optional[float] = None
        self._lock_fd = self._lock(directory)
        try:
            self._db = self._open()
        except StoreError:
            os.close(self._lock_fd)
            raise

    def _lock(self, directory: str) -> int:
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            fd = os.open(
                os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
            )
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
        except sqlite3.OperationalError as error:
            raise StoreError(self.path, str(error)) from error
        except sqlite3.DatabaseError as error:
            return self._begin_anew(error)

    def _begin_anew(self, why: Exception) -> sqlite3.Connection:
        """Sets the file aside, which nobody has open any more."""
        aside = f"{self.path}.unreadable-{int(time.time())}"
        try:
            for suffix in ("", "-wal", "-shm"):
                if os.path.exists(self.path + suffix):
                    os.replace(self.path + suffix, aside + suffix)
            log.error(
                "The database can't be read (%s): kept as %s, and begun anew. "
                "Every user gets a background pass; nothing else is lost.",
                why,
                aside,
            )
            return self._connect()
        except (OSError, sqlite3.Error) as error:
            raise StoreError(self.path, str(error)) from error

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
        except (sqlite3.Error, StoreError):
            db.close()
            raise
        return db

    def load(self) -> Contents:
        """Everything that is on disk. For the start, before anything is put."""
        try:
            rows = self._db.execute("SELECT * FROM cursor").fetchall()
            cursors = {
                CursorKey(User(os.fsdecode(row[0])), row[1], row[2]): LogPosition(row[3] % 2**64, *row[4:])
                for row in rows
            }
            rows = self._db.execute("SELECT * FROM job").fetchall()
            jobs = {job.key: job for job in map(_job, rows)}
        except sqlite3.OperationalError as error:
            raise StoreError(self.path, str(error), "move the file away to begin anew") from error
        except (sqlite3.DatabaseError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._db.close()
            self._db = self._begin_anew(error)
            return Contents({}, {})
        return Contents(cursors, jobs)

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
        return len(self._cursors) + len(self._jobs)

    def _wake(self) -> None:
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write(), name="store")

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        # Everything of the callback that woke this belongs into the same transaction.
        await asyncio.sleep(0)
        while self._cursors or self._jobs:
            cursors, self._cursors = self._cursors, {}
            jobs, self._jobs = self._jobs, {}
            try:
                await loop.run_in_executor(self._thread, self._commit, cursors, jobs)
            except sqlite3.Error as error:
                self._cursors = {**cursors, **self._cursors}
                self._jobs = {**jobs, **self._jobs}
                if self.failing_since is None:
                    self.failing_since = time.time()
                    log.error("%s: %s; kept in memory, and tried again", self.path, error)
                if self._closing.is_set():
                    return
                await wait_for_event(self._closing, RETRY_WRITE)
            else:
                if self.failing_since is not None:
                    self.failing_since = None
                    log.warning("%s: writing works again, nothing was lost", self.path)

    def _commit(self, cursors: dict[CursorKey, Optional[LogPosition]], jobs: dict[JobKey, Job]) -> None:
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
        """Writes what is left, once, and closes. Raises StoreError if something could not be written."""
        self._closing.set()
        if self._writing is not None:
            await self._writing
        if self.unwritten:
            await self._write()
        self._thread.shutdown()
        self._db.close()
        os.close(self._lock_fd)
        if self.unwritten:
            raise StoreError(self.path, f"{self.unwritten} rows could not be written", "see above")


def _signed(inode: int) -> int:
    """Some file systems use all 64 bits of an inode number; SQLite's integers have a sign."""
    return inode - 2**64 if inode >= 2**63 else inode


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
        job.last_success,
        job.last_pass,
        job.next_pass,
        None if job.last_outcome is None else job.last_outcome.value,
        # Dovecot's words may hold hostile names: SQLite takes no surrogates.
        job.last_error.encode("utf-8", "backslashreplace").decode(),
        job.state,
        job.base_state,
        job.contested_since,
        job.confirm_at,
    )


def _job(row: tuple[Any, ...]) -> Job:
    """The reverse of ``_row``. Raises ValueError or KeyError for words that no version wrote."""
    user, peer, priority, reasons, first_change, due, attempts, repeats, wants_full, *history = row
    last_start, last_success, last_pass, next_pass, outcome, error, state, *contest = history
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
        last_success=last_success,
        last_pass=last_pass,
        next_pass=next_pass,
        last_outcome=None if outcome is None else OutcomeClass(outcome),
        last_error=error,
        state=state,
        base_state=contest[0],
        contested_since=contest[1],
        confirm_at=contest[2],
    )
