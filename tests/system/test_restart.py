"""The daemon is killed, mail goes on; users come; mail lies elsewhere."""

from __future__ import annotations

import pytest

from tests.system.clients import message, ok
from tests.system.dovecot_conf import MailStorage
from tests.system.mailstate import snapshot, wait_until_equal
from tests.system.pair import Pair
from tests.system.syncs import count, syncs, wait_first_passes, wait_quiet


def test_what_changed_while_the_daemon_was_down_and_nothing_else_is_synced(pair: Pair) -> None:
    users = pair.fresh_users(5)
    for user in users:
        pair.a.deliver(user, message("first"))
        with pair.a.imap(user) as imap:
            ok(imap.create("Old"))
            ok(imap.append("Old", "", "", message("old")))
    pair.start_daemons()
    wait_first_passes(pair, users)
    wait_until_equal(pair.a, pair.b, users)
    wait_quiet(pair, 4.0)
    pair.a.kill_daemon()

    mail, flag, renamed, tree, _ = users
    pair.a.deliver(mail, message("while it was down"))
    with pair.a.imap(flag) as imap:
        ok(imap.select("Old"))
        ok(imap.store("1", "+FLAGS", r"(\Flagged)"))
    with pair.a.imap(renamed) as imap:
        ok(imap.rename("Old", "New"))
    with pair.a.imap(tree) as imap:
        ok(imap.delete("Old"))
        ok(imap.create("Old"))
    pair.a.start_daemon(pair.peer_table(pair.a))

    wait_until_equal(pair.a, pair.b, users)
    wait_quiet(pair, 4.0)
    found = {sync.user: sync.reason for sync in reversed(syncs(pair.a))}
    assert set(found) == {mail, flag, renamed, tree}
    assert found[mail] == "new mail"
    assert found[flag] == "flags"
    # A renamed folder takes its log along, with all its history.
    assert found[renamed] == "rename"


def test_a_change_just_before_the_kill_is_not_lost(pair: Pair) -> None:
    users = pair.fresh_users(3)
    pair.start_daemons('[sync]\nsettle = "3s"\nsettle_low = "3s"\nlongest_wait = "10s"\n')
    wait_first_passes(pair, users)
    for user in users:
        with pair.a.imap(user) as imap:
            ok(imap.create("Late"))
    # Seen, queued, and not yet due: on disk, or found again in the logs.
    pair.a.kill_daemon()
    pair.a.start_daemon(pair.peer_table(pair.a))
    wait_until_equal(pair.a, pair.b, users)


def test_users_who_come_while_the_daemons_run(pair: Pair) -> None:
    pair.fresh_users()
    pair.start_daemons()
    (user,) = pair.fresh_users()
    pair.a.deliver(user, message("the first thing of this user"))
    wait_until_equal(pair.a, pair.b, [user])
    with pair.b.imap(user) as imap:
        ok(imap.select("INBOX"))
        ok(imap.store("1", "+FLAGS", r"(\Seen)"))
    wait_until_equal(pair.a, pair.b, [user])
    assert snapshot(pair.a, user).mailboxes["INBOX"].messages[1].flags == ("\\Seen",)


def test_without_the_socket_the_program_is_run(pair: Pair) -> None:
    (user,) = pair.fresh_users()
    pair.start_daemons('[dovecot]\nsocket = "/nonexistent"\n')
    wait_first_passes(pair, [user])
    for node in pair:
        node.deliver(user, message(f"on {node.name}"))
        wait_until_equal(pair.a, pair.b, [user])
    with pair.a.imap(user) as imap:
        ok(imap.select("INBOX"))
        ok(imap.store("1", "+FLAGS", r"(\Flagged)"))
    wait_until_equal(pair.a, pair.b, [user])
    for node in pair:
        assert any("/nonexistent: No such file" in line for line in node.daemon_log())
        assert {sync.outcome for sync in syncs(node)} == {"ok"}
    # The state comes back this way too.
    assert syncs(pair.a)[-1].kind == "stateful"


def test_a_peer_that_is_down_when_the_daemon_starts(pair: Pair) -> None:
    users = pair.fresh_users(6)
    for user in users:
        pair.a.deliver(user, message("waiting"))
    pair.a.start_daemon(
        f'[[peer]]\nname = "nobody"\ndestination = "tcp:{pair.b.address}:9"\n' + pair.peer_table(pair.a)
    )
    # One peer that refuses does not hold up the other one, and is one line, not one for each user.
    pair.b.start_daemon(pair.peer_table(pair.b))
    wait_until_equal(pair.a, pair.b, users, timeout=20)
    lines = [line for line in pair.a.daemon_log() if "peer nobody can't be used" in line]
    assert len(lines) == 1
    # 2.3 closes the connection without a word.
    assert "refused" in lines[0] or pair.a.version == "2.3"


STORAGES = {
    "fs": MailStorage(layout="fs"),
    "index elsewhere": MailStorage(separate_index=True),
    "fs, index elsewhere": MailStorage(layout="fs", separate_index=True),
    "sdbox": MailStorage(driver="sdbox"),
    "mdbox": MailStorage(driver="mdbox"),
}


@pytest.mark.parametrize("name", STORAGES)
def test_other_layouts(pair: Pair, name: str) -> None:
    for node in pair:
        node.configure(STORAGES[name])
    try:
        (user,) = pair.fresh_users()
        pair.a.deliver(user, message("first"))
        with pair.a.imap(user) as imap:
            ok(imap.create("Top/Sub"))
            ok(imap.append("Top/Sub", "", "", message("below")))
        pair.start_daemons()
        wait_first_passes(pair, [user])
        wait_until_equal(pair.a, pair.b, [user])
        wait_quiet(pair, 4.0)
        for node in pair:
            before = count(pair)
            with node.imap(user) as imap:
                ok(imap.select("Top/Sub"))
                ok(imap.store("1", "+FLAGS", f"(From-{node.name})"))
            wait_until_equal(pair.a, pair.b, [user])
            wait_quiet(pair, 3.0)
            assert count(pair) - before == {user: 1}
        with pair.b.imap(user) as imap:
            ok(imap.rename("Top/Sub", "Top/Else"))
        wait_until_equal(pair.a, pair.b, [user])
        assert "Top/Else" in snapshot(pair.a, user).mailboxes
    finally:
        for node in pair:
            node.stop_daemon()
            node.configure(MailStorage())
