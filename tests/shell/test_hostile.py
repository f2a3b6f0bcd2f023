"""What the owner of a home can do in it, while the daemon, which is root, looks: nothing hangs, follows a
link, opens what is no log, or keeps other users from being seen."""

from __future__ import annotations

import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Optional

import pytest

from dovesyncd import intake as intake_module
from dovesyncd import logreader
from dovesyncd.core.health import stuck
from dovesyncd.core.model import ChangeKind, User
from dovesyncd.store import CursorKey
from dovesyncd.userdb import Account
from tests.shell.test_intake import (
    ANN,
    EXPUNGE,
    FLAGS,
    LOG,
    MAIL,
    MAILBOX_LOG,
    NOTHING,
    Box,
    Scene,
    mailbox_record,
    maildir,
    scene,
)
from tests.shell.waiting import until

BOB = User("bob@example.com")
BAD_RECORD = b"\x80\x80\x80\x83" + b"\xff" * 32


class Opened:
    """Everything that was opened below a directory, by `os.open`, other than as a mere handle (O_PATH)."""

    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.top = str(top)
        self.modes: set[int] = set()
        self.paths: set[str] = set()
        self.count = 0
        self._open = os.open
        monkeypatch.setattr(os, "open", self)

    def __call__(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        fd = self._open(path, flags, *args, **kwargs)
        target = os.readlink(f"/proc/self/fd/{fd}")
        if target.startswith(self.top) and not flags & os.O_PATH:
            self.count += 1
            self.paths.add(target)
            self.modes.add(stat.S_IFMT(os.fstat(fd).st_mode))
        return fd


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
    """Nothing but directories and regular files is opened."""
    found = Opened(tmp_path, monkeypatch)
    yield found
    assert found.modes <= {stat.S_IFDIR, stat.S_IFREG}


class Neighbours:
    """Two users of one machine: ann makes trouble, bob gets mail."""

    def __init__(self, tmp_path: Path, shape: str = "maildir++") -> None:
        self.accounts = [
            Account(
                user,
                str(tmp_path / "vmail" / name),
                None,
                str(tmp_path / "vmail" / name / "M"),
                "maildir",
                shape,
            )
            for user, name in ((ANN, "ann"), (BOB, "bob"))
        ]
        self.ann, self.bob = (Path(account.index_root) for account in self.accounts)
        Box(self.ann).create()
        Box(self.bob).create()

    async def bob_is_seen(self, it: Scene) -> None:
        await it.news(BOB)
        Box(self.bob).user_does(MAIL)
        assert await it.news(BOB) == {ChangeKind.NEW_MAIL}


@pytest.fixture
def two(tmp_path: Path) -> Neighbours:
    return Neighbours(tmp_path)


# Names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *(
            b"a\tb",
            b"a\nERROR: forged",
            b"a\rb",
            b"\x01t",
            b"%s%n%u%{user}",
            b"'\"`$(id);|&",
            b"--help",
            b"-rf",
        ),
        *(b"\xff\xfe\x80", b"\xed\xa0\x80", b"\x1b[2J\x7f", b" ", b"~", b"*", b"\\", "\u202e\u2028".encode()),
        b"x" * 255,
    ],
)
async def test_folders_of_any_name(
    name: bytes, state: Path, tmp_path: Path, opened: Opened, caplog: pytest.LogCaptureFixture
) -> None:
    """In a home of the same name; seen, stored byte for byte, and known again after a restart."""
    home = tmp_path / "vmail" / os.fsdecode(name)
    root = home / "Mail"
    account = Account(ANN, str(home), None, str(root), "maildir", "fs")
    path = name + b"/" + name
    box = Box(root / os.fsdecode(path)).create()
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        box.user_does(MAIL)
        assert await it.news() == {ChangeKind.NEW_MAIL}
        stored = await it.close()
        it.close = _closed  # type: ignore[method-assign]
    assert {key: position.offset for key, position in stored.items()} == {
        CursorKey(ANN, path, logreader.INDEX_LOG): box.size
    }
    async with scene(state) as it:
        await it.follow(account)
        assert await it.news() == NOTHING
        box.user_does(FLAGS)
        assert await it.news() == {ChangeKind.FLAGS}
        with open(box.log, "ab") as file:
            file.write(BAD_RECORD)
        assert await it.news() == {ChangeKind.LOG_GAP}
        assert len(caplog.records) == 1


async def _closed() -> dict[Any, Any]:
    return {}


# What is no log -----------------------------------------------------------------------------------------


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    os.mknod(path, 0o600 | stat.S_IFSOCK)


def device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("making a device takes root")


