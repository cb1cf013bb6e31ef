"""Turns pairs of answers into tokens, and makes batches of them."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from dream_jax.batch import PairBatch
from dream_jax.data.encode import TokenRow, lay_out, token_row
from dream_jax.data.layout import Outlook
from dream_jax.data.lengths import LengthReport, TokenizedRows, fitting_rows
from dream_jax.data.options import BatchOptions
from dream_jax.data.pipeline import FOR_EVER, Batches, stream_of


class TokenPair(NamedTuple):
    """The tokens of both answers of a pair, each after the same prompt."""

    chosen: TokenRow
    rejected: TokenRow


class PairRows(TokenizedRows):
    """The pairs of a source as tokens: `pair(i)` has both answers, and `rows[i]` is the longer one, which decides whether
    the pair fits.
    """

    def pair(self, number: int) -> TokenPair:
        """Returns both answers of pair `number`, before any cut."""
        row = self.source[number]
        assert row.rejected is not None, "check_pairs refuses rows without"
        rejected = dataclasses.replace(row, response=row.rejected, rejected=None)
        return TokenPair(*(token_row(one, self.tokenizer, self.options) for one in (row, rejected)))

    def fitted(self, number: int, max_length: int) -> TokenPair:
        """Returns both answers of a pair that is kept at this length, each cut by the length policy if it is too long."""
        cut = [self.fit(answer, max_length) for answer in self.pair(number)]
        assert all(isinstance(one, TokenRow) for one in cut), "the longer answer was measured and fits"
        return TokenPair(*(one for one in cut if isinstance(one, TokenRow)))

    def __getitem__(self, number: int) -> TokenRow:
        kept = self._kept.get(number)
        return max(self.pair(number), key=lambda row: row.length) if kept is None else kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptPairs:
    """The N pairs of a source that the length policy keeps.

    numbers: int64 [N], their indices in the source, ascending. lengths_NA: int64 [N, 2], the numbers of tokens of both
    answers after the cut, with the prompt. prompts_N: int64 [N], the numbers of tokens of the prompts. digest: of all these
    tokens. report: how many pairs were dropped, by the length of the longer answer of each.
    """

    numbers: np.ndarray
    lengths_NA: np.ndarray
    prompts_N: np.ndarray
    digest: str
    report: LengthReport


def kept_pairs(rows: PairRows, max_length: int) -> KeptPairs:
    """Returns the pairs that the length policy keeps at this length.

    Raises:
      ValueError: it keeps none.
    """
    numbers, _, report = fitting_rows(rows, max_length)
    digest, lengths, prompts = hashlib.blake2b(digest_size=8), list[tuple[int, int]](), list[int]()
    for number in numbers:
        pair = rows.fitted(int(number), max_length)
        for row in pair:
            digest.update(np.int32(row.length).tobytes() + row.tokens.tobytes())
        lengths.append((pair.chosen.length, pair.rejected.length))
        prompts.append(pair.chosen.prompt_length)
    return KeptPairs(
        numbers=np.asarray(numbers, dtype=np.int64),
        lengths_NA=np.array(lengths, dtype=np.int64),
        prompts_N=np.array(prompts, dtype=np.int64),
        digest=digest.hexdigest(),
        report=report,
    )


def lay_out_pairs(
    pairs: Sequence[TokenPair], width: int, pad_id: int, options: BatchOptions, number_P: np.ndarray, draw_P: np.ndarray
) -> PairBatch[np.ndarray]:
    """Returns P pairs as a batch of 2 P rows: the chosen answer of each pair, and next to it the rejected one.

    An answer ends at the right end of its row, after `eos_tail` end-of-text tokens (none by default), so that nothing
    tells the model how long it is. What is before the prompt is not valid.

    Args:
      pairs: the tokens, each row at most `width` long.
      width: number of tokens of a row.
      pad_id: the id of the end-of-text token, which is also the padding.
      options: the options of the layout, of which `eos_tail` is read.
      number_P: int [P], the index of each pair in the global batch.
      draw_P: int [P], the number from which the noise of each pair follows.
    """
    rows = [row for pair in pairs for row in pair]
    tail = options.eos_tail or 0
    regions = [min(row.length - row.prompt_length + tail, width - row.prompt_length) for row in rows]
    row_B = (2 * np.asarray(number_P)[:, None] + np.arange(2)).reshape(-1).astype(np.int32)
    found = lay_out(rows, regions, width, pad_id, row_B=row_B)
    return PairBatch(
        tokens_BT=found.tokens_BT,
        maskable_BT=found.maskable_BT,
        row_B=row_B,
        valid_BT=found.valid_BT,
        draw_B=np.repeat(np.asarray(draw_P, np.int32), 2),
    )


class PairPlanner:
    """Statistics of the batches of pairs, which are all of one width."""

    def __init__(self, lengths_NA: np.ndarray, prompts_N: np.ndarray, batch_size: int, width: int, tail: int):
        """`lengths_NA` has the number of tokens of both answers of each kept pair, with the prompt; int64 [N, 2]."""
        self._lengths_NA, self._prompts_N = lengths_NA, prompts_N
        self._batch_size, self._width, self._tail = batch_size, width, tail

    def outlook(self, steps: int) -> Outlook:
        """Returns statistics of a run of `steps` batches; all but steps and epochs are means over all kept pairs."""
        ends_NA = np.minimum(self._lengths_NA + self._tail, self._width)
        supervised = float((ends_NA - self._prompts_N[:, None]).sum())
        rows, positions = self._lengths_NA.size, float(self._lengths_NA.size * self._width)
        return Outlook(
            steps=steps,
            epochs=steps * self._batch_size / len(self._prompts_N),
            batches=steps,
            supervised=round(supervised * 2 * self._batch_size * steps / rows),
            eos_share=float((ends_NA - self._lengths_NA + 1).sum()) / supervised,
            padding_share=1 - float(self._lengths_NA.sum()) / positions,
            hidden_share=1 - float(ends_NA.sum()) / positions,
            whole_share=1.0,
            widths={str(self._width): steps},
        )


def make_pair_batches(
    rows: PairRows,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    options: BatchOptions = BatchOptions(),
    draws_of_pairs: bool = False,
) -> Batches:
    """Returns an endless, resumable iterator over batches of pairs, shuffled again in every epoch.

    Args:
      rows: the pairs.
      batch_size: number of pairs of a global batch; a batch of a process has 2 batch_size / process_count rows.
      max_length: number of tokens of a row.
      seed: decides the order, 0 <= seed < 2**32.
      process_index, process_count: the process that reads these batches, and the number of processes.
      options: the options of the layout; only `eos_tail` may be given.
      draws_of_pairs: whether the noise of a pair follows from its index in the source, so that it is the same in every
        epoch; otherwise it follows from the position in the stream, and differs.

    Raises:
      ValueError: `batch_size` is not a multiple of `process_count`, or the length policy keeps no pair.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"{batch_size=} must be a positive multiple of {process_count=}")
    kept = kept_pairs(rows, max_length)
    stream, pad_id = stream_of(rows.source, kept.numbers, seed), rows.tokenizer.pad_id
    local = range(process_index, batch_size, process_count)

    def batch(number: int) -> PairBatch[np.ndarray]:
        positions = [number * batch_size + row for row in local]
        pairs = [int(kept.numbers[stream[position]]) for position in positions]
        draws = pairs if draws_of_pairs else [position % 2**31 for position in positions]
        laid = [rows.fitted(pair, max_length) for pair in pairs]
        return lay_out_pairs(laid, max_length, pad_id, options, np.array(local), np.array(draws))

    planner = PairPlanner(kept.lengths_NA, kept.prompts_N, batch_size, max_length, options.eos_tail or 0)
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    identity: dict[str, int | str] = {"seed": seed, "batch_size": batch_size, "max_length": max_length}
    identity |= {"pairs": len(kept.numbers), "digest of the pairs": kept.digest, "encoding": str(rows.options)}
    identity |= {"layout": str(options), "noise": "of the pair" if draws_of_pairs else "of the position"}
    batches = grain.MapDataset.range(FOR_EVER).map(batch)
    return Batches(batches.to_iter_dataset(reading), kept.report, planner, identity)
