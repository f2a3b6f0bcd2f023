"""The directory of one test run, and the removal of everything that a run leaves on the machine.

Network namespaces, cgroups, mounts and processes of a run carry its id or are noted in its directory, so
that a later run can remove what a killed one left. A run that lives holds a lock on its directory.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Optional

from tests.system.waiting import wait_until

# Short: a unix socket's path has at most 107 bytes.
_PREFIX = "dsy-"
_PARENT = Path("/tmp")


class RunDirectory:
    """``id`` is unique among the runs of this machine; ``path`` is removed by close()."""

    def __init__(self) -> None:
        remove_abandoned()
        # Also a host name, so no underscores. The name appears with the lock already held.
        self.id = _PREFIX + secrets.token_hex(4)
        self.path = _PARENT / self.id
        hidden = _PARENT / f".{self.id}"
        hidden.mkdir(mode=0o755)
        self._lock = os.open(hidden / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        hidden.rename(self.path)

    def note_process(self, pid: int) -> None:
        """To be killed in the end, should it still be there."""
        with open(self.path / "pids", "a") as file:
            file.write(f"{pid} {start_time(pid)}\n")

    def close(self) -> None:
        _remove(self.path)
        os.close(self._lock)


def start_time(pid: int) -> Optional[int]:
    """Clock ticks after boot (proc(5), stat field 22): with it, a pid names one process for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else int(fields[19])


def remove_abandoned() -> None:
    """Remove what runs left whose process is gone."""
    for path in _PARENT.glob(_PREFIX + "*"):
        try:
            lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)


def _remove(path: Path) -> None:
    _kill_noted(path)
    for mount in _mounts_below(path):
        subprocess.run(["umount", "--lazy", str(mount)], check=False)
    for namespace in Path("/run/netns").glob(path.name + "-*"):
        subprocess.run(["ip", "netns", "delete", namespace.name], check=False)
    for cgroup in cgroup_directories(path.name):
        _remove_cgroup(cgroup)
    shutil.rmtree(path, ignore_errors=True)


def _kill_noted(path: Path) -> None:
    try:
        lines = (path / "pids").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        pid, _, started = line.partition(" ")
        for signal_number in (signal.SIGTERM, signal.SIGKILL):
            if started == "None" or str(start_time(int(pid))) != started:
                break
            os.kill(int(pid), signal_number)
            try:
                wait_until(lambda pid=pid, started=started: str(start_time(int(pid))) != started, 3, "end")  # type: ignore[misc]
            except AssertionError:
                continue


def _mounts_below(path: Path) -> list[Path]:
    points = [Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines()]
    return sorted((point for point in points if path in point.parents), reverse=True)


def cgroup_hierarchies() -> list[Path]:
    """Where processes are grouped for systemd: the unified hierarchy, and name=systemd on hybrid machines."""
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            found.append(Path(point))
    # A hybrid machine's name=systemd is not always named so in the options.
    plain = Path("/sys/fs/cgroup/systemd")
    if plain.is_dir() and plain not in found:
        found.append(plain)
    return found


def cgroup_directories(run_id: str) -> list[Path]:
    return [path for root in cgroup_hierarchies() for path in root.glob(run_id + "-*")]


def _remove_cgroup(path: Path) -> None:
    for directory, _, _ in os.walk(path, topdown=False):
        try:
            os.rmdir(directory)
        except OSError:
            # A process is still on its way out: an empty cgroup costs nothing.
            return
