"""Finds out from the text of a compiled program which copies of weights the program makes, and how many bytes it reads.

The text is written by XLA after optimisation, see `plan.hlo`. An instruction inside a fusion writes nothing to memory, so
only the instructions outside fusions count.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Mapping, Sequence

from dream_jax.plan import hlo
from dream_jax.plan.hlo import Instruction

_Computations = Mapping[str, Mapping[str, Instruction]]

# Instructions that move nothing: they name a value, or the values of their results are computed by other instructions.
_FREE = {
    "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "optimization-barrier", "parameter",
    "partition-id", "replica-id", "tuple", "while",
}  # fmt: skip
_SLICES = {"slice", "dynamic-slice", "gather"}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Values of at most this many bytes, such as loop counters and the indices of slices, are treated as constants.
_SMALL = 64


class Origin(enum.IntEnum):
    """What a value is computed from: constants only, weights (and constants), or also other arguments of the program."""

    CONSTANTS = 0
    WEIGHTS = 1
    DATA = 2


# The origin of a value, or of each element of a tuple.
_Origins = Origin | tuple["_Origins", ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightCopy:
    """An instruction that writes an array computed from weights alone: a copy, slice, cast or concatenation of weights.

    Attributes:
      name, shape, opcode: the name, result shape and kind of the instruction, as in the text of the program.
      nbytes: size in bytes of the largest array that the instruction writes.
      times: how often the instruction runs in one run of the program.
    """

    name: str
    shape: str
    opcode: str
    nbytes: float
    times: float


def weight_copies(text: str, *, least: float, weights: str, unknown_trips: float = 1.0) -> tuple[WeightCopy, ...]:
    """Returns the instructions that write to memory an array computed from weights alone, the largest array first.

    Such an array could have been computed once, before the program runs. Collectives are left out: they gather weights
    that are sharded on purpose. Results in the memory beside the compute units of a TPU are left out too, because the
    compiler loads weights there ahead of their use.

    Args:
      text: the text of the compiled program, `Compiled.as_text()`.
      least: smallest size in bytes of the arrays that are reported.
      weights: regular expression; an argument of the program is a weight if the beginning of its name matches.
      unknown_trips: number of iterations of a loop whose end depends on data.

    Raises:
      ValueError: the text has no entry computation, or no argument has such a name.
    """
    computations, entry = hlo.parse(text)
    arguments: list[_Origins] = []
    for instruction in _parameters(computations[entry]):
        name = re.search(r'op_name="([^"]*)"', instruction.rest)
        arguments.append(Origin.WEIGHTS if name is not None and re.match(weights, name[1]) else Origin.DATA)
    if Origin.WEIGHTS not in arguments:
        raise ValueError(f"no argument of the program has a name that begins with {weights!r}")
    follower = _Follower(computations=computations, unknown_trips=unknown_trips, least=least)
    follower.follow(entry, arguments, 1.0)
    return tuple(sorted(follower.found.values(), key=lambda copy: -copy.nbytes))


def _parameters(computation: Mapping[str, Instruction]) -> list[Instruction]:
    """Returns the parameters of a computation, in the order of their numbers."""
    found = [instruction for instruction in computation.values() if instruction.opcode == "parameter"]
    return sorted(found, key=lambda instruction: int(instruction.operands[0]))


@dataclasses.dataclass(kw_only=True)
class _Follower:
    """Follows the origin of every value through a program, and collects the copies of weights.

    Attributes:
      computations: all computations of the program.
      unknown_trips, least: as for `weight_copies`.
      found: the copies so far, by the names of their computation and instruction.
    """

    computations: _Computations
    unknown_trips: float
    least: float
    found: dict[tuple[str, str], WeightCopy] = dataclasses.field(default_factory=dict)

    def follow(self, name: str, arguments: Sequence[_Origins], times: float, *, fused: bool = False) -> _Origins:
        """Returns the origin of the result of a computation that runs `times` times with arguments of these origins.

        `fused` says whether the computation is that of a fusion; then only concatenations are collected. They write
        nothing to memory as long as the fusion is one kernel. But if XLA compiles a product as a call of a GPU library,
        a separate kernel writes the concatenated weights for it.
        """
        origins: dict[str, _Origins] = {}
        result: _Origins = Origin.CONSTANTS
        for instruction in self.computations[name].values():
            if instruction.opcode == "parameter":
                origin = arguments[int(instruction.operands[0])]
            else:
                operands = [origins.get(operand, Origin.CONSTANTS) for operand in instruction.operands]
                origin = self._origin(instruction, operands, times)
            if not isinstance(origin, tuple) and hlo.nbytes(instruction.shape) <= _SMALL:
                origin = Origin.CONSTANTS
            # A loop is followed several times. An origin may have risen since the last time, so the entry is replaced.
            self.found.pop((name, instruction.name), None)
            if origin == Origin.WEIGHTS and (instruction.opcode == "concatenate" if fused else _writes(instruction)):
                nbytes = max(map(_main_memory, hlo.elements(instruction.shape)))
                if nbytes >= self.least:
                    self.found[name, instruction.name] = WeightCopy(
                        name=instruction.name,
                        shape=instruction.shape,
                        opcode=instruction.opcode,
                        nbytes=nbytes,
                        times=times,
                    )
            origins[instruction.name] = origin
            if instruction.root:
                result = origin
        return result

    def _origin(self, instruction: Instruction, operands: Sequence[_Origins], times: float) -> _Origins:
        """Returns the origin of the result of one instruction, whose operands have these origins."""
        opcode = instruction.opcode
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.rest)[1])  # type: ignore[index]  # every one has it
            return operands[0][index] if isinstance(operands[0], tuple) else operands[0]
        if opcode in ("bitcast", "optimization-barrier") or opcode.endswith(("-done", "-update")):
            return operands[0]
        if opcode == "while":
            trips = hlo.trips(self.computations, instruction)
            times *= self.unknown_trips if trips is None else trips
            body = re.search(r"\bbody=%?([\w.\-]+)", instruction.rest)[1]  # type: ignore[index]  # every loop has one
            origin = operands[0]
            while True:  # The origins of what a loop carries only rise, so they are final after a few rounds.
                after = _merged(origin, self.follow(body, [origin], times))
                if after == origin:
                    return origin
                origin = after
        if opcode == "conditional":
            branches = zip(instruction.called, operands[1:], strict=True)
            return functools.reduce(_merged, [self.follow(part, [value], times) for part, value in branches])
        if opcode in ("call", "async-start"):
            return self.follow(instruction.called[0], operands, times)
        if opcode == "fusion":
            return self.follow(instruction.called[0], operands, times, fused=True)
        return max(map(_highest, operands), default=Origin.CONSTANTS)


def _writes(instruction: Instruction) -> bool:
    """Returns whether an instruction itself writes its result to memory, and is not a collective.

    Of an asynchronous copy the -done instruction counts, because its shape is that of the result alone.
    """
    opcode = instruction.opcode
    return not (
        opcode in _FREE or opcode.endswith(("-start", "-update")) or opcode.startswith((*_COLLECTIVES, "async-"))
    )


def _highest(origins: _Origins) -> Origin:
    """Returns the highest origin in a tuple of origins."""
    return max(map(_highest, origins), default=Origin.CONSTANTS) if isinstance(origins, tuple) else origins


def _merged(one: _Origins, other: _Origins) -> _Origins:
    """Returns the higher of two origins, for tuples element by element."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return tuple(_merged(left, right) for left, right in zip(one, other, strict=True))
    return max(_highest(one), _highest(other))


