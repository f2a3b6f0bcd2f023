"""Keeps the list of users up to date: asks Dovecot at intervals, and when a new directory hints at one."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Optional

from dovesyncd.core.errors import DovecotError
from dovesyncd.core.health import Work
from dovesyncd.userdb import Accounts
from dovesyncd.waiting import wait_for_event

log = logging.getLogger(__name__)

# Seconds between two questions, however many directories appear.
_LEAST_GAP = 1.0
_RETRY_FIRST, _RETRY_LAST = 1.0, 60.0


class Users:
    """``ask`` brings the accounts or raises DovecotError; ``tell`` gets what it brought."""

    def __init__(
        self, ask: Callable[[], Awaitable[Accounts]], tell: Callable[[Accounts], None], refresh: float
    ) -> None:
        self._ask = ask
        self._tell = tell
        self.refresh = refresh
        self._hint = asyncio.Event()
        self._reported: frozenset[str] = frozenset()
        self._known = 0
        self.failing = False
        self._asking_since: Optional[float] = None
        self._empty = False

    @property
    def work(self) -> Work:
        """Every question to Dovecot has a deadline of its own; a large site is asked many."""
        return Work("users", self._asking_since, 1800.0)

    def hint(self) -> None:
        """Someone may be new."""
        self._hint.set()

    async def run(self) -> None:
        pause = again = _RETRY_FIRST
        while True:
            asked = self._asking_since = time.monotonic()
            self._hint.clear()
            try:
                accounts = await self._ask()
            except DovecotError as error:
                self._asking_since = None
                if not self.failing:
                    log.error("The users can't be listed: %s; keeping the %d known", error, self._known)
                self.failing = True
                await asyncio.sleep(pause)
                pause = min(pause * 2, _RETRY_LAST)
                continue
            self._asking_since = None
            if self.failing:
                log.warning("The users can be listed again")
            self.failing, pause = False, _RETRY_FIRST
            if self._take(accounts):
                # It may be on its way to be right: a user who is just being made, for one.
                rest = again = min(again * 2, self.refresh)
            else:
                rest, again = self.refresh, _RETRY_FIRST
            await wait_for_event(self._hint, rest)
            await asyncio.sleep(max(0.0, asked + _LEAST_GAP - time.monotonic()))

    def _take(self, accounts: Accounts) -> bool:
        """Whether something was wrong with the list."""
        for problem in accounts.problems:
            if problem not in self._reported:
                log.warning("%s", problem)
        self._reported = frozenset(accounts.problems)
        for name, reason in accounts.skipped.items():
            log.debug("%s: left out: %s", name, reason)
        if not accounts.accounts and self._known:
            if not self._empty:
                log.error("Dovecot lists no users where there were %d: keeping those", self._known)
            self._empty = True
            return True
        self._empty = False
        self._known = len(accounts.accounts)
        self._tell(accounts)
        return bool(accounts.problems)
