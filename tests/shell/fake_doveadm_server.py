"""A doveadm-server that does what a test wants: right answers, and every kind of wrong ones.

def answer(request: Request) -> Answer:
    return Answer.ok(STATE) if request.user == "ann" else Answer.failed("NOUSER", "User doesn't exist")

async with FakeDoveadmServer(path, answer) as server:
    ...
assert [request.user for request in server.requests] == ["ann", "bob"]
"""

from __future__ import annotations

import asyncio
import enum
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Optional

from dovesyncd.core.doveadm_wire import escape, unescape
from dovesyncd.core.model import LogLine

_LEVELS = ("debug", "info", "warning", "error", "fatal", "panic")


@dataclass(frozen=True)
class Request:
    """One command as it arrived. ``at`` is the loop's clock."""

    at: float
    flags: str
    user: str
    command: str
    args: tuple[str, ...]

    def option(self, letter: str) -> Optional[str]:
        """The argument after ``letter`` ("-s"), None without it."""
        return self.args[self.args.index(letter) + 1] if letter in self.args else None


class Greeting(enum.Enum):
    """What a client meets before it may send a command."""

    READY = "ready"
    PASSWORD = "password"
    HANG = "hang"
    GARBAGE = "garbage"
    EOF = "eof"


@dataclass(frozen=True)
class Answer:
    """``word`` is "+" or the word of an exit code; "" closes the connection without a reply.

    ``log`` is sent before the reply, ``late_log`` after it. The reply waits for ``after``, an event of the
    test. ``raw`` is sent instead of all that, ``hang`` sends nothing and keeps the connection.
    ``piece`` is the number of bytes sent at a time, 0 for all at once. ``linger`` keeps the connection
    open after the reply, whatever the client does.
    """

    word: str = "+"
    output: tuple[str, ...] = ()
    log: tuple[LogLine, ...] = ()
    late_log: tuple[LogLine, ...] = ()
    after: Optional[asyncio.Event] = None
    raw: Optional[bytes] = None
    hang: bool = False
    piece: int = 0
    linger: bool = False

    @classmethod
    def ok(cls, *output: str) -> Answer:
        return cls(output=output)

    @classmethod
    def failed(cls, word: str, *errors: str) -> Answer:
        return cls(word, log=tuple(LogLine("error", error) for error in errors))

    @classmethod
    def gone(cls, *errors: str) -> Answer:
        """The process of the server ends without a reply, as 2.3's does when the peer can't be reached."""
        return cls("", log=tuple(LogLine("error", error) for error in errors))

    @classmethod
    def hanging(cls) -> Answer:
        return cls(hang=True)

    @classmethod
    def garbage(cls, raw: bytes) -> Answer:
        return cls(raw=raw)

    def with_(self, **changes: Any) -> Answer:
        return replace(self, **changes)

    def encode(self) -> bytes:
        if self.raw is not None:
            return self.raw
        logs = b"".join(log_packet(line) for line in self.log)
        if not self.word:
            return logs
        printed = b"".join(escape(value) + b"\t" for value in self.output)
        word = b"+" if self.word == "+" else b"-" + self.word.encode()
        late = b"".join(log_packet(line) for line in self.late_log)
        return logs + (packet(0, printed) if printed else b"") + packet(0, b"\n" + word + b"\n") + late


def packet(channel: int, payload: bytes) -> bytes:
    return bytes([channel]) + len(payload).to_bytes(4, "big") + payload


def log_packet(line: LogLine) -> bytes:
    text = line.text.encode("utf-8", "surrogateescape")
    return packet(ord("L"), bytes([_LEVELS.index(line.level) + 1]) + text + b"\n")


class FakeDoveadmServer:
    """Serves one command a connection on a unix socket. ``greeting`` may be changed at any time."""

    def __init__(
        self,
        path: str,
        answer: Callable[[Request], Answer],
        greeting: Greeting = Greeting.READY,
        minor: int = 3,
    ) -> None:
        self.path = path
        self.answer = answer
        self.greeting = greeting
        # Of the protocol: 2 is Dovecot 2.3, 3 is 2.4.
        self.minor = minor
        self.requests: list[Request] = []
        self.connections = 0
        # Connections that are open now, and the most that were at once.
        self.open = 0
        self.most_open = 0
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: Optional[asyncio.AbstractServer] = None

    async def __aenter__(self) -> FakeDoveadmServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        self._server = await asyncio.start_unix_server(self._accept, self.path, limit=2 * 1024 * 1024)
        os.chmod(self.path, 0o600)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if os.path.exists(self.path):
            os.unlink(self.path)

    async def wait_for(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        """Wait until ``condition`` holds; it is looked at whenever a request or connection comes or goes."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(condition), seconds)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._connection(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        await self._notify()
        try:
            if await self._greet(reader, writer):
                await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client hung up
        finally:
            writer.transport.abort()
            self.open -= 1
        await self._notify()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if self.greeting is Greeting.HANG:
            await reader.read()
            return False
        assert await reader.readline() == b"VERSION\tdoveadm-server\t1\t1\n"
        version = b"VERSION\tdoveadm-client\t1\t%d\n" % self.minor
        greetings = {
            Greeting.READY: version + b"+\n",
            Greeting.PASSWORD: version + b"-\n",
            Greeting.GARBAGE: b"* OK IMAP4rev1 ready\r\n",
            Greeting.EOF: b"",
        }
        writer.write(greetings[self.greeting])
        await writer.drain()
        if self.greeting in (Greeting.PASSWORD, Greeting.GARBAGE):
            await reader.read()
        return self.greeting is Greeting.READY

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = await reader.readuntil(b"\n")
        flags, user, command, *args = (unescape(field) for field in line[:-1].split(b"\t"))
        request = Request(asyncio.get_running_loop().time(), flags, user, command, tuple(args))
        self.requests.append(request)
        await self._notify()
        answer = self.answer(request)
        if answer.after is not None:
            await answer.after.wait()
        if answer.hang:
            await reader.read()
            return
        data = answer.encode()
        for at in range(0, len(data), answer.piece or len(data) or 1):
            writer.write(data[at : at + (answer.piece or len(data) or 1)])
            await writer.drain()
            await asyncio.sleep(0)
        if answer.linger:
            await asyncio.Event().wait()
        if answer.word and answer.raw is None:
            await reader.read()
