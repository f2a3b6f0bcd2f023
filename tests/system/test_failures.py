"""Real faults: what the daemons do, what they say, and that nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import pytest

from tests.system.clients import message, ok
from tests.system.faults import (
    CONTROL_FILES,
    INDEX_FILES,
    SilentPeer,
    configured,
    dovecot_stopped,
    home_of,
    receivers,
    remove_files,
    set_homes,
    unplugged,
)
from tests.system.hosts import Host
from tests.system.mailstate import snapshot, wait_until_equal
from tests.system.node import Node
from tests.system.pair import Pair
from tests.system.syncs import count, syncs, wait_first_passes, wait_quiet
from tests.system.waiting import wait_until

Mails = Counter[tuple[str, str]]


def mails(node: Node, user: str) -> Mails:
    """How often each mail (mailbox and Message-ID) is there."""
    found = snapshot(node, user).mailboxes.items()
    return Counter((name, mail.identity) for name, box in found for mail in box.messages.values())


def create_with(node: Node, user: str, mailbox: str, *subjects: str) -> None:
    with node.imap(user) as imap:
        ok(imap.create(mailbox))
        for subject in subjects:
            ok(imap.append(mailbox, "", "", message(subject)))


def deliver_all(node: Node, users: Iterable[str], subject: str) -> None:
    for user in users:
        node.deliver(user, message(subject))


def test_users_born_on_both_nodes_at_once(pair: Pair) -> None:
    users = pair.fresh_users(10)
    for node in pair:
        deliver_all(node, users, f"first on {node.name}")
        deliver_all(node, users, f"second on {node.name}")
        for user in users:
            create_with(node, user, "Work", f"work on {node.name}")
    born = [mails(node, user) for user in users[:1] for node in pair]
    for node in pair:
        node.start_daemon(pair.peer_table(node), ready=False)
    wait_first_passes(pair, users)
    wait_until_equal(pair.a, pair.b, users, timeout=60)
    wait_quiet(pair, 4.0)
    for user in users:
        assert mails(pair.a, user) == born[0] + born[1]
    wait_until_equal(pair.a, pair.b, users)
    # 2.3 takes some to find out that a mailbox has two GUIDs.
    assert max(count(pair).values()) <= 20


def _home(node: Node, user: str) -> None:
    shutil.rmtree(node.home(user))


def _home_then_delivery(node: Node, user: str) -> None:
    shutil.rmtree(node.home(user))
    node.deliver(user, message("into the empty home"))


def _home_then_login(node: Node, user: str) -> None:
    shutil.rmtree(node.home(user))
    with node.imap(user) as imap:
        ok(imap.select("INBOX"))


def _home_then_same_folder(node: Node, user: str) -> None:
    shutil.rmtree(node.home(user))
    create_with(node, user, "Work", "into the new folder")


def _folder(node: Node, user: str) -> None:
    shutil.rmtree(node.maildir(user) / ".Work")


def _indexes(node: Node, user: str) -> None:
    remove_files(node.maildir(user), *INDEX_FILES)


def _indexes_and_control(node: Node, user: str) -> None:
    remove_files(node.maildir(user), *INDEX_FILES, *CONTROL_FILES)


def _all_but_control(node: Node, user: str) -> None:
    remove_files(node.maildir(user), *INDEX_FILES, "cur/*", "new/*")


EMPTIED = (
    _home,
    _home_then_delivery,
    _home_then_login,
    _home_then_same_folder,
    _folder,
    _indexes,
    _indexes_and_control,
    _all_but_control,
)


@pytest.mark.parametrize("daemon_of_b", ["runs", "is stopped", "loses its database"])
def test_a_peer_that_was_emptied_is_filled_again(pair: Pair, daemon_of_b: str) -> None:
    users = pair.fresh_users(len(EMPTIED))
    deliver_all(pair.a, users, "first")
    for user in users:
        create_with(pair.a, user, "Work", "work 1", "work 2")
    pair.start_daemons()
    wait_first_passes(pair, users)
    wait_until_equal(pair.a, pair.b, users, timeout=30)
    # Both daemons have states that speak of mail.
    for node in pair:
        deliver_all(node, users, f"on {node.name}")
    wait_until_equal(pair.a, pair.b, users, timeout=30)
    wait_quiet(pair, 4.0)
    had = {user: mails(pair.a, user) for user in users}

    if daemon_of_b != "runs":
        pair.b.stop_daemon()
    if daemon_of_b == "loses its database":
        shutil.rmtree(pair.b.daemon_state)
        pair.b.daemon_state.mkdir()
    for user, remove in zip(users, EMPTIED):
        remove(pair.b, user)
    deliver_all(pair.a, users, "after")
    wait_quiet(pair, 4.0)
    for user in users:
        assert had[user] <= mails(pair.a, user)
    if daemon_of_b != "runs":
        pair.b.start_daemon(pair.peer_table(pair.b))
        wait_quiet(pair, 4.0)

    wait_until_equal(pair.a, pair.b, users, timeout=30)
    wait_quiet(pair, 3.0)
    for user, remove in zip(users, EMPTIED):
        now = mails(pair.a, user)
        assert had[user] <= now, remove.__name__
        # Maildir has the identity of replicated mails in dovecot-uidlist: without it, some may double.
        assert max(now.values()) == 1 or remove is _indexes_and_control, remove.__name__
        assert ("INBOX", "<after@example.org>") in now
    wait_until_equal(pair.a, pair.b, users)


DEBUG = '[daemon]\nlog_level = "debug"\n'


def _started_users(pair: Pair, number: int, config: str = DEBUG) -> list[str]:
    users = pair.fresh_users(number)
    deliver_all(pair.a, users, "first")
    pair.start_daemons(config)
    wait_first_passes(pair, users)
    wait_until_equal(pair.a, pair.b, users, timeout=30)
    wait_quiet(pair, 3.0)
    return users


def lines(node: Node, text: str, start: int = 0) -> list[str]:
    return [line for line in node.daemon_log()[start:] if text in line]


FAULTS: dict[str, tuple[str, Callable[[Node], AbstractContextManager[None]]]] = {
    "is stopped": ("peer-down", dovecot_stopped),
    "has another password": ("auth", lambda node: configured(node, "doveadm_password = other\n")),
    "is unplugged": ("peer-down", unplugged),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_peer_that_cannot_be_used(pair: Pair, fault: str) -> None:
    outcome, during = FAULTS[fault]
    if fault == "is unplugged" and not isinstance(pair.b, Host):
        pytest.skip("instances on loopback have no cable")
    users = _started_users(pair, 20)
    pair.a.stop_daemon()
    pair.a.start_daemon(DEBUG + pair.peer_table(pair.a) + "workers = 3\n")
    wait_quiet(pair, 3.0)
    done = len(syncs(pair.a))
    with during(pair.b):
        deliver_all(pair.a, users, "meanwhile")
        wait_until(lambda: lines(pair.a, "peer b can't be used"), 30, "the message")
        first = len(syncs(pair.a))
        wait_until(lambda: len(syncs(pair.a)) >= first + 3, 60, "three probes")
    wait_until_equal(pair.a, pair.b, users, timeout=90)
    wait_quiet(pair, 3.0)
    found = syncs(pair.a)[done:]
    failed = [sync for sync in found if sync.outcome != "ok"]
    assert {sync.outcome for sync in failed} == {outcome}
    # The three that ran when it went, and probes.
    assert len(failed) < len(users)
    assert Counter(sync.user for sync in found if sync.outcome == "ok") == Counter(users)
    assert {sync.kind for sync in found} == {"stateful"}
    assert len(lines(pair.a, "peer b can't be used")) == 1
    assert len(lines(pair.a, "peer b is back")) == 1
    # A user is not to blame.
    assert not [line for line in lines(pair.a, "WARNING") if " -> b: " in line]


def test_a_peer_that_accepts_and_says_nothing(pair: Pair) -> None:
    users = pair.fresh_users(12)
    deliver_all(pair.a, users, "first")
    silent = SilentPeer(pair.a)
    try:
        table = f'[[peer]]\nname = "silent"\ndestination = "{silent.destination}"\nworkers = 3\n'
        pair.a.start_daemon(DEBUG + table)
        wait_until(lambda: lines(pair.a, "peer silent can't be used"), 60, "a judgement about the peer")
        wait_until(lambda: len(syncs(pair.a)) == 3, 10, "the end of those that waited for it")
        probes = silent.connections
        wait_until(lambda: silent.connections > probes, 30, "it is listened for again")
        assert len(lines(pair.a, "peer silent can't be used")) == 1
        # Three syncs, and those who listened for a greeting.
        assert {sync.outcome for sync in syncs(pair.a)} == {"peer-down"}
        assert silent.connections <= 3 + 5
    finally:
        silent.close()


def test_while_the_local_dovecot_is_stopped_its_users_wait(pair: Pair) -> None:
    # Long enough for Dovecot to be gone before the flags are due.
    waiting = '[sync]\nsettle_low = "5s"\nlongest_wait = "10s"\n'
    users = _started_users(pair, 8, DEBUG + waiting)
    done, begin = len(syncs(pair.a)), len(pair.a.daemon_log())
    for user in users:
        with pair.a.imap(user) as imap:
            ok(imap.select("INBOX"))
            ok(imap.store("1", "+FLAGS", r"(\Flagged)"))
    with dovecot_stopped(pair.a):
        wait_until(lambda: lines(pair.a, "Connection refused", begin), 30, "the daemon has noticed")
        noticed = len(syncs(pair.a))
        # The other node's changes wait as well: its peer is down.
        deliver_all(pair.b, users, "meanwhile")
        wait_until(
            lambda: max(Counter(sync.user for sync in syncs(pair.b)[len(users) :]).values(), default=0) > 1,
            60,
            "a second probe of the other node",
        )
        during = len(syncs(pair.a)) - noticed
    wait_until_equal(pair.a, pair.b, users, timeout=60)
    wait_quiet(pair, 3.0)
    found = syncs(pair.a)[done:]
    assert during <= 3
    assert {sync.kind for sync in found} == {"stateful"}
    assert Counter(sync.user for sync in found if sync.outcome == "ok") == Counter(users)


def test_a_user_of_one_node_only(pair: Pair) -> None:
    users = pair.fresh_users(3)
    ghost = "ghost@example.org"
    pair.a.users([*users, ghost])
    deliver_all(pair.a, [*users, ghost], "first")
    pair.start_daemons(DEBUG + '[users]\nrefresh = "1s"\n')
    wait_first_passes(pair, users)
    wait_until_equal(pair.a, pair.b, users, timeout=30)
    wait_until(lambda: [s for s in syncs(pair.a) if s.outcome == "nouser-remote"], 20, "an attempt")
    # Nobody else is disturbed.
    deliver_all(pair.a, users, "second")
    wait_until_equal(pair.a, pair.b, users)
    assert {sync.outcome for sync in syncs(pair.a) if sync.user != ghost} == {"ok"}
    assert not lines(pair.a, "can't be used")
    assert len(lines(pair.a, f"WARNING: {ghost}") + lines(pair.a, f"{ghost} -> b: new user: ")) in (1, 2)

    for node in pair:
        node.users([*users, ghost])
    # His next try may be far: a change brings it no nearer, but the next one after that does.
    wait_until_equal(pair.a, pair.b, [ghost], timeout=60)

    for node in pair:
        node.users(users)
        wait_until(
            lambda node=node: lines(node, f"no longer knows 1 users who were replicated: '{ghost}'"),  # type: ignore[misc]
            20,
            "he is gone",
        )
    wait_quiet(pair, 2.0)
    for node in pair:
        assert sum(mails_on_disk(node, ghost)) == 1
        assert not [
            s
            for s in syncs(node)
            if s.user == ghost and s.outcome not in ("ok", "nouser-remote", "nouser-local")
        ]
    for node in pair:
        node.users([*users, ghost])
        node.deliver(ghost, message(f"again on {node.name}"))
    wait_until_equal(pair.a, pair.b, [ghost], timeout=30)
    assert sum(mails(pair.a, ghost).values()) == 3


def mails_on_disk(node: Node, user: str) -> tuple[int, int]:
    return tuple(len(list((node.maildir(user) / name).iterdir())) for name in ("cur", "new"))  # type: ignore[return-value]


def inbox(node: Node, user: str) -> Counter[str]:
    """The Message-IDs in INBOX, read without a look at the disk."""
    done = node.doveadm("-f", "tab", "fetch", "-u", user, "hdr.message-id", "mailbox", "INBOX", check=True)
    return Counter(done.stdout.split()[1:])


def test_a_peer_whose_disk_is_full(pair: Pair) -> None:
    """dsync does not ask Dovecot's own quota (quota.c of 2.3.19 and 2.4: a user that is dsyncing has no
    limit), so what stops it is the file system."""
    full, other = pair.fresh_users(2)
    home = home_of(pair.b, full)
    path = str(home)
    pair.b.run("install", "-d", "-o", "5000", "-g", "5000", str(home.parent), path)
    pair.b.run("mount", "-t", "tmpfs", "-o", "size=160k,uid=5000,gid=5000,mode=700", "tmpfs", path)
    try:
        deliver_all(pair.a, [full, other], "first")
        pair.start_daemons(DEBUG)
        wait_first_passes(pair, [full, other])
        for number in range(4):
            pair.a.deliver(full, message(f"big {number}", body="x" * 60000))
        wait_until(lambda: [s for s in syncs(pair.a) if s.outcome != "ok"], 30, "a sync that fails")
        pair.a.deliver(other, message("small"))
        wait_until_equal(pair.a, pair.b, [other])
        if pair.a.version == "2.4":
            # 2.3 does not send the other side's log lines to a sync.
            assert lines(pair.a, "No space left on device")
        assert not lines(pair.a, "can't be used")
        assert sum(inbox(pair.a, full).values()) == 5
        pair.b.run("mount", "-o", "remount,size=8m", path)
        pair.a.deliver(full, message("there is room again"))
        wait_until(lambda: inbox(pair.b, full) == inbox(pair.a, full), 120, "all is there")
        assert max(inbox(pair.a, full).values()) == 1
    finally:
        pair.b.stop_daemon()
        pair.b.doveadm("kick", full)
        pair.b.run("umount", "--lazy", path)


def _force_resync(node: Node, user: str) -> None:
    node.doveadm("force-resync", "-u", user, "*", check=True)


def _remove_index(node: Node, user: str) -> None:
    remove_files(node.index_root(user) / ".Work", "dovecot.index*")


def _remove_list_index(node: Node, user: str) -> None:
    remove_files(node.index_root(user), "dovecot.list.index*", "dovecot.mailbox.log*")


def _mark_corrupt(node: Node, user: str) -> None:
    """As Dovecot marks it: struct mail_transaction_log_header, indexid 0."""
    with open(node.index_root(user) / ".Work/dovecot.index.log", "r+b") as file:
        file.seek(4)
        file.write(bytes(4))


def _cut_in_half(node: Node, user: str) -> None:
    log = node.index_root(user) / ".Work/dovecot.index.log"
    with open(log, "r+b") as file:
        file.truncate(log.stat().st_size // 2)


def _rotate(node: Node, user: str) -> None:
    """More than 32 KiB of flag updates, and an index that is written afterwards."""
    with node.imap(user) as imap:
        ok(imap.select("Work"))
        for number in range(1500):
            ok(imap.store("1", "+FLAGS" if number % 2 else "-FLAGS", r"(\Draft)"))
    node.doveadm("index", "-u", user, "Work", check=True)


REBUILT = (_force_resync, _remove_index, _remove_list_index, _mark_corrupt, _cut_in_half, _rotate)


def test_changes_are_seen_after_indexes_were_rebuilt(pair: Pair) -> None:
    users = pair.fresh_users(len(REBUILT))
    deliver_all(pair.a, users, "first")
    for user in users:
        create_with(pair.a, user, "Work", "work 1", "work 2")
    pair.start_daemons(DEBUG)
    wait_first_passes(pair, users)
    wait_until_equal(pair.a, pair.b, users, timeout=30)
    wait_quiet(pair, 3.0)
    for user, rebuild in zip(users, REBUILT):
        rebuild(pair.a, user)
    for user in users:
        create_with(pair.a, user, "New", "new")
        with pair.a.imap(user) as imap:
            ok(imap.select("Work"))
            ok(imap.store("1", "+FLAGS", r"(\Flagged)"))
            ok(imap.append("Work", "", "", message("work 3")))
    wait_until_equal(pair.a, pair.b, users, timeout=30)
    # And the other way round: what b has is news to a.
    for user in users:
        with pair.b.imap(user) as imap:
            ok(imap.select("Work"))
            ok(imap.store("2", "+FLAGS", r"(\Answered)"))
    wait_until_equal(pair.a, pair.b, users, timeout=30)
    wait_quiet(pair, 3.0)
    for user in users:
        found = mails(pair.a, user)
        assert sum(found.values()) == 5
        assert max(found.values()) == 1
        flags = {mail.flags for mail in snapshot(pair.b, user).mailboxes["Work"].messages.values()}
        assert {"\\Flagged", "\\Answered"} <= {flag for some in flags for flag in some}


def test_a_users_home_is_moved(pair: Pair) -> None:
    """On node a, with all his mail, while the daemon runs."""
    (user,) = pair.fresh_users()
    final = home_of(pair.a, user)
    set_homes(pair.a, {user: final.with_name("before")})
    pair.a.deliver(user, message("first"))
    pair.start_daemons(DEBUG + '[users]\nrefresh = "1s"\n')
    wait_first_passes(pair, [user])
    wait_until(lambda: mails(pair.b, user) == {("INBOX", "<first@example.org>"): 1}, 20, "the first mail")
    wait_quiet(pair, 2.0)
    pair.a.home(user).with_name("before").rename(pair.a.home(user))
    set_homes(pair.a, {user: final})
    pair.a.deliver(user, message("at the new place"))
    wait_until_equal(pair.a, pair.b, [user], timeout=30)
    pair.b.deliver(user, message("from the other node"))
    wait_until_equal(pair.a, pair.b, [user])
    wait_quiet(pair, 2.0)
    with pair.a.imap(user) as imap:
        ok(imap.select("INBOX"))
        ok(imap.store("1", "+FLAGS", r"(\Seen)"))
    wait_until_equal(pair.a, pair.b, [user])
    assert sum(mails(pair.a, user).values()) == 3


def test_the_peers_process_for_one_user_hangs(pair: Pair) -> None:
    """It is stopped in the middle of the first sync of a user with much mail."""
    hung, *others = pair.fresh_users(3)
    with pair.a.imap(hung) as imap:
        for number in range(400):
            ok(imap.append("INBOX", "", "", message(f"mail {number}", body="x" * 20000)))
    pair.a.start_daemon(
        DEBUG + '[sync]\nstall_timeout = "2s"\nlock_timeout = "1s"\n' + pair.peer_table(pair.a)
    )
    (victim,) = wait_until(lambda: receivers(pair.b, hung), 20, "the peer's process")
    os.kill(victim, signal.SIGSTOP)
    try:
        wait_until(lambda: [s for s in syncs(pair.a) if s.outcome == "timeout"], 30, "a timeout")
        deliver_all(pair.a, others, "while another one hangs")
        wait_until_equal(pair.a, pair.b, others)
        # The stopped process still holds the lock of the mailbox.
        wait_until(lambda: len([s for s in syncs(pair.a) if s.user == hung]) > 1, 60, "the next try")
        assert not lines(pair.a, "can't be used")
        assert {sync.outcome for sync in syncs(pair.a) if sync.user != hung} == {"ok"}
    finally:
        os.kill(victim, signal.SIGCONT)
    wait_until_equal(pair.a, pair.b, [hung], timeout=90)
    assert sum(mails(pair.a, hung).values()) == 400
