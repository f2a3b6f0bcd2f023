"""The daemon as a process, on a machine with a Dovecot that is played."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Optional

import pytest

from tests.shell.fake_doveadm_server import Answer, FakeDoveadmServer, Request
from tests.shell.test_intake import Box
from tests.shell.waiting import until

STATE = "AQAAAHm4+Jk="
DOVECONF = """#!/bin/sh
cat <<'END'
# 2.4.1 (fake): /etc/dovecot/dovecot.conf
base_dir = {base}
first_valid_uid = 0
mail_driver = maildir
mail_path = ~/Maildir
namespace inbox {{
  inbox = yes
}}
END
"""
CONFIG = """
[sync]
settle = "20ms"
settle_low = "30ms"
longest_wait = "100ms"
[dovecot]
doveconf = "{base}/doveconf"
doveadm = "/nonexistent/doveadm"
[daemon]
state_directory = "{base}/state"
[[peer]]
name = "b"
destination = "tcp:b:12345"
"""


class Site:
    """A machine with a Dovecot that is played, users with mail, and a service manager's socket."""

    def __init__(self, base: Path, users: tuple[str, ...]) -> None:
        self.base, self.users = base, users
        self.sync: Callable[[Request], Answer] = lambda request: Answer.ok(STATE)
        self.server = FakeDoveadmServer(str(base / "doveadm-server"), self.answer)
        self.config = base / "dovesyncd.toml"
        self.config.write_text(CONFIG.format(base=base))
        doveconf = base / "doveconf"
        doveconf.write_text(DOVECONF.format(base=base))
        doveconf.chmod(0o755)
        self.inbox = {user: Box(base / "vmail" / user / "Maildir").create() for user in users}
        self.mail = base / "vmail"
        # What the daemon is started by.
        self.wrapper: list[str] = []
        self.said: list[str] = []
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.manager.bind(str(base / "notify"))
        self.daemon: Optional[asyncio.subprocess.Process] = None

    def answer(self, request: Request) -> Answer:
        if request.command == "sync":
            return self.sync(request)
        if request.command == "mailbox path":
            return Answer.ok(f"{self.mail}/{request.user}/Maildir/.{request.args[-1]}")
        assert request.command == "user"
        if request.args == ("*",):
            return Answer.ok(json.dumps({"userList": self.users}))
        fields = {name: {"uid": "0", "home": f"{self.mail}/{name}"} for name in request.args}
        return Answer.ok(json.dumps(fields))

    @property
    def synced(self) -> list[str]:
        return [request.user for request in self.server.requests if request.command == "sync"]

    async def start(self, **environ: str) -> None:
        self.said.clear()
        self.server.requests.clear()
        self.daemon = await program(
            "--config",
            str(self.config),
            wrapper=self.wrapper,
            NOTIFY_SOCKET=str(self.base / "notify"),
            **environ,
        )

    def hear(self) -> None:
        """Takes what has come for the service manager; a daemon that nobody hears would wait one day."""
        while True:
            try:
                self.said += self.manager.recv(4096).decode().split("\n")
            except BlockingIOError:
                return

    def told(self, word: str) -> bool:
        """Whether a message that contains ``word`` has come to the service manager."""
        self.hear()
        return any(word in line for line in self.said)

    async def until_told(self, word: str) -> None:
        await until(lambda: self.told(word), f"{word} among {self.said}")

    async def at_rest(self) -> None:
        """Until the daemon says that nothing is left to do."""
        self.hear()
        self.said.clear()
        await self.until_told(f"STATUS={len(self.users)} users, 0 pending, 0 running")

    async def stop(self) -> tuple[int, str]:
        """With SIGTERM: the exit status and what was logged."""
        assert self.daemon is not None
        self.daemon.terminate()
        return await self.ended()

    async def ended(self) -> tuple[int, str]:
        assert self.daemon is not None
        daemon, self.daemon = self.daemon, None
        try:
            _, log = await asyncio.wait_for(daemon.communicate(), 10)
        except asyncio.TimeoutError:
            daemon.kill()
            _, log = await daemon.communicate()
            pytest.fail(f"did not end: {log.decode()}")
        assert daemon.returncode is not None
        return daemon.returncode, log.decode()


async def program(*arguments: str, wrapper: Sequence[str] = (), **environ: str) -> asyncio.subprocess.Process:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "STATE_DIRECTORY")
    }
    return await asyncio.create_subprocess_exec(
        *wrapper,
        sys.executable,
        "-m",
        "dovesyncd.daemon",
        *arguments,
        env={**kept, "PYTHONPATH": str(Path(__file__).parents[2]), **environ},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
    process = await program(*arguments, **environ)
    output, log = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), log.decode()


@asynccontextmanager
async def site(state: Path, *users: str) -> AsyncIterator[Site]:
    it = Site(state, users)
    loop = asyncio.get_running_loop()
    loop.add_reader(it.manager, it.hear)
    try:
        async with it.server:
            try:
                yield it
            finally:
                if it.daemon is not None:
                    it.daemon.kill()
                    _, log = await it.daemon.communicate()
                    print(log.decode())
    finally:
        loop.remove_reader(it.manager)
        it.manager.close()
