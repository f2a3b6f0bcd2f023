"""Cancellation at the worst instant: when what is waited for comes in the same turn of the event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dovesyncd import userdb, waiting
from dovesyncd.waiting import end, wait_for_event


async def test_an_event_that_comes() -> None:
    event = asyncio.Event()
    task = asyncio.ensure_future(wait_for_event(event, None))
    await asyncio.sleep(0)
    event.set()
    await asyncio.wait_for(task, 5)


async def test_an_event_that_does_not_come() -> None:
    event = asyncio.Event()
    await wait_for_event(event, 0.01)
    assert not event.is_set()


@pytest.mark.parametrize("turns", range(8))
async def test_a_cancellation_together_with_the_event(turns: int) -> None:
    event = asyncio.Event()

    async def wait_for_ever() -> None:
        while True:
            await wait_for_event(event, 3600)
            event.clear()
            await asyncio.sleep(3600)

    task = asyncio.ensure_future(wait_for_ever())
    for _ in range(4):
        await asyncio.sleep(0)
    event.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=5)
    assert done
    assert task.cancelled()


async def test_a_cancellation_together_with_the_end_of_doveconf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "doveconf"
    program.write_text("#!/bin/sh\necho base_dir=/run/dovecot\n")
    program.chmod(0o755)
    output = userdb._output

    async def output_and_cancel(process: asyncio.subprocess.Process) -> tuple[bytes, bytes]:
        result = await output(process)
        task.cancel()
        return result

    monkeypatch.setattr(userdb, "_output", output_and_cancel)
    task = asyncio.ensure_future(userdb._doveconf([str(program)], 60))
    done, _ = await asyncio.wait({task}, timeout=30)
    assert done
    assert task.cancelled()


async def test_a_task_that_loses_cancellations_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_AGAIN", 0.01)
    lost = 0

    async def stubborn() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                lost += 1
                if lost == 3:
                    raise

    tasks = [asyncio.ensure_future(stubborn()), asyncio.ensure_future(asyncio.sleep(0))]
    await asyncio.sleep(0)
    await asyncio.wait_for(end(tasks), 5)
    assert lost == 3
