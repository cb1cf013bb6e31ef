"""Compares a training step of block diffusion, which has two streams, with the step of one stream, for Dream-7B.

    python bench/two_streams.py [--only v6e:2x4/8x1/full] [--no-compile] [--out FILE]

For each case it plans the step with blocks of 16 tokens at 4096 tokens, with the policy that `--remat auto` takes: the
memory as compiled, the time and the operations. It also counts the operations of both steps under this policy from the
traced programs, which include everything that is computed again, and the keys in whole chunks or tiles. Needs the extra
`plan` for TPUs, and `plan-gpu` for GPUs. On two cores each case takes several minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import report
import tyro

from dream_jax import sharding, target
from dream_jax.attention import splash_streams
from dream_jax.plan import PlanSettings, make_plan
from dream_jax.plan.arithmetic import loss_chunks
from dream_jax.plan.hardware import find_hardware
from dream_jax.plan.report import gib
from dream_jax.step_memory import AbstractStep, StepShape
from dream_jax.train_step import TrainStep
from dream_jax.trainer import TrainSettings
from dream_jax.trainer.build import abstract_step, step_shape

SIZE, TOKENS = 16, 4096
CASES: Mapping[str, dict[str, Any]] = {
    "v6e:2x4/8x1/full": {"batch_size": 8},
    "v6e:2x4/8x1/lora": {"batch_size": 8, "lora_rank": 32},
    "h200:1/1x1/full": {"batch_size": 4, "moments": "int8"},
    "h200:1/1x1/lora": {"batch_size": 4, "lora_rank": 32},
}
# Products of attention in the forward pass and in the backward pass. cuDNN and splash compute the scores again in the
# backward pass; splash does it in two kernels, one for the queries and one for keys and values.
_FORWARD, _CUDNN_BACKWARD, _SPLASH_BACKWARD = 2, 5, 7
_TILE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoStreamsSettings:
    """The choice of the cases, and the result file."""

    only: tuple[str, ...] = tuple(CASES)
    """cases, each as TOPOLOGY/MESH/WHAT"""
    compile: bool = True
    """compile the steps; --no-compile computes the memory by arithmetic"""
    out: pathlib.Path = report.RESULTS / "two_streams.json"


def operations(jaxpr: Any, trips: float, splash: Callable[[int], float], branch: Callable[..., float] = min) -> float:
    """Returns the floating-point operations of the products and of the attention of a traced program.

    Args:
      jaxpr: the program, a `jax.extend.core.Jaxpr`.
      trips: number of iterations of a loop whose end depends on data: that over the chunks of the loss.
      splash: function that returns the number of scores that splash computes for one row and head, for a number of queries.
      branch: chooses among the operations of the branches of a conditional; `min` is for rows without prompts.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, inside = equation.primitive.name, list(_inner(equation.params))
        counted = [operations(one, trips, splash, branch) for one in inside]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        elif name == "scan":
            total += equation.params["length"] * sum(counted)
        elif name == "while":
            total += trips * sum(counted)
        elif name == "cond":
            total += branch(counted)
        elif name == "pallas_call":
            total += _splash_operations(equation, splash)
        elif name.startswith("dot_product_attention_"):
            query, key = (variable.aval.shape for variable in equation.invars[:2])
            products = _FORWARD if "fwd" in name else _CUDNN_BACKWARD
            total += products * 2.0 * math.prod(query) * key[1]
        else:
            total += sum(counted)
    return total


def _inner(params: Mapping[str, Any]) -> Iterator[Any]:
    """Yields the programs inside the parameters of an equation."""
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one


def _splash_operations(equation: Any, splash: Callable[[int], float]) -> float:
    """Returns the operations of one of splash's kernels: the forward pass, or one of the two of the backward pass."""
    name = equation.params["name"]
    # In the kernels the heads are the first axis but that of the batch. The queries have more heads than the keys.
    heads = max((variable.aval.shape for variable in equation.invars if len(variable.aval.shape) == 4), key=math.prod)
    products = 4 if "dkv" in name else 3 if "dq" in name else _FORWARD
    batch, query_heads, queries, width = heads
    return products * 2.0 * batch * query_heads * width * splash(queries)


