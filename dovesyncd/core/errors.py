"""Errors that people see: each names what is wrong and, where there is one, the way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional


class DovesyncError(Exception):
    """Base of all errors that are reported without a traceback. ``hint`` is a sentence or ""."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration file. ``key`` is dotted, with an index for tables
    of an array (``peer[1].name``); ``value`` is as written, None where there is none."""

    file: str
    key: str
    value: Optional[object]
    expected: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.key}" if self.key else self.file
        if self.value is None:
            return f"{where}: {self.expected}"
        return f"{where} = {self.value!r}: expected {self.expected}"


class ConfigError(DovesyncError):
    """A configuration that can't be used, with every problem that was found in it."""

    # systemd calls 6 NOTCONFIGURED: a restart would not help.
    exit_code = 6

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


class DovecotError(DovesyncError):
    """Dovecot could not be asked: ``what`` was tried, and this came back."""


class StoreError(DovesyncError):
    """The database can't be used. ``path`` is its file."""

    def __init__(self, path: str, message: str, hint: str = "") -> None:
        super().__init__(f"{path}: {message}", hint)
        self.path = path


class WatchError(DovesyncError):
    """A directory can't be watched. ``limit`` names the sysctl that is exhausted, or is ""."""

    def __init__(self, message: str, limit: str = "", hint: str = "") -> None:
        super().__init__(message, hint)
        self.limit = limit
