"""Times the sampler: exact passes over the whole canvas, and cached blocks with an enforced number of tokens a pass.

The weights are random, so no rule by confidence would write several tokens in a pass: the number is enforced.
"""

from __future__ import annotations

import functools
import math
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import profiles
import random_weights
import sampler_modes

import dream_jax
from dream_jax import layer_forms, lora, sharding
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.model import Dream, abstract_model, split_params
from dream_jax.quantisation import KINDS
from dream_jax.sampler import BlockCache, NoCache, SamplerConfig
from stages.results import StageResult, neighbour, require_accelerator
from stages.stage import BLOCK_DIFFUSION

GIB = 2**30


def run(options: Mapping[str, Any], result: StageResult) -> None:
    """Times the rows of a stage on one model.

    Args:
      options: `model`, `base` ("float" or a kind of codes) and `layers` describe the model; `prompt`, `new` and `block`
        are numbers of tokens; each of `rows` has `mode` ("exact" or "cached"), `batch`, for exact rows `passes`, for
        cached rows `tokens_a_pass`, and perhaps `profile` and `repeats`.
      result: receives a row for each; the profiles come after all rows, because a profile slows the process down.
    """
    require_accelerator(options, jax.default_backend())
    config = PRESETS[options["model"]]
    result.doing("making the weights")
    model = make_model(options)
    read = read_a_pass(model)
    result.write(weights_gib=nbytes(split_params(model)[1]) / GIB, read_a_pass_gib=read / GIB)
    ceilings = neighbour(result.path, "ceilings")
    for row in options["rows"]:
        result.doing(f"{name_of(row)}: compiling and a first run")
        result.add("rows", timed(model, config, options, row, read, ceilings))
    for row in options["rows"]:
        if row.get("profile"):
            result.doing(f"{name_of(row)}: profile")
            result.add("profiles", {"of": name_of(row), **profile(model, config, options, row)})
    result.write(doing=None)


def name_of(row: Mapping[str, Any]) -> str:
    """Returns how the tables call a row, such as "cached, 4 a pass, B=16"."""
    tokens = row.get("tokens_a_pass", 1)
    top_p = ", top_p 0.95" if row.get("top_p") else ""
    return f"{row['mode']}, {tokens} a pass{top_p}, B={row['batch']}"


def abstract(options: Mapping[str, Any]) -> Dream:
    """Returns the model of shapes that a stage samples from, in the form that `sample.py` gives it."""
    form = options.get("layers", "stacked")
    model = abstract_model(PRESETS[options["model"]], param_dtype=options.get("dtype", "bfloat16"), layers=form)
    base = options.get("base", "float")
    if base in KINDS:
        model = lora.with_base_shapes(model, base)
    return jax.eval_shape(functools.partial(_joined, base=base), model) if form == "apart" else model


def _joined(model: Dream, base: str) -> Dream:
    """Returns the model as `inference` prepares it for a GPU: projections joined, scales of int8 codes rounded."""
    layer_forms.join(model)
    if base == "int8":
        lora.round_scales(model)
    return model


def make_model(options: Mapping[str, Any]) -> Dream:
    """Returns the model with random weights on the first device."""
    return random_weights.filled(abstract(options), sharding.make_mesh("1x1"))


