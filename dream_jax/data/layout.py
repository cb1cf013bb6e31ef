"""Decides for each batch which rows it contains, its width in tokens, and how many positions each response gets.

The plan of a batch depends only on the index of the batch (0, 1, ...), the seed, the options and the lengths of the
rows. Therefore a run resumes exactly, and every process computes the same plan.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dream_jax.data.lengths import RowLengths
from dream_jax.data.options import BatchOptions

WINDOW = 16
"""Number of consecutive batches whose rows are sorted by length as one group. Used only with `width_step`."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """The plan of one global batch, or of some of its rows.

    rows: int64 [B], indices into the rows that the length policy keeps. width: number of tokens of each row.
    regions: int64 [B], number of positions of each response including its padding. The other positions of the width,
    which belong to neither the prompt nor the response, are on the left and are hidden from attention.
    """

    rows: np.ndarray
    width: int
    regions: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Statistics of the batches of a run. Except steps and epochs, they are counted over its first `batches` batches.

    steps: number of batches of the whole run. epochs: how many times the whole run reads each kept row, on average.
    batches: number of batches that were counted; fewer than `steps` for a long run. supervised: number of positions
    that can be masked. All shares are in [0, 1]. eos_share: end-of-text tokens / supervised positions. padding_share:
    positions without a token of a prompt or of a response with its end token / all positions. hidden_share: positions
    that are hidden from attention, but still computed / all positions. whole_share: rows with their complete answer and
    end token / all rows. widths: width in tokens, as a string -> number of batches of this width. texts_per_row: mean
    number of texts in a row; 1 without packing. packed_share: all positions / the positions that the same texts would
    take in rows of max_length with one text each; 1 without packing.
    """

    steps: int
    epochs: float
    batches: int
    supervised: int
    eos_share: float
    padding_share: float
    hidden_share: float
    whole_share: float
    widths: dict[str, int]
    texts_per_row: float = 1.0
    packed_share: float = 1.0

    def lines(self) -> list[str]:
        """Returns the statistics as lines of text for the console, with warnings."""
        of = "" if self.batches == self.steps else f", over the first {self.batches} steps"
        widths = ", ".join(f"{width} tokens: {count}" for width, count in self.widths.items())
        warnings = []
        if self.eos_share > 0.5:
            warnings.append("warning: most of what is learned is end-of-text; --eos-tail limits it")
        if self.whole_share < 0.5:
            warnings.append("warning: most rows lose the end of their answer: little is learned about stopping")
        packed = []
        if self.texts_per_row != 1 or self.packed_share != 1:
            packed.append(
                f"packed: {self.texts_per_row:.2f} texts a row on average; {1 - self.hidden_share:.1%} of all positions "
                f"belong to a text, {1 - self.padding_share:.1%} without the end-of-text after its end token; one text a "
                f"row would take {1 / self.packed_share:.2f} times as many positions"
            )
        return [
            f"{self.steps} steps, {self.epochs:.2f} epochs{of}:",
            *packed,
            f"end-of-text is {self.eos_share:.1%} of the supervised tokens, padding {self.padding_share:.1%} of all "
            f"positions ({self.hidden_share:.1%} hidden)",
            f"answers that are complete in their batch: {self.whole_share:.1%}; number of batches by width: {widths}",
            *warnings,
        ]


