"""Masks that compare the position of a query with the position of a key. `base` explains the drawings."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from dream_jax.bounds import IntegerRange, check_numbers
from dream_jax.masks.base import Mask
from dream_jax.shapes import Array

# Positions are int32 numbers. Their sums and differences with such a number of tokens are too.
_SIZE, _REACH = IntegerRange(1, 2**30), IntegerRange(0, 2**30)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """A query may attend to the keys up to its own position, as in the autoregressive model that Dream started from.

    ::

        #..
        ##.
        ###
    """

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [b, T, S], true where the key is not after the query."""
        return key_indices(num_keys) <= jnp.asarray(position_bT)[:, :, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """All queries may attend to the whole prompt; the answer is causal. Drawn with a prompt of two tokens:

    ::

        ##..
        ##..
        ###.
        ####

    Attributes:
      end_B: int32 [B], index of the first token after the prompt in each row; None until `for_rows` sets it.
    """

    end_B: Int[Array, "B"] | None = None

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [B, T, S]. Raises ValueError if `end_B` is not set."""
        if self.end_B is None:
            raise ValueError("a prefix mask needs the ends of the prompts: give Prefix(end_B), or call `for_rows`")
        in_prompt_B1S = key_indices(num_keys) < jnp.asarray(self.end_B, jnp.int32)[:, None, None]
        return in_prompt_B1S | (key_indices(num_keys) <= jnp.asarray(position_bT)[:, :, None])

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the mask in which the prompt of each row ends before the first token of the answer."""
        return Prefix(first_true(answer_BT))

    def for_texts(self, position_BT: Int[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the mask in which the prompt of each text ends before the first token of its answer."""
        position_BT = jnp.asarray(position_BT, jnp.int32)
        order_BT = jnp.where(answer_numbers(position_BT, answer_BT) >= 0, position_BT + 1, 0)
        return Ordered(order_BT, order_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """A query may attend to its own block of `size` tokens and to earlier blocks. Drawn with blocks of two tokens:

    ::

        ##..
        ##..
        ####
        ####

    Attributes:
      size: number of tokens in a block. With 1 the mask is causal.
      start_B: int32 [B], index of the first token of the first block in each row; None means 0. Padding before this
        token is in earlier blocks.

    Raises:
      ValueError: `size` is below 1.
    """

    size: int = dataclasses.field(metadata={"static": True})
    start_B: Int[Array, "B"] | None = None

    def __post_init__(self) -> None:
        check_numbers(self, size=_SIZE)

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [b, T, S], true where the block of the key is not after the block of the query."""
        start_B11 = jnp.int32(0) if self.start_B is None else jnp.asarray(self.start_B, jnp.int32)[:, None, None]
        block_of_key, block_of_query = (
            (position - start_B11) // self.size
            for position in (key_indices(num_keys), jnp.asarray(position_bT)[:, :, None])
        )
        return block_of_key <= block_of_query

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the mask in which the first block of each row starts at its first valid token."""
        return BlockCausal(self.size, first_true(valid_BT))

    def for_texts(self, position_BT: Int[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the mask in which the first block of each text starts at its first token."""
        order_BT = jnp.asarray(position_BT, jnp.int32) // self.size
        return Ordered(order_BT, order_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Ordered(Mask):
    """Each token has a number, and a query may attend to keys with at most its own number. Drawn with `0 1 0`:

    ::

        #.#
        ###
        #.#

    Attributes:
      query_BT: int [B, T], the number of each query.
      key_BS: int [B, S], the number of each key.
    """

    query_BT: Int[Array, "B T"]
    key_BS: Int[Array, "B S"]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [B, T, S]. Raises ValueError if `key_BS` has another number of keys than `num_keys`."""
        if self.key_BS.shape[1] != num_keys:
            raise ValueError(f"the order is of {self.key_BS.shape[1]} keys, but there are {num_keys} keys")
        rows = max(position_bT.shape[0], self.query_BT.shape[0])
        query_BT = jnp.broadcast_to(jnp.asarray(self.query_BT), (rows, self.query_BT.shape[1]))
        position_BT = jnp.broadcast_to(position_bT, (rows, position_bT.shape[1]))
        query_BT = jnp.take_along_axis(query_BT, position_BT, axis=1)
        return jnp.asarray(self.key_BS)[:, None, :] <= query_BT[:, :, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query may attend to itself, and to some tokens before and after it. Drawn with left=1 and right=0:

    ::

        #..
        ##.
        .##

    Attributes:
      left: number of tokens before the query, 0 or more.
      right: number of tokens after the query, 0 or more.

    Raises:
      ValueError: `left` or `right` is negative.
    """

    left: int = dataclasses.field(metadata={"static": True})
    right: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        check_numbers(self, left=_REACH, right=_REACH)

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [b, T, S], true where the key is inside the window of the query."""
        ahead_BTS = key_indices(num_keys) - jnp.asarray(position_bT)[:, :, None]
        return (ahead_BTS >= -self.left) & (ahead_BTS <= self.right)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Annealed(Mask):
    """A query may attend to the keys up to its own position, and to a random subset of the later keys.

    Training changes it from causal to bidirectional. Drawn with only the third key allowed to the second query:

    ::

        #..
        ###
        ###

    Attributes:
      drawn_TS: bool [T, T], true where a query may attend to a later key; `anneal` draws it.
    """

    drawn_TS: Bool[Array, "T S"]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [b, T, S]. Raises ValueError if `drawn_TS` is for another number of tokens."""
        if self.drawn_TS.shape != (num_keys, num_keys):
            raise ValueError(
                f"drawn_TS has shape {self.drawn_TS.shape}, but there are {num_keys} tokens; draw it for this number"
            )
        return Causal().allowed(position_bT, num_keys) | jnp.asarray(self.drawn_TS)[jnp.asarray(position_bT)]


def anneal(key: jax.Array, share: float | jax.Array, length: int) -> Bool[jax.Array, "T S"]:
    """Returns a random `Annealed.drawn_TS`, bool [length, length]: every element is true with probability `share`.

    With a share of 0 the mask is causal, with 1 it is bidirectional. DiffuLLaMA (Gong et al. 2025) anneals like this.
    """
    return jax.random.uniform(key, (length, length)) < share


def key_indices(num_keys: int) -> Int[jax.Array, "S"]:
    """Returns the indices of the keys, int32 [S]."""
    return jnp.arange(num_keys, dtype=jnp.int32)


def answer_numbers(position_BT: Int[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Int[jax.Array, "B T"]:
    """Returns the number of each token in the answer of its text, int32 [B, T]: 0 for the first one; -1 in the prompt.

    An answer reaches from its first token to the end of the text. The arguments are those of `Mask.for_texts`.
    """
    answer_BT, index_T = jnp.asarray(answer_BT), key_indices(position_BT.shape[1])
    start_BT = index_T - jnp.asarray(position_BT, jnp.int32)
    # The number of answer tokens of the row that are before each token.
    before_BT = jnp.cumsum(answer_BT, axis=1, dtype=jnp.int32) - answer_BT.astype(jnp.int32)
    is_first_BT = answer_BT & (before_BT == jnp.take_along_axis(before_BT, start_BT, axis=1))
    first_BT = jax.lax.cummax(jnp.where(is_first_BT, index_T, -1), axis=1)  # of this text, or of one before it
    return jnp.where(first_BT >= start_BT, index_T - first_BT, -1)


def first_true(x_BT: Bool[Array, "B T"]) -> Int[jax.Array, "B"]:
    """Returns the index of the first true element of each row, int32 [B]; T for a row without a true element."""
    position_BT = jnp.where(jnp.asarray(x_BT), key_indices(x_BT.shape[1]), x_BT.shape[1])
    return jnp.min(position_BT, axis=1, initial=x_BT.shape[1])
