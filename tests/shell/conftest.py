"""Every test of this directory ends its processes, closes its files and finishes its tasks."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio


def open_files() -> Counter[str]:
    """What the open descriptors point to. Numbered kinds (pipe, socket, anon_inode) count by kind."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # the listing's own descriptor
        found[target.partition(":")[0] if target.startswith(("pipe:", "socket:")) else target] += 1
    return found


def children() -> set[int]:
    """The child processes of this one, ended ones that nobody has waited for included."""
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        try:
            found.update(map(int, (thread / "children").read_text().split()))
        except OSError:
            continue  # the thread has just ended
    return found


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A directory for the database in memory: creating one on disk waits for the disk several times."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as directory:
        yield Path(directory)


# What pytest-asyncio itself keeps from the first asynchronous test on, with older versions of Python.
_A_LOOP = Counter({"socket": 2, "anon_inode:[eventpoll]": 1})


@pytest.fixture(autouse=True)
def no_leaked_files_and_processes() -> Iterator[None]:
    files, processes = open_files(), children()
    yield
    # A server that tests share may have been started anew.
    assert len(children()) <= len(processes), "child processes are left"
    if open_files() - files:
        gc.collect()
    assert open_files() - files in (Counter(), _A_LOOP), "files are left open"


@pytest_asyncio.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    mine = asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - mine - {asyncio.current_task()}
    assert not left, "tasks are left"


@pytest.fixture(autouse=True)
def leaks(request: pytest.FixtureRequest, no_leaked_files_and_processes: None) -> None:
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("no_leaked_tasks")
