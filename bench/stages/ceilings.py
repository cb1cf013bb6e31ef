"""Measures what the device can do: the rates of large matrix products, and the bandwidth of its memory.

The other stages compute the least times of their work from these numbers, which come from the same run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import report

from dream_jax.device_memory import share_in_force
from stages.results import StageResult, require_accelerator


def run(options: Mapping[str, Any], result: StageResult) -> None:
    """Measures the device.

    Args:
      options: `size`, the number of rows and columns of the matrices; `mib`, the size of the array that is copied;
        `seconds`, how long each measurement repeats.
      result: receives the rates in TFLOP/s and TB/s, and a description of the device.
    """
    device = jax.devices()[0]
    require_accelerator(options, device.platform)
    stats = device.memory_stats() or {}
    result.write(
        device=f"{jax.device_count()} x {device.device_kind}",
        platform=device.platform,
        runtime=str(getattr(device.client, "platform_version", "")).replace("\n", " "),
        memory_for_programs_gib=stats["bytes_limit"] / 2**30 if "bytes_limit" in stats else None,
        memory_share=share_in_force().share,
        versions=report.versions(["jax", "jaxlib", "flax", "optax", "numpy"]),
    )
    size, seconds = int(options["size"]), float(options["seconds"])

    # Random values, because products of simple values use less power and run faster than those of a model.
    a, b = (
        jax.random.normal(key, (size, size), jnp.float32).astype(jnp.bfloat16)
        for key in jax.random.split(jax.random.key(0))
    )
    product = jax.jit(lambda a, b: a @ b)
    result.write(product_tflops=2.0 * size**3 / best_time(lambda: product(a, b), seconds) / 1e12)

    elements = int(options["mib"]) * 2**20 // 2
    x = jnp.ones((elements,), jnp.bfloat16)
    double = jax.jit(lambda x: x * jnp.bfloat16(2))
    result.write(bandwidth_tb_per_s=2 * 2 * elements / best_time(lambda: double(x), seconds) / 1e12)
    total = jax.jit(lambda x: jnp.max(x))
    result.write(read_bandwidth_tb_per_s=2 * elements / best_time(lambda: total(x), seconds) / 1e12)
    del x

    # XLA makes one float8 product of this form: both inputs are cast to bfloat16 and scaled. It runs last, because not
    # every device has it.
    a8, b8 = a.astype(jnp.float8_e4m3fn), b.astype(jnp.float8_e4m3fn)
    scaled = jax.jit(lambda a, b, s: (a.astype(jnp.bfloat16) * s) @ (b.astype(jnp.bfloat16) * s))
    scale = jnp.bfloat16(1.0)
    result.write(float8_product_tflops=2.0 * size**3 / best_time(lambda: scaled(a8, b8, scale), seconds) / 1e12)


def best_time(call: Callable[[], Any], seconds: float, queued: int = 10) -> float:
    """Returns the seconds of one call: the smallest mean over `queued` calls that were given to the device at once.

    Calls are repeated for about `seconds`. A single call would be measured with the time that Python needs to start it.
    """
    jax.block_until_ready(call())
    best, begun = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        for _ in range(queued):
            last = call()
        jax.block_until_ready(last)
        best = min(best, (time.perf_counter() - start) / queued)
        if time.perf_counter() - begun > seconds:
            return best
