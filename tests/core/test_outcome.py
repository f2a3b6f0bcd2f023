# ruff: noqa: E501 (the lines of Dovecot are as long as they are)
"""What each answer of doveadm means. The lines are those that real servers gave, 2.3.19.1 and 2.4.1."""

from __future__ import annotations

from typing import NamedTuple, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovesyncd.core.dsync import sync_args, without_state
from dovesyncd.core.model import LogLine, Outcome, OutcomeClass, Reply, SyncKind
from dovesyncd.core.outcome import classify

untimed = settings(deadline=None, print_blob=True)

STATE = "AQAAAHm4+Jk="
# What is said where there is nothing to quote.
NO_WORD = " and no word: see Dovecot's logs on both sides"


class Row(NamedTuple):
    name: str
    kind: OutcomeClass
    exit_code: Optional[int]
    log: tuple[str, ...] = ()
    failure: str = ""
    # The line of the log that explains, by its index; or a text.
    text: object = 0


def lines(*texts: str) -> tuple[LogLine, ...]:
    """ "level|text", error by default."""
    parted = (text.rpartition("|") for text in texts)
    return tuple(LogLine(level or "error", text) for level, _, text in parted)


# fmt: off
ROWS = [
    Row("refused, 2.4", OutcomeClass.PEER_DOWN, 75,
        ("doveadm(u1): cmd sync: Disconnected from remote: connect(127.0.0.1:1) failed: Connection refused",)),
    Row("refused, 2.3 socket", OutcomeClass.PEER_DOWN, None, (), "disconnected",
        "doveadm-server closed the connection without a reply"),
    Row("refused, 2.3 program", OutcomeClass.PEER_DOWN, 75,
        ("fatal|doveadm(u1): connect(127.0.0.1:1) failed: Connection refused",)),
    Row("refused, 2.3 with its last words", OutcomeClass.PEER_DOWN, None,
        ("fatal|doveadm(u1): connect(127.0.0.1:1) failed: Connection refused",), "disconnected"),
    Row("timed out, 2.4", OutcomeClass.PEER_DOWN, 75,
        ("doveadm(u1): cmd sync: Disconnected from remote: connect(10.9.9.9:1) timed out in 30.000 secs",)),
    Row("unix socket of the peer, 2.4", OutcomeClass.PEER_DOWN, 75,
        ("doveadm(u1): cmd sync: Disconnected from remote: connect(/run/x) failed: No such file or directory",)),
    Row("dns, 2.4.1", OutcomeClass.PEER_DOWN, 75,
        ("doveadm(u1): cmd sync: Couldn't create server connection: Lookup of host no.such.invalid failed: "
         "Name or service not known",)),
    Row("dns, 2.3", OutcomeClass.PEER_DOWN, 75,
        ("fatal|doveadm(u1): Lookup of host no.such.invalid failed: Name or service not known",)),
    Row("dns, newer", OutcomeClass.PEER_DOWN, 65,
        ("doveadm(u1): cmd sync: Failed to start remote dsync-server command: Remote exit_code=65 "
         "dns_lookup(b.example.com) failed: timeout",)),
    Row("peer closes at once", OutcomeClass.PEER_DOWN, 75,
        ("doveadm(u1): doveadm server disconnected before handshake: Connection closed",
         "doveadm(u1): Disconnected from remote: Connection closed")),
    Row("ssh fails", OutcomeClass.PEER_DOWN, 75,
        ("doveadm(u1)<1><s>: read(remote) failed: EOF (version not received)",
         "doveadm(u1)<1><s>: Remote command returned error 255: ssh -p 22 x dsync-server"), text=1),
    Row("wrong password, 2.3", OutcomeClass.AUTH, 75,
        ("doveadm(u1): doveadm authentication failed ()", "doveadm(u1): Disconnected from remote: EOF")),
    Row("wrong password, 2.4", OutcomeClass.AUTH, 75,
        ("doveadm(u1): conn 127.0.0.1:24112 (127.0.0.1:24112): doveadm authentication failed ()",
         "doveadm(u1): cmd sync: Disconnected from remote: Connection closed")),
    Row("no password", OutcomeClass.AUTH, 75,
        ("doveadm(u1): doveadm_password not set, can't authenticate to remote server",
         "doveadm(u1): Disconnected from remote: EOF")),
    Row("certificate", OutcomeClass.AUTH, 75,
        ("doveadm(u1): Disconnected from remote: Received invalid SSL certificate: certificate has expired",)),
    Row("lock timeout", OutcomeClass.BUSY, 75,
        ("dsync-local(u1)<s>: brain M: Couldn't lock /m/u1/.dovecot-sync.lock: fcntl(/m/u1/.dovecot-sync.lock, "
         "write-lock, F_SETLKW) locking failed: Timed out after 2 seconds (WRITE lock held by pid 22384)",)),
    Row("lock timeout on the other side", OutcomeClass.BUSY, 75,
        ("doveadm(u1): remote(b:1): dsync-remote(u1)<s>: Couldn't lock /m/u1/.dovecot-sync.lock: fcntl(x) "
         "locking failed: Timed out after 30 seconds (WRITE lock held by pid 1)",
         "dsync(b): read(b) failed: EOF (last sent=handshake, last recv=handshake)")),
    Row("lock file of root", OutcomeClass.OTHER, 75,
        ("brain M: Couldn't lock /m/u1/.dovecot-sync.lock: open(/m/u1/.dovecot-sync.lock) failed: "
         "Permission denied",)),
    Row("no local user, 2.3", OutcomeClass.NOUSER_LOCAL, 67, ("doveadm(zz): User doesn't exist",)),
    Row("no local user, 2.4", OutcomeClass.NOUSER_LOCAL, 67, ("doveadm(zz): cmd sync: User doesn't exist",)),
    Row("no remote user", OutcomeClass.NOUSER_REMOTE, 67,
        ("doveadm(u2): remote(127.0.0.1:24112): doveadm(127.0.0.1,u2): cmd dsync-server: User doesn't exist",
         "doveadm(u2): cmd sync: Unknown user in remote"), text=1),
    Row("no user, nobody says whose", OutcomeClass.NOUSER_REMOTE, 67, (), text=f"doveadm ended with exit code 67{NO_WORD}"),
    Row("no remote user by ssh", OutcomeClass.NOUSER_REMOTE, 75,
        ("dsync(u): Remote command returned error 67: ssh b doveadm dsync-server",)),
    Row("quota, program", OutcomeClass.QUOTA, 73,
        ("warning|odd", "other", "dsync: Saving failed: Quota exceeded (mailbox for user is full)"), text=2),
    Row("quota, socket", OutcomeClass.QUOTA, -1, ("remote(b:1): Saving failed: Quota exceeded (mailbox is full)",)),
    Row("quota, no words", OutcomeClass.QUOTA, 73, (), text=f"doveadm ended with exit code 73{NO_WORD}"),
    Row("usage", OutcomeClass.CONFIG, 64, ("doveadm: doveadm: Unexpected or incomplete option: -U",)),
    Row("namespace not found", OutcomeClass.CONFIG, 68, ("Namespace not found: 'x'",)),
    # A mailbox that a user deleted meanwhile (MAIL_ERROR_NOTFOUND).
    Row("not found", OutcomeClass.OTHER, 68, (), text=f"doveadm ended with exit code 68{NO_WORD}"),
    Row("config", OutcomeClass.CONFIG, 78, ("Failed to initialize user: x",)),
    Row("unknown command", OutcomeClass.CONFIG, -1, ("doveadm: doveadm: Client sent unknown command: sync",)),
    Row("no ssh on this machine", OutcomeClass.CONFIG, 75,
        ("doveadm(u1)<s>: read(remote) failed: EOF (version not received)",
         "doveadm(u1)<s>: cmd sync: Remote command returned error 84: ssh x dsync-server"), text=1),
    Row("own deadline", OutcomeClass.TIMEOUT, None, (), "timeout", "no answer before the deadline"),
    Row("own deadline with a hint", OutcomeClass.TIMEOUT, None, ("info|bye", "slow disk"), "timeout", 1),
    Row("stalled", OutcomeClass.TIMEOUT, 75,
        ("dsync(b): I/O has stalled, no activity for 120 seconds (last sent=mail, last recv=mail)",
         "Timeout during state=sync_mails (send=mails recv=changes)")),
    Row("timeout, last words only", OutcomeClass.TIMEOUT, 75, ("Timeout during state=master_recv_handshake",)),
    Row("panic on the other side", OutcomeClass.CRASH, 75,
        ("panic|remote(b:1): dsync-remote(u): file x.c: line 1: assertion failed: (x)",
         "dsync(b): read(b) failed: EOF (last sent=mail)")),
    Row("other side gone", OutcomeClass.CRASH, 75, ("dsync(b): read(b) failed: EOF (last sent=mail)",)),
    Row("panic here", OutcomeClass.CRASH, None, ("error|odd", "panic|file x.c: assertion failed"), "disconnected", 1),
    Row("fatal here", OutcomeClass.CRASH, None, ("fatal|block_alloc(1): Out of memory",), "disconnected"),
    Row("died without a word, 2.4", OutcomeClass.CRASH, None, (), "doveadm-server died", "doveadm-server died"),
    Row("killed", OutcomeClass.CRASH, None, (), "killed by signal 9", "killed by signal 9"),
    Row("fatal exit", OutcomeClass.CRASH, 83, ("fatal|Out of memory",)),
    Row("fatal exit, no words", OutcomeClass.CRASH, 89, (), text=f"doveadm ended with exit code 89{NO_WORD}"),
    Row("changed", OutcomeClass.CHANGED, 2, (), text="mailboxes changed during the sync"),
    Row("changed, program", OutcomeClass.CHANGED, 2,
        ("warning|Mailbox changes caused a desync. You may want to run dsync again: Remote lost mailbox GUID x",)),
    Row("changed, 2.3 socket", OutcomeClass.CHANGED, -1, (), text="mailboxes changed during the sync"),
    Row("userdb of this side is down", OutcomeClass.DOVECOT_DOWN, 75,
        ("auth-master: userdb lookup(u1): connect(/run/dovecot/auth-userdb) failed: Connection refused",)),
    Row("2.4's words for it", OutcomeClass.DOVECOT_DOWN, 75,
        ("cmd sync: auth-master: passdb lookup(u1): connect(/run/dovecot/auth-userdb) failed: No such file",
         "cmd sync: /run/dovecot/auth-userdb: passdb lookup failed (to see if user is proxied, because "
         "doveadm_port is set)")),
    Row("it goes just now", OutcomeClass.DOVECOT_DOWN, 75,
        ("auth-master: userdb lookup(u1): Disconnected unexpectedly",)),
    Row("userdb of the other side is down", OutcomeClass.PEER_DOWN, 75,
        ("remote(10.0.0.1:12345): auth-master: userdb lookup(u1): connect(/run/dovecot/auth-userdb) failed: x",)),
    Row("mailbox locked by a hung sync", OutcomeClass.BUSY, 75,
        ("brain M: Failed to lock mailbox INBOX for dsyncing: file_create_locked(/m/.dovecot-box-sync.lock) "
         "failed: fcntl(/m/.dovecot-box-sync.lock) locking failed: Timed out after 30 seconds",)),
    Row("full disk of the other side", OutcomeClass.QUOTA, 75,
        ("dsync-remote(u1): write(/m/tmp/x) failed: No space left on device",)),
    Row("temporary failure without a word", OutcomeClass.OTHER, 75, (), text=f"doveadm ended with exit code 75{NO_WORD}"),
    Row("permission", OutcomeClass.OTHER, 77, ("warning|w", "Mailbox x: Permission denied"), text=1),
    Row("neither socket nor program", OutcomeClass.OTHER, None, (), "/run/x: No such file or directory",
        "/run/x: No such file or directory"),
    Row("protocol", OutcomeClass.OTHER, None, (), "protocol error: endless reply word",
        "protocol error: endless reply word"),
]
# fmt: on


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_table(row: Row) -> None:
    log = lines(*row.log)
    outcome = classify(Reply(row.exit_code, (STATE,), log, row.failure))
    text = log[row.text].text if isinstance(row.text, int) else row.text
    assert outcome == Outcome(row.kind, str(text))


