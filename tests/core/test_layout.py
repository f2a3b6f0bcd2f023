"""Templates, locations and the shape of index trees. The expected values are what Dovecot 2.3.19.1 and
2.4.1 answered for the same input."""

from __future__ import annotations

import random

import pytest

from dovesyncd.core import layout
from dovesyncd.core.layout import Location, Place, UnknownLocation, UnknownVariable, UnusablePath

USER = "abc.d@x"


@pytest.mark.parametrize(
    "template, expected",
    [
        ("/mail/%d/%n", "/mail/x/abc.d"),
        ("/mail/%u", "/mail/abc.d@x"),
        ("%h/Maildir", "/home/a/Maildir"),
        ("/%Un/%Ln/%LUn/%Rn", "/ABC.D/abc.d/ABC.D/d.cba"),
        ("/%{username}/%{domain}/%{user}", "/abc.d/x/abc.d@x"),
        ("/%L{user}", "/abc.d@x"),
        ("/%1n/%1.1n/%0.1n/%1.2d", "/a/b/a/"),
        ("/%Mu", "/c562f2ef27cca743980431508b1d35e4"),
        ("/%2.256Nu/%1Nu/%Nu", "/43/0/27cca743"),
        ("/%1.2Hu/%Hu/%3.16Hu", "/0/7864818/008"),
        ("100%%", "100%"),
        ("/%{user|domain}/%{user | username}", "/x/abc.d"),
        ("/%{ user | username | upper }", "/ABC.D"),
        ("%{home}/Maildir", "/home/a/Maildir"),
        ("/%{owner_user}", "/abc.d@x"),
        ("/%{user | substr(0, 2)}/%{user | substr(4)}", "/ab/d@x"),
        ("/%{user | domain | default('none')}", "/x"),
    ],
)
def test_expand(template: str, expected: str) -> None:
    assert layout.expand(template, user=USER, home="/home/a") == expected


def test_a_name_without_a_domain() -> None:
    assert layout.expand("/%d/%n/%{user | domain | default('none')}", user="abc") == "//abc/none"


def test_only_the_first_at_sign_parts() -> None:
    assert layout.expand("%n %d %{user | username} %{user | domain}", user="a@b@c") == "a b@c a b@c"


def test_case_is_changed_in_ascii_only_and_width_counts_bytes() -> None:
    assert layout.expand("%Ln", user="ÄB") == "Äb"
    assert layout.expand("%1n", user="Äb") == "\udcc3"
    assert layout.expand("/%u", user="a\udcff") == "/a\udcff"


@pytest.mark.parametrize(
    "template",
    [
        "%", "%q", "%{pid}", "%09n", "%-2n", "%{user | nosuch}", "%{", "%L", "%h", "%{home}", "%Xu",
        "%{user | substr(0, 99)}", "%{user | md5 % 256}", "%{}", "%{user | }", "%{userdb:x}",
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(template: str) -> None:
    with pytest.raises(UnknownVariable) as caught:
        layout.expand(f"/a/{template}", user=USER, home="")
    assert caught.value.variable.startswith("%")
    assert template.startswith(caught.value.variable)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("maildir:~/Maildir", Location("maildir", "~/Maildir")),
        ("maildir:~/Maildir:LAYOUT=fs", Location("maildir", "~/Maildir", layout="fs")),
        (
            "maildir:/m:INDEX=/i/x/a:CONTROL=/c:INBOX=/b:UTF-8",
            Location("maildir", "/m", index="/i/x/a", inbox="/b"),
        ),
        ("sdbox:/m/a::b:INDEX=/i::j", Location("sdbox", "/m/a:b", index="/i:j")),
        ("mdbox:~/mdbox:INDEX=MEMORY", Location("mdbox", "~/mdbox", index="MEMORY")),
        ("", Location()),
        ("auto:", Location()),
        ("auto:~/Mail", Location(root="~/Mail")),
        ("/var/mail/a", Location(root="/var/mail/a")),
    ],
)
def test_parse_location(text: str, expected: Location) -> None:
    assert layout.parse_location(text) == expected


