from __future__ import annotations

import dataclasses
import datetime
import re
import typing
from typing import Any, Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dovesyncd.core import options
from dovesyncd.core.kinds import format_span, read_span
from dovesyncd.core.model import PeerName
from dovesyncd.core.options import OPTIONS, SECTIONS, Parsed, PeerConfig, parse

PEER = {"name": "b", "destination": "tcp:b.example.com:12345"}
NUL, ESC, DEL, C1 = "\x00", "\x1b", "\x7f", "\x9b"


def parse_one(document: dict[str, Any]) -> Parsed:
    """The document with a peer, unless it brings its own."""
    return parse([("f", {"peer": [PEER], **document})])


def test_one_table_is_enough() -> None:
    config, problems, warnings = parse([("f", {"peer": [PEER]})])
    assert (problems, warnings) == ((), ())
    assert config is not None
    assert config.peers == (PeerConfig(PeerName("b"), ("tcp:b.example.com:12345",), 10, (), False, ()),)
    assert dataclasses.astuple(config.sync) == (0.1, 0.3, 2.0, 86400.0, 30.0, 300.0, 3600.0)
    assert dataclasses.astuple(config.users) == (("*",), (), (), 300.0)
    assert dataclasses.astuple(config.dovecot) == ("", "", "doveadm", "doveconf", "")
    assert dataclasses.astuple(config.daemon) == ("", "info", 30.0)


@pytest.mark.parametrize("section, fields", [*SECTIONS.items(), ("peer", PeerConfig)])
def test_table_and_dataclass_agree(section: str, fields: Any) -> None:
    table = options.options_of(section)
    assert [option.name for option in table] == [field.name for field in dataclasses.fields(fields)]
    types = typing.get_type_hints(fields, localns={"list": list})
    for option in table:
        if option.default is not None:
            assert list(option.kind.faults(option.default)) == []
            value = option.kind.convert(option.default)
            assert isinstance(value, typing.get_origin(types[option.name]) or types[option.name])


def test_table_has_every_section_and_no_option_twice() -> None:
    assert {option.section for option in OPTIONS} == {*SECTIONS, "peer"}
    assert len({(option.section, option.name) for option in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.section}.{option.name}")
def test_every_option_is_documented(option: options.Option) -> None:
    assert re.fullmatch(r"[A-Z].{20,}\.", option.sentence) or option.name in ("doveadm", "doveconf")
    assert option.sentence
    assert option.kind.expected
    assert option.unit == ("s" if isinstance(option.default, str) and read_span(option.default) else "")


# Checked with systemd-analyze timespan, except where a row says so.
SPANS: list[tuple[object, Optional[float]]] = [
    ("5", 5.0),
    ("0", 0.0),
    (5, 5.0),
    (0.25, 0.25),
    ("1h 30min", 5400.0),
    ("1h30m", 5400.0),
    ("500ms", 0.5),
    (".5s", 0.5),
    ("0.1s", 0.1),
    ("1 h", 3600.0),
    (" 30 ", 30.0),
    ("1h1h", 7200.0),
    ("2hours 1 hr 1hour", 14400.0),
    ("3minutes 1minute", 240.0),
    ("1sec 1second 2seconds", 4.0),
    ("1msec 1usec 1us", 0.001002),
    ("1\u00b5s", 1e-6),
    ("1\u03bcs", 1e-6),
    ("1w", 604800.0),
    ("1week 2weeks 1day 2days 1d", 2160000.0),
    ("", None),
    (" ", None),
    ("s", None),
    ("1.s", None),
    ("1.5.5s", None),
    ("1e3", None),
    ("-1s", None),
    ("1S", None),
    ("1s,2s", None),
    ("\u0663s", None),
    # systemd takes these; a month is too vague here, and a second number without a unit too.
    ("1M", None),
    ("1y", None),
    ("infinity", None),
    ("5 5", None),
    ("1m30", None),
    # Not what TOML calls a number or a string.
    (True, None),
    (False, None),
    ([], None),
    (-1, None),
    (float("nan"), None),
    (float("inf"), None),
    (10**400, None),
    ("9" * 5000, None),
]


@pytest.mark.parametrize("written, seconds", SPANS, ids=lambda value: repr(value)[:30])
def test_span(written: object, seconds: Optional[float]) -> None:
    assert read_span(written) == seconds


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.0, "0s"),
        (0.1, "100ms"),
        (5400.0, "1h 30min"),
        (604800.0, "7d"),
        (90061.000001, "1d 1h 1min 1s 1us"),
    ],
)
def test_format_span(seconds: float, text: str) -> None:
    assert format_span(seconds) == text