@pytest.mark.parametrize(
    "folder",
    [
        "Disconnected from remote: ",
        "doveadm authentication failed",
        "connect(b:1) failed",
        "doveadm(u): Lookup of host b failed",
    ],
)
def test_no_name_of_a_folder_blocks_a_peer(folder: str) -> None:
    log = lines(f"dsync-local(u1)<s>: brain M: Can't sync mailbox {folder}: Mailbox is inconsistent")
    assert classify(Reply(75, (), log)).kind is OutcomeClass.OTHER


def test_success_carries_the_state() -> None:
    assert classify(Reply(0, (STATE,))) == Outcome(OutcomeClass.OK, state=STATE)


@pytest.mark.parametrize("output", [(), ("",), ("doveadm sync [-1fPRU] <dest>",), ("abc",), (STATE + "x",)])
def test_a_state_that_is_none(output: tuple[str, ...]) -> None:
    assert classify(Reply(0, output)) == Outcome(OutcomeClass.OK)


def test_an_invalid_old_state_does_not_spoil_the_new_one() -> None:
    log = lines(
        "doveadm(u1)<s>: brain M: Saved sync state is invalid, falling back to full sync: Invalid base64 data"
    )
    assert classify(Reply(0, (STATE,), log)) == Outcome(OutcomeClass.OK, state=STATE)


