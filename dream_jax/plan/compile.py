"""Compiles the same train step as in training, also for absent hardware, and reads its memory and collectives."""

from __future__ import annotations

import dataclasses
import time

from dream_jax import step_memory
from dream_jax.device_memory import Shortage
from dream_jax.plan import hlo
from dream_jax.step_memory import AbstractStep


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
    compiled = step_memory.compile_step(step)
    if isinstance(compiled, Shortage):
        return Refusal(needed=compiled.asked, words=compiled.words, seconds=time.monotonic() - begun)
    return Compiled(
        peak=step_memory.peak_bytes(compiled),
        given=compiled.memory_analysis().argument_size_in_bytes,
        collectives=hlo.collectives(compiled.as_text(), unknown_trips=unknown_trips),
        seconds=time.monotonic() - begun,
    )
