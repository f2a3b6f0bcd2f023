"""Any input at all, and real input damaged, for everything that reads what others have written."""

from __future__ import annotations

import json
import posixpath
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovesyncd.core import classify, doveconf, dsync_state, guids, layout, translog
from dovesyncd.core.doveconf import location_of, parse_doveconf, settings_from
from dovesyncd.core.errors import DovecotError
from dovesyncd.core.model import ChangeKind, Reply
from tests.core.logdata import cases, transaction_logs
from tests.fuzz import checks

fuzzed = settings(deadline=None, print_blob=True, max_examples=60)

cuts = st.lists(st.integers(0, 1 << 16), max_size=8)
offsets = st.integers(0, 1 << 40)
# Text as it comes from bytes, and text that no bytes give.
names = st.binary(max_size=60).map(lambda name: name.decode("utf-8", "surrogateescape"))
texts = st.text(st.characters(), max_size=60)

LOGS = [case.file.read_bytes() for case in transaction_logs()]
MAILBOX_LOGS = sorted({case.file.read_bytes() for case in cases(kind="mailbox")})
READY = b"VERSION\tdoveadm-client\t1\t2\n+\n"
REPLIES = [
    READY + rest
    for rest in (
        b"\0\0\0\0\x0eAQAAAHm4+Jk=\t\n\0\0\0\0\x02+\n",
        b"L\0\0\0\x0b\x04some text\n\0\0\0\0\x09\n-NOUSER\n",
        b'\0\0\0\0\x1c{"userList":["ann","bob"]}\n+\n',
        b"L\0\0\0\x03\x03ab\0\0\0\0\x03a\t\n\0\0\0\0\x02+\nL\0\0\0\x02c\n",
    )
]
# What sizes, types, lengths and separators are made of.
TOKENS = [
    b"\0",
    b"\x80\x80\x80\x82",
    b"\x80\x88\x80\x80",
    b"\xff" * 4,
    b"\0\0\x08\0",
    b"L",
    b"\n",
    b"\t",
    b"\x01",
]


@st.composite
def damaged(draw: Any, originals: list[bytes]) -> bytes:
    """One of the originals with bytes overwritten, put in, taken out, or moved."""
    data = draw(st.sampled_from(originals))
    places = st.integers(0, len(data))
    scraps = st.one_of(st.binary(max_size=12), st.sampled_from(TOKENS))
    for _ in range(draw(st.integers(0, 6))):
        at, other, scrap = draw(places), draw(places), draw(scraps)
        data = draw(
            st.sampled_from(
                [
                    data[:at] + scrap + data[at + len(scrap) :],
                    data[:at] + scrap + data[at:],
                    data[: min(at, other)] + data[max(at, other) :],
                    data[:at] + data[min(at, other) : max(at, other)] + data[at:],
                    data[:at],
                ]
            )
        )
    return data


# Logs -------------------------------------------------------------------------------------------------


@fuzzed
@given(st.one_of(st.binary(max_size=400), damaged(LOGS)), cuts, offsets)
def test_transaction_log(data: bytes, cuts: list[int], base: int) -> None:
    checks.transaction_log(data, cuts, base)


@fuzzed
@given(st.one_of(st.binary(max_size=400), damaged(MAILBOX_LOGS)), cuts, offsets)
def test_mailbox_log(data: bytes, cuts: list[int], base: int) -> None:
    checks.mailbox_log(data, cuts, base)


records = st.builds(
    lambda kind, external, sync, body: translog.Record(0, 8 + len(body), kind, external, sync, body),
    st.one_of(st.integers(0, (1 << 28) - 1), st.integers(0, 27).map(lambda bit: 1 << bit)),
    st.booleans(),
    st.booleans(),
    st.one_of(st.binary(max_size=40), st.lists(st.sampled_from([b"a", b"+pv", b"\0"])).map(b"".join)),
)


@fuzzed
@given(st.lists(records, max_size=20))
def test_news_of_any_records(found: list[translog.Record]) -> None:
    whole = classify.changes(found)
    checks.news(whole)
    one_by_one = classify.News(frozenset())
    for record in found:
        one_by_one |= classify.changes([record])
    assert one_by_one == whole
    assert classify.changes([record._replace(sync=True) for record in found]).kinds == frozenset()


