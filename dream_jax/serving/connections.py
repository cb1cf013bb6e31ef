"""Limits the connections of clients: their number, the time for the head of a request, and the time to read an answer."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_HEAD_SECONDS = 30.0  # the head of a request must be complete within this time
_STALL_SECONDS = 60.0  # a client must read the sent data within this time
_SPARE_FILES = 128  # number of file descriptors that are kept for the rest of the process


class BoundedConnection(H11Protocol):
    """A connection that is closed if its client does not finish the head of a request, or does not read an answer.

    uvicorn itself closes connections that are idle after an answer, and the application limits the time for a body.

    Attributes:
      most: maximum number of connections of the process; further ones are closed at once.
    """

    most = 10_000

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the timer for the head of the first request; closes a connection beyond `most`."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._head_timer = self.loop.call_later(_HEAD_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the timers of the connection."""
        self._end_head_timer()
        self._end_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads data. The timer for the head of a later request starts with the first byte of this head."""
        super().data_received(data)
        theirs = self.conn.their_state
        # A body that is sent after the answer is not wanted any more: it has the time of a head, too.
        is_late = theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE
        if theirs is not h11.IDLE and not is_late:
            self._end_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(_HEAD_SECONDS, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection that is idle after an answer, also if the client does not read the rest of this answer."""
        super().timeout_keep_alive_handler()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(_STALL_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """Starts the timer for a client that has not read the sent data."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(_STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Stops the timer, because the client has read enough of the sent data."""
        self._end_stall_timer()
        super().resume_writing()

    def _end_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def most_connections() -> int:
    """Returns the number of connections that this process's limit of open files allows, in 16..10,000."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10_000 if soft == resource.RLIM_INFINITY else max(min(soft - _SPARE_FILES, 10_000), 16)
