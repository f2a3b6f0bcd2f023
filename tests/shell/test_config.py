from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovesyncd import config
from dovesyncd.core.errors import ConfigError
from dovesyncd.core.kinds import format_span, read_span
from dovesyncd.core.options import parse, render

PEER = '[[peer]]\nname = "b"\ndestination = "tcp:b"\n'


@pytest.fixture
def main(tmp_path: Path) -> Path:
    return tmp_path / "dovesyncd.toml"


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")


def drop_in(main: Path, name: str, text: str) -> None:
    write(main.with_name(main.name + ".d") / name, text)


def problems_of(main: Path) -> list[str]:
    """What load complains of, with paths from the directory of the main file."""
    with pytest.raises(ConfigError) as caught:
        config.load(str(main), {})
    return [str(problem).replace(f"{main.parent}/", "") for problem in caught.value.problems]


def test_one_file(main: Path) -> None:
    write(main, PEER)
    loaded, warnings = config.load(str(main), {})
    assert loaded.peers[0].destination == ("tcp:b",)
    assert warnings == ()


def test_drop_ins_override_in_lexical_order(main: Path) -> None:
    write(main, PEER + '[sync]\nsettle = "1ms"\nsettle_low = "1ms"\nlongest_wait = "1ms"\n')
    drop_in(main, "20.toml", '[sync]\nlongest_wait = "20ms"\n[[peer]]\nname = "b"\nworkers = 2\n')
    drop_in(main, "10.toml", '[sync]\nlongest_wait = "10ms"\nsettle_low = "10ms"\n')
    for ignored in ("30.toml~", ".40.toml", "50.conf"):
        drop_in(main, ignored, "not TOML")
    loaded, _ = config.load(str(main), {})
    assert (loaded.sync.settle, loaded.sync.settle_low, loaded.sync.longest_wait) == (0.001, 0.01, 0.02)
    assert [(peer.name, peer.destination, peer.workers) for peer in loaded.peers] == [("b", ("tcp:b",), 2)]


def test_drop_ins_are_enough(main: Path) -> None:
    drop_in(main, "peer.toml", PEER)
    assert config.load(str(main), {})[0].peers[0].name == "b"


