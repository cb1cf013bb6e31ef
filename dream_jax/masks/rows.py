"""Masks that depend on the content of a row: padding and packed texts. `base` explains the drawings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from dream_jax.masks.base import Mask
from dream_jax.shapes import Array


class _KeyMask(Mask):
    """A mask that is the same for all queries of a row."""

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [B, 1, S], true at keys that may be attended to; all queries of a row have the same keys."""
        return self.dense(position_bT.shape[1], num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Returns this same mask, which does not depend on the positions of the queries."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyPadding(_KeyMask):
    """No query attends to keys that are padding. Drawn with the first of three tokens as padding:

    ::

        .##
        .##
        .##

    Queries that are padding still attend to the valid keys, because the softmax of a query that may attend to no key is
    undefined. The published code has such queries; they probably cause its outputs that consist of "!!!!" only.

    Attributes:
      valid_BS: bool [B, S], true at tokens, false at padding.
    """

    valid_BS: Bool[Array, "B S"]

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns bool [B, 1, S], true at valid keys. Raises ValueError if `valid_BS` is for another number of keys."""
        if self.valid_BS.shape[1] != num_keys:
            raise ValueError(
                f"valid_BS is for {self.valid_BS.shape[1]} keys, but there are {num_keys} keys; make it from these tokens"
            )
        return jnp.asarray(self.valid_BS)[:, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyLengths(_KeyMask):
    """No query attends to padding on the right, given by the length of each row. Drawn with length 2 of three tokens:

    ::

        ##.
        ##.
        ##.

    `KeyPadding` allows padding anywhere. With lengths, an attention backend that supports them skips the hidden keys and
    needs no array [T, S]. The outputs of a row with length 0 are finite but have no meaning.

    Attributes:
      lengths_B: int [B], number of valid tokens at the start of each row, in [0, S].
    """

    lengths_B: Int[Array, "B"]

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns bool [B, 1, S], true where the index of the key is below the length of the row."""
        return jnp.arange(num_keys) < jnp.asarray(self.lengths_B, jnp.int32)[:, None, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments(Mask):
    """A token attends only to its own segment, when several texts are packed into one row. Drawn with ids `1 1 2`:

    ::

        ##.
        ##.
        ..#

    Attributes:
      query_BT: int [B, T], segment id of each query.
      key_BS: int [B, S], segment id of each key. Padding has an id that no text has (0 by convention), for queries and
        keys, so that every query may attend to at least one key.
    """

    query_BT: Int[Array, "B T"]
    key_BS: Int[Array, "B S"]

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns bool [B, T, S], true at equal ids. Raises ValueError if the ids are for other numbers of tokens."""
        if (self.query_BT.shape[1], self.key_BS.shape[1]) != (num_queries, num_keys):
            raise ValueError(
                f"the segment ids are for {self.query_BT.shape[1]} queries and {self.key_BS.shape[1]} keys, but there are "
                f"{num_queries} queries and {num_keys} keys"
            )
        return jnp.asarray(self.query_BT)[:, :, None] == jnp.asarray(self.key_BS)[:, None, :]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [B, T, S] for the queries with these indices, true where query and key have the same id."""
        rows = max(position_bT.shape[0], self.query_BT.shape[0])
        query_BT = jnp.broadcast_to(jnp.asarray(self.query_BT), (rows, self.query_BT.shape[1]))
        position_BT = jnp.broadcast_to(position_bT, (rows, position_bT.shape[1]))
        return Segments(jnp.take_along_axis(query_BT, position_BT, axis=1), self.key_BS).dense(
            position_bT.shape[1], num_keys
        )