@given(st.integers(0, 10**15))
def test_spans_survive_a_round_trip(microseconds: int) -> None:
    assert read_span(format_span(microseconds / 1e6)) == microseconds / 1e6


DESTINATIONS: list[tuple[object, Optional[tuple[str, ...]]]] = [
    ("tcp:b", ("tcp:b",)),
    ("tcp:b:1", ("tcp:b:1",)),
    ("tcps:b.example.com:65535", ("tcps:b.example.com:65535",)),
    ("tcp:192.0.2.1:12345", ("tcp:192.0.2.1:12345",)),
    ("tcp:[2001:db8::1]:12345", ("tcp:[2001:db8::1]:12345",)),
    ("tcp:2001:db8::1:12345", ("tcp:2001:db8::1:12345",)),
    ("tcp:/run/b/doveadm-server", ("tcp:/run/b/doveadm-server",)),
    ("remote:b", ("remote:b",)),
    ("remoteprefix:vmail@b", ("remoteprefix:vmail@b",)),
    ("/usr/bin/to-b", ("/usr/bin/to-b",)),
    ("ssh b  doveadm", ("ssh", "b", "doveadm")),
    (["ssh", "-i", "/key of b", "b"], ("ssh", "-i", "/key of b", "b")),
    (["tcp:b"], ("tcp:b",)),
    ("", None),
    (" ", None),
    ([], None),
    ([""], None),
    (["ssh", ""], None),
    (["ssh", 1], None),
    (True, None),
    ("tcp:", None),
    ("tcp::1", None),
    ("tcp:b:", None),
    ("tcp:b:0", None),
    ("tcp:b:65536", None),
    ("tcp:b:x", None),
    ("tcp:b:\u0661", None),
    ("tcp:[2001:db8::1]", None),
    ("tcp:b/c", None),
    ("tcp:b c", None),
    ("tcp:-b", None),
    ("tcp:b\n", None),
    ("tcps:b" + NUL, None),
    ("remote:", None),
    ("remote:@b", None),
    ("remote:vmail@", None),
    ("remote:-oProxyCommand=x", None),
    ("remote:vmail@-oProxyCommand=x", None),
    ("remoteprefix:-l@b", None),
    ("b.example.com", None),
    ("tpc:b", None),
    ("maildir:/srv/mail", None),
    ("-N", None),
    (["-N", "b"], None),
    (["tcp:b", "c"], None),
    ("/usr/bin/to-b" + ESC, None),
    (["ssh", "b\tc"], None),
]


@pytest.mark.parametrize("written, destination", DESTINATIONS, ids=lambda value: repr(value)[:30])
def test_destination(written: object, destination: Optional[tuple[str, ...]]) -> None:
    config, problems, _ = parse_one({"peer": [{"name": "b", "destination": written}]})
    if destination is None:
        assert [problem.key for problem in problems] == ["peer[0].destination"]
    else:
        assert problems == ()
        assert config is not None
        assert config.peers[0].destination == destination


ACCEPTED: list[tuple[str, str, object, object]] = [
    ("sync", "settle", 0, 0.0),
    ("sync", "lock_timeout", "1min 1s", 61.0),
    ("sync", "pass_interval", "1min", 60.0),
    ("users", "include", ["*@a.example", "b?"], ("*@a.example", "b?")),
    ("users", "list", ["j\u00f6rg@a.example", "b c"], ("j\u00f6rg@a.example", "b c")),
    ("dovecot", "doveadm", "/opt/dovecot/bin/doveadm", "/opt/dovecot/bin/doveadm"),
    ("dovecot", "index_root", "/var/vmail/%d/%n/Maildir", "/var/vmail/%d/%n/Maildir"),
    ("dovecot", "index_root", "/v/%{user|domain}", "/v/%{user|domain}"),
    ("dovecot", "index_root", "~/Maildir", "~/Maildir"),
    ("dovecot", "index_root", "%{home}/Maildir", "%{home}/Maildir"),
    ("daemon", "log_level", "debug", "debug"),
]


