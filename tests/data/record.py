#!/usr/bin/python3
"""Record the logs of two real Dovecot servers as test data. Run as root; not part of the tests.

    tests/data/record.py [--root CHROOT]

starts two Dovecot instances a and b on free loopback ports (of this machine, or of CHROOT), lets a user do
one thing after the other, replicates each from a to b with ``doveadm sync``, and writes every index log of
both sides to ``tests/data/logs/VERSION``, each beside what ``doveadm dump`` says about it.

Logs only grow, so each is stored once, in its last state, and ``index.json`` lists which bytes of it
(``start`` to ``end``) came in which phase of which row: ``action`` (what the user did), ``sync`` (the dsync
that carries it over), ``noop`` (a further dsync that finds nothing to do). To keep the data small, the dumps
are without the details of records that only keep Dovecot's own books, and the list index logs are
there for one user only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from record_nodes import KIND_OF_NAME, UID, Node, Snapshot, dovecot_version, message, wait_for

KINDS = {"index": "log", "list": "log", "map": "log", "mailbox": "mailboxlog"}
BOOKKEEPING = ("header-update", "ext-", "boundary")


def append(mailbox: str, number: int, flags: str = "") -> str:
    text = message(number)
    return f"APPEND {mailbox} {flags}{{{len(text)}+}}\r\n{text}"


@dataclass
class Log:
    """One log file through its life: it grows, and may move."""

    name: str
    kind: str
    data: bytes = b""

    def header_size(self, data: bytes) -> int:
        """A transaction log says at its byte 2 how long its header is; a mailbox log has none."""
        return 0 if self.kind == "mailbox" else int(struct.unpack_from("<H", data, 2)[0])


def essence(dump: str) -> str:
    """The text of a dump without the detail lines of bookkeeping records."""
    lines, bookkeeping = [], False
    for line in dump.splitlines(keepends=True):
        if line.startswith("record:"):
            bookkeeping = line.partition("type=")[2].startswith(BOOKKEEPING)
        elif bookkeeping:
            continue
        lines.append(line)
    return "".join(lines)


@dataclass
class Recorder:
    """``seen`` holds, per side and user, the logs as they were after the last phase."""

    a: Node
    b: Node
    rows: list[dict[str, Any]] = field(default_factory=list)
    logs: list[Log] = field(default_factory=list)
    seen: dict[tuple[str, str], dict[str, tuple[Snapshot, Log]]] = field(default_factory=dict)
    user: str = ""
    acts: str = "a"

    def start_row(self, row: str) -> None:
        """Dovecot's timestamps are whole seconds: dsync could not order two rows of one second."""
        second = int(time.time())
        wait_for(lambda: int(time.time()) > second, "the clock stands still")
        self.rows.append({"row": row, "storage": self.user, "acts": self.acts, "cases": []})

    def take_note(self, phase: str = "", unchanged: Sequence[str] = ()) -> None:
        """Compare all logs with the last time; in a phase, list in the last row what is new, and on the
        side that acts the index logs of the folders ``unchanged`` even when nothing came."""
        for node in (self.a, self.b):
            before = self.seen.get((node.name, self.user), {})
            by_inode = {old.inode: (path, old, log) for path, (old, log) in before.items()}
            after = {}
            for path, new in sorted(node.logs(self.user).items()):
                old_path, old, log = by_inode.get(new.inode, ("", None, None))
                if old is None or log is None or not new.data.startswith(old.data):
                    if old_path == path:
                        print(f"{self.user}: {phase}: {node.name}: {path} was written anew")
                    log = self._new_log(node, path)
                    old_path, start = "", log.header_size(new.data)
                else:
                    start = len(old.data)
                log.data = new.data
                after[path] = (new, log)
                news = old_path != path or start < len(new.data)
                expected = node.name == self.acts and path in [
                    f"{box}/dovecot.index.log" for box in unchanged
                ]
                if phase and (news or expected):
                    case: dict[str, Any] = {"phase": phase, "side": node.name, "path": path, "file": log.name}
                    case |= {"start": start, "end": len(new.data)}
                    if old_path not in ("", path):
                        case["moved_from"] = old_path
                    self.rows[-1]["cases"].append(case)
            self.seen[node.name, self.user] = after

    def _new_log(self, node: Node, path: str) -> Log:
        kind = KIND_OF_NAME[os.path.basename(path).removesuffix(".2")]
        folder = os.path.basename(os.path.dirname(path)).strip(".")
        stem = f"{self.user}-{node.name}-{folder}"
        number = sum(log.name.startswith(f"{stem}-") and log.kind == kind for log in self.logs) + 1
        log = Log(f"{stem}-{number}.{kind}", kind)
        self.logs.append(log)
        return log

    def step(self, row: str, action: Callable[[Node], object], *unchanged: str) -> None:
        """One row of the matrix: the action on the node that acts, then two syncs from a to b."""
        self.start_row(row)
        action(self.a if self.acts == "a" else self.b)
        self.take_note("action", unchanged)
        for phase in ("sync", "noop"):
            self.a.sync(self.user, self.b)
            self.take_note(phase)

    def prepare(self, action: Callable[[Node], object]) -> None:
        """What has to be there before the next row."""
        action(self.a)
        self.a.sync(self.user, self.b)
        self.a.sync(self.user, self.b)
        self.take_note()

    def write(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        for row in self.rows:
            if row["storage"] != "maildir":
                row["cases"] = [case for case in row["cases"] if not case["file"].endswith(".list")]
        used = {case["file"] for row in self.rows for case in row["cases"]}
        for log in self.logs:
            if log.name in used:
                (directory / log.name).write_bytes(log.data)
                copy = self.a.outer / "dumped.log"
                copy.write_bytes(log.data)
                dump = self.a.doveadm("dump", "-t", KINDS[log.kind], f"{self.a.inner}/dumped.log")
                (directory / f"{log.name}.dump").write_text(essence(dump.stdout))
        index = json.dumps(self.rows, separators=(",", ":"))
        for start in ('{"phase"', '{"row"'):
            index = index.replace(start, f"\n{start}")
        (directory / "index.json").write_text(index + "\n")


def over_imap(user: str, *commands: str) -> Callable[[Node], None]:
    return lambda node: node.imap(user, *commands)


def record_messages(recorder: Recorder) -> None:
    user, inbox, step = recorder.user, "Maildir", recorder.step
    imap = partial(over_imap, user)

    def in_inbox(command: str) -> Callable[[Node], None]:
        return imap("SELECT INBOX", command)

    step("lmtp-first", lambda node: node.deliver(user, 1), inbox)
    step("lmtp", lambda node: node.deliver(user, 2), inbox)
    step("append", imap(append("INBOX", 3)), inbox)
    step("append-flags", imap(append("INBOX", 4, "(\\Seen $Label) ")), inbox)
    step("select-new", imap("SELECT INBOX"), inbox)
    step("fetch-headers", in_inbox("FETCH 1:* (FLAGS BODY.PEEK[HEADER])"), inbox)
    step("fetch-body", in_inbox("FETCH 1 BODY[]"), inbox)
    step("store-flag", in_inbox("STORE 1:2 +FLAGS (\\Flagged \\Answered)"), inbox)
    step("remove-flag", in_inbox("STORE 1 -FLAGS (\\Flagged)"), inbox)
    step("store-keyword", in_inbox("STORE 2:3 +FLAGS (Project)"), inbox)
    step("remove-keyword", in_inbox("STORE 2 -FLAGS (Project)"), inbox)
    step("store-deleted", in_inbox("STORE 1 +FLAGS (\\Deleted)"), inbox)
    step("expunge", in_inbox("EXPUNGE"), inbox)
    recorder.prepare(imap("CREATE Copies"))
    step("copy", in_inbox("COPY 1 Copies"), inbox, "Maildir/.Copies")
    step("move", in_inbox("MOVE 1 Copies"), inbox, "Maildir/.Copies")
    step("pop3", lambda node: node.pop3_take(user), inbox)
    recorder.prepare(lambda node: node.deliver(user, 5))
    step("status", imap("STATUS INBOX (MESSAGES UNSEEN HIGHESTMODSEQ)", "STATUS Copies (MESSAGES)"), inbox)
    step("examine", imap("EXAMINE INBOX", "FETCH 1:* BODY[]"), inbox)
    step("idle", in_inbox("IDLE"), inbox)


def record_folders(recorder: Recorder) -> None:
    user, root, step = recorder.user, "Maildir", recorder.step
    imap = partial(over_imap, user)
    step("create", imap("CREATE Work"), "Maildir/.Work")
    step("subscribe", imap("SUBSCRIBE Work"), root)
    step("unsubscribe", imap("UNSUBSCRIBE Work"), root)
    recorder.prepare(imap(append("Work", 6), append("Work", 7), "SELECT Work", "STORE 1 +FLAGS (\\Seen)"))
    step("rename", imap("RENAME Work Job"), "Maildir/.Job")
    recorder.prepare(imap("CREATE Job/Part", append("Job/Part", 8)))
    step("rename-children", imap("RENAME Job Done"), "Maildir/.Done", "Maildir/.Done.Part")
    step("delete", imap("DELETE Done/Part"), root)


def record_attributes(recorder: Recorder) -> None:
    user, step = recorder.user, recorder.step
    imap = partial(over_imap, user)

    def sieve(*commands: str) -> Callable[[Node], None]:
        return lambda node: node.managesieve(user, *commands)

    step("setmetadata", imap('SETMETADATA Copies (/private/comment "mine" /shared/comment "ours")'))
    step("setmetadata-server", imap('SETMETADATA "" (/private/comment "server")'))
    step("remove-metadata", imap("SETMETADATA Copies (/private/comment NIL)"))
    step("setacl", imap("SETACL Copies rotate lr"), "Maildir/.Copies")
    step("putscript", sieve('PUTSCRIPT "main" {7+}\r\nkeep;\r\n', 'PUTSCRIPT "other" {7+}\r\nkeep;\r\n'))
    step("setactive", sieve('SETACTIVE "main"'))
    step("deletescript", sieve('DELETESCRIPT "other"'))


def record_maintenance(recorder: Recorder) -> None:
    user, inbox, step = recorder.user, "Maildir", recorder.step
    imap = partial(over_imap, user)

    def vanish(node: Node) -> None:
        next((node.home(user) / "Maildir/.Copies/cur").iterdir()).unlink()
        node.imap(user, "SELECT Copies")

    def appear(node: Node) -> None:
        path = node.home(user) / "Maildir/.Copies/new/1767261600.M1P1.example"
        path.write_text(message(9).replace("\r\n", "\n"))
        os.chown(path, UID, UID)
        node.imap(user, "SELECT Copies")

    step("noop", lambda node: None, inbox, "Maildir/.Copies")
    step("noop-from-peer", lambda node: recorder.b.sync(user, recorder.a), inbox)
    recorder.acts = "b"
    step("lmtp-on-peer", lambda node: node.deliver(user, 10), inbox)
    step("flags-on-peer", imap("SELECT INBOX", "STORE * +FLAGS (\\Seen $Peer)"), inbox)
    step("expunge-on-peer", imap("SELECT INBOX", "STORE * +FLAGS (\\Deleted)", "EXPUNGE"))
    step("create-on-peer", imap("CREATE Peer"), "Maildir/.Peer")
    recorder.acts = "a"
    step("vanished", vanish, "Maildir/.Copies")
    step("appeared", appear, "Maildir/.Copies")
    step("force-resync", lambda node: node.doveadm("force-resync", "-u", user, "INBOX"), inbox)


def record_storage(recorder: Recorder) -> None:
    """The short tour for a storage format other than Maildir++."""
    user, step = recorder.user, recorder.step
    imap = partial(over_imap, user)
    step("lmtp-first", lambda node: node.deliver(user, 1))
    step("lmtp", lambda node: node.deliver(user, 2))
    step("fetch-body", imap("SELECT INBOX", "FETCH 1 BODY[]"))
    step("store-keyword", imap("SELECT INBOX", "STORE 2 +FLAGS (Project)"))
    step("create", imap("CREATE Top/Work"))
    step("copy", imap("SELECT INBOX", "COPY 1:2 Top/Work"))
    step("expunge", imap("SELECT INBOX", "STORE 1 +FLAGS (\\Deleted)", "EXPUNGE"))
    step("rename", imap("RENAME Top/Work Top/Job"))
    step("delete", imap("DELETE Top/Job"))


def record_rotation(recorder: Recorder) -> None:
    """Set and clear a flag until the log is rotated: the action before that one, and that one."""
    user = recorder.user
    recorder.step("lmtp-first", lambda node: node.deliver(user, 1))
    recorder.start_row("before-rotation")
    deadline = time.monotonic() + 60
    while "Maildir/dovecot.index.log.2" not in recorder.a.logs(user):
        if time.monotonic() > deadline:
            raise TimeoutError("no rotation")
        recorder.rows[-1]["cases"].clear()
        recorder.take_note("action", ["Maildir"])
        recorder.a.imap(user, "SELECT INBOX", "STORE 1 +FLAGS (\\Flagged)", "STORE 1 -FLAGS (\\Flagged)")
    recorder.start_row("rotation")
    recorder.take_note("action")
    for phase in ("sync", "noop"):
        recorder.a.sync(user, recorder.b)
        recorder.take_note(phase)
    recorder.step("after-rotation", lambda node: node.imap(user, "SELECT INBOX", "STORE 1 +FLAGS (\\Seen)"))


def record(root: str, output: Path) -> None:
    version = dovecot_version(root)
    work = Path(tempfile.mkdtemp(prefix="record-", dir=f"{root}/tmp"))
    nodes: list[Node] = []
    try:
        work.chmod(0o755)
        inner = str(work)[len(root) :]
        nodes.extend(Node(name, root, inner, version) for name in "ab")
        recorder = Recorder(nodes[0], nodes[1])
        for user, parts in (
            ("maildir", (record_messages, record_folders, record_attributes, record_maintenance)),
            ("fs", (record_storage,)),
            ("sdbox", (record_storage,)),
            ("mdbox", (record_storage,)),
            ("rotate", (record_rotation,)),
        ):
            recorder.user = user
            for part in parts:
                part(recorder)
        recorder.write(output / version)
    except BaseException:
        for node in nodes:
            print(f"{node.name}: {(node.outer / 'log').read_text()}", file=sys.stderr)
        raise
    finally:
        for node in nodes:
            node.stop()
        shutil.rmtree(work)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--root", default="", help="chroot with the Dovecot to record (default: this machine)"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "logs")
    arguments = parser.parse_args()
    record(arguments.root.rstrip("/"), arguments.output)