def directory(path: Path) -> None:
    path.mkdir()
    (path / "file").touch()


def link_to_a_log(path: Path) -> None:
    Box(path.parents[3] / "elsewhere").create().user_does(EXPUNGE)
    path.symlink_to(path.parents[3] / "elsewhere" / LOG)


def link_to_zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


PLANTED = [fifo, unix_socket, device, directory, link_to_a_log, link_to_zero, link_to_itself]


@pytest.mark.parametrize("plant", PLANTED)
@pytest.mark.parametrize("name", [LOG, f"{LOG}.2", MAILBOX_LOG, f"{MAILBOX_LOG}.2", ".dovecot-box-sync.lock"])
async def test_what_is_planted_in_place_of_a_file(
    plant: Callable[[Path], None], name: str, state: Path, two: Neighbours, opened: Opened
) -> None:
    """Before the daemon comes, and while it is there: no news, no hang, and afterwards all is as before."""
    (two.ann / name).unlink(missing_ok=True)
    plant(two.ann / name)
    async with scene(state) as it:
        await it.follow(*two.accounts, new={ANN, BOB})
        assert await it.news() == NOTHING
        await two.bob_is_seen(it)
        _remove(two.ann / name)
        plant(two.ann / name)
        it.intake.scan_all()
        assert await it.news() == NOTHING
        await two.bob_is_seen(it)
        _remove(two.ann / name)
        await it.news()
        Box(two.ann).create().user_does(MAIL)
        assert ChangeKind.NEW_MAIL in await it.news()
        with open(two.ann / MAILBOX_LOG, "ab") as file:
            file.write(mailbox_record(4))
        assert await it.news() == {ChangeKind.SUBSCRIBE}
    assert not any("elsewhere" in path for path in opened.paths)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


async def test_a_log_is_replaced_by_a_fifo(state: Path, two: Neighbours, opened: Opened) -> None:
    """Its position stays; the log's return is noticed, with what it holds by then."""
    async with scene(state) as it:
        await it.follow(*two.accounts)
        await it.news()
        kept = two.ann / "kept"
        (two.ann / LOG).rename(kept)
        os.mkfifo(two.ann / LOG)
        assert await it.news() == NOTHING
        (two.ann / LOG).unlink()
        kept.rename(two.ann / LOG)
        Box(two.ann).user_does(FLAGS)
        assert await it.news() == {ChangeKind.FLAGS}
        await two.bob_is_seen(it)


# Links --------------------------------------------------------------------------------------------------


def canary(tmp_path: Path) -> Box:
    """A log outside of all mail roots. Nobody but who reads it has an EXPUNGE to tell."""
    box = Box(tmp_path / "canary").create()
    box.user_does(EXPUNGE)
    Box(tmp_path / "canary" / ".Below").create().user_does(EXPUNGE)
    return box


async def test_links_in_place_of_folders(
    state: Path, tmp_path: Path, two: Neighbours, opened: Opened
) -> None:
    box = canary(tmp_path)
    for name, target in (
        (".Abs", box.directory),
        (".Rel", Path("../../../canary")),
        (".Bob", two.bob),
        (".Loop", two.ann),
    ):
        (two.ann / name).symlink_to(target)
    async with scene(state) as it:
        await it.follow(*two.accounts)
        assert ChangeKind.EXPUNGE not in await it.news()
        assert set(it.intake.trees[ANN].directories) == {b""}
        box.user_does(EXPUNGE)
        it.intake.scan_all()
        assert await it.news() == NOTHING
        await two.bob_is_seen(it)
        assert await it.news() == NOTHING
    assert not any(path.startswith(str(box.directory)) for path in opened.paths)


def test_links_between_a_home_and_its_root(tmp_path: Path) -> None:
    """The root is the administrator's word; what lies between it and the home is the user's to replace."""
    home, bobs = tmp_path / "link-to-homes" / "ann", tmp_path / "homes" / "bob" / "mail" / "indexes"
    (tmp_path / "homes" / "ann" / "mail" / "indexes" / ".Work").mkdir(parents=True)
    (tmp_path / "link-to-homes").symlink_to("homes")
    bobs.mkdir(parents=True)
    root = str(home / "mail" / "indexes")
    for relative in (b"", b".Work", os.fsencode(root)):
        with logreader.open_directory(root, relative, str(home)) as fd:
            assert os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path / "homes" / "ann" / "mail"))
    (home / "mail").rename(home / "was-mail")
    (home / "mail").symlink_to(bobs.parent)
    for relative in (b"", os.fsencode(root)):
        with pytest.raises(OSError), logreader.open_directory(root, relative, str(home)):
            pytest.fail("opened")
    # Another's place, or a part of the name only, is not below the home.
    for elsewhere in (str(tmp_path / "homes" / "bob"), str(home)[:-1]):
        with logreader.open_directory(str(bobs), b"", elsewhere):
            pass


