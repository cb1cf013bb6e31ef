"""Functions that the caller passes in: hooks, which are traced into the compiled loop, and listeners on the host.

Each function object that is used as a hook compiles a program: define a hook once and pass the same object each time.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int


class Moment(NamedTuple):
    """The state of the sampler at one step; every hook receives it.

    Attributes:
      step_B: int32 id of the current step of each row, counted as in `Sample.commit_step`.
      canvas_BT: int32 token ids, mask tokens included, with padding on the left.
      valid_BT: false at padding, true at all other positions.
      positions_BT: int32 position of each token in its text; the first valid token of a row has position 0.
    """

    step_B: Int[jax.Array, "B"]
    canvas_BT: Int[jax.Array, "B T"]
    valid_BT: Bool[jax.Array, "B T"]
    positions_BT: Int[jax.Array, "B T"]


# A token hook is called after each step and returns the canvas with which the sampler continues. A token that it
# changes counts as written in this step. If it masks a position again, the sampler writes that position again, provided
# that the position is in the current block of the row or after it.
TokenHook = Callable[[Moment], Int[jax.Array, "B T"]]

# A logits hook is called before tokens are chosen. It receives the moment, positions of the canvas [B, M] and their
# float32 logits [B, M, V], and returns the logits to use. The logits of tokens that must not be written are minus
# infinity before and after the call.
LogitsHook = Callable[[Moment, Int[jax.Array, "B M"], Float[jax.Array, "B M V"]], Float[jax.Array, "B M V"]]


# All callers share a compiled loop, so it contains only the id of a listener, by which the listener is found here.
_listeners: dict[int, tuple[Callable[[int, np.ndarray], None], int]] = {}
_listener_ids = itertools.count()


@contextlib.contextmanager
def listening(on_step: Callable[[int, np.ndarray], None] | None, padding: int) -> Iterator[np.int32 | None]:
    """Registers a listener while the `with` block runs.

    Args:
      on_step: the listener: a function of the step and the canvas int32 [B, T]; None registers nothing.
      padding: number of columns on the left of the canvas that are cut off before the listener is called.

    Yields:
      The id to pass to `notify`, or None if there is no listener.
    """
    if on_step is None:
        yield None
        return
    listener_id = next(_listener_ids) % 2**31
    _listeners[listener_id] = (on_step, padding)
    try:
        yield np.int32(listener_id)
    finally:
        del _listeners[listener_id]


def notify(listener_id: Any, step: Any, canvas_BT: Any) -> None:
    """Calls the listener that has this id with the step and with the canvas, whose padding on the left is cut off."""
    listener, padding = _listeners[int(listener_id)]
    listener(int(step), np.asarray(canvas_BT)[:, padding:])
