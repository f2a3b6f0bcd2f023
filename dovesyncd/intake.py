"""From a touched file to a user's change: keeps the watches, reads the logs, moves the positions.

A watch is armed before what lies under it is looked at, so nothing falls between. inotify is only a hint:
whatever is unclear ends in a scan of the user, which compares every log with its position.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Optional

from dovesyncd import logreader, watch
from dovesyncd.core import classify, layout
from dovesyncd.core.errors import WatchError
from dovesyncd.core.health import Work
from dovesyncd.core.model import CONTESTABLE, ChangeKind, LogPosition, User
from dovesyncd.store import CursorKey, Store
from dovesyncd.unwatched import Unwatched
from dovesyncd.userdb import Account
from dovesyncd.waiting import wait_for_event
from dovesyncd.watch import Event, Watch

log = logging.getLogger(__name__)

_CAME = watch.CREATE | watch.MOVED_TO
# Created and removed around dsync's work on a mailbox, on both nodes: DSYNC_MAILBOX_LOCK_FILENAME,
# dsync-brain-mailbox.c.
_SYNC_LOCK = b".dovecot-box-sync.lock"
_MAILBOX_LOGS = frozenset({logreader.MAILBOX_LOG, logreader.MAILBOX_LOG_2})
# Seconds in which dsync claims the attribute updates that it caused.
_CONFIRMATION = 0.25
# Seconds of scanning before the event loop gets its turn.
_SCAN_SLICE = 0.02
# A user whose scan took longer has a rest then, so many times as long and at most so many seconds.
_LONG_SCAN, _REST, _LONGEST_REST = 0.1, 10, 10.0
# An entry that was listed and can't be opened is gone, or is no directory any more.
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
# Directories below one another that are looked into. Who owns a home can make more than a stack holds.
_DEEPEST = 100


class Directory:
    """A watched directory of a user. ``path`` is relative to the index root, b"" for the root itself, or
    absolute for an INBOX that lies elsewhere; ``position`` belongs to
    the index log in it, None while there is none. Its watch follows the inode, so a rename keeps it."""

    __slots__ = ("attributes", "path", "position", "syncing", "tree", "wd")

    def __init__(self, tree: Tree, path: bytes, wd: int) -> None:
        self.tree = tree
        self.path = path
        self.wd = wd
        self.position: Optional[LogPosition] = None
        # Attribute updates that dsync may yet claim; meanwhile the position is not stored.
        self.attributes: tuple[bytes, ...] = ()
        # Whether a dsync, whichever node began it, is at work on the mailbox.
        self.syncing = False


class Tree:
    """One user's directories by path, and the positions in his mailbox log by file name.

    ``remembered`` holds the positions of the last run until the first scan has used them, and those of
    directories that can't be looked at, on a file system that is not mounted, say. What the logs
    of a ``new`` user hold at the first scan is no news.
    """

    def __init__(
        self, account: Account, remembered: dict[tuple[bytes, bytes], LogPosition], new: bool
    ) -> None:
        self.account = account
        self.remembered = remembered
        self.new = new
        # Whether dsyncs may have gone unseen since the last scan.
        self.blind = bool(remembered)
        # Whether the last scan could not look at everything.
        self.incomplete = False
        # When the next scan may be, on a steady clock.
        self.rest_until = 0.0
        self.directories: dict[bytes, Directory] = {}
        self.mailbox_log: dict[bytes, LogPosition] = {}

    def needs(self, path: str) -> bool:
        """Whether ``path`` is a directory of the user's logs or above one."""
        return any(f"{end}/".startswith(f"{path}/") for end in (self.account.index_root, self.account.inbox))


