"""Reads a profile of jax: the time of each kernel, and of each named scope of the code.

The events of a profile name the operation of the compiled program that they belong to, but not the scope of the code. The
text of the compiled program (`Compiled.as_text()`) gives each operation its `op_name`, which contains the names of
`jax.named_scope`. An event without the name of an operation is looked up by its own name, because XLA names its kernels
after their operations. Needs jax only.
"""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

_OPERATION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', re.MULTILINE)
_NOT_SCOPES = re.compile(
    r"^(jit|pjit|jvp|transpose|vmap|while|body|cond|cond_jaxpr|body_jaxpr|branch_\d+_fun|closed_call|checkpoint|"
    r"rematted_computation|custom_vjp_call|custom_jvp_call|remat\d*|shard_map|core_call|xla_call|scan|_?\d*)$"
)
_CALL = re.compile(r"^(jit|pjit|jvp|transpose|vmap|custom_vjp_call|remat|checkpoint)\((.*)\)$")


class KernelEvent(NamedTuple):
    """A kernel, or a copy of memory, that ran on a device.

    Attributes:
      kernel: the name of the kernel.
      operation: the name of the operation in the compiled program; None if the profile does not name it.
      milliseconds: the time for which it ran.
    """

    kernel: str
    operation: str | None
    milliseconds: float


def summary(folder: pathlib.Path, text: str, *, runs: int = 1, most: int = 30) -> dict[str, Any]:
    """Returns where the time of a profile went.

    Args:
      folder: where `jax.profiler.trace` wrote the profile.
      text: the text of the compiled program that ran.
      runs: number of equal runs in the profile; all times are divided by it.
      most: number of kernels in the result, those with the most time.

    Returns:
      A dict of milliseconds of one run: `busy_ms`, the sum of all times; `kernels`, a row for each kernel with its name,
      time and number of events; `kinds`, the time of products, attention, copies and all others; `scopes`, the time by
      named scope, where "?" has the time of events whose operation is not in the program.
    """
    scopes = scopes_of(text)
    by_kernel: dict[str, list[float]] = collections.defaultdict(list)
    by_scope: collections.Counter[str] = collections.Counter()
    by_kind: collections.Counter[str] = collections.Counter()
    for event in events(folder):
        by_kernel[event.kernel].append(event.milliseconds)
        by_kind[kind(event.kernel)] += event.milliseconds  # type: ignore[assignment]  # a Counter also adds floats
        by_scope[scope_of_event(event, scopes)] += event.milliseconds  # type: ignore[assignment]  # likewise
    rows = sorted(by_kernel.items(), key=lambda item: -sum(item[1]))
    return {
        "busy_ms": sum(by_kind.values()) / runs,
        "kinds": {name: time / runs for name, time in by_kind.most_common()},
        "scopes": {name: time / runs for name, time in by_scope.most_common()},
        "kernels": [
            {"kernel": name[:100], "ms": sum(times) / runs, "events": len(times) / runs} for name, times in rows[:most]
        ],
    }


def events(folder: pathlib.Path) -> Iterator[KernelEvent]:
    """Yields the events of the newest profile in a folder: those on the streams of GPUs, or else those of XLA on CPUs.

    Raises:
      FileNotFoundError: the folder has no profile.
    """
    files = sorted(folder.glob("**/*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder} has no profile (*.xplane.pb)")
    data = jax.profiler.ProfileData.from_file(str(files[-1]))
    planes = list(data.planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus or planes:
        for line in plane.lines:
            if gpus and not line.name.startswith("Stream"):
                continue  # The other lines of a GPU repeat the same times, summed by operation or by step.
            for event in line.events:
                stats = {str(name): value for name, value in event.stats if name is not None}
                operation = stats.get("hlo_op")
                if gpus or operation is not None:
                    yield KernelEvent(
                        event.name, None if operation is None else str(operation), event.duration_ns / 1e6
                    )


def scopes_of(text: str) -> Mapping[str, str]:
    """Returns a dict from the name of each operation of a compiled program to its named scope.

    The name of a kernel is that of its operation with "_" in place of "." and "-", so the dict has both names.
    """
    found = {name: scope(op_name) for name, op_name in _OPERATION.findall(text)}
    return {re.sub(r"\W", "_", name): words for name, words in found.items()} | found


def scope(op_name: str) -> str:
    """Returns the named scopes in the name of an operation, such as "layers/mlp, backward".

    The name is a path of functions, transformations and scopes, and ends with the operation. Only the scopes are kept. An
    operation of the backward pass, or of the recomputation for it, gets the word "backward" or "recomputed" after them.
    """
    # A fusion of several operations may have several names.
    parts = op_name.split(";")[0].strip().split("/")
    names: list[str] = []
    backward = recomputed = False
    for part in parts[:-1]:
        while (call := _CALL.match(part)) is not None:
            backward |= call[1] == "transpose"
            # The argument of jit(...) is the name of a function, that of the others is a scope or another call.
            part = "" if call[1] in ("jit", "pjit") else call[2]
        recomputed |= part == "rematted_computation"
        # jnp.einsum makes a scope of its subscripts, such as "BD,DV->BV".
        is_scope = part and "->" not in part and not _NOT_SCOPES.match(part)
        if is_scope and (not names or names[-1] != part):
            names.append(part)
    words = "/".join(names) or "(no scope)"
    return words + (", recomputed" if recomputed else ", backward" if backward else "")


def scope_of_event(event: KernelEvent, scopes: Mapping[str, str]) -> str:
    """Returns the scope of an event; "?" if its operation is not in the program."""
    names = [event.kernel] if event.operation is None else [event.operation, event.kernel]
    return next((scopes[name] for name in names if name in scopes), "?")


def kind(kernel: str) -> str:
    """Returns the kind of a kernel by its name: "products", "attention", "copies" or "others"."""
    name = kernel.lower()
    if re.search(r"cudnn|flash|fmha|sdpa", name):
        return "attention"
    if re.search(r"gemm|nvjet|cutlass|cublas|matmul|^dot|_dot_|xmma", name):
        return "products"
    if re.search(r"memcpy|copy|dynamic_slice|dynamic_update_slice|concatenate|transpose", name):
        return "copies"
    return "others"
