"""The program as a service manager meets it: a process, its messages, its exit status, its queue."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from dovesyncd import __version__
from dovesyncd.core.options import parse
from tests.shell.fake_doveadm_server import Answer
from tests.shell.site import STATE, Site, run, site
from tests.shell.test_intake import MAIL
from tests.shell.waiting import until

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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


# Reloading ----------------------------------------------------------------------------------------------


async def reload(it: Site, *lines: str) -> None:
    """With these lines at the end of the configuration instead of those of the last time."""
    base, _, _ = it.config.read_text().partition("# more\n")
    it.config.write_text("\n".join([base + "# more", *lines, ""]))
    it.said.clear()
    assert it.daemon is not None
    it.daemon.send_signal(signal.SIGHUP)
    await it.until_told("READY=1")
    assert it.said.index("RELOADING=1") < it.said.index("READY=1")
    assert any(line.startswith("MONOTONIC_USEC=") for line in it.said)


def destinations(it: Site, user: str) -> list[str]:
    return [
        request.args[-1]
        for request in it.server.requests
        if request.command == "sync" and request.user == user
    ]


async def test_a_reload_loses_no_change_and_no_watch(state: Path) -> None:
    async with site(state, "ann", "bob") as it:
        await it.start()
        # With a new database the first passes are confirmed.
        await until(lambda: len(it.synced) == 4, "two syncs each")
        await it.at_rest()
        it.server.requests.clear()
        await reload(it, "[[peer]]", 'name = "c"', 'destination = "tcp:c:12345"')
        # The new peer gets everyone, the other one nobody.
        await until(lambda: destinations(it, "bob") == ["tcp:c:12345"], "bob to c")
        await it.at_rest()
        assert destinations(it, "ann") == ["tcp:c:12345"]
        gate = asyncio.Event()
        it.sync = lambda request: Answer.ok(STATE).with_(after=gate)
        it.inbox["ann"].user_does(MAIL)
        await until(lambda: len(destinations(it, "ann")) == 2, "ann's sync runs")
        it.inbox["bob"].user_does(MAIL)
        await reload(it)
        gate.set()
        await it.at_rest()
        assert destinations(it, "ann").count("tcp:b:12345") == 1
        assert destinations(it, "bob").count("tcp:b:12345") == 1
        it.inbox["bob"].user_does(MAIL)
        await until(lambda: destinations(it, "bob").count("tcp:b:12345") == 2, "it is still watched")
        await it.at_rest()
        # What changed while the peer was not configured was not noted for it: everyone is compared.
        before = len(it.server.requests)
        await reload(it, "[[peer]]", 'name = "c"', 'destination = "tcp:c:12345"')
        await until(
            lambda: (
                sorted(r.user for r in it.server.requests[before:] if r.command == "sync") == ["ann", "bob"]
            ),
            "both to c",
        )
        compared = [r for r in it.server.requests[before:] if r.command == "sync"]
        assert {(r.args[-1], r.option("-s")) for r in compared} == {("tcp:c:12345", "")}
        status, log = await it.stop()
    assert (status, log.count("The configuration was reloaded")) == (0, 3)
    assert "Traceback" not in log


async def test_a_reload_while_a_sync_hangs_at_a_peer_that_moves(state: Path) -> None:
    async with site(state, "ann") as it:
        await it.start()
        await it.at_rest()
        it.sync = lambda request: Answer.hanging() if "tcp:b:12345" in request.args else Answer.ok(STATE)
        it.inbox["ann"].user_does(MAIL)
        await until(lambda: len(it.synced) == 2, "ann's sync")
        text = it.config.read_text()
        it.config.write_text(text.replace("tcp:b:12345", "tcp:elsewhere:12345"))
        await reload(it)
        await until(lambda: destinations(it, "ann")[-1] == "tcp:elsewhere:12345", "the new place")
        await it.at_rest()
        assert next(reversed(it.server.requests)).option("-s") == "", "the state was the other peer's"
        assert not it.server.open
        assert (await it.stop())[0] == 0


async def test_a_broken_reload_changes_nothing(state: Path) -> None:
    async with site(state, "ann") as it:
        await it.start()
        await it.at_rest()
        await reload(it, "[users]", "include = 5")
        it.config.write_text("[[peer\n")
        await reload(it)
        it.inbox["ann"].user_does(MAIL)
        await until(lambda: it.synced == ["ann", "ann"], "all is as it was")
        await it.at_rest()
        status, log = await it.stop()
    assert status == 0
    assert log.count("The configuration was not reloaded") == 2
    assert "users.include = 5: expected" in log


async def test_a_reload_of_the_users(state: Path) -> None:
    async with site(state, "ann", "bob") as it:
        text = it.config.read_text()
        it.config.write_text(text + '[users]\nexclude = ["bob"]\n')
        await it.start()
        await until(lambda: it.synced == ["ann"], "ann's")
        it.config.write_text(text + '[users]\nexclude = ["ann"]\n')
        assert it.daemon is not None
        it.daemon.send_signal(signal.SIGHUP)
        await until(lambda: it.synced == ["ann", "bob"], "bob's")
        assert (await it.stop())[0] == 0
