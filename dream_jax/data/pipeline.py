"""Makes the batches for training: shuffled, divided among processes, and resumable.

All processes have the same endless stream of rows, which is shuffled again in every epoch. Row k * batch_size + r of
the stream is row r of global batch k. (With `width_step`, rows also move within groups of a few batches, so that rows
of similar length are together; see `dream_jax.data.layout`. With `pack`, the elements of the stream are texts, several of
which share a row of a batch; see `dream_jax.data.packing`.) Process p of P reads the rows p, p + P, p + 2 P, ... of each
global batch, so the global batches do not depend on P.
"""

import bisect
from collections.abc import Callable, Iterable
from typing import Any, Protocol, Self

import grain
import numpy as np

from dream_jax.batch import Batch
from dream_jax.data.encode import TokenRow, lay_out, lay_out_packed
from dream_jax.data.layout import BatchPlanner, Outlook
from dream_jax.data.lengths import LengthReport, TokenizedRows, fitting_rows
from dream_jax.data.options import BatchOptions
from dream_jax.data.packing import PackingPlanner
from dream_jax.data.rows import Mixture, RowSource

# The stream of batches has no end, but grain needs one.
FOR_EVER = 2**62


class Planner(Protocol):
    """What every planner of batches can tell about a run."""

    def outlook(self, steps: int) -> Outlook:
        """Returns statistics of a run of `steps` batches."""