def tile_scores(queries: int) -> float:
    """Returns the number of scores that splash computes for one row and head at 4096 tokens, with one or two streams."""
    if queries == TOKENS:
        return float(TOKENS**2)
    tiles = splash_streams.StreamBlocks(SIZE, TOKENS, False).tiles((queries, queries))
    count = 0
    for start in range(0, queries, _TILE):
        rows = tiles[slice(start, start + _TILE), slice(0, queries)]
        clean = start >= TOKENS
        # Without prompts no clean query sees a key after the end of the tile and the rest of a block.
        limit = min(queries, start + _TILE) if clean else queries
        rows = rows & (np.arange(queries) < limit)
        count += sum(bool(rows[:, key : key + _TILE].any()) for key in range(0, queries, _TILE))
    return float(count * _TILE**2)


def traced(step: AbstractStep, shape: StepShape, platform: target.Platform) -> float:
    """Returns the operations of a step over all devices, from its traced program. The step must be for one device."""
    size = shape.block
    trips = loss_chunks(shape, step.model.config.vocab_size, platform)
    assert isinstance(step.step, TrainStep), "the objective is sft"
    mesh = step.step.mesh
    assert isinstance(mesh, jax.sharding.Mesh), "the mesh is of this machine's devices"
    with target.target_platform(platform), jax.set_mesh(mesh):
        function = functools.partial(step.step._function, False, size)
        jaxpr = jax.make_jaxpr(function)(step.state, step.batch, step.frozen).jaxpr
    return operations(jaxpr, trips, tile_scores)


def counted(settings: Mapping[str, Any], platform: target.Platform) -> float:
    """Returns the operations of the step of these settings, counted as if one device computed all rows."""
    training = TrainSettings.flat(out=pathlib.Path("unused"), **{**settings, "mesh": "1x1"})
    mesh = sharding.make_mesh("1x1")
    step = abstract_step(training, mesh, TOKENS)
    return traced(step, step_shape(training, mesh, TOKENS), platform)


def one_case(name: str, *, compiles: bool) -> dict[str, Any] | None:
    """Returns the figures of a case; None if the compiler for it is missing."""
    topology, mesh, _ = name.split("/")
    hardware = find_hardware(topology, compiles=compiles)
    if hardware.missing is not None and compiles:
        print(f"{name}: {hardware.missing}")
        return None
    base = {"model": "dream-7b", "steps": 300, "max_length": TOKENS, "mesh": mesh, **CASES[name]}
    training = TrainSettings.flat(out=pathlib.Path("unused"), **base, remat="auto", block_diffusion=str(SIZE))
    plan = make_plan(training, PlanSettings(plan=True, topology=topology, compile=compiles))
    same = {**base, "remat": plan.settings["remat"], "compute_dtype": "bfloat16"}
    platform: Any = hardware.chip.platform
    two, one = counted({**same, "block_diffusion": str(SIZE)}, platform), counted(same, platform)
    single = make_plan(
        TrainSettings.flat(out=pathlib.Path("unused"), **{**base, "remat": plan.settings["remat"]}),
        PlanSettings(plan=True, topology=topology, compile=False),
    )
    return {
        "hardware": topology,
        "settings": {**base, "block_diffusion": SIZE},
        "remat": plan.settings["remat"],
        "why": plan.remat,
        "peak": plan.memory.peak,
        "estimate": plan.memory.estimate,
        "limit": plan.memory.limit,
        "fits": plan.fits,
        "compiled": plan.memory.compiled,
        "seconds": [plan.time.fast, plan.time.slow],
        "needed": {"two": plan.time.model_flops, "one": single.time.model_flops},
        "computed": {"two": two, "one": one},
        "versions": plan.versions,
        "date": report.now(),
    }


def main(settings: TwoStreamsSettings) -> None:
    """Writes the figures of every case, and prints them."""
    for name in settings.only:
        found = one_case(name, compiles=settings.compile)
        if found is None:
            continue
        report.add_json(settings.out, name, found)
        needed, computed = (found[key]["two"] / found[key]["one"] for key in ("needed", "computed"))
        print(
            f"{name}: remat {found['remat']}, peak {gib(found['peak'])} of {gib(found['limit'])} GiB; operations of the "
            f"step with one stream: {needed:.3f} times needed, {computed:.3f} times computed"
        )


if __name__ == "__main__":
    main(tyro.cli(TwoStreamsSettings, description=__doc__))
