"""Finding users and their index files, against a doveadm that is played and programs that misbehave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Optional

import pytest

from dovesyncd import userdb
from dovesyncd.core.doveconf import DovecotSettings
from dovesyncd.core.errors import DovecotError
from dovesyncd.core.model import LogLine, Reply
from dovesyncd.userdb import Account, Accounts

SETTINGS = DovecotSettings("2.3.19.1", (2, 3), "/run/dovecot", 500, 100, mail_location="maildir:~/Maildir")


def fields(name: str, **more: str) -> dict[str, str]:
    return {"uid": "1000", "gid": "1000", "home": f"/m/{name}", "mail": "maildir:~/Maildir", **more}


class PlayedDoveadm:
    """Answers as doveadm-server does. ``known`` are the userdb's users; ``paths`` the index paths of
    folders by user, a function of Dovecot's own settings where a user has none; None stands for a failure."""

    def __init__(
        self,
        known: Mapping[str, Optional[Mapping[str, str]]],
        paths: Mapping[str, Optional[str]] = {},
    ) -> None:
        self.known = known
        self.paths = paths
        self.calls: list[tuple[str, str, tuple[str, ...]]] = []
        self.busy = self.most_busy = 0

    async def run(self, user: str, command: str, args: Sequence[str], *, deadline: float) -> Reply:
        assert deadline > asyncio.get_running_loop().time()
        self.calls.append((user, command, tuple(args)))
        self.busy += 1
        self.most_busy = max(self.busy, self.most_busy)
        await asyncio.sleep(0)
        self.busy -= 1
        if command == "mailbox path":
            return self._path(user, args)
        assert (user, command) == ("", "user")
        if any("*" in name or "?" in name for name in args):
            return Reply(0, (json.dumps({"userList": list(self.known)}),))
        answer = {
            name: self.known.get(name, {"error": f"userdb lookup: user {name} doesn't exist"})
            for name in args
        }
        return Reply(0, (json.dumps({name: found or {} for name, found in answer.items()}),))

    def _path(self, user: str, args: Sequence[str]) -> Reply:
        option, kind, mailbox = args
        assert (option, kind) == ("-t", "index")
        path = self.paths.get(user, f"/m/{user}/Maildir/.{mailbox}")
        if path is None:
            return Reply(75, log=(LogLine("error", "Namespace: broken"),))
        return Reply(0, (path.format(mailbox),))

    def count(self, command: str) -> int:
        return sum(call[1] == command for call in self.calls)


async def ask(doveadm: userdb.Doveadm, settings: DovecotSettings = SETTINGS, **options: object) -> Accounts:
    return await userdb.accounts(doveadm, settings, **options)  # type: ignore[arg-type]


async def test_one_user() -> None:
    doveadm = PlayedDoveadm({"a@x": fields("a@x")})
    result = await ask(doveadm)
    assert list(result.accounts.values()) == [
        Account(userdb.User("a@x"), "/m/a@x", 1000, "/m/a@x/Maildir", "maildir", "maildir++")
    ]
    assert (result.problems, result.skipped, result.aliases) == ([], {}, {})


async def test_ten_thousand_users_take_few_calls() -> None:
    doveadm = PlayedDoveadm({f"u{number}@x": fields(f"u{number}@x") for number in range(10_000)})
    result = await ask(doveadm)
    assert len(result.accounts) == 10_000
    assert (doveadm.count("user"), doveadm.count("mailbox path")) == (1 + 50, 1)


async def test_no_users() -> None:
    assert await ask(PlayedDoveadm({})) == Accounts()


async def test_a_static_list_is_not_listed_and_becomes_canonical() -> None:
    doveadm = PlayedDoveadm({"A@X": fields("a@x", user="a@x"), "a@x": fields("a@x"), "b@x": fields("b@x")})
    result = await ask(doveadm, names=["A@X", "a@x", "nobody"])
    assert list(result.accounts) == ["a@x"]
    assert [call[2] for call in doveadm.calls if call[1] == "user"] == [("A@X", "a@x", "nobody")]
    assert result.problems == ["left out user 'nobody': userdb lookup: the user doesn't exist"]


async def test_include_and_exclude() -> None:
    doveadm = PlayedDoveadm({name: fields(name) for name in ("a@x", "b@x", "a@y", "A2@x")})
    result = await ask(doveadm, include=["a*@x", "b@*"], exclude=["B@X"])
    assert set(result.accounts) == {"a@x", "A2@x"}


