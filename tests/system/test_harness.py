"""The harness itself, without the daemon."""

from __future__ import annotations

from functools import partial

import pytest

from tests.system.clients import message, ok
from tests.system.dovecot_conf import MailStorage
from tests.system.hosts import Host
from tests.system.mailstate import EMPTY, diff, snapshot, wait_until_equal
from tests.system.node import Node
from tests.system.pair import VERSIONS, Pair
from tests.system.pair import pair as make_pair
from tests.system.waiting import wait_until

SCRIPT = 'require "fileinto";\r\nfileinto "Work";\r\n'


@pytest.fixture(params=VERSIONS)
def every_pair(request: pytest.FixtureRequest) -> Pair:
    names = {"2.3": "pair_23", "2.4": "pair_24", "2.3-hosts": "pair_23_hosts"}
    nodes: Pair = request.getfixturevalue(names[request.param])
    nodes.reset()
    return nodes


def sync(node: Node, other: Node, user: str) -> int:
    done = node.doveadm("sync", "-u", user, "-l", "10", "-T", "20", node.peer_destination(other))
    return done.returncode


def fill(node: Node, user: str) -> None:
    node.deliver(user, message("by lmtp"))
    with node.imap(user) as imap:
        ok(imap.create("Work"))
        ok(imap.subscribe("Work"))
        ok(imap.append("Work", r"(\Seen $Label)", "", message("by append")))


def test_a_sync_makes_the_nodes_equal(every_pair: Pair) -> None:
    a, b = every_pair
    (user,) = every_pair.fresh_users()
    assert snapshot(a, user) == EMPTY
    fill(a, user)
    before = snapshot(a, user)
    assert set(before.mailboxes) == {"INBOX", "Work"}
    assert before.subscriptions == {"Work"}
    (mail,) = before.mailboxes["Work"].messages.values()
    assert mail == (("$Label", "\\Seen"), "<by.append@example.org>")
    assert "INBOX: only on a" in diff(before, snapshot(b, user))
    assert sync(a, b, user) == 0
    assert snapshot(b, user) == snapshot(a, user) == before
    wait_until_equal(a, b, [user], timeout=0)


def test_snapshots_tell_flags_apart(pair_23: Pair) -> None:
    a, b = pair_23
    pair_23.reset()
    (user,) = pair_23.fresh_users()
    fill(a, user)
    assert sync(a, b, user) == 0
    with b.imap(user) as imap:
        ok(imap.select("Work"))
        ok(imap.store("1", "+FLAGS", r"\Flagged"))
    assert diff(snapshot(a, user), snapshot(b, user)) == (
        "Work: uid 1: <by.append@example.org> ($Label \\Seen) on a, "
        "<by.append@example.org> ($Label \\Flagged \\Seen) on b"
    )


def test_every_protocol_answers(every_pair: Pair) -> None:
    (user,) = every_pair.fresh_users()
    for node in every_pair:
        node.deliver(user, message(f"on {node.name}"))
        with node.pop3(user) as pop3:
            assert pop3.stat()[0] == 1
        with node.sieve(user) as sieve:
            sieve.put("filter", SCRIPT)
            sieve.activate("filter")
            assert sieve.scripts() == {"filter": True}
            assert sieve.get("filter") == SCRIPT
        with node.imap(user) as imap:
            imap.setmetadata("INBOX", "/private/comment", 'a "note"')
            assert imap.getmetadata("INBOX", "/private/comment") == 'a "note"'
            ok(imap.create("Work"))
            ok(imap.setacl("Work", "carol@example.org", "lr"))
            assert b"carol@example.org" in ok(imap.getacl("Work"))[0]
        node.deliver(user, message("filtered"))
        assert len(snapshot(node, user).mailboxes["Work"].messages) == 1


