"""Listeners: who is shown the canvas while the compiled loop runs.

Knows callbacks. Knows nothing of what a canvas means.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

# The compiled loop is shared by all callers, so what goes into it is the number of a listener, which is found here.
_listeners: dict[int, tuple[Callable[[int, np.ndarray], None], int]] = {}
_numbers = itertools.count()


def notify(number: Any, step: Any, canvas_BT: Any) -> None:
    """Shows a canvas to the listener of this number."""
    listener, padding = _listeners[int(number)]
    listener(int(step), np.asarray(canvas_BT)[:, padding:])


@contextlib.contextmanager
def listening(on_step: Callable[[int, np.ndarray], None] | None, padding: int) -> Iterator[np.int32 | None]:
    """Gives the number under which a listener is known while the block runs."""
    if on_step is None:
        yield None
        return
    number = next(_numbers) % 2**31
    _listeners[number] = (on_step, padding)
    try:
        yield np.int32(number)
    finally:
        del _listeners[number]
