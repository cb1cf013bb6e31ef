"""Masks that depend on the contents of a row: padding and segments."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from dream_jax.masks.base import Mask
from dream_jax.shapes import Array


class _OfKeys(Mask):
    """A mask that is the same for all queries of a row."""

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns [B, 1, S]."""
        return self.dense(position_bT.shape[1], num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Returns itself."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyPadding(_OfKeys):
    """Keys that are padding are hidden from every query; queries that are padding still see the valid keys.

    Only keys are hidden, because the softmax of a query with no visible key is undefined. Such queries are the likely
    cause of the "!!!!" outputs of the published code.

    Attributes:
      valid_BS: true at tokens, false at padding. Here the first of three tokens is padding:

    ::

        .##
        .##
        .##
    """

    valid_BS: Bool[Array, "B S"]

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """[B, 1, S]. Raises ValueError if the mask was made for another number of keys."""
        if self.valid_BS.shape[1] != num_keys:
            raise ValueError(f"key padding for {self.valid_BS.shape[1]} keys was given to {num_keys} keys")
        return jnp.asarray(self.valid_BS)[:, None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyLengths(_OfKeys):
    """Keys at or after the length of their row are hidden from every query: padding on the right, given by lengths.

    `KeyPadding` allows padding anywhere, but an attention backend that understands lengths skips the hidden keys and
    builds no mask. With length 0 the outputs of a row are finite but have no meaning.

    Attributes:
      lengths_B: number of tokens in each row, all at its start. With length 2 of three tokens:

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
    """Tokens attend within their own segment, for several texts that are packed into one row.

    Attributes:
      query_BT, key_BS: segment id of each token. Padding has its own id (0 by convention), so that every query sees a
        key. With ids `1 1 2`:

    ::

        ##.
        ##.
        ..#
    """

    query_BT: Int[Array, "B T"]
    key_BS: Int[Array, "B S"]

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """[B, T, S]. Raises ValueError if the ids were made for other lengths."""
        if (self.query_BT.shape[1], self.key_BS.shape[1]) != (num_queries, num_keys):
            raise ValueError(
                f"segment ids for {self.query_BT.shape[1]} queries and {self.key_BS.shape[1]} keys were given to "
                f"{num_queries} queries and {num_keys} keys"
            )
        return jnp.asarray(self.query_BT)[:, :, None] == jnp.asarray(self.key_BS)[:, None, :]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]."""
        rows = max(position_bT.shape[0], self.query_BT.shape[0])
        query_BT = jnp.broadcast_to(jnp.asarray(self.query_BT), (rows, self.query_BT.shape[1]))
        position_BT = jnp.broadcast_to(position_bT, (rows, position_bT.shape[1]))
        return Segments(jnp.take_along_axis(query_BT, position_BT, axis=1), self.key_BS).dense(
            position_bT.shape[1], num_keys
        )
