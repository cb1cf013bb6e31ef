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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed(Mask):
    """In rows of several texts, a token attends only to its own text. Drawn for 4 tokens, with texts of 2 and of 1:

    ::

        ##..
        ##..
        ..#.
        ...#

    The texts lie one after the other from the start of the row. Padding follows the last text, and attends only to padding.
    In contrast to `Segments`, an attention backend can see from the shape of `length_BM` how many texts a row has at most.
    A model that is called with this mask counts the positions from the start of each text, see `positions`.

    Attributes:
      length_BM: int [B, M], the number of tokens of each text; 0 after the last text of a row.
    """

    length_BM: Int[Array, "B M"]

    def slots(self, num_tokens: int) -> Int[jax.Array, "B T"]:
        """Returns the index of the text of each token among the texts of its row, int32 [B, T]; M at padding."""
        end_BM = jnp.cumsum(jnp.asarray(self.length_BM, jnp.int32), axis=1)
        token_T1 = jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
        return jnp.sum(end_BM[:, None, :] <= token_T1, axis=2, dtype=jnp.int32)

    def spread(self, value_BM: Array, padding_B1: Array, num_tokens: int) -> jax.Array:
        """Returns [B, T]: for each token the value of its text, and for padding the value of its row in `padding_B1`.

        `value_BM` has a value for each text, [B, M]; `padding_B1` has the shape [B, 1] or [1, 1].
        """
        values = jnp.concatenate([jnp.asarray(value_BM), jnp.broadcast_to(padding_B1, (value_BM.shape[0], 1))], axis=1)
        return jnp.take_along_axis(values, self.slots(num_tokens), axis=1)

    def positions(self, num_tokens: int) -> Int[jax.Array, "B T"]:
        """Returns the position of each token in its text, from 0, int32 [B, T]; padding is counted in the same way."""
        end_BM = jnp.cumsum(jnp.asarray(self.length_BM, jnp.int32), axis=1)
        start_BT = self.spread(end_BM - jnp.asarray(self.length_BM, jnp.int32), end_BM[:, -1:], num_tokens)
        return jnp.arange(num_tokens, dtype=jnp.int32) - start_BT

    def starts(self, num_tokens: int) -> Bool[jax.Array, "B T"]:
        """Returns bool [B, T], true at the first token of each text and at the first position of padding."""
        return self.positions(num_tokens) == 0

    def valid(self, num_tokens: int) -> Bool[jax.Array, "B T"]:
        """Returns bool [B, T], true at tokens of texts, false at padding."""
        return self.slots(num_tokens) < self.length_BM.shape[1]

    def segments(self, num_tokens: int) -> Segments:
        """Returns the same mask with an id for each token; in each row the ids ascend, and padding has the largest."""
        slot_BT = self.slots(num_tokens)
        return Segments(slot_BT, slot_BT)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns bool [B, T, S], true within a text. Raises ValueError if queries and keys are not the same tokens."""
        if num_queries != num_keys:
            raise ValueError(
                f"rows of several texts got {num_queries} queries and {num_keys} keys; if they are not the same tokens, "
                "give the positions of the queries with `at`"
            )
        return self.segments(num_keys).dense(num_queries, num_keys)

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [B, T, S] for the queries with these indices, true where query and key are of the same text."""
        return self.segments(num_keys).allowed(position_bT, num_keys)
