"""What systemd is told: readiness, status, watchdog. The only module that knows sdnotify."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Optional

try:
    from sdnotify import SystemdNotifier
except ImportError:  # EL10 does not package it
    SystemdNotifier = None
    from systemd import daemon as systemd_daemon


class Notify:
    """Does nothing where there is no service manager."""

    def __init__(self) -> None:
        self._notifier = None if SystemdNotifier is None else SystemdNotifier()

    def send(self, *lines: str) -> None:
        # sdnotify encodes Latin-1 and swallows what it can't: anything but ASCII would be lost.
        message = "\n".join(lines).encode("ascii", "backslashreplace").decode()
        if self._notifier is not None:
            self._notifier.notify(message)
        else:
            systemd_daemon.notify(message)

    def ready(self) -> None:
        self.send("READY=1")

    def reloading(self, now: float) -> None:
        """``now`` is CLOCK_MONOTONIC in seconds. To be followed by ``ready``."""
        self.send("RELOADING=1", f"MONOTONIC_USEC={int(now * 1e6)}")

    def status(self, text: str) -> None:
        self.send(f"STATUS={text}")

    def stopping(self) -> None:
        self.send("STOPPING=1", "STATUS=stopping")

    def alive(self) -> None:
        self.send("WATCHDOG=1")


def watchdog_interval(environ: Mapping[str, str], pid: int) -> Optional[float]:
    """Seconds between two signs of life, half of what systemd allows (sd_watchdog_enabled(3)); None if it
    asks for none, or not from this process."""
    usec = environ.get("WATCHDOG_USEC", "")
    if not usec.isdigit() or int(usec) == 0 or environ.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    return int(usec) / 2e6