@pytest.mark.parametrize(
    "written, environ, directory",
    [
        ("", {}, "/var/lib/dovesyncd"),
        ("", {"STATE_DIRECTORY": ""}, "/var/lib/dovesyncd"),
        ("", {"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, "/var/lib/a"),
        ("/srv/c", {"STATE_DIRECTORY": "/var/lib/a"}, "/srv/c"),
    ],
)
def test_state_directory(main: Path, written: str, environ: dict[str, str], directory: str) -> None:
    write(main, f'{PEER}[daemon]\nstate_directory = "{written}"\n')
    assert config.load(str(main), environ)[0].daemon.state_directory == directory


def test_state_directory_of_the_environment_is_absolute(main: Path) -> None:
    write(main, PEER)
    with pytest.raises(ConfigError, match="environment: STATE_DIRECTORY = 'a': expected an absolute path"):
        config.load(str(main), {"STATE_DIRECTORY": "a"})


def test_missing_file(main: Path) -> None:
    assert problems_of(main) == ["dovesyncd.toml: can't be read: No such file or directory"]


def test_directory_instead_of_file(main: Path) -> None:
    main.mkdir()
    assert problems_of(main) == ["dovesyncd.toml: can't be read: Is a directory"]


def test_file_instead_of_directory(main: Path) -> None:
    write(main, PEER)
    write(main.with_name("dovesyncd.toml.d"), "")
    assert problems_of(main) == ["dovesyncd.toml.d: can't be read: Not a directory"]


def test_drop_in_that_leads_nowhere(main: Path) -> None:
    write(main, PEER)
    drop_in(main, "a.toml", "")
    (main.with_name("dovesyncd.toml.d") / "b.toml").symlink_to("c.toml")
    assert problems_of(main) == ["dovesyncd.toml.d/b.toml: can't be read: No such file or directory"]


def test_drop_in_masked_as_systemd_does_it(main: Path) -> None:
    write(main, PEER)
    drop_in(main, "a.toml", "")
    (main.with_name("dovesyncd.toml.d") / "b.toml").symlink_to("/dev/null")
    config.load(str(main), {})


@pytest.fixture
def nobody() -> Iterator[None]:
    """Root may read everything, so it is somebody else for a while."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.fixture
def closed(main: Path) -> Iterator[Path]:
    """The main file in a directory that nobody may enter."""
    write(main, PEER)
    main.parent.chmod(0)
    yield main
    main.parent.chmod(0o700)


def test_permission_denied(closed: Path, nobody: None) -> None:
    assert problems_of(closed) == [
        "dovesyncd.toml.d: can't be read: Permission denied",
        "dovesyncd.toml: can't be read: Permission denied",
    ]


BROKEN = [
    (
        b"[sync]\nsettle 1\n",
        "not valid TOML: Expected '=' after a key in a key/value pair (at line 2, column 8)",
    ),
    (b"[sync]\na = 1\na = 2\n", "not valid TOML: Cannot overwrite a value (at line 3, column 6)"),
    (b"# a\n# \xff\n", "not UTF-8: byte 0xff in line 2"),
    (b"a = " + b"9" * 5000, "not valid TOML: Exceeds the limit"),
    (b"a = " + b"[" * 100_000, "not valid TOML: "),
]


@pytest.mark.parametrize("data, problem", BROKEN, ids=lambda value: repr(value)[:30])
def test_broken_file(main: Path, data: bytes, problem: str) -> None:
    main.write_bytes(data)
    (found,) = problems_of(main)
    assert found.startswith(f"dovesyncd.toml: {problem}")


def test_every_problem_of_every_file_at_once(main: Path) -> None:
    write(main, '[[peer]]\nname = "b"\ndestinaton = "tcp:b"\n[sync]\nsettle = true\n')
    drop_in(main, "a.toml", "[")
    drop_in(main, "b.toml", "[daemon]\nlog_level = 3\nuser = 1")
    (main.with_name("dovesyncd.toml.d") / "c.toml").mkdir()
    syntax, directory, *others = problems_of(main)
    assert syntax.startswith("dovesyncd.toml.d/a.toml: not valid TOML: ")
    assert directory == "dovesyncd.toml.d/c.toml: can't be read: Is a directory"
    # That the peer has no destination is not said: a.toml may have it.
    assert others == [
        'dovesyncd.toml: sync.settle = True: expected a time span from 0s to 1min, such as "1min 30s"',
        'dovesyncd.toml.d/b.toml: daemon.log_level = 3: expected one of "debug", "info", "warning", "error"',
        "dovesyncd.toml: peer[0].destinaton: unknown key, did you mean destination?",
        "dovesyncd.toml.d/b.toml: daemon.user: unknown key",
    ]


def test_warnings_of_a_good_configuration(main: Path) -> None:
    write(main, f"setle = 1\n{PEER}")
    _, warnings = config.load(str(main), {})
    assert [(warning.file, warning.key) for warning in warnings] == [(str(main), "setle")]


TEXT = st.text(st.characters(blacklist_categories=("Cc", "Cs")), min_size=1, max_size=8)
USER = TEXT.filter(lambda user: not set(user) & set("*?") and not user.startswith("-"))
PATH = TEXT.map(lambda text: f"/{text}")


def spans(least: int, most: int, unit: int = 1) -> st.SearchStrategy[str]:
    """Time spans of whole ``unit`` microseconds; the limits are in seconds."""
    whole = st.integers(least * 1_000_000 // unit, most * 1_000_000 // unit)
    return whole.map(lambda count: format_span(count * unit / 1e6))


WORD = TEXT.filter(lambda word: ":" not in word and not word.startswith("-"))
COMMAND = st.lists(WORD, min_size=2, max_size=3, unique=True) | st.sampled_from(
    ["tcps:b:1", "remote:b", "/to b"]
)
PEERS = st.lists(
    st.fixed_dictionaries(
        {"name": st.from_regex("[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True), "destination": COMMAND},
        optional={
            "workers": st.integers(1, 100),
            "namespaces": st.lists(TEXT | st.just(""), max_size=2),
            "exclude_mailboxes": st.lists(TEXT, max_size=2),
        },
    ),
    min_size=1,
    max_size=3,
    unique_by=(lambda peer: peer["name"], lambda peer: str(peer["destination"])),
)
DOCUMENTS = st.fixed_dictionaries(
    {
        "peer": PEERS,
        "daemon": st.fixed_dictionaries(
            {"state_directory": PATH, "log_level": st.sampled_from(["debug", "info", "warning", "error"])}
        ),
    },
    optional={
        "sync": st.fixed_dictionaries(
            {
                "settle": spans(0, 1),
                "settle_low": spans(1, 60),
                "longest_wait": spans(60, 3600),
                "pass_interval": spans(60, 365 * 86400),
                "lock_timeout": spans(1, 3600, 1_000_000),
                "stall_timeout": spans(1, 3600, 1_000_000),
                "deadline": spans(7201, 7 * 86400),
            }
        ),
        "users": st.fixed_dictionaries(
            {
                "include": st.lists(TEXT, min_size=1, max_size=2),
                "exclude": st.lists(TEXT, max_size=2),
                "list": st.lists(USER, max_size=2),
                "refresh": spans(1, 86400),
            }
        ),
        "dovecot": st.fixed_dictionaries(
            {
                "config": PATH,
                "socket": PATH,
                "doveadm": PATH,
                "index_root": PATH.map(lambda path: f"%h{path}"),
            }
        ),
    },
)


@settings(print_blob=True, deadline=None)
@given(document=DOCUMENTS)
def test_rendered_configuration_loads_as_the_same(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]
) -> None:
    original, problems, _ = parse([("f", document)])
    assert problems == ()
    assert original is not None
    file = tmp_path_factory.getbasetemp() / "rendered.toml"
    file.write_text(render(original), encoding="utf-8")
    assert config.load(str(file), {}) == (original, ())


def test_rendered_defaults_are_the_defaults(main: Path) -> None:
    write(main, PEER)
    loaded, _ = config.load(str(main), {})
    write(main, render(loaded))
    assert config.load(str(main), {}) == (loaded, ())


SPANS = [
    "5",
    "1h 30min",
    "0.1s",
    ".5s",
    "1h1h",
    "2hours 1 hr",
    "1msec 1usec",
    "1w",
    "3minutes 1day",
    "1\u00b5s",
]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("span", SPANS)
def test_spans_mean_what_systemd_means(span: str) -> None:
    command = ["systemd-analyze", "timespan", span]
    output = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
    microseconds = re.search(r"^ *\S+s: ([0-9]+)$", output, re.MULTILINE)
    assert microseconds is not None
    assert read_span(span) == int(microseconds[1]) / 1e6