def _main_memory(shape: str) -> float:
    """Returns the bytes of an array in the main memory of the device; 0 in another memory, which XLA writes as S(1)."""
    return 0.0 if re.search(r"S\([1-9]\d*\)", shape) else hlo.nbytes(shape)


def bytes_read(text: str, *, unknown_trips: float = 1.0) -> float:
    """Returns the bytes that one run of a program reads from the main memory of a device.

    Every operand of an instruction outside fusions counts once for each time that the instruction runs. If an instruction
    or a fusion reads only slices of an operand, only these slices count. Of the branches of a conditional, the one that
    reads the most counts. Caches are not modelled.

    Args:
      text: the text of the compiled program, `Compiled.as_text()`.
      unknown_trips: number of iterations of a loop whose end depends on data.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = hlo.parse(text)
    return _read(computations, entry, unknown_trips)


def _read(computations: _Computations, name: str, unknown: float) -> float:
    """Returns the bytes that one run of a computation reads."""
    total = 0.0
    computation = computations[name]
    for instruction in computation.values():
        parts = instruction.called
        if instruction.opcode == "while":
            trips = hlo.trips(computations, instruction)
            total += sum(_read(computations, part, unknown) for part in parts) * (unknown if trips is None else trips)
        elif instruction.opcode == "conditional":
            total += max(_read(computations, part, unknown) for part in parts)
        elif instruction.opcode in ("call", "async-start"):
            total += sum(_read(computations, part, unknown) for part in parts)
        elif instruction.opcode not in _FREE and not instruction.opcode.endswith(("-done", "-update")):
            total += operand_bytes(computations, computation, instruction)
    return total


def operand_bytes(
    computations: Mapping[str, Mapping[str, Instruction]],
    computation: Mapping[str, Instruction],
    instruction: Instruction,
) -> float:
    """Returns the bytes that one instruction reads from the main memory of a device.

    Args:
      computations: all computations of the program, by name.
      computation: the computation that contains the instruction.
      instruction: an instruction that computes something itself: no loop, conditional or call.
    """
    total = 0.0
    for number, operand in enumerate(instruction.operands):
        whole = _main_memory(computation[operand].shape) if operand in computation else 0.0
        used = _sliced(computations, instruction, number)
        total += whole if used is None else min(whole, used)
    return total


def _sliced(computations: _Computations, instruction: Instruction, number: int) -> float | None:
    """Returns the bytes that an instruction reads of an operand, if it reads only slices of the operand; else None."""
    if instruction.opcode == "fusion":
        return _sliced_in(computations, instruction.called[0], number)
    if number == 0 and instruction.opcode in _SLICES:
        return hlo.nbytes(instruction.shape)
    if number == 0 and instruction.opcode == "slice-start":  # its shape is (operand, slice, context)
        return hlo.nbytes(hlo.elements(instruction.shape)[-2])
    # The array into which a slice is written stays where it is, and the rest of it is not read.
    if number == 0 and instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 0.0
    return None


def _sliced_in(computations: _Computations, fused: str, number: int) -> float | None:
    """Returns the bytes that a fusion reads of an operand, if it reads only slices of the operand; else None.

    Args:
      computations: all computations of the program.
      fused: the name of the computation of the fusion.
      number: the number of the operand.
    """
    names = [_parameters(computations[fused])[number].name]
    total = 0.0
    while names:
        name = names.pop()
        for user in computations[fused].values():
            for position, operand in enumerate(user.operands):
                if operand != name or user.opcode in ("parameter", "constant"):
                    continue
                if user.opcode == "bitcast":
                    names.append(user.name)
                    continue
                sliced = _sliced(computations, user, position)
                if sliced is None:
                    return None
                total += sliced
    return total


def named(copies: Sequence[WeightCopy]) -> str:
    """Returns a text for error messages, with one line for each copy."""
    return "\n".join(f"{copy.times:g} x {copy.opcode} {copy.name}: {copy.shape}" for copy in copies)
