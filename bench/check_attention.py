"""Compares every attention backend with plain attention on the accelerator of this machine, and times them.

    PYTHONPATH=. python bench/check_attention.py [--batch 4] [--tokens 2048] [--dtype bfloat16] [--mesh 4x2]

For each kind of mask, the outputs and the gradients of q, k and v of each backend that supports the call are compared with
plain attention in float32 on the same (rounded) inputs. The error is the largest difference divided by the largest value. A
backend may have twice the error of plain attention in the same dtype, plus one rounding (at least 1e-5); a backend with a
larger error is marked, and the exit status is 1. Then come the times of the forward pass and of forward and backward, and
the temporary memory of the latter. Odd lengths are checked too, without times.

Needs jax, flax, numpy, einops and jaxtyping. The default sizes are those of a layer of Dream-7B. On a CPU, `--interpret`
interprets the TPU kernel with array operations; pass small sizes with it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax import attention, masks, sharding

BACKENDS: tuple[attention.Backend, ...] = ("xla", "cudnn", "splash")
ARRAYS = ("out", "dq", "dk", "dv")

# A compiled function of arrays and the leaves of a mask.
Step = Callable[[list[jax.Array], list[Any]], Any]


@dataclasses.dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int

    def arrays(self, dtype: jax.typing.DTypeLike) -> list[jax.Array]:
        """Returns random q, k and v, and the weights of the outputs in the sum whose gradients are compared."""
        keys = jax.random.split(jax.random.key(0), 4)
        q_BTNH = (self.batch, self.queries, self.heads, self.head_dim)
        k_BSKH = (self.batch, self.keys, self.kv_heads, self.head_dim)
        shapes = (q_BTNH, k_BSKH, k_BSKH, q_BTNH)
        return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]

    def masks(self) -> Iterator[tuple[str, masks.Mask]]:
        """Yields the name and one mask of each kind. Padding and the borders of packed texts differ from row to row."""
        rows, keys = np.arange(self.batch)[:, None], np.arange(self.keys)
        padding_B1 = rows * (self.keys // (2 * self.batch))
        yield "bidirectional", masks.Bidirectional()
        yield "left padding", masks.KeyPadding(keys >= padding_B1)
        yield "lengths", masks.KeyLengths((self.keys - padding_B1[:, 0]).astype(np.int32))
        # Each row packs four texts, whose borders differ from row to row.
        key_BS = np.minimum((keys + 3 * rows) * 4 // self.keys, 3).astype(np.int32)
        yield "segments", masks.Segments(key_BS[:, : self.queries], key_BS)
        if self.queries == self.keys:  # the rows of packed training, whose lengths the kernels know
            rows_BM = (key_BS[:, :, None] == np.arange(4)).sum(axis=1)
            yield "packed texts", masks.Packed(rows_BM.astype(np.int32))


def forward(backend: attention.Backend, structure: Any) -> Any:
    """Returns a jitted function of arrays and leaves of a mask with this tree structure, which returns the outputs."""

    def step(arrays: list[jax.Array], leaves: list[Any]) -> jax.Array:
        q_BTNH, k_BSKH, v_BSKH, _ = arrays
        return attention.attention(q_BTNH, k_BSKH, v_BSKH, jax.tree.unflatten(structure, leaves), backend)

    return jax.jit(step)


def backward(backend: attention.Backend, structure: Any) -> Any:
    """Returns a jitted function as `forward`, which returns the outputs and the gradients of q, k and v."""

    def loss(qkv: list[jax.Array], weight: jax.Array, leaves: list[Any]) -> tuple[jax.Array, jax.Array]:
        q_BTNH, k_BSKH, v_BSKH = qkv
        out = attention.attention(q_BTNH, k_BSKH, v_BSKH, jax.tree.unflatten(structure, leaves), backend)
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

    def step(arrays: list[jax.Array], leaves: list[Any]) -> list[jax.Array]:
        gradients, out = jax.grad(loss, has_aux=True)(arrays[:3], arrays[3], leaves)
        return [out, *gradients]

    return jax.jit(step)


def errors(found: list[jax.Array], wanted: list[np.ndarray]) -> dict[str, float]:
    """Returns largest difference / largest value for each of `ARRAYS`; infinite if a difference is not finite."""
    result = {}
    for name, a, b in zip(ARRAYS, found, wanted, strict=True):
        error = float(np.max(np.abs(np.asarray(a, np.float32) - b)) / np.max(np.abs(b)))
        result[name] = error if np.isfinite(error) else float("inf")
    return result


def milliseconds(step: Step, arrays: list[jax.Array], leaves: list[Any], repeats: int) -> float:
    """Returns the median time of `repeats` calls of a compiled step, in milliseconds."""
    jax.block_until_ready(step(arrays, leaves))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(arrays, leaves))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCheck:
    """The result of one backend under one kind of mask.

    Attributes:
      mask: name of the kind of mask.
      backend: name of the backend.
      auto: whether this is the backend that "auto" selects for the call.
      refusal: why the backend does not support the call; then the other values are empty.
      errors: the error of each of `ARRAYS`.
      wrong: the arrays whose error is too large.
      forward_ms, with_backward_ms: times; None if nothing was timed.
      temporaries_mib: temporary memory of forward and backward pass; None if nothing was timed or the number is unknown.
      seconds: time from the start of the check to its result, most of which is compilation.
    """

    mask: str
    backend: attention.Backend
    auto: bool
    refusal: str | None = None
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    wrong: tuple[str, ...] = ()
    forward_ms: float | None = None
    with_backward_ms: float | None = None
    temporaries_mib: float | None = None
    seconds: float = 0.0


def checks(
    shape: AttentionShape, dtype: np.dtype, repeats: int, doing: Callable[[str], None] = lambda what: None
) -> Iterator[AttentionCheck]:
    """Yields the result of each backend under each kind of mask, as soon as it is known.

    Args:
      shape: the sizes of the call.
      dtype: the dtype of queries, keys and values.
      repeats: number of timed runs; with 0 nothing is timed.
      doing: is called with a description of the next program before it is compiled. If a program never ends, the last
        description says which one it is.
    """
    arrays = shape.arrays(dtype)
    for name, mask in shape.masks():
        begun = time.perf_counter()
        leaves, structure = jax.tree.flatten(mask)
        doing(f"{name}: plain attention in float32")
        # The reference is plain attention in float32, on inputs that are rounded to the dtype.
        with jax.default_matmul_precision("highest"):
            exact = backward("xla", structure)([x.astype(jnp.float32) for x in arrays], leaves)
        wanted = [np.asarray(x, np.float32) for x in exact]
        bounds: dict[str, float] = {}
        auto = attention.choose("auto", arrays[0], arrays[1], mask)
        for backend in BACKENDS:
            checked = AttentionCheck(
                mask=name,
                backend=backend,
                auto=backend == auto,
                refusal=attention.refusal(backend, arrays[0], arrays[1], mask),
            )
            if checked.refusal is not None:
                yield checked
                continue
            doing(f"{name}: {backend}")
            # The program is compiled once, and this executable gives the values, the times and the memory.
            step = backward(backend, structure).lower(arrays, leaves).compile()
            doing(f"{name}: {backend}, compiled; its first run")
            found = errors(step(arrays, leaves), wanted)
            if backend == "xla":
                bounds = {array: 2 * error + max(1e-5, float(jnp.finfo(dtype).eps)) for array, error in found.items()}
            checked = dataclasses.replace(
                checked,
                errors=found,
                # Plain attention has the bound of its own error, so that a value which is not finite must be looked for.
                wrong=tuple(
                    array for array, error in found.items() if not (np.isfinite(error) and error <= bounds[array])
                ),
            )
            if repeats:
                doing(f"{name}: {backend}, times")
                memory = step.memory_analysis()
                only_forward = forward(backend, structure).lower(arrays, leaves).compile()
                checked = dataclasses.replace(
                    checked,
                    forward_ms=milliseconds(only_forward, arrays, leaves, repeats),
                    with_backward_ms=milliseconds(step, arrays, leaves, repeats),
                    temporaries_mib=None if memory is None else memory.temp_size_in_bytes / 2**20,
                )
            yield dataclasses.replace(checked, seconds=time.perf_counter() - begun)
            begun = time.perf_counter()


def check(shape: AttentionShape, dtype: np.dtype, repeats: int) -> bool:
    """Prints a line per mask and backend; returns whether all errors are within bounds. With 0 repeats nothing is timed."""
    print(f"\n{shape}")
    print(f"{'mask':<14}{'backend':<15}" + "".join(f"{name:>9}" for name in ARRAYS) + "   fwd ms  +bwd ms  temp MiB")
    good = True
    refused: dict[str, list[str]] = {}
    for one in checks(shape, dtype, repeats):
        if one.refusal is not None:
            refused.setdefault(f"{one.backend} is not used: {one.refusal}", []).append(one.mask)
            continue
        label = f"{one.backend} (auto)" if one.auto else one.backend
        line = f"{one.mask:<14}{label:<15}" + "".join(f"{error:9.1e}" for error in one.errors.values())
        if repeats:
            line += f"{one.forward_ms:9.2f}{one.with_backward_ms:9.2f}"
            line += f"{'-':>10}" if one.temporaries_mib is None else f"{one.temporaries_mib:10.1f}"
        good = good and not one.wrong
        print(line + (f"  WRONG: {', '.join(one.wrong)}" if one.wrong else ""), flush=True)
    for reason, names in refused.items():
        print(f"{reason} ({', '.join(names)})")
    return good


def odd_shape(whole: AttentionShape) -> AttentionShape:
    """Returns a shape with odd numbers of queries and keys, such as 255 and 513 for 2048 tokens."""
    return dataclasses.replace(whole, queries=whole.queries // 8 - 1, keys=whole.keys // 4 + 1)


def main() -> None:
    """Runs the checks and ends with exit status 1 if an error is out of bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--mesh", default=None, help="FSDPxTENSOR, such as 4x2; by default one device")
    parser.add_argument("--repeats", type=int, default=10, help="number of timed runs; 0 times nothing")
    parser.add_argument("--interpret", action="store_true", help="interpret the TPU kernel on this CPU")
    args = parser.parse_args()

    whole = AttentionShape(args.batch, args.tokens, args.tokens, args.heads, args.kv_heads, args.head_dim)
    target = attention.target_platform("tpu", interpret=True) if args.interpret else contextlib.nullcontext()
    mesh = jax.set_mesh(sharding.make_mesh(args.mesh)) if args.mesh else contextlib.nullcontext()
    device = jax.devices()[0]
    print(f"{len(jax.devices())} x {device.device_kind} ({device.platform}), jax {jax.__version__}, {args.dtype}")
    with target, mesh:
        results = [check(whole, np.dtype(args.dtype), args.repeats), check(odd_shape(whole), np.dtype(args.dtype), 0)]
    print("\nall within bounds" if all(results) else "\nWRONG results above")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
