"""Compiles the sampler of Dream-7B for TPUs that this machine does not have, and writes the memory that it needs.

    python bench/sampler_plans.py [--only v6e:2x4/1x8] [--out FILE]

Each mesh and mode is compiled for 512 prompt tokens and 512 new tokens, bfloat16 weights, and batches of 1 and 16 rows. The
peak memory of a device is that of the compiler. Needs the extra `plan`; a program takes about a minute on two cores.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import report
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table

import dream_jax
from dream_jax import sharding
from dream_jax.model import Dream, abstract_model
from dream_jax.plan.hardware import find_hardware
from dream_jax.plan.report import gib
from dream_jax.sampler import SamplerConfig, WindowCache
from dream_jax.sampler.loop import denoise
from dream_jax.sampler.state import DynamicSettings, StaticSettings

HARDWARE_AND_MESH = ("v6e:2x4/1x8", "v6e:2x4/2x4", "v5p:2x2x1/1x4")
PROMPT, NEW, BLOCK = 512, 512, 32
BATCHES = (1, 16)
OPTIONS: Mapping[str, Any] = {"max_new_tokens": NEW, "steps": NEW, "alg": "entropy", "temperature": 0.2, "top_p": 0.95}
MODES = {
    "exact": SamplerConfig(**OPTIONS),
    "cached": SamplerConfig(**OPTIONS, block_length=BLOCK, cache=WindowCache()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerPlansSettings:
    """The choice of programs to compile, and the result file."""

    only: tuple[str, ...] = HARDWARE_AND_MESH
    """hardware and meshes, each as TOPOLOGY/MESH"""
    out: pathlib.Path = report.RESULTS / "sampler_plans.json"


def sharded_shapes(mesh: jax.sharding.Mesh) -> Dream:
    """Returns an abstract Dream-7B: shapes in bfloat16 with their shardings over the mesh."""
    graphdef, state = nnx.split(abstract_model(dream_jax.PRESETS["dream-7b"], param_dtype=jnp.bfloat16))
    params = nnx.to_pure_dict(state)
    sharded = jax.tree.map(
        lambda leaf, leaf_sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf_sharding),
        params,
        sharding.parameter_shardings(params, mesh),
    )
    nnx.replace_by_pure_dict(state, sharded)
    return nnx.merge(graphdef, state)


def compiled(mesh: jax.sharding.Mesh, config: SamplerConfig, batch: int) -> dict[str, Any]:
    """Compiles one program; returns its memory per device in bytes, and the compile time in seconds."""
    model = sharded_shapes(mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shape(like: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=everywhere)

    canvas = jax.ShapeDtypeStruct((batch, PROMPT + NEW), jnp.int32, sharding=everywhere)
    valid = jax.ShapeDtypeStruct(canvas.shape, jnp.bool_, sharding=everywhere)
    keys = shape(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)))
    static = StaticSettings.of(config, NEW, [NEW])
    dynamic = jax.tree.map(shape, DynamicSettings.of(config, static.steps, [NEW] * batch))
    begun = time.monotonic()
    with sharding.mesh_context(model):
        program = denoise.lower(model, canvas, valid, keys, dynamic, None, static=static).compile()
    memory = program.memory_analysis()
    assert memory is not None, "XLA reports the memory of programs for TPUs"
    found = {
        "peak": memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
        "given": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "compile_seconds": round(time.monotonic() - begun, 1),
    }
    return found


def main(settings: SamplerPlansSettings) -> None:
    """Compiles every program, writes the result after each, and prints a table."""
    console = Console()
    table = Table("hardware", "mesh", "mode", "rows", "peak, GiB", "of", "compiled, s")
    for name in settings.only:
        topology, _, shape = name.partition("/")
        hardware = find_hardware(topology)
        mesh = hardware.mesh(shape)
        assert isinstance(mesh, jax.sharding.Mesh), "a named topology has devices to compile for"
        for mode, config in MODES.items():
            for batch in BATCHES:
                if batch % dict(mesh.shape)["fsdp"]:
                    continue
                found = compiled(mesh, config, batch)
                found |= {"limit": hardware.limit, "date": report.now()}
                found |= {"versions": report.versions(["jax", "jaxlib", "libtpu"])}
                report.add_json(settings.out, f"{name}/{mode}/{batch}", found)
                cells = (gib(found["peak"]), gib(found["limit"]), str(found["compile_seconds"]))
                table.add_row(topology, shape, mode, str(batch), *cells)
                console.print(f"{name} {mode} {batch}: {gib(found['peak'])} GiB")
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(SamplerPlansSettings, description=__doc__))