@pytest.mark.parametrize("section, name, written, value", ACCEPTED)
def test_accepted(section: str, name: str, written: object, value: object) -> None:
    config, problems, _ = parse_one({section: {name: written}})
    assert problems == ()
    assert getattr(getattr(config, section), name) == value


# A document (with a good peer added where it has none) and "key: expectation" of each problem, in part.
PROBLEMS: list[tuple[dict[str, Any], list[tuple[str, object, str]]]] = [
    ({"sync": 3}, [("sync", 3, "a table [sync]")]),
    ({"sync": {"settle": "soon"}}, [("sync.settle", "soon", "a time span from 0s to 1min")]),
    ({"sync": {"settle": True}}, [("sync.settle", True, "a time span")]),
    ({"sync": {"longest_wait": "61min"}}, [("sync.longest_wait", "61min", "to 1h")]),
    ({"sync": {"pass_interval": "59s"}}, [("sync.pass_interval", "59s", "from 1min")]),
    ({"sync": {"pass_interval": 0}}, [("sync.pass_interval", 0, "from 1min")]),
    ({"sync": {"pass_interval": "off"}}, [("sync.pass_interval", "off", "from 1min")]),
    ({"sync": {"lock_timeout": "1500ms"}}, [("sync.lock_timeout", "1500ms", "whole seconds")]),
    ({"sync": {"stall_timeout": 0}}, [("sync.stall_timeout", 0, "whole seconds, as a time span from 1s")]),
    ({"sync": {"settle": "1s"}}, [("sync.settle", "1s", 'at most settle_low (now settle = "1s"')]),
    ({"sync": {"settle_low": "1ms"}}, [("sync.settle_low", "1ms", "settle to be at most settle_low")]),
    ({"sync": {"longest_wait": 0}}, [("sync.longest_wait", 0, "settle_low to be at most longest_wait")]),
    ({"sync": {"deadline": "90s"}}, [("sync.deadline", "90s", "longer than lock_timeout and stall_timeout")]),
    ({"sync": {"stall_timeout": "1h"}}, [("sync.stall_timeout", "1h", "deadline to be longer")]),
    ({"users": {"include": []}}, [("users.include", [], "an array that is not empty")]),
    ({"users": {"include": "*"}}, [("users.include", "*", "an array")]),
    (
        {"users": {"exclude": ["a", 1, "", "b\n"]}},
        [
            ("users.exclude[1]", 1, "a user name"),
            ("users.exclude[2]", "", "a user"),
            ("users.exclude[3]", "b\n", ""),
        ],
    ),
    (
        {"users": {"list": ["*", "a?", "-A", "a" + C1]}},
        [
            (f"users.list[{i}]", value, "the name of one user")
            for i, value in enumerate(["*", "a?", "-A", "a" + C1])
        ],
    ),
    ({"users": {"refresh": "0"}}, [("users.refresh", "0", "from 1s")]),
    ({"dovecot": {"config": "dovecot.conf"}}, [("dovecot.config", "dovecot.conf", "an absolute path")]),
    ({"dovecot": {"socket": "/run/a" + DEL}}, [("dovecot.socket", "/run/a" + DEL, "an absolute path")]),
    ({"dovecot": {"doveadm": ""}}, [("dovecot.doveadm", "", "a program's name")]),
    ({"dovecot": {"doveadm": "bin/doveadm"}}, [("dovecot.doveadm", "bin/doveadm", "absolute path")]),
    ({"dovecot": {"doveconf": "-n"}}, [("dovecot.doveconf", "-n", "a program's name")]),
    ({"dovecot": {"index_root": "%d/%n"}}, [("dovecot.index_root", "%d/%n", "variables")]),
    ({"daemon": {"state_directory": "."}}, [("daemon.state_directory", ".", "an absolute path")]),
    ({"daemon": {"log_level": "loud"}}, [("daemon.log_level", "loud", 'one of "debug", "info"')]),
    ({"daemon": {"log_level": ["info"]}}, [("daemon.log_level", ["info"], "one of")]),
    ({"peer": []}, [("peer", None, "at least one [[peer]] table")]),
    ({"peer": PEER}, [("peer", PEER, "[[peer]]")]),
    ({"peer": [PEER, 1]}, [("peer[1]", 1, "a table")]),
    (
        {"peer": [{}]},
        [("peer[0].name", None, "required: a name"), ("peer[0].destination", None, 'required: "tcp:HOST')],
    ),
    ({"peer": [{**PEER, "name": 1}]}, [("peer[0].name", 1, "a name")]),
    ({"peer": [{**PEER, "name": "b\n"}]}, [("peer[0].name", "b\n", "a name of 1 to 63")]),
    ({"peer": [{**PEER, "name": ".b"}]}, [("peer[0].name", ".b", "begins with a letter")]),
    ({"peer": [{**PEER, "name": "b" * 64}]}, [("peer[0].name", "b" * 64, "63")]),
    (
        {"peer": [PEER, {**PEER, "name": "c"}]},
        [("peer[1].destination", PEER["destination"], "peer[0].destination in f")],
    ),
    ({"peer": [PEER, {"name": "b", "destination": "tcp:c"}]}, [("peer[1].name", "b", "another name")]),
    ({"peer": [{**PEER, "workers": 0}]}, [("peer[0].workers", 0, "an integer from 1 to 100")]),
    ({"peer": [{**PEER, "workers": 101}]}, [("peer[0].workers", 101, "to 100")]),
    ({"peer": [{**PEER, "workers": True}]}, [("peer[0].workers", True, "an integer")]),
    ({"peer": [{**PEER, "workers": 1.0}]}, [("peer[0].workers", 1.0, "an integer")]),
    ({"peer": [{**PEER, "all_namespaces": 1}]}, [("peer[0].all_namespaces", 1, "true or false")]),
    ({"peer": [{**PEER, "namespaces": ["a\t"]}]}, [("peer[0].namespaces[0]", "a\t", "a namespace")]),
    ({"peer": [{**PEER, "exclude_mailboxes": [""]}]}, [("peer[0].exclude_mailboxes[0]", "", "a mailbox")]),
    (
        {"peer": [{**PEER, "all_namespaces": True, "namespaces": [""]}]},
        [("peer[0].namespaces", [""], "namespaces or all_namespaces, not both")],
    ),
    # All at once.
    (
        {"sync": {"settle": [], "deadline": 1}, "daemon": 0, "peer": [{"workers": 0}]},
        [
            ("daemon", 0, "a table"),
            ("sync.settle", [], "a time span"),
            ("sync.deadline", 1, "deadline to be longer"),
            ("peer[0].name", None, "required"),
            ("peer[0].destination", None, "required"),
            ("peer[0].workers", 0, "an integer"),
        ],
    ),
]


