"""Measures what large memory pages save in a training step on a CPU.

    python bench/cpu_pages.py [--repeats 3] [--steps 20] [--out bench/results/cpu_pages.json]

The C library gives large arrays back to the system when they are freed, so every step takes them anew, a page of 4 KiB at a
time, and the kernel fills each page with zeros. With the environment variable GLIBC_TUNABLES=glibc.malloc.hugetlb=1 the
library asks the kernel for pages of 2 MiB (Linux, glibc 2.35 or newer, /sys/kernel/mm/transparent_hugepage/enabled not
"never"). This script trains a nano model in processes with and without the variable, in turns, at several sizes of a batch,
with all cores and with one. What counts is the ratio of the medians; other programs must rest.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import report
import tyro

from dream_jax.bounds import IntegerRange, check_numbers

VARIABLE, VALUE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
SHAPES = ((64, 40), (16, 384), (4, 1024))
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CpuPagesBenchSettings:
    """The size of the measurement, and the file of its results."""

    repeats: int = 3
    """number of processes with and without the variable, for each size"""
    steps: int = 20
    """number of steps that are timed in a process, after three others"""
    out: pathlib.Path = report.RESULTS / "cpu_pages.json"
    """file of the results"""
    child: str = ""
    """rows and tokens of a batch, such as 64x40, that this process trains on; for the script itself"""

    def __post_init__(self) -> None:
        several = IntegerRange(1)
        check_numbers(self, repeats=several, steps=several)


def step_seconds(rows: int, length: int, steps: int) -> float:
    """Returns the seconds of a training step of the nano model, the mean of `steps` steps."""
    import jax
    from flax import nnx

    from dream_jax import sharding
    from dream_jax.batch import Batch
    from dream_jax.config import PRESETS
    from dream_jax.model import Dream, split_params
    from dream_jax.optimizer import OptimizerConfig
    from dream_jax.train_step import StepConfig, init_state, make_train_step, put_batch

    mesh = sharding.make_mesh("1x1")
    graphdef, params = split_params(jax.jit(lambda: Dream(PRESETS["nano"], rngs=nnx.Rngs(0)))())
    settings = OptimizerConfig(learning_rate=1e-3, total_steps=steps + 3)
    optimizer = settings.make()
    state = init_state(params, optimizer, mesh)
    step = make_train_step(graphdef, optimizer, settings.schedule(), StepConfig(global_batch=rows), mesh)
    draw = np.random.default_rng(0)
    made = Batch(
        tokens_BT=draw.integers(0, 256, (rows, length), np.int32),
        maskable_BT=np.broadcast_to(np.arange(length) >= length // 4, (rows, length)),
        row_B=np.arange(rows, dtype=np.int32),
        valid_BT=None,
    )
    batch = put_batch(made, mesh)
    for _ in range(3):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    begun = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    return (time.perf_counter() - begun) / steps


def measure(settings: CpuPagesBenchSettings, shape: tuple[int, int], one_thread: bool) -> dict[str, Any]:
    """Returns the seconds of a step of every process, and the ratio of the medians without and with the variable."""
    found: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(settings.repeats):
        for name, seconds in found.items():
            environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
            environment |= {VARIABLE: VALUE} if name == "with" else {}
            environment |= {"XLA_FLAGS": ONE_THREAD} if one_thread else {}
            command = [sys.executable, __file__, "--child", f"{shape[0]}x{shape[1]}", "--steps", str(settings.steps)]
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise RuntimeError(f"{' '.join(command)} failed: {ended.stderr[-500:]}")
            seconds.append(float(ended.stdout.splitlines()[-1]))
    ratio = statistics.median(found["without"]) / statistics.median(found["with"])
    return {
        "rows": shape[0],
        "tokens": shape[1],
        "threads": 1 if one_thread else report.num_cores(),
        **found,
        "ratio": ratio,
    }


def main(settings: CpuPagesBenchSettings) -> None:
    if settings.child:
        rows, _, length = settings.child.partition("x")
        print(step_seconds(int(rows), int(length), settings.steps))
        return
    pages = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    others, results = report.OtherWork(), []
    for shape in SHAPES:
        for one_thread in (False, True):
            results.append(measure(settings, shape, one_thread))
            print({name: value for name, value in results[-1].items() if not isinstance(value, list)}, flush=True)
    about = {
        "date": report.now(),
        "hardware": report.hardware() | {"large_pages": pages.read_text().strip() if pages.exists() else "not known"},
        "versions": report.versions(["jax", "jaxlib", "numpy"]),
        "other_work_share": round(others.share(), 3),
        "settings": {"repeats": settings.repeats, "steps": settings.steps},
    }
    report.write_json(settings.out, about | {"results": results})
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(CpuPagesBenchSettings, description=__doc__))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
