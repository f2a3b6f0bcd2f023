"""From real recorded log bytes in real directories to a user's changes, step by step."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Optional

import pytest

from dovesyncd import intake as intake_module
from dovesyncd import logreader, watch
from dovesyncd.core.errors import WatchError
from dovesyncd.core.health import stuck
from dovesyncd.core.model import ChangeKind, LogPosition, User
from dovesyncd.intake import Intake
from dovesyncd.store import CursorKey, Store
from dovesyncd.userdb import Account
from tests.core.logdata import VERSIONS, LogCase, cases
from tests.shell.waiting import settled, until

ANN = User("ann@example.com")
LOG = "dovecot.index.log"
MAILBOX_LOG = "dovecot.mailbox.log"
NOTHING: frozenset[ChangeKind] = frozenset()
# What a user's action has to be reported as; rows that are not here change nothing.
ACTIONS = {
    "lmtp-first": {ChangeKind.NEW_MAIL},
    "lmtp": {ChangeKind.NEW_MAIL},
    "append": {ChangeKind.NEW_MAIL},
    "append-flags": {ChangeKind.NEW_MAIL, ChangeKind.KEYWORDS},
    "fetch-body": {ChangeKind.FLAGS},
    "store-flag": {ChangeKind.FLAGS},
    "remove-flag": {ChangeKind.FLAGS},
    "store-keyword": {ChangeKind.KEYWORDS},
    "remove-keyword": {ChangeKind.KEYWORDS},
    "store-deleted": {ChangeKind.FLAGS},
    "expunge": {ChangeKind.EXPUNGE},
}
FLAGS, KEYWORD, MAIL, EXPUNGE = "store-flag", "store-keyword", "lmtp", "expunge"


def maildir(tmp_path: Path, user: User = ANN) -> Account:
    home = tmp_path / "vmail" / user.partition("@")[0]
    return Account(user, str(home), None, str(home / "Maildir"), "maildir", "maildir++")


def recorded(row: str, **more: str) -> LogCase:
    """One step of a user on the INBOX of a Maildir."""
    found = cases(version="2.4.1", storage="maildir", row=row, phase="action", side="a", kind="index", **more)
    return next(case for case in found if case.path == f"Maildir/{LOG}")


class Box:
    """A directory with an index log in it, whose bytes come from one recorded log."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / LOG

    def bring_to(self, case: LogCase, offset: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        size = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as file:
            file.write(case.data[size:offset])

    def create(self) -> Box:
        """The log as it is before the row "lmtp"."""
        case = recorded("lmtp")
        self.bring_to(case, case.start)
        return self

    def user_does(self, row: str) -> None:
        """Appends only the records of the row, wherever the log stands: each is a whole transaction."""
        with open(self.log, "ab") as file:
            file.write(recorded(row).news)

    def dsync_does(self) -> None:
        case = next(
            iter(cases(version="2.4.1", storage="maildir", row="lmtp", phase="sync", side="b", kind="index"))
        )
        with open(self.log, "ab") as file:
            file.write(case.news)

    @property
    def size(self) -> int:
        return self.log.stat().st_size


def mailbox_record(kind: int) -> bytes:
    return bytes([kind, 0, 0, 0]) + os.urandom(16) + b"\x60\0\0\0"


class Scene:
    """An intake at work. ``news`` is what it told since it was asked last."""

    def __init__(self, state: Path) -> None:
        self.state = str(state)
        self.store = Store(self.state)
        self.stored = self.store.load().cursors
        self.told: defaultdict[User, set[ChangeKind]] = defaultdict(set)
        self.arrivals = 0
        self.intake = Intake(self.store, self.stored, self.change, self.arrive)
        self._task: Optional[asyncio.Task[None]] = None

    def change(self, user: User, kinds: frozenset[ChangeKind]) -> None:
        assert kinds
        self.told[user] |= kinds

    def arrive(self) -> None:
        self.arrivals += 1

    def run(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self.intake.run())

    async def follow(self, *accounts: Account, new: Collection[User] = ()) -> None:
        self.intake.follow(accounts, new)
        await self.caught_up()

    async def caught_up(self) -> None:
        if self._task is None:
            self.run()
        assert self._task is not None
        task = self._task
        await until(lambda: task.done() or not self.intake.catching_up, "everyone is scanned", 5)
        if task.done():
            task.result()

    async def news(self, user: User = ANN) -> set[ChangeKind]:
        self.intake.watch.drain()
        await self.caught_up()
        self.intake.watch.drain()
        return self.told.pop(user, set())

    def offsets(self, user: User = ANN) -> dict[bytes, int]:
        directories = self.intake.trees[user].directories
        return {
            path: directory.position.offset
            for path, directory in directories.items()
            if directory.position is not None
        }

    async def close(self) -> dict[CursorKey, LogPosition]:
        """Stops, and returns what is stored."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.intake.watch.close()
        await self.store.close()
        store = Store(self.state)
        stored = store.load().cursors
        await store.close()
        return stored


@asynccontextmanager
async def scene(state: Path) -> AsyncIterator[Scene]:
    found = Scene(state)
    try:
        yield found
    finally:
        await found.close()


# The recorded story -----------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("storage", ["maildir", "fs", "sdbox", "mdbox"])
@pytest.mark.parametrize("side", ["a", "b"])
async def test_the_recorded_story(version: str, storage: str, side: str, state: Path, tmp_path: Path) -> None:
    """Each step of users and of dsync in each layout: users' are told, dsync's are not."""
    steps = cases(version=version, storage=storage, side=side, kind="index")
    home = tmp_path / "home"
    root = home / steps[0].path.split("/")[0]
    driver, layout = ("maildir", "maildir++") if storage == "maildir" else (storage, "fs")
    if storage == "fs":
        driver = "maildir"
    root.mkdir(parents=True)
    told = 0
    async with scene(state) as it:
        await it.follow(Account(ANN, str(home), None, str(root), driver, layout))
        for case in steps:
            box = Box((home / case.path).parent)
            if case.moved_from and case.path.endswith(LOG):
                old = (home / case.moved_from).parent
                if old.exists() and not box.directory.exists():
                    box.directory.parent.mkdir(parents=True, exist_ok=True)
                    old.rename(box.directory)
            if not case.path.endswith(LOG):
                continue
            box.bring_to(case, case.start)
            await it.news()
            box.bring_to(case, case.end)
            news = await it.news()
            if case.phase == "action" and case.acts == side and case.row in ACTIONS:
                # In the shorter stories the mail is marked as deleted in the same row.
                marked = {ChangeKind.FLAGS} if case.row == EXPUNGE and storage != "maildir" else set()
                assert news == ACTIONS[case.row] | marked, case.name
                told += 1
            elif case.phase != "action" or case.acts != side:
                assert news == NOTHING, case.name
        assert side == "b" or told > 4
        tree = it.intake.trees[ANN]
        for path, offset in it.offsets().items():
            if not tree.directories[path].attributes:
                assert offset == (root / os.fsdecode(path) / LOG).stat().st_size


# First sight --------------------------------------------------------------------------------------------


async def test_the_history_of_a_new_user_is_no_news(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    root = Path(account.index_root)
    inbox, work = Box(root).create(), Box(root / ".Work").create()
    inbox.user_does(MAIL)
    (root / MAILBOX_LOG).write_bytes(mailbox_record(1))
    async with scene(state) as it:
        await it.follow(account, new={ANN})
        assert await it.news() == NOTHING
        work.user_does(FLAGS)
        assert await it.news() == {ChangeKind.FLAGS}


async def test_a_known_user_without_positions_is_all_news(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    Box(Path(account.index_root)).create().user_does(MAIL)
    async with scene(state) as it:
        await it.follow(account)
        assert await it.news() >= {ChangeKind.NEW_MAIL, ChangeKind.CREATE}


async def test_what_follows_the_first_sync_of_a_new_user_is_news(state: Path, tmp_path: Path) -> None:
    """The sync may start before the scan has come to the user: what happens after it must not be taken
    for the history that it covered."""
    account = maildir(tmp_path)
    inbox = Box(Path(account.index_root)).create()
    async with scene(state) as it:
        it.intake.follow([account], {ANN})
        assert it.intake.catching_up == 1
        it.intake.catch_up(ANN)
        inbox.user_does(MAIL)
        await it.caught_up()
        assert await it.news() == {ChangeKind.NEW_MAIL}


async def test_catching_up_with_one_user_tells_his_news(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    Box(Path(account.index_root)).create()
    async with scene(state) as it:
        it.intake.follow([account], ())
        it.intake.catch_up(User("stranger"))
        it.intake.catch_up(ANN)
        assert it.told[ANN] >= {ChangeKind.CREATE}
        assert it.intake.catching_up == 0
        it.told.clear()
        it.intake.catch_up(ANN)
        assert not it.told


# Folders ------------------------------------------------------------------------------------------------


async def test_folders_come_are_renamed_and_go(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    root = Path(account.index_root)
    Box(root).create()
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        work = Box(root / ".Work").create()
        assert ChangeKind.CREATE in await it.news()
        work.user_does(MAIL)
        assert await it.news() == {ChangeKind.NEW_MAIL}
        (root / ".Work").rename(root / ".Job")
        assert await it.news() == NOTHING, "the history of a renamed folder is no news"
        job = Box(root / ".Job")
        job.user_does(KEYWORD)
        assert await it.news() == {ChangeKind.KEYWORDS}
        assert it.offsets() == {b"": Box(root).size, b".Job": job.size}
        # Another one takes the old name, and gives it up again.
        again = Box(root / ".Work").create()
        assert ChangeKind.CREATE in await it.news()
        again.user_does(EXPUNGE)
        assert await it.news() == {ChangeKind.EXPUNGE}
        shutil.rmtree(root / ".Work")
        assert await it.news() == NOTHING
        assert set(it.offsets()) == {b"", b".Job"}
        stored = await it.close()
        it.close = nothing  # type: ignore[method-assign]
    assert {cursor.directory: position.offset for cursor, position in stored.items()} == it.offsets()


async def nothing() -> dict[CursorKey, LogPosition]:
    return {}


async def test_two_folders_change_names(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    root = Path(account.index_root)
    one, two = Box(root / ".One").create(), Box(root / ".Two").create()
    two.user_does(MAIL)
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        sizes = (one.size, two.size)
        (root / ".One").rename(root / ".tmp-name")
        (root / ".Two").rename(root / ".One")
        (root / ".tmp-name").rename(root / ".Two")
        assert await it.news() == NOTHING
        assert it.offsets() == {b".One": sizes[1], b".Two": sizes[0]}
        Box(root / ".Two").user_does(FLAGS)
        assert await it.news() == {ChangeKind.FLAGS}


async def test_only_mailboxes_are_watched(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    root = Path(account.index_root)
    for name in ("cur", "new", "tmp", "sieve", ".Work/cur", ".Work/new", ".Work/tmp", ".Work/.Deep"):
        (root / name).mkdir(parents=True)
    (root / ".Link").symlink_to(root / ".Work")
    async with scene(state) as it:
        await it.follow(account)
        assert set(it.intake.trees[ANN].directories) == {b"", b".Work"}
        (root / "new" / "1.mail").touch()
        (root / ".Work" / "cur" / "2.mail").touch()
        assert await it.news() == NOTHING


@pytest.mark.parametrize("name", [b".\xff\xfe", b".a\nb", b".%s{user}", b". ", b"." + b"x" * 250])
async def test_hostile_folder_names(name: bytes, state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    root = Path(account.index_root)
    root.mkdir(parents=True)
    async with scene(state) as it:
        await it.follow(account)
        box = Box(Path(os.fsdecode(os.fsencode(root) + b"/" + name))).create()
        assert ChangeKind.CREATE in await it.news()
        box.user_does(MAIL)
        assert await it.news() == {ChangeKind.NEW_MAIL}
        assert name in it.intake.trees[ANN].directories


async def test_a_bottomless_tree_harms_nobody(state: Path, tmp_path: Path) -> None:
    """Who owns a home can make directories deeper than a stack or a table of descriptors."""
    home = tmp_path / "home"
    root = home / "Mail"
    Box(root / "Work").create()
    (root / "Deep").mkdir()
    fd = os.open(root / "Deep", os.O_RDONLY)
    try:
        for _ in range(1500):
            os.mkdir("d", dir_fd=fd)
            below = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.close(fd)
        async with scene(state) as it:
            await it.follow(Account(ANN, str(home), None, str(root), "maildir", "fs"))
            await it.news()
            Box(root / "Work").user_does(MAIL)
            assert await it.news() == {ChangeKind.NEW_MAIL}
    finally:
        subprocess.run(["rm", "-rf", str(root)], check=True)


async def test_a_folder_that_can_not_be_listed_keeps_its_news(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The position has moved on by then: what it moved over must be told."""
    account = maildir(tmp_path)
    root = Path(account.index_root)
    work = Box(root / ".Work").create()
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        it.intake.watch.drain()
        work.user_does(MAIL)
        scandir = os.scandir

        def failing(fd: int) -> object:
            if os.readlink(f"/proc/self/fd/{fd}").endswith(".Work"):
                raise OSError(5, "Input/output error")
            return scandir(fd)

        monkeypatch.setattr(os, "scandir", failing)
        it.intake.scan_all()
        await it.caught_up()
        monkeypatch.undo()
        assert ChangeKind.NEW_MAIL in await it.news()


async def test_mailbox_log(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    root = Path(account.index_root)
    Box(root).create()
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        log = root / MAILBOX_LOG
        for kind, expected in ((4, ChangeKind.SUBSCRIBE), (3, ChangeKind.RENAME), (1, ChangeKind.DELETE)):
            with open(log, "ab") as file:
                file.write(mailbox_record(kind))
            assert await it.news() == {expected}
        log.rename(root / f"{MAILBOX_LOG}.2")
        assert await it.news() == NOTHING
        log.write_bytes(mailbox_record(5))
        assert await it.news() == {ChangeKind.UNSUBSCRIBE}
        # Elsewhere it is nobody's.
        (root / ".Work").mkdir()
        (root / ".Work" / MAILBOX_LOG).write_bytes(mailbox_record(1))
        assert await it.news() == NOTHING


# Roots --------------------------------------------------------------------------------------------------


async def test_the_root_appears_later(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    Path(account.home).mkdir(parents=True)
    async with scene(state) as it:
        await it.follow(account)
        Box(Path(account.index_root)).create()
        assert ChangeKind.CREATE in await it.news()
        Box(Path(account.index_root)).user_does(MAIL)
        assert await it.news() == {ChangeKind.NEW_MAIL}


async def test_everything_above_the_root_appears_later(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    async with scene(state) as it:
        await it.follow(account)
        for directory in (tmp_path / "vmail", Path(account.home), Path(account.index_root)):
            directory.mkdir()
            await it.news()
        Box(Path(account.index_root)).create()
        assert ChangeKind.CREATE in await it.news()
        shutil.rmtree(tmp_path / "vmail")
        assert await it.news() == NOTHING
        Box(Path(account.index_root)).create().user_does(MAIL)
        assert await it.news() >= {ChangeKind.NEW_MAIL}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
async def test_a_mail_file_system_that_goes_and_comes_back(state: Path, tmp_path: Path) -> None:
    """A mount makes no event, and what is not mounted is not deleted."""
    account = maildir(tmp_path)
    vmail, real = tmp_path / "vmail", tmp_path / "real"
    root = Path(account.index_root)
    below = root.relative_to(vmail)
    vmail.mkdir()
    Box(real / below).create().user_does(MAIL)

    async def mounted(command: str, *paths: Path) -> None:
        process = await asyncio.create_subprocess_exec(command, *map(str, paths))
        assert await process.wait() == 0

    async with scene(state) as it:
        await it.follow(account)
        assert await it.news() == NOTHING
        await mounted("mount", Path("--bind"), real, vmail)
        try:
            await it.follow(account)
            assert ChangeKind.NEW_MAIL in await it.news()
            await mounted("umount", vmail)
            Box(real / below).user_does(FLAGS)
            assert await it.news() == NOTHING
            await mounted("mount", Path("--bind"), real, vmail)
            await it.follow(account)
            assert await it.news() == {ChangeKind.FLAGS}
            Box(real / below).user_does(MAIL)
            assert await it.news() == {ChangeKind.NEW_MAIL}
        finally:
            await mounted("umount", vmail)


async def test_a_user_who_leaves_before_he_was_scanned(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    Box(Path(account.index_root)).create()
    async with scene(state) as it:
        await it.follow(account)
        it.intake.scan_all()
        await it.follow()
        assert it.intake.catching_up == 0
        it.intake.catch_up(ANN)


async def test_the_home_of_a_stranger_is_an_arrival(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    Box(Path(account.index_root)).create()
    async with scene(state) as it:
        await it.follow(account)
        # Somebody may have come before the watches were there.
        assert it.arrivals == 1
        await it.follow(account)
        (tmp_path / "vmail" / "file").touch()
        await it.news()
        assert it.arrivals == 1
        (tmp_path / "vmail" / "bob").mkdir()
        await it.news()
        assert it.arrivals == 2
        (tmp_path / "other-domain").mkdir()
        await it.news()
        assert it.arrivals == 3


async def test_a_domain_that_comes_with_a_known_user_may_hold_others(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    home = Path(account.home)
    async with scene(state) as it:
        await it.follow(account)
        before = it.arrivals
        home.parent.mkdir(exist_ok=True)
        await it.news()
        assert it.arrivals == before + 1
        home.mkdir()
        await it.news()
        assert it.arrivals == before + 1


async def test_a_link_in_place_of_the_root(
    state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    account = maildir(tmp_path)
    root = Path(account.index_root)
    Box(root).create()
    (tmp_path / "elsewhere").mkdir()
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        root.rename(tmp_path / "elsewhere" / "Maildir")
        root.symlink_to(tmp_path / "elsewhere" / "Maildir")
        assert await it.news() == NOTHING
        assert "a link is not followed" in caplog.text
        Box(tmp_path / "elsewhere" / "Maildir").user_does(MAIL)
        assert await it.news() == NOTHING
        assert it.intake.trees[ANN].directories == {}
        root.unlink()
        (tmp_path / "elsewhere" / "Maildir").rename(root)
        assert ChangeKind.NEW_MAIL in await it.news()
        Box(root).user_does(FLAGS)
        assert await it.news() == {ChangeKind.FLAGS}


async def test_another_directory_takes_the_place_of_the_root(state: Path, tmp_path: Path) -> None:
    """A restored backup."""
    account = maildir(tmp_path)
    root = Path(account.index_root)
    Box(root).create()
    restored = Box(tmp_path / "vmail" / "restored").create()
    restored.user_does(MAIL)
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        root.rename(tmp_path / "vmail" / "old")
        restored.directory.rename(root)
        assert ChangeKind.NEW_MAIL in await it.news()
        Box(root).user_does(FLAGS)
        assert await it.news() == {ChangeKind.FLAGS}
        Box(tmp_path / "vmail" / "old").user_does(FLAGS)
        assert await it.news() == NOTHING


async def test_an_inbox_outside_of_the_root(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    spool = tmp_path / "spool" / "ann"
    account = Account(ANN, account.home, None, account.index_root, "maildir", "maildir++", str(spool))
    Box(Path(account.index_root) / ".Work").create()
    inbox = Box(spool).create()
    (spool / ".NotAFolder").mkdir()
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        inbox.user_does(MAIL)
        assert await it.news() == {ChangeKind.NEW_MAIL}
        assert set(it.intake.trees[ANN].directories) == {b"", b".Work", os.fsencode(spool)}


async def test_an_inbox_outside_of_the_root_appears_later(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    spool = tmp_path / "spool" / "ann"
    account = Account(ANN, account.home, None, account.index_root, "maildir", "maildir++", str(spool))
    work = Box(Path(account.index_root) / ".Work").create()
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        work.user_does(MAIL)
        assert await it.news() == {ChangeKind.NEW_MAIL}
        inbox = Box(spool).create()
        assert ChangeKind.CREATE in await it.news()
        inbox.user_does(MAIL)
        assert await it.news() == {ChangeKind.NEW_MAIL}


async def test_a_user_who_leaves_and_comes_back(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    inbox = Box(Path(account.index_root)).create()
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        await it.follow()
        inbox.user_does(MAIL)
        assert await it.news() == NOTHING
        await it.follow(account)
        assert await it.news() == {ChangeKind.NEW_MAIL}, "what happened meanwhile, and no more"


# Attributes ---------------------------------------------------------------------------------------------


def attributes(phase: str) -> LogCase:
    """The row putscript: on a the user's own records, on b dsync's: Pigeonhole's, claimed a moment later."""
    side = "a" if phase == "action" else "b"
    return next(
        case
        for case in cases(
            version="2.4.1", storage="maildir", row="putscript", phase=phase, side=side, kind="index"
        )
        if case.path == f"Maildir/{LOG}"
    )


async def test_attributes_of_a_user(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "_CONFIRMATION", 0.02)
    account = maildir(tmp_path)
    case = attributes("action")
    inbox = Box(Path(account.index_root))
    inbox.bring_to(case, case.start)
    async with scene(state) as it:
        await it.follow(account, new={ANN})
        await until(lambda: not it.store.unwritten, "the first position is stored")
        put: list[object] = []
        monkeypatch.setattr(it.store, "put_cursor", lambda *args: put.append(args))
        inbox.bring_to(case, case.end)
        it.intake.watch.drain()
        assert it.told[ANN] == NOTHING
        assert put == [], "the position waits for what it means"
        await until(lambda: it.told[ANN] == {ChangeKind.ATTRIBUTE}, "told after the time for dsync's claim")
        assert len(put) == 1


async def test_attributes_of_dsync(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "_CONFIRMATION", 0.05)
    account = maildir(tmp_path)
    case = attributes("sync")
    inbox = Box(Path(account.index_root))
    inbox.bring_to(case, case.start)
    async with scene(state) as it:
        await it.follow(account, new={ANN})
        await until(lambda: not it.store.unwritten, "the first position is stored")
        updates = [record for record in case.records if record.type == "attribute-update"]
        assert {record.sync for record in updates} == {False, True}
        put: list[object] = []
        monkeypatch.setattr(it.store, "put_cursor", lambda *args: put.append(args))
        deciding = it.intake._loop.time() + 0.05
        for record in case.records:
            inbox.bring_to(case, record.offset + record.size)
            it.intake.watch.drain()
        assert it.intake.trees[ANN].directories[b""].attributes == ()
        assert put
        await until(lambda: it.intake._loop.time() > deciding + 0.05, "the time is over")
        assert it.told[ANN] == NOTHING


# Restarts -----------------------------------------------------------------------------------------------


async def test_after_a_restart_only_what_changed_is_news(state: Path, tmp_path: Path) -> None:
    users = [User(name) for name in ("quiet", "mail", "dsync", "renamed", "deleted", "created", "subscribed")]
    accounts = [maildir(tmp_path, user) for user in users]
    roots = {account.user: Path(account.index_root) for account in accounts}
    for root in roots.values():
        Box(root).create()
        Box(root / ".Work").create()
        (root / MAILBOX_LOG).write_bytes(mailbox_record(4))
    async with scene(state) as it:
        await it.follow(*accounts, new=users)
    Box(roots[User("mail")] / ".Work").user_does(MAIL)
    Box(roots[User("dsync")]).dsync_does()
    renamed = roots[User("renamed")]
    (renamed / ".Work").rename(renamed / ".Job")
    shutil.rmtree(roots[User("deleted")] / ".Work")
    Box(roots[User("created")] / ".New").create()
    with open(roots[User("subscribed")] / MAILBOX_LOG, "ab") as file:
        file.write(mailbox_record(5))
    async with scene(state) as it:
        assert len(it.stored) == 3 * len(users)
        await it.follow(*accounts)
        news = {user: await it.news(user) for user in users}
        assert ChangeKind.CREATE in news.pop(User("created"))
        assert news == {
            "quiet": NOTHING,
            "mail": {ChangeKind.NEW_MAIL},
            "dsync": NOTHING,
            "renamed": NOTHING,
            "deleted": NOTHING,
            "subscribed": {ChangeKind.UNSUBSCRIBE},
        }
        Box(renamed / ".Job").user_does(FLAGS)
        assert await it.news(User("renamed")) == {ChangeKind.FLAGS}
    async with scene(state) as it:
        await it.follow(*accounts)
        assert not it.told, "once"
        kept = {(key.user, key.directory) for key in it.stored if key.log == logreader.INDEX_LOG}
        assert (User("renamed"), b".Job") in kept
        assert not kept & {(User("renamed"), b".Work"), (User("deleted"), b".Work")}


async def test_renamed_and_changed_while_down(state: Path, tmp_path: Path) -> None:
    account = maildir(tmp_path)
    root = Path(account.index_root)
    Box(root / ".Work").create()
    async with scene(state) as it:
        await it.follow(account)
    (root / ".Work").rename(root / ".Job")
    Box(root / ".Job").user_does(FLAGS)
    Box(root / ".Work").create().user_does(EXPUNGE)
    async with scene(state) as it:
        await it.follow(account)
        # .Work is another log than that of its position: that is a gap, not a silence.
        assert await it.news() >= {ChangeKind.FLAGS, ChangeKind.EXPUNGE}
        sizes = {b".Job": Box(root / ".Job").size, b".Work": Box(root / ".Work").size}
        assert it.offsets() == sizes


# Anomalies ----------------------------------------------------------------------------------------------


async def test_lost_events_end_in_a_scan_of_everyone(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    accounts = [maildir(tmp_path, User(f"user{number}")) for number in range(40)]
    boxes = [Box(Path(account.index_root)).create() for account in accounts]
    async with scene(state) as it:
        await it.follow(*accounts)
        it.intake.watch.drain()
        it.told.clear()
        for box in boxes[::4]:
            box.user_does(MAIL)
        read = os.read
        lost = watch._EVENT.pack(-1, watch.Q_OVERFLOW, 0, 0)

        def lossy(fd: int, size: int) -> bytes:
            return lost if read(fd, size) else b""

        monkeypatch.setattr(os, "read", lossy)
        it.intake.watch.drain()
        monkeypatch.undo()
        assert not it.told
        assert it.intake.catching_up == len(accounts)
        assert "lost events" in caplog.text
        await it.caught_up()
        assert it.told == {account.user: {ChangeKind.NEW_MAIL} for account in accounts[::4]}


async def test_without_watches_scans_still_find_changes(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    account = maildir(tmp_path)
    inbox = Box(Path(account.index_root)).create()

    def full(*_: object) -> int:
        raise WatchError("the kernel's limit of inotify watches is reached", "fs.inotify.max_user_watches")

    async with scene(state) as it:
        monkeypatch.setattr(it.intake.watch, "arm", full)
        await it.follow(account)
        it.told.clear()
        inbox.user_does(MAIL)
        for expected in ({ChangeKind.NEW_MAIL}, NOTHING):
            it.intake.scan_all()
            assert await it.news() == expected
        await until(lambda: "limit of inotify watches" in caplog.text, "the message")
        assert caplog.text.count("limit of inotify watches") == 1


async def test_a_damaged_log_is_told_once(
    state: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    account = maildir(tmp_path)
    inbox = Box(Path(account.index_root)).create()
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        with open(inbox.log, "ab") as file:
            file.write(b"\x80\x80\x80\x83" + b"\xff" * 32)
        assert await it.news() == {ChangeKind.LOG_GAP}
        assert "INBOX: record of type" in caplog.text
        it.intake.scan_all()
        assert await it.news() == NOTHING


async def test_work_is_not_stuck_by_an_old_scan(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user whose root comes hours after the last scan is work that begins now."""
    account = maildir(tmp_path)
    async with scene(state) as it:
        await it.follow(account)
        it.intake._scanned_at -= 3600
        watch_arrivals = it.intake._watch_arrivals

        def late(path: str, home: str) -> object:
            ancestor = watch_arrivals(path, home)
            Path(account.index_root).mkdir(parents=True, exist_ok=True)
            return ancestor

        monkeypatch.setattr(it.intake, "_watch_arrivals", late)
        (tmp_path / "vmail").mkdir()
        it.intake.watch.drain()
        assert it.intake.catching_up == 1
        assert stuck([it.intake.work], time.monotonic()) == []
        monkeypatch.undo()
        await it.caught_up()
        assert it.intake.work.since is None


# Races --------------------------------------------------------------------------------------------------


class Churn(threading.Thread):
    """Creates, fills, renames and removes folders as fast as it can; ``expected`` are the paths left."""

    def __init__(self, root: Path, seed: int, rounds: int, nested: bool) -> None:
        super().__init__()
        self.root, self.rounds, self.nested = root, rounds, nested
        self.dice = random.Random(seed)
        self.left: dict[str, Path] = {}
        self.error: Optional[BaseException] = None

    def run(self) -> None:
        try:
            for number in range(self.rounds):
                self.step(number)
        except (OSError, LookupError) as error:
            self.error = error

    def step(self, number: int) -> None:
        what = self.dice.random()
        if what < 0.5 or not self.left:
            name = f".F{number}"
            path = self.root / name
            if self.nested and self.left and self.dice.random() < 0.4:
                path = self.left[self.dice.choice(sorted(self.left))] / name
            box = Box(path).create()
            self.left[name] = path
            for _ in range(self.dice.randrange(3)):
                box.user_does(self.dice.choice((MAIL, FLAGS)))
        elif what < 0.8:
            name = self.dice.choice(sorted(self.left))
            Box(self.left[name]).user_does(MAIL)
        else:
            name = self.dice.choice(sorted(self.left))
            old = self.left[name]
            if any(path != old and old in path.parents for path in self.left.values()):
                return
            del self.left[name]
            if what < 0.9:
                new = old.with_name(f".R{number}")
                old.rename(new)
                self.left[new.name] = new
                Box(new).user_does(KEYWORD)
            else:
                shutil.rmtree(old)


@pytest.mark.parametrize("nested", [False, True], ids=["maildir++", "fs"])
async def test_no_change_is_missed_in_a_churn_of_folders(state: Path, tmp_path: Path, nested: bool) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    root = tmp_path / "home" / "Maildir"
    Box(root).create()
    layout = "fs" if nested else "maildir++"
    async with scene(state) as it:
        await it.follow(Account(ANN, str(tmp_path / "home"), None, str(root), "maildir", layout))
        await it.news()
        churn = Churn(root, seed, 400, nested)
        churn.start()
        try:
            await until(lambda: not churn.is_alive(), "the churn ends", 30)
        finally:
            churn.join()
        assert churn.error is None
        await it.news()
        expected = {os.fsencode(path.relative_to(root)): Box(path).size for path in churn.left.values()}
        assert it.offsets() == {b"": Box(root).size, **expected}
        # And each of them is watched.
        for path in churn.left.values():
            Box(path).user_does(EXPUNGE)
            assert await it.news() == {ChangeKind.EXPUNGE}, path
        stored = await it.close()
        it.close = nothing  # type: ignore[method-assign]
    assert {key.directory: position.offset for key, position in stored.items()} == it.offsets()


async def test_directory_log_and_mail_at_once(state: Path, tmp_path: Path) -> None:
    """The watch of a new folder comes too late for its first events, and the look at it must not."""
    account = maildir(tmp_path)
    root = Path(account.index_root)
    Box(root).create()
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        for number in range(60):

            def create(number: int = number) -> None:
                box = Box(root / f".N{number}").create()
                box.user_does(MAIL)
                box.user_does(FLAGS)

            await asyncio.get_running_loop().run_in_executor(None, create)
            news = await it.news()
            assert news >= {ChangeKind.CREATE, ChangeKind.NEW_MAIL, ChangeKind.FLAGS}, number
        await settled(lambda: not it.told, "nothing is told twice")
