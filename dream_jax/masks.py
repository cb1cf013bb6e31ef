"""Attention masks as values: which query may look at which key.

A mask is a small frozen object that can be passed through `jax.jit`. True means "may attend"; the last two axes of its
dense form are (query, key). A mask keeps what it knows in its cheapest form (lengths, segment ids), so that an attention
backend that understands that form never builds a [T, S] array; `dense` gives the array everywhere else.

Knows shapes and booleans. Knows nothing of attention, models or padding policies.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from dream_jax.shapes import Array


class Mask(abc.ABC):
    """Which query may attend to which key."""

    @abc.abstractmethod
    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """The mask as booleans that broadcast to [B, T, S]; an axis of size 1 means "the same for all"."""

    def draw(self, num_queries: int, num_keys: int, row: int = 0) -> str:
        """The mask of one batch row as text, a line a query: `#` may attend, `.` may not."""
        dense = np.asarray(self.dense(num_queries, num_keys))
        dense = np.broadcast_to(dense, (dense.shape[0], num_queries, num_keys))
        return "\n".join("".join("#" if seen else "." for seen in line) for line in dense[row])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bidirectional(Mask):
    """Every query sees every key: Dream's own mask.

    ::

        ###
        ###
        ###
    """

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """All true, [1, 1, S]."""
        return jnp.ones((1, 1, num_keys), dtype=bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyPadding(Mask):
    """Keys that are padding are hidden from every query; padded queries still see the real keys.

    Only keys are masked: a query row with nothing to attend to has no defined softmax, and such rows are the likely
    cause of the published "!!!!" outputs.

    Attributes:
      valid_BS: true at real tokens. Here the first of three tokens is padding:

    ::

        .##
        .##
        .##
    """

    valid_BS: Bool[Array, "B S"]

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """[B, 1, S]. Raises ValueError when the mask was made for another number of keys."""
        if self.valid_BS.shape[1] != num_keys:
            raise ValueError(f"key padding for {self.valid_BS.shape[1]} keys was given to {num_keys} keys")
        return jnp.asarray(self.valid_BS)[:, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyLengths(Mask):
    """Keys at or after their row's length are hidden from every query: padding on the right, told by lengths alone.

    Says less than `KeyPadding`, whose padding may lie anywhere; for that, an attention backend that understands lengths
    skips what is hidden and builds no mask. A length of 0 leaves nothing to attend to: the row's outputs mean nothing,
    though they are finite.

    Attributes:
      lengths_B: number of real tokens in each row, all at its start. With length 2 of three tokens:

    ::

        ##.
        ##.
        ##.
    """

    lengths_B: Int[Array, "B"]

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """[B, 1, S]."""
        return jnp.arange(num_keys) < jnp.asarray(self.lengths_B, jnp.int32)[:, None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments(Mask):
    """Tokens attend within their own segment: several texts packed into one row, each bidirectional in itself.

    Attributes:
      query_BT, key_BS: segment id of each token. Padding gets an id of its own (0 by convention), so that no row is
        ever fully masked. With ids `1 1 2`:

    ::

        ##.
        ##.
        ..#
    """

    query_BT: Int[Array, "B T"]
    key_BS: Int[Array, "B S"]

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """[B, T, S]. Raises ValueError when the ids were made for other lengths."""
        if (self.query_BT.shape[1], self.key_BS.shape[1]) != (num_queries, num_keys):
            raise ValueError(
                f"segment ids for {self.query_BT.shape[1]} queries and {self.key_BS.shape[1]} keys were given to "
                f"{num_queries} queries and {num_keys} keys"
            )
        return jnp.asarray(self.query_BT)[:, :, None] == jnp.asarray(self.key_BS)[:, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Every query sees the keys up to its own position: the mask that Dream's ancestor was trained under.

    ::

        #..
        ##.
        ###
    """

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """[1, T, S]. Raises ValueError for queries that are not the keys."""
        if num_queries != num_keys:
            raise ValueError(
                f"a causal mask of {num_queries} queries and {num_keys} keys: they must be the same tokens"
            )
        return jnp.tril(jnp.ones((1, num_queries, num_keys), dtype=bool))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Annealed(Mask):
    """Between causal and bidirectional: keys up to the query's own position, and of the later ones those that were drawn.

    Attributes:
      drawn_TS: true at pairs that may attend although the key is later; made by `anneal`.
      valid_BS: true at real tokens, or None where all are. Here the second query sees the third key, the first does not:

    ::

        #..
        ###
        ###
    """

    drawn_TS: Bool[Array, "T S"]
    valid_BS: Bool[Array, "B S"] | None = None

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """[1, T, S], or [B, T, S] where padding is hidden. Raises ValueError when it was drawn for other lengths."""
        if self.drawn_TS.shape != (num_queries, num_keys):
            raise ValueError(
                f"a mask drawn for {self.drawn_TS.shape} was given to {num_queries} queries, {num_keys} keys"
            )
        seen = Causal().dense(num_queries, num_keys) | jnp.asarray(self.drawn_TS)[None]
        return seen if self.valid_BS is None else seen & jnp.asarray(self.valid_BS)[:, None, :]


def anneal(key: jax.Array, share: float | jax.Array, length: int) -> Bool[jax.Array, "T S"]:
    """Draws which of the later keys each query may see, each with probability `share`: for `Annealed.drawn_TS`.

    0 leaves a causal mask, 1 a bidirectional one. The annealing of DiffuLLaMA (Gong et al. 2025).
    """
    return jax.random.uniform(key, (length, length)) < share
