"""Listening for a peer's greeting, with real listeners on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from dovesyncd.peer import silence

GREETING = b"VERSION\tdoveadm-client\t1\t3\n-\n"


@asynccontextmanager
async def listener(says: bytes, closes: bool) -> AsyncIterator[int]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(says)
        if closes:
            await reader.readline()
        else:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("scheme", "says", "closes", "problem"),
    [
        ("tcp", GREETING, False, ""),
        ("tcp", b"", False, "no greeting within 0.1 s"),
        ("tcp", b"", True, "closed the connection without a greeting"),
        # It speaks, whatever it says: what is wrong with it is for dsync to tell.
        ("tcps", GREETING, False, ""),
        ("tcps", b"", False, "no greeting within 0.1 s"),
    ],
)
async def test_a_listener(scheme: str, says: bytes, closes: bool, problem: str) -> None:
    async with listener(says, closes) as port:
        found = await silence((f"{scheme}:127.0.0.1:{port}",), 0.1 if "no greeting" in problem else 5)
    assert found == (f"127.0.0.1:{port}: {problem}" if problem else "")


async def test_nobody_listens() -> None:
    async with listener(b"", True) as port:
        pass
    assert "127.0.0.1" in await silence((f"tcp:127.0.0.1:{port}",), 5)


@pytest.mark.parametrize(
    "destination",
    [
        ("tcp:b.example.com",),
        ("tcp:/run/peer",),
        ("remote:vmail@b",),
        ("ssh", "b", "dsync"),
        ("tcp:x:1", "y"),
    ],
)
async def test_what_only_dsync_can_tell(destination: tuple[str, ...]) -> None:
    assert await silence(destination, 5) == ""


async def test_cancelled() -> None:
    async with listener(b"", False) as port:
        task = asyncio.ensure_future(silence((f"tcp:127.0.0.1:{port}",), 60))
        await asyncio.sleep(0.05)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5)
        assert done
        assert task.cancelled()