class Ancestor:
    """A watched directory above index roots: some of them may appear in it one day."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.users: set[User] = set()


class Intake:
    """``on_change(user, kinds)`` is called in the same callback that puts the positions into the store.
    ``on_contest(user)`` comes before it if the change was made while dsync was at work on the same mailbox.
    ``on_arrival()`` is called when a directory appeared in which unknown users may live, ``progress()`` when
    all scans are done."""

    def __init__(
        self,
        store: Store,
        cursors: Mapping[CursorKey, LogPosition],
        on_change: Callable[[User, frozenset[ChangeKind]], None],
        on_arrival: Callable[[], None],
        on_contest: Callable[[User], None] = lambda user: None,
        compare_interval: float = 30.0,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._store = store
        self._on_change = on_change
        self._on_arrival = on_arrival
        self._on_contest = on_contest
        self._remembered: defaultdict[User, dict[tuple[bytes, bytes], LogPosition]] = defaultdict(dict)
        for key, position in cursors.items():
            self._remembered[key.user][key.directory, key.log] = position
        self.trees: dict[User, Tree] = {}
        self._directories: dict[int, Directory] = {}
        self._ancestors: dict[int, Ancestor] = {}
        self.compare_interval = compare_interval
        self._progress = progress
        self.unwatched = Unwatched()
        # By st_dev: the type of a file system of other hosts, None for one of this host's own.
        self._filesystems: dict[int, Optional[str]] = {}
        self._unscanned: set[User] = set()
        self._scan_wanted = asyncio.Event()
        self._scanned_at = time.monotonic()
        self.watch = Watch(self._on_events)

    # Users ---------------------------------------------------------------------------------------

    def follow(self, accounts: Iterable[Account], new: Collection[User]) -> None:
        """Makes these the users to watch; ``new`` are those whose first pass is due anyway. The scans are
        done by ``run``."""
        self._scanned_at = time.monotonic()
        wanted = {account.user: account for account in accounts}
        for user in [user for user, tree in self.trees.items() if wanted.get(user) != tree.account]:
            self._unscanned.discard(user)
            self._leave(self.trees.pop(user))
        self._unscanned.update(user for user, tree in self.trees.items() if tree.incomplete)
        for user, account in wanted.items():
            if user not in self.trees:
                self.trees[user] = Tree(account, self._remembered.pop(user, {}), user in new)
                self._unscanned.add(user)
        armed = len(self._ancestors)
        for homes in {os.path.dirname(account.home) for account in wanted.values()}:
            self._watch_arrivals(homes, homes)
            # /var/vmail/DOMAIN/USER: a new domain is a new directory one level up.
            if os.path.dirname(homes).count("/") > 1:
                self._watch_arrivals(os.path.dirname(homes), homes)
        if len(self._ancestors) > armed:
            # Who came between Dovecot's list and these watches was seen by neither.
            self._on_arrival()
        self._scan_wanted.set()

    def _leave(self, tree: Tree) -> None:
        """Ends the watches of a user; his positions are kept for the day he is back."""
        kept = self._remembered[tree.account.user]
        kept.update(tree.remembered)
        self.unwatched.forget(tree.account.user)
        for directory in list(tree.directories.values()):
            if directory.position is not None:
                kept[directory.path, logreader.INDEX_LOG] = directory.position
            self._drop(directory, forget=False)
        for name, position in tree.mailbox_log.items():
            kept[b"", name] = position

    def _watch_arrivals(self, path: str, home: str) -> Optional[Ancestor]:
        try:
            with logreader.open_parent(path, home) as fd:
                wd = self.watch.arm(fd, watch.ARRIVALS)
        except (OSError, WatchError) as error:
            log.debug("%s: %s", path, error)
            return None
        return self._ancestors.setdefault(wd, Ancestor(path))

    # Events --------------------------------------------------------------------------------------

    def _on_events(self, events: list[Event]) -> None:
        touched: dict[int, Directory] = {}
        mailbox_logs: set[User] = set()
        dirty: set[User] = set()
        locked: set[int] = set()
        for event in events:
            if event.mask & watch.Q_OVERFLOW:
                log.warning("inotify lost events (fs.inotify.max_queued_events): comparing all users")
                self.scan_all()
            if event.wd in self._ancestors:
                self._on_ancestor(event, dirty)
            directory = self._directories.get(event.wd)
            if directory is None:
                continue
            user = directory.tree.account.user
            if event.mask & watch.IGNORED:
                del self._directories[event.wd]
                dirty.add(user)
            elif event.mask & (watch.MOVE_SELF | watch.DELETE_SELF):
                dirty.add(user)
            elif event.mask & watch.ISDIR:
                if self._holds_mailboxes(directory, event.name):
                    dirty.add(user)
            elif event.name == logreader.INDEX_LOG:
                touched[event.wd] = directory
            elif event.name == _SYNC_LOCK:
                directory.syncing = bool(event.mask & _CAME)
                locked.add(event.wd)
            elif event.name in _MAILBOX_LOGS and not directory.path:
                mailbox_logs.add(user)
        news: defaultdict[User, set[ChangeKind]] = defaultdict(set)
        for user in dirty:
            if user in self.trees and user not in self._unscanned:
                if self.trees[user].rest_until > time.monotonic():
                    self.trees[user].blind = True
                    self._scan_later(user)
                    continue
                kinds = self._scan(self.trees[user])
                directories = self.trees[user].directories.values()
                if kinds & CONTESTABLE and any(one.syncing or one.wd in locked for one in directories):
                    self._on_contest(user)
                news[user] |= kinds
        for directory in touched.values():
            user = directory.tree.account.user
            if user not in dirty and user not in self._unscanned:
                kinds = self._read_touched(directory)
                if kinds & CONTESTABLE and (directory.syncing or directory.wd in locked):
                    self._on_contest(user)
                news[user] |= kinds
        for user in mailbox_logs - dirty - self._unscanned:
            news[user] |= self._read_mailbox_log(self.trees[user])
        for user, changes in news.items():
            if changes:
                self._on_change(user, frozenset(changes))

    def _on_ancestor(self, event: Event, dirty: set[User]) -> None:
        ancestor = self._ancestors[event.wd]
        if event.mask & (watch.IGNORED | watch.MOVE_SELF):
            if event.mask & watch.IGNORED:
                del self._ancestors[event.wd]
            dirty |= ancestor.users
        elif event.mask & _CAME and event.mask & watch.ISDIR:
            came = os.path.join(ancestor.path, os.fsdecode(event.name))
            expected = {
                user for user in ancestor.users if user in self.trees and self.trees[user].needs(came)
            }
            dirty |= expected
            ancestor.users -= expected
            homes = (self.trees[user].account.home for user in expected)
            if not any(f"{came}/".startswith(f"{home}/") for home in homes):
                # No known user's own: others may live there, or below it.
                self._on_arrival()

    def _holds_mailboxes(self, parent: Directory, name: bytes) -> bool:
        account = parent.tree.account
        # An INBOX outside of the root has nothing below it.
        return (
            not parent.path.startswith(b"/")
            and parent.path.count(b"/") < _DEEPEST
            and layout.descend(account.driver, account.layout, _join(parent.path, name))
        )

    # Scans ---------------------------------------------------------------------------------------

    def scan_all(self) -> None:
        """Has every user compared with his positions, a few at a time."""
        self._scanned_at = time.monotonic()
        for tree in self.trees.values():
            tree.blind = True
        self._unscanned.update(self.trees)
        self._scan_wanted.set()

    def _scan_later(self, user: User) -> None:
        if not self._unscanned:
            self._scanned_at = time.monotonic()
        self._unscanned.add(user)
        self._scan_wanted.set()

    def catch_up(self, user: User) -> None:
        """Reads what has happened to ``user`` up to now. To be called before a sync of his looks at it: what
        comes later is seen as news then, even if his first scan was still to come."""
        self.watch.drain()
        if user in self._unscanned:
            self._unscanned.discard(user)
            self._scan_and_tell(self.trees[user])

    @property
    def catching_up(self) -> int:
        """How many users have yet to be scanned."""
        return len(self._unscanned)

    async def run(self) -> None:
        while True:
            await wait_for_event(self._scan_wanted, self._pause())
            self._scan_wanted.clear()
            if not self._unscanned:
                self._compare()
            await self._scan_due()
            if not self._unscanned:
                self.unwatched.report(len(self._directories) + len(self._ancestors), self.compare_interval)
                self._progress()

    def _pause(self) -> Optional[float]:
        """Seconds until there is something to scan if nothing happens; None if there is nothing then."""
        if self._unscanned:
            return max(0.0, min(self.trees[user].rest_until for user in self._unscanned) - time.monotonic())
        return self.compare_interval if self.unwatched.users else None

    async def _scan_due(self) -> None:
        while True:
            self._scanned_at = now = time.monotonic()
            due = [user for user in self._unscanned if self.trees[user].rest_until <= now]
            if not due:
                return
            for user in due:
                if user in self._unscanned:
                    self._unscanned.discard(user)
                    self._scan_and_tell(self.trees[user])
                if time.monotonic() > self._scanned_at + _SCAN_SLICE:
                    await asyncio.sleep(0)
                    self._scanned_at = time.monotonic()

    def _compare(self) -> None:
        """Has the users looked at of whose changes there may be no events."""
        self._scanned_at = time.monotonic()
        self._filesystems.clear()
        for user in self.unwatched.users & self.trees.keys():
            self.trees[user].blind = True
            self._unscanned.add(user)

    @property
    def work(self) -> Work:
        return Work("intake", self._scanned_at if self._unscanned else None, 60.0)

    def _scan_and_tell(self, tree: Tree) -> None:
        was_blind, tree.blind = tree.blind, False
        kinds = self._scan(tree)
        if kinds & CONTESTABLE and was_blind:
            # Nobody saw whether a dsync was at work on it.
            self._on_contest(tree.account.user)
        if kinds:
            self._on_change(tree.account.user, kinds)

    def _scan(self, tree: Tree) -> frozenset[ChangeKind]:
        """Arms and looks at every directory of a user, and compares every log with its position."""
        account = tree.account
        began = time.monotonic()
        found: dict[bytes, Directory] = {}
        kinds: set[ChangeKind] = set()
        aside: dict[tuple[bytes, bytes], LogPosition] = {}
        was_incomplete, tree.incomplete = tree.incomplete, False
        self.unwatched.forget(account.user)
        for path in (b"", os.fsencode(account.inbox)) if account.inbox else (b"",):
            try:
                with logreader.open_directory(account.index_root, path, account.home) as fd:
                    self._visit(tree, path, fd, found, kinds)
                    if not path:
                        kinds |= self._news_of_mailbox_log(tree, fd)
            except OSError as error:
                aside.update(self._set_aside(tree, path, found))
                tree.incomplete = True
                self._await(tree, os.fsdecode(path) or account.index_root, error, quiet=was_incomplete)
        # One that was renamed while this went on may have been found under both names.
        found = {directory.path: directory for directory in found.values()}
        kept = set(found.values())
        for directory in tree.directories.values():
            if directory not in kept:
                gone = directory.path not in found and (directory.path, logreader.INDEX_LOG) not in aside
                self._drop(directory, forget=gone)
        tree.directories = found
        for path, name in tree.remembered.keys() - aside.keys():
            if path not in found:
                self._store.put_cursor(CursorKey(account.user, path, name), None)
        tree.remembered = aside
        seconds = time.monotonic() - began
        if seconds > _LONG_SCAN:
            # Whoever has a tree so large that it takes long to look at must not keep others waiting for it.
            tree.rest_until = began + seconds + min(_LONGEST_REST, _REST * seconds)
        # What a user's logs hold when he is first seen is for the first pass to compare.
        was_new, tree.new = tree.new, False
        return frozenset() if was_new else frozenset(kinds)

    def _set_aside(
        self, tree: Tree, root: bytes, found: Mapping[bytes, Directory]
    ) -> dict[tuple[bytes, bytes], LogPosition]:
        """The positions of what lies below ``root``, which can't be opened: it may be mounted again."""
        positions = {
            **tree.remembered,
            **{(b"", name): position for name, position in tree.mailbox_log.items()},
            **{
                (path, logreader.INDEX_LOG): directory.position
                for path, directory in tree.directories.items()
                if directory.position is not None
            },
        }
        if not root:
            tree.mailbox_log = {}
        return {
            (path, name): position
            for (path, name), position in positions.items()
            if path not in found and path.startswith(b"/") == root.startswith(b"/")
        }

    def _visit(
        self, tree: Tree, path: bytes, fd: int, found: dict[bytes, Directory], kinds: set[ChangeKind]
    ) -> None:
        """Adds to ``found`` and ``kinds`` at once: no later error may take back what moved a position."""
        directory = self._arm(tree, path, fd, found)
        found[path] = directory
        kinds |= self._read_index_log(directory, fd)
        with os.scandir(fd) as entries:
            names = [os.fsencode(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
        for name in names:
            if not self._holds_mailboxes(directory, name):
                continue
            try:
                with logreader.open_below(fd, name) as below:
                    self._visit(tree, _join(path, name), below, found, kinds)
            except OSError as error:
                log.debug("%s: %r: %s", tree.account.user, name, error.strerror)
                if error.errno not in _GONE:
                    # Still there, and watched if it was: only the look failed.
                    tree.incomplete = True
                    self._keep(tree, _join(path, name), found)

    def _keep(self, tree: Tree, root: bytes, found: dict[bytes, Directory]) -> None:
        for path, directory in tree.directories.items():
            if path == root or path.startswith(root + b"/"):
                found.setdefault(path, directory)

    def _arm(self, tree: Tree, path: bytes, fd: int, found: Mapping[bytes, Directory]) -> Directory:
        """The directory behind ``fd``, watched. If it was watched under another name, it was renamed and
        keeps its position: its log holds no news for that."""
        try:
            self._note_filesystem(tree.account.user, fd)
            wd = self.watch.arm(fd)
        except WatchError as error:
            self.unwatched.refused(tree.account.user, error)
            known = tree.directories.get(path)
            return known if known is not None else self._adopted(Directory(tree, path, -1), fd)
        directory = self._directories.get(wd)
        if directory is None or directory.tree is not tree:
            known = tree.directories.get(path)
            if known is not None and known.wd < 0:
                # It could not be watched up to now.
                known.wd, directory = wd, known
            else:
                directory = self._adopted(Directory(tree, path, wd), fd)
            self._directories[wd] = directory
            directory.syncing = logreader.inode(fd, _SYNC_LOCK) is not None
        elif directory.path != path:
            if found.get(directory.path, directory) is directory:
                self._forget(directory)
            directory.path = path
            self._remember(directory)
        return directory

    def _adopted(self, directory: Directory, fd: int) -> Directory:
        """With the position that the last run left for it, under this name or, renamed since, another."""
        remembered = directory.tree.remembered
        here = remembered.get((directory.path, logreader.INDEX_LOG))
        if here is not None and logreader.unchanged(fd, here):
            directory.position = here
            return directory
        inode = logreader.inode(fd, logreader.INDEX_LOG)
        for (path, name), position in remembered.items():
            if (
                position.inode == inode
                and name == logreader.INDEX_LOG
                and path != directory.path
                and logreader.is_continued(fd, position)
            ):
                directory.position = position
                self._remember(directory)
                return directory
        directory.position = here
        return directory

    def _drop(self, directory: Directory, forget: bool = True) -> None:
        if self._directories.get(directory.wd) is directory:
            del self._directories[directory.wd]
            if directory.wd not in self._ancestors:
                self.watch.disarm(directory.wd)
        if forget:
            self._forget(directory)

    def _await(self, tree: Tree, path: str, error: OSError, quiet: bool) -> None:
        """Watches the nearest directory in which ``path`` will show up, which could not be opened. A mount
        makes no event: that is found when the users are listed anew."""
        missing_now = isinstance(error, FileNotFoundError)
        if not missing_now and not quiet:
            log.warning(
                "%s: %s can't be opened: %s; a link is not followed, see dovecot.index_root",
                tree.account.user,
                path,
                error.strerror,
            )
        while path != "/":
            missing, path = path, os.path.dirname(path)
            ancestor = self._watch_arrivals(path, tree.account.home)
            if ancestor is not None:
                ancestor.users.add(tree.account.user)
                if missing_now and os.path.isdir(missing):
                    self._scan_later(tree.account.user)
                return

    # Logs ----------------------------------------------------------------------------------------

    def _read_touched(self, directory: Directory) -> frozenset[ChangeKind]:
        try:
            account = directory.tree.account
            with logreader.open_directory(account.index_root, directory.path, account.home) as fd:
                return self._read_index_log(directory, fd)
        except OSError:
            # Renamed or removed since: the tree has to be looked at.
            return self._scan(directory.tree)

    def _read_index_log(self, directory: Directory, fd: int) -> frozenset[ChangeKind]:
        position = directory.position
        if position is not None and logreader.unchanged(fd, position):
            return frozenset()
        reading = logreader.read_index_log(fd, position)
        if reading is None or reading.position == position:
            return frozenset()
        if reading.trouble:
            log.warning("%s: %s: %s", directory.tree.account.user, _name(directory), reading.trouble)
        directory.position = reading.position
        waiting = bool(directory.attributes)
        if not directory.tree.new:
            directory.attributes = classify.unconfirmed(directory.attributes, reading.news.attributes)
        self._remember(directory)
        if directory.attributes and not waiting:
            self._loop.call_later(_CONFIRMATION, self._decide_attributes, directory)
        if position is None:
            return reading.news.kinds | {ChangeKind.CREATE}
        return reading.news.kinds

    def _decide_attributes(self, directory: Directory) -> None:
        """Whatever no dsync has claimed by now is a user's."""
        user = directory.tree.account.user
        if directory.attributes and directory.tree.directories.get(directory.path) is directory:
            directory.attributes = ()
            self._remember(directory)
            self._on_change(user, frozenset({ChangeKind.ATTRIBUTE}))

    def _read_mailbox_log(self, tree: Tree) -> frozenset[ChangeKind]:
        try:
            with logreader.open_directory(tree.account.index_root, b"", tree.account.home) as fd:
                return self._news_of_mailbox_log(tree, fd)
        except OSError:
            return self._scan(tree)

    def _news_of_mailbox_log(self, tree: Tree, fd: int) -> frozenset[ChangeKind]:
        names = (logreader.MAILBOX_LOG, logreader.MAILBOX_LOG_2)
        for name in names:
            if (b"", name) in tree.remembered:
                tree.mailbox_log[name] = tree.remembered[b"", name]
        kinds, positions = logreader.read_mailbox_log(fd, tree.mailbox_log)
        for name in names:
            if positions.get(name) != tree.mailbox_log.get(name):
                self._store.put_cursor(CursorKey(tree.account.user, b"", name), positions.get(name))
        tree.mailbox_log = positions
        return kinds

    def _remember(self, directory: Directory) -> None:
        if directory.attributes:
            return
        self._store.put_cursor(
            CursorKey(directory.tree.account.user, directory.path, logreader.INDEX_LOG), directory.position
        )

    def _forget(self, directory: Directory) -> None:
        self._store.put_cursor(
            CursorKey(directory.tree.account.user, directory.path, logreader.INDEX_LOG), None
        )

    def _note_filesystem(self, user: User, fd: int) -> None:
        device = os.fstat(fd).st_dev
        if device not in self._filesystems:
            self._filesystems[device] = watch.remote_filesystem(device)
        filesystem = self._filesystems[device]
        if filesystem is not None:
            self.unwatched.remote(user, filesystem)


def _join(path: bytes, name: bytes) -> bytes:
    return path + b"/" + name if path else name


def _name(directory: Directory) -> str:
    return os.fsdecode(directory.path) or "INBOX"
