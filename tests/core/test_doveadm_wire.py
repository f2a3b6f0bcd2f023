"""The doveadm-server protocol: framing, escaping, limits, and that the size of the pieces never matters."""

from __future__ import annotations

from typing import Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovesyncd.core import doveadm_wire
from dovesyncd.core.doveadm_wire import (
    EXIT_CODES,
    LOG_EDGE,
    LOG_LINE_LIMIT,
    OUTPUT_LIMIT,
    ReplyStream,
    State,
    escape,
    parse_stderr_line,
    request_line,
    unescape,
)
from dovesyncd.core.model import LogLine, Reply

untimed = settings(deadline=None, print_blob=True)

READY = b"VERSION\tdoveadm-client\t1\t2\n+\n"


def packet(channel: int, payload: bytes) -> bytes:
    return bytes([channel]) + len(payload).to_bytes(4, "big") + payload


def log(level: int, text: bytes) -> bytes:
    return packet(ord("L"), bytes([level]) + text + b"\n")


def read(data: bytes, cuts: Optional[list[int]] = None) -> tuple[State, Reply]:
    stream = ReplyStream()
    at = 0
    for cut in [*sorted(cuts or []), len(data)]:
        stream.feed(data[at:cut])
        at = max(at, cut)
    return stream.state, stream.finish()


# Byte for byte what 2.3.19.1 and 2.4.1 answered.
CAPTURED = [
    (
        packet(0, b"AQAAAHm4+Jk=\t") + packet(0, b"\n+\n"),
        Reply(0, ("AQAAAHm4+Jk=",)),
    ),
    (packet(0, b"\n+\n"), Reply(0)),
    (
        log(4, b"doveadm(zz): cmd sync: User doesn't exist") + packet(0, b"\n-NOUSER\n"),
        Reply(67, (), (LogLine("error", "doveadm(zz): cmd sync: User doesn't exist"),)),
    ),
    (
        log(4, b"doveadm(u1)<21020><w>: read(remote) failed: EOF (version not received)")
        + packet(0, b"AQAAAHm4+Jk=\t")
        + log(4, b"doveadm(u1)<21020><w>: Remote command returned error 255: ssh x dsync-server")
        + packet(0, b"\n-TEMPFAIL\n"),
        Reply(
            75,
            ("AQAAAHm4+Jk=",),
            (
                LogLine("error", "doveadm(u1)<21020><w>: read(remote) failed: EOF (version not received)"),
                LogLine(
                    "error", "doveadm(u1)<21020><w>: Remote command returned error 255: ssh x dsync-server"
                ),
            ),
        ),
    ),
    (
        log(4, b"doveadm: doveadm: Client sent unknown command: nocmd") + packet(0, b"\n-\n"),
        Reply(-1, (), (LogLine("error", "doveadm: doveadm: Client sent unknown command: nocmd"),)),
    ),
    (packet(0, b'{"userList":["u1","u2"]}\n+\n'), Reply(0, ('{"userList":["u1","u2"]}',))),
]


@pytest.mark.parametrize(("stream", "reply"), CAPTURED)
def test_replies_of_real_servers(stream: bytes, reply: Reply) -> None:
    assert read(READY + stream) == (State.REPLIED, reply)


def test_log_lines_after_the_reply_belong_to_it() -> None:
    assert read(READY + packet(0, b"\n+\n") + log(3, b"late"))[1].log == (LogLine("warning", "late"),)


@pytest.mark.parametrize(("word", "code"), [(word, code) for word, code in EXIT_CODES.items()])
def test_every_word_has_its_exit_code(word: bytes, code: int) -> None:
    assert read(READY + packet(0, b"\n-" + word + b"\n"))[1].exit_code == code


@pytest.mark.parametrize(
    ("word", "code"), [(b"NEVER-HEARD-OF", -1), (b"REFERRAL ann@other.example.com", 1002), (b"", -1)]
)
def test_odd_words(word: bytes, code: int) -> None:
    assert read(READY + packet(0, b"\n-" + word + b"\n"))[1].exit_code == code


