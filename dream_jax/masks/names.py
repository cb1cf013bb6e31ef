"""Masks by name, as a command line and a saved model spell them."""

from __future__ import annotations

from dream_jax.masks.base import Bidirectional, Mask
from dream_jax.masks.order import BlockCausal, Causal, Prefix, SlidingWindow

NAMES = "bidirectional, causal, prefix, block-causal:SIZE, window:REACH or window:LEFT:RIGHT"


def parse(name: str) -> Mask:
    """The mask of a name such as `block-causal:8`; where its rows begin and answer is for `for_rows` to say.

    Raises:
      ValueError: an unknown name, or numbers that it does not take.
    """
    kind, *numbers = name.split(":")
    # Only digits: int() would take "1_6" and " 16" as well, and no two spellings are to mean one mask.
    if all(number.isascii() and number.isdigit() for number in numbers):
        values = [int(number) for number in numbers]
        simple = {"bidirectional": Bidirectional, "causal": Causal, "prefix": Prefix}
        if kind in simple and not values:
            return simple[kind]()
        if kind == "block-causal" and len(values) == 1:
            return BlockCausal(values[0])
        if kind == "window" and len(values) in (1, 2):
            return SlidingWindow(values[0], values[-1])
    raise ValueError(f"mask {name!r} is not one of {NAMES} (in tokens)")


def spelled(mask: Mask) -> str:
    """The name that `parse` reads as this mask.

    Raises:
      ValueError: a mask without a name: composed, or for certain rows.
    """
    if isinstance(mask, Bidirectional):
        return "bidirectional"
    if isinstance(mask, Causal):
        return "causal"
    if isinstance(mask, Prefix) and mask.end_B is None:
        return "prefix"
    if isinstance(mask, BlockCausal) and mask.start_B is None:
        return f"block-causal:{mask.size}"
    if isinstance(mask, SlidingWindow):
        return f"window:{mask.left}" if mask.left == mask.right else f"window:{mask.left}:{mask.right}"
    raise ValueError(f"{type(mask).__name__} has no name here; named are {NAMES}")
