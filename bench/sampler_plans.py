"""Compiles the sampler of Dream-7B for hardware that this machine does not have, and writes what the programs need.

    python bench/sampler_plans.py [--only v6e:2x4/1x8] [--out FILE]

Each program is compiled for 512 prompt tokens and 512 new ones, with the weights stored as the commands store them. The
result has the memory that the program needs on a device, the bytes of the weights that it copies, the bytes that a window
pass reads, and the processor time of the compilation. Needs the extra `plan` for TPUs, and `plan-gpu` for GPUs. On one
core, compiling a program takes seconds for a GPU and up to a minute for a TPU.
"""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import report
import sampler_modes
import tyro
from rich.console import Console
from rich.table import Table

import dream_jax
from dream_jax.model import Dream, LayerForm
from dream_jax.plan import traffic
from dream_jax.plan.hardware import find_hardware
from dream_jax.plan.report import gib
from dream_jax.quantisation import CodeKind
from dream_jax.sampler import SamplerConfig, WindowCache

CONFIG = dream_jax.PRESETS["dream-7b"]
PROMPT, NEW, BLOCK = 512, 512, 32
OPTIONS: Mapping[str, Any] = {"max_new_tokens": NEW, "steps": NEW, "alg": "entropy", "temperature": 0.2, "top_p": 0.95}
MODES = {
    "exact": SamplerConfig(**OPTIONS),
    "cached": SamplerConfig(**OPTIONS, block_length=BLOCK, cache=WindowCache()),
}
WINDOW_PASS = "window pass"


class Case(NamedTuple):
    """The settings of one program.

    Attributes:
      layers: the form of the layers.
      base: the kind of the codes of the kernels; None for bfloat16.
      mode: a key of `MODES`, or `WINDOW_PASS` for a program with one window pass only.
      batch: number of rows.
    """

    layers: LayerForm
    base: CodeKind | None
    mode: str
    batch: int


TPU_CASES = (
    Case("stacked", None, "exact", 1),
    Case("stacked", None, "cached", 1),
    Case("apart", None, "exact", 1),
)
GPU_FORMS: tuple[tuple[LayerForm, CodeKind | None], ...] = (("stacked", None), ("apart", None), ("apart", "int8"))
GPU_MODES = (("exact", 1), ("cached", 1), (WINDOW_PASS, 1), ("cached", 16))
GPU_CASES = (
    *(Case(layers, base, mode, batch) for layers, base in GPU_FORMS for mode, batch in GPU_MODES),
    Case("apart", "nf4", WINDOW_PASS, 1),
)
CASES: Mapping[str, tuple[Case, ...]] = {
    "v6e:2x4/1x8": TPU_CASES,
    "h200:1/1x1": GPU_CASES,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerPlansSettings:
    """The choice of programs to compile, and the result file."""

    only: tuple[str, ...] = tuple(CASES)
    """hardware and meshes, each as TOPOLOGY/MESH"""
    out: pathlib.Path = report.RESULTS / "sampler_plans.json"


def lower(model: Dream, mesh: jax.sharding.Mesh, case: Case) -> Any:
    """Returns the `jax.stages.Lowered` of the program of a case."""
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    if case.mode == WINDOW_PASS:
        window = 1 + BLOCK
        return sampler_modes.lower_window_pass(
            model, batch=case.batch, length=PROMPT + NEW, window=window, array_sharding=everywhere
        )
    config = MODES[case.mode]
    return sampler_modes.lower(model, config, batch=case.batch, prompt=PROMPT, array_sharding=everywhere)


def compiled(mesh: jax.sharding.Mesh, case: Case) -> dict[str, Any]:
    """Compiles one program; returns its figures: bytes of one device, and seconds of one core."""
    model = sampler_modes.abstract_model(CONFIG, mesh, layers=case.layers, base=case.base)
    begun = time.process_time()
    program = lower(model, mesh, case).compile()
    seconds = time.process_time() - begun
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None, "XLA reports the memory of programs for TPUs and GPUs"
    copies = traffic.weight_copies(text, least=sampler_modes.smallest_projection(model, mesh), weights="model")
    found = {
        "peak": memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes,
        "given": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "weights_copied": sum(copy.times * copy.nbytes for copy in copies),
        "compile_core_seconds": round(seconds, 1),
    }
    if case.mode == WINDOW_PASS:
        plain = sampler_modes.abstract_model(CONFIG, mesh, layers=case.layers, base=None)
        found |= {"weights_in_bfloat16": sampler_modes.weights_read(plain), "bytes_read": traffic.bytes_read(text)}
    return found


def main(settings: SamplerPlansSettings) -> None:
    """Compiles every program, writes the result after each, and prints a table."""
    console = Console()
    table = Table("program", "peak, GiB", "of", "temporaries, GiB", "weights copied, GiB", "compiled, s of a core")
    for name in settings.only:
        topology, _, shape = name.partition("/")
        hardware = find_hardware(topology)
        if hardware.missing is not None:
            console.print(f"{name}: {hardware.missing}")
            continue
        mesh = hardware.mesh(shape)
        assert isinstance(mesh, jax.sharding.Mesh), "a topology has devices if nothing is missing"
        for case in CASES[name]:
            found = compiled(mesh, case) | case._asdict() | {"hardware": topology, "mesh": shape}
            found |= {"limit": hardware.limit, "date": report.now()}
            library = "libtpu" if hardware.chip.platform == "tpu" else "jax-cuda12-plugin"
            found |= {"versions": report.versions(["jax", "jaxlib", library])}
            key = f"{name}/{case.layers}/{case.base or 'bfloat16'}/{case.mode}/{case.batch}"
            report.add_json(settings.out, key, found)
            sizes = (gib(found[size]) for size in ("peak", "limit", "temporaries", "weights_copied"))
            table.add_row(key, *sizes, str(found["compile_core_seconds"]))
            console.print(f"{key}: {gib(found['peak'])} GiB")
    console.print(table)


if __name__ == "__main__":
    main(tyro.cli(SamplerPlansSettings, description=__doc__))