@pytest.mark.parametrize(
    ("data", "state", "failure"),
    [
        (b"", State.HANDSHAKE, "disconnected"),
        (b"VERSION\tdoveadm-client\t1\t3\n", State.HANDSHAKE, "disconnected"),
        (b"VERSION\tdoveadm-client\t1\t3\n-\n", State.PASSWORD, "disconnected"),
        (b"VERSION\tdoveadm-client\t2\t0\n", State.BROKEN, "protocol error: unexpected greeting"),
        (b"+\n", State.BROKEN, "protocol error: unexpected greeting"),
        (b"* OK ready\n", State.BROKEN, "protocol error: unexpected greeting '* OK ready'"),
        (
            b"VERSION\tdoveadm-client\t1\t3\n?\n",
            State.BROKEN,
            "protocol error: unexpected line in the handshake: '?'",
        ),
        (b"x" * 2000, State.BROKEN, "protocol error: endless line in the handshake"),
        (b"VERSION\tdoveadm-client\t1\tx\n", State.BROKEN, "protocol error: unexpected greeting"),
        (READY, State.READY, "disconnected"),
        (READY.replace(b"2", b"3"), State.READY, "doveadm-server died"),
        (READY + packet(0, b"half a val"), State.READY, "disconnected"),
        (READY + packet(0, b"value\t\n"), State.READY, "disconnected"),
        (READY + packet(0, b"\nhello\n"), State.BROKEN, "protocol error: unexpected reply word 'hello'"),
        (READY + packet(0, b"\n-" + b"X" * 2000), State.BROKEN, "protocol error: endless reply word"),
    ],
)
def test_what_is_no_reply(data: bytes, state: State, failure: str) -> None:
    got_state, reply = read(data)
    assert got_state is state
    assert reply.exit_code is None
    assert reply.failure.startswith(failure)


def test_log_lines_survive_a_server_that_dies() -> None:
    data = READY + log(4, b"first") + packet(ord("L"), b"\x05unfinished")
    assert read(data)[1] == Reply(
        None, log=(LogLine("error", "first"), LogLine("fatal", "unfinished")), failure="disconnected"
    )


def test_unknown_channels_and_levels() -> None:
    data = READY + packet(7, b"whatever\n") + log(9, b"odd") + packet(ord("L"), b"\n") + packet(0, b"\n+\n")
    assert read(data)[1] == Reply(0, log=(LogLine("warning", "odd"),))


def test_output_up_to_the_limit_is_kept_and_more_is_refused() -> None:
    most = b"x" * (OUTPUT_LIMIT - 1) + b"\t"
    assert len(read(READY + packet(0, most + b"\n+\n"))[1].output[0]) == OUTPUT_LIMIT - 1
    for cuts in ([], [OUTPUT_LIMIT, OUTPUT_LIMIT + len(READY) + 6]):
        state, reply = read(READY + packet(0, b"x" + most + b"\n+\n"), cuts)
        assert state is State.BROKEN
        assert "more than" in reply.failure


