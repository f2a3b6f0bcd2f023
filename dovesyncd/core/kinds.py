"""The kinds of values that options take: what is accepted, what it becomes, and how it is written."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional

# A C0 or C1 control character could break out of its field in a protocol or a log.
CHAR = r"[^\x00-\x1f\x7f-\x9f]"


class Fault(NamedTuple):
    """What is wrong inside a value; ``suffix`` leads to the place, such as "[2]"."""

    suffix: str
    value: object
    expected: str


def toml_of(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(toml_of(element) for element in value)}]"
    # JSON's strings, integers and booleans are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


@dataclass(frozen=True)
class Kind:
    """What values an option takes. ``convert`` turns an accepted TOML value into that of ``Config``, and
    ``toml`` writes it back. ``unit`` is that of a bare number. An array checks each element as ``item``."""

    expected: str
    accepts: Callable[[object], bool]
    convert: Callable[[Any], Any] = lambda value: value
    toml: Callable[[Any], str] = toml_of
    unit: str = ""
    item: Optional[Kind] = None

    def faults(self, value: object) -> Iterator[Fault]:
        if not self.accepts(value):
            yield Fault("", value, self.expected)
        elif self.item is not None and isinstance(value, list):
            for index, element in enumerate(value):
                for fault in self.item.faults(element):
                    yield fault._replace(suffix=f"[{index}]{fault.suffix}")


SWITCH = Kind("true or false", lambda value: isinstance(value, bool))


def integer(minimum: int, maximum: int) -> Kind:
    return Kind(
        f"an integer from {minimum} to {maximum}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum,
    )


def text(pattern: str, expected: str) -> Kind:
    return Kind(expected, lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None)


def choice(*words: str) -> Kind:
    return Kind("one of " + ", ".join(map(toml_of, words)), lambda value: value in words)


def array(item: Kind, at_least: int = 0) -> Kind:
    expected = f"an array{' that is not empty' if at_least else ''}, each element {item.expected}"
    return Kind(
        expected, lambda value: isinstance(value, list) and len(value) >= at_least, convert=tuple, item=item
    )


def span(minimum: float, maximum: float, whole: bool = False) -> Kind:
    """``whole``: Dovecot takes it in seconds only."""

    def accepts(value: object) -> bool:
        seconds = read_span(value)
        return seconds is not None and minimum <= seconds <= maximum and not (whole and seconds % 1)

    what = "whole seconds, as a time span" if whole else "a time span"
    return Kind(
        f'{what} from {format_span(minimum)} to {format_span(maximum)}, such as "1min 30s"',
        accepts,
        convert=read_span,
        toml=lambda seconds: toml_of(format_span(seconds)),
        unit="s",
    )


# Microseconds of each unit of systemd.time(7), without months and years; the first spelling is written.
_UNITS = (
    (("w", "week", "weeks"), 604_800_000_000),
    (("d", "day", "days"), 86_400_000_000),
    (("h", "hr", "hour", "hours"), 3_600_000_000),
    (("min", "m", "minute", "minutes"), 60_000_000),
    (("s", "sec", "second", "seconds"), 1_000_000),
    (("ms", "msec"), 1_000),
    # With the micro sign and the Greek letter.
    (("us", "usec", "\u00b5s", "\u03bcs"), 1),
)
_FACTOR = {spelling: factor for spellings, factor in _UNITS for spelling in spellings}
_TERM = re.compile(r" *([0-9]{1,12}(?:\.[0-9]{1,9})?|\.[0-9]{1,9}) *([a-z\u00b5\u03bc]*) *")


def read_span(value: object) -> Optional[float]:
    """A systemd time span ("1h 30min") or a bare number of seconds, in seconds; None when it is neither.

    Kept to whole microseconds, so that what ``format_span`` writes reads back as the same float.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return round(value * 1_000_000) / 1_000_000 if 0 <= value < 1e12 else None
    if not isinstance(value, str):
        return None
    microseconds, position, terms = 0, 0, 0
    while position < len(value):
        term = _TERM.match(value, position)
        if term is None:
            return None
        number, unit = term.groups()
        position, terms = term.end(), terms + 1
        if not unit and terms == 1 and position == len(value):
            unit = "s"
        if unit not in _FACTOR:
            return None
        microseconds += round(float(number) * _FACTOR[unit])
    return microseconds / 1_000_000 if terms else None


def format_span(seconds: float) -> str:
    """Seconds as a systemd time span, "1h 30min", with days as the largest unit."""
    rest = round(seconds * 1_000_000)
    terms = []
    for spellings, factor in _UNITS[1:]:
        count, rest = divmod(rest, factor)
        if count:
            terms.append(f"{count}{spellings[0]}")
    return " ".join(terms) or "0s"


def destination() -> Kind:
    return Kind(
        '"tcp:HOST[:PORT]", "tcps:HOST[:PORT]", "remote:[LOGIN@]HOST", "remoteprefix:[LOGIN@]HOST", '
        'or a command: an array of words, or a string with a "/" or a space',
        lambda value: _is_destination(_words(value)),
        convert=_words,
        toml=lambda words: toml_of(words[0] if len(words) == 1 else words),
    )


# What doveadm takes for a location and not for a command (doveadm-dsync.c, mirror_get_remote_cmd()).
_LOCATION = re.compile(r"([A-Za-z0-9]+):(.*)")


def _words(value: object) -> tuple[str, ...]:
    """A destination as doveadm's arguments, () when it can't be one. Dovecot splits a lone word at spaces."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        return ()
    if len(value) == 1 and not _LOCATION.match(value[0]):
        value = [word for word in value[0].split(" ") if word]
    return tuple(value)


def _is_destination(words: tuple[str, ...]) -> bool:
    if not words or not all(re.fullmatch(f"{CHAR}+", word) for word in words) or words[0].startswith("-"):
        return False
    location = _LOCATION.fullmatch(words[0])
    if location is None:
        # Dovecot takes a lone word without "/" for a host to reach by ssh: more likely a forgotten "tcp:".
        return len(words) > 1 or "/" in words[0]
    scheme, rest = location.groups()
    if len(words) > 1 or " " in rest:
        return False
    if scheme in ("remote", "remoteprefix"):
        # ssh would take such a login or host for one of its options.
        return all(part and not part.startswith("-") for part in rest.rsplit("@", 1))
    return scheme in ("tcp", "tcps") and _is_address(rest)


def _is_address(text: str) -> bool:
    """HOST, HOST:PORT, or the path of a socket (2.4). What follows the last ":" is the port to Dovecot."""
    if "/" in text:
        return text.startswith("/")
    host, colon, port = text.rpartition(":") if ":" in text else (text, "", "")
    if colon and not (re.fullmatch("[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        return False
    if ":" not in host:
        return host != "" and not host.startswith("-")
    try:
        ipaddress.IPv6Address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        return False
    return True
