"""Packs several texts into each row, and decides for each batch which texts its rows hold.

The shuffled stream of texts is divided into windows of at most `WINDOW` consecutive texts. A window contains texts of one
epoch only, except in a mixture, which has no common epochs. The texts of a window are put into rows by best fit: from the
longest text to the shortest, each goes into the row where it leaves the least space, or into a new row if it fits into
none. The rows of the window are then put into a random order. So each text occurs once in each epoch, and the memory that
packing needs does not grow with the number of texts, apart from one number for each window. With texts of very different
lengths nearly all positions are filled. The worst case is texts a little longer than half a row: each then has a row alone.

Documents may be divided (`dream_jax.data.documents`). With the length policy "split", a document that is longer than a row
fills rows of its own, and its last part is put into a row by best fit. With pack_by="cut", the documents of a window follow
one after the other, and are cut where a row ends, so that nearly no position is left over.

The plan of a batch depends only on its index, the seed, the options and the lengths of the texts, as in
`dream_jax.data.layout`. The planner must know how many rows the windows before a batch have. It packs these windows once,
or takes the number from the position that an earlier run has saved (`PackingPlanner.position`).
"""

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dream_jax.data.documents import SHORTEST_ROW, WINDOW_TOKENS, cut, split
from dream_jax.data.layout import Outlook, draw
from dream_jax.data.lengths import RowLengths
from dream_jax.data.options import BatchOptions

WINDOW = 1024
"""The largest number of consecutive texts of the stream that are packed together."""
MOST_TEXTS = 64
"""The largest number of texts in a row."""


@dataclass(frozen=True, kw_only=True)
class PackedPlan:
    """The plan of one global batch, or of some of its rows. n is the number of texts in a row.

    texts: for each row int64 [n], indices into the texts that the length policy keeps, in the order of the row.
    regions: for each row int64 [n], number of positions of each response including its end-of-text tail. The positions
    before it are the prompt of the text, or the first token of a part of a document.
    starts: for each row int64 [n], index of the first token of each text in its document; 0 if it is not divided.
    first_B: int64 [B], index of the first text of each row among the texts of the global batch. width: number of tokens
    of each row.
    """

    texts: tuple[np.ndarray, ...]
    regions: tuple[np.ndarray, ...]
    starts: tuple[np.ndarray, ...]
    first_B: np.ndarray
    width: int


class _PackedRow(NamedTuple):
    """The texts of a row, int64 [n] each: which texts, the indices of their first tokens, their numbers of positions."""

    texts: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray


