"""The program as a service manager meets it: a process, its messages, its exit status, its queue."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Optional

import pytest

from dovesyncd import __version__
from dovesyncd.core.options import parse
from tests.shell.fake_doveadm_server import Answer, FakeDoveadmServer, Request
from tests.shell.test_intake import MAIL, Box
from tests.shell.waiting import until

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
        self.said: list[str] = []
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.manager.bind(str(base / "notify"))
        self.daemon: Optional[asyncio.subprocess.Process] = None

    def answer(self, request: Request) -> Answer:
        if request.command == "sync":
            return self.sync(request)
        if request.command == "mailbox path":
            return Answer.ok(f"{self.base}/vmail/{request.user}/Maildir/.{request.args[-1]}")
        assert request.command == "user"
        if request.args == ("*",):
            return Answer.ok(json.dumps({"userList": self.users}))
        fields = {name: {"uid": "0", "home": f"{self.base}/vmail/{name}"} for name in request.args}
        return Answer.ok(json.dumps(fields))

    @property
    def synced(self) -> list[str]:
        return [request.user for request in self.server.requests if request.command == "sync"]

    async def start(self, **environ: str) -> None:
        self.said.clear()
        self.server.requests.clear()
        self.daemon = await program(
            "--config", str(self.config), NOTIFY_SOCKET=str(self.base / "notify"), **environ
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


async def program(*arguments: str, **environ: str) -> asyncio.subprocess.Process:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "JOURNAL_STREAM", "STATE_DIRECTORY")
    }
    return await asyncio.create_subprocess_exec(
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


# Running ------------------------------------------------------------------------------------------------


async def test_a_life(state: Path) -> None:
    async with site(state, "ann", "bob") as it:
        await it.start()
        await it.until_told("READY=1")
        await until(lambda: sorted(it.synced) == ["ann", "bob"], "the first syncs")
        await until(lambda: not it.server.open, "they are done")
        it.inbox["ann"].user_does(MAIL)
        await until(lambda: sorted(it.synced) == ["ann", "ann", "bob"], "the sync of new mail")
        await until(lambda: not it.server.open, "it is done")
        assert [r.option("-s") for r in it.server.requests if r.command == "sync"] == ["", "", STATE]
        status, log = await it.stop()
        assert it.told("STOPPING=1")
        assert it.said.index("READY=1") < it.said.index("STOPPING=1")
        assert it.told("STATUS=2 users")
    assert status == 0, log
    assert f"INFO: dovesyncd {__version__} started\n" in log
    assert "INFO: ann -> b: new mail: stateful sync ok in" in log
    assert log.endswith("INFO: stopped\n")
    assert "Traceback" not in log


async def test_watchdog(state: Path) -> None:
    async with site(state, "ann") as it:
        await it.start(WATCHDOG_USEC="100000")
        for _ in range(3):
            await it.until_told("WATCHDOG=1")
            it.said.clear()
        assert (await it.stop())[0] == 0
    async with site_again(state) as it:
        await it.start(WATCHDOG_USEC="100000", WATCHDOG_PID="1")
        await it.until_told("STATUS=1 users")
        assert (await it.stop())[0] == 0
        assert not it.told("WATCHDOG=1")


@asynccontextmanager
async def site_again(state: Path) -> AsyncIterator[Site]:
    os.unlink(state / "notify")
    async with site(state, "ann") as it:
        yield it


async def test_a_stop_with_a_sync_under_way(state: Path) -> None:
    gate = asyncio.Event()
    async with site(state, "ann") as it:
        it.sync = lambda request: Answer.ok(STATE).with_(after=gate)
        await it.start()
        await until(lambda: it.synced == ["ann"], "the sync")
        assert it.daemon is not None
        it.daemon.terminate()
        await it.until_told("STOPPING=1")
        gate.set()
        status, log = await it.ended()
        assert status == 0
        assert "ann -> b: new user: stateless sync ok" in log
        await it.start()
        await it.until_told("STATUS=1 users, 0 pending")
        assert it.synced == []
        assert (await it.stop())[0] == 0


async def test_kill_and_restart(state: Path) -> None:
    """What was pending is continued, what changed meanwhile is found, nobody else is synced."""
    users = ("ann", "bob", "cid", "dan")
    async with site(state, *users) as it:
        await it.start(WATCHDOG_USEC="40000")
        await until(lambda: sorted(it.synced) == sorted(users), "the first syncs")
        await it.at_rest()
        assert (await it.stop())[0] == 0
        # Killed with a sync under way.
        await it.start(WATCHDOG_USEC="40000")
        await it.at_rest()
        assert it.synced == []
        it.sync = lambda request: Answer.hanging()
        it.inbox["ann"].user_does(MAIL)
        await until(lambda: it.synced == ["ann"], "ann's sync")
        assert it.daemon is not None
        it.daemon.kill()
        assert (await it.ended())[0] == -signal.SIGKILL
        # While it is down.
        it.inbox["bob"].user_does(MAIL)
        it.inbox["cid"].dsync_does()
        it.sync = lambda request: Answer.ok(STATE)
        await it.start(WATCHDOG_USEC="40000")
        await until(lambda: sorted(it.synced) == ["ann", "bob"], f"ann and bob: {it.synced}")
        await it.at_rest()
        assert sorted(it.synced) == ["ann", "bob"]
        status, log = await it.stop()
        assert (status, "Traceback" in log) == (0, False)


async def test_dovecot_comes_later(state: Path) -> None:
    async with site(state, "ann") as it:
        doveconf, asked = state / "doveconf", state / "asked"
        good = doveconf.read_text()
        doveconf.write_text(f"#!/bin/sh\ntouch {asked}\nexit 89\n")
        await it.start()
        await it.until_told("READY=1")
        await until(asked.exists, "Dovecot is asked")
        replacement = state / "doveconf.new"
        replacement.write_text(good)
        replacement.chmod(0o755)
        replacement.rename(doveconf)
        await until(lambda: it.synced == ["ann"], "the first sync")
        status, log = await it.stop()
    assert status == 0
    assert log.count("The users can't be listed") == 1
    assert "The users can be listed again" in log


# Refusing -----------------------------------------------------------------------------------------------


async def test_a_second_daemon(state: Path) -> None:
    async with site(state, "ann") as it:
        await it.start()
        await it.until_told("READY=1")
        status, _, log = await run("--config", str(it.config))
        assert (status, "in use by another dovesyncd" in log) == (1, True)
        assert "Traceback" not in log
        assert (await it.stop())[0] == 0


@pytest.mark.parametrize("arguments", [(), ("--check-config",), ("--show-config",)])
async def test_a_bad_configuration(arguments: tuple[str, ...], tmp_path: Path) -> None:
    config = tmp_path / "dovesyncd.toml"
    config.write_text('[sync]\nsettle = "soon"\n[[peer]]\nname = "b"\n')
    status, output, log = await run("--config", str(config), *arguments)
    assert (status, output) == (6, "")
    assert f"ERROR: {config}: sync.settle = 'soon': expected a time span" in log
    assert f"ERROR: {config}: peer[0].destination: required" in log
    assert "Traceback" not in log


async def test_no_configuration(tmp_path: Path) -> None:
    status, _, log = await run("--config", str(tmp_path / "missing.toml"))
    assert (status, "can't be read: No such file" in log) == (6, True)


async def test_an_unknown_key(state: Path) -> None:
    async with site(state, "ann") as it:
        good = await run("--config", str(it.config), "--check-config")
        assert good == (0, "", "")
        with open(it.config, "a") as file:
            file.write('destinaton = "x"\n')
        status, _, log = await run("--config", str(it.config), "--check-config")
        assert (status, "did you mean destination?" in log) == (6, True)
        await it.start()
        await it.until_told("READY=1")
        status, log = await it.stop()
        assert (status, "WARNING: " in log, "did you mean destination?" in log) == (0, True, True)


async def test_show_config(state: Path) -> None:
    async with site(state, "ann") as it:
        status, output, log = await run("--config", str(it.config), "--show-config")
        assert (status, log) == (0, "")
        shown, given = (
            parse([("x", tomllib.loads(text))]).config for text in (output, it.config.read_text())
        )
        assert shown is not None
        assert shown == given
        assert not (state / "state").exists()


async def test_version() -> None:
    assert await run("--version") == (0, f"dovesyncd {__version__}\n", "")


async def test_a_callback_that_fails_ends_it(state: Path) -> None:
    """With status 1 and the traceback, for the service manager to start it again."""
    async with site(state, "ann") as it:
        patch = state / "sitecustomize.py"
        patch.write_text(
            "from dovesyncd import intake\n"
            "def broken(self, directory): raise LookupError('a bug')\n"
            "intake.Intake._read_touched = broken\n"
        )
        await it.start(PYTHONPATH=f"{state}:{Path(__file__).parents[2]}")
        await until(lambda: it.synced == ["ann"], "the first sync")
        it.inbox["ann"].user_does(MAIL)
        status, log = await it.ended()
    assert status == 1
    assert "a callback failed" in log
    assert "LookupError: a bug" in log
