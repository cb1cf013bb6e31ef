"""Stopping a run on request: what SIGINT and SIGTERM do while steps are taken."""

from __future__ import annotations

import os
import signal

from dream_jax.distributed import which_say


class StopSignal:
    """While active, the first SIGINT or SIGTERM asks the run to stop after its step; a second SIGINT interrupts it."""

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
        # Not through the console: a signal may arrive while it is writing.
        os.write(2, b"\nstopping after this step and saving; press Ctrl-C again to stop at once\n")

    def requested(self) -> bool:
        """Whether any process was asked, so that all of them stop at the same step; all must call."""
        return bool(which_say(self._asked))
