"""The real step, compiled for hardware that need not be here: what the compiler says of its memory and collectives."""

from __future__ import annotations

import dataclasses
import re
import time

import jax

from dream_jax.plan import hlo
from dream_jax.trainer.build import AbstractStep

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?)([KMGT]?)"
# The two ways in which libtpu says it: before it lays out buffers, and after.
_NEEDED = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler found.

    Attributes:
      peak: bytes on a device at the worst moment.
      given: of these, what the step is given.
      collectives: of one step.
      seconds: that compiling took.
    """

    peak: int
    given: int
    collectives: tuple[hlo.Collective, ...]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """The compiler gave up for want of memory.

    Attributes:
      needed: bytes that it says it needs, which may be a part of all; None when it does not say.
      words: its own, without the listing of buffers.
      seconds: that it took.
    """

    needed: int | None
    words: str
    seconds: float


def compile_step(step: AbstractStep, *, unknown_trips: float) -> Compiled | Refusal:
    """Compiles the step for the devices of its mesh.

    Args:
      step: of `abstract_step`.
      unknown_trips: how often the loop over chunks of the loss runs, the one loop whose end depends on the batch.

    Raises:
      JaxRuntimeError: whatever is wrong besides memory.
    """
    begun = time.monotonic()
    lowered = step.step.lower(step.state, step.batch, step.frozen)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return refusal(str(error), time.monotonic() - begun)
    memory = compiled.memory_analysis()
    return Compiled(
        peak=memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
        given=memory.argument_size_in_bytes,
        collectives=hlo.collectives(compiled.as_text(), unknown_trips=unknown_trips),
        seconds=time.monotonic() - begun,
    )


def refusal(message: str, seconds: float) -> Refusal:
    """What an out-of-memory message says."""
    words = message.partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0].strip()
    found = next((match for pattern in _NEEDED if (match := pattern.search(message))), None)
    needed = None if found is None else int(float(found[1]) * _UNITS[found[2]])
    return Refusal(needed=needed, words=words, seconds=seconds)