def test_attributes_and_scripts_are_synced(every_pair: Pair) -> None:
    a, b = every_pair
    (user,) = every_pair.fresh_users()
    fill(a, user)
    with a.imap(user) as imap:
        imap.setmetadata("Work", "/private/comment", "note")
    with a.sieve(user) as sieve:
        sieve.put("filter", SCRIPT)
        sieve.activate("filter")
    assert sync(a, b, user) == 0
    with b.imap(user) as imap:
        assert imap.getmetadata("Work", "/private/comment") == "note"
    with b.sieve(user) as sieve:
        assert sieve.scripts() == {"filter": True}


def test_nodes_have_their_own_names_and_logs(every_pair: Pair) -> None:
    for node in every_pair:
        assert node.doveadm("-D", "user", "nobody@example.org").returncode == 67
        assert node.doveadm("who").returncode == 0
    (user,) = every_pair.fresh_users()
    for node in every_pair:
        node.deliver(user, message("logged"))
        (file,) = (node.maildir(user) / "new").iterdir()
        assert f".{node.name}," in file.name
        wait_until(partial(is_logged, node, user), 10, f"{user} in the log of {node.name}")


def is_logged(node: Node, text: str) -> bool:
    return any(text in line for line in node.dovecot_log())


def test_users_are_replaced(every_pair: Pair) -> None:
    (old,) = every_pair.fresh_users()
    new = every_pair.fresh_users(2)
    for node in every_pair:
        assert sorted(node.doveadm("user", "*").stdout.split()) == new
        assert node.doveadm("user", old).returncode == 67


def test_a_cut_network_fails_a_sync(pair_24: Pair) -> None:
    a, b = pair_24
    pair_24.reset()
    assert isinstance(b, Host)
    (user,) = pair_24.fresh_users()
    fill(a, user)
    b.cut()
    assert sync(a, b, user) == 75
    with b.imap(user) as imap:
        assert imap.noop()[0] == "OK"
    b.heal()
    assert sync(a, b, user) == 0
    assert diff(snapshot(a, user), snapshot(b, user)) == ""


@pytest.mark.parametrize(
    "storage",
    [
        MailStorage(layout="fs"),
        MailStorage(separate_index=True),
        MailStorage(driver="sdbox"),
        MailStorage(driver="mdbox", extra="mdbox_rotate_size = 1M"),
    ],
    ids=["fs", "index", "sdbox", "mdbox"],
)
def test_other_storage(pair: Pair, storage: MailStorage) -> None:
    a, b = pair
    try:
        for node in pair:
            node.configure(storage)
        (user,) = pair.fresh_users()
        fill(a, user)
        assert sync(a, b, user) == 0
        assert snapshot(b, user) == snapshot(a, user) != EMPTY
        assert (a.index_root(user) / "dovecot.list.index.log").exists()
    finally:
        for node in pair:
            node.configure(MailStorage())


def test_daemons_are_started_and_ended(every_pair: Pair) -> None:
    every_pair.fresh_users()
    every_pair.start_daemons()
    for node in every_pair:
        first = node.daemon_pid()
        assert first is not None
        assert any("started" in line for line in node.daemon_log())
        node.kill_daemon()
        assert node.daemon_pid() is None
        node.start_daemon('[sync]\nsettle = "50ms"\n' + every_pair.peer_table(node))
        assert node.daemon_pid() not in (None, first)
        node.stop_daemon()
        assert node.daemon_pid() is None
        with pytest.raises(RuntimeError, match="destination"):
            node.start_daemon('[[peer]]\nname = "b"\n')


def test_two_pairs_do_not_collide(pair_23: Pair, pair_24: Pair) -> None:
    for version, running in (("2.3", pair_23), ("2.4", pair_24)):
        running.reset()
        with make_pair(version) as other:
            (user,) = other.fresh_users()
            other.a.deliver(user, message("elsewhere"))
            assert sync(other.a, other.b, user) == 0
            assert not running.a.has_inbox(user)
        assert running.a.doveadm("who").returncode == 0
        assert running.b.doveadm("who").returncode == 0