async def test_a_link_between_the_home_and_the_root(state: Path, tmp_path: Path, opened: Opened) -> None:
    home = tmp_path / "vmail" / "ann"
    account = Account(ANN, str(home), None, str(home / "mail" / "indexes"), "maildir", "maildir++")
    Box(home / "mail" / "indexes").create()
    box = canary(tmp_path)
    (tmp_path / "canary" / "indexes").mkdir()
    shutil.copy(box.log, tmp_path / "canary" / "indexes" / LOG)
    async with scene(state) as it:
        await it.follow(account)
        await it.news()
        (home / "mail").rename(home / "was-mail")
        (home / "mail").symlink_to(tmp_path / "canary")
        it.intake.scan_all()
        assert await it.news() == NOTHING
        (home / "mail").unlink()
        (home / "was-mail").rename(home / "mail")
        Box(home / "mail" / "indexes").user_does(MAIL)
        it.intake.scan_all()
        assert await it.news() == {ChangeKind.NEW_MAIL}
    assert not any(path.startswith(str(tmp_path / "canary")) for path in opened.paths)


async def test_a_hard_link_to_the_log_of_another(state: Path, two: Neighbours, opened: Opened) -> None:
    """Backups make them too, so they are read. All that gets across is that something has happened: each user
    has positions of his own, the watch of one is not told what the other writes, and nothing is written."""
    (two.ann / ".Spy").mkdir()
    os.link(two.bob / LOG, two.ann / ".Spy" / LOG)
    async with scene(state) as it:
        await it.follow(*two.accounts)
        await it.news()
        await two.bob_is_seen(it)
        assert await it.news() == NOTHING
        before = it.offsets(BOB)
        it.intake.scan_all()
        assert await it.news() == {ChangeKind.NEW_MAIL}
        assert it.offsets(BOB) == before
        (two.ann / ".Spy" / LOG).unlink()
        await two.bob_is_seen(it)
        assert await it.news() == NOTHING


# Too much -----------------------------------------------------------------------------------------------


