"""Stopping a run on request: handlers for SIGINT and SIGTERM that are active while steps are taken."""

from __future__ import annotations

import os
import signal

from dream_jax.distributed import which_say


class StopSignal:
    """A context manager in which a SIGINT or SIGTERM only sets a flag, so that the run can stop after the current step.

    `requested` returns the flag. A SIGINT when the flag is set already raises KeyboardInterrupt. The previous handlers
    are restored at the end. Must be entered in the main thread.
    """

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        # os.write and not the console, because the signal may interrupt the console in the middle of a write.
        os.write(2, b"\nstopping after this step, with a checkpoint; press Ctrl-C again to stop at once\n")

    def requested(self) -> bool:
        """Returns in all processes whether any of them got a signal; all must call it, and so stop at the same step."""
        return bool(which_say(self._asked))
