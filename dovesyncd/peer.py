"""Whether a peer's doveadm listener says anything. dsync has no timeout for one that accepts a connection and
is silent then, and what waits for it in Dovecot can't be ended (2.3.19 to 2.4.1)."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence

from dovesyncd.core.doveadm_wire import HANDSHAKE
from dovesyncd.waiting import end


async def silence(destination: Sequence[str], seconds: float) -> str:
    """Why the peer can't be used, "" if it greets within ``seconds`` or if only dsync itself can tell."""
    scheme, _, address = destination[0].partition(":")
    host, _, port = address.rpartition(":")
    if len(destination) > 1 or scheme not in ("tcp", "tcps") or not (host and port.isdecimal()):
        return ""
    greeting = asyncio.ensure_future(_greeting(host.strip("[]"), int(port), scheme == "tcps"))
    try:
        done, _ = await asyncio.wait({greeting}, timeout=seconds)
        if not done:
            return f"{address}: no greeting within {seconds:g} s"
        return "" if greeting.result() else f"{address}: closed the connection without a greeting"
    except ssl.SSLError:
        # It does speak. What is wrong with its certificate is for dsync to say.
        return ""
    except OSError as error:
        return f"{address}: {error.strerror or error}"
    finally:
        await end({greeting})


async def _greeting(host: str, port: int, tls: bool) -> bytes:
    context = None
    if tls:
        # Nothing is said to it that it may not know, so it need not prove who it is.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    reader, writer = await asyncio.open_connection(host, port, ssl=context)
    try:
        writer.write(HANDSHAKE)
        return await reader.read(1)
    finally:
        writer.transport.abort()
