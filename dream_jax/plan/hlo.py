"""Reads from the text of a compiled program how many collectives run in one step, and how many bytes they send.

The text is that of XLA after optimisation, as the compilers for TPU, GPU and CPU write it.

XLA's cost analysis counts the body of a loop once. This module multiplies it by the number of iterations: the trip
count that the compiler writes at the loop, or else the number that follows from the loop's condition and the step of
its counter. For a loop whose end is only known at run time, the caller passes the number.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Literal

Kind = Literal["all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"]

# Bytes of one element. A predicate has one byte; types that are not listed (token, opaque) count as 0 bytes.
_ELEMENT = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_ELEMENT |= {f"{sign}{bits}": bits // 8 for sign in "su" for bits in (8, 16, 32, 64)}
_ELEMENT |= dict.fromkeys(("f8e3m4", "f8e4m3", "f8e4m3fn", "f8e4m3fnuz", "f8e5m2", "f8e5m2fnuz", "f8e8m0fnu"), 1)

_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_HEAD = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|called_computations|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
# The end of a computation. The whole line is compared, because lines of a kernel's metadata may begin with "}" too.
_CLOSED = re.compile(r'\}(?:, execution_thread="[^"]*")?')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind in one step.

    Attributes:
      kind: the name of the collective in XLA.
      count: the number of these collectives in one step; a collective in a loop is counted for every iteration.
      sent: total bytes that one device sends, in a ring of n devices: (n - 1) / n of the whole array for all-gather,
        reduce-scatter and all-to-all, twice that for all-reduce, and the whole array for collective-permute.
    """

    kind: Kind
    count: int
    sent: float


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, shape, opcode: as in the text.
      operands: names of the operands. For a constant the only entry is its value, and for a parameter its number.
      rest: the text after the operands, with the attributes.
      root: whether this is the result of the computation.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def called(self) -> list[str]:
        """The names of the computations that this instruction calls, in the order of the text."""
        return [part for match in _CALLED.findall(self.rest) for part in re.findall(r"[\w.\-]+", match)]


def collectives(text: str, *, unknown_trips: float = 1.0) -> tuple[Collective, ...]:
    """Returns the collectives of one run of a program, one entry for each kind; the kind with the most bytes is first.

    Args:
      text: the text of the compiled program, `Compiled.as_text()`.
      unknown_trips: number of iterations of a loop whose end depends on data.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations, entry = parse(text)
    total: dict[Kind, tuple[float, float]] = {}
    seen = set()
    for kind, times, sent, channel in _walk(computations, entry, 1.0, unknown_trips):
        if channel is not None and channel in seen:
            continue
        seen.add(channel)
        count, before = total.get(kind, (0.0, 0.0))
        total[kind] = (count + times, before + times * sent)
    found = [Collective(kind=kind, count=round(count), sent=sent) for kind, (count, sent) in total.items()]
    return tuple(sorted(found, key=lambda one: -one.sent))


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns the instructions of each computation, by name, and the name of the entry computation.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            opening = _COMPUTATION.match(line)
            if opening:
                current = computations[opening[2]] = {}
                entry = opening[2] if opening[1] else entry
        elif _CLOSED.fullmatch(line.rstrip()):
            current = None
        else:
            instruction = _instruction(line)
            if instruction:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("this is not the text of a compiled program (Compiled.as_text()): it has no ENTRY computation")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    """Returns the instruction in a line; None if the line has none."""
    head = _HEAD.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:shape_end], rest[shape_end:].lstrip()
    opening = rest.find("(")
    if opening < 0:
        return None
    closing = _closing(rest, opening)
    arguments, opcode = rest[opening + 1 : closing], rest[:opening].strip()
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments)) if opcode != "constant" else (arguments,)
    if opcode == "parameter":
        operands = (arguments,)
    return Instruction(head[2], shape, opcode, operands, rest[closing + 1 :], root=bool(head[1]))


def _closing(text: str, start: int) -> int:
    """Returns the index of the parenthesis that closes the one at or after `start`."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return index
    return len(text) - 1


def _walk(
    computations: Mapping[str, Mapping[str, Instruction]], name: str, times: float, unknown: float, fused: bool = False
) -> Iterator[tuple[Kind, float, float, str | None]]:
    """Yields each collective of a computation and of those that it calls: (kind, count, bytes sent each time, channel).

    The channel is None outside fusions. The TPU compiler divides a collective among the fusions that run at the same
    time; all of them contain the collective, with the same channel, so the caller counts each channel once.
    """
    for instruction in computations.get(name, {}).values():
        found = _collective(instruction, fused_as=name)
        if found is not None:
            channel = re.search(r"channel_id=(\d+)", instruction.rest) if fused else None
            yield found[0], times, found[1], channel and channel[1]
            continue  # The computation that a collective applies only adds two numbers.
        # The -done and -update instructions of an asynchronous collective name the same computation as its -start.
        if instruction.opcode.endswith(("-done", "-update")):
            continue
        called = instruction.called
        if instruction.opcode == "while":
            known = trips(computations, instruction)
            repeated = times * (unknown if known is None else known)
            for part in called:
                yield from _walk(computations, part, repeated, unknown)
        elif instruction.opcode == "conditional":
            # Only one branch runs; the one that sends the most bytes is counted.
            branches = [list(_walk(computations, part, times, unknown)) for part in called]
            yield from max(branches, key=lambda items: sum(item[1] * item[2] for item in items), default=[])
        else:
            for part in called:
                yield from _walk(computations, part, times, unknown, fused or instruction.opcode == "fusion")


