"""Compiles the same train step as in training, also for absent hardware, and reads its memory and collectives."""

from __future__ import annotations

import dataclasses
import re
import time

import jax

from dream_jax.plan import hlo
from dream_jax.trainer.build import AbstractStep

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?)([KMGT]?)"
# The two forms of libtpu's out-of-memory message: before it assigns memory to buffers, and after.
_NEEDED = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """The memory and the collectives of a compiled step.

    Attributes:
      peak: bytes in use on a device when memory use is highest, with the program itself.
      given: the bytes of these that hold the arguments of the step.
      collectives: the collectives of one step, one entry for each kind.
      seconds: the time that compiling took.
    """

    peak: int
    given: int
    collectives: tuple[hlo.Collective, ...]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """The result of a compilation that failed because the device has too little memory.

    Attributes:
      needed: bytes that the step needs by the compiler's message, possibly not all of them; None if it has no number.
      words: the compiler's message, without the list of buffers.
      seconds: the time until the compiler gave up.
    """

    needed: int | None
    words: str
    seconds: float


def compile_step(step: AbstractStep, *, unknown_trips: float) -> Compiled | Refusal:
    """Compiles the step for the devices of its mesh.

    Args:
      step: the result of `abstract_step`.
      unknown_trips: expected number of chunks of the loss; their loop is the only one whose length depends on
        the batch.

    Raises:
      JaxRuntimeError: the compiler failed for another reason than too little memory.
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
    """Returns the refusal that an out-of-memory message of the compiler describes."""
    words = message.partition("RESOURCE_EXHAUSTED: ")[2].splitlines()[0].strip()
    found = next((match for pattern in _NEEDED if (match := pattern.search(message))), None)
    needed = None if found is None else int(float(found[1]) * _UNITS[found[2]])
    return Refusal(needed=needed, words=words, seconds=seconds)
