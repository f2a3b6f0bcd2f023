"""The users whose changes inotify does not tell all of: they are compared by stat at an interval, and that is
said once, with what would end it."""

from __future__ import annotations

import logging
from typing import Optional

from dovesyncd import watch
from dovesyncd.core.errors import WatchError
from dovesyncd.core.model import User

log = logging.getLogger(__name__)

# How much more has to be missing than was reported, to be reported again.
_GROWTH = 1.25


class Unwatched:
    def __init__(self) -> None:
        # How many directories of a user could not be watched at his last scan, and the file system of
        # another host on which he has some.
        self._missing: dict[User, int] = {}
        self._remote: dict[User, str] = {}
        self._error: Optional[WatchError] = None
        self._reported_limit = ""
        self._reported_missing = 0
        self._reported_remote: set[str] = set()

    @property
    def users(self) -> set[User]:
        return self._missing.keys() | self._remote.keys()

    def forget(self, user: User) -> None:
        """To be called before a scan of ``user``, and when he leaves."""
        self._missing.pop(user, None)
        self._remote.pop(user, None)

    def refused(self, user: User, error: WatchError) -> None:
        """A directory of his could not be watched."""
        self._missing[user] = self._missing.get(user, 0) + 1
        self._error = error

    def remote(self, user: User, filesystem: str) -> None:
        """A directory of his is shared by hosts, whose changes are not seen here."""
        self._remote[user] = filesystem

    def report(self, watched: int, interval: float) -> None:
        """Says what is new, when all scans are done; ``watched`` is the number of watches, ``interval`` the
        seconds between two comparisons."""
        missing = sum(self._missing.values())
        if missing and self._error is not None:
            grown = missing > self._reported_missing * _GROWTH
            if grown or self._error.limit != self._reported_limit:
                self._reported_missing, self._reported_limit = missing, self._error.limit
                log.error(
                    "%d directories of %d users can't be watched: %s%s; they are compared every %g s",
                    missing,
                    len(self._missing),
                    self._error,
                    self._advice(self._error, watched + missing),
                    interval,
                )
        elif self._reported_missing:
            self._reported_missing, self._reported_limit = 0, ""
            log.warning("Every directory can be watched again")
        for filesystem in sorted(set(self._remote.values()) - self._reported_remote):
            self._reported_remote.add(filesystem)
            log.warning(
                "%d users have mail on a file system of type %s: what other hosts write there is seen only "
                "when it is compared, every %g s",
                sum(name == filesystem for name in self._remote.values()),
                filesystem,
                interval,
            )

    @staticmethod
    def _advice(error: WatchError, needed: int) -> str:
        now = watch.limit(error.limit) if error.limit else None
        if now is None:
            return ""
        if error.limit == watch.MAX_USER_WATCHES:
            return f"; it is {now}, and at least {max(needed, now + 1)} are needed"
        return f"; it is {now}"