@fuzzed
@given(st.integers(0, 27).map(lambda bit: 1 << bit), st.binary(max_size=40))
def test_no_type_is_passed_over_in_silence(kind: int, body: bytes) -> None:
    """One that this version does not know is a change."""
    known = {value for name, value in vars(translog).items() if name.isupper() and isinstance(value, int)}
    if kind not in known:
        record = translog.Record(0, 8 + len(body), kind, False, False, body)
        assert classify.changes([record]).kinds == {ChangeKind.LOG_GAP}


# What Dovecot says ------------------------------------------------------------------------------------


@fuzzed
@given(st.one_of(st.binary(max_size=200), damaged(REPLIES)), cuts)
def test_reply_stream(data: bytes, cuts: list[int]) -> None:
    checks.reply_stream(data, cuts)


def test_a_reply_stream_keeps_little_of_much() -> None:
    """Packets of 4 GiB, on the channels that are kept and on one that is not."""
    flood = bytes(5 << 20)
    for channel in (0, 1, ord("L")):
        checks.fed(READY + bytes([channel]) + b"\xff" * 4 + flood, range(0, len(flood), 1 << 18))


@fuzzed
@given(st.lists(names, min_size=3, max_size=9))
def test_request(fields: list[str]) -> None:
    checks.request(fields)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
answers = st.one_of(
    texts,
    values.map(json.dumps),
    values.map(lambda value: json.dumps({"userList": value})),
    st.dictionaries(texts, st.dictionaries(texts, values, max_size=3), max_size=3).map(json.dumps),
    st.lists(
        st.one_of(st.sampled_from(["uid\t1", "home\t/h", "user\tann", "field\tvalue", "\t", ""]), texts)
    ).map("\n".join),
)