async def test_who_has_much_to_look_at_gets_a_rest(
    state: Path, two: Neighbours, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user who makes directory after directory in a large tree has it looked at now and then only."""
    monkeypatch.setattr(intake_module, "_LONG_SCAN", 0)
    monkeypatch.setattr(intake_module, "_REST", 10**9)
    monkeypatch.setattr(intake_module, "_LONGEST_REST", 1000)
    async with scene(state) as it:
        await it.follow(*two.accounts)
        it.told.clear()
        for number in range(100):
            os.mkdir(two.ann / f".{number}")
            it.intake.watch.drain()
        assert it.intake.catching_up == 1
        assert len(it.intake.trees[ANN].directories) < 50
        assert stuck([it.intake.work], time.monotonic() + 30) == []
        Box(two.bob).user_does(MAIL)
        it.intake.watch.drain()
        assert it.told.pop(BOB) == {ChangeKind.NEW_MAIL}
        # Before a sync of his own he is looked at in any case.
        it.intake.catch_up(ANN)
        assert it.intake.catching_up == 0
        assert len(it.intake.trees[ANN].directories) > 100


async def test_ten_thousand_empty_directories(
    state: Path, tmp_path: Path, two: Neighbours, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cost a watch each, and a look each at a scan of their owner; no row, and others nothing."""
    monkeypatch.setattr(intake_module, "_REST", 0)
    many = 10_000
    watch_limit = int(Path("/proc/sys/fs/inotify/max_user_watches").read_text())
    assert watch_limit > 2 * many, "too few watches for this test"
    for number in range(many):
        os.mkdir(two.ann / f".{number}")
    async with scene(state) as it:
        await it.follow(*two.accounts, new={ANN, BOB})
        assert len(it.intake.trees[ANN].directories) == many + 1
        before = opened.count
        await two.bob_is_seen(it)
        assert opened.count - before < 5, "bob's mail has nothing to do with ann's folders"
        before = opened.count
        it.intake.scan_all()
        assert await it.news() == NOTHING
        assert opened.count - before < many + 10, "a scan opens each of them once"
        watches = len(it.intake._directories)
        assert watches == many + 2
        shutil.rmtree(two.ann)
        assert await it.news() == NOTHING
        assert len(it.intake._directories) == 1
        await two.bob_is_seen(it)
        stored = await it.close()
        it.close = _closed  # type: ignore[method-assign]
    assert len(stored) == 2, "a row for each log, and there are none in the empty ones"


# Races --------------------------------------------------------------------------------------------------


class Swap(threading.Thread):
    """Puts links to the canary in the place of a folder, of a folder's parent, and of a log, and takes them
    away, until it is told to stop."""

    def __init__(self, root: Path, target: Path) -> None:
        super().__init__()
        self.root, self.target = root, target
        self.rounds = 0
        self.stop = threading.Event()
        self.error: Optional[OSError] = None

    def run(self) -> None:
        victims = (
            (self.root / "Work", self.target),
            (self.root / "Work" / "Below", self.target),
            (self.root / "Work" / LOG, self.target / LOG),
            (self.root / LOG, self.target / LOG),
        )
        try:
            while not self.stop.is_set():
                for victim, target in victims:
                    aside = victim.with_name(".swapped")
                    victim.rename(aside)
                    victim.symlink_to(target)
                    victim.unlink()
                    aside.rename(victim)
                self.rounds += 1
        except OSError as error:
            self.error = error


async def test_directories_and_links_change_places_all_the_time(
    state: Path, tmp_path: Path, opened: Opened
) -> None:
    two = Neighbours(tmp_path, "fs")
    work = Box(two.ann / "Work").create()
    Box(two.ann / "Work" / "Below").create()
    box = canary(tmp_path)
    shutil.copytree(box.directory, box.directory / "Below")
    shutil.copytree(box.directory, box.directory / "Work")
    seen: set[ChangeKind] = set()
    scans = 0
    async with scene(state) as it:
        await it.follow(*two.accounts)
        await it.news()
        swap = Swap(two.ann, box.directory)
        swap.start()

        def look() -> bool:
            nonlocal scans, seen
            box.user_does(EXPUNGE)
            it.intake._scan_later(ANN)
            it.intake.catch_up(ANN)
            seen |= it.told.pop(ANN, set())
            scans += 1
            return (swap.rounds > 200 and scans > 200) or not swap.is_alive()

        try:
            await until(look, "some hundred rounds", 60)
            await two.bob_is_seen(it)
        finally:
            swap.stop.set()
            swap.join()
        assert swap.error is None
        seen |= await it.news()
        assert ChangeKind.EXPUNGE not in seen
        assert not any(path.startswith(str(box.directory)) for path in opened.paths)
        # And all is as it was.
        work.user_does(MAIL)
        it.intake.scan_all()
        assert ChangeKind.NEW_MAIL in await it.news()
        assert set(it.intake.trees[ANN].directories) == {b"", b"Work", b"Work/Below"}


async def test_the_canary_is_found_where_it_may_be(state: Path, tmp_path: Path, opened: Opened) -> None:
    """What the tests above look for does show up if it is read."""
    box = canary(tmp_path)
    home = str(box.directory)
    async with scene(state) as it:
        await it.follow(Account(ANN, home, None, home, "maildir", "maildir++"))
        assert ChangeKind.EXPUNGE in await it.news()
    assert any(path.startswith(home) for path in opened.paths)
    assert maildir(tmp_path).index_root != home


# Logs that can't be read --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["a bad record", "a newer major version", "marked by Dovecot"])
async def test_each_change_of_an_unreadable_log_is_told_and_one_warning(
    how: str, state: Path, two: Neighbours, caplog: pytest.LogCaptureFixture
) -> None:
    log = two.ann / LOG

    def more() -> None:
        with open(log, "ab") as file:
            file.write(BAD_RECORD)

    async with scene(state) as it:
        await it.follow(*two.accounts)
        await it.news()
        if how != "a bad record":
            with open(log, "r+b") as file:
                file.seek(0 if how == "a newer major version" else 4)
                file.write(b"\2" if how == "a newer major version" else bytes(4))
        for _ in range(5):
            more()
            assert await it.news() == {ChangeKind.LOG_GAP}
            it.intake.scan_all()
            assert await it.news() == NOTHING
        await two.bob_is_seen(it)
    async with scene(state) as it:
        await it.follow(*two.accounts)
        assert await it.news() == NOTHING, "nothing happened while it was away"
        more()
        assert await it.news() == {ChangeKind.LOG_GAP}
        assert len(caplog.records) == 1
        log.unlink()
        Box(two.ann).create()
        assert ChangeKind.LOG_GAP in await it.news()
        Box(two.ann).user_does(FLAGS)
        assert await it.news() == {ChangeKind.FLAGS}
    assert len(caplog.records) == 1