@pytest.mark.parametrize("document, expected", PROBLEMS, ids=lambda value: repr(value)[:50])
def test_problems(document: dict[str, Any], expected: list[tuple[str, object, str]]) -> None:
    config, problems, warnings = parse_one(document)
    assert config is None
    assert [(problem.file, problem.key, problem.value) for problem in problems] == [
        ("f", key, value) for key, value, _ in expected
    ]
    for problem, (_, _, part) in zip(problems, expected):
        assert part in problem.expected
    assert warnings == ()


def test_problem_of_an_integer_too_long_to_print_can_be_printed() -> None:
    for value in (16**9999, [[16**9999]]):
        (problem,) = parse_one({"peer": [{**PEER, "workers": value}]}).problems
        assert str(problem).startswith("f: peer[0].workers = ")


def test_no_document_lacks_a_peer() -> None:
    assert [problem.key for problem in parse([]).problems] == ["peer"]


WARNINGS: list[tuple[dict[str, Any], str]] = [
    ({"sinc": {}}, "f: sinc: unknown key, did you mean sync?"),
    ({"settle": "1s"}, "f: settle: unknown key, did you mean sync.settle?"),
    ({"sync": {"setle": "1s"}}, "f: sync.setle: unknown key, did you mean settle?"),
    ({"sync": {"Settle_Low": "1s"}}, "f: sync.Settle_Low: unknown key, did you mean settle_low?"),
    ({"sync": {"workers": 3}}, "f: sync.workers: unknown key, did you mean peer.workers?"),
    ({"daemon": {"qqq": 0}}, "f: daemon.qqq: unknown key"),
    ({"daemon": {"q\n": 0}}, 'f: daemon."q\\n": unknown key'),
    ({"peer": [{**PEER, "nmae": "b"}]}, "f: peer[0].nmae: unknown key, did you mean name?"),
]


