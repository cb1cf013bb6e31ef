"""Batches for training: shuffled, sharded over processes, resumable.

Knows grain. The stream of rows is one for all processes: shuffled anew every epoch, without an end, and row
k*batch_size + r of it is row r of global batch k. Process p of P reads every P-th row from p on, so the
global batches do not depend on P.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import grain
import numpy as np

from dream_jax.data.encode import EncodedRow, LengthReport, encode_row, fitting_rows
from dream_jax.data.rows import Source
from dream_jax.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


class Batches:
    """An endless iterator over the batches of one process, made by `make_batches`.

    Use it in a `with` block, or call `close`. report: how many rows of the source fit.
    """

    def __init__(self, dataset: grain.IterDataset[Batch], report: LengthReport, identity: dict[str, int | str]):
        self.report = report
        self._identity = identity
        self._iterator = iter(dataset)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """What is needed to go on with the next batch, as JSON.

        It is the same on every process, and serves another number of processes as well.
        """
        return {"grain": self._iterator.get_state(), "of": dict(self._identity)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises ValueError, with what differs, for another stream."""
        if state["of"] != self._identity:
            names = sorted(state["of"].keys() | self._identity.keys())
            differences = [
                f"{name} was {state['of'].get(name)}, now {self._identity.get(name)}"
                for name in names
                if state["of"].get(name) != self._identity.get(name)
            ]
            raise ValueError(
                f"the saved position is in another stream of data: {'; '.join(differences)}. "
                "Go on with the old settings, text and tokenizer"
            )
        self._iterator.set_state(state["grain"])

    def close(self) -> None:
        """Stop the reading threads. Safe to call twice; `next` raises ValueError afterwards."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def make_batches(
    source: Source,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 1,
    prefetch: int = 4,
) -> Batches:
    """The batches of one process, for ever.

    Each is a dict of arrays, with b = batch_size / process_count and T = max_length: tokens int32 [b, T] and
    maskable bool [b, T] as in `EncodedRow`; row int32 [b], the number of each row in the global batch, that
    is j * process_count + process_index for local row j. batch_size is the global one.

    Every epoch is another permutation, drawn from seed (0 <= seed < 2**32), of the rows that fit; a batch may
    straddle two epochs. Which rows fit is decided here, before sharding, by tokenising the source once
    (`Batches.report` says the outcome).
    num_threads read ahead by `prefetch` batches; with 0 the caller's thread does the work. Order and states
    depend on neither.
    Raises: ValueError for sizes that do not divide or are out of range, and as `length_report` when no row
    fits.
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"{batch_size=} must be a positive multiple of {process_count=}: "
            "each process takes an equal part of the batch"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=} is outside 0..{process_count - 1}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{seed=} is outside 0..2**32-1, which is what the shuffle takes")
    if num_threads < 0 or prefetch < 0:
        raise ValueError(f"{num_threads=} and {prefetch=} must not be negative")
    rows, report = fitting_rows(source, tokenizer, max_length)

    def encode(position: int) -> EncodedRow:
        number = int(rows[position])
        encoded = encode_row(source[number], tokenizer, max_length)
        if encoded is None:  # dropping it here would shift the stream differently on different processes
            raise ValueError(
                f"row {number} is longer than {max_length=}, though the source promised one length; "
                "set its uniform_length to False"
            )
        return encoded

    local_size = batch_size // process_count
    row = np.arange(local_size, dtype=np.int32) * process_count + process_index

    def collate(positions: Sequence[int]) -> Batch:
        encoded = [encode(position) for position in positions]
        tokens = np.stack([one.tokens for one in encoded])
        return {"tokens": tokens, "maskable": np.stack([one.maskable for one in encoded]), "row": row.copy()}

    stream = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(None)
    shard = stream[process_index::process_count]
    # Batched while still random-access: grain's position then counts global batches, whatever the number of
    # processes. Rows are encoded a batch at a time because every further transformation costs grain some 10
    # microseconds a row.
    batches = shard.batch(local_size, drop_remainder=True, batch_fn=collate)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    identity: dict[str, int | str] = {"seed": seed, "batch_size": batch_size, "max_length": max_length}
    identity |= {"rows": len(rows), "digest of the rows": report.digest}
    return Batches(batches.to_iter_dataset(options), report, identity)
