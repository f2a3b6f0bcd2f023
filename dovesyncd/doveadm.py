"""Asks the local Dovecot to run a doveadm command: over its doveadm-server socket, or by the program.

The only module besides the user lookup that speaks to doveadm. No shell is ever involved.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Optional, cast

from dovesyncd.core.doveadm_wire import (
    HANDSHAKE,
    LOG_LINE_LIMIT,
    OUTPUT_LIMIT,
    REQUEST_LIMIT,
    LineSplitter,
    LogTail,
    ReplyStream,
    State,
    parse_stderr_line,
    request_line,
)
from dovesyncd.core.dsync import without_state
from dovesyncd.core.model import Reply
from dovesyncd.core.outcome import TIMEOUT

# Linux: MAX_ARG_STRLEN, with the NUL that ends the string.
_ARGUMENT_LIMIT = 128 * 1024 - 1
# What the service manager gave to this process only.
_PRIVATE_ENVIRONMENT = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
)


log = logging.getLogger(__name__)


class Doveadm:
    """Runs one command at a time or many at once; every run has a connection or a process of its own
    (2.3 can't switch users twice in one process).

    ``socket_path`` is Dovecot's unix listener ``doveadm-server``, "" for none; ``program`` is the path of
    doveadm; ``config`` is the file for its ``-c``, "" for the default one.
    """

    # Seconds to wait for a server to close a finished connection, and for a program to end after SIGTERM.
    grace = 2.0

    def __init__(self, socket_path: str, program: str, config: str = "") -> None:
        self.socket_path = socket_path
        self.program = program
        self.config = config
        # Why the socket could not be used the last time it was tried; "" when it could.
        self.socket_problem = ""

    async def run(
        self,
        user: str,
        command: str,
        args: Sequence[str],
        *,
        deadline: float,
        before_send: Optional[Callable[[], None]] = None,
    ) -> Reply:
        """Run ``command`` for ``user`` ("" for none). ``deadline`` is a moment of the loop's clock.

        ``before_send`` is called right before Dovecot gets the command: what changes later may not be
        covered by it. A state that is too long for the way is replaced by a stateless comparison.
        """
        line = request_line("", user, command, args)
        if len(line) > REQUEST_LIMIT:
            line = request_line("", user, command, without_state(args))
        before = self.socket_problem
        reply = await self._run_over_socket(line, deadline, before_send)
        if self.socket_problem != before:
            if self.socket_problem:
                log.warning("%s; running %s instead", self.socket_problem, self.program)
            else:
                log.warning("%s can be used again", self.socket_path)
        if reply is None:
            reply = await self.run_program(user, command, args, deadline=deadline, before_send=before_send)
        return reply

    async def run_program(
        self,
        user: str,
        command: str,
        args: Sequence[str],
        *,
        deadline: float,
        before_send: Optional[Callable[[], None]] = None,
    ) -> Reply:
        """As `run`, by the doveadm program. ``output`` holds the lines that it printed."""
        if "*" in user or "?" in user:
            # `doveadm -u` would expand it and run the command for everyone who matches.
            return Reply(
                None, failure=f"user name {user!r} holds a wildcard: only doveadm-server takes it literally"
            )
        argv = self._argv(user, command, args)
        if any("\0" in argument for argument in argv):
            return Reply(None, failure=f"user name or argument with a NUL byte: {user!r}")
        run = _ProgramRun(self.grace)
        try:
            if before_send is not None:
                before_send()
            return await run.run(argv, deadline)
        except OSError as error:
            problem = f"{self.program}: {error.strerror or error}"
            return Reply(None, failure="; ".join(filter(None, (self.socket_problem, problem))))
        finally:
            await run.stop()

    def _argv(self, user: str, command: str, args: Sequence[str]) -> list[str]:
        argv = [self.program]
        if self.config:
            argv += ["-c", self.config]
        argv += command.split(" ")
        if user:
            # In one word with its option: 2.4 takes an argument "--help" for itself wherever it stands.
            argv.append(f"-u{user}")
        if any(len(os.fsencode(argument)) > _ARGUMENT_LIMIT for argument in args):
            args = without_state(args)
        return [*argv, *args]

    async def _run_over_socket(
        self, line: bytes, deadline: float, before_send: Optional[Callable[[], None]]
    ) -> Optional[Reply]:
        """None where the socket can't be used; nothing has been asked of Dovecot then."""
        try:
            connection = await _connect(self.socket_path)
        except OSError as error:
            self.socket_problem = f"{self.socket_path}: {error.strerror or error}"
            return None
        loop = asyncio.get_running_loop()
        timer = loop.call_at(deadline, connection.expire)
        try:
            connection.transport.write(HANDSHAKE)
            state = await connection.leave(State.HANDSHAKE)
            if connection.expired:
                return connection.result()
            if state is not State.READY:
                self.socket_problem = f"{self.socket_path}: {connection.stream.problem or state.value}"
                return None
            self.socket_problem = ""
            if before_send is not None:
                before_send()
            connection.transport.write(line)
            if await connection.leave(State.READY) is State.REPLIED:
                await connection.hang_up(self.grace)
            return connection.result()
        finally:
            timer.cancel()
            connection.transport.abort()


async def _connect(path: str) -> _Connection:
    """Raises OSError, also where the listener's backlog is full (asyncio would take that for connected)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)
        _, connection = await asyncio.get_running_loop().create_unix_connection(_Connection, sock=sock)
    except BaseException:
        sock.close()
        raise
    return connection


class _Connection(asyncio.Protocol):
    """One connection to doveadm-server. ``closed`` is true once nothing more can come."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self.stream = ReplyStream()
        self.closed = False
        self.expired = False
        self._news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        before = self.stream.state
        if self.stream.feed(data) is not before:
            self._news.set()

    def eof_received(self) -> None:
        self._close()

    def connection_lost(self, exc: Optional[Exception]) -> None:
        self._close()

    def expire(self) -> None:
        """The deadline has come."""
        self.expired = True
        self._close()

    def _close(self) -> None:
        self.closed = True
        self._news.set()

    async def leave(self, state: State) -> State:
        """Wait until the stream is in another state, or closed."""
        while self.stream.state is state and not self.closed:
            self._news.clear()
            await self._news.wait()
        return self.stream.state

    async def hang_up(self, grace: float) -> None:
        """After the reply: let the server send what it still holds. It closes when it sees our end."""
        timer = asyncio.get_running_loop().call_later(grace, self._close)
        try:
            if self.transport.can_write_eof() and not self.transport.is_closing():
                self.transport.write_eof()
            while not self.closed:
                self._news.clear()
                await self._news.wait()
        finally:
            timer.cancel()

    def result(self) -> Reply:
        reply = self.stream.finish()
        if self.expired and reply.exit_code is None:
            return Reply(None, log=reply.log, failure=TIMEOUT)
        return reply


class _ProgramRun(asyncio.SubprocessProtocol):
    """One run of a program, in a session and process group of its own, with its output in bounded memory."""

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self._transport: Optional[asyncio.SubprocessTransport] = None
        self._stdout = bytearray()
        self._stderr = LineSplitter(LOG_LINE_LIMIT)
        self._log = LogTail()
        self._expired = False
        self._exited = asyncio.Event()
        self._pipes_closed = False
        self._done = asyncio.Event()

    async def run(self, argv: Sequence[str], deadline: float) -> Reply:
        """Raises OSError where the program can't be started. `stop` must follow in every case."""
        loop = asyncio.get_running_loop()
        timer = loop.call_at(deadline, self._expire)
        try:
            self._transport, _ = await loop.subprocess_exec(
                lambda: self,
                *argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
                env=_environment(),
            )
            await self._done.wait()
        finally:
            timer.cancel()
        return self._reply(self._transport.get_returncode())

    def _reply(self, returncode: Optional[int]) -> Reply:
        self._add_log_line(self._stderr.rest())
        log = self._log.lines()
        if self._expired or returncode is None:
            return Reply(None, log=log, failure=TIMEOUT)
        if returncode < 0:
            return Reply(None, log=log, failure=f"killed by signal {-returncode}")
        if len(self._stdout) > OUTPUT_LIMIT:
            return Reply(None, log=log, failure=f"output of more than {OUTPUT_LIMIT} bytes")
        lines = self._stdout.decode("utf-8", "surrogateescape").split("\n")
        return Reply(returncode, tuple(lines if lines[-1] else lines[:-1]), log)

    async def stop(self) -> None:
        """End what is left of the run: SIGTERM, and SIGKILL after the grace or on a second cancellation."""
        if self._transport is None:
            return
        try:
            if not self._exited.is_set():
                await self._terminate()
            if not self._pipes_closed:
                # A child of the program (dsync's remote shell) outlived it.
                self._signal_group(signal.SIGKILL)
        finally:
            self._transport.close()

    async def _terminate(self) -> None:
        self._signal_group(signal.SIGTERM)
        timer = asyncio.get_running_loop().call_later(self._grace, self._signal_group, signal.SIGKILL)
        try:
            await self._exited.wait()
        except asyncio.CancelledError:
            self._signal_group(signal.SIGKILL)
            raise
        finally:
            timer.cancel()

    def _signal_group(self, number: int) -> None:
        if self._transport is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._transport.get_pid(), number)

    def _expire(self) -> None:
        self._expired = True
        self._done.set()

    def _add_log_line(self, data: bytes) -> None:
        line = parse_stderr_line(data)
        if line is not None:
            self._log.add(line)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 1:
            self._stdout += data[: OUTPUT_LIMIT + 1 - len(self._stdout)]
            return
        for line in self._stderr.feed(data):
            self._add_log_line(line)

    def process_exited(self) -> None:
        self._exited.set()
        if not self._pipes_closed:
            asyncio.get_running_loop().call_later(self._grace, self._done.set)

    def connection_lost(self, exc: Optional[Exception]) -> None:
        """The process has ended and so have its pipes."""
        self._pipes_closed = True
        self._done.set()


def _environment() -> dict[str, str]:
    """Dovecot's words in English, and no way to speak to the service manager in this daemon's name."""
    kept = {name: value for name, value in os.environ.items() if name not in _PRIVATE_ENVIRONMENT}
    return {**kept, "LANG": "C", "LC_ALL": "C"}
