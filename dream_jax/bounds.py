"""The ranges of numbers in settings, and the check that every settings dataclass makes when it is created.

A settings dataclass calls `check_numbers` in its `__post_init__`. All its fields that hold numbers are checked, also
those for which it gives no range: a float must be usable as float32, and an integer must fit into 32 bits. So a wrong
number is refused with the name of its field before it reaches a compiled program, or is used as the size of an array.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SMALLEST, LARGEST = 1e-30, 1e30
"""The smallest and the largest magnitude of a float setting that is not 0.

The reciprocal of such a number, and its product with a number of usual size, are normal float32 numbers: they do not
become 0 or infinity.
"""

MOST_INTEGER = 2**31 - 1
"""The largest int32 number."""
MOST_TOKENS = 2**20
"""The largest number of tokens of a row. It is also the largest number of denoising steps of an answer."""
MOST_ROWS = 2**16
"""The largest number of rows that are computed together."""
MOST_ANSWERS = 2**22
"""The largest number of answers of one command: prompts times answers to each. All of them are planned in memory."""
MOST_RANK = 2**16
"""The largest rank of an adapter; a rank is also at most the narrower side of each projection (see `lora.attach`)."""
MOST_STEPS = 10**9
"""The largest number of training steps. The step is an int32 number in compiled programs."""
MOST_DEVICES = 2**16
"""The largest number of devices of a mesh."""


class IntegerRange(NamedTuple):
    """The range of an integer: `low` to `high`, both included. `note` says what to do; it ends the message."""

    low: int = -MOST_INTEGER - 1
    high: int = MOST_INTEGER
    note: str = ""

    def complaint(self, value: Any) -> str | None:
        """Returns what is wrong with a value, as the end of a sentence that begins with its name; None if it is fine."""
        if not _is_a(numbers.Integral, value):
            return "must be a whole number"
        if value < self.low:
            return "must not be negative" if self.low == 0 else f"must be at least {self.low}"
        return f"is too large: the largest value is {self.high}" if value > self.high else None


class FloatRange(NamedTuple):
    """The range of a float: `low` to `high`, which are included if `open_low` and `open_high` are false.

    The value must still be inside the range after it is rounded to float32. A value other than 0 must not be closer to 0
    than `SMALLEST`. `note` explains the range or says what to do; it ends the message.
    """

    low: float = -LARGEST
    high: float = LARGEST
    open_low: bool = False
    open_high: bool = False
    note: str = ""

    def complaint(self, value: Any) -> str | None:
        """Returns what is wrong with a value, as the end of a sentence that begins with its name; None if it is fine."""
        if not _is_a(numbers.Real, value):
            return "must be a number"
        if value != value or value in (math.inf, -math.inf):
            return "must be a finite number"
        if not -LARGEST <= value <= LARGEST:
            return f"is too large: the largest magnitude is {LARGEST:g}"
        if not self._has(float(value)):
            if (self.low, self.high) == (0.0, LARGEST):
                return "must be a positive number" if self.open_low else "must not be negative"
            return f"is outside {self}"
        if 0 < abs(value) < SMALLEST:
            return f"is too close to 0: the smallest magnitude is {SMALLEST:g}"
        if not self._has(float(np.float32(value))):
            return f"is outside {self}: float32 rounds it to {np.float32(value):g}"
        return None

    def _has(self, value: float) -> bool:
        low, high = float(np.float32(self.low)), float(np.float32(self.high))
        return (low < value or (value == low and not self.open_low)) and (
            value < high or (value == high and not self.open_high)
        )

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def _is_a(kind: type, value: Any) -> bool:
    """Returns whether a value is a number of this kind of `numbers`; true and false are no numbers."""
    return isinstance(value, kind) and not isinstance(value, bool)


Range = IntegerRange | FloatRange

SEED = IntegerRange(0, MOST_INTEGER)
"""The range of every seed. A seed becomes an int32 number, so a larger seed would be equal to a smaller one."""
SHARE = FloatRange(0.0, 1.0)
"""A share or a probability."""
POSITIVE = FloatRange(0.0, LARGEST, open_low=True)
"""Any positive number."""


def check(name: str, value: Any, allowed: Range) -> None:
    """Raises ValueError if a value is outside its range; the message begins with NAME=VALUE."""
    complaint = allowed.complaint(value)
    if complaint is not None:
        note = f"; {allowed.note}" if allowed.note else ""
        raise ValueError(f"{name}={shown(value)} {complaint}{note}")


def check_answers(name: str, each: int, prompts: int) -> None:
    """Raises ValueError if `each` answers to each of the prompts are too many; `name` is the name of the setting `each`."""
    if each * prompts > MOST_ANSWERS:
        raise ValueError(
            f"{name}={each} for each of {prompts:,} prompts makes {each * prompts:,} answers, but one command makes at "
            f"most {MOST_ANSWERS:,}; give a smaller number, or fewer prompts"
        )


def check_numbers(settings: Any, **ranges: Range) -> None:
    """Checks every number in the fields of a settings dataclass.

    None is accepted if the type of the field includes None. In a field that holds several numbers, each is checked; a
    sequence in a field that holds one number is refused.

    Args:
      settings: an instance of the dataclass.
      ranges: the ranges of fields, by name. A field without a range may have any number that is usable as float32, or
        any integer of 32 bits.

    Raises:
      ValueError: a number is outside its range, or a value is no number; the message begins with FIELD=VALUE.
      TypeError: `ranges` has a name that is not a field with numbers.
    """
    kind: Any = type(settings)
    fields = number_fields(kind)
    if not ranges.keys() <= fields.keys():
        raise TypeError(
            f"{type(settings).__name__} has no numbers in the fields {sorted(ranges.keys() - fields.keys())}"
        )
    for name, field in fields.items():
        allowed, value = ranges.get(name, field.widest), getattr(settings, name)
        if value is None and field.optional:
            continue
        for number in _numbers_in(value) if field.several else (value,):
            check(name, number, allowed)


class NumberField(NamedTuple):
    """A field of a dataclass that holds numbers.

    Attributes:
      widest: the widest range of its numbers.
      optional: whether it may be None.
      several: whether it may hold a sequence of numbers.
    """

    widest: Range
    optional: bool
    several: bool


@functools.cache
def number_fields(kind: type) -> Mapping[str, NumberField]:
    """Returns the fields of a dataclass that hold integers or floats, by their names."""
    hints = typing.get_type_hints(kind)
    found: dict[str, NumberField] = {}
    for field in dataclasses.fields(kind):
        leaves = set(_leaves(hints[field.name]))
        if leaves & {int, float}:
            found[field.name] = NumberField(
                widest=FloatRange() if float in leaves else IntegerRange(),
                optional=type(None) in leaves,
                several=_holds_several(hints[field.name]),
            )
    return found


def _leaves(hint: Any) -> Iterator[Any]:
    """Yields the types that a type is made of: int and None for `tuple[int, ...] | None`."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        yield from _leaves(inside[0])
    elif origin in (types.UnionType, typing.Union, *_SEQUENCES):
        for one in inside:
            yield from _leaves(one)
    elif isinstance(hint, type):
        yield hint


_SEQUENCES = (tuple, list, Sequence)


def _holds_several(hint: Any) -> bool:
    """Returns whether a value of a type may be a sequence: true for `tuple[int, ...] | None`."""
    return typing.get_origin(hint) in _SEQUENCES or any(map(_holds_several, typing.get_args(hint)))


def _numbers_in(value: Any) -> Iterator[Any]:
    """Yields a value, or the values in a sequence, at any depth."""
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        for one in value:
            yield from _numbers_in(one)
    else:
        yield value


def shown(value: Any) -> str:
    """Returns a value as text for a message. For an integer of more than 30 digits it only says how many."""
    if isinstance(value, int) and abs(value) >= 10**30:  # str() refuses integers of more than 4300 digits
        return f"{'-' if value < 0 else ''}(an integer of {math.floor(math.log10(abs(value))) + 1} digits)"
    if isinstance(value, numbers.Number):
        return str(value)
    return f"{value!r:.80}"


def finite_or_none(value: float | None) -> float | None:
    """Returns a number, or None instead of NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None
