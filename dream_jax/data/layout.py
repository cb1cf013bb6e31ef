"""Which rows make up each batch, how wide it is and how long their responses are: by arithmetic on lengths alone.

Everything is a function of the number of the batch. Nothing is carried from one batch to the next, so a run resumes
exactly, and every process computes the same plan.
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
"""Batches whose rows are sorted by length together, where widths differ."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """One global batch, or some rows of it.

    rows: which of the kept rows, int64 [B]. width: tokens a row. regions: number of positions of each response, its
    padding included, int64 [B]; the positions that prompt and response leave over are hidden.
    """

    rows: np.ndarray
    width: int
    regions: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a run will see, counted over its first `batches`: all of them, or enough for shares.

    epochs: times that the whole run goes over the rows kept. supervised: positions that can be masked;
    eos_share: of these, how many are end-of-text. padding_share: of all positions, how many hold no token of a prompt
    or a response with its end; hidden_share: how many of all belong to no row, though they are computed.
    whole_share: rows that keep their whole answer and its end token. widths: tokens a row -> batches.
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

    def lines(self) -> list[str]:
        """The outlook as text."""
        of = "" if self.batches == self.steps else f", over the first {self.batches} steps"
        widths = ", ".join(f"{width} tokens: {count}" for width, count in self.widths.items())
        warnings = []
        if self.eos_share > 0.5:
            warnings.append("warning: most of what is learned is end-of-text; --eos-tail limits it")
        if self.whole_share < 0.5:
            warnings.append("warning: most rows lose the end of their answer: little is learned about stopping")
        return [
            f"{self.steps} steps, {self.epochs:.2f} epochs{of}:",
            f"end-of-text is {self.eos_share:.1%} of the supervised tokens, padding {self.padding_share:.1%} of all "
            f"positions ({self.hidden_share:.1%} hidden)",
            f"answers whole in their batch: {self.whole_share:.1%}; batches by width: {widths}",
            *warnings,
        ]


class BatchPlanner:
    """Decides for each batch which rows it has, its width, and the length of their responses."""

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
        """See `plan`.

        lengths: of the rows kept. stream: position (0, 1, 2, ...) -> index of a row kept; its first batch_size positions
        are the first batch, and so on.
        """
        self._lengths, self._stream = lengths, stream
        self._batch_size, self._max_length, self._seed, self._options = batch_size, max_length, seed, options
        self._window = lru_cache(maxsize=8)(self._sorted_window)
        # Where rows change no other row of their batch, a process need not look at those of the others.
        self._independent = options.width_step is None and not options.cut_responses and options.tail_cut == 0
        # Reading and the outlook ask for the same batches: each is planned once.
        self._planned = lru_cache(maxsize=16)(self._plan)

    def plan(self, batch: int, rows: Sequence[int] | range | None = None) -> BatchPlan:
        """Batch number `batch`, from 0; of it the given `rows`, each in 0..batch_size-1, or all."""
        chosen = range(self._batch_size) if rows is None else rows
        if self._independent:
            numbers = np.array([self._stream(batch * self._batch_size + row) for row in chosen], dtype=np.int64)
            return BatchPlan(rows=numbers, width=self._max_length, regions=self._regions(numbers, self._max_length))
        found = self._planned(batch)
        index = np.asarray(chosen, dtype=np.int64)
        return BatchPlan(rows=found.rows[index], width=found.width, regions=found.regions[index])

    def outlook(self, steps: int, most: int = 20_000) -> Outlook:
        """What the first `steps` batches hold; counted over four epochs or `most` rows, and at least one batch."""
        rows = min(4 * len(self._lengths.prompt), most)
        count = min(steps, max(rows // self._batch_size, 1))
        supervised = end_tokens = filled = valid = whole_rows = positions = 0
        widths: Counter[int] = Counter()
        for batch in range(count):
            plan = self.plan(batch)
            of = RowLengths(*(column[plan.rows] for column in self._lengths))
            supervised += int((plan.regions + of.learned).sum())
            end_tokens += int((plan.regions - np.minimum(of.text, plan.regions)).sum())
            filled += int((of.prompt + np.minimum(of.response, plan.regions)).sum())
            valid += int((of.prompt + plan.regions).sum())
            whole_rows += int(((of.whole > 0) & (plan.regions >= of.response)).sum())
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
        size, options = self._batch_size, self._options
        # Sorted rows are of one length: cutting all to the length of one of them would take nothing but every end.
        if options.width_step is None or options.cut_responses:
            rows = np.array([self._stream(batch * size + row) for row in range(size)], dtype=np.int64)
        else:
            rows = self._window(batch // WINDOW)[batch % WINDOW]
        prompt, response = self._lengths.prompt[rows], self._lengths.response[rows]
        most = None
        if options.cut_responses:
            most = max(int(self._lengths.text[rows[self._draw("cut", batch) % size]]), 1)
            response = np.minimum(response, most)
        # Without a limit a row is filled to the batch's width, which its longest row decides.
        limited = options.eos_tail is not None or most is not None
        width = self._width((prompt + self._regions(rows, self._max_length, most)) if limited else prompt + response)
        regions = self._regions(rows, width, most)
        shortest = int(regions.min())
        if shortest > 1 and self._draw("whether", batch) < options.tail_cut * 2**64:
            regions = regions - (1 + self._draw("tail", batch) % (shortest - 1))
            width = self._width(prompt + regions)
        return BatchPlan(rows=rows, width=width, regions=regions)

    def _regions(self, rows: np.ndarray, width: int, most: int | None = None) -> np.ndarray:
        """Number of positions of each response, its padding included, in batches of this width."""
        regions = width - self._lengths.prompt[rows]
        if most is not None:
            regions = np.minimum(regions, most)
        if self._options.eos_tail is not None:
            regions = np.minimum(regions, self._lengths.response[rows] + self._options.eos_tail)
        return regions

    def _width(self, needed: np.ndarray) -> int:
        """The width of a batch whose rows need so many positions."""
        step = self._options.width_step
        return self._max_length if step is None else min(-(-int(needed.max()) // step) * step, self._max_length)

    def _sorted_window(self, window: int) -> list[np.ndarray]:
        """The rows of WINDOW batches, like lengths together, the batches in an order drawn for this window."""
        size = WINDOW * self._batch_size
        rows = np.array([self._stream(window * size + index) for index in range(size)], dtype=np.int64)
        rows = rows[np.argsort(self._lengths.prompt[rows] + self._lengths.response[rows], kind="stable")]
        batches = rows.reshape(WINDOW, self._batch_size)
        order = sorted(range(WINDOW), key=lambda index: self._draw(f"order {window}", index))
        return [batches[index] for index in order]

    def _draw(self, what: str, number: int) -> int:
        """A number drawn evenly from [0, 2**64): of a hash, since generators may change their streams between versions."""
        key = f"{self._seed}/{what}/{number}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"dream_jax.batch").digest(), "little")
