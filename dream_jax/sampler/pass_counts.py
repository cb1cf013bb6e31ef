"""Counts of forward passes by their kind, from which the work of an answer can be computed.

The kinds of a program follow from its settings: each has a fixed number of queries and keys. So a count for each kind
says what was computed, exactly and in few numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dream_jax import sharding
from dream_jax.sampler import block_passes, passes, window_passes
from dream_jax.sampler.config import BlockCache, CachePolicy, NoCache


class PassKind(NamedTuple):
    """What a forward pass of one kind computes of each of its rows.

    Attributes:
      name: "full" (all tokens that a row may see; with `WindowCache.suffix` there are several lengths), "renewal" (the
        first pass over a block with `WindowCache.renew_left`), "window" (the block and tokens beside it); with
        `BlockCache` "first" (the tokens up to the end of the first block), "two blocks" (the block before and the block)
        or "block".
      queries: number of tokens of a row that the pass computes, padding included.
      keys: number of keys to which each of them attends, hidden ones included. Where it is larger than `queries`, the
        other keys and values come from the cache.
      rows: number of rows that the program computes in one such pass. Some may need no such pass: their results are not
        used. Under guidance an answer has two rows.
    """

    name: str
    queries: int
    keys: int
    rows: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PassCounts:
    """How many forward passes of each kind were made.

    Attributes:
      kinds: the kinds of passes.
      by_row: int32 [B, K], for each row the number of passes of each kind that it needed. This is its cost if it were
        alone in the batch.
      by_program: int32 [K], the number of passes of each kind that the program made, each for `PassKind.rows` rows.
      predicted: int32 [B], the number of predictions of each row: for each of its passes, the number of masked positions
        of which the pass computed logits. Positions that only fill up a chunk of logits are not counted.
    """

    kinds: tuple[PassKind, ...] = dataclasses.field(metadata={"static": True})
    by_row: Int[jax.Array, "B K"]
    by_program: Int[jax.Array, "K"]
    predicted: Int[jax.Array, "B"]

    @classmethod
    def nothing(cls, rows: int) -> PassCounts:
        """Returns the counts of `rows` rows for which no pass was made; there are no kinds."""
        return cls((), jnp.zeros((rows, 0), jnp.int32), jnp.zeros(0, jnp.int32), jnp.zeros(rows, jnp.int32))

    @classmethod
    def joined(cls, parts: Sequence[PassCounts]) -> PassCounts:
        """Returns the counts of several programs that worked on the same rows, one after the other.

        The counts of a program are cumulative, as `State` holds them: they contain those of the programs before it. All
        programs have the same number of kinds.
        """
        kinds = tuple(kind for part in parts for kind in part.kinds)
        by_row, by_program = ([np.asarray(getattr(part, name)) for part in parts] for name in ("by_row", "by_program"))
        since = lambda found: np.concatenate([found[0], *(b - a for a, b in itertools.pairwise(found))], axis=-1)
        return cls(kinds, jnp.asarray(since(by_row)), jnp.asarray(since(by_program)), parts[-1].predicted)

    def of_row(self, row: int) -> dict[PassKind, int]:
        """Returns the number of passes of each kind that a row needed, without the kinds that it did not need."""
        return counted(self.kinds, np.asarray(self.by_row)[row])


def counted(kinds: Sequence[PassKind], counts: np.ndarray) -> dict[PassKind, int]:
    """Returns a count for each kind, int [K], as a dict without the kinds whose count is 0; equal kinds are added."""
    found: dict[PassKind, int] = {}
    for kind, count in zip(kinds, counts.tolist(), strict=True):
        if count:
            found[kind] = found.get(kind, 0) + count
    return found


def pass_kinds(
    cache: CachePolicy, rows: int, length: int, *, block_length: int | None, first_width: int | None, new_tokens: int
) -> tuple[PassKind, ...]:
    """Returns the kinds of passes that a program makes, in the order in which it counts them.

    It must be called on the mesh of the program (`sharding.mesh_context`), which divides the rows.

    Args:
      cache: the cache of the program.
      rows: number of rows that the program computes: 2 B under guidance, and otherwise B.
      length: length of the canvas.
      block_length, first_width, new_tokens: as in `StaticSettings`.
    """
    if isinstance(cache, NoCache):
        return (PassKind("full", length, length, rows),)
    assert block_length is not None, "SamplerConfig needs a block_length with a cache"

    def grouped(name: str, queries: int, keys: int, tokens: int) -> PassKind:
        shards, _ = sharding.token_shards(rows, queries)
        return PassKind(name, queries, keys, shards * passes.group_rows(rows, queries, tokens))

    if isinstance(cache, BlockCache):
        first = length if first_width is None else first_width
        two, shards = min(2 * block_length, length), sharding.token_shards(rows, 2 * block_length)[0]
        return (
            grouped("first", first, first, passes.REFRESH_TOKENS),
            PassKind("two blocks", two, length, shards * block_passes.group_rows(rows, block_length)),
            PassKind("block", min(block_length, length), length, rows),
        )
    widths = window_passes.full_widths(cache, block_length, length, new_tokens)
    kinds = [grouped("full", width, width, passes.REFRESH_TOKENS) for width in widths]
    renewal = window_passes.renewal_window(cache, block_length, length)
    if renewal is not None:
        kinds.append(grouped("renewal", renewal.width, length, window_passes.RENEWAL_TOKENS))
    window = window_passes.window(cache, block_length, length)
    return (*kinds, PassKind("window", window.width, length, rows))
