"""The base class of masks, their combinations, and the mask that hides nothing."""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from dream_jax.shapes import Array


class Mask(abc.ABC):
    """A rule that says which query may attend to which key."""

    @abc.abstractmethod
    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns booleans that broadcast to [B, T, S], true where a query may attend to a key.

        Args:
          position_bT: position of each query among the keys; a first axis of size 1 means the same for all rows.
          num_keys: S.
        """

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns the mask as booleans that broadcast to [B, T, S]; an axis of size 1 means the same for all.

        Raises:
          ValueError: the mask depends on positions, and there are not as many queries as keys; or the mask was made for
            another number of tokens.
        """
        if num_queries != num_keys:
            raise ValueError(
                f"{type(self).__name__} of {num_queries} queries and {num_keys} keys: they must be the same tokens; give "
                "the positions of the queries with `at`"
            )
        return self.allowed(jnp.arange(num_queries, dtype=jnp.int32)[None], num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Returns the same mask for T queries at the given positions among the keys."""
        return Queries(self, position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Returns the mask for particular rows, if it depends on where a row or its answer begins; otherwise itself.

        Args:
          valid_BT: true at tokens, false at padding; a row begins at its first valid token.
          answer_BT: true at tokens of the answer; the prompt ends before the first of them.
        """
        del valid_BT, answer_BT
        return self

    def draw(self, num_queries: int, num_keys: int | None = None, row: int = 0) -> str:
        """The mask of one row of the batch as text, one line per query: `#` may attend, `.` may not."""
        num_keys = num_queries if num_keys is None else num_keys
        dense = np.asarray(self.dense(num_queries, num_keys))
        dense = np.broadcast_to(dense, (dense.shape[0], num_queries, num_keys))
        return "\n".join("".join("#" if allowed else "." for allowed in line) for line in dense[row])

    def __and__(self, other: Mask) -> Mask:
        """Allows what both masks allow."""
        if isinstance(other, Bidirectional):
            return self
        return other if isinstance(self, Bidirectional) else And(self, other)

    def __or__(self, other: Mask) -> Mask:
        """Allows what at least one of the masks allows."""
        if isinstance(self, Bidirectional) or isinstance(other, Bidirectional):
            return Bidirectional()
        return Or(self, other)

    def __invert__(self) -> Mask:
        """Allows what this mask hides."""
        return self.mask if isinstance(self, Not) else Not(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bidirectional(Mask):
    """Every query may attend to every key, as in Dream.

    ::

        ###
        ###
        ###
    """

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """Returns [1, 1, S], all true."""
        return jnp.ones((1, 1, num_keys), dtype=bool)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """Returns [1, 1, S], all true, for any numbers of queries and keys."""
        return jnp.ones((1, 1, num_keys), dtype=bool)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Returns itself."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(Mask):
    """Allows what both masks allow; made by `&`. Here `Causal` and a window that looks one token back:

    ::

        #..
        ##.
        .##
    """

    left: Mask
    right: Mask

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """True where both masks are true."""
        return self.left.allowed(position_bT, num_keys) & self.right.allowed(position_bT, num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """True where both masks are true."""
        return self.left.dense(num_queries, num_keys) & self.right.dense(num_queries, num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Applies `at` to both masks."""
        return self.left.at(position_BT) & self.right.at(position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Applies `for_rows` to both masks."""
        return self.left.for_rows(valid_BT, answer_BT) & self.right.for_rows(valid_BT, answer_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(Mask):
    """Allows what at least one of the masks allows; made by `|`. Here `Causal` and a prompt of two tokens:

    ::

        ##.
        ##.
        ###
    """

    left: Mask
    right: Mask

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """True where at least one of the masks is true."""
        return self.left.allowed(position_bT, num_keys) | self.right.allowed(position_bT, num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """True where at least one of the masks is true."""
        return self.left.dense(num_queries, num_keys) | self.right.dense(num_queries, num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Applies `at` to both masks."""
        return self.left.at(position_BT) | self.right.at(position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Applies `for_rows` to both masks."""
        return self.left.for_rows(valid_BT, answer_BT) | self.right.for_rows(valid_BT, answer_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Not(Mask):
    """Allows what the mask hides; made by `~`. Here `~Causal()`, whose last query has nothing to attend to:

    ::

        .##
        ..#
        ...
    """

    mask: Mask

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """True where the mask is false."""
        return ~self.mask.allowed(position_bT, num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """True where the mask is false."""
        return ~self.mask.dense(num_queries, num_keys)

    def at(self, position_BT: Int[Array, "B T"]) -> Mask:
        """Applies `at` to the mask."""
        return ~self.mask.at(position_BT)

    def for_rows(self, valid_BT: Bool[Array, "B T"], answer_BT: Bool[Array, "B T"]) -> Mask:
        """Applies `for_rows` to the mask."""
        return ~self.mask.for_rows(valid_BT, answer_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries(Mask):
    """A mask whose queries are only some of the tokens; made by `at`. Here `Causal` for queries at positions 2, 0 and
    0:

    ::

        ###
        #..
        #..
    """

    mask: Mask
    position_BT: Int[Array, "B T"]

    def allowed(self, position_bT: Int[Array, "b T"], num_keys: int) -> Bool[jax.Array, "b2 t s"]:
        """The rows of the mask for some of its queries; `position_bT` are here indices into these queries."""
        rows = max(position_bT.shape[0], self.position_BT.shape[0])
        position_BT = jnp.broadcast_to(jnp.asarray(self.position_BT), (rows, self.position_BT.shape[1]))
        index_BT = jnp.broadcast_to(position_bT, (rows, position_bT.shape[1]))
        return self.mask.allowed(jnp.take_along_axis(position_BT, index_BT, axis=1), num_keys)

    def dense(self, num_queries: int, num_keys: int) -> Bool[jax.Array, "b t s"]:
        """[B, T, S]. Raises ValueError if there are not as many queries as positions."""
        if self.position_BT.shape[1] != num_queries:
            raise ValueError(f"a mask for {self.position_BT.shape[1]} queries was given to {num_queries} queries")
        return self.mask.allowed(jnp.asarray(self.position_BT), num_keys)


def conjuncts(mask: Mask) -> tuple[Mask, ...]:
    """The masks that `mask` combines by `&`: itself if it is not such a combination, none for `Bidirectional`."""
    if isinstance(mask, And):
        return (*conjuncts(mask.left), *conjuncts(mask.right))
    return () if isinstance(mask, Bidirectional) else (mask,)


def is_fixed(mask: Mask) -> bool:
    """Whether the mask holds no arrays: it is known when a program is compiled, and is the same in all rows."""
    return not jax.tree.leaves(mask)
