"""Bounds on what the connections of clients may hold: time for the head of a request, unread answers, their number."""

from __future__ import annotations

import asyncio
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_HEAD_SECONDS = 30.0  # within which the head of a request must be complete
_STALL_SECONDS = 60.0  # within which a client must read what was sent
_SPARE_FILES = 128  # descriptors that connections leave to the rest of the process


class BoundedConnection(H11Protocol):
    """A connection that is closed if its client neither asks nor reads.

    uvicorn itself closes connections that are idle after an answer, and the application bounds the time of bodies.

    Attributes:
      most: maximum number of connections; further ones are closed at once.
    """

    most = 10_000

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.abort()
            return
        self._head_timer = self.loop.call_later(_HEAD_SECONDS, transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the waiting."""
        self._end_head_timer()
        self._end_stall_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Reads data; the time for a head begins with its first byte."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._end_head_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(_HEAD_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """Begins to wait for a client that has not read what was sent."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(_STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Ends this waiting."""
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
    """Returns how many connections the limit of open files of this process leaves room for."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 10_000 if soft == resource.RLIM_INFINITY else max(min(soft - _SPARE_FILES, 10_000), 16)
