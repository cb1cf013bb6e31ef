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
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax import attention, masks, sharding

BACKENDS: tuple[attention.Backend, ...] = ("xla", "cudnn", "splash")
ARRAYS = ("out", "dq", "dk", "dv")

Step = Callable[[list[jax.Array], masks.Mask], Any]


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


def forward(backend: attention.Backend) -> Step:
    """Returns a compiled function of arrays and mask that returns the outputs."""

    def step(arrays: list[jax.Array], mask: masks.Mask) -> jax.Array:
        q_BTNH, k_BSKH, v_BSKH, _ = arrays
        return attention.attention(q_BTNH, k_BSKH, v_BSKH, mask, backend)

    return jax.jit(step)


def backward(backend: attention.Backend) -> Step:
    """Returns a compiled function of arrays and mask that returns the outputs and the gradients of q, k and v."""

    def loss(qkv: list[jax.Array], weight: jax.Array, mask: masks.Mask) -> tuple[jax.Array, jax.Array]:
        q_BTNH, k_BSKH, v_BSKH = qkv
        out = attention.attention(q_BTNH, k_BSKH, v_BSKH, mask, backend)
        return jnp.sum(out.astype(jnp.float32) * weight.astype(jnp.float32)), out

    def step(arrays: list[jax.Array], mask: masks.Mask) -> list[jax.Array]:
        gradients, out = jax.grad(loss, has_aux=True)(arrays[:3], arrays[3], mask)
        return [out, *gradients]

    return jax.jit(step)


def errors(found: list[jax.Array], wanted: list[np.ndarray]) -> dict[str, float]:
    """Returns largest difference / largest value for each of `ARRAYS`; infinite if a difference is not finite."""
    result = {}
    for name, a, b in zip(ARRAYS, found, wanted, strict=True):
        error = float(np.max(np.abs(np.asarray(a, np.float32) - b)) / np.max(np.abs(b)))
        result[name] = error if np.isfinite(error) else float("inf")
    return result


def milliseconds(step: Step, arrays: list[jax.Array], mask: masks.Mask, repeats: int) -> float:
    """Returns the median time of `repeats` calls of a compiled step, in milliseconds."""
    jax.block_until_ready(step(arrays, mask))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step(arrays, mask))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def check(shape: AttentionShape, dtype: np.dtype, repeats: int) -> bool:
    """Prints a line per mask and backend; returns whether all errors are within bounds. With 0 repeats nothing is timed."""
    print(f"\n{shape}")
    print(f"{'mask':<14}{'backend':<15}" + "".join(f"{name:>9}" for name in ARRAYS) + "   fwd ms  +bwd ms  temp MiB")
    good = True
    refused: dict[str, list[str]] = {}
    arrays = shape.arrays(dtype)
    for name, mask in shape.masks():
        # The reference is plain attention in float32, on inputs that are rounded to the dtype.
        with jax.default_matmul_precision("highest"):
            exact = backward("xla")([x.astype(jnp.float32) for x in arrays], mask)
        wanted = [np.asarray(x, np.float32) for x in exact]
        bounds: dict[str, float] = {}
        auto = attention.choose("auto", arrays[0], arrays[1], mask)
        for backend in BACKENDS:
            reason = attention.refusal(backend, arrays[0], arrays[1], mask)
            label = f"{backend} (auto)" if backend == auto else backend
            if reason is not None:
                refused.setdefault(f"{backend} is not used: {reason}", []).append(name)
                continue
            step = backward(backend)
            found = errors(step(arrays, mask), wanted)
            if backend == "xla":
                bounds = {array: 2 * error + max(1e-5, float(jnp.finfo(dtype).eps)) for array, error in found.items()}
            line = f"{name:<14}{label:<15}" + "".join(f"{error:9.1e}" for error in found.values())
            if repeats:
                # The annotated type is a plain function, but what `backward` returns is jitted and can be lowered.
                memory = step.lower(arrays, mask).compile().memory_analysis()  # type: ignore[attr-defined]
                line += f"{milliseconds(forward(backend), arrays, mask, repeats):9.2f}"
                line += f"{milliseconds(step, arrays, mask, repeats):9.2f}"
                line += f"{memory.temp_size_in_bytes / 2**20:10.1f}" if memory is not None else f"{'-':>10}"
            wrong = [array for array, error in found.items() if not error <= bounds[array]]
            good = good and not wrong
            print(line + (f"  WRONG: {', '.join(wrong)}" if wrong else ""), flush=True)
    for reason, names in refused.items():
        print(f"{reason} ({', '.join(names)})")
    return good


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
    odd = dataclasses.replace(whole, queries=args.tokens // 8 - 1, keys=args.tokens // 4 + 1)
    target = attention.target_platform("tpu", interpret=True) if args.interpret else contextlib.nullcontext()
    mesh = jax.set_mesh(sharding.make_mesh(args.mesh)) if args.mesh else contextlib.nullcontext()
    device = jax.devices()[0]
    print(f"{len(jax.devices())} x {device.device_kind} ({device.platform}), jax {jax.__version__}, {args.dtype}")
    with target, mesh:
        results = [check(whole, np.dtype(args.dtype), args.repeats), check(odd, np.dtype(args.dtype), 0)]
    print("\nall within bounds" if all(results) else "\nWRONG results above")
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
