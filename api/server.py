"""The HTTP server: uvicorn, which itself waits for ever for a client that says nothing. It knows no route."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE_SECONDS = 60.0
"""A request has to arrive within so long, head and body each, and an answer to be taken; a connection that does neither is closed within twice the time."""

SHUTDOWN_SECONDS = 2
"""Open event streams end by themselves only with their search; a server that is told to stop waits this long for them."""


class ImpatientProtocol(H11Protocol):
    """Closes a connection on which the client lets us wait: else a thousand of them, without any key, use up the files that a process may open."""

    patience_seconds = PATIENCE_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look_again(None)

    def _look_again(self, before: object) -> None:
        if self.transport.is_closing():
            return
        to_send = self.transport.get_write_buffer_size()
        is_client_due = to_send > 0 or self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        now = (id(self.cycle), self.conn.their_state, to_send) if is_client_due else None
        if now is not None and now == before:
            self.transport.abort()
            return
        self.loop.call_later(self.patience_seconds, self._look_again, now)


def make_server(app: Any, *, host: str, port: int, protocol: type[H11Protocol] = ImpatientProtocol) -> uvicorn.Server:
    """A server of an application, which logs nothing of requests (`api/observer.py` does) and opens no websockets: there are none."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        # Not httptools, which uvicorn prefers where it is installed: it takes headers of any length.
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    return uvicorn.Server(config)
