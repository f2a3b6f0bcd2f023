"""Doveadm against two tiny Dovecot instances on loopback (2.3 or 2.4, whichever is installed)."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dovesyncd.core.dsync import sync_args
from dovesyncd.core.model import OutcomeClass, Reply, SyncKind
from dovesyncd.core.outcome import classify
from dovesyncd.doveadm import Doveadm

PROGRAM = shutil.which("doveadm") or "/usr/bin/doveadm"
NOBODY = 65534

pytestmark = pytest.mark.skipif(
    shutil.which("dovecot") is None or os.geteuid() != 0, reason="needs Dovecot, and root to start it"
)

COMMON = """
base_dir = {root}/run
state_dir = {root}/state
log_path = {root}/log
instance_name = {name}
protocols =
listen = 127.0.0.1
ssl = no
first_valid_uid = 1
first_valid_gid = 1
doveadm_password = {password}
doveadm_port = {port}
auth_username_chars =
namespace inbox {{
  inbox = yes
}}
"""
CONFIG_23 = """
import_environment = TZ DOVECOT_HOSTDOMAIN={name}.test
mail_location = maildir:~/Maildir
passdb {{
  driver = passwd-file
  args = {root}/users
}}
userdb {{
  driver = passwd-file
  args = {root}/users
}}
service doveadm {{
  inet_listener {{
    port = {port}
  }}
}}
"""
CONFIG_24 = """
import_environment {{
  DOVECOT_HOSTDOMAIN = {name}.test
}}
mail_driver = maildir
mail_path = ~/Maildir
passdb passwd-file {{
  passwd_file_path = {root}/users
}}
userdb passwd-file {{
  passwd_file_path = {root}/users
}}
service doveadm {{
  inet_listener doveadm {{
    port = {port}
  }}
}}
"""
MESSAGE = b"From: a@example.com\r\nSubject: hello\r\nMessage-ID: <1@example.com>\r\n\r\nbody\r\n"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Instance:
    """One Dovecot with its own everything below ``root``."""

    def __init__(self, root: Path, name: str, users: list[str], password: str = "secret") -> None:
        self.root = root
        self.port = free_port()
        self.socket = str(root / "run" / "doveadm-server")
        self.config = str(root / "dovecot.conf")
        (root / "state").mkdir(parents=True)
        (root / "mail").mkdir()
        os.chown(root / "mail", NOBODY, NOBODY)
        passwd = (f"{user}:{{plain}}x:{NOBODY}:{NOBODY}::{root}/mail/{user}::\n" for user in users)
        (root / "users").write_text("".join(passwd))
        version = subprocess.run(["dovecot", "--version"], check=True, capture_output=True, text=True).stdout
        numbers = re.findall(r"\d+", version)
        new = (int(numbers[0]), int(numbers[1])) >= (2, 4)
        head = (
            f"dovecot_config_version = {'.'.join(numbers[:3])}\ndovecot_storage_version = 2.4.0\n"
            if new
            else ""
        )
        body = COMMON + (CONFIG_24 if new else CONFIG_23)
        Path(self.config).write_text(
            head + body.format(root=root, name=name, port=self.port, password=password)
        )
        self.process = subprocess.Popen(["dovecot", "-F", "-c", self.config], start_new_session=True)

    def wait_until_up(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            with socket.socket(socket.AF_UNIX) as sock:
                if sock.connect_ex(self.socket) == 0:
                    return
            assert self.process.poll() is None, (self.root / "log").read_text()
            assert time.monotonic() < deadline, "dovecot did not come up"
            time.sleep(0.02)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def messages(self, user: str) -> int:
        return sum(
            len(list((self.root / "mail" / user / "Maildir" / part).glob("*"))) for part in ("cur", "new")
        )

    def doveadm(self, *, by_socket: bool = True) -> Doveadm:
        return Doveadm(self.socket if by_socket else "", PROGRAM, self.config)


USERS = ["ann", "bob", "only-a", "x y", "-x", "--help", "ü", "we*rd"]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Instance, Instance]]:
    # A short path: unix sockets end at 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="ds-", dir="/tmp"))
    root.chmod(0o755)
    instances = [
        Instance(root / "a", "a", USERS),
        Instance(root / "b", "b", [u for u in USERS if u != "only-a"]),
    ]
    try:
        for instance in instances:
            instance.wait_until_up()
        yield instances[0], instances[1]
    finally:
        for instance in instances:
            instance.stop()
        shutil.rmtree(root, ignore_errors=True)


def save(instance: Instance, user: str) -> None:
    subprocess.run(
        [PROGRAM, "-c", instance.config, "save", f"-u{user}"],
        check=True,
        input=MESSAGE,
        stdout=subprocess.DEVNULL,
    )


async def sync(
    doveadm: Doveadm,
    user: str,
    port: int,
    kind: SyncKind = SyncKind.STATELESS,
    state: str = "",
    lock_timeout: int = 5,
) -> Reply:
    args = sync_args(
        kind, state, lock_timeout=lock_timeout, stall_timeout=10, destination=[f"tcp:127.0.0.1:{port}"]
    )
    return await doveadm.run(user, "sync", args, deadline=asyncio.get_running_loop().time() + 30)


Pair = tuple[Instance, Instance]
both_ways = pytest.mark.parametrize("by_socket", [True, False], ids=["socket", "program"])


@both_ways
async def test_mail_and_state_go_across(pair: Pair, by_socket: bool) -> None:
    a, b = pair
    user, doveadm = ("ann" if by_socket else "bob"), a.doveadm(by_socket=by_socket)
    save(a, user)
    first = classify(await sync(doveadm, user, b.port))
    if first.kind is OutcomeClass.CHANGED:
        # Both sides have just been born.
        first = classify(await sync(doveadm, user, b.port))
    assert (first.kind, first.text) == (OutcomeClass.OK, "")
    assert first.state
    assert b.messages(user) == 1
    save(a, user)
    second = classify(await sync(doveadm, user, b.port, SyncKind.STATEFUL, first.state))
    assert second.kind is OutcomeClass.OK
    assert b.messages(user) == 2
    full = classify(await sync(doveadm, user, b.port, SyncKind.FULL))
    assert full.kind is OutcomeClass.OK
    assert full.state


@both_ways
async def test_an_invalid_state_is_replaced(pair: Pair, by_socket: bool) -> None:
    a, b = pair
    reply = await sync(a.doveadm(by_socket=by_socket), "x y", b.port, SyncKind.STATEFUL, "garbage")
    assert any("Saved sync state is invalid" in line.text for line in reply.log)
    assert classify(reply).state


@both_ways
@pytest.mark.parametrize("user", ["x y", "-x", "--help", "ü"])
async def test_odd_names_are_names(pair: Pair, by_socket: bool, user: str) -> None:
    a, b = pair
    reply = await sync(a.doveadm(by_socket=by_socket), user, b.port)
    assert classify(reply).kind in (OutcomeClass.OK, OutcomeClass.CHANGED), reply
    assert (b.root / "mail" / user).is_dir()


@both_ways
@pytest.mark.parametrize("user", ["nobody-here", "-U", "-A", "a\tb", "a\nb", "\udcff"])
async def test_unknown_names(pair: Pair, by_socket: bool, user: str) -> None:
    a, b = pair
    outcome = classify(await sync(a.doveadm(by_socket=by_socket), user, b.port))
    assert outcome.kind is OutcomeClass.NOUSER_LOCAL
    assert "User doesn't exist" in outcome.text


async def test_a_wildcard_means_itself_over_the_socket_and_nobody_by_the_program(pair: Pair) -> None:
    a, b = pair
    assert classify(await sync(a.doveadm(), "a*", b.port)).kind is OutcomeClass.NOUSER_LOCAL
    assert classify(await sync(a.doveadm(), "we*rd", b.port)).kind in (OutcomeClass.OK, OutcomeClass.CHANGED)
    assert classify(await sync(a.doveadm(by_socket=False), "a*", b.port)).kind is OutcomeClass.OTHER


@both_ways
async def test_a_user_that_the_peer_does_not_know(pair: Pair, by_socket: bool) -> None:
    a, b = pair
    outcome = classify(await sync(a.doveadm(by_socket=by_socket), "only-a", b.port))
    assert outcome.kind is OutcomeClass.NOUSER_REMOTE
    assert "Unknown user in remote" in outcome.text


@both_ways
async def test_a_peer_that_is_down(pair: Pair, by_socket: bool) -> None:
    outcome = classify(await sync(pair[0].doveadm(by_socket=by_socket), "ann", free_port()))
    assert outcome.kind is OutcomeClass.PEER_DOWN
    assert outcome.text


@both_ways
async def test_the_wrong_password(pair: Pair, by_socket: bool) -> None:
    b = pair[1]
    root = Path(tempfile.mkdtemp(prefix="ds-", dir="/tmp"))
    root.chmod(0o755)
    c = Instance(root / "c", "c", ["ann"], password="wrong")
    try:
        c.wait_until_up()
        outcome = classify(await sync(c.doveadm(by_socket=by_socket), "ann", b.port))
    finally:
        c.stop()
        shutil.rmtree(root, ignore_errors=True)
    assert outcome.kind is OutcomeClass.AUTH
    assert "doveadm authentication failed" in outcome.text


@both_ways
async def test_a_user_that_is_being_synced(pair: Pair, by_socket: bool) -> None:
    a, b = pair
    home = a.root / "mail" / "ann"
    home.mkdir(exist_ok=True)
    os.chown(home, NOBODY, NOBODY)
    with open(home / ".dovecot-sync.lock", "w") as lock:
        os.chown(lock.name, NOBODY, NOBODY)
        fcntl.lockf(lock, fcntl.LOCK_EX)
        outcome = classify(await sync(a.doveadm(by_socket=by_socket), "ann", b.port, lock_timeout=1))
    os.unlink(home / ".dovecot-sync.lock")
    assert outcome.kind is OutcomeClass.BUSY
    assert f"lock held by pid {os.getpid()}" in outcome.text


@both_ways
async def test_an_option_that_does_not_exist(pair: Pair, by_socket: bool) -> None:
    doveadm = pair[0].doveadm(by_socket=by_socket)
    reply = await doveadm.run("ann", "sync", ["-Z", "tcp:x"], deadline=asyncio.get_running_loop().time() + 30)
    outcome = classify(reply)
    assert outcome.kind is OutcomeClass.CONFIG
    assert outcome.text


async def test_a_hung_peer_meets_the_deadline(pair: Pair) -> None:
    with socket.socket() as hung:
        hung.bind(("127.0.0.1", 0))
        hung.listen()
        for by_socket in (True, False):
            args = sync_args(
                SyncKind.STATELESS,
                "",
                lock_timeout=5,
                stall_timeout=10,
                destination=[f"tcp:127.0.0.1:{hung.getsockname()[1]}"],
            )
            deadline = asyncio.get_running_loop().time() + 0.5
            reply = await pair[0].doveadm(by_socket=by_socket).run("ann", "sync", args, deadline=deadline)
            assert classify(reply).kind is OutcomeClass.TIMEOUT


async def test_users_as_the_socket_prints_them(pair: Pair) -> None:
    a = pair[0]

    async def user(*masks: str) -> Reply:
        return await a.doveadm().run("", "user", masks, deadline=asyncio.get_running_loop().time() + 30)

    listed = await user("*")
    assert listed.exit_code == 0
    assert sorted(json.loads(listed.output[0])["userList"]) == sorted(USERS)
    found = await user("ann", "nobody-here")
    assert found.exit_code == 67
    fields = json.loads(found.output[0])
    assert fields["ann"]["home"] == f"{a.root}/mail/ann"
    assert set(fields["nobody-here"]) == {"error"}
