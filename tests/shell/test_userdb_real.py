"""Finding users and their index files on a real Dovecot 2.3 without any listener on the network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dovesyncd import logreader, userdb
from dovesyncd.core import layout
from dovesyncd.core.errors import DovecotError
from dovesyncd.doveadm import Doveadm
from dovesyncd.userdb import Account, Accounts

UID = 2000

CONF = """\
base_dir = {dir}/base
state_dir = {dir}/state
log_path = {dir}/log
protocols =
ssl = no
auth_username_format = %Lu
mail_uid = {uid}
mail_gid = {uid}
mail_home = {dir}/mail/%d/%n
mail_location = maildir:~/Maildir
passdb {{
  driver = passwd-file
  args = {dir}/users
}}
userdb {{
  driver = passwd-file
  args = {dir}/users
}}
namespace inbox {{
  inbox = yes
  separator = /
  {namespace}
}}
"""
# User: what the userdb says, and the index root, driver and layout that follow from it.
USERS = {
    "plain": ("", "{mail}/plain/Maildir", "maildir", "maildir++"),
    "fs": ("userdb_mail=maildir:~/Maildir:LAYOUT=fs", "{mail}/fs/Maildir", "maildir", "fs"),
    "dirname": ("userdb_mail=maildir:~/M:LAYOUT=fs:DIRNAME=box", "{mail}/dirname/M", "maildir", "fs"),
    "index": ("userdb_mail=maildir:~/Maildir:INDEX={dir}/i/%d/%n", "{dir}/i/x/index", "maildir", "maildir++"),
    "sdbox": ("userdb_mail=sdbox:~/sdbox", "{mail}/sdbox/sdbox", "sdbox", "fs"),
    "mdbox": ("userdb_mail=mdbox:~/mdbox", "{mail}/mdbox/mdbox", "mdbox", "fs"),
    "mdboxi": ("userdb_mail=mdbox:~/mdbox:INDEX={dir}/i/%u", "{dir}/i/mdboxi@x", "mdbox", "fs"),
    "guid": ("userdb_mail=sdbox:~/sdbox:LAYOUT=index", "{mail}/guid/sdbox", "sdbox", "index"),
    "inbox": ("userdb_mail=maildir:~/Maildir:INBOX=~/in", "{mail}/inbox/Maildir", "maildir", "maildir++"),
    "names": ("userdb_namespace/inbox/location=mdbox:~/n", "{mail}/names/n", "mdbox", "fs"),
}
OTHERS = [
    "memory@x:{PLAIN}p::::::userdb_mail=maildir:~/Maildir:INDEX=MEMORY",
    "out@x:{PLAIN}p::::::userdb_noreplicate=y",
    "out2@x:{PLAIN}p::::::userdb_noreplicate",
    "in@x:{PLAIN}p::::::userdb_noreplicate=no",
    "system@x:{PLAIN}p:400:400::::",
    "aliasofplain@x:{PLAIN}p::::%s/mail/x/plain::",
]


class Dovecot:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "dovecot.conf"
        self.socket = str(directory / "base/doveadm-server")
        directory.chmod(0o755)
        for name in ("base", "state", "mail", "i"):
            (directory / name).mkdir()
        for name in ("mail", "i"):
            os.chown(directory / name, UID, UID)
        lines = [
            f"{name}@x:{{PLAIN}}p::::::{extra.replace('{dir}', str(directory))}"
            for name, (extra, *_) in USERS.items()
        ]
        lines += [line.replace("%s", str(directory)) for line in OTHERS]
        (directory / "users").write_text("\n".join(lines) + "\n")
        self.process: subprocess.Popen[bytes]

    def start(self, namespace: str = "") -> None:
        self.config.write_text(CONF.format(dir=self.directory, uid=UID, namespace=namespace))
        self.process = subprocess.Popen(["dovecot", "-F", "-c", str(self.config)])
        until = time.monotonic() + 10
        while not (self.directory / "base/master.pid").exists() or not Path(self.socket).exists():
            assert self.process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < until, "Dovecot does not start"
            time.sleep(0.01)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(10)

    def run(self, *args: str) -> None:
        subprocess.run(
            ["doveadm", "-c", str(self.config), *args], check=True, input=b"Subject: x\n\nx\n", timeout=20
        )

    async def accounts(self, **options: object) -> Accounts:
        settings = await userdb.settings(config=str(self.config))
        doveadm = Doveadm(settings.doveadm_socket, "/bin/false")
        return await userdb.accounts(doveadm, settings, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    if os.getuid() != 0 or shutil.which("dovecot") is None:
        pytest.skip("needs Dovecot, and root to start it")
    version = subprocess.run(["dovecot", "--version"], capture_output=True, check=True).stdout
    if not version.startswith(b"2.3."):
        pytest.skip("needs Dovecot 2.3")
    path = Path(tempfile.mkdtemp(prefix="dsd-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def dovecot(directory: Path) -> Iterator[Dovecot]:
    dovecot = Dovecot(directory)
    dovecot.start()
    yield dovecot
    dovecot.stop()


def account_of(found: Accounts, name: str) -> Account:
    return found.accounts[userdb.User(f"{name}@x")]


def logs_below(account: Account) -> set[str]:
    """The mailbox logs that are reached by entering the directories that can hold mailboxes."""
    found = set()
    for where, directories, files in os.walk(os.fsencode(account.index_root)):
        here = os.path.relpath(where, os.fsencode(account.index_root))
        prefix = b"" if here == b"." else here + b"/"
        directories[:] = [
            name for name in directories if layout.descend(account.driver, account.layout, prefix + name)
        ]
        found |= {os.fsdecode(where) for name in files if name == logreader.INDEX_LOG}
    return found


async def test_settings(dovecot: Dovecot) -> None:
    settings = await userdb.settings(config=str(dovecot.config))
    assert settings.version.startswith("2.3.")
    assert settings.doveadm_socket == dovecot.socket
    assert (settings.mail_location, settings.first_valid_uid) == ("maildir:~/Maildir", 500)
    assert settings.process_limit > 0


async def test_every_kind_of_user(dovecot: Dovecot) -> None:
    found = await dovecot.accounts()
    where = {"dir": str(dovecot.directory), "mail": f"{dovecot.directory}/mail/x"}
    for name, (_, root, driver, shape) in USERS.items():
        account = account_of(found, name)
        assert (account.index_root, account.driver, account.layout) == (root.format(**where), driver, shape)
        assert (account.uid, account.home) == (UID, f"{where['mail']}/{name}")
    assert account_of(found, "inbox").inbox == f"{where['mail']}/inbox/in"
    assert set(found.accounts) == {f"{name}@x" for name in (*USERS, "in")}
    assert set(found.skipped) == {"out@x", "out2@x"}
    reasons = {"memory@x": "in memory", "system@x": "first_valid_uid", "aliasofplain@x": "'plain@x'"}
    assert len(found.problems) == len(reasons), found.problems
    for name, words in reasons.items():
        assert any(name in problem and words in problem for problem in found.problems), name


async def test_an_alias(dovecot: Dovecot) -> None:
    found = await dovecot.accounts()
    assert found.aliases == {"aliasofplain@x": "plain@x"}
    assert any("aliasofplain@x" in problem for problem in found.problems)


async def test_all_logs_are_below_the_root(dovecot: Dovecot) -> None:
    found = await dovecot.accounts()
    for name in USERS:
        user = f"{name}@x"
        dovecot.run("mailbox", "create", "-s", "-u", user, "One")
        dovecot.run("save", "-u", user)
        dovecot.run("save", "-u", user, "-m", "One")
        account = account_of(found, name)
        expected = 1 if account.inbox else 2
        assert len(logs_below(account)) == expected, name
        assert (Path(account.index_root) / "dovecot.mailbox.log").exists(), name
        if account.inbox:
            assert (Path(account.inbox) / "dovecot.index.log").exists()


async def test_the_socket_and_the_program_say_the_same(dovecot: Dovecot) -> None:
    settings = await userdb.settings(config=str(dovecot.config))
    by_program = await userdb.accounts(Doveadm("", "doveadm", str(dovecot.config)), settings)
    by_socket = await dovecot.accounts()
    assert by_program.accounts == by_socket.accounts
    assert by_program.skipped == by_socket.skipped


async def test_names_that_are_not_canonical_or_not_known(dovecot: Dovecot) -> None:
    found = await dovecot.accounts(names=["PLAIN@X", "plain@x", "nobody@x", "*"])
    assert list(found.accounts) == ["plain@x"]
    assert len(found.problems) == 2


async def test_dovecot_says_why_it_cannot_list(dovecot: Dovecot) -> None:
    settings = await userdb.settings(config=str(dovecot.config))
    with pytest.raises(DovecotError, match="list its users"):
        await userdb.accounts(Doveadm(str(dovecot.directory / "none"), "/bin/false"), settings)


async def test_a_broken_configuration(dovecot: Dovecot, tmp_path: Path) -> None:
    broken = tmp_path / "broken.conf"
    broken.write_text("nonsense = 1\n")
    with pytest.raises(DovecotError, match="nonsense"):
        await userdb.settings(config=str(broken))


TEMPLATE = "/%1n/%2.256Nu/%1.2Hu/%Mu/%Ln/%Un/%Rn/%{username}/%3.16Hu/%1Nu/%Nu/%1.1n"


async def test_the_namespaces_own_location(dovecot: Dovecot) -> None:
    """Also holds the expansion of every variable against Dovecot's: a difference would be a problem."""
    dovecot.stop()
    dovecot.start(f"prefix = INBOX/\n  location = maildir:~{TEMPLATE}")
    found = await dovecot.accounts()
    account = account_of(found, "plain")
    assert account.index_root == account.home + layout.expand(TEMPLATE, user="plain@x", home=account.home)
    assert not [problem for problem in found.problems if "asking Dovecot" in problem]


async def test_a_variable_that_only_dovecot_knows(dovecot: Dovecot) -> None:
    dovecot.stop()
    dovecot.start("location = maildir:~/%s%{gid}")
    found = await dovecot.accounts()
    assert account_of(found, "plain").index_root == f"{account_of(found, 'plain').home}/doveadm{UID}"
    # The namespace's location is not in memory, and the userdb's for the namespace comes first.
    assert set(found.accounts) == {f"{name}@x" for name in (*USERS, "in", "memory")}
    assert account_of(found, "names").driver == "mdbox"