async def test_an_exclusion_holds_for_the_canonical_name() -> None:
    doveadm = PlayedDoveadm({"alias@x": fields("real@x", user="real@x")})
    assert (await ask(doveadm, exclude=["real@*"])).skipped == {"real@x": "excluded by the configuration"}


@pytest.mark.parametrize(
    "value, kept", [("", 0), ("yes", 0), ("y", 0), ("1", 0), ("no", 1), ("N", 1), ("0", 1)]
)
async def test_noreplicate(value: str, kept: int) -> None:
    result = await ask(PlayedDoveadm({"a": fields("a", noreplicate=value)}))
    assert len(result.accounts) == kept
    assert bool(result.skipped) is not bool(kept)


async def test_mail_replica_means_nothing() -> None:
    assert len((await ask(PlayedDoveadm({"a": fields("a", mail_replica="tcp:b")}))).accounts) == 1


async def test_system_users_and_users_without_a_home() -> None:
    known = {
        "daemon": fields("daemon", uid="1"),
        "root": fields("root", uid="root"),
        "homeless": fields("homeless", home=""),
        "first": fields("first", uid="500"),
        "named": fields("named", uid="no-such-user"),
    }
    result = await ask(PlayedDoveadm(known))
    assert set(result.accounts) == {"first", "named"}
    assert set(result.skipped) == {"daemon", "root", "homeless"}
    assert result.accounts[userdb.User("named")].uid is None


HOSTILE = ["*", "a*", "?", "-a", "a\nb", "a\tb", "../b", "a@..", "", "a/b"]


async def test_hostile_names_never_reach_dovecot() -> None:
    doveadm = PlayedDoveadm({name: fields("x") for name in [*HOSTILE, "good"]})
    result = await ask(doveadm)
    assert list(result.accounts) == ["good"]
    asked = {argument for call in doveadm.calls[1:] for argument in (call[0], *call[2])}
    assert not asked & (set(HOSTILE) - {""})
    assert all(any(repr(name) in problem for problem in result.problems) for name in HOSTILE)


async def test_a_static_list_of_hostile_names_asks_for_nobody() -> None:
    doveadm = PlayedDoveadm({"good": fields("good")})
    assert (await ask(doveadm, names=HOSTILE)).accounts == {}
    assert doveadm.calls == []


async def test_a_hostile_canonical_name() -> None:
    result = await ask(PlayedDoveadm({"a": fields("a", user="../../b")}))
    assert (result.accounts, len(result.problems)) == ({}, 1)


@pytest.mark.parametrize("wrong", [{"home": "relative"}, {"home": "/m/../etc"}, {"mail": "maildir:rel"}])
async def test_a_bad_path_is_one_users_problem(wrong: dict[str, str]) -> None:
    result = await ask(PlayedDoveadm({"a": fields("a", **wrong), "b": fields("b")}))
    assert list(result.accounts) == ["b"]
    assert len(result.problems) == 1
    assert "'a'" in result.problems[0]


async def test_indexes_in_memory_are_said_once() -> None:
    known = {f"u{number}": fields("u", mail="maildir:~/Maildir:INDEX=MEMORY") for number in range(7)}
    result = await ask(PlayedDoveadm(known))
    assert result.problems == [
        "left out users 'u0', 'u1', 'u2', 'u3', 'u4' and 2 more: indexes in memory can't be replicated"
    ]


async def test_users_that_cannot_be_looked_up() -> None:
    # 2.3 prints nothing about a user whose lookup failed, 2.4 an error.
    result = await ask(PlayedDoveadm({"a": None, "b": {"error": "userdb lookup: failed"}, "c": fields("c")}))
    assert list(result.accounts) == ["c"]
    assert len(result.problems) == 2


async def test_a_system_user_that_dovecot_refuses() -> None:
    said = (
        "userdb lookup: Mail access for users with UID 2 not permitted (see first_valid_uid in config file)"
    )
    result = await ask(PlayedDoveadm({"bin": {"error": said}}))
    assert (result.problems, result.skipped) == ([], {"bin": said})


async def test_a_layout_that_has_no_path_before_there_is_mail() -> None:
    result = await ask(PlayedDoveadm({"a": fields("a", mail="sdbox:~/sdbox:LAYOUT=index")}, {"a": None}))
    assert (result.accounts[userdb.User("a")].layout, result.problems) == ("index", [])