@fuzzed
@given(answers, st.lists(names, max_size=4))
def test_user_answers(text: str, names: list[str]) -> None:
    # Over the wire come bytes; other code points only as JSON names them.
    checks.user_answers(text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"), names)


@pytest.mark.parametrize(
    "text",
    [
        '{"userList":' + "[" * 100_000,
        '{"userList":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"a":' * 100_000,
        '{"a":{"uid":' + "9" * 100_000 + "}}",
        '{"a":{"uid":' + "[" * 900 + "]" * 900 + "}}",
        '{"userList":["\\ud800", "\\udfff", "\\udc80"]}',
        '{"\\ud800":{"home":"/\\udfff","\\ud900":"x"}}',
        "{" + "\0" * 10,
    ],
    ids=lambda text: text[:20],
)
def test_answers_that_no_dovecot_gives(text: str) -> None:
    checks.user_answers(text, ["a"])


@fuzzed
@given(st.one_of(st.lists(names), st.lists(st.sampled_from(["INBOX", "0" * 32, "a" * 31, "1", ""]))))
def test_identities(output: list[str]) -> None:
    found = guids.parse(output)
    assert all(len(identity.guid) == 32 for identity in found.values())
    assert len(found) <= len(output)
    assert guids.exchanged(found, found, ()) == {}


# States -----------------------------------------------------------------------------------------------

entries = st.dictionaries(
    st.binary(min_size=16, max_size=16), st.binary(min_size=28, max_size=28), max_size=4
)
states = entries.map(lambda found: dsync_state.render({guid: guid + rest for guid, rest in found.items()}))
some_states = st.one_of(
    texts,
    states,
    st.tuples(states, texts).map(lambda both: both[0] + both[1]),
    damaged([b"AQAAAHm4+Jk="]).map(repr),
)


@fuzzed
@given(some_states, some_states)
def test_common_state(one: str, other: str) -> None:
    common = dsync_state.parse(dsync_state.common(one, other))
    assert common is not None
    for state in (one, other):
        assert common.items() <= (dsync_state.parse(state) or common).items()
    assert dsync_state.common(one, other) == dsync_state.common(one, other)
    if dsync_state.parse(one) is not None:
        assert dsync_state.parse(dsync_state.common(one, one)) == dsync_state.parse(one)


# Configuration ----------------------------------------------------------------------------------------

conf_lines = st.one_of(
    texts,
    names,
    st.sampled_from(
        [
            *(
                "# 2.4.1-4",
                "#2.3",
                "# 99999.0",
                "{",
                "}",
                "namespace inbox {",
                'namespace "a b" {',
                "inbox = yes",
            ),
            *(
                "mail_location = maildir:~/%{user}:INDEX=%h",
                "mail_path = %{user|domain",
                "first_valid_uid = ²",
            ),
            *("default_process_limit = " + "9" * 5000, "service doveadm {", "process_limit = -1", "prefix ="),
            *("mail_driver = maildir", 'mail_path = "a\\"b"', 'mail_path = "', "location = ::::"),
        ]
    ),
)


@fuzzed
@given(st.lists(conf_lines, max_size=12), names)
def test_doveconf(lines: list[str], user: str) -> None:
    parse_doveconf("\n".join(lines))
    for version in ("", "# 2.3.19 (x)\n", "# 2.4.1\n"):
        with suppress(DovecotError):
            found = settings_from(version + "\n".join(lines))
            location = location_of(user, {"home": "/home/u"}, found)
            assert isinstance(location, layout.Location)


@pytest.mark.parametrize(
    "text",
    ["# " + "9" * 5000 + ".1", "# 2." + "9" * 5000, "# 2.4\nfirst_valid_uid = " + "9" * 5000, "{\n" * 50_000],
)
def test_configurations_that_no_dovecot_has(text: str) -> None:
    parse_doveconf(text)
    with suppress(DovecotError):
        assert isinstance(settings_from(text), doveconf.DovecotSettings)


# Names and paths --------------------------------------------------------------------------------------

templates = st.one_of(
    names,
    st.lists(
        st.one_of(
            st.sampled_from(
                [
                    *(
                        "%u",
                        "%n",
                        "%d",
                        "%h",
                        "%%",
                        "%",
                        "%{",
                        "}",
                        "%{user}",
                        "%{user | domain}",
                        "%{home}",
                        "~/",
                    ),
                    *(
                        "%2.300Nu",
                        "%9999999999.1Hu",
                        "%" + "9" * 5000 + "u",
                        "%-1.2u",
                        "%{user|substr(0,99)}",
                    ),
                    *("%1.1MRLu", "%{user | default('x')}", "%02.3u", "/", ":INDEX=", "::"),
                ]
            ),
            names,
        ),
        max_size=5,
    ).map("".join),
)


@fuzzed
@given(templates, names, st.one_of(st.just("/home/u"), names))
def test_places(template: str, user: str, home: str) -> None:
    with suppress(DovecotError):
        location = layout.parse_location(layout.expand(template, user=user, home=home))
        assert location.list_layout
        root = layout.index_root(location, home)
        assert_a_place(root)
        inbox = layout.inbox_directory(location, home)
        assert inbox == "" or (assert_a_place(inbox) and inbox != root)


def assert_a_place(path: str) -> bool:
    assert path.startswith("/")
    assert posixpath.normpath(path) == path
    assert not {"..", "."} & set(path.split("/"))
    assert not set(map(chr, range(32))) & set(path)
    return True


@fuzzed
@given(st.one_of(names, names.map(lambda name: "/" + name)), names)
def test_index_paths(path: str, mailbox: str) -> None:
    with suppress(DovecotError):
        assert_a_place(layout.parse_index_path(path, mailbox).root)


@fuzzed
@given(
    st.sampled_from(["", "maildir", "sdbox", "mdbox", "mbox", "x"]),
    st.sampled_from(["", "maildir++", "fs", "index", "x"]),
    st.one_of(
        st.binary(max_size=300),
        st.lists(st.sampled_from([b".", b"..", b"a", b"", b"dbox-Mails"])).map(b"/".join),
    ),
)
def test_directories(driver: str, shape: str, relative: bytes) -> None:
    if layout.descend(driver, shape, relative):
        assert relative.split(b"/")[-1] not in (b"", b".", b"..")


@fuzzed
@given(st.one_of(names, st.text("@./*?-\x7fa", max_size=6)))
def test_user_names(name: str) -> None:
    if layout.unsafe_name(name) is None:
        assert not set(name) & {"/", "*", "?", "\0", "\n", "\t", "\x01"}
        assert not name.startswith("-")
        # Wherever a template puts the parts of a name, they are one component each.
        for part in (name, *name.partition("@")[::2]):
            assert posixpath.normpath(f"/a/{part}x/b") == f"/a/{part}x/b"
            assert part not in (".", "..")


@fuzzed
@given(names, st.lists(st.one_of(names, st.text("*?a", max_size=8)), max_size=4))
def test_patterns(name: str, patterns: list[str]) -> None:
    assert layout.matches(name, ["*"])
    assert not layout.matches(name, [])
    assert layout.matches(name, patterns) == any(layout.matches(name, [pattern]) for pattern in patterns)


def test_a_reply_without_output_is_no_list() -> None:
    checks.user_answers("", [])
    assert checks.encodable("\udcff")
    assert not checks.encodable("\ud800")
    assert Reply(0).output == ()
