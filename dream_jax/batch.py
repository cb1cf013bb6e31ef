"""The rows of one training step: one form from the data to the loss, with no library behind it.

`dream_jax.train_step` registers it as a pytree.
"""

from __future__ import annotations

import dataclasses
from typing import Generic, TypeVar

Array = TypeVar("Array")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(Generic[Array]):
    """Rows of tokens, as numpy arrays, jax arrays, or shapes of them.

    Attributes:
      tokens_BT: int32 [B, T], the clean tokens with their padding.
      maskable_BT: bool [B, T], true where a token may be masked, and is then learned; false on prompts.
      row_B: int32 [B], the number of each row within the global batch. Its noise depends on this number, and so not on
        the process or the device that computes the row.
      valid_BT: bool [B, T], false on positions before a row begins: they are not attended to, and the positions of the
        row count from its first valid token. None where every position is valid.
    """

    tokens_BT: Array
    maskable_BT: Array
    row_B: Array
    valid_BT: Array | None = None