async def test_one_mail_of_several_users() -> None:
    known = {name: fields("shared") for name in ("longer@x", "b@x", "a@x")}
    result = await ask(PlayedDoveadm(known, dict.fromkeys(known, "/m/shared/Maildir/.{}")))
    assert list(result.accounts) == ["a@x"]
    assert result.aliases == {"b@x": "a@x", "longer@x": "a@x"}
    assert result.problems == [
        "left out users 'b@x', 'longer@x': the mail is that of user 'a@x', /m/shared/Maildir"
    ]


async def test_a_variable_that_only_dovecot_knows() -> None:
    settings = DovecotSettings("", (2, 3), "/run/dovecot", 500, 100, mail_location="maildir:/m/%{userdb:x}")
    known = {f"u{number}": fields("u", mail="maildir:/m/%{userdb:x}") for number in range(9)}
    doveadm = PlayedDoveadm(known, {name: f"/m/of-{name}/.{{}}" for name in known} | {"u8": None})
    result = await ask(doveadm, settings)
    assert {user: account.index_root for user, account in result.accounts.items()} == {
        f"u{number}": f"/m/of-u{number}" for number in range(8)
    }
    assert result.problems == ["left out user 'u8': Namespace: broken"]
    assert 1 < doveadm.most_busy <= 4


async def test_no_location_at_all() -> None:
    settings = DovecotSettings("", (2, 3), "/run/dovecot", 500, 100)
    known = {"a": fields("a", mail=""), "b": fields("b", mail="")}
    paths = {"a": "/m/a/mdbox/mailboxes/{}/dbox-Mails", "b": "/m/b/Maildir/.{}"}
    found = (await ask(PlayedDoveadm(known, paths), settings)).accounts
    assert {user: (one.index_root, one.driver, one.layout) for user, one in found.items()} == {
        "a": ("/m/a/mdbox", "dbox", "fs"),
        "b": ("/m/b/Maildir", "maildir", "maildir++"),
    }


async def test_dovecot_is_believed_where_it_differs() -> None:
    known = {name: fields(name) for name in ("a", "b", "c")}
    doveadm = PlayedDoveadm(known, {name: f"/other/{name}/{{}}" for name in known})
    result = await ask(doveadm)
    assert {one.index_root for one in result.accounts.values()} == {"/other/a", "/other/b", "/other/c"}
    assert {one.layout for one in result.accounts.values()} == {"fs"}
    assert len(result.problems) == 1
    assert "dovecot.index_root" in result.problems[0]


async def test_only_the_layout_differs() -> None:
    known = {f"u{number}": fields(f"u{number}") for number in range(50)}
    doveadm = PlayedDoveadm(known, {name: f"/m/{name}/Maildir/{{}}" for name in known})
    result = await ask(doveadm)
    assert {one.layout for one in result.accounts.values()} == {"fs"}
    assert doveadm.count("mailbox path") == 1
    assert result.problems == []


async def test_the_first_users_cannot_be_asked_about() -> None:
    known = {name: fields(name) for name in ("a", "b", "c", "d")}
    found_out = await ask(PlayedDoveadm(known, {"a": None, "b": None}))
    assert (len(found_out.accounts), found_out.problems) == (4, [])
    trusted = await ask(PlayedDoveadm(known, {"a": None, "b": None, "c": None}))
    assert len(trusted.accounts) == 4
    assert len(trusted.problems) == 1


async def test_kinds_are_compared_apart() -> None:
    known = {
        "a": fields("a"),
        "b": fields("b", mail="maildir:~/Maildir:LAYOUT=fs"),
        "c": fields("c", mail="mdbox:~/mdbox"),
        "d": fields("d", mail="sdbox:~/sdbox:INDEX=/i/d"),
    }
    paths = {
        "b": "/m/b/Maildir/{}",
        "c": "/m/c/mdbox/mailboxes/{}/dbox-Mails",
        "d": "/i/d/mailboxes/{}",
    }
    result = await ask(PlayedDoveadm(known, paths))
    assert result.problems == []
    assert {user: (one.index_root, one.driver, one.layout) for user, one in result.accounts.items()} == {
        "a": ("/m/a/Maildir", "maildir", "maildir++"),
        "b": ("/m/b/Maildir", "maildir", "fs"),
        "c": ("/m/c/mdbox", "mdbox", "fs"),
        "d": ("/i/d", "sdbox", "fs"),
    }


