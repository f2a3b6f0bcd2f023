"""What arrives at a service manager's socket."""

from __future__ import annotations

import os
import socket
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from dovesyncd import notify
from dovesyncd.notify import Notify, watchdog_interval


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@dovesyncd-test-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(address.replace("@", "\0", 1) if request.param == "abstract" else address)
    listener.settimeout(5)
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    yield listener
    listener.close()


def close(notifier: Notify) -> None:
    if notifier._notifier is not None:
        notifier._notifier.socket.close()


def test_every_message(manager: socket.socket) -> None:
    notifier = Notify()
    for send, expected in (
        (notifier.ready, b"READY=1"),
        (notifier.alive, b"WATCHDOG=1"),
        (lambda: notifier.status("3 users, 1 pending"), b"STATUS=3 users, 1 pending"),
        (lambda: notifier.status("\u00fc\udcff"), b"STATUS=\\xfc\\udcff"),
        (notifier.stopping, b"STOPPING=1\nSTATUS=stopping"),
    ):
        send()
        assert manager.recv(1000) == expected
    close(notifier)


def test_a_manager_that_is_gone_harms_nobody(manager: socket.socket) -> None:
    notifier = Notify()
    manager.close()
    notifier.ready()
    close(notifier)


def test_without_sdnotify(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(notify, "SystemdNotifier", None)
    monkeypatch.setattr(notify, "systemd_daemon", types.SimpleNamespace(notify=said.append), raising=False)
    Notify().ready()
    Notify().stopping()
    assert said == ["READY=1", "STOPPING=1\nSTATUS=stopping"]


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_watchdog_interval(environ: dict[str, str], interval: float) -> None:
    assert watchdog_interval(environ, 42) == interval


def test_no_manager() -> None:
    """In a process of its own: sdnotify leaves a socket behind when there is none."""
    import subprocess

    environ = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    program = "from dovesyncd.notify import Notify; Notify().ready()"
    subprocess.run([sys.executable, "-c", program], env=environ, check=True)