class BatchPlanner:
    """Decides for each batch which rows it contains, its width, and the length of each response."""

    def __init__(
        self,
        lengths: RowLengths,
        stream: Callable[[int], int],
        *,
        batch_size: int,
        max_length: int,
        seed: int,
        options: BatchOptions,
    ):
        """Stores the lengths and the options from which `plan` computes.

        lengths: the lengths of the rows that the length policy keeps. stream: maps a position in the endless, shuffled
        stream of rows (0, 1, 2, ...) to the index of a kept row; batch b has the positions b * batch_size to
        (b + 1) * batch_size - 1. batch_size: rows of a global batch. max_length: the largest width, in tokens.
        """
        self._lengths, self._stream = lengths, stream
        self._batch_size, self._max_length, self._seed, self._options = batch_size, max_length, seed, options
        self._window = lru_cache(maxsize=8)(self._sorted_window)
        # If no row affects the width or the response lengths of the other rows of its batch, a process plans only its
        # own rows and does not need the rows of the other processes.
        self._independent = options.width_step is None and not options.cut_responses and options.tail_cut == 0
        # The data reader and `outlook` ask for the plans of the same batches, so the plans are cached.
        self._planned = lru_cache(maxsize=16)(self._plan)

    def plan(self, batch: int, rows: Sequence[int] | range | None = None) -> BatchPlan:
        """Returns the plan of the batch with the index `batch` (from 0).

        rows: indices of rows within the batch, each in 0..batch_size-1; the plan has only these rows. None means all.
        """
        chosen = range(self._batch_size) if rows is None else rows
        if self._independent:
            numbers = np.array([self._stream(batch * self._batch_size + row) for row in chosen], dtype=np.int64)
            return BatchPlan(rows=numbers, width=self._max_length, regions=self._regions(numbers, self._max_length))
        found = self._planned(batch)
        index = np.asarray(chosen, dtype=np.int64)
        return BatchPlan(rows=found.rows[index], width=found.width, regions=found.regions[index])

    def outlook(self, steps: int, most: int = 20_000) -> Outlook:
        """Returns statistics of the first `steps` batches.

        They are counted over at most four epochs and at most `most` rows, but over at least one batch.
        """
        rows = min(4 * len(self._lengths.prompt), most)
        count = min(steps, max(rows // self._batch_size, 1))
        supervised = end_tokens = filled = valid = whole_rows = positions = 0
        widths: Counter[int] = Counter()
        for batch in range(count):
            plan = self.plan(batch)
            lengths = RowLengths(*(column[plan.rows] for column in self._lengths))
            supervised += int((plan.regions + lengths.learned).sum())
            end_tokens += int((plan.regions - np.minimum(lengths.text, plan.regions)).sum())
            filled += int((lengths.prompt + np.minimum(lengths.response, plan.regions)).sum())
            valid += int((lengths.prompt + plan.regions).sum())
            whole_rows += int(((lengths.whole > 0) & (plan.regions >= lengths.response)).sum())
            positions += len(plan.rows) * plan.width
            widths[plan.width] += 1
        return Outlook(
            steps=steps,
            epochs=steps * self._batch_size / len(self._lengths.prompt),
            batches=count,
            supervised=supervised,
            eos_share=end_tokens / supervised,
            padding_share=1 - filled / positions,
            hidden_share=1 - valid / positions,
            whole_share=whole_rows / (count * self._batch_size),
            widths={str(width): widths[width] for width in sorted(widths)},
        )

    def _plan(self, batch: int) -> BatchPlan:
        """Returns the plan of a whole batch whose rows affect the layout of each other."""
        size, options = self._batch_size, self._options
        # `cut_responses` needs rows in random order: if rows of nearly equal length were put together, cutting all of
        # them to the text length of one row would remove little more than their end tokens.
        if options.width_step is None or options.cut_responses:
            rows = np.array([self._stream(batch * size + row) for row in range(size)], dtype=np.int64)
        else:
            rows = self._window(batch // WINDOW)[batch % WINDOW]
        prompt, response = self._lengths.prompt[rows], self._lengths.response[rows]
        most = None
        if options.cut_responses:
            most = max(int(self._lengths.text[rows[self._draw("cut", batch) % size]]), 1)
            response = np.minimum(response, most)
        # Without `eos_tail` or `cut_responses` every row is padded to the width of the batch, so the width is that of
        # the longest row.
        limited = options.eos_tail is not None or most is not None
        width = self._width((prompt + self._regions(rows, self._max_length, most)) if limited else prompt + response)
        regions = self._regions(rows, width, most)
        shortest = int(regions.min())
        if shortest > 1 and self._draw("whether", batch) < options.tail_cut * 2**64:
            regions = regions - (1 + self._draw("tail", batch) % (shortest - 1))
            width = self._width(prompt + regions)
        return BatchPlan(rows=rows, width=width, regions=regions)

    def _regions(self, rows: np.ndarray, width: int, most: int | None = None) -> np.ndarray:
        """Returns int64 [B]: the positions of each response with its padding, at this width, up to `most` if given."""
        regions = width - self._lengths.prompt[rows]
        if most is not None:
            regions = np.minimum(regions, most)
        if self._options.eos_tail is not None:
            regions = np.minimum(regions, self._lengths.response[rows] + self._options.eos_tail)
        return regions

    def _width(self, needed: np.ndarray) -> int:
        """Returns the width in tokens of a batch; `needed`, int64 [B], is the number of positions each row needs."""
        step = self._options.width_step
        return self._max_length if step is None else min(-(-int(needed.max()) // step) * step, self._max_length)

    def _sorted_window(self, window: int) -> list[np.ndarray]:
        """Returns the rows of each of WINDOW batches, int64 [B] each.

        Rows of similar length are in the same batch. The order of the batches is random and drawn for each window.
        """
        size = WINDOW * self._batch_size
        rows = np.array([self._stream(window * size + index) for index in range(size)], dtype=np.int64)
        rows = rows[np.argsort(self._lengths.prompt[rows] + self._lengths.response[rows], kind="stable")]
        batches = rows.reshape(WINDOW, self._batch_size)
        order = sorted(range(WINDOW), key=lambda index: self._draw(f"order {window}", index))
        return [batches[index] for index in order]

    def _draw(self, what: str, number: int) -> int:
        return draw(self._seed, what, number)


def draw(seed: int, what: str, number: int) -> int:
    """Returns a uniform random integer in [0, 2**64): a hash of the seed, the purpose `what` and `number`.

    A random generator is not used, because its output may change between versions of numpy.
    """
    key = f"{seed}/{what}/{number}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"dream_jax.batch").digest(), "little")
