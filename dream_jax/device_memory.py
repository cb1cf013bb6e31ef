"""Sets the share of a GPU's memory that jax takes, reads how much memory a device has, and explains memory errors."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Mapping, MutableMapping, Sequence

import jax

SHARE = 0.95
"""The share of a GPU's memory that the commands let jax take; jax itself would take 0.75. The rest is left for the CUDA
context, the libraries and the network."""

# jax reads both names of the share (the first is the newer one), and refuses to start on a GPU if both are set.
_SHARES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
_ALLOCATOR = "XLA_PYTHON_CLIENT_ALLOCATOR"
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryShare:
    """The share of a GPU's memory that a program can have.

    Attributes:
      share: the share of all memory of the GPU; usually in (0, 1], above 1 with CUDA's unified memory.
      origin: the reason for this share: an environment variable with its value, or the default of the commands.
    """

    share: float
    origin: str


def share_in_force(environment: Mapping[str, str] = os.environ) -> MemoryShare:
    """Returns the share of a GPU's memory that a command of this project lets a program have in this environment.

    Raises:
      ValueError: a variable that gives the share is not a positive number, or two variables give it.
    """
    given = [name for name in _SHARES if environment.get(name)]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} are both set, and with both jax does not start on a GPU: unset the second one"
        )
    if environment.get(_ALLOCATOR, "").lower() == "platform":
        return MemoryShare(share=1.0, origin=f"{_ALLOCATOR}=platform")
    if not given:
        return MemoryShare(share=SHARE, origin="the default of the commands")
    text = environment[given[0]]
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < float("inf"):
        raise ValueError(f"{given[0]}={text!r} is not a share of the memory of a GPU: set a number such as 0.95")
    return MemoryShare(share=share, origin=f"{given[0]}={text}")


def take_memory(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets jax take the share `SHARE` of each GPU, unless the user has chosen otherwise with an environment variable.

    Every command that computes on a device calls this before jax looks for devices, because jax reads the variables then.
    With `XLA_PYTHON_CLIENT_PREALLOCATE=false` the share is set as well: memory is then taken as it is needed, but the
    share still limits it. With `XLA_PYTHON_CLIENT_ALLOCATOR=platform` the share has no meaning, and is not set.

    Raises:
      ValueError: as for `share_in_force`.
    """
    share_in_force(environment)
    if environment.get(_ALLOCATOR, "").lower() != "platform" and not any(environment.get(name) for name in _SHARES):
        environment[_SHARES[1]] = str(SHARE)


def memory_of_device(devices: Sequence[jax.Device]) -> int | None:
    """Returns how many bytes a program can have on each of these devices of this process; None if it is not known.

    For accelerators this is the smallest number that their runtime reports. For CPU devices it is the memory that is
    available now, divided by the number of devices, because they share this memory.
    """
    if devices[0].platform == "cpu":
        available = _available_here()
        return None if available is None else available // len(devices)
    known = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    return min((int(size) for size in known if size), default=None)


def _available_here(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Returns the bytes of memory that this machine has available; None if the system has no /proc/meminfo as Linux has.

    If the process is in a container with a limit, the result is at most what the container may still use. Files that the
    system keeps in memory and has not used lately count as available.
    """
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    group = root / "sys/fs/cgroup"
    try:
        limit, used, parts = (
            (group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")
        )
    except OSError:
        return available
    if limit.strip() == "max":
        return available
    cached = next((int(line.split()[1]) for line in parts.splitlines() if line.startswith("inactive_file ")), 0)
    return min(available, max(0, int(limit) - int(used) + cached))


# ---------------------------------------------------------------------------------------------------------- errors

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B\b| ?bytes|\b)"
# The messages of XLA come, in this order, from libtpu's compiler before it assigns memory to buffers and after that, from
# libtpu's runtime, from the allocator of GPUs (with the exact number of bytes), and from other code for GPUs and CPUs.
_ASKED = (
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"Attempting to (?:allocate|reserve) {_SIZE}\b.*?There (?:are|is) {_SIZE} free", re.DOTALL),
    re.compile(r"allocate request for [^(]*\((\d+)(B)\)"),
    re.compile(rf"allocat(?:e|ing) {_SIZE}"),
)
_EXHAUSTED = "RESOURCE_EXHAUSTED"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortage:
    """What an error of jax says about too little memory.

    Attributes:
      asked: the requested bytes: of one array, or of a whole program if the compiler refused it; None if the message does
        not say the number.
      has: the bytes of the device: the free ones if `asked` is of an array, all of them if it is of a program; None if the
        message does not say the number.
      words: the first line of the message of jax, without the kind of the error.
    """

    asked: int | None
    has: int | None
    words: str


def shortage(error: BaseException | str) -> Shortage | None:
    """Returns what an error, or its message, says about too little memory; None if the error has another cause."""
    if not isinstance(error, str) and not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    message = str(error)
    if _EXHAUSTED not in message:
        return None
    words = message.partition(_EXHAUSTED)[2].removeprefix(":").strip().splitlines()
    found = next((match for pattern in _ASKED if (match := pattern.search(message))), None)
    sizes = [] if found is None else [found.groups()[index : index + 2] for index in range(0, len(found.groups()), 2)]
    counts = [int(float(number) * _UNITS[unit.removesuffix("B")]) for number, unit in sizes]
    asked, has = (*counts, None, None)[:2]
    return Shortage(asked=asked, has=has, words=words[0].strip() if words else "")


def explained(error: jax.errors.JaxRuntimeError, remedies: Callable[[], Sequence[str]]) -> str:
    """Returns a message for the user: how much memory was asked for, what there is, and what would help.

    Args:
      error: an error of jax while it compiled or ran a program.
      remedies: function that returns flags with which less memory is needed, the best ones first.

    Raises:
      JaxRuntimeError: `error` itself, if it has another cause.
    """
    found = shortage(error)
    if found is None:
        raise error
    asked = "" if found.asked is None else f": {_gib(found.asked)} GiB were asked for"
    has = "" if found.has is None else f", and there are {_gib(found.has)} GiB"
    try:
        flags = remedies()
    except (ValueError, OSError, RuntimeError):  # what is known about the memory is more important than the remedies
        flags = ()
    helps = f". Try {', or '.join(flags)}" if flags else ""
    return f"there is too little memory{asked}{has}{_state_of_device()}{helps} (jax: {found.words})"


def _state_of_device() -> str:
    """Returns a text about how much of the first device's memory is in use; an empty text for a CPU device."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if not {"bytes_limit", "bytes_in_use"} <= stats.keys():
        return ""
    used, limit = _gib(stats["bytes_in_use"]), _gib(stats["bytes_limit"])
    return f"; a program can have {limit} GiB of this device, of which {used} GiB are in use"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f}"
