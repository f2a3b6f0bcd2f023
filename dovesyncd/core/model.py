"""The nouns that every other module speaks."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple, NewType, Optional

# A canonical Dovecot user name. Bytes that are not UTF-8 are kept as surrogates
# (``os.fsdecode``), so that a name survives the way from and to Dovecot unchanged.
User = NewType("User", str)
PeerName = NewType("PeerName", str)


class Priority(enum.IntEnum):
    """Dovecot's replication priorities (2.3 src/replication/replicator/replicator-queue.h)."""

    NONE = 0
    LOW = 1
    HIGH = 2
    SYNC = 3


class ChangeKind(enum.Enum):
    """What happened to a mailbox; the value is what people read in logs and in the store."""

    NEW_MAIL = "new mail"
    FLAGS = "flags"
    KEYWORDS = "keywords"
    EXPUNGE = "expunge"
    ATTRIBUTE = "attribute"
    CREATE = "create"
    DELETE = "delete"
    RENAME = "rename"
    SUBSCRIBE = "subscribe"
    UNSUBSCRIBE = "unsubscribe"
    LOG_GAP = "log gap"
    NEW_USER = "new user"
    BACKGROUND = "background pass"
    CONFIRMATION = "confirmation"

    @property
    def priority(self) -> Priority:
        return _PRIORITY.get(self, Priority.LOW)


# What can get lost in a mailbox while a dsync is at work on it. Changes of the tree can't, and dsync's
# own are not told from a user's.
CONTESTABLE = frozenset(
    {
        ChangeKind.NEW_MAIL,
        ChangeKind.FLAGS,
        ChangeKind.KEYWORDS,
        ChangeKind.EXPUNGE,
        ChangeKind.LOG_GAP,
    }
)

# What the daemon looks at by itself, without a change.
DUTIES = frozenset({ChangeKind.NEW_USER, ChangeKind.BACKGROUND, ChangeKind.CONFIRMATION})

_PRIORITY = {
    ChangeKind.NEW_MAIL: Priority.HIGH,
    # Their tombstones live in a log that rotates after 170 records: without a sync
    # before that, the peer would bring the folder back.
    ChangeKind.DELETE: Priority.HIGH,
    ChangeKind.RENAME: Priority.HIGH,
    ChangeKind.BACKGROUND: Priority.NONE,
    # Of all users at once after the database was lost.
    ChangeKind.CONFIRMATION: Priority.NONE,
}


class LogPosition(NamedTuple):
    """How far a log file has been read, and which file it was.

    ``indexid`` is a creation time in seconds and identifies nothing by itself; ``digest`` is the
    CRC-32 of all bytes before ``offset`` and tells two files of one second apart. It is larger than any
    CRC-32 where the log could not be read on: a mark that stands for the time of its last change.
    """

    inode: int
    indexid: int
    file_seq: int
    offset: int
    digest: int


class SyncKind(enum.Enum):
    """Which of dsync's ways to compare two sides a sync uses."""

    STATEFUL = "stateful"
    STATELESS = "stateless"
    FULL = "full"


class OutcomeClass(enum.Enum):
    """How a sync ended, as far as the daemon acts differently on it."""

    OK = "ok"
    CHANGED = "changed"
    BUSY = "busy"
    DOVECOT_DOWN = "dovecot-down"
    PEER_DOWN = "peer-down"
    AUTH = "auth"
    NOUSER_LOCAL = "nouser-local"
    NOUSER_REMOTE = "nouser-remote"
    QUOTA = "quota"
    CONFIG = "config"
    TIMEOUT = "timeout"
    CRASH = "crash"
    OTHER = "other"


# These say nothing about the user: his job waits as it was.
PEER_OUTCOMES = frozenset({OutcomeClass.DOVECOT_DOWN, OutcomeClass.PEER_DOWN, OutcomeClass.AUTH})


class LogLine(NamedTuple):
    """One line that a doveadm process logged. ``level`` is debug, info, warning, error, fatal or panic."""

    level: str
    text: str


@dataclass(frozen=True)
class Reply:
    """What doveadm answered to one command, whichever way it was carried.

    ``exit_code`` follows sysexits as doveadm uses them (0, 2, 64..78), or None where there was no
    answer: ``failure`` then says why ("timeout", "disconnected", "killed by signal 9").
    ``output`` holds the printed values in order.
    """

    exit_code: Optional[int]
    output: tuple[str, ...] = ()
    log: tuple[LogLine, ...] = ()
    failure: str = ""


class Timings(NamedTuple):
    """How long changes are collected before a sync, in seconds. See the options of the same names."""

    settle: float
    settle_low: float
    longest_wait: float


class JobKey(NamedTuple):
    user: User
    peer: PeerName


@dataclass(frozen=True)
class Job:
    """What is to be done, and what was done, for one user and one peer. Times are Unix seconds.

    Something is pending exactly if ``first_change`` is set: ``reasons`` then says what, oldest first, and
    ``due`` when the sync may start. ``attempts`` counts the failures in a row, ``repeats`` the outcomes
    ``changed`` in a row. ``last_pass`` is the end of the last good sync that compared everything,
    ``next_pass`` when the next such sync is due even if nothing changes.

    ``last_seconds`` is how long the last sync took, whatever its outcome. ``empty_syncs`` counts the syncs
    in a row that were for a change and changed nothing on either side.

    ``state`` is what the last good sync left for the next stateful one, with the peer that was at
    ``destination`` then. ``contested_since`` is set while
    users have changed what a dsync was at work on, ``confirm_at`` is then when the mailboxes concerned are
    to be compared mail by mail, and ``base_state`` is the state from before that began.
    """

    key: JobKey
    priority: Priority = Priority.NONE
    reasons: tuple[ChangeKind, ...] = ()
    first_change: Optional[float] = None
    due: float = 0.0
    attempts: int = 0
    repeats: int = 0
    wants_full: bool = False
    last_start: Optional[float] = None
    last_seconds: Optional[float] = None
    empty_syncs: int = 0
    last_success: Optional[float] = None
    last_pass: Optional[float] = None
    next_pass: float = 0.0
    last_outcome: Optional[OutcomeClass] = None
    last_error: str = ""
    state: str = ""
    base_state: str = ""
    destination: str = ""
    contested_since: Optional[float] = None
    confirm_at: Optional[float] = None

    @property
    def pending(self) -> bool:
        return self.first_change is not None

    @property
    def next_duty(self) -> float:
        """When something is to be done even if nothing changes."""
        return self.next_pass if self.confirm_at is None else min(self.next_pass, self.confirm_at)


@dataclass(frozen=True)
class Outcome:
    """A classified reply. ``text`` is the one line that explains it in Dovecot's own words ("" when ok);
    ``state`` is the dsync state to keep for the next stateful sync, "" when there must be none."""

    kind: OutcomeClass
    text: str = ""
    state: str = ""
    # Dovecot asked for a sync without the short cuts of the one that failed.
    wants_full: bool = False
