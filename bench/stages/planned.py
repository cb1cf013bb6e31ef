"""Writes the table of bench/accelerator.py without an accelerator, from programs that are compiled for an H200.

The plan of a stage compiles the same program as the stage. `program_cost` computes its time, as if each kernel ran at the
peak rate of products or of the memory. So a planned time is near the least time of the program. A plan shows what the
program costs in addition to its arithmetic: copies, casts, and everything else that is written to memory and read again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import program_cost
import report
import sampler_modes
import train_step

from dream_jax import lora, sharding
from dream_jax.batch import Batch
from dream_jax.chips import chip_of
from dream_jax.device_memory import SHARE
from dream_jax.flops import FlopCounter
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.objective import chunk_rows
from dream_jax.plan.hardware import find_hardware
from dream_jax.sampler import BlockCache, NoCache, block_passes
from dream_jax.train_step import abstract_state
from stages import sampling, tables
from stages.results import read_json, write_json
from stages.stage import STAGES, Stage

TOPOLOGY = "h200:1"
RESULTS = report.RESULTS / "accelerator_planned.json"

# These rates were measured on one H200 (bench/results/h200.json), except that of float8 products: it is assumed to be twice
# the rate of bfloat16 products, as in the data sheet.
CEILINGS = program_cost.DeviceCeilings(product=784e12, float8=2 * 784e12, bandwidth=3.3e12)
GIB = 2**30
# XLA computes results again if it expects too little memory for them. It counts with 95 % of the memory of jax, and takes
# the latter as 80 % of a GPU if there is none, but the commands let jax have more. With this percentage instead of 95, it
# counts with what it would have on the GPU.
MEMORY_PERCENT = round(95 * SHARE / 0.80)


def main(only: Sequence[str] | None) -> int:
    """Compiles the programs of the stages, writes the results after each, and prints the table; returns the exit status.

    Args:
      only: names of stages to plan; None for all. The result file keeps the earlier plans of the other stages.
    """
    hardware = find_hardware(TOPOLOGY)
    if hardware.devices is None:
        print(f"{TOPOLOGY}: {hardware.missing}")
        return 1
    mesh = hardware.mesh("1x1")
    assert isinstance(mesh, jax.sharding.Mesh), "the topology has devices to compile for"
    found = read_json(RESULTS) or {"stages": {}}
    for stage in STAGES:
        if not can_be_planned(stage) or (only is not None and stage.name not in only):
            continue
        values = PLANS[stage.module](stage.options, mesh)
        found["stages"][stage.name] = {"status": "planned", "values": values}
        # The order is that of the table of stages, also if only some are planned again.
        found["stages"] = {one.name: found["stages"][one.name] for one in STAGES if one.name in found["stages"]}
        found |= {"date": report.now(), "commit": report.commit(), "hardware": report.hardware(), "planned": True}
        write_json(RESULTS, found)
        print(f"{stage.name}: planned", flush=True)
    print(f"\n{tables.markdown(found)}\nwrote {RESULTS.name}")
    return 0


def can_be_planned(stage: Stage) -> bool:
    """Returns whether the programs of a stage can be compiled here and their time computed.

    Stages with rows of several texts cannot be planned, because their attention kernel is chosen by running an example on
    the GPU. Neither can stages with flags of XLA, which need a process of their own.
    """
    settings = stage.options.get("settings", {})
    is_other = settings.get("texts") or stage.options.get("flags") is not None
    return stage.module in PLANS and not is_other


def with_shardings(model: Dream, mesh: jax.sharding.Mesh) -> Dream:
    """Returns a model of shapes with their shardings over the mesh."""
    graphdef, params = split_params(model)
    shapes = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        params,
        sharding.parameter_shardings(params, mesh),
    )
    return merge_params(graphdef, shapes)


# ------------------------------------------------------------------------------------------------------ stages


def ceilings(options: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns the ceilings that the plans use."""
    return {
        "device": f"1 x {mesh.devices.flat[0].device_kind}, not present",
        "product_tflops": CEILINGS.product / 1e12,
        "float8_product_tflops": CEILINGS.float8 / 1e12,
        "bandwidth_tb_per_s": CEILINGS.bandwidth / 1e12,
        "read_bandwidth_tb_per_s": CEILINGS.bandwidth / 1e12,
        "versions": report.versions(["jax", "jaxlib", "flax", "optax", "numpy"]),
    }


