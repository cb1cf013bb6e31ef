"""Masks that depend on the positions of query and key."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from dream_jax.masks.base import Mask
from dream_jax.shapes import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Causal(Mask):
    """Every query sees the keys up to its own position, as in the autoregressive model that Dream started from.

    ::

        #..
        ##.
        ###
    """

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]."""
        return _keys(num_keys) <= jnp.asarray(position_bT)[:, :, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix(Mask):
    """All tokens see the whole prompt; the answer is causal.

    Attributes:
      end_B: position of the first token after the prompt in each row; None until `for_rows` sets it. With a prompt of
        two tokens:

    ::

        ##..
        ##..
        ###.
        ####
    """

    end_B: Int[Array, "B"] | None = None

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]. Raises ValueError if the ends of the prompts are not set."""
        if self.end_B is None:
            raise ValueError("a prefix mask must be told where the prompts end: Prefix(end), or `for_rows`")
        in_prompt_B1S = _keys(num_keys) < jnp.asarray(self.end_B, jnp.int32)[:, None, None]
        return in_prompt_B1S | (_keys(num_keys) <= jnp.asarray(position_bT)[:, :, None])

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Sets the ends of the prompts."""
        return Prefix(_first(answer_BT))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCausal(Mask):
    """Rows are divided into blocks of `size` tokens; a query sees its own block and those before it.

    Attributes:
      size: tokens per block; 1 is causal.
      start_B: position of the first token of each row, at which the first block starts (padding before it is in earlier
        blocks); None means 0. With blocks of two:

    ::

        ##..
        ##..
        ####
        ####

    Raises:
      ValueError: size below 1.
    """

    size: int = dataclasses.field(metadata={"static": True})
    start_B: Int[Array, "B"] | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"blocks of {self.size} tokens: the size must be at least 1")

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]."""
        start_B11 = jnp.int32(0) if self.start_B is None else jnp.asarray(self.start_B, jnp.int32)[:, None, None]
        block_of_key, block_of_query = (
            (position - start_B11) // self.size for position in (_keys(num_keys), jnp.asarray(position_bT)[:, :, None])
        )
        return block_of_key <= block_of_query

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Sets the starts of the rows."""
        return BlockCausal(self.size, _first(valid_BT))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SlidingWindow(Mask):
    """A query sees itself, `left` tokens before it and `right` tokens after it.

    Attributes:
      left, right: numbers of tokens. With left=1 and right=0:

    ::

        #..
        ##.
        .##

    Raises:
      ValueError: a negative number.
    """

    left: int = dataclasses.field(metadata={"static": True})
    right: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if self.left < 0 or self.right < 0:
            raise ValueError(f"a window of {self.left} and {self.right} tokens: neither may be negative")

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]."""
        ahead_BTS = _keys(num_keys) - jnp.asarray(position_bT)[:, :, None]
        return (ahead_BTS >= -self.left) & (ahead_BTS <= self.right)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoStream(Mask):
    """The training mask of block diffusion (Arriola et al. 2025), for rows that hold a text twice, [noised | clean].

    A noised token sees the noised tokens of its block and the clean tokens of earlier blocks. This is what it sees when
    blocks are sampled one after the other. A clean token sees the clean tokens up to the end of its block.

    Attributes:
      size: tokens per block, counted from the start of each half. With blocks of one, for a text of two tokens:

    ::

        #...
        .##.
        ..#.
        ..##

    Raises:
      ValueError: size below 1.
    """

    size: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"blocks of {self.size} tokens: the size must be at least 1")

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]. Raises ValueError for an odd number of keys."""
        half, odd = divmod(num_keys, 2)
        if odd:
            raise ValueError(f"{num_keys} keys cannot be a noised and a clean half of one length")
        key, query = _keys(num_keys), jnp.asarray(position_bT)[:, :, None]
        clean_key, clean_query = key >= half, query >= half
        block_of_key, block_of_query = (key % half) // self.size, (query % half) // self.size
        noised = ~clean_query & ~clean_key & (block_of_key == block_of_query)
        before = ~clean_query & clean_key & (block_of_key < block_of_query)
        return noised | before | (clean_query & clean_key & (block_of_key <= block_of_query))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Annealed(Mask):
    """Between causal and bidirectional: a query sees the keys up to its own position, and a random part of the later
    ones.

    Attributes:
      drawn_TS: true where a query may attend to a later key; made by `anneal`. Here the second query sees the third
        key:

    ::

        #..
        ###
        ###
    """

    drawn_TS: Bool[Array, "T S"]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """[B, T, S]. Raises ValueError if it was drawn for another number of tokens."""
        if self.drawn_TS.shape != (num_keys, num_keys):
            raise ValueError(f"a mask drawn for {self.drawn_TS.shape} was given to {num_keys} tokens")
        return Causal().allowed(position_bT, num_keys) | jnp.asarray(self.drawn_TS)[jnp.asarray(position_bT)]


def anneal(key: jax.Array, share: float | jax.Array, length: int) -> Bool[jax.Array, "T S"]:
    """Draws `Annealed.drawn_TS`: each query may see each later key with probability `share`.

    0 gives a causal mask, 1 a bidirectional one. This is the annealing of DiffuLLaMA (Gong et al. 2025).
    """
    return jax.random.uniform(key, (length, length)) < share


def _keys(num_keys: int) -> Int[jax.Array, "S"]:
    return jnp.arange(num_keys, dtype=jnp.int32)


def _first(x_BT: Bool[Array, "B T"]) -> Int[jax.Array, "B"]:
    """The first true position of each row; T where there is none."""
    position_BT = jnp.where(jnp.asarray(x_BT), _keys(x_BT.shape[1]), x_BT.shape[1])
    return jnp.min(position_BT, axis=1, initial=x_BT.shape[1])