def _collective(instruction: Instruction, *, fused_as: str) -> tuple[Kind, float] | None:
    """Returns the kind of a collective and the bytes that one device sends each time; None for other instructions.

    `fused_as` is the name of the computation that has the instruction.
    """
    opcode = instruction.opcode.removesuffix("-start")
    if opcode not in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"):
        return None
    kind: Kind = opcode  # type: ignore[assignment]  # mypy does not narrow str to a Literal
    devices = _group_size(instruction.rest)
    results = _results(instruction)
    share = (devices - 1) / devices
    if kind == "collective-permute":
        return kind, results
    # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and the slice that the device keeps.
    if kind == "all-reduce" and fused_as.startswith("all-reduce-scatter"):
        return "reduce-scatter", results * share
    if kind == "all-reduce":
        return kind, 2 * results * share
    if kind == "reduce-scatter":
        return kind, results * devices * share
    return kind, results * share


def _results(instruction: Instruction) -> float:
    """Returns the bytes of the results of a collective; the shape of a -start instruction also has its operands."""
    shape = instruction.shape
    if not (instruction.opcode.endswith("-start") and shape.startswith("(")):
        return nbytes(shape)
    parts = _split(shape[1:-1])
    if instruction.opcode == "all-reduce-start":  # unlike other -start instructions, its shape has only the results
        return nbytes(shape)
    return nbytes(parts[1])


def _split(text: str) -> list[str]:
    """Splits the text of a tuple at its outermost commas and returns the text of each element."""
    parts, depth, begun = [], 0, 0
    for index, character in enumerate(text):
        if character in "({[":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[begun:index])
            begun = index + 1
    return [*parts, text[begun:]]


def nbytes(shape: str) -> float:
    """Returns the bytes of a shape or tuple of shapes in XLA's notation, such as "f32[448,152064]{1,0:T(8,128)}"."""
    return sum(
        _ELEMENT[element] * math.prod(int(size) for size in sizes.split(",") if size)
        for element, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape))
        if element in _ELEMENT
    )


def elements(shape: str) -> list[str]:
    """Returns the text of each array in a shape, which may be a tuple of tuples."""
    if not shape.startswith("("):
        return [shape]
    return [one for part in _split(shape[1:-1]) if part for one in elements(part.strip())]


def _group_size(attributes: str) -> int:
    """Returns the number of devices in one group of a collective. Raises ValueError for an unknown form of groups."""
    pairs = re.search(r"source_target_pairs=", attributes)
    if pairs:
        return 2
    # The form [groups,size]<=[...], which XLA calls iota.
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes)
    if iota:
        return int(iota[2])
    # The form mesh['x'=8,'y'=2] {'x'}, possibly with an order of devices between: the axes of a mesh, then the axes
    # along which devices form a group. 'x':(1)4 names a piece of an axis, here of size 4.
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in named)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    raise ValueError(
        f"a collective has its groups of devices in an unknown form: {attributes[:200]!r}; plan with --no-compile"
    )


# ------------------------------------------------------------------------------------------------------ loops


def trips(computations: Mapping[str, Mapping[str, Instruction]], loop: Instruction) -> int | None:
    """Returns the number of iterations of a loop; None if it depends on data.

    If the compiler has not written the number, the condition must be `counter < constant`, where the counter is one
    element of the values that the loop carries and grows by a constant. The counter is assumed to begin at zero, which
    is true for all loops of jax.lax.scan and of XLA's partitioner.
    """
    known = _TRIPS.search(loop.rest)
    if known:
        return int(known[1])
    called = {role: name for role, name in re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.rest)}
    condition, body = computations.get(called["condition"], {}), computations.get(called["body"], {})
    root = _root(condition)
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    left, right = (condition.get(name) for name in root.operands)
    limit = None if right is None else _constant(condition, right)
    if left is None or limit is None or left.opcode != "get-tuple-element":
        return None
    index = int(re.search(r"index=(\d+)", left.rest)[1])  # type: ignore[index]  # every such instruction has one
    carried = _root(body)
    if carried is None or carried.opcode != "tuple":
        return None
    step = _growth(body, carried.operands[index], index)
    return math.ceil(limit / step) if step else None


def _root(computation: Mapping[str, Instruction]) -> Instruction | None:
    return next((instruction for instruction in computation.values() if instruction.root), None)


def _constant(computation: Mapping[str, Instruction], instruction: Instruction) -> int | None:
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.operands[0]):
        return int(instruction.operands[0])
    if instruction.opcode in ("copy", "bitcast", "convert") and instruction.operands[0] in computation:
        return _constant(computation, computation[instruction.operands[0]])
    return None


def _growth(computation: Mapping[str, Instruction], name: str, index: int) -> int | None:
    """Returns the constant c if the instruction `name` computes element `index` of the loop's carried values plus c.

    Returns None if it computes something else.
    """
    instruction = computation.get(name)
    if instruction is None:
        return None
    if instruction.opcode == "get-tuple-element":
        element = int(re.search(r"index=(\d+)", instruction.rest)[1])  # type: ignore[index]  # every one has it
        carrier = computation.get(instruction.operands[0])
        return 0 if element == index and carrier is not None and carrier.opcode == "parameter" else None
    if instruction.opcode in ("copy", "bitcast"):
        return _growth(computation, instruction.operands[0], index)
    if instruction.opcode == "add":
        for one, other in (instruction.operands, instruction.operands[::-1]):
            added = _constant(computation, computation[other]) if other in computation else None
            before = _growth(computation, one, index)
            if added is not None and before is not None:
                return before + added
    return None
