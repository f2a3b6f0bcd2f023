"""Doveadm against a server and a program that misbehave in chosen ways, and what is left behind each time."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dovesyncd.core.doveadm_wire import OUTPUT_LIMIT, REQUEST_LIMIT
from dovesyncd.core.dsync import sync_args
from dovesyncd.core.model import LogLine, Reply, SyncKind
from dovesyncd.doveadm import Doveadm
from tests.shell.fake_doveadm_server import Answer, FakeDoveadmServer, Greeting

PROGRAM = str(Path(__file__).with_name("fake_doveadm"))
STATE = "AQAAAHm4+Jk="
SYNC = sync_args(SyncKind.STATELESS, "", lock_timeout=30, stall_timeout=60, destination=["tcp:b:1"])


def children() -> set[int]:
    found = set()
    for entry in os.listdir("/proc"):
        try:
            status = Path("/proc", entry, "stat").read_text() if entry.isdigit() else ""
        except OSError:
            continue  # it has just ended
        if status and int(status.rpartition(")")[2].split()[1]) == os.getpid():
            found.add(int(entry))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sockets() -> int:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:
            continue  # the directory's own descriptor
    return sum(link.startswith(("socket:", "pipe:")) for link in links)


async def until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.01)


@pytest_asyncio.fixture(autouse=True)
async def _nothing_left() -> AsyncIterator[None]:
    """No child, socket, pipe or task of a run outlives it."""
    children_before, sockets_before, tasks_before = children(), sockets(), asyncio.all_tasks()
    yield
    await until(lambda: children() <= children_before, "a child process is left")
    await until(lambda: sockets() <= sockets_before, "a socket or pipe is left open")
    await until(lambda: asyncio.all_tasks() <= tasks_before | {asyncio.current_task()}, "a task is left")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "doveadm-server")


@pytest.fixture
def plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Callable[[], list[dict[str, Any]]]]:
    """Tell the fake program what to do; the result reads what it recorded."""
    record = tmp_path / "record"

    def set_plan(**keys: Any) -> Callable[[], list[dict[str, Any]]]:
        monkeypatch.setenv("FAKE_DOVEADM", json.dumps({"record": str(record), **keys}))
        return lambda: (
            [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
        )

    return set_plan


def soon(seconds: float = 10.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def ask(doveadm: Doveadm, user: str = "ann", seconds: float = 10.0) -> Reply:
    return await doveadm.run(user, "sync", SYNC, deadline=soon(seconds))


# ---- the socket


async def test_a_reply_over_the_socket(path: str) -> None:
    async with FakeDoveadmServer(path, lambda request: Answer.ok(STATE)) as server:
        doveadm = Doveadm(path, "/nonexistent")
        assert await ask(doveadm) == Reply(0, (STATE,))
    (request,) = server.requests
    assert (request.flags, request.user, request.command, list(request.args)) == ("", "ann", "sync", SYNC)
    assert doveadm.socket_problem == ""


async def test_before_send_comes_after_the_handshake_and_before_the_command(path: str) -> None:
    async with FakeDoveadmServer(path, lambda request: Answer.ok()) as server:
        seen: list[tuple[int, int]] = []
        await Doveadm(path, "/nonexistent").run(
            "ann",
            "sync",
            SYNC,
            deadline=soon(),
            before_send=lambda: seen.append((server.connections, len(server.requests))),
        )
    assert seen == [(1, 0)]


async def test_a_connection_for_each_command(path: str) -> None:
    async with FakeDoveadmServer(path, lambda request: Answer.ok(request.user)) as server:
        doveadm = Doveadm(path, "/nonexistent")
        replies = await asyncio.gather(*(ask(doveadm, f"user{number}") for number in range(20)))
    assert [reply.output[0] for reply in replies] == [f"user{number}" for number in range(20)]
    assert server.connections == 20


@pytest.mark.parametrize("piece", [0, 1, 3])
async def test_log_lines_before_and_after_the_reply(path: str, piece: int) -> None:
    early, late = LogLine("error", "früh \udcff"), LogLine("warning", "late")
    answer = Answer("TEMPFAIL", (STATE, "a\tb"), log=(early,), late_log=(late,), piece=piece)
    async with FakeDoveadmServer(path, lambda request: answer):
        assert await ask(Doveadm(path, "/nonexistent")) == Reply(75, (STATE, "a\tb"), (early, late))


async def test_a_server_that_keeps_the_connection_does_not_keep_us(path: str) -> None:
    async with FakeDoveadmServer(path, lambda request: Answer.ok(STATE).with_(linger=True)):
        doveadm = Doveadm(path, "/nonexistent")
        doveadm.grace = 0.05
        assert await ask(doveadm) == Reply(0, (STATE,))


@pytest.mark.parametrize(("minor", "failure"), [(2, "disconnected"), (3, "doveadm-server died")])
async def test_a_server_that_dies(path: str, minor: int, failure: str) -> None:
    async with FakeDoveadmServer(path, lambda request: Answer.gone("last words"), minor=minor):
        reply = await ask(Doveadm(path, PROGRAM))
    assert reply == Reply(None, log=(LogLine("error", "last words"),), failure=failure)


async def test_half_a_packet(path: str) -> None:
    async with FakeDoveadmServer(path, lambda request: Answer.garbage(b"\0\0\0\0\x20AQAA")):
        assert await ask(Doveadm(path, PROGRAM)) == Reply(None, failure="doveadm-server died")


async def test_garbage_after_the_command(path: str) -> None:
    async with FakeDoveadmServer(path, lambda request: Answer.garbage(b"\0\0\0\0\x07\nhello\n")):
        reply = await ask(Doveadm(path, PROGRAM))
    assert reply == Reply(None, failure="protocol error: unexpected reply word 'hello'")


async def test_deadline_after_the_command(path: str) -> None:
    async with FakeDoveadmServer(path, lambda request: Answer.hanging()) as server:
        assert await ask(Doveadm(path, PROGRAM), seconds=0.2) == Reply(None, failure="timeout")
        await server.wait_for(lambda: server.open == 0)


async def test_deadline_before_the_handshake(path: str) -> None:
    async with FakeDoveadmServer(path, lambda request: Answer.ok(), Greeting.HANG) as server:
        sent: list[str] = []
        reply = await Doveadm(path, PROGRAM).run(
            "ann", "sync", SYNC, deadline=soon(0.2), before_send=lambda: sent.append("sent")
        )
        await server.wait_for(lambda: server.open == 0)
    assert reply == Reply(None, failure="timeout")
    assert sent == []
    assert server.requests == []


@pytest.mark.parametrize("greeting", [Greeting.READY, Greeting.HANG])
async def test_cancelled_over_the_socket(path: str, greeting: Greeting) -> None:
    async with FakeDoveadmServer(path, lambda request: Answer.hanging(), greeting) as server:
        task = asyncio.ensure_future(ask(Doveadm(path, PROGRAM)))
        await server.wait_for(
            lambda: server.open == 1 and (greeting is Greeting.HANG or len(server.requests) == 1)
        )
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.wait_for(lambda: server.open == 0)


async def test_hostile_names_stay_in_their_field(path: str) -> None:
    users = ["-x", "a\tb", "a\nann\tsync", "a\rb\0c", "*", "?", "\x01t", "\udcff", "--help", "ü"]
    async with FakeDoveadmServer(path, lambda request: Answer.ok()) as server:
        for user in users:
            assert (await ask(Doveadm(path, "/nonexistent"), user)).exit_code == 0
    assert [request.user for request in server.requests] == users
    assert {request.args for request in server.requests} == {tuple(SYNC)}


async def test_a_state_that_the_server_would_not_read(path: str) -> None:
    long = sync_args(
        SyncKind.STATEFUL, "A" * REQUEST_LIMIT, lock_timeout=1, stall_timeout=2, destination=["tcp:b:1"]
    )
    fits = sync_args(
        SyncKind.STATEFUL, "A" * 500_000, lock_timeout=1, stall_timeout=2, destination=["tcp:b:1"]
    )
    async with FakeDoveadmServer(path, lambda request: Answer.ok()) as server:
        for args in (long, fits):
            assert (await Doveadm(path, PROGRAM).run("ann", "sync", args, deadline=soon())).exit_code == 0
    assert [len(request.option("-s") or "") for request in server.requests] == [0, 500_000]


# ---- the way from the socket to the program


@pytest.mark.parametrize(
    ("greeting", "problem"),
    [
        (Greeting.PASSWORD, "asked for a password"),
        (Greeting.GARBAGE, "unexpected greeting"),
        (Greeting.EOF, "waiting for the handshake"),
    ],
)
async def test_the_program_where_the_socket_can_not_be_used(
    path: str, plan: Any, greeting: Greeting, problem: str
) -> None:
    runs = plan(stdout=STATE + "\n")
    async with FakeDoveadmServer(path, lambda request: Answer.ok(), greeting):
        doveadm = Doveadm(path, PROGRAM)
        assert await ask(doveadm) == Reply(0, (STATE,))
    assert problem in doveadm.socket_problem
    assert len(runs()) == 1


async def test_the_program_where_nobody_listens(tmp_path: Path, path: str, plan: Any) -> None:
    runs = plan()
    Path(path).touch()
    for socket_path in (path, str(tmp_path / "missing"), "", "/" + "x" * 200):
        doveadm = Doveadm(socket_path, PROGRAM)
        assert await ask(doveadm) == Reply(0)
        assert doveadm.socket_problem.startswith(socket_path + ": ")
    assert len(runs()) == 4


async def test_the_socket_again_when_it_is_back(path: str, plan: Any) -> None:
    runs = plan()
    doveadm = Doveadm(path, PROGRAM)
    await ask(doveadm)
    async with FakeDoveadmServer(path, lambda request: Answer.ok(STATE)):
        assert await ask(doveadm) == Reply(0, (STATE,))
    assert doveadm.socket_problem == ""
    assert len(runs()) == 1


async def test_neither_way(path: str) -> None:
    reply = await ask(Doveadm(path, "/nonexistent/doveadm"))
    assert reply == Reply(
        None, failure=f"{path}: No such file or directory; /nonexistent/doveadm: No such file or directory"
    )


# ---- the program


async def test_how_the_program_is_called(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = plan()
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("DOVECOT_HOSTDOMAIN", "a.example.com")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    seen: list[int] = []
    readable, writable = os.pipe()
    os.set_inheritable(writable, True)
    try:
        for user, command in (("ann", "sync"), ("", "mailbox status")):
            await Doveadm("", PROGRAM, "/etc/x.conf").run(
                user,
                command,
                ["-s", "", "$(id)"],
                deadline=soon(),
                before_send=lambda: seen.append(len(runs())),
            )
    finally:
        os.close(readable)
        os.close(writable)
    first, second = runs()
    assert first["argv"] == ["-c", "/etc/x.conf", "sync", "-uann", "-s", "", "$(id)"]
    assert second["argv"] == ["-c", "/etc/x.conf", "mailbox", "status", "-s", "", "$(id)"]
    assert seen == [0, 1]
    assert first["pgid"] == first["pid"]
    assert first["stdin"] == "/dev/null"
    # 0, 1, 2 and the descriptor that lists the directory.
    assert first["fds"] == 4
    assert first["environment"]["LC_ALL"] == first["environment"]["LANG"] == "C"
    assert first["environment"]["DOVECOT_HOSTDOMAIN"] == "a.example.com"
    assert "NOTIFY_SOCKET" not in first["environment"]


async def test_output_log_and_exit_code_of_the_program(plan: Any) -> None:
    plan(stdout=f"{STATE}\n\nlast", stderr="doveadm(ann): Error: text\nusage\n\nWarning: half", exit=75)
    assert await ask(Doveadm("", PROGRAM)) == Reply(
        75,
        (STATE, "", "last"),
        (LogLine("error", "doveadm(ann): text"), LogLine("info", "usage"), LogLine("warning", "half")),
    )


async def test_a_killed_program(plan: Any) -> None:
    plan(signal=9, stderr="Panic: x\n")
    assert await ask(Doveadm("", PROGRAM)) == Reply(
        None, log=(LogLine("panic", "x"),), failure="killed by signal 9"
    )


@pytest.mark.parametrize("ignore_term", [False, True])
async def test_deadline_of_the_program(plan: Any, ignore_term: bool) -> None:
    runs = plan(hang=True, ignore_term=ignore_term, child=True, stderr="Error: so far\n")
    doveadm = Doveadm("", PROGRAM)
    doveadm.grace = 0.1
    task = asyncio.ensure_future(ask(doveadm, seconds=3.0))
    await until(lambda: bool(runs()), "the program has not started")
    assert await task == Reply(None, log=(LogLine("error", "so far"),), failure="timeout")
    assert not alive(runs()[0]["pid"])
    await until(lambda: not alive(runs()[0]["child"]), "the program's child is left")


@pytest.mark.parametrize("ignore_term", [False, True])
async def test_cancelled_with_the_program(plan: Any, ignore_term: bool) -> None:
    runs = plan(hang=True, ignore_term=ignore_term)
    doveadm = Doveadm("", PROGRAM)
    doveadm.grace = 0.1
    task = asyncio.ensure_future(ask(doveadm))
    await until(lambda: bool(runs()), "the program has not started")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(runs()[0]["pid"])


async def test_cancelled_twice(plan: Any) -> None:
    runs = plan(hang=True, ignore_term=True)
    doveadm = Doveadm("", PROGRAM)
    doveadm.grace = 1000
    task = asyncio.ensure_future(ask(doveadm))
    await until(lambda: bool(runs()), "the program has not started")
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not alive(runs()[0]["pid"]), "the program is left")


async def test_a_child_that_outlives_the_program(plan: Any) -> None:
    runs = plan(child=True, stdout=STATE + "\n")
    doveadm = Doveadm("", PROGRAM)
    doveadm.grace = 0.1
    assert await ask(doveadm) == Reply(0, (STATE,))
    await until(lambda: not alive(runs()[0]["child"]), "the program's child is left")


async def test_a_flood_of_output(plan: Any) -> None:
    plan(flood=OUTPUT_LIMIT * 2)
    reply = await ask(Doveadm("", PROGRAM))
    assert reply.failure == f"output of more than {OUTPUT_LIMIT} bytes"
    assert len(reply.log) < 300


@pytest.mark.parametrize("user", ["*", "a?", "x\0y"])
async def test_names_that_the_program_would_misunderstand(plan: Any, user: str) -> None:
    runs = plan()
    reply = await ask(Doveadm("", PROGRAM), user)
    assert reply.exit_code is None
    assert repr(user) in reply.failure
    assert runs() == []


@pytest.mark.parametrize("user", ["-x", "--help", "a b", "a\nb", "\udcff", "$(id)"])
async def test_names_that_are_no_options_of_the_program(plan: Any, user: str) -> None:
    runs = plan()
    assert (await ask(Doveadm("", PROGRAM), user)).exit_code == 0
    assert runs()[0]["argv"] == ["sync", f"-u{user}", *SYNC]


async def test_a_state_that_is_too_long_for_an_argument(plan: Any) -> None:
    runs = plan()
    for length in (131_071, 131_072):
        args = sync_args(
            SyncKind.STATEFUL, "A" * length, lock_timeout=1, stall_timeout=2, destination=["tcp:b:1"]
        )
        assert (await Doveadm("", PROGRAM).run("ann", "sync", args, deadline=soon())).exit_code == 0
    assert [len(run["argv"][run["argv"].index("-s") + 1]) for run in runs()] == [131_071, 0]
