"""inotify. The only module that knows pyinotify, and what the kernel does with watches:

- A watch belongs to an inode, not to a path: it follows a renamed directory, arming the same directory
  again gives the same descriptor, and a descriptor is never used again for another one.
- IN_IGNORED is the last event of a watch: removed, the directory deleted, or its file system unmounted.
- After IN_Q_OVERFLOW events are missing, nobody knows which.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import pyinotify

from dovesyncd.core.errors import WatchError

# On import it gives its logger a handler of its own; what it would say is raised here.
pyinotify.log.handlers.clear()
pyinotify.log.setLevel(logging.CRITICAL)

MODIFY: int = pyinotify.IN_MODIFY
CREATE: int = pyinotify.IN_CREATE
DELETE: int = pyinotify.IN_DELETE
MOVED_FROM: int = pyinotify.IN_MOVED_FROM
MOVED_TO: int = pyinotify.IN_MOVED_TO
MOVE_SELF: int = pyinotify.IN_MOVE_SELF
DELETE_SELF: int = pyinotify.IN_DELETE_SELF
IGNORED: int = pyinotify.IN_IGNORED
ISDIR: int = pyinotify.IN_ISDIR
Q_OVERFLOW: int = pyinotify.IN_Q_OVERFLOW

# For a directory of logs: what is written, and what comes and goes.
LOGS = MODIFY | CREATE | DELETE | MOVED_FROM | MOVED_TO | MOVE_SELF | DELETE_SELF
# For a directory above the users: only what comes.
ARRIVALS = CREATE | MOVED_TO | MOVE_SELF | DELETE_SELF

MAX_USER_WATCHES = "fs.inotify.max_user_watches"
MAX_USER_INSTANCES = "fs.inotify.max_user_instances"

# File systems that other hosts write to as well; inotify tells of what is written here only.
_REMOTE = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "gfs2", "glusterfs", "gpfs", "lustre", "nfs"}
    | {"nfs4", "ocfs2", "orangefs", "smb3", "virtiofs"}
)

# struct inotify_event: wd, mask, cookie, len; the name follows, padded with NUL.
_EVENT = struct.Struct("iIII")
_READ_SIZE = 256 * 1024
# Reads before others get their turn; max_queued_events is far below what they hold.
_MAX_READS = 100


class Event(NamedTuple):
    """``name`` is the entry of the watched directory it is about, b"" for the directory itself."""

    wd: int
    mask: int
    name: bytes


class Watch:
    """``on_events`` gets all events of one read. It must not raise. Where inotify itself can't be started,
    each watch tries that again."""

    def __init__(self, on_events: Callable[[list[Event]], None]) -> None:
        self._manager: Any = None
        self._fd = -1
        self._on_events = on_events
        self._loop = asyncio.get_running_loop()
        with contextlib.suppress(WatchError):
            self._start()

    def _start(self) -> None:
        try:
            self._manager = pyinotify.WatchManager()
        except OSError as error:
            raise WatchError(
                f"inotify can't be started: {error.strerror}",
                MAX_USER_INSTANCES,
                f"raise the sysctl {MAX_USER_INSTANCES}",
            ) from error
        self._fd = self._manager.get_fd()
        # pyinotify opens it blocking, and for children too.
        os.set_inheritable(self._fd, False)
        os.set_blocking(self._fd, False)
        self._loop.add_reader(self._fd, self.drain)

    def arm(self, directory_fd: int, mask: int = LOGS) -> int:
        """Watches the open directory and returns the descriptor of the watch.

        A directory that is watched already is watched for what either mask says.
        The way over /proc makes it the directory that the caller has checked, and lets names that are not
        valid text through. Raises WatchError; its ``limit`` is set if the kernel's limit is reached.
        """
        if self._manager is None:
            self._start()
        try:
            found = self._manager.add_watch(
                f"/proc/self/fd/{directory_fd}",
                mask | pyinotify.IN_ONLYDIR | pyinotify.IN_MASK_ADD,
                quiet=False,
            )
        except pyinotify.WatchManagerError as error:
            if "ENOSPC" in str(error):
                raise WatchError(
                    "the kernel's limit of inotify watches is reached",
                    MAX_USER_WATCHES,
                    f"raise the sysctl {MAX_USER_WATCHES}",
                ) from error
            raise WatchError(f"a directory can't be watched: {error}") from error
        (wd,) = found.values()
        # Its own record of the watch serves nobody here, and costs memory for each mailbox.
        self._manager.del_watch(wd)
        return int(wd)

    def disarm(self, wd: int) -> None:
        """Ends a watch. One that the kernel has ended already is no error."""
        with contextlib.suppress(pyinotify.WatchManagerError):
            self._manager.rm_watch(wd, quiet=False)

    def drain(self) -> None:
        """Reads and hands over what is there, without waiting for the event loop."""
        for _ in range(_MAX_READS if self._manager is not None else 0):
            try:
                data = os.read(self._fd, _READ_SIZE)
            except BlockingIOError:
                return
            self._on_events(parse(data))
            # The kernel fills the buffer as far as whole events fit.
            if len(data) < _READ_SIZE // 2:
                return

    def close(self) -> None:
        if self._manager is not None:
            self._loop.remove_reader(self._fd)
            self._manager.close()
            self._manager = None


def limit(name: str) -> Optional[int]:
    """The value of one of the sysctls fs.inotify.*; None where it can't be read."""
    try:
        with open("/proc/sys/" + name.replace(".", "/"), encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def remote_filesystem(device: int, mounts: str = "/proc/self/mountinfo") -> Optional[str]:
    """The type of the file system with the number ``device`` (st_dev), if other hosts may write to it."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open(mounts, encoding="utf-8", errors="replace") as file:
            for line in file:
                # proc(5): ID, parent, device, root, mount point, options, optional fields, "-", type, ...
                fields = line.split()
                if fields[2] == number:
                    kind = fields[fields.index("-") + 1]
                    return kind if kind.partition(".")[0] in _REMOTE else None
    except (OSError, ValueError, IndexError):
        pass
    return None


def parse(data: bytes) -> list[Event]:
    """The events of one read() from an inotify descriptor."""
    events = []
    pos = 0
    while pos < len(data):
        wd, mask, _, length = _EVENT.unpack_from(data, pos)
        pos += _EVENT.size
        events.append(Event(wd, mask, data[pos : pos + length].rstrip(b"\0")))
        pos += length
    return events
