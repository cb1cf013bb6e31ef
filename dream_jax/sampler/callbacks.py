"""Functions that the caller passes in: hooks, which are traced into the compiled loop, and listeners on the host.

Every new function object used as a hook compiles a new program: define a hook once, not anew for every call.
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
    """The state of the sampler at one step, as a hook receives it.

    Attributes:
      step_B: the step that each row is at, counted as in `Sample.commit_step`.
      canvas_BT: token ids, with padding on the left.
      valid_BT: false at padding.
      positions_BT: position of each token in its text, from 0, without the padding.
    """

    step_B: Int[jax.Array, "B"]
    canvas_BT: Int[jax.Array, "B T"]
    valid_BT: Bool[jax.Array, "B T"]
    positions_BT: Int[jax.Array, "B T"]


# Called after each step; returns the canvas to continue with. A token that the hook changes counts as written in this
# step. A position that the hook masks again is written again if it is in the current block of the row or after it.
TokenHook = Callable[[Moment], Int[jax.Array, "B T"]]

# Called before tokens are chosen, with the float32 logits of some canvas positions [B, M]; returns the logits to use.
# Tokens that must not be written are minus infinity before the call and after it.
LogitsHook = Callable[[Moment, Int[jax.Array, "B M"], Float[jax.Array, "B M V"]], Float[jax.Array, "B M V"]]


# A compiled loop is shared by all callers, so it contains only the id of a listener, which is looked up here.
_listeners: dict[int, tuple[Callable[[int, np.ndarray], None], int]] = {}
_listener_ids = itertools.count()


@contextlib.contextmanager
def listening(on_step: Callable[[int, np.ndarray], None] | None, padding: int) -> Iterator[np.int32 | None]:
    """Registers a listener while the `with` block runs, and yields its id; yields None without a listener."""
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
    """Calls a listener with the step and the canvas, without the canvas's padding on the left."""
    listener, padding = _listeners[int(listener_id)]
    listener(int(step), np.asarray(canvas_BT)[:, padding:])
