"""Computes the least time of a compiled program from its text, with the arithmetic and the bytes of each kernel.

A GPU runs the kernels of a program one after the other. A kernel takes at least its floating-point operations divided by
the rate of products, and at least the bytes that it reads and writes divided by the bandwidth of the memory. The sum over
all kernels is the least time of the program as it was compiled, without gaps between kernels.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping

import profiles

from dream_jax.plan import hlo, traffic
from dream_jax.plan.hlo import Instruction

_Computations = Mapping[str, Mapping[str, Instruction]]

# Instructions that are no kernels: they name values, or run other computations, which are counted themselves.
_NO_KERNELS = {
    "after-all", "bitcast", "call", "conditional", "constant", "get-tuple-element", "optimization-barrier", "parameter",
    "partition-id", "replica-id", "tuple", "while",
}  # fmt: skip
# Operations of the backward pass of attention for each operation of its forward pass: five products instead of two.
_BACKWARD = 2.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceCeilings:
    """The peak rates of a device: operations per second of bfloat16 and of float8 products, and memory bytes per second."""

    product: float
    float8: float
    bandwidth: float


@dataclasses.dataclass(kw_only=True)
class KernelCost:
    """The sums of the costs of several kernels.

    Attributes:
      seconds: the least time of the kernels.
      flops: floating-point operations of products and attention.
      nbytes: bytes that are read and written.
      scopes: the least time by named scope, in seconds.
    """

    seconds: float = 0.0
    flops: float = 0.0
    nbytes: float = 0.0
    scopes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: KernelCost, times: float) -> None:
        """Adds another cost `times` times."""
        self.seconds += times * other.seconds
        self.flops += times * other.flops
        self.nbytes += times * other.nbytes
        for name, seconds in other.scopes.items():
            self.scopes[name] += times * seconds  # type: ignore[assignment]  # a Counter also adds floats


@dataclasses.dataclass(kw_only=True)
class ProgramPart:
    """A loop or a conditional in a program.

    Attributes:
      op_name: its name in the code, such as "jit(denoise)/while/body/propose/while".
      is_loop: whether it is a loop; otherwise it is a conditional.
      trips: number of iterations of a loop; None if the compiler does not know it, and for conditionals.
      region: the kernels of one iteration of a loop, or of the branch of a conditional that takes longest.
    """

    op_name: str
    is_loop: bool
    trips: int | None
    region: ProgramRegion


@dataclasses.dataclass(kw_only=True)
class ProgramRegion:
    """The kernels of a computation, and the loops and conditionals in it."""

    own: KernelCost = dataclasses.field(default_factory=KernelCost)
    parts: list[ProgramPart] = dataclasses.field(default_factory=list)

    def total(self, times: Callable[[ProgramPart], float] = lambda part: 1.0) -> KernelCost:
        """Returns the cost of one run of this region.

        Args:
          times: function that returns how often a part whose `trips` is None runs in one run of the region around it.
        """
        cost = KernelCost()
        cost.add(self.own, 1.0)
        for part in self.parts:
            cost.add(part.region.total(times), times(part) if part.trips is None else part.trips)
        return cost

    def every_part(self) -> Iterator[ProgramPart]:
        """Yields the parts of this region and those inside them."""
        for part in self.parts:
            yield part
            yield from part.region.every_part()


def region_of(text: str, ceilings: DeviceCeilings) -> ProgramRegion:
    """Returns the kernels of a compiled program.

    Args:
      text: the text of the program for a GPU, `Compiled.as_text()`.
      ceilings: the peak rates of the device.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = hlo.parse(text)
    return _region(computations, entry, ceilings)


def _region(computations: _Computations, name: str, ceilings: DeviceCeilings) -> ProgramRegion:
    found = ProgramRegion()
    for instruction in computations[name].values():
        if instruction.opcode == "while":
            body = _named(instruction, "body")
            trips = hlo.trips(computations, instruction)
            region = _region(computations, body, ceilings)
            found.parts.append(ProgramPart(op_name=_op_name(instruction), is_loop=True, trips=trips, region=region))
        elif instruction.opcode == "conditional":
            branches = [_region(computations, part, ceilings) for part in instruction.called]
            longest = max(branches, key=lambda region: region.total().seconds)
            found.parts.append(ProgramPart(op_name=_op_name(instruction), is_loop=False, trips=None, region=longest))
        elif instruction.opcode in ("call", "async-start"):
            for part in instruction.called:
                region = _region(computations, part, ceilings)
                found.own.add(region.own, 1.0)
                found.parts += region.parts
        elif instruction.opcode not in _NO_KERNELS and not instruction.opcode.endswith(("-done", "-update")):
            found.own.add(_kernel(computations, computations[name], instruction, ceilings), 1.0)
    return found