class Batches:
    """An endless iterator over the batches of one process, as `make_batches` returns it.

    Use it in a `with` block, or call `close` at the end.
    report: the `LengthReport` of the source: how many of its rows the length policy keeps at max_length.
    """

    def __init__(
        self,
        dataset: grain.IterDataset[Batch[np.ndarray]],
        report: LengthReport,
        planner: Planner,
        identity: dict[str, int | str],
    ):
        self.report = report
        self._planner = planner
        self._identity = identity
        self._iterator = iter(dataset)
        self._taken = 0  # number of batches before the next one; only needed for packed rows

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch[np.ndarray]:
        """Returns the next batch.

        Raises: ValueError after `close`; or if a row of a source of uniform length does not fit, or has a prompt of
        another length than the measured row of that source.
        """
        batch = next(self._iterator)
        self._taken += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the position in the stream, before the next batch, as a dict that JSON can represent.

        It is the same on every process, and can also be restored with another number of processes.
        """
        state = {"grain": self._iterator.get_state(), "of": dict(self._identity)}
        if isinstance(self._planner, PackingPlanner):
            state["packing"] = {"batch": self._taken, "position": self._planner.position(self._taken)}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to the position of `state`, a result of `get_state`.

        Raises: ValueError if `state` is of a stream with other settings, text or tokenizer; the message lists them.
        """
        if state["of"] != self._identity:
            names = sorted(state["of"].keys() | self._identity.keys())
            differences = [
                f"{name} was {state['of'].get(name)}, now {self._identity.get(name)}"
                for name in names
                if state["of"].get(name) != self._identity.get(name)
            ]
            raise ValueError(
                f"the saved position belongs to another stream of data: {'; '.join(differences)}. "
                "Resume with the old settings, text and tokenizer"
            )
        if isinstance(self._planner, PackingPlanner):
            self._taken = state["packing"]["batch"]
            self._planner.start_at(state["packing"]["position"])
        self._iterator.set_state(state["grain"])

    @property
    def most_texts(self) -> int | None:
        """The number of texts for which each row of a batch has entries; None if each row is one text."""
        return self._planner.most_texts if isinstance(self._planner, PackingPlanner) else None

    def outlook(self, steps: int) -> Outlook:
        """Returns statistics of a run of `steps` batches; `outlook` of the planner says how many batches are counted."""
        return self._planner.outlook(steps)

    def close(self) -> None:
        """Stops the reading threads. Further calls do nothing; `next` raises ValueError afterwards."""
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
    """Returns an endless iterator over the batches of one process.

    Each batch has batch_size / process_count rows. Local row j is row j * process_count + process_index of the global
    batch. Its number of tokens T is max_length; with options.width_step it is the smallest multiple of the step that
    holds the longest row of the global batch as laid out, at most max_length. valid_BT is None unless options.hides.
    With options.pack a row holds several texts: length_BM has their lengths, and text_BM their indices, else both are None.

    Every epoch is another permutation of the rows that the length policy keeps; a batch may contain rows of two epochs.
    In a `Mixture` every source has its own epochs, and the weights decide which source is next. In every process, this
    function measures all rows, but only the first row of a source of uniform length; `Batches.report` has the result.
    seed: decides the permutations and the random choices in the layout, 0 <= seed < 2**32.
    num_threads, prefetch: number of threads, which prepare up to `prefetch` batches ahead. With 0 threads the calling
    thread prepares each batch. The batches and the states do not depend on these two.
    Raises: ValueError if batch_size is not a multiple of process_count, a number is out of range, the source has no rows,
    or the length policy keeps no row of the source or of one source of a mixture.
    """
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"{batch_size=} must be a positive multiple of {process_count=}: "
            "each process takes the same number of rows of the batch"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"{process_index=} is outside 0..{process_count - 1}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"{seed=} is outside 0..2**32-1, the range of seeds of the shuffle")
    if num_threads < 0 or prefetch < 0:
        raise ValueError(f"{num_threads=} and {prefetch=} must not be negative")
    policy = rows.options.length_policy
    options.check_policy(policy)
    divides = policy == "split"
    numbers, lengths, report = fitting_rows(rows, max_length)
    if options.pack_by == "cut" and (lengths.prompt != 1).any():
        number = int(numbers[int(np.argmax(lengths.prompt != 1))])
        raise ValueError(
            f"pack_by='cut' (--pack-by cut) cuts rows where they end, which is for documents only, but row {number} has a "
            "prompt: leave --pack-by out"
        )
    stream = stream_of(rows.source, numbers, seed)
    local = range(process_index, batch_size, process_count)
    row_B = np.array(local, dtype=np.int32)
    pad_id = rows.tokenizer.pad_id

    def read(indices: Iterable[int]) -> list[TokenRow]:
        fitted = []
        for index in indices:
            row = rows.fit_divided(rows[int(numbers[index])], max_length)
            # If one process dropped a row here, the streams of the processes would differ from then on.
            if isinstance(row, str) or row.prompt_length != lengths.prompt[index]:
                raise ValueError(
                    f"row {numbers[index]} has another length than was measured ({max_length=}), although its source "
                    "has uniform_length=True; set its uniform_length to False"
                )
            fitted.append(row)
        return fitted

    planner: BatchPlanner | PackingPlanner
    batch: Callable[[int], Batch[np.ndarray]]
    if options.pack:
        packer = planner = PackingPlanner(
            lengths,
            stream.__getitem__,
            epoch=None if isinstance(rows.source, Mixture) else len(numbers),
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            options=options,
            splits=divides,
        )

        def batch(number: int) -> Batch[np.ndarray]:
            plan = packer.plan(number, local)
            texts = [
                [
                    text.part(start, size + text.prompt_length) if divides else text
                    for text, start, size in zip(read(row.tolist()), starts.tolist(), regions.tolist(), strict=True)
                ]
                for row, starts, regions in zip(plan.texts, plan.starts, plan.regions, strict=True)
            ]
            most, first_B = packer.most_texts, plan.first_B
            return lay_out_packed(texts, plan.regions, plan.width, pad_id, most=most, first_B=first_B, row_B=row_B)

    else:
        single = planner = BatchPlanner(
            lengths, stream.__getitem__, batch_size=batch_size, max_length=max_length, seed=seed, options=options
        )

        def batch(number: int) -> Batch[np.ndarray]:
            plan = single.plan(number, local)
            texts = read(plan.rows.tolist())
            return lay_out(texts, plan.regions, plan.width, pad_id, row_B=row_B, hides=options.hides)

    # grain maps over the indices of global batches, so its position is such an index and does not depend on the number
    # of processes. A whole batch is encoded in one transformation, because each one costs grain about 10 microseconds.
    batches = grain.MapDataset.range(FOR_EVER).map(batch)
    reading = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0)
    identity: dict[str, int | str] = {"seed": seed, "batch_size": batch_size, "max_length": max_length}
    identity |= {"rows": len(numbers), "digest of the rows": report.digest}
    identity |= {"encoding": str(rows.options), "layout": str(options)}
    if options.pack:  # batches without packing have the same identity as in earlier versions
        identity["packing"] = "best fit" if options.pack_by == "fit" else "cut"
    if isinstance(rows.source, Mixture):
        identity["weights of the mixture"] = str(rows.source.weights)
    return Batches(batches.to_iter_dataset(reading), report, planner, identity)


def stream_of(source: RowSource, numbers: np.ndarray | range, seed: int) -> grain.MapDataset[int]:
    """Returns the endless stream of rows: position (0, 1, 2, ...) -> index into `numbers`, shuffled in every epoch.

    `numbers` are the indices of the rows that the length policy keeps, ascending. Raises ValueError if a source of a
    mixture has none of them.
    """
    if not isinstance(source, Mixture):
        return grain.MapDataset.range(len(numbers)).seed(seed).shuffle().repeat(None)
    sources = []
    for number, (start, stop) in enumerate(zip(source.starts, source.starts[1:], strict=False)):
        first, last = bisect.bisect_left(numbers, start), bisect.bisect_left(numbers, stop)
        if first == last:
            raise ValueError(
                f"no row of source {number + 1} of the mixture fits; raise max_length, or leave the source out"
            )
        # grain shuffles epoch e with seed + e, so the seeds of the sources must be far apart.
        source_seed = (seed + 0x9E3779B1 * number) % 2**32
        sources.append(grain.MapDataset.range(first, last).seed(source_seed).shuffle().repeat(None))
    total = sum(source.weights)
    return grain.MapDataset.mix(sources, [weight / total for weight in source.weights])
