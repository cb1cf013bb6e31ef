"""Compares the attention backends with plain attention in float32 on this device, and times them.

Every program is announced in the result before it is compiled and before it runs for the first time. So a check that
never ends names the mask, the backend, and whether it was compiling or running.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import check_attention
import jax
import jax.numpy as jnp

from stages.results import StageResult, require_accelerator


def run(options: Mapping[str, Any], result: StageResult) -> None:
    """Checks all masks and backends.

    Args:
      options: `shape`, the sizes of `check_attention.AttentionShape`; `odd`, whether to check the odd lengths that belong
        to this shape instead; `repeats`, the number of timed runs, 0 for no times.
      result: receives a row per mask and backend.

    Raises:
      RuntimeError: an error is out of bounds; the rows say which.
    """
    require_accelerator(options, jax.default_backend())
    shape = check_attention.AttentionShape(**options["shape"])
    if options.get("odd"):
        shape = check_attention.odd_shape(shape)
    dtype = jnp.dtype(options.get("dtype", "bfloat16"))
    result.write(shape=dataclasses.asdict(shape), dtype=dtype.name)
    wrong = []
    for one in check_attention.checks(shape, dtype, options["repeats"], result.doing):
        result.add(
            "rows", {name: value for name, value in dataclasses.asdict(one).items() if value not in (None, {}, ())}
        )
        wrong += [f"{one.mask}, {one.backend}: {', '.join(one.wrong)}"] if one.wrong else []
    result.write(doing=None, within_bounds=not wrong)
    if wrong:
        raise RuntimeError(f"errors are out of bounds: {'; '.join(wrong)}")
