"""Measures the cost of a mask: time and memory of a training step, and time of sampling with and without a cache.

The models have random weights, because the time does not depend on the weights.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dream_jax import masks, sharding
from dream_jax.batch import Batch
from dream_jax.model import split_params
from dream_jax.optimizer import OptimizerConfig
from dream_jax.sampler import SamplerConfig, WindowCache, generate
from dream_jax.train_step import StepConfig, init_state, make_train_step, put_batch
from mask_study.variants import VARIANTS

ROWS, TOKENS = 4, 512  # number of rows and of tokens per row of a training batch
NEW, BLOCK = 128, 32  # number of tokens of each prompt and of each answer, and of a block of the answer
_REPEATS = 5


def costs(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields one row per mask: the share of query-key pairs that may attend, and median times on this machine.

    The measured runs of the masks alternate, so that all are equally affected by changes of the machine. Times are in
    seconds; `step_temp_mib` is the temporary memory of a training step in MiB.

    Args:
      names: names of masks, which are keys of `VARIANTS`.
    """
    steps = {name: _training(name) for name in names}
    exact = {name: _sampling(name, cached=False) for name in names}
    cached = {name: _sampling(name, cached=True) for name in names}
    kinds = {"step": {name: one for name, (one, _) in steps.items()}, "sample": exact, "sample_cached": cached}
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(_REPEATS):
        for kind, runs in kinds.items():
            for name, run in runs.items():
                begun = time.perf_counter()
                run()
                seconds.setdefault((kind, name), []).append(time.perf_counter() - begun)
    for name in names:
        position_1T = np.arange(TOKENS)[None]
        mask = masks.parse(name).for_rows(np.ones((1, TOKENS), bool), position_1T >= TOKENS // 2)
        attended = np.broadcast_to(np.asarray(mask.dense(TOKENS, TOKENS)), (1, TOKENS, TOKENS)).mean()
        row = {"mask": name, "tokens": TOKENS, "pairs": float(attended), "step_temp_mib": steps[name][1] / 2**20}
        yield row | {f"{kind}_seconds": statistics.median(seconds[kind, name]) for kind in kinds}


def _training(name: str) -> tuple[Callable[[], None], int]:
    """Returns a function that runs one training step, and the bytes of temporary memory of the compiled step."""
    variant, mesh = VARIANTS[name], sharding.make_mesh("1x1")
    graphdef, params = split_params(variant.model(0))
    settings = OptimizerConfig(learning_rate=1e-3, total_steps=100)
    optimizer = settings.make()
    config = StepConfig(global_batch=ROWS, mask=masks.parse(variant.mask))
    step = make_train_step(graphdef, optimizer, settings.schedule(), config, mesh)
    tokens = np.random.default_rng(0).integers(0, 200, (ROWS, TOKENS)).astype(np.int32)
    maskable = np.broadcast_to(np.arange(TOKENS) >= TOKENS // 2, tokens.shape)
    rows = Batch(tokens_BT=tokens, maskable_BT=maskable, row_B=np.arange(ROWS, dtype=np.int32))
    batch = put_batch(rows, mesh)
    state = [init_state(params, optimizer, mesh)]
    needed = step.lower(state[0], batch).compile().memory_analysis().temp_size_in_bytes

    def run() -> None:
        state[0], metrics = step(state[0], batch)
        jax.block_until_ready(metrics)

    run()
    return run, needed


def _sampling(name: str, *, cached: bool) -> Callable[[], None]:
    """Returns a function that samples once, with or without a key/value cache."""
    model = VARIANTS[name].model(0)
    prompts = np.random.default_rng(0).integers(0, 200, (ROWS, NEW)).astype(np.int32)
    options: dict[str, Any] = {"cache": WindowCache(left=BLOCK, right=0)} if cached else {}
    config = SamplerConfig(max_new_tokens=NEW, steps=NEW, alg="entropy", block_length=BLOCK, **options)

    def run() -> None:
        jax.block_until_ready(generate(model, prompts, config).tokens)

    run()
    return run
