"""Batches of prompts: an endless, resumable stream of rows in random order, without their responses."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import numpy as np

from dream_jax.batch import Batch
from dream_jax.data import Batches, Mixture, TokenizedRows
from dream_jax.data.layout import BatchPlanner, Outlook
from dream_jax.data.lengths import fitting_rows
from dream_jax.data.options import BatchOptions
from dream_jax.posttraining.base import BatchSizes
from dream_jax.sampler import bucket_length

Array = TypeVar("Array")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptBatch(Batch[Array]):
    """Prompts with padding on the left; no position is maskable.

    Attributes:
      source_B: int32 [B], the index of each row in the source.
    """

    source_B: Array


class PromptBatches(Batches):
    """An endless iterator over batches of prompts. Every process gets all prompts of a batch.

    Each epoch is another permutation of the rows that fit `max_length` with their responses. Batch k has the rows
    k B to k B + B - 1 of the stream, so the position in the stream is the number of batches.
    """

    def __init__(self, rows: TokenizedRows, sizes: BatchSizes):
        """Measures the rows.

        Raises:
          ValueError: the source has no rows, or none fits, or it is a mixture with weights.
        """
        source = rows.source
        if isinstance(source, Mixture) and source.weights != tuple(float(len(one)) for one in source.parts):
            raise ValueError(
                "--mix-weights has no effect on prompts for rewards, because every row is drawn equally often; leave it out"
            )
        self._rows, self._sizes, self._next = rows, sizes, 0
        self._numbers, lengths, self.report = fitting_rows(rows, sizes.max_length)
        self.longest = int(lengths.prompt.max())
        self._width = bucket_length(self.longest)
        # The planner counts epochs and lengths for the report; it lays out nothing here.
        self._outlook = BatchPlanner(
            lengths, self._index, batch_size=sizes.batch_size, max_length=sizes.max_length, seed=sizes.seed,
            options=BatchOptions(),
        )  # fmt: skip

    def __next__(self) -> PromptBatch[np.ndarray]:
        """Returns the next batch: tokens int32 [B, P], where P is the same for all batches."""
        count = self._sizes.batch_size
        span = range(self._next * count, (self._next + 1) * count)
        source_B = np.array([int(self._numbers[self._index(at)]) for at in span], np.int32)
        pad_id = self._rows.tokenizer.pad_id
        tokens_BP = np.full((count, self._width), pad_id, np.int32)
        valid_BP = np.zeros(tokens_BP.shape, bool)
        for row, number in enumerate(source_B.tolist()):
            one = self._rows[number]
            prompt = one.tokens[: one.prompt_length]
            tokens_BP[row, self._width - len(prompt) :] = prompt
            valid_BP[row, self._width - len(prompt) :] = True
        self._next += 1
        return PromptBatch(
            tokens_BT=tokens_BP,
            maskable_BT=np.zeros(tokens_BP.shape, bool),
            row_B=np.arange(count, dtype=np.int32),
            valid_BT=valid_BP,
            source_B=source_B,
        )

    def get_state(self) -> dict[str, Any]:
        """Returns the number of batches so far, and what the stream depends on."""
        return {"batches": self._next, "of": self._identity_of()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to the position of `state`, a result of `get_state`. Raises ValueError if it is of another stream."""
        found, wanted = state.get("of"), self._identity_of()
        if found != wanted:
            raise ValueError(
                f"the saved position belongs to another stream of prompts: it was {found}, now it is {wanted}. Resume with "
                "the old settings, text and tokenizer"
            )
        self._next = int(state["batches"])

    @property
    def most_texts(self) -> int | None:
        """None: each row is one text."""
        return None

    def outlook(self, steps: int) -> Outlook:
        """Returns statistics of `steps` batches of these rows, their responses included."""
        return self._outlook.outlook(steps)

    def close(self) -> None:
        """Does nothing, because no thread reads ahead."""

    def _identity_of(self) -> dict[str, int | str]:
        sizes = self._sizes
        return {
            "kind": "prompts",
            "seed": sizes.seed,
            "batch_size": sizes.batch_size,
            "max_length": sizes.max_length,
            "rows": len(self._numbers),
            "digest of the rows": self.report.digest,
        }

    def _index(self, at: int) -> int:
        epoch, offset = divmod(at, len(self._numbers))
        return int(_permutation(self._sizes.seed, epoch, len(self._numbers))[offset])


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns the order of `count` rows in an epoch, int32 [count]."""
    return np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), count))
