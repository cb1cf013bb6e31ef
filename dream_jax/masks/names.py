"""The names of masks, as a command line or a saved model writes them."""

from __future__ import annotations

from dream_jax.masks.base import Bidirectional, Mask
from dream_jax.masks.order import BlockCausal, Causal, Prefix, SlidingWindow

NAMES = "bidirectional, causal, prefix, block-causal:SIZE, window:REACH or window:LEFT:RIGHT"


def parse(name: str) -> Mask:
    """The mask with a name such as `block-causal:8`. It holds no arrays; `Mask.for_rows` adds what depends on rows.

    Raises:
      ValueError: an unknown name, or numbers that do not fit the mask.
    """
    kind, *numbers = name.split(":")
    # Digits only: int() also accepts "1_6" and " 16", but a mask should have one spelling.
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


def name_of(mask: Mask) -> str:
    """The inverse of `parse`.

    Raises:
      ValueError: a mask without a name, because it is a combination or holds arrays.
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