@pytest.mark.parametrize("exit_code", [2, -1, 75])
def test_dovecot_asks_for_a_full_sync(exit_code: int) -> None:
    text = "Failed to do incremental sync for mailbox X, retry with a full sync (uidnext 1 < 8)"
    outcome = classify(Reply(exit_code, (STATE,), lines("warning|" + text)))
    assert (outcome.wants_full, outcome.state, outcome.text) == (True, "", text)


levels = st.sampled_from(["debug", "info", "warning", "error", "fatal", "panic"])
texts = st.one_of(st.text(max_size=30), st.sampled_from([text for row in ROWS for text in row.log]))
replies = st.builds(
    Reply,
    st.one_of(
        st.none(),
        st.sampled_from([0, 2, -1, 64, 65, 67, 68, 73, 75, 76, 77, 78, 89, 1001, 1002]),
        st.integers(),
    ),
    st.lists(st.one_of(st.just(STATE), st.text(max_size=20))).map(tuple),
    st.lists(st.builds(LogLine, levels, texts)).map(tuple),
    st.sampled_from(
        ["timeout", "disconnected", "doveadm-server died", "killed by signal 9", "protocol error: x"]
    ),
)


@untimed
@given(replies)
def test_every_failure_has_a_text_and_no_state(reply: Reply) -> None:
    outcome = classify(reply)
    assert (outcome.kind is OutcomeClass.OK) == (reply.exit_code == 0)
    if outcome.kind is OutcomeClass.OK:
        assert outcome.text == ""
    else:
        assert outcome.text.strip()
        assert outcome.state == ""


