"""From what doveadm answered to what the daemon does next: one table of exit codes, one of log texts.

The texts are those of Dovecot 2.3.19 to 2.4.4; a line of the other side carries ``remote(host:port):``
in its prefix and is worded alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Optional

from dovesyncd.core.doveadm_wire import DIED, DISCONNECTED, EXIT_UNKNOWN
from dovesyncd.core.model import LogLine, Outcome, OutcomeClass, Reply

# Reply.failure of a sync that the daemon itself gave up.
TIMEOUT = "timeout"


class _Text(NamedTuple):
    """A log message that says ``kind`` more precisely than the exit code does."""

    kind: OutcomeClass
    pattern: re.Pattern[str]


def _text(kind: OutcomeClass, *patterns: str) -> _Text:
    return _Text(kind, re.compile("|".join(patterns)))


# What stands before a message: log prefixes of doveadm and dsync, of their parts (2.4), of the other side.
_PREFIXES = re.compile(
    r"(?:doveadm: |(?:doveadm|dsync|dsync-local|dsync-remote|remote)(?:\([^)]*\))(?:<[^>]*>)*: "
    r"|cmd [a-z -]+: |conn \S+ \([^)]*\): |brain [MS]: )*"
)

_REMOTE = re.compile(
    r"(?:doveadm: |cmd [a-z -]+: |(?:doveadm|dsync-local)\([^)]*\)(?:<[^>]*>)*: )*(?:dsync-)?remote\("
)

# The first row that matches any message wins, so causes stand before the consequences that follow them.
# Patterns match from the start of a message: further in, it may quote a folder that a user has named.
_TEXTS = (
    # auth-master.c: nobody listens on auth-userdb, or he has just gone.
    _text(
        OutcomeClass.DOVECOT_DOWN,
        r"auth-master: (passdb|userdb) lookup\(.*\): (connect\(/.*\) failed|Disconnected unexpectedly)",
    ),
    # dsync-brain.c dsync_brain_lock(), lib/file-create-locked.c
    _text(OutcomeClass.OTHER, r"Couldn't lock .*(Permission denied|Read-only file system|No space left)"),
    # The latter: dsync-brain-mailbox.c
    _text(
        OutcomeClass.BUSY,
        r"Couldn't lock .*(Timed out after|locking failed)",
        r"Failed to lock mailbox .* for dsyncing: .*Timed out after",
    ),
    # MAIL_ERRSTR_NO_QUOTA, the default of quota_exceeded_message, and a full disk
    _text(
        OutcomeClass.QUOTA,
        r".*(Quota exceeded|Not enough disk quota)",
        r".*failed: (No space left on device|Disk quota exceeded)",
    ),
    # doveadm-client.c (2.3: server-connection.c); openssl and ssh for the other carriers
    _text(
        OutcomeClass.AUTH,
        r"doveadm (authentication|STARTTLS) failed",
        r"doveadm client authenticated with wrong password",
        r"doveadm_password not set",
        r"Disconnected from remote: .*(SSL|certificate)",
        r"(Couldn't create server connection: )?(Couldn't initialize SSL|SSL handshake failed)",
        r"(doveadm server disconnected before handshake: )?Received invalid SSL certificate",
        r"\S+: Permission denied \((publickey|password|keyboard)",
        r"Host key verification failed",
    ),
    # doveadm-dsync.c doveadm_client callback; EX_NOUSER of a remote command
    _text(OutcomeClass.NOUSER_REMOTE, r"Unknown user in remote", r"Remote command returned error 67\b"),
    # dsync-ibc-stream.c, dsync-brain.c
    _text(OutcomeClass.TIMEOUT, r"I/O has stalled", r"Timeout during state="),
    # 2.4: doveadm-client.c, lib/connection.c; 2.3: doveadm-util.c. A path in connect() is a local service,
    # unless the peer's own line says so. 255 is ssh's own failure.
    _text(
        OutcomeClass.PEER_DOWN,
        r"Disconnected from remote: ",
        r"doveadm server disconnected before handshake",
        r"Couldn't create server connection",
        r"connect\([^/)]*\) (failed|timed out)",
        r"Lookup of host .* failed",
        r"Failed to start remote dsync-server command: .*dns_lookup\(",
        r"Remote command returned error 255\b",
        r"read\([^)]*\) failed: (Connection reset|Connection timed out|No route to host)",
        r"write\([^)]*\) failed: (Broken pipe|Connection reset)",
    ),
    # FATAL_EXEC of lib/failures.h, and the shell's words for it
    _text(OutcomeClass.CONFIG, r"Remote command returned error (84|126|127)\b"),
    _text(
        OutcomeClass.CRASH,
        r"Raw backtrace",
        r"Remote command died with signal",
        r"Remote command returned error 8[0-9]\b",
        r"read\([^)]*\) failed: EOF",
    ),
    _text(
        OutcomeClass.CONFIG,
        r"Client sent unknown command",
        r"doveadm client isn't allowed to use command",
        r"No namespaces found for syncing",
        r"Namespace not found",
        r"Both source and destination mail_\w+",
        r"Mail locations must use the same hierarchy separator",
        r"Synced namespaces have conflicting",
        r"Failed to initialize user",
        r"-N parameter requires syncing with remote host",
    ),
)

# Codes that say it all (sysexits.h; DOVEADM_EX_* in lib-doveadm/doveadm-protocol.h). The others
# (DATAERR, TEMPFAIL, PROTOCOL, NOPERM, ...) are decided by the texts.
_CODES = {
    0: OutcomeClass.OK,
    2: OutcomeClass.CHANGED,
    64: OutcomeClass.CONFIG,
    73: OutcomeClass.QUOTA,
    78: OutcomeClass.CONFIG,
}
_NOUSER = 67
# FATAL_LOGOPEN to FATAL_DEFAULT (lib/failures.h): the process gave up.
_FATAL_CODES = range(80, 90)

_ERRORS = ("panic", "fatal", "error")
_SEVERITY = ("panic", "fatal", "error", "warning", "info")
_STATE = re.compile(r"(?:[A-Za-z0-9+/]{4}){2,}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
# dsync-brain-mailbox.c dsync_brain_sync_mailbox_init(): a plain repeat fails the same way for ever.
_WANTS_FULL = "retry with a full sync"


def classify(reply: Reply) -> Outcome:
    """What a reply to ``sync`` means. ``text`` is never empty unless the outcome is OK."""
    wants_full = any(_WANTS_FULL in line.text for line in reply.log)
    lines = _by_severity(reply.log)
    kind, cause = _kind_and_cause(reply, lines)
    if kind is OutcomeClass.OK:
        return Outcome(kind, state=_new_state(reply), wants_full=wants_full)
    return Outcome(kind, _explain(reply, lines, cause), wants_full=wants_full)


def _kind_and_cause(reply: Reply, lines: Sequence[LogLine]) -> tuple[OutcomeClass, Optional[LogLine]]:
    """The class, and the line that says why if a known one does."""
    code = reply.exit_code
    if code is None and reply.failure == TIMEOUT:
        return OutcomeClass.TIMEOUT, None
    if code == _NOUSER:
        return _missing_user(lines)
    found = _known_texts(lines)
    if code in _CODES:
        kind = _CODES[code]
        return kind, next((line for told, line in found if told is kind), None)
    return next(found, (_without_text(reply, lines), None))


def _known_texts(lines: Sequence[LogLine]) -> Iterator[tuple[OutcomeClass, LogLine]]:
    for rule in _TEXTS:
        for line in lines:
            panicked = rule.kind is OutcomeClass.CRASH and line.level == "panic"
            if panicked or rule.pattern.match(_message(line)):
                theirs = rule.kind is OutcomeClass.DOVECOT_DOWN and _REMOTE.match(line.text)
                yield (OutcomeClass.PEER_DOWN if theirs else rule.kind), line


def _message(line: LogLine) -> str:
    prefixes = _PREFIXES.match(line.text)
    return line.text[prefixes.end() :] if prefixes else line.text


def _missing_user(lines: Sequence[LogLine]) -> tuple[OutcomeClass, Optional[LogLine]]:
    """Both sides answer NOUSER. Without proof that it is the local one, it is taken for the remote one:
    that forgets nobody."""
    for line in lines:
        if line.text.endswith("User doesn't exist") and "remote(" not in line.text:
            return OutcomeClass.NOUSER_LOCAL, line
    remote = (line for line in lines if _message(line).startswith("Unknown user in remote"))
    return OutcomeClass.NOUSER_REMOTE, next(remote, None)


def _without_text(reply: Reply, lines: Sequence[LogLine]) -> OutcomeClass:
    if any(line.level in ("panic", "fatal") for line in lines):
        return OutcomeClass.CRASH
    if reply.exit_code is None:
        if reply.failure == DISCONNECTED:
            # A doveadm-server of 2.3 dies of a peer that can't be reached, and its last words (Fatal:) go
            # to the log file only.
            return OutcomeClass.PEER_DOWN
        died = reply.failure == DIED or reply.failure.startswith("killed by")
        return OutcomeClass.CRASH if died else OutcomeClass.OTHER
    if reply.exit_code in _FATAL_CODES:
        return OutcomeClass.CRASH
    if reply.exit_code == EXIT_UNKNOWN:
        # 2.3 has no word for 2, and logs nothing about it over the socket.
        return OutcomeClass.CHANGED
    return OutcomeClass.OTHER


def _by_severity(log: Sequence[LogLine]) -> list[LogLine]:
    """The worst lines first, in the order they came within one level; no debug lines."""
    worth = [line for line in log if line.level in _SEVERITY]
    return sorted(worth, key=lambda line: _SEVERITY.index(line.level))


def _explain(reply: Reply, lines: Sequence[LogLine], cause: Optional[LogLine]) -> str:
    # A warning is no cause where there is a better one.
    errors = [line for line in lines if line.level in _ERRORS] if reply.failure else lines
    for line in (cause, *errors):
        if line is not None and line.text.strip():
            return line.text
    if reply.failure == TIMEOUT:
        return "no answer before the deadline"
    if reply.failure == DISCONNECTED:
        return "doveadm-server closed the connection without a reply"
    if reply.failure:
        return reply.failure
    if reply.exit_code in (2, EXIT_UNKNOWN):
        return "mailboxes changed during the sync"
    return f"doveadm ended with exit code {reply.exit_code} and no word: see Dovecot's logs on both sides"


def _new_state(reply: Reply) -> str:
    """The printed state, if it looks like one: dsync prints nothing when the next sync must do without."""
    state = reply.output[0] if reply.output else ""
    return state if _STATE.fullmatch(state) else ""
