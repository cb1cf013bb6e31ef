"""Batches for training: shuffled, divided among processes, resumable.

The stream of rows is one for all processes: shuffled anew every epoch, without an end, and row k*batch_size + r of it is
row r of global batch k (rows of like length may change their order within a few batches, see `dream_jax.data.layout`).
Process p of P reads every P-th row from p on, so the global batches do not depend on P.
"""

import bisect
from typing import Any, Self

import grain
import numpy as np

from dream_jax.batch import Batch
from dream_jax.data.encode import lay_out
from dream_jax.data.layout import BatchPlanner, Outlook
from dream_jax.data.lengths import LengthReport, TokenizedRows, fitting_rows
from dream_jax.data.options import BatchOptions
from dream_jax.data.rows import Mixture, RowSource

# The stream of batches has no end, but grain needs one.
_FOR_EVER = 2**62


class Batches:
    """An endless iterator over the batches of one process, made by `make_batches`.

    Use it in a `with` block, or call `close`. report: how many rows of the source fit.
    """

    def __init__(
        self,
        dataset: grain.IterDataset[Batch[np.ndarray]],
        report: LengthReport,
        planner: BatchPlanner,
        identity: dict[str, int | str],
    ):
        self.report = report
        self._planner = planner
        self._identity = identity
        self._iterator = iter(dataset)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch[np.ndarray]:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The position in the stream, from which the next batch follows, as JSON.

        It is the same on every process, and serves another number of processes as well.
        """
        return {"grain": self._iterator.get_state(), "of": dict(self._identity)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to the position of `state`. Raises ValueError, with what differs, for another stream."""
        if state["of"] != self._identity:
            names = sorted(state["of"].keys() | self._identity.keys())
            differences = [
                f"{name} was {state['of'].get(name)}, now {self._identity.get(name)}"
                for name in names
                if state["of"].get(name) != self._identity.get(name)
            ]
            raise ValueError(
                f"the saved position is in another stream of data: {'; '.join(differences)}. "
                "Resume with the old settings, text and tokenizer"
            )
        self._iterator.set_state(state["grain"])

    def outlook(self, steps: int) -> Outlook:
        """What a run of so many steps from the beginning will see: shares of padding and of end tokens, epochs."""
        return self._planner.outlook(steps)

    def close(self) -> None:
        """Stops the reading threads. It may be called twice; `next` raises ValueError afterwards."""
        self._iterator.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def make_batches(
    rows: TokenizedRows,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 1,
    prefetch: int = 4,
    options: BatchOptions = BatchOptions(),
) -> Batches:
    """An endless iterator over the batches of one process.

    Each holds batch_size / process_count rows, of which local row j is row j * process_count + process_index of the
    global batch. Its T is max_length; under options.width_step it is the smallest multiple of the step that holds the
    batch, or max_length. valid_BT is None unless rows may be shorter than their batch (options.hides).

    Every epoch is another permutation, drawn from seed (0 <= seed < 2**32), of the rows that fit; a batch may
    straddle two epochs. In a `Mixture` every source has its own epochs, and the weights decide which source is next. Which
    rows fit is decided here, before the rows are divided among the processes; `Batches.report` says the outcome.
    num_threads read ahead by `prefetch` batches; with 0 the caller's thread does the work. Order and states
    depend on neither.
    Raises: ValueError for sizes that do not divide or are out of range, for a part of a mixture without a row that
    fits, and as `length_report` when no row fits.
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
    numbers, lengths, report = fitting_rows(rows, max_length)
    stream = _stream(rows.source, numbers, seed)
    planner = BatchPlanner(
        lengths, stream.__getitem__, batch_size=batch_size, max_length=max_length, seed=seed, options=options
    )
    local = range(process_index, batch_size, process_count)
    row_B = np.array(local, dtype=np.int32)

    def batch(number: int) -> Batch[np.ndarray]:
        plan = planner.plan(number, local)
        fitted = []
        for index in plan.rows.tolist():
            row = rows.fit(rows[int(numbers[index])], max_length)
            # If the row were dropped here, the streams of the processes would no longer agree.
            if isinstance(row, str) or row.prompt_length != lengths.prompt[index]:
                raise ValueError(
                    f"row {numbers[index]} has another length than when the source was measured ({max_length=}), "
                    "though that promised one length; set its uniform_length to False"
                )
            fitted.append(row)
        return lay_out(fitted, plan.regions, plan.width, rows.tokenizer.pad_id, row_B=row_B, hides=options.hides)

    # A function of the number of the global batch: grain's position is then that number, whatever the number of
    # processes. Rows are encoded a batch at a time because every transformation costs grain some 10 microseconds.
    batches = grain.MapDataset.range(_FOR_EVER).map(batch)
    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    identity: dict[str, int | str] = {"seed": seed, "batch_size": batch_size, "max_length": max_length}
    identity |= {"rows": len(numbers), "digest of the rows": report.digest}
    identity |= {"encoding": str(rows.options), "layout": str(options)}
    if isinstance(rows.source, Mixture):
        identity["weights of the mixture"] = str(rows.source.weights)
    return Batches(batches.to_iter_dataset(reading), report, planner, identity)


def _stream(source: RowSource, numbers: np.ndarray | range, seed: int) -> grain.MapDataset[int]:
    """Position in the stream -> index into `numbers`: shuffled anew every epoch, without an end."""
    if not isinstance(source, Mixture):
        return grain.MapDataset.range(len(numbers)).seed(seed).shuffle().repeat(None)
    parts = []
    for number, (start, stop) in enumerate(zip(source.starts, source.starts[1:], strict=False)):
        first, last = bisect.bisect_left(numbers, start), bisect.bisect_left(numbers, stop)
        if first == last:
            raise ValueError(
                f"no row of part {number + 1} of the mixture fits; raise max_length, or leave the part out"
            )
        # Each part has its own seed, far from the others: grain shuffles epoch e with the seed plus e.
        part_seed = (seed + 0x9E3779B1 * number) % 2**32
        parts.append(grain.MapDataset.range(first, last).seed(part_seed).shuffle().repeat(None))
    total = sum(source.weights)
    return grain.MapDataset.mix(parts, [weight / total for weight in source.weights])
