"""Batches for training: shuffled, sharded over processes, resumable.

Knows grain. The stream of rows is one for all processes: shuffled anew every epoch, without an end, and row
k*batch_size + r of it is row r of global batch k (rows of like length may change places within a few batches, see
`dream_jax.data.layout`). Process p of P reads every P-th row from p on, so the global batches do not depend on P.
"""

import bisect
from types import TracebackType
from typing import Any, Self

import grain
import numpy as np

from dream_jax.batch import Batch
from dream_jax.data.encode import LengthReport, fitting_rows, token_row
from dream_jax.data.layout import Layout, Outlook
from dream_jax.data.options import BatchOptions, EncodeOptions
from dream_jax.data.rows import Mixture, Source
from dream_jax.tokenizer import Tokenizer

# Batches are numbered for ever; grain wants an end.
_FOR_EVER = 2**62


class Batches:
    """An endless iterator over the batches of one process, made by `make_batches`.

    Use it in a `with` block, or call `close`. report: how many rows of the source fit.
    """

    def __init__(
        self,
        dataset: grain.IterDataset[Batch[np.ndarray]],
        report: LengthReport,
        layout: Layout,
        identity: dict[str, int | str],
    ):
        self.report = report
        self._layout = layout
        self._identity = identity
        self._iterator = iter(dataset)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch[np.ndarray]:
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

    def outlook(self, steps: int) -> Outlook:
        """What a run of so many steps from the beginning will see: shares of padding and of end tokens, epochs."""
        return self._layout.outlook(steps)

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
    encoding: EncodeOptions = EncodeOptions(),
    options: BatchOptions = BatchOptions(),
) -> Batches:
    """The batches of one process, for ever.

    Each holds batch_size / process_count rows, of which local row j is row j * process_count + process_index of the
    global batch. Its T is max_length; under options.width_step it is the smallest multiple of the step that holds the
    batch, or max_length. valid_BT is None unless rows may be shorter than their batch (options.hides).

    Every epoch is another permutation, drawn from seed (0 <= seed < 2**32), of the rows that fit; a batch may
    straddle two epochs. In a `Mixture` every part has epochs of its own, and the weights say which part is next. Which
    rows fit is decided here, before sharding, by tokenising the source once (`Batches.report` says the outcome).
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
    rows, lengths, report = fitting_rows(source, tokenizer, max_length, encoding)
    stream = _stream(source, rows, seed)
    layout = Layout(
        lengths, stream.__getitem__, batch_size=batch_size, max_length=max_length, seed=seed, options=options
    )
    local = range(process_index, batch_size, process_count)

    def batch(number: int) -> Batch[np.ndarray]:
        plan = layout.plan(number, local)
        laid_out = []
        for position, region in zip(plan.rows.tolist(), plan.regions.tolist(), strict=True):
            source_row = int(rows[position])
            found = token_row(source[source_row], tokenizer, max_length, encoding)
            # Dropping it here would shift the stream differently on different processes.
            if isinstance(found, str) or found.prompt_length != lengths.prompt[position]:
                raise ValueError(
                    f"row {source_row} has another length than when the source was measured (max_length={max_length}), "
                    "though that promised one length; set its uniform_length to False"
                )
            laid_out.append(found.lay_out(plan.width, region, tokenizer.pad_id))
        tokens_BT, maskable_BT, valid_BT = (np.stack(column) for column in zip(*laid_out, strict=True))
        return Batch(
            tokens_BT=tokens_BT,
            maskable_BT=maskable_BT,
            row_B=np.array(local, dtype=np.int32),
            valid_BT=valid_BT if options.hides else None,
        )

    # A function of the number of the global batch: grain's position is then that number, whatever the number of
    # processes. Rows are encoded a batch at a time because every transformation costs grain some 10 microseconds.
    batches = grain.MapDataset.range(_FOR_EVER).map(batch)
    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    identity: dict[str, int | str] = {"seed": seed, "batch_size": batch_size, "max_length": max_length}
    identity |= {"rows": len(rows), "digest of the rows": report.digest}
    identity |= {"encoding": str(encoding), "layout": str(options)}
    if isinstance(source, Mixture):
        identity["weights of the mixture"] = str(source.weights)
    return Batches(batches.to_iter_dataset(reading), report, layout, identity)


def _stream(source: Source, rows: np.ndarray | range, seed: int) -> grain.MapDataset[int]:
    """Position -> place in `rows`: shuffled anew every epoch, without an end."""
    if not isinstance(source, Mixture):
        return grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat(None)
    parts = []
    for number, (start, stop) in enumerate(zip(source.starts, source.starts[1:], strict=False)):
        first, last = bisect.bisect_left(rows, start), bisect.bisect_left(rows, stop)
        if first == last:
            raise ValueError(
                f"no row of part {number + 1} of the mixture fits; raise max_length, or leave the part out"
            )
        # Seeds of their own, and far apart: grain shuffles epoch e with the seed plus e.
        own = (seed + 0x9E3779B1 * number) % 2**32
        parts.append(grain.MapDataset.range(first, last).seed(own).shuffle().repeat(None))
    total = sum(source.weights)
    return grain.MapDataset.mix(parts, [weight / total for weight in source.weights])
