"""Hooks: functions of the caller that are traced into the loop, and what they are shown.

A hook is compiled in, once for each function object: define it once, not anew for every call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Bool, Float, Int


class Moment(NamedTuple):
    """Where the loop is.

    Attributes:
      step_B: the step that each row takes, as in `Sample.commit_step`.
      canvas_BT: tokens, padding on the left.
      valid_BT: false at padding.
      positions_BT: position of each place in its text, from 0.
    """

    step_B: Int[jax.Array, "B"]
    canvas_BT: Int[jax.Array, "B T"]
    valid_BT: Bool[jax.Array, "B T"]
    positions_BT: Int[jax.Array, "B T"]


# After each step: gives the canvas to go on with. A token it changes counts as written in this step. A place it masks again
# is written again if it lies in the row's present block or after it.
TokenHook = Callable[[Moment], Int[jax.Array, "B T"]]

# Before tokens are chosen: gives other float32 logits for the places [B, M] that are looked at. Tokens that must not be
# written are minus infinity already, and stay so.
LogitsHook = Callable[[Moment, Int[jax.Array, "B M"], Float[jax.Array, "B M V"]], Float[jax.Array, "B M V"]]