def sampler(options: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns the planned times of the rows of a sampler stage."""
    model = with_shardings(sampling.abstract(options), mesh)
    return {"rows": [_sampler_row(model, options, row, mesh) for row in options["rows"]]}


def _sampler_row(
    model: Dream, options: Mapping[str, Any], row: Mapping[str, Any], mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    config, batch = sampling.sampler_config(options, row), row["batch"]
    everywhere = sharding.replicated(mesh)
    lowered = sampler_modes.lower(model, config, batch=batch, prompt=options["prompt"], array_sharding=everywhere)
    compiled = lowered.compile()
    region = program_cost.region_of(compiled.as_text(), CEILINGS)
    new, block = options["new"], options["block"]
    is_exact = isinstance(config.cache, NoCache)
    passes = row["passes"] if is_exact else math.ceil(new / block) * math.ceil(block / row["tokens_a_pass"])
    refreshes = 0 if is_exact else math.ceil(new / block)
    (loop,) = [part for part in region.parts if part.is_loop]
    heads = _head_chunks(model, batch, new if is_exact else block, passes // max(1, refreshes))
    # The passes over all tokens, over two blocks (only for block diffusion) and over a window, in the order of the program.
    # In a loop the first one is over one row at a time, and the second one over groups of rows; otherwise over all rows.
    passes_of = [part for part in loop.region.parts if part.trips is None and not _is_head(part)]
    runs = {id(part): (passes - refreshes) / passes for part in passes_of}
    if passes_of:
        has_blocks = isinstance(config.cache, BlockCache)
        full = 1 if has_blocks else refreshes
        runs[id(passes_of[0])] = full * (batch if passes_of[0].is_loop else 1) / passes
        if has_blocks:
            groups = -(-batch // block_passes.group_rows(batch, block)) if passes_of[1].is_loop else 1
            runs[id(passes_of[1])] = (refreshes - 1) * groups / passes
    cost = loop.region.total(lambda part: heads if _is_head(part) else runs.get(id(part), 1.0))
    memory = compiled.memory_analysis()
    least = _least_ms(model, options, config, row, passes, refreshes)
    tokens = batch * (1 if is_exact else new / passes)
    return {
        "name": sampling.name_of(row),
        **row,
        "passes_a_row": passes,
        "ms_a_pass": 1e3 * cost.seconds,
        "tokens_per_s": tokens / cost.seconds,
        "least_ms_a_pass": least,
        "gb_a_pass": cost.nbytes / 1e9,
        "tflop_a_pass": cost.flops / 1e12,
        "scopes_ms": _milliseconds(cost),
        "allocator_peak_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GIB,
    }


def _is_head(part: program_cost.ProgramPart) -> bool:
    """Returns whether a part is the loop over chunks of positions whose logits are computed."""
    return "/propose/" in part.op_name


class _Steps(NamedTuple):
    """The step that writes each token, and the number of passes of each row, as in a `dream_jax.Sample`."""

    commit_step: np.ndarray
    passes: np.ndarray


def _head_chunks(model: Dream, batch: int, positions: int, passes: int) -> float:
    """Returns the mean number of chunks of the head in a pass, if `passes` passes write `positions` masks evenly."""
    # As in sampler.propose: a quarter of the positions, at least 64 rows, at most 2^26 logits.
    chunk = max(positions // 4, -(-64 // batch))
    chunk = max(1, min(positions, chunk, 2**26 // (batch * model.config.vocab_size)))
    masked = positions * (1 - np.arange(passes) / passes)
    return float(np.mean(np.ceil(masked / chunk)))


def _least_ms(
    model: Dream, options: Mapping[str, Any], config: Any, row: Mapping[str, Any], passes: int, refreshes: int
) -> float:
    """Returns the least milliseconds a pass by `sampling.least_ms`, which does not depend on the compiled program."""
    new = options["new"]
    of_row = np.minimum(np.arange(new) * passes // new, passes - 1)
    out = _Steps(
        commit_step=np.broadcast_to(np.pad(of_row, (options["prompt"], 0)), (row["batch"], options["prompt"] + new)),
        passes=np.full(row["batch"], passes),
    )
    read = sampling.read_a_pass(model)
    known = {"product_tflops": CEILINGS.product / 1e12, "read_bandwidth_tb_per_s": CEILINGS.bandwidth / 1e12}
    found = sampling.least_ms(model.config, options, row, config, out, read, known)
    assert found is not None
    return found


def training(options: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns the planned time of a training step."""
    settings = train_step.TrainStepBenchSettings(**options["settings"])
    model = with_shardings(train_step.abstract_model_of(settings), mesh)
    params = split_params(model)[1]
    trained, frozen = lora.split(params) if settings.lora_rank else (params, {})
    state = abstract_state(trained, train_step.optimizer_of(settings).make(), mesh)
    where = sharding.batch_sharding(mesh)
    batch: Batch[Any] = jax.tree.map(
        lambda rows: jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=where), train_step.rows(settings)
    )
    lowered = train_step.make_step(settings, model, mesh).lower(state, batch, frozen)
    compiled = lowered.compile(compiler_options={"xla_gpu_memory_limit_slop_factor": MEMORY_PERCENT})
    region = program_cost.region_of(compiled.as_text(), CEILINGS)
    tokens = settings.batch * settings.tokens
    # Half of the positions are masked in the mean, and the loop over chunks of the loss ends after them.
    chunks = math.ceil(tokens / 2 / chunk_rows(tokens, model.config.vocab_size, "gpu"))
    cost = region.total(lambda part: float(chunks) if part.is_loop else 1.0)
    memory = compiled.memory_analysis()
    total = FlopCounter(model, settings.tokens).step(tokens, tokens / 2, train_step.span(train_step.rows(settings)))
    chip = chip_of(mesh.devices.flat[0].device_kind)
    assert chip is not None
    return {
        "seconds": report.summarize([cost.seconds]),
        "tokens_per_second": tokens / cost.seconds,
        "mfu": total / cost.seconds / chip.peak_flops,
        "allocator_peak_gib": [memory.peak_memory_in_bytes / GIB],
        "tflop_with_recomputation": cost.flops / 1e12,
        "gb_a_step": cost.nbytes / 1e9,
        "scopes_ms": _milliseconds(cost),
    }


def _milliseconds(cost: program_cost.KernelCost) -> dict[str, float]:
    return {name: 1e3 * seconds for name, seconds in cost.scopes.most_common(20)}


PLANS = {"ceilings": ceilings, "sampling": sampler, "training": training}