@pytest.mark.parametrize("document, warning", WARNINGS)
def test_unknown_keys_are_warnings(document: dict[str, Any], warning: str) -> None:
    config, problems, warnings = parse_one(document)
    assert config is not None
    assert problems == ()
    assert [str(item) for item in warnings] == [warning]


def test_later_documents_override_key_by_key() -> None:
    config, problems, _ = parse(
        [
            (
                "1",
                {
                    "sync": {"settle": "1ms", "settle_low": "soon"},
                    "peer": [PEER, {"name": "c", "workers": 2}],
                },
            ),
            ("2", {"sync": {"settle_low": "2ms"}, "peer": [{"name": "c", "destination": "tcp:c"}]}),
            ("3", {"peer": [{"name": "d", "destination": "tcp:d"}, {"name": "b", "workers": 3}]}),
        ]
    )
    assert problems == ()
    assert config is not None
    assert (config.sync.settle, config.sync.settle_low) == (0.001, 0.002)
    assert [(peer.name, peer.destination, peer.workers) for peer in config.peers] == [
        ("b", (PEER["destination"],), 3),
        ("c", ("tcp:c",), 2),
        ("d", ("tcp:d",), 10),
    ]


def test_problems_name_the_file_of_the_value() -> None:
    problems = parse(
        [
            ("1", {"peer": [PEER, {"name": "c"}, {"name": "?"}], "sync": {"settle": "1min"}}),
            (
                "2",
                {"peer": [{"name": "?", "destination": PEER["destination"]}, {"name": "b", "workers": -1}]},
            ),
        ]
    ).problems
    assert [(problem.file, problem.key) for problem in problems] == [
        ("1", "sync.settle"),
        ("2", "peer[1].workers"),
        ("1", "peer[1].destination"),
        ("1", "peer[2].name"),
        ("2", "peer[0].destination"),
    ]
    assert problems[-1].expected == "another destination than peer[0].destination in 1"


def test_broken_rule_names_the_file_that_broke_it() -> None:
    first: dict[str, Any] = {"peer": [PEER], "sync": {"settle": "1s", "settle_low": "2s"}}
    problems = parse([("1", first), ("2", {"sync": {"settle": 3}})]).problems
    assert [(problem.file, problem.key) for problem in problems] == [("2", "sync.settle")]


def test_render_explains_each_option_once() -> None:
    config = parse([("f", {"peer": [PEER, {"name": "c", "destination": ["ssh", "c"]}]})]).config
    assert config is not None
    text = options.render(config)
    lines = text.splitlines()
    assert all(len(line) <= 100 for line in lines)
    unwrapped = text.replace("\n# ", " ")
    for option in OPTIONS:
        assert unwrapped.count(option.sentence) == 1
        times = len(config.peers) if option.section == "peer" else 1
        assert sum(line.startswith(f"{option.name} = ") for line in lines) == times
    assert 'destination = ["ssh", "c"]' in lines
    assert 'settle = "100ms"' in lines


def test_render_escapes_what_toml_wants_escaped() -> None:
    config = parse_one({"users": {"list": ['a"b\\c']}}).config
    assert config is not None
    assert r'list = ["a\"b\\c"]' in options.render(config).splitlines()


NAMES = [option.name for option in OPTIONS] + [*SECTIONS, "peer"]
SCALARS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["1s", "0", "tcp:b", "/x", "b", "remote:a@b"]),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.datetimes(),
    st.just(datetime.time(1)),
)
KEYS = st.one_of(st.sampled_from(NAMES), st.text(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
TABLES = {section: st.dictionaries(KEYS, VALUES) | VALUES for section in SECTIONS}
PEERS = st.lists(st.dictionaries(KEYS, VALUES) | VALUES, max_size=3) | VALUES
DOCUMENTS = st.lists(
    st.tuples(
        st.sampled_from("12"),
        st.dictionaries(KEYS, VALUES) | st.fixed_dictionaries({"peer": PEERS, **TABLES}),
    ),
    max_size=3,
)


@given(DOCUMENTS)
def test_arbitrary_data_gives_problems_and_no_exception(documents: list[tuple[str, dict[str, Any]]]) -> None:
    config, problems, warnings = parse(documents)
    assert (config is None) == bool(problems)
    for problem in problems + warnings:
        assert "\n" not in problem.key
        assert str(problem)
