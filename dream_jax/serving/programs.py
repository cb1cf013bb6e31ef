"""The compiled programs of a server: their number is bounded, and they are compiled beside the running batches."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax import sharding
from dream_jax.model import Dream
from dream_jax.sampler import BlockCache, SamplerConfig, growth
from dream_jax.sampler.loop import StreamBatch, idle_batch, resume
from dream_jax.sampler.state import DynamicSettings, Record, StaticSettings, switched_off
from dream_jax.serving.tasks import Gap, Task

SHORTEST_GROWING = 512
"""The shortest canvas that grows, in tokens."""

_LONGER = 1.25  # A row may be in a batch whose canvas is at most this many times as long as the row needs.


class TooManySettingsError(ValueError):
    """A request needs a program that is not compiled, and the server has as many programs as it may have."""


def canvas_lengths(longest: int) -> tuple[int, ...]:
    """Returns the lengths of a canvas that the server has programs for, in rising order; the last one is `longest`.

    There are eight lengths for each power of two: 64, 72, 80, ..., 128, 144, ... A row that is shorter is padded.
    """
    lengths, step = [], 8
    length = 64
    while length < longest:
        lengths.append(length)
        step = step if length < 16 * step else 2 * step
        length += step
    return (*lengths, longest)


def growing_lengths(longest: int, block: int) -> tuple[int, ...]:
    """Returns the lengths of a canvas that grows, in rising order: each has about twice the tokens of the one before.

    The lengths differ by whole blocks of `block` tokens, so that a block of a text is never divided. The last length is at
    most `longest`.
    """
    lengths = [min(SHORTEST_GROWING, longest)]
    while more := min(lengths[-1], longest - lengths[-1]) // block * block:
        lengths.append(lengths[-1] + more)
    return tuple(lengths)


def lengths_of(task: Task, longest: int) -> tuple[int, ...]:
    """Returns the lengths that the canvas of a task takes one after the other if its text needs them.

    They are () if the task needs a canvas of its whole length from the beginning: if its cache is not `BlockCache`, if
    tokens are given among the new ones or after them, or if the first of `growing_lengths` holds the whole text. The
    first length has room for `growth.FIRST_EXTENT` new tokens.
    """
    config, given = task.config, len(task.prompt)
    after = (Gap(start=given, length=config.max_new_tokens),)
    if not isinstance(config.cache, BlockCache) or config.block_length is None or task.pieces != after:
        return ()
    if config.forced_tokens:
        return ()
    block = config.block_length
    lengths = [one for one in growing_lengths(longest, block) if one >= given + growth.FIRST_EXTENT + block]
    if not lengths or lengths[0] >= task.length:
        return ()
    needed = (lengths[0] - given) % block + task.length  # the padding on the left, and the row
    if needed > lengths[-1]:
        return ()
    return (*(one for one in lengths if one < needed), next(one for one in lengths if one >= needed))


@dataclasses.dataclass(frozen=True)
class Family:
    """Rows with the same family share compiled programs: they differ in nothing that is compiled in.

    Attributes:
      static: the settings that are compiled in.
      off: names of the dynamic settings that are switched off.
      length: length of the canvas.
      grows: whether the canvas grows while its texts go on, see `lengths_of`.
    """

    static: StaticSettings
    off: frozenset[str]
    length: int
    grows: bool = False

    @classmethod
    def of(cls, config: SamplerConfig, length: int, record: Record, *, grows: bool = False) -> Family:
        """Returns the family of a row with this configuration on a canvas of this length."""
        return cls(StaticSettings.of_rows(config, length, record), switched_off(config), length, grows)

    def serves(self, other: Family) -> bool:
        """Returns whether rows of another family may be in batches of this one.

        Their settings must be those of this family, and its canvas may be a quarter longer than theirs. A longer one would
        take more time than a batch of their own length. A canvas that grows may have any longer length, because its passes
        compute only blocks.
        """
        fits = other.length <= self.length and (self.grows or self.length <= _LONGER * other.length)
        return self is other or (fits and self._settings == other._settings)

    @functools.cached_property
    def _settings(self) -> tuple[StaticSettings, frozenset[str], bool]:
        """The settings without those that follow from the length, see `StaticSettings.of_rows`."""
        return dataclasses.replace(self.static, steps=0, capacity=0), self.off, self.grows

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.static, self.off, self.length, self.grows))

    def __hash__(self) -> int:
        # Computed once, because the engine counts the families of all waiting tasks at every return of a loop.
        return self._hash


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled functions for a number of rows of a family."""

    family: Family
    rows: int

    def idle_batch(self, model: Dream) -> StreamBatch:
        """Returns a batch in which every row is done."""
        return _idle_batch(model, self.rows, self.family.length, self.family.static)

    def compile(self, model: Dream, config: SamplerConfig) -> None:
        """Runs the functions once without any work, so that they are compiled."""
        with sharding.mesh_context(model):
            shape = (self.rows, self.family.length)
            batch = self.idle_batch(model)
            canvas, valid, new = np.zeros(shape, np.int32), np.ones(shape, bool), np.zeros(self.rows, bool)
            masked = max(self.family.length, config.max_new_tokens)  # so that a block has no more steps than tokens
            dynamic = DynamicSettings.of_rows([config] * self.rows, [masked] * self.rows, self.family.static)
            keys = row_keys(np.zeros(self.rows, np.int32), np.zeros(self.rows, np.int32))
            for _ in range(2):  # the second call has the shardings that the first one returned
                batch = resume(
                    model,
                    batch,
                    new,
                    canvas,
                    valid,
                    keys,
                    dynamic,
                    np.int32(self.rows),
                    np.int32(1),
                    static=self.family.static,
                )
            jax.block_until_ready(batch)