def _kernel(
    computations: _Computations,
    computation: Mapping[str, Instruction],
    instruction: Instruction,
    ceilings: DeviceCeilings,
) -> KernelCost:
    """Returns the cost of one kernel."""
    work = list(_products(computations, computation, instruction))
    nbytes = traffic.operand_bytes(computations, computation, instruction) + _written(computations, instruction)
    arithmetic = sum(flops / (ceilings.float8 if is_float8 else ceilings.product) for flops, is_float8 in work)
    seconds = max(arithmetic, nbytes / ceilings.bandwidth)
    scope = profiles.scope(_op_name(instruction))
    return KernelCost(
        seconds=seconds,
        flops=sum(flops for flops, _ in work),
        nbytes=nbytes,
        scopes=collections.Counter({scope: seconds}),
    )


def _products(
    computations: _Computations, computation: Mapping[str, Instruction], instruction: Instruction
) -> Iterator[tuple[float, bool]]:
    """Yields the floating-point operations of each product in a kernel, and whether its inputs are float8."""
    if instruction.opcode == "fusion":
        for part in instruction.called:
            for inner in computations[part].values():
                yield from _products(computations, computations[part], inner)
    elif instruction.opcode == "dot":
        dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)
        left = computation[instruction.operands[0]].shape
        yield _product(instruction.shape, left, dims[1].split(",") if dims else []), "f8" in left
    elif instruction.opcode == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        name = target[1] if target else ""
        if name.startswith("__cublas$"):
            dims = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.rest)
            left = computation[instruction.operands[0]].shape
            result = hlo.elements(instruction.shape)[0]
            yield _product(result, left, re.findall(r"\d+", dims[1]) if dims else []), "f8" in left
        elif name.startswith("__cudnn$fmha"):
            # Queries [B, T, N, H] and keys [B, S, K, H]: a product of queries and keys, and one of scores and values.
            query, key = (_sizes(computation[operand].shape) for operand in instruction.operands[:2])
            flops = 4.0 * math.prod(query) * key[1]
            yield flops * (_BACKWARD if name.endswith("Backward") else 1.0), False


def _product(result: str, left: str, contracted: list[str]) -> float:
    sizes = _sizes(left)
    return 2.0 * math.prod(_sizes(result)) * math.prod(sizes[int(axis)] for axis in contracted if axis)


def _sizes(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in found[1].split(",") if size] if found else []


def _written(computations: _Computations, instruction: Instruction) -> float:
    """Returns the bytes that a kernel writes. Of an array in which it replaces a slice, only the slice counts."""
    if instruction.opcode in ("dynamic-update-slice", "scatter"):
        return 0.0  # The written slice has already been counted as an operand that is read.
    if instruction.opcode != "fusion":
        return hlo.nbytes(instruction.shape)
    fused = computations[instruction.called[0]]
    root = next((one for one in fused.values() if one.root), None)
    if root is None:
        return hlo.nbytes(instruction.shape)
    roots = [fused[name] for name in root.operands if name in fused] if root.opcode == "tuple" else [root]
    return sum(_root_bytes(fused, one) for one in roots)


def _root_bytes(fused: Mapping[str, Instruction], root: Instruction) -> float:
    while root.opcode == "bitcast" and root.operands[0] in fused:
        root = fused[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return hlo.nbytes(fused[root.operands[1]].shape)
    if root.opcode == "scatter":
        return hlo.nbytes(fused[root.operands[-1]].shape)
    return hlo.nbytes(root.shape)


def _named(instruction: Instruction, role: str) -> str:
    found = re.search(rf"\b{role}=%?([\w.\-]+)", instruction.rest)
    assert found is not None, f"{instruction.name} has no {role}"
    return found[1]


def _op_name(instruction: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', instruction.rest)
    return found[1] if found else ""
