"""inotify as the kernel really does it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pyinotify
import pytest
import pytest_asyncio

from dovesyncd import watch
from dovesyncd.core.errors import WatchError
from dovesyncd.watch import Event, Watch
from tests.shell.waiting import until


class Seen:
    """A watch and all its events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reads = 0
        self.watch = Watch(self.take)

    def take(self, events: list[Event]) -> None:
        self.reads += 1
        self.events += events

    def arm(self, path: Path | bytes, mask: int = watch.LOGS) -> int:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return self.watch.arm(fd, mask)
        finally:
            os.close(fd)

    def of(self, mask: int) -> list[Event]:
        return [event for event in self.events if event.mask & mask]


@pytest_asyncio.fixture
async def seen() -> AsyncIterator[Seen]:
    found = Seen()
    yield found
    found.watch.close()


async def test_what_is_written_comes_and_goes(seen: Seen, tmp_path: Path) -> None:
    wd = seen.arm(tmp_path)
    (tmp_path / "log").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "log").rename(tmp_path / "log.2")
    (tmp_path / "log.2").unlink()
    await until(lambda: seen.of(watch.DELETE), "the last event")
    assert seen.events == [
        (wd, watch.CREATE, b"log"),
        (wd, watch.MODIFY, b"log"),
        (wd, watch.CREATE | watch.ISDIR, b"folder"),
        (wd, watch.MOVED_FROM, b"log"),
        (wd, watch.MOVED_TO, b"log.2"),
        (wd, watch.DELETE, b"log.2"),
    ]


async def test_names_are_bytes(seen: Seen, tmp_path: Path) -> None:
    directory = os.fsencode(tmp_path) + b"/\xff\xfe"
    os.mkdir(directory)
    seen.arm(directory)
    names = [b"\xff", b"\xe4\xb8\xad", b"new\nline", b" ", b"x" * 255]
    for name in names:
        os.close(os.open(directory + b"/" + name, os.O_CREAT | os.O_WRONLY))
    await until(lambda: len(seen.events) == len(names), "an event for each")
    assert [event.name for event in seen.events] == names


async def test_a_watch_follows_a_renamed_directory(seen: Seen, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    wd = seen.arm(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert seen.arm(tmp_path / "b") == wd
    (tmp_path / "a").mkdir()
    assert seen.arm(tmp_path / "a") != wd
    (tmp_path / "b" / "log").touch()
    await until(lambda: seen.of(watch.CREATE), "the event in b")
    assert seen.events == [(wd, watch.MOVE_SELF, b""), (wd, watch.CREATE, b"log")]


async def test_arming_again_adds_to_the_mask(seen: Seen, tmp_path: Path) -> None:
    wd = seen.arm(tmp_path, watch.ARRIVALS)
    (tmp_path / "log").write_bytes(b"x")
    assert seen.arm(tmp_path, watch.LOGS) == seen.arm(tmp_path, watch.ARRIVALS) == wd
    (tmp_path / "log").write_bytes(b"xy")
    await until(lambda: seen.of(watch.MODIFY), "the second write")
    assert seen.events[0] == (wd, watch.CREATE, b"log")
    assert all(event == (wd, watch.MODIFY, b"log") for event in seen.events[1:])


async def test_a_removed_directory_ends_its_watch(seen: Seen, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    wd = seen.arm(tmp_path / "a")
    (tmp_path / "a").rmdir()
    await until(lambda: seen.of(watch.IGNORED), "the last event")
    assert seen.events == [(wd, watch.DELETE_SELF, b""), (wd, watch.IGNORED, b"")]
    seen.watch.disarm(wd)
    (tmp_path / "a").mkdir()
    assert seen.arm(tmp_path / "a") != wd, "a descriptor is never used again"


async def test_disarm(seen: Seen, tmp_path: Path) -> None:
    wd = seen.arm(tmp_path)
    seen.watch.disarm(wd)
    seen.watch.disarm(wd)
    (tmp_path / "log").touch()
    await until(lambda: seen.events, "its last event")
    assert seen.events == [(wd, watch.IGNORED, b"")]


async def test_a_file_can_not_be_armed(seen: Seen, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        with pytest.raises(WatchError, match="can't be watched") as caught:
            seen.watch.arm(fd)
    finally:
        os.close(fd)
    assert caught.value.limit == ""


async def test_pyinotify_keeps_no_record(seen: Seen, tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / str(number)).mkdir()
        seen.arm(tmp_path / str(number))
    assert not seen.watch._manager.watches


async def test_lost_events_are_told(seen: Seen, tmp_path: Path) -> None:
    """For real: more events than the kernel queues, while nobody reads."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip("the limit is too high to be reached quickly")
    wd = seen.arm(tmp_path, watch.LOGS)
    descriptors = [os.open(tmp_path / name, os.O_CREAT | os.O_WRONLY) for name in ("a", "b")]
    # Equal events in a row are one; those of two files in turn are not.
    for number in range(limit):
        os.pwrite(descriptors[number % 2], b"x", 0)
    for fd in descriptors:
        os.close(fd)
    seen.watch.drain()
    assert len(seen.events) == limit + 1
    assert seen.events[-1] == (-1, watch.Q_OVERFLOW, b"")
    assert {event.wd for event in seen.events[:-1]} == {wd}
    (tmp_path / "later").touch()
    await until(lambda: seen.events[-1].name == b"later", "events go on after the loss")


async def test_drain_does_not_wait(seen: Seen, tmp_path: Path) -> None:
    seen.watch.drain()
    assert seen.reads == 0
    seen.arm(tmp_path)
    (tmp_path / "log").touch()
    seen.watch.drain()
    assert [event.name for event in seen.events] == [b"log"]
    seen.watch.drain()
    assert seen.reads == 1


async def test_the_descriptor_is_nonblocking_and_not_for_children(seen: Seen) -> None:
    assert not os.get_blocking(seen.watch._fd)
    assert not os.get_inheritable(seen.watch._fd)
    child = await asyncio.create_subprocess_exec(
        "ls", "-l", "/proc/self/fd", stdout=asyncio.subprocess.PIPE, close_fds=False
    )
    output, _ = await child.communicate()
    assert b"inotify" not in output


async def test_the_limit_of_watches_has_a_name(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is the machine's: what the kernel answers is played, in pyinotify's own words."""

    def full(*_: object) -> int:
        return -1

    wrapper = seen.watch._manager._inotify_wrapper
    monkeypatch.setattr(wrapper, "inotify_add_watch", full)
    monkeypatch.setattr(wrapper, "str_errno", lambda: "Errno=No space left on device (ENOSPC)")
    with pytest.raises(WatchError, match="max_user_watches") as caught:
        seen.arm(tmp_path)
    assert caught.value.limit == "fs.inotify.max_user_watches"


async def test_the_limit_of_instances_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(pyinotify, "WatchManager", full)
    it = Watch(lambda events: None)
    it.drain()
    with pytest.raises(WatchError, match="max_user_instances") as caught:
        it.arm(0)
    it.close()
    assert caught.value.limit == "fs.inotify.max_user_instances"


def test_parse() -> None:
    one = watch._EVENT.pack(1, watch.MODIFY, 0, 16) + b"dovecot.log".ljust(16, b"\0")
    two = watch._EVENT.pack(-1, watch.Q_OVERFLOW, 0, 0)
    assert watch.parse(b"") == []
    assert watch.parse(one + two + one) == [
        (1, watch.MODIFY, b"dovecot.log"),
        (-1, watch.Q_OVERFLOW, b""),
        (1, watch.MODIFY, b"dovecot.log"),
    ]