def nbytes(params: Any) -> int:
    """Returns the bytes of the arrays, or shapes, of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def read_a_pass(model: Dream) -> int:
    """Returns the bytes of the weights that every pass reads."""
    params = split_params(model)[1]
    # Of the embedding table only a few rows are read, unless it is also the output projection.
    return nbytes(params) - (0 if model.config.tie_word_embeddings else nbytes(params["embed"]))


def sampler_config(options: Mapping[str, Any], row: Mapping[str, Any]) -> SamplerConfig:
    """Returns the settings of the sampler of a row.

    An exact row writes all `new` tokens in `passes` passes. Such a pass takes as long, on average, as one of `new` passes
    that write one token each, because the number of masked positions falls evenly in both cases.
    """
    more: dict[str, Any] = {"temperature": 0.2, "top_p": 0.95} if row.get("top_p") else {}
    if row["mode"] == "exact":
        return SamplerConfig.preset("exact", max_new_tokens=options["new"], steps=row["passes"], **more)
    mode = sampler_modes.block_diffusion if row["mode"] == BLOCK_DIFFUSION else sampler_modes.cached
    return mode(options["new"], options["block"], row["tokens_a_pass"])


def prompt_of(config: DreamConfig, options: Mapping[str, Any], batch: int) -> np.ndarray:
    """Returns a random prompt, int32 [batch, prompt]."""
    return np.random.default_rng(0).integers(0, config.pad_token_id, (batch, options["prompt"])).astype(np.int32)


def timed(
    model: Dream,
    config: DreamConfig,
    options: Mapping[str, Any],
    row: Mapping[str, Any],
    read: int,
    ceilings: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the times of a row; `read` is the number of bytes of weights that a pass reads."""
    sampler, batch = sampler_config(options, row), row["batch"]
    prompt = prompt_of(config, options, batch)
    key = jax.random.key(0) if sampler.is_random else None
    call = lambda: jax.block_until_ready(dream_jax.generate(model, prompt, sampler, key))
    begun = time.perf_counter()
    out = call()
    first = time.perf_counter() - begun
    seconds = []
    for _ in range(row.get("repeats", 2)):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    best = min(seconds)
    # In exact mode each pass here writes several tokens, but the reported rate counts one token for each pass and row.
    passes = int(np.max(out.passes))
    tokens = batch * (passes if row["mode"] == "exact" else options["new"])
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "name": name_of(row),
        **row,
        "seconds": seconds,
        "first_call_s": first,
        "passes_a_row": passes,
        "forwards": int(out.forwards),
        "ms_a_pass": 1e3 * best / passes,
        "tokens_per_s": tokens / best,
        "least_ms_a_pass": least_ms(config, options, row, sampler, out, read, ceilings),
        "allocator_peak_gib": stats["peak_bytes_in_use"] / GIB if "peak_bytes_in_use" in stats else None,
    }


def least_ms(
    config: DreamConfig,
    options: Mapping[str, Any],
    row: Mapping[str, Any],
    sampler: SamplerConfig,
    out: Any,
    read: int,
    ceilings: Mapping[str, Any],
) -> float | None:
    """Returns the least milliseconds a pass by the ceilings that were measured before; None if they were not.

    A full pass is bound by its arithmetic. A window pass is bound by its arithmetic or by reading the weights, `read`
    bytes. `out` has `commit_step` and `passes`, as a `dream_jax.Sample`.
    """
    if "product_tflops" not in ceilings or "read_bandwidth_tb_per_s" not in ceilings:
        return None
    rate, bandwidth = ceilings["product_tflops"] * 1e12, ceilings["read_bandwidth_tb_per_s"] * 1e12
    flops = sum(
        sampler_modes.sample_flops(config, sampler, options["prompt"], steps, int(passes))
        for steps, passes in zip(np.asarray(out.commit_step)[:, options["prompt"] :], out.passes, strict=True)
    )
    passes = int(np.max(out.passes))
    if isinstance(sampler.cache, NoCache):
        return 1e3 * flops / rate / passes
    full, length, batch = -(-options["new"] // options["block"]), options["prompt"] + options["new"], row["batch"]
    if isinstance(sampler.cache, BlockCache):  # one pass over the prompt and the first block, and no other full pass
        full, length = 1, options["prompt"] + options["block"]
    of_full = full * batch * sampler_modes.pass_flops(config, length, length)
    windows = max((flops - of_full) / rate, (passes - full) * read / bandwidth)
    return 1e3 * (of_full / rate + windows) / passes


def profile(model: Dream, config: DreamConfig, options: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns where the time of one pass goes: a profile of a whole run, divided by its passes."""
    sampler, prompt = sampler_config(options, row), prompt_of(config, options, row["batch"])
    lowered = sampler_modes.lower(model, sampler, batch=row["batch"], prompt=options["prompt"])
    text = lowered.compile().as_text()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            out = jax.block_until_ready(dream_jax.generate(model, prompt, sampler))
        return profiles.summary(pathlib.Path(folder), text, runs=int(np.max(out.passes)))