class PackingPlanner:
    """Decides for each batch which texts its rows hold, its width, and the length of each response."""

    def __init__(
        self,
        lengths: RowLengths,
        stream: Callable[[int], int],
        *,
        epoch: int | None,
        batch_size: int,
        max_length: int,
        seed: int,
        options: BatchOptions,
        splits: bool = False,
    ):
        """Stores the lengths and the options from which `plan` computes.

        lengths: the lengths of the texts that the length policy keeps. stream: maps a position in the endless, shuffled
        stream of texts (0, 1, 2, ...) to the index of a kept text. epoch: number of positions of an epoch of the stream;
        None if it has no common epochs. batch_size: rows of a global batch. max_length: the largest width, in tokens.
        seed: seed of the order of the rows. options: options whose `pack` is true, so that `eos_tail` is not None.
        splits: whether texts longer than max_length are documents that are divided among rows.
        Raises: ValueError if max_length is too small for documents to be divided.
        """
        assert options.pack and options.eos_tail is not None
        self._lengths, self._stream, self._epoch = lengths, stream, epoch
        self._batch_size, self._max_length, self._seed = batch_size, max_length, seed
        self._eos_tail, self._width_step = options.eos_tail, options.width_step
        self._splits, self._cuts, self._texts = splits, options.pack_by == "cut", WINDOW
        shortest = int(np.min(lengths.prompt + lengths.response))
        if splits:
            if max_length < SHORTEST_ROW:
                raise ValueError(f"{max_length=} is too small to divide documents; give at least {SHORTEST_ROW}")
            mean = float(np.mean(lengths.prompt + lengths.response))
            self._texts = max(min(WINDOW, int(WINDOW_TOKENS / mean)), 1)
            shortest = 2  # a last part may be so short
        self.most_texts = min(MOST_TEXTS, max(max_length // min(shortest + options.eos_tail, max_length), 1))
        """The largest number of texts in a row of any batch."""
        self._window = lru_cache(maxsize=8)(self._packed_window)
        self._planned = lru_cache(maxsize=16)(self._plan)
        # The reading threads and `outlook` ask for plans at the same time.
        self._counting = threading.Lock()
        # Pairs of a window and a list: the number of rows before this window and before each of the following windows.
        self._counted = [(0, [0])]

    def plan(self, batch: int, rows: Sequence[int] | range | None = None) -> PackedPlan:
        """Returns the plan of the batch with the index `batch` (from 0).

        rows: indices of rows within the batch, each in 0..batch_size-1; the plan has only these rows. None means all.
        """
        found = self._planned(batch)
        if rows is None:
            return found
        return PackedPlan(
            texts=tuple(found.texts[row] for row in rows),
            regions=tuple(found.regions[row] for row in rows),
            starts=tuple(found.starts[row] for row in rows),
            first_B=found.first_B[np.asarray(rows, dtype=np.int64)],
            width=found.width,
        )

    def position(self, batch: int) -> list[int]:
        """Returns the window in which a batch begins, and the number of rows before this window, for `start_at`."""
        return list(self._window_of(batch * self._batch_size))

    def start_at(self, position: Sequence[int]) -> None:
        """Notes a result of `position` for the same stream, so that the windows before it need not be packed."""
        window, rows_before = position
        with self._counting:
            self._counted.append((window, [rows_before]))
            self._counted.sort(key=lambda counted: counted[1][0])

    def outlook(self, steps: int, most: int = 20_000) -> Outlook:
        """Returns statistics of the first `steps` batches.

        They are counted over at most four epochs and at most `most` texts, but over at least one batch.
        """
        enough = min(4 * len(self._lengths.prompt), most)
        texts = supervised = end_tokens = filled = valid = whole = positions = count = 0
        widths: Counter[int] = Counter()
        while count < steps and (count == 0 or texts * (count + 1) / count <= enough):
            plan = self.plan(count)
            chosen, regions, starts = (np.concatenate(found) for found in (plan.texts, plan.regions, plan.starts))
            lengths = RowLengths(*(column[chosen] for column in self._lengths))
            sizes = regions + self._given(chosen, starts)
            rest = lengths.prompt + lengths.response - starts  # tokens from the first one of the text on
            texts += len(chosen)
            supervised += int((regions + lengths.learned).sum())
            end_tokens += int((sizes - np.minimum(lengths.prompt + lengths.text - starts, sizes)).sum())
            filled += int(np.minimum(rest, sizes).sum())
            valid += int(sizes.sum())
            # A divided document loses nothing: the rest of it is in another row.
            whole += int(((lengths.whole > 0) & ((sizes >= rest) | self._splits)).sum())
            positions += len(plan.texts) * plan.width
            widths[plan.width] += 1
            count += 1
        # Of divided documents the tokens are counted, because the number of their parts depends on the rows.
        epoch = (
            int((self._lengths.prompt + self._lengths.response).sum()) if self._splits else len(self._lengths.prompt)
        )
        return Outlook(
            steps=steps,
            epochs=steps * (filled if self._splits else texts) / count / epoch,
            batches=count,
            supervised=supervised,
            eos_share=end_tokens / supervised,
            padding_share=1 - filled / positions,
            hidden_share=1 - valid / positions,
            whole_share=whole / texts,
            widths={str(width): widths[width] for width in sorted(widths)},
            texts_per_row=texts / (count * self._batch_size),
            packed_share=positions / (texts * self._max_length),
        )

    def _plan(self, batch: int) -> PackedPlan:
        """Returns the plan of a whole batch."""
        start, rows = batch * self._batch_size, list[_PackedRow]()
        while len(rows) < self._batch_size:
            window, rows_before = self._window_of(start + len(rows))
            row = start + len(rows) - rows_before
            rows += self._window(window)[row : row + self._batch_size - len(rows)]
        counts = np.array([len(row.texts) for row in rows], dtype=np.int64)
        width = self._max_length
        if self._width_step is not None:
            fullest = max(int(row.sizes.sum()) for row in rows)
            width = min(-(-fullest // self._width_step) * self._width_step, self._max_length)
        return PackedPlan(
            texts=tuple(row.texts for row in rows),
            regions=tuple(row.sizes - self._given(row.texts, row.starts) for row in rows),
            starts=tuple(row.starts for row in rows),
            first_B=np.cumsum(counts) - counts,
            width=width,
        )

    def _given(self, texts: np.ndarray, starts: np.ndarray) -> np.ndarray:
        """Returns int64 [n]: the number of positions before the response, of texts that begin at these tokens."""
        return np.where(starts == 0, self._lengths.prompt[texts], 1)

    def _needed(self, texts: np.ndarray) -> np.ndarray:
        """Returns int64 [n]: the number of positions of each text with its end-of-text tail, at most max_length."""
        lengths = self._lengths
        return np.minimum(lengths.prompt[texts] + lengths.response[texts] + self._eos_tail, self._max_length)

    def _window_of(self, row: int) -> tuple[int, int]:
        """Returns the index of the window that contains a row, and the number of rows before this window.

        Rows are counted from the first row of the run.
        """
        with self._counting:
            first, before = next(counted for counted in reversed(self._counted) if counted[1][0] <= row)
            while before[-1] <= row:
                before.append(before[-1] + len(self._window(first + len(before) - 1)))
            index = bisect.bisect_right(before, row) - 1
            return first + index, before[index]

    def _packed_window(self, window: int) -> list[_PackedRow]:
        """Returns the rows of a window in a random order."""
        texts = np.array([self._stream(position) for position in self._positions(window)], dtype=np.int64)
        rows = self._divided(texts) if self._splits else self._undivided(texts)
        order = sorted(range(len(rows)), key=lambda row: draw(self._seed, f"packed {window}", row))
        return [rows[row] for row in order]

    def _undivided(self, texts: np.ndarray) -> list[_PackedRow]:
        """Returns the rows into which best fit puts the texts."""
        needed = self._needed(texts)
        rows = [sorted(row) for row in best_fit(needed.tolist(), self._max_length, self.most_texts)]
        return [_PackedRow(texts[row], np.zeros(len(row), np.int64), needed[row]) for row in rows]

    def _divided(self, texts: np.ndarray) -> list[_PackedRow]:
        """Returns the rows among which the documents are divided."""
        lengths = (self._lengths.prompt[texts] + self._lengths.response[texts]).tolist()
        if self._cuts:
            found = cut(lengths, self._max_length, self.most_texts)
        else:
            parts = split(lengths, self._max_length)
            # Only the end of a document has an end-of-text tail.
            ends = [lengths[part.document] == part.start + part.size for part in parts]
            parts = [
                part._replace(size=min(part.size + end * self._eos_tail, self._max_length))
                for part, end in zip(parts, ends, strict=True)
            ]
            rows = best_fit([part.size for part in parts], self._max_length, self.most_texts)
            found = [[parts[index] for index in sorted(row)] for row in rows]
        columns = [np.array(row, dtype=np.int64).T for row in found]
        return [_PackedRow(texts[document], start, size) for document, start, size in columns]

    def _positions(self, window: int) -> range:
        """Returns the positions in the stream of the texts of a window."""
        if self._epoch is None:
            return range(window * self._texts, (window + 1) * self._texts)
        windows = -(
            -self._epoch // self._texts
        )  # number of windows in an epoch, whose sizes differ by at most one text
        epoch, part = divmod(window, windows)
        first, last = (self._epoch * number // windows for number in (part, part + 1))
        return range(epoch * self._epoch + first, epoch * self._epoch + last)


def best_fit(lengths: Sequence[int], width: int, most: int) -> list[list[int]]:
    """Returns for each row the indices of the lengths that it holds; no row holds more than `width` in all.

    From the longest to the shortest, each length goes into the row with the least space among the rows with enough space,
    or into a new row. No row holds more than `most` lengths. No length may be larger than `width`.
    """
    rows = list[list[int]]()
    spaces = list[tuple[int, int]]()  # (space, index) of the rows that may get another length, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        size = lengths[index]
        found = bisect.bisect_left(spaces, (size, -1))
        if found == len(spaces):
            rows.append([])
            space, row = width, len(rows) - 1
        else:
            space, row = spaces.pop(found)
        rows[row].append(index)
        if space > size and len(rows[row]) < most:
            bisect.insort(spaces, (space - size, row))
    return rows