@pytest.mark.parametrize(
    "location, root",
    [
        (Location("maildir", "~/Maildir"), "/h/Maildir"),
        (Location("maildir", "~/Maildir/"), "/h/Maildir"),
        (Location("maildir", "~"), "/h"),
        (Location("maildir", "/m//a/./b"), "/m/a/b"),
        (Location("maildir", "//m"), "/m"),
        (Location("mdbox", "~/mdbox", index="~/idx"), "/h/idx"),
        (Location("sdbox"), "/h/sdbox"),
        (Location("mdbox"), "/h/mdbox"),
    ],
)
def test_index_root(location: Location, root: str) -> None:
    assert layout.index_root(location, "/h") == root


@pytest.mark.parametrize(
    "location, home, error, words",
    [
        (Location("maildir", "/m", index="MEMORY"), "/h", UnusablePath, "memory"),
        (Location("maildir", "Maildir"), "/h", UnusablePath, "not absolute"),
        (Location("maildir", "~/Maildir"), "", UnusablePath, "home"),
        (Location("maildir", "~root/Maildir"), "/h", UnusablePath, "not absolute"),
        (Location("maildir", "/m/../etc"), "/h", UnusablePath, "'..'"),
        (Location("maildir", "/m/a\nb"), "/h", UnusablePath, "control"),
        (Location("", "/m"), "/h", UnknownLocation, "by itself"),
        (Location(), "/h", UnknownLocation, "by itself"),
        (Location("imapc"), "/h", UnknownLocation, "by itself"),
    ],
)
def test_no_index_root(location: Location, home: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        layout.index_root(location, home)


@pytest.mark.parametrize(
    "inbox, index, expected",
    [
        ("", "", ""),
        ("~/Maildir/.INBOX", "", ""),
        ("~/Maildir", "", ""),
        ("~/elsewhere", "", "/h/elsewhere"),
        ("~/Maildir2", "", "/h/Maildir2"),
        ("/b/inbox", "", "/b/inbox"),
        ("/b/inbox", "/i", ""),
        (".", "", ""),
    ],
)
def test_inbox_directory(inbox: str, index: str, expected: str) -> None:
    location = Location("maildir", "~/Maildir", inbox=inbox, index=index)
    assert layout.inbox_directory(location, "/h") == expected


@pytest.mark.parametrize(
    "path, place",
    [
        ("/m/Maildir/.probe", Place("/m/Maildir", "maildir++", "maildir")),
        ("/m/Maildir/probe", Place("/m/Maildir", "fs")),
        ("/m/Maildir/probe/ddir", Place("/m/Maildir", "fs")),
        ("/m/sdbox/mailboxes/probe/dbox-Mails", Place("/m/sdbox", "fs", "dbox")),
        ("/i/a@x/mailboxes/probe", Place("/i/a@x", "fs", "dbox")),
        ("/m/probe/Maildir/.probe", Place("/m/probe/Maildir", "maildir++", "maildir")),
        ("/m/mailboxes/6833bd1559f1026b9140000083ecc375", Place("/m", "index", "dbox")),
        ("/probe", Place("/", "fs")),
    ],
)
def test_parse_index_path(path: str, place: Place) -> None:
    assert layout.parse_index_path(path, "probe") == place


@pytest.mark.parametrize("path", ["", "_filter_name/probe", "/m/other", "%h/.probe", "/m/../probe"])
def test_an_answer_that_tells_nothing(path: str) -> None:
    with pytest.raises(UnusablePath):
        layout.parse_index_path(path, "probe")


ENTERED = {
    ("maildir", "maildir++"): [
        b".Foo",
        b".Foo.Bar",
        b".INBOX",
        b".Projects.tmp",
        b".Door.lock",
        b".dovecot-mailbox",
        b".\xff",
    ],
    ("maildir", "fs"): [b"Foo", b"Foo/Bar", b"INBOX", b"Foo/Bar/ddir", b"sieve", b"storage", b".Foo"],
    ("sdbox", "fs"): [
        b"mailboxes",
        b"mailboxes/INBOX/dbox-Mails",
        b"mailboxes/Foo/Bar",
        b"mailboxes/storage",
    ],
    ("mdbox", "fs"): [b"mailboxes", b"mailboxes/INBOX/dbox-Mails", b"mailboxes/.x", b"mailboxes/cur"],
    ("mdbox", "index"): [b"mailboxes", b"mailboxes/6833bd1559f1026b9140000083ecc375"],
    ("", "fs"): [b"mailboxes", b"Foo/Bar"],
}
PASSED_BY = {
    ("maildir", "maildir++"): [
        b"cur",
        b"new",
        b"tmp",
        b"Foo",
        b".Foo/cur",
        b".Foo/.Bar",
        b"..DOVECOT-TRASHED",
    ],
    ("maildir", "fs"): [b"cur", b"Foo/new", b"Foo/Bar/tmp", b"..DOVECOT-TRASHED", b"Foo/.."],
    ("sdbox", "fs"): [b"mailboxes/INBOX/dbox-Mails/x", b"sieve", b".trash", b""],
    ("mdbox", "fs"): [b"storage", b"mailboxes/INBOX/dbox-Mails/storage"],
    ("", "fs"): [b"cur", b"mailboxes/a/dbox-Mails/x"],
}


@pytest.mark.parametrize("driver, shape", ENTERED)
def test_directories_that_are_entered(driver: str, shape: str) -> None:
    for relative in ENTERED[driver, shape]:
        assert layout.descend(driver, shape, relative), relative


@pytest.mark.parametrize("driver, shape", PASSED_BY)
def test_directories_that_are_passed_by(driver: str, shape: str) -> None:
    for relative in PASSED_BY[driver, shape]:
        assert not layout.descend(driver, shape, relative), relative


@pytest.mark.parametrize("name", ["a", "a@x", "Ä@x", "a b", "a..b@x", ".a", "a\udcff"])
def test_names_that_are_taken(name: str) -> None:
    assert layout.unsafe_name(name) is None


@pytest.mark.parametrize(
    "name", ["", "*", "a*", "a?@x", "-a", "--", "a\n", "a\tb", "\x7f", "a/b", "..", "a@..", "../a", ".@x"]
)
def test_names_that_are_refused(name: str) -> None:
    assert layout.unsafe_name(name)


@pytest.mark.parametrize(
    "name, pattern, expected",
    [
        ("a@x", "a@x", True),
        ("a@x", "A@X", True),
        ("a@x", "*@x", True),
        ("a@x", "*", True),
        ("a@xy", "*@x", False),
        ("ba@x", "a@x", False),
        ("a@x", "?@x", True),
        ("ab@x", "?@x", False),
        ("a[b]@x", "a[b]@x", True),
        ("ab@x", "a[b]@x", False),
        ("a.b", "a?b", True),
        ("a\nb", "a*b", True),
        ("abcabc", "*abc", True),
        ("", "*", True),
        ("", "", True),
        ("a", "", False),
    ],
)
def test_matches(name: str, pattern: str, expected: bool) -> None:
    assert layout.matches(name, ["nobody", pattern]) is expected


def test_matches_agrees_with_the_definition() -> None:
    def defined(name: str, pattern: str) -> bool:
        if not pattern:
            return not name
        if pattern[0] == "*":
            return any(defined(name[cut:], pattern[1:]) for cut in range(len(name) + 1))
        return bool(name) and pattern[0] in ("?", name[0]) and defined(name[1:], pattern[1:])

    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    for _ in range(3000):
        name = "".join(chance.choices("ab", k=chance.randrange(8)))
        pattern = "".join(chance.choices("ab*?", k=chance.randrange(7)))
        assert layout.matches(name, [pattern]) is defined(name, pattern), (name, pattern)


def test_a_pattern_of_many_stars_ends() -> None:
    # Exponential in a matcher that tries every way.
    assert not layout.matches("a" * 300, ["*a" * 60 + "b"])