@pytest.mark.parametrize("template", ["/idx/%d/%n", "/idx/%{user | domain}/%{user | username}"])
async def test_the_configured_root_beats_everything(template: str) -> None:
    known = {
        "a@x": fields("a@x"),
        "b@x": fields("b@x", mail="maildir:~/Maildir:INDEX=MEMORY"),
        "c@x": fields("c@x", mail=""),
    }
    result = await ask(PlayedDoveadm(known), index_root=template)
    assert {user: one.index_root for user, one in result.accounts.items()} == {
        "a@x": "/idx/x/a",
        "b@x": "/idx/x/b",
        "c@x": "/idx/x/c",
    }
    assert result.problems == []


async def test_a_configured_root_that_cannot_be_expanded() -> None:
    result = await ask(PlayedDoveadm({"a": fields("a"), "b": fields("b")}), index_root="/%{nosuch}")
    assert result.accounts == {}
    assert len(result.problems) == 1
    assert "%{nosuch}" in result.problems[0]


class BrokenDoveadm:
    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)

    async def run(self, user: str, command: str, args: Sequence[str], *, deadline: float) -> Reply:
        return self.replies.pop(0)


async def test_dovecot_cannot_list() -> None:
    said = (LogLine("error", "auth-master: User listing returned failure"),)
    with pytest.raises(DovecotError, match="User listing returned failure") as caught:
        await ask(BrokenDoveadm(Reply(65, ('{"userList":["a"]}',), said)))
    assert caught.value.hint


@pytest.mark.parametrize("names", [["a"], ["a", "b"]])
async def test_lookups_are_cut_off(names: list[str]) -> None:
    with pytest.raises(DovecotError, match="disconnected"):
        await ask(BrokenDoveadm(Reply(None, failure="disconnected")), names=names)


async def test_text_that_cannot_be_told_apart_is_asked_for_one_by_one() -> None:
    one = ("field\tvalue", "uid\t1000", "gid\t1000", "home\t/m/a", "mail\tmaildir:~/Maildir", "")
    replies = [
        Reply(75, one),
        Reply(0, one),
        Reply(75, ("field\tvalue", ""), (LogLine("error", "lookup failed"),)),
        Reply(0, ("/m/a/Maildir/.dovesyncd-probe",)),
    ]
    result = await ask(BrokenDoveadm(*replies), names=["a", "b"])
    assert list(result.accounts) == ["a"]
    assert result.problems == ["left out user 'b': lookup failed"]


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


async def test_doveconf_gets_the_configuration_file(tmp_path: Path) -> None:
    doveconf = program(
        tmp_path / "doveconf", 'echo "# 2.4.1"; echo "base_dir = /run/x"; echo "mail_path = $*"'
    )
    config = str(tmp_path / "a b;c")
    assert (await userdb.settings(doveconf, config)).paths == {"mail_path": f"-c {config} -a"}
    assert (await userdb.settings(doveconf)).doveadm_socket == "/run/x/doveadm-server"


async def test_doveconf_names_base_dir_only_when_asked(tmp_path: Path) -> None:
    doveconf = program(
        tmp_path / "doveconf", 'if [ "$*" = "-h base_dir" ]; then echo /run/y; else echo "# 2.4.1"; fi'
    )
    assert (await userdb.settings(doveconf)).doveadm_socket == "/run/y/doveadm-server"


async def test_doveconf_does_not_know_base_dir(tmp_path: Path) -> None:
    doveconf = program(tmp_path / "doveconf", 'echo "# 2.4.1"; echo "base_dir = run"')
    with pytest.raises(DovecotError, match="base_dir"):
        await userdb.settings(doveconf)


async def test_doveconf_fails(tmp_path: Path) -> None:
    doveconf = program(tmp_path / "doveconf", "echo 'Fatal: Error in line 7' >&2; exit 89")
    with pytest.raises(DovecotError, match="Error in line 7") as caught:
        await userdb.settings(doveconf)
    assert doveconf in caught.value.hint


async def test_doveconf_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DovecotError, match="No such file"):
        await userdb.settings(str(tmp_path / "doveconf"))


async def test_doveconf_hangs(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    doveconf = program(tmp_path / "doveconf", f"echo $$ > {pid}; exec sleep 1000")
    with pytest.raises(DovecotError, match="did not end"):
        await userdb.settings(doveconf, deadline=0.5)
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()


async def test_doveconf_prints_without_end(tmp_path: Path) -> None:
    doveconf = program(tmp_path / "doveconf", "exec yes mail_path = x")
    with pytest.raises(DovecotError, match="more than"):
        await userdb.settings(doveconf, deadline=30)