class ProgramTable:
    """Compiles programs in a thread of its own, so that running batches go on.

    Args:
      model: the model that the programs run.
      limit: maximum number of families.
      on_ready: called without arguments when a program has been compiled.
    """

    def __init__(self, model: Dream, limit: int, on_ready: Callable[[], None]):
        self._model, self._limit, self._on_ready = model, limit, on_ready
        self._programs: dict[Program, Future[None]] = {}
        self._families: dict[Family, Family] = {}
        self._reserved: frozenset[Family] = frozenset()
        self._lock = threading.Lock()
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="compile")

    @property
    def num_families(self) -> int:
        """The number of families that have been admitted."""
        return len(self._families)

    def reserve(self, families: Iterable[Family]) -> None:
        """Notes families that are always admitted and do not count against the limit."""
        self._reserved = self._reserved.union(families)

    def admit(self, family: Family) -> Family:
        """Notes a family, whose programs may then be compiled.

        Returns:
          The object that was noted first, for all equal families, so that they are compared quickly. If the family is new
          and the table is full, a family that serves it (`Family.serves`).

        Raises:
          TooManySettingsError: the family is new, the table is full, and no family in it serves this one.
        """
        with self._lock:
            new = family not in self._families and family not in self._reserved
            if new and len(self._families.keys() - self._reserved) >= self._limit:
                longer = [one for one in self._families if one.serves(family)]
                if longer:
                    return self._families[min(longer, key=lambda one: one.length)]
                raise TooManySettingsError(_too_many(self._limit))
            return self._families.setdefault(family, family)

    def admit_all(self, families: Sequence[Family]) -> Family:
        """Notes several families, all or none, and returns the first one, as `admit` does.

        Raises:
          TooManySettingsError: with those that are new, there would be too many.
        """
        with self._lock:
            new = {one for one in families if one not in self._families and one not in self._reserved}
            if new and len(self._families.keys() - self._reserved) + len(new) > self._limit:
                raise TooManySettingsError(_too_many(self._limit))
            noted = [self._families.setdefault(one, one) for one in families]
            return noted[0]

    def compiled(self, program: Program) -> bool:
        """Returns whether a program has been compiled without an error."""
        with self._lock:
            future = self._programs.get(program)
        return future is not None and future.done() and future.exception() is None

    def ready(self, program: Program, config: SamplerConfig) -> bool:
        """Returns whether a program is compiled; if it is not, compilation starts.

        Raises:
          jax.errors.JaxRuntimeError: it cannot be compiled, for instance because memory does not suffice.
        """
        future = self.start(program, config)
        if not future.done():
            return False
        self._check(program, future)
        return True

    def start(self, program: Program, config: SamplerConfig) -> Future[None]:
        """Starts the compilation of a program that is not compiled, and does not wait for it."""
        with self._lock:
            future = self._programs.get(program)
            if future is None:
                future = self._programs[program] = self._compiler.submit(program.compile, self._model, config)
                future.add_done_callback(lambda _: self._on_ready())
        return future

    def finish(self, program: Program, config: SamplerConfig) -> None:
        """Compiles a program and waits for it. Raises as `ready`."""
        future = self.start(program, config)
        future.exception()
        self._check(program, future)

    def _check(self, program: Program, future: Future[None]) -> None:
        """Raises the error with which a compilation has ended, if any."""
        if future.exception() is not None:
            with self._lock:
                self._programs.pop(program, None)  # the next request tries again
        future.result()

    def wait(self) -> None:
        """Waits until everything that was asked for is compiled."""
        with self._lock:
            futures = list(self._programs.values())
        for future in futures:
            future.result()

    def close(self) -> None:
        """Ends the thread after the program that it is compiling."""
        self._compiler.shutdown(wait=True, cancel_futures=True)


def _too_many(limit: int) -> str:
    return (
        f"the server has compiled programs for {limit} combinations of settings and lengths, and this request needs "
        "another one; use the settings of earlier requests (a preset without further settings), or start the server with "
        "a higher --max-programs"
    )


@jax.jit
def row_keys(seed_B: jax.Array, sample_B: jax.Array) -> jax.Array:
    """Returns the random keys of rows, as `inference.row_keys([(seed, 0, sample), ...])`."""
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 0))(seed_B)
    return jnp.where(sample_B == 0, keys_B, jax.vmap(jax.random.fold_in)(keys_B, sample_B))


_idle_batch = functools.partial(jax.jit, static_argnames=("rows", "length", "static"))(idle_batch)
