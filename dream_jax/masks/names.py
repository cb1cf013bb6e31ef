"""The names of masks, which command lines and saved models use."""

from __future__ import annotations

from dream_jax.masks.base import Bidirectional, Mask
from dream_jax.masks.blocks import BlockDiffusion
from dream_jax.masks.order import BlockCausal, Causal, Prefix, SlidingWindow

_DIGITS = 10  # of the largest number of tokens that a mask accepts

NAMES = "bidirectional, causal, prefix, block-causal:SIZE, block-diffusion:SIZE, window:REACH or window:LEFT:RIGHT"
"""The forms of the names, for messages. Numbers are in tokens, and window:REACH means window:REACH:REACH."""


def parse(name: str) -> Mask:
    """Returns the mask that has this name, such as "block-causal:8".

    The mask is not bound to particular rows: `Mask.for_rows` sets where rows and answers begin.

    Raises:
      ValueError: the name is unknown, or its number is out of range.
    """
    kind, *numbers = name.split(":")
    # Only digits are accepted. int() also reads "1_6" and " 16", but a number should have one spelling.
    if any(len(number) > _DIGITS for number in numbers):
        raise ValueError(f"mask {name!r:.80}: a number of tokens has at most {_DIGITS} digits")
    if all(number.isascii() and number.isdigit() for number in numbers):
        values = [int(number) for number in numbers]
        simple = {"bidirectional": Bidirectional, "causal": Causal, "prefix": Prefix}
        if kind in simple and not values:
            return simple[kind]()
        try:
            if kind == "block-causal" and len(values) == 1:
                return BlockCausal(values[0])
            if kind == "block-diffusion" and len(values) == 1:
                return BlockDiffusion(values[0])
            if kind == "window" and len(values) in (1, 2):
                return SlidingWindow(values[0], values[-1])
        except ValueError as error:
            raise ValueError(f"mask {name!r}: {error}") from error
    raise ValueError(
        f"mask {name!r:.80} is not one of {NAMES}, where SIZE, REACH, LEFT and RIGHT are numbers of tokens"
    )


def name_of(mask: Mask) -> str:
    """Returns the name from which `parse` makes an equal mask, such as "block-causal:8".

    Raises:
      ValueError: the mask has no name, for example because it is a combination or holds arrays for particular rows.
    """
    if isinstance(mask, Bidirectional):
        return "bidirectional"
    if isinstance(mask, Causal):
        return "causal"
    if isinstance(mask, Prefix) and mask.end_B is None:
        return "prefix"
    if isinstance(mask, BlockCausal) and mask.start_B is None:
        return f"block-causal:{mask.size}"
    if isinstance(mask, BlockDiffusion) and mask.start_B is None:
        return f"block-diffusion:{mask.size}"
    if isinstance(mask, SlidingWindow):
        return f"window:{mask.left}" if mask.left == mask.right else f"window:{mask.left}:{mask.right}"
    raise ValueError(
        f"this {type(mask).__name__} mask has no name; masks with names are {NAMES}, before `for_rows` and not combined"
    )
