"""The axis alphabet: one capital letter for each axis, used everywhere in the project.

The name of an array ends in its axes (`q_BTNH`). Einsum strings and the jaxtyping annotations of public functions use
the same letters.

| letter | axis | in the published config |
|---|---|---|
| B | batch rows | |
| T | tokens of a row, as queries | |
| S | tokens of a row, as keys and values | |
| D | model width | hidden_size |
| N | query heads | num_attention_heads |
| K | key/value heads | num_key_value_heads |
| G | query heads per key/value head, N / K | |
| H | width of one head | hidden_size / num_attention_heads |
| F | width of the MLP | intermediate_size |
| V | vocabulary | vocab_size |
| L | layers | num_hidden_layers |
| P | prompt tokens | |
| M | masked positions whose logits are computed | |
| R | rows of a flat [R, D] or [R, V] array | |
| W | tokens of a window of queries on the KV cache | |

A module that uses further letters explains them.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

Array = jax.Array | np.ndarray

TokensBT = Int[Array, "B T"]
BoolBT = Bool[Array, "B T"]
FloatBT = Float[Array, "B T"]
FloatB = Float[Array, "B"]
HiddenBTD = Float[Array, "B T D"]
LogitsBTV = Float[Array, "B T V"]

# A nested dict of arrays: the parameters, or arrays for each of them, such as gradients. The keys are strings, and the
# numbers of the layers if the layers are apart (see `model`).
ParamTree = dict[Any, Any]


def joined(base: ParamTree, more: ParamTree) -> ParamTree:
    """Returns a nested dict with the leaves of both. Raises ValueError if both have a leaf of the same name."""
    found = dict(base)
    for key, value in more.items():
        if key not in found:
            found[key] = value
        elif isinstance(value, dict) and isinstance(found[key], dict):
            found[key] = joined(found[key], value)
        else:
            raise ValueError(f"both trees hold the leaf {key!r}")
    return found
