"""The batch of one training step, which the data pipeline makes and the loss reads. It imports neither numpy nor jax.

`dream_jax.train_step` registers it as a pytree of jax.
"""

from __future__ import annotations

import dataclasses
from typing import Generic, TypeVar

Array = TypeVar("Array")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch(Generic[Array]):
    """The rows of a batch, as numpy arrays, as jax arrays, or as shapes of arrays.

    Attributes:
      tokens_BT: int32 [B, T], the ids of the clean tokens, with padding.
      maskable_BT: bool [B, T], true where a token may be masked and then learned; false in prompts.
      row_B: int32 [B], the index of each row in the global batch. The noise of a row depends on this index, and so not
        on the process or device that computes the row.
      valid_BT: bool [B, T], false before the first token of a row. No query attends to these positions, and the rotary
        positions of the row count from its first valid token. None means that all positions are valid, or that
        `length_BM` says which are.
      length_BM: int32 [B, M], for rows that hold several texts, one after the other from the start of the row: the number
        of tokens of each text, 0 after the last text. The positions after the last text are not valid. None means that
        each row is one text.
      text_BM: int32 [B, M], the index of each of these texts in the global batch, -1 after the last text. The noise of a
        text depends on this index, and not on the row that holds the text. None if `length_BM` is None.
    """

    tokens_BT: Array
    maskable_BT: Array
    row_B: Array
    valid_BT: Array | None = None
    length_BM: Array | None = None
    text_BM: Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairBatch(Batch[Array]):
    """A batch of P pairs of answers, B = 2 P rows: the chosen answer of a pair, and next to it the rejected one.

    Attributes:
      draw_B: int32 [B], the number from which the noise of a pair follows, the same for both of its rows.
      reference_B: float32 [B], the bound of each answer under the reference; None if the step computes it.
    """

    draw_B: Array
    reference_B: Array | None = None