def test_output_without_an_end_is_not_collected() -> None:
    stream = ReplyStream()
    stream.feed(READY + b"\x00\xff\xff\xff\xff")
    for _ in range(2 * OUTPUT_LIMIT // 65536):
        stream.feed(b"x" * 65536)
    assert stream.state is State.BROKEN
    assert len(stream._reply) == 0


def test_a_flood_of_log_lines_keeps_its_two_ends() -> None:
    lines = b"".join(log(2, b"line %d" % number) for number in range(10 * LOG_EDGE))
    kept = read(READY + lines + packet(0, b"\n+\n"))[1].log
    assert [line.text for line in kept[:LOG_EDGE]] == [f"line {number}" for number in range(LOG_EDGE)]
    assert kept[LOG_EDGE] == LogLine("info", f"({8 * LOG_EDGE} lines left out)")
    assert [line.text for line in kept[LOG_EDGE + 1 :]] == [
        f"line {number}" for number in range(9 * LOG_EDGE, 10 * LOG_EDGE)
    ]


def test_an_endless_log_line_is_cut() -> None:
    kept = read(READY + log(4, b"x" * 10 * LOG_LINE_LIMIT) + log(4, b"next") + packet(0, b"\n+\n"))[1].log
    assert [len(line.text) for line in kept] == [LOG_LINE_LIMIT - 1, 4]


# Names as os.fsdecode gives them: any bytes.
names = st.binary(max_size=40).map(lambda name: name.decode("utf-8", "surrogateescape"))


@untimed
@given(names)
def test_escape_is_undone_by_unescape_and_leaves_no_separator(text: str) -> None:
    field = escape(text)
    assert unescape(field) == text
    assert not set(field) & set(b"\x00\t\r\n")


@untimed
@given(st.lists(names, min_size=3, max_size=8))
def test_no_field_can_become_two(fields: list[str]) -> None:
    flags, user, command, *args = fields
    line = request_line(flags, user, command, args)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert [unescape(field) for field in line[:-1].split(b"\t")] == fields


def test_unescape_of_what_is_no_escape() -> None:
    assert unescape(b"a\x01xb\x01") == "axb"


scraps = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([READY, packet(0, b"value\t"), packet(0, b"\n+\n"), packet(0, b"\n-NOUSER\n"), b"-\n"]),
    st.builds(packet, st.sampled_from([0, 1, ord("L")]), st.binary(max_size=30)),
    st.builds(packet, st.just(0), st.text("\t\n+-ABC\x01", max_size=10).map(str.encode)),
)
streams = st.builds(
    lambda ready, rest: ready + b"".join(rest), st.sampled_from([b"", READY]), st.lists(scraps)
)


@untimed
@given(streams, st.lists(st.integers(0, 300)))
def test_any_bytes_in_any_pieces_give_the_same_answer(data: bytes, cuts: list[int]) -> None:
    state, reply = read(data)
    assert read(data, cuts) == (state, reply)
    assert read(data, list(range(len(data)))) == (state, reply)
    assert (state is State.REPLIED) == (reply.exit_code is not None) == (reply.failure == "")


@untimed
@given(streams, streams)
def test_a_final_state_is_final(data: bytes, more: bytes) -> None:
    stream = ReplyStream()
    state = stream.feed(data)
    if state in (State.PASSWORD, State.REPLIED, State.BROKEN):
        assert stream.feed(more) is state


@untimed
@given(streams)
def test_finish_can_be_asked_again(data: bytes) -> None:
    stream = ReplyStream()
    stream.feed(data)
    assert stream.finish() == stream.finish()


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        (b"doveadm(u1): Error: Disconnected", LogLine("error", "doveadm(u1): Disconnected")),
        (b"Error: doveadm: Unexpected option", LogLine("error", "doveadm: Unexpected option")),
        (
            b"doveadm(u1): Fatal: connect(127.0.0.1:1) failed: x",
            LogLine("fatal", "doveadm(u1): connect(127.0.0.1:1) failed: x"),
        ),
        (
            b"dsync-local(u)<1><s>: Warning: a: Error: b",
            LogLine("warning", "dsync-local(u)<1><s>: a: Error: b"),
        ),
        (b"doveadm: Panic: file x.c", LogLine("panic", "doveadm: file x.c")),
        (b"doveadm sync [-1fPRU] <dest>", LogLine("info", "doveadm sync [-1fPRU] <dest>")),
        (b"name \xff\r", LogLine("info", "name \udcff")),
        (b"", None),
    ],
)
def test_lines_of_the_program(line: bytes, parsed: Optional[LogLine]) -> None:
    assert parse_stderr_line(line) == parsed


def test_the_handshake_asks_for_the_log() -> None:
    # Minor 0 has no log channel, 3 wants it asked for, 4 has another framing.
    assert doveadm_wire.HANDSHAKE == b"VERSION\tdoveadm-server\t1\t1\n"