def test_arguments_of_each_kind() -> None:
    def args(kind: SyncKind) -> list[str]:
        return sync_args(kind, STATE, lock_timeout=30, stall_timeout=120, destination=["tcp:b:1"])

    common = ["-l", "30", "-T", "120"]
    assert args(SyncKind.STATEFUL) == [*common, "-s", STATE, "tcp:b:1"]
    assert args(SyncKind.STATELESS) == [*common, "-s", "", "tcp:b:1"]
    assert args(SyncKind.FULL) == [*common, "-f", "-s", "", "tcp:b:1"]
    assert without_state(args(SyncKind.STATEFUL)) == args(SyncKind.STATELESS)


def test_namespaces_exclusions_and_a_command_as_destination() -> None:
    args = sync_args(
        SyncKind.STATELESS,
        "",
        lock_timeout=1,
        stall_timeout=2,
        destination=["ssh", "-s", "b"],
        namespaces=["inbox", "-s"],
        all_namespaces=True,
        exclude_mailboxes=["\\Trash", "Sp*m"],
    )
    assert args[4:] == [
        "-s",
        "",
        "-N",
        "-n",
        "inbox",
        "-n",
        "-s",
        "-x",
        "\\Trash",
        "-x",
        "Sp*m",
        "ssh",
        "-s",
        "b",
    ]
    assert without_state(args) == args
    assert without_state(["*"]) == ["*"]
