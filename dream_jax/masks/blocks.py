"""The masks of block diffusion, for one stream of tokens and for two. `base` explains the drawings.

A text is a prompt and an answer. The answer is divided into blocks, which are sampled one after the other. Block k,
from 0, holds the tokens k * size to (k + 1) * size - 1 of the answer; the last block may have fewer tokens. The prompt,
which may be empty, is the block with the number -1.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from dream_jax.bounds import IntegerRange, check_numbers
from dream_jax.masks.base import Mask, conjuncts
from dream_jax.masks.order import Ordered, answer_numbers, first_true, key_indices
from dream_jax.masks.rows import KeyPadding, Packed, Segments
from dream_jax.shapes import Array

_SIZE = IntegerRange(1, 2**30)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockDiffusion(Mask):
    """A query may attend to its own block of the answer, to earlier blocks and to the prompt; the prompt only to itself.

    With this mask the keys and values of a finished block do not depend on later blocks. Drawn with a prompt of one token
    and blocks of two tokens:

    ::

        #...
        ###.
        ###.
        ####

    Attributes:
      size: number of tokens in a block. With 1 the mask is `Prefix`.
      start_B: int32 [B], index of the first token of the answer in each row; None means 0, and then there is no prompt.
        Padding before the answer belongs to the block of the prompt.

    Raises:
      ValueError: `size` is below 1.
    """

    size: int = dataclasses.field(metadata={"static": True})
    start_B: Int[Array, "B"] | None = None

    def __post_init__(self) -> None:
        check_numbers(self, size=_SIZE)

    def blocks(self, position_bT: Int[Array, "b T"]) -> Int[jax.Array, "b2 T"]:
        """Returns the number of the block of the token at each index of a row, int32 [1 or B, T]; -1 in prompts."""
        return jnp.maximum(_from_start(position_bT, self.start_B) // self.size, -1)

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [b, T, S], true where the block of the key is not after the block of the query."""
        return self.blocks(key_indices(num_keys)[None])[:, None, :] <= self.blocks(position_bT)[:, :, None]

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the mask in which the first block of each row starts at the first token of its answer.

        A row without an answer is a prompt as a whole. `valid_BT` is not used: `KeyPadding` hides padding.
        """
        return BlockDiffusion(self.size, first_true(answer_BT))

    def for_texts(self, position_BT: Int[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the mask in which the first block of each text starts at the first token of its answer.

        This mask does not separate the texts of a row; combine it with `Packed` by `&`.
        """
        block_BT = answer_numbers(position_BT, answer_BT) // self.size
        return OrderedBlocks(block_BT, block_BT, self.size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OrderedBlocks(Ordered):
    """The same as `BlockDiffusion` for rows of several texts: it stores the number of the block of each token.

    A query may attend to keys whose block has at most the number of its own block. The mask does not separate the texts
    of a row, so it is combined with `Packed`. Drawn for three tokens in the blocks 0, 1 and 1:

    ::

        #..
        ###
        ###

    Attributes:
      query_BT, key_BS: int [B, T] and [B, S], the number of the block of each query and of each key; -1 in prompts.
      size: number of tokens in a block of an answer.
    """

    size: int = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoStream(Mask):
    """The training mask of block diffusion (Arriola et al. 2025), for rows that hold a text twice, [noised | clean].

    A noised token may attend to the noised tokens of its block and to the clean tokens of earlier blocks, as when blocks
    are sampled one after the other. A clean token may attend to the clean tokens up to the end of its block. The prompt is
    a block of its own before the others. Drawn for a text of three tokens, with a prompt of one and a block of two:

    ::

        #.....
        .###..
        .###..
        ...#..
        ...###
        ...###

    Attributes:
      size: number of tokens in a block.
      start_B: int32 [B], index in each half of the first token of the answer; None means 0, and then there is no prompt.

    Raises:
      ValueError: `size` is below 1.
    """

    size: int = dataclasses.field(metadata={"static": True})
    start_B: Int[Array, "B"] | None = None

    def __post_init__(self) -> None:
        check_numbers(self, size=_SIZE)

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [b, T, S]. Raises ValueError for an odd number of keys."""
        half, key_1S, query_bT = _half(num_keys), key_indices(num_keys)[None], jnp.asarray(position_bT)
        blocks = BlockDiffusion(self.size, self.start_B).blocks
        return _two_streams(query_bT >= half, blocks(query_bT % half), key_1S >= half, blocks(key_1S % half))

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the mask in which the first block of each row starts at the first token of its answer.

        The arguments describe one of the two halves of the rows: they are [B, T] for rows of 2T tokens.
        """
        return TwoStream(self.size, first_true(answer_BT))

    def for_texts(self, position_BT: Int[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Raises ValueError, because each half of a row is one text."""
        raise ValueError(
            "the mask TwoStream needs rows that hold one text twice; for rows of several texts, call `two_streams` with "
            "the mask that BlockDiffusion.for_texts returns"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OrderedStreams(Mask):
    """The same as `TwoStream` for rows of several texts: it stores the number of the block of each token.

    The mask does not separate the texts of a row, so `two_streams` combines it with `Segments`. Drawn for halves of two
    tokens, in the blocks 0 and 1:

    ::

        #...
        .##.
        ..#.
        ..##

    Attributes:
      block_BT: int [B, T], the number of the block of each token of a half; -1 in prompts.
      size: number of tokens in a block of an answer.
    """

    block_BT: Int[Array, "B T"]
    size: int = dataclasses.field(metadata={"static": True})

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns bool [B, T, S]. Raises ValueError if `num_keys` is not twice the number of tokens of a half."""
        half = _half(num_keys)
        if self.block_BT.shape[1] != half:
            raise ValueError(f"the blocks are of {self.block_BT.shape[1]} tokens, but each half has {half} tokens")
        rows = max(position_bT.shape[0], self.block_BT.shape[0])
        query_BT = jnp.broadcast_to(position_bT, (rows, position_bT.shape[1]))
        block_BS = jnp.broadcast_to(jnp.tile(jnp.asarray(self.block_BT, jnp.int32), (1, 2)), (rows, num_keys))
        block_of_query = jnp.take_along_axis(block_BS, query_BT, axis=1)
        return _two_streams(query_BT >= half, block_of_query, key_indices(num_keys)[None] >= half, block_BS)


def two_streams(mask: Mask) -> Mask:
    """Returns the mask of rows [noised | clean], from the mask of one of these halves.

    Args:
      mask: `BlockDiffusion` after `for_rows`, also combined by `&` with `KeyPadding`; or the result of
        `BlockDiffusion.for_texts`, combined by `&` with `Packed`.

    Raises:
      ValueError: the mask is not one of these.
    """
    found: Mask | None = None
    for conjunct in _checked(mask):
        match conjunct:
            case BlockDiffusion(size, start_B):
                doubled: Mask = TwoStream(size, start_B)
            case OrderedBlocks(_, block_BT, size):
                doubled = OrderedStreams(block_BT, size)
            case KeyPadding(valid_BT):
                doubled = KeyPadding(jnp.tile(jnp.asarray(valid_BT), (1, 2)))
            case Packed():
                num_tokens = next(part.key_BS.shape[1] for part in conjuncts(mask) if isinstance(part, OrderedBlocks))
                slot_BS = jnp.tile(conjunct.slots(num_tokens), (1, 2))
                doubled = Segments(slot_BS, slot_BS)
        found = doubled if found is None else found & doubled
    assert found is not None
    return found


def starts_of_texts(mask: Mask, num_tokens: int) -> Bool[jax.Array, "b T"]:
    """Returns bool [1, T] or [B, T], true at the first token of each text.

    Raises:
      ValueError: `two_streams` does not accept the mask.
    """
    for conjunct in _checked(mask):
        if isinstance(conjunct, Packed):
            return conjunct.starts(num_tokens)
        if isinstance(conjunct, KeyPadding):
            return key_indices(num_tokens)[None] == first_true(conjunct.valid_BS)[:, None]
    return key_indices(num_tokens)[None] == 0


def block_numbers(mask: Mask, num_tokens: int) -> Int[jax.Array, "b T"]:
    """Returns the number of the block of each token in its text, int32 [1, T] or [B, T]; -1 in prompts.

    Raises:
      ValueError: `two_streams` does not accept the mask.
    """
    for conjunct in _checked(mask):
        if isinstance(conjunct, OrderedBlocks):
            return jnp.asarray(conjunct.key_BS, jnp.int32)
        if isinstance(conjunct, BlockDiffusion):
            found = conjunct.blocks(key_indices(num_tokens)[None])
    return found


def starts_of_blocks(mask: Mask, num_tokens: int) -> Bool[jax.Array, "b T"]:
    """Returns bool [1, T] or [B, T], true at the first token of each block of an answer.

    If a text has no prompt, its first token is the first token of a block, so it is marked too.

    Raises:
      ValueError: `two_streams` does not accept the mask.
    """
    block_BT = block_numbers(mask, num_tokens)
    other_BT = jnp.pad(block_BT[:, 1:] != block_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return (block_BT >= 0) & (other_BT | starts_of_texts(mask, num_tokens))


def _checked(mask: Mask) -> tuple[Mask, ...]:
    """Returns the masks that `mask` combines by `&`. Raises ValueError if `two_streams` does not accept the mask."""
    found = conjuncts(mask)
    kinds = sorted(type(conjunct).__name__ for conjunct in found)
    if kinds not in (["BlockDiffusion"], ["BlockDiffusion", "KeyPadding"], ["OrderedBlocks", "Packed"]):
        raise ValueError(
            f"two streams need one mask BlockDiffusion, alone or with KeyPadding, or its `for_texts` with Packed; got "
            f"{' & '.join(kinds) or 'Bidirectional'}"
        )
    return found


def _from_start(position_bT: Int[Array, "b T"], start_B: Int[Array, "B"] | None) -> Int[jax.Array, "b2 T"]:
    """Returns the index of each token, counted from the first token of the answer; negative in the prompt."""
    start_B1 = jnp.int32(0) if start_B is None else jnp.asarray(start_B, jnp.int32)[:, None]
    return jnp.asarray(position_bT, jnp.int32) - start_B1


def _half(num_keys: int) -> int:
    """Returns half of the number of keys. Raises ValueError for an odd number."""
    half, odd = divmod(num_keys, 2)
    if odd:
        raise ValueError(f"{num_keys} keys cannot be a noised and a clean half of the same length")
    return half


def _two_streams(
    clean_query_bT: Bool[Array, "b T"],
    block_of_query_bT: Int[Array, "b2 T"],
    clean_key_bS: Bool[Array, "b3 S"],
    block_of_key_bS: Int[Array, "b4 S"],
) -> Bool[jax.Array, "b5 T S"]:
    """Returns bool [b, T, S], true where a query may attend to a key, from the half and the block of both."""
    clean_query, block_of_query = clean_query_bT[:, :, None], block_of_query_bT[:, :, None]
    clean_key, block_of_key = clean_key_bS[:, None, :], block_of_key_bS[:, None, :]
    noised = ~clean_query & ~clean_key & (block_of_key == block_of_query)
    before = ~clean_query & clean_key & (block_of_key < block_of_query)
    return jnp.asarray(noised | before | (clean_query & clean_key & (block_of_key <= block_of_query)))
