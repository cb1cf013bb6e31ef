"""What may be kept between forward passes: settings, frozen.

A pass is either full (all tokens of a row) or a window around the block that is being written, whose queries attend to
the keys and values that the last full pass, and the windows since, have left. `passes` makes them.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, get_args

Variant = Literal["prefix", "dual"]


@dataclasses.dataclass(frozen=True)
class NoCache:
    """Every pass computes everything: exact."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowCache:
    """Passes compute the block and a little beside it; full passes come at block starts and, if asked for, oftener.

    Attributes:
      left: tokens before the block that are computed anew with it. At least 1: the block's first token is predicted
        from there.
      right: tokens after the block, likewise; None for all of them.
      refresh_blocks: a full pass comes at the start of every so many blocks; None for the first only.
      refresh_passes: and a row has one after every so many passes since its last; None for no more than that. 1 makes
        every pass full, which is exact.

    Raises:
      ValueError: a value out of its range.
    """

    left: int = 1
    right: int | None = 0
    refresh_blocks: int | None = 1
    refresh_passes: int | None = None
    forces_first: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.left < 1:
            raise ValueError(f"{self.left=} must be at least 1: a block's first token is predicted from its left")
        for name, least in (("right", 0), ("refresh_blocks", 1), ("refresh_passes", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastDLLMCache:
    """The published Fast-dLLM, to compare with: see `SamplerConfig.fast_dllm`.

    A full pass at each block start writes the block's first token, whatever its confidence, and is used for nothing
    else. The passes after it compute the block ("dual") or everything from its start on ("prefix").

    Raises:
      ValueError: an unknown variant.
    """

    variant: Variant
    left: ClassVar[int] = 0
    refresh_blocks: ClassVar[int | None] = 1
    refresh_passes: ClassVar[int | None] = None
    forces_first: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"{self.variant=} is not one of {get_args(Variant)}")

    @property
    def right(self) -> int | None:
        """All tokens after the block, or none."""
        return None if self.variant == "prefix" else 0


KVCachePolicy = WindowCache | FastDLLMCache
CachePolicy = NoCache | KVCachePolicy
