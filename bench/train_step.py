"""Measures the training step on the devices of this machine: tokens per second, MFU and memory.

    PYTHONPATH=. python bench/train_step.py --preset 7b-4096 [--mesh 1x1] [--remat full] [--torch] [--trace DIR]
    PYTHONPATH=. python bench/train_step.py --list

The step is that of training (`dream_jax.train_step`), with random weights and random tokens, all of which may be masked.
Flags override the settings of the preset. MFU counts 6 FLOPs per weight and token, attention over all pairs of tokens,
logits at masked positions only, and no recomputation, divided by the dense bfloat16 peak in `dream_jax.chips`. Memory is
both that of the compiler and the peak of the allocator. The result is added to FILE (--out) under the name of the preset.

`--torch` also runs the same step in plain PyTorch (`torch_reference.py`: SDPA, fused AdamW, bfloat16 autocast over float32
weights, activations of each layer recomputed unless --remat none, logits at masked positions only) on the same device. It
runs first and in a process of its own, because each framework keeps most of a GPU's memory until its process ends.

Needs jax, flax, optax, numpy, einops, jaxtyping, msgspec and psutil; for `--torch` also torch, transformers and
safetensors. `measure` alone, which bench/accelerator.py calls, needs no msgspec and no psutil.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import numpy as np
import profiles
import random_weights
import report
import torch_side

from dream_jax import float8, lora, sharding
from dream_jax.attention import Backend
from dream_jax.batch import Batch
from dream_jax.chips import chip_of
from dream_jax.config import PRESETS as MODELS
from dream_jax.config import DreamConfig
from dream_jax.float8 import Products
from dream_jax.flops import FlopCounter
from dream_jax.model import Dream, LayerForm, abstract_model, parameter_count, split_params
from dream_jax.optimizer import Moments, OptimizerConfig, OptimizerKind
from dream_jax.remat import Remat
from dream_jax.train_step import StepConfig, TrainStep, init_state, make_train_step, put_batch

GIB = 2**30
# The number of texts for which a packed row has entries: dream_jax.data.MOST_TEXTS, whose module needs more libraries.
MOST_TEXTS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainStepBenchSettings:
    """Settings of one measurement: the model, the batch, the mesh and the optimizer.

    `texts` is the number of texts in each row, which attend within themselves only (`train.py --pack`); with 0 each row is
    one text.
    """

    model: str = "dream-7b"
    layers: int | None = None
    batch: int = 1
    tokens: int = 2048
    texts: int = 0
    accumulation: int = 1
    mesh: str = "1x1"
    remat: Remat = "full"
    layer_form: LayerForm = "stacked"
    attention: Backend = "auto"
    compute_dtype: str = "bfloat16"
    products: Products = "compute"
    optimizer: OptimizerKind = "adamw"
    moments: Moments = "float32"
    moments_on_host: bool = False
    lora_rank: int = 0
    base_dtype: str = "bfloat16"
    warmup: int = 3
    steps: int = 10

    def config(self) -> DreamConfig:
        """Returns the configuration of the model, with `layers` layers if given."""
        config = MODELS[self.model]
        return config if self.layers is None else dataclasses.replace(config, num_hidden_layers=self.layers)


# These runs fit on one accelerator; with int8 moments, full fine-tuning of the 7B fits into 80 GB.
PRESETS: Mapping[str, TrainStepBenchSettings] = {
    "7b-2048": TrainStepBenchSettings(batch=8, tokens=2048, moments="int8"),
    "7b-4096": TrainStepBenchSettings(batch=4, tokens=4096, moments="int8"),
    "7b-lora-4096": TrainStepBenchSettings(batch=4, tokens=4096, lora_rank=32),
    "0.5b-2048": TrainStepBenchSettings(model="dream-0.5b", batch=16, tokens=2048),
    "small-cpu": TrainStepBenchSettings(
        model="small", batch=4, tokens=128, remat="none", compute_dtype="float32", warmup=1, steps=5
    ),
    "nano-cpu": TrainStepBenchSettings(
        model="nano", batch=32, tokens=64, remat="none", compute_dtype="float32", warmup=2, steps=10
    ),
}


def make_model(settings: TrainStepBenchSettings) -> Dream:
    """Returns a model with random weights; with an adapter, the base is stored in `base_dtype`."""
    return random_weights.filled(abstract_model_of(settings), sharding.make_mesh(settings.mesh))


def abstract_model_of(settings: TrainStepBenchSettings) -> Dream:
    """Returns the model of shapes, with its adapter if it has one."""
    model = abstract_model(
        settings.config(),
        compute_dtype=settings.compute_dtype,
        remat=settings.remat,
        param_dtype=settings.base_dtype if settings.lora_rank else "float32",
        attention_backend=settings.attention,
    )
    if not settings.lora_rank:
        return model
    return lora.attached_shapes(model, lora.LoraConfig(rank=settings.lora_rank, alpha=2 * settings.lora_rank))


def rows(settings: TrainStepBenchSettings) -> Batch[np.ndarray]:
    """Returns a batch of random tokens, in which every position may be masked."""
    shape = (settings.batch, settings.tokens)
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 256, shape).astype(np.int32)
    one_text = Batch(
        tokens_BT=tokens, maskable_BT=np.ones(shape, bool), row_B=np.arange(settings.batch, dtype=np.int32)
    )
    if not settings.texts:
        return one_text
    length_BM = np.zeros((settings.batch, MOST_TEXTS), np.int32)
    text_BM = np.full((settings.batch, MOST_TEXTS), -1, np.int32)
    for row in range(settings.batch):
        # The borders are at random positions, which differ from row to row.
        borders = np.sort(generator.choice(np.arange(1, settings.tokens), settings.texts - 1, replace=False))
        length_BM[row, : settings.texts] = np.diff(np.concatenate([[0], borders, [settings.tokens]]))
        text_BM[row, : settings.texts] = row * settings.texts + np.arange(settings.texts)
    return dataclasses.replace(one_text, length_BM=length_BM, text_BM=text_BM)


def span(batch: Batch[np.ndarray]) -> float | None:
    """Returns the mean number of tokens to which a token attends; None if these are all tokens of its row."""
    if batch.length_BM is None:
        return None
    return float(np.sum(np.square(batch.length_BM.astype(np.float64))) / batch.tokens_BT.size)


def optimizer_of(settings: TrainStepBenchSettings) -> OptimizerConfig:
    """Returns the optimizer of the step."""
    return OptimizerConfig(
        learning_rate=1e-5,
        total_steps=1000,
        kind=settings.optimizer,
        moments=settings.moments,
        moments_on_host=settings.moments_on_host,
    )


def make_step(settings: TrainStepBenchSettings, model: Dream, mesh: jax.sharding.Mesh) -> TrainStep:
    """Returns the training step for a model of arrays or shapes."""
    optimizer = optimizer_of(settings)
    config = StepConfig(
        global_batch=settings.batch,
        accumulation=settings.accumulation,
        layers=settings.layer_form,
        products=settings.products,
    )
    return make_train_step(split_params(model)[0], optimizer.make(), optimizer.schedule(), config, mesh)


def measure(
    settings: TrainStepBenchSettings,
    trace: pathlib.Path | None = None,
    doing: Callable[[str], None] = lambda what: None,
    known: Callable[..., None] = lambda **values: None,
) -> dict[str, Any]:
    """Returns the measurements of the step: seconds, tokens per second, MFU and memory (GiB).

    Args:
      settings: the settings of the measurement.
      trace: folder for a profile of one step after the timed ones, whose summary is added to the result; None for none.
      doing: is called with a description of what is done next.
      known: is called with values of the result as soon as they are known, before the next thing is done.
    """
    mesh = sharding.make_mesh(settings.mesh)
    optimizer_of(settings).check_devices(mesh)
    float8.check_devices(mesh, settings.products)
    doing("making the weights")
    model = make_model(settings)
    params = split_params(model)[1]
    trained, frozen = lora.split(params) if settings.lora_rank else (params, {})
    step = make_step(settings, model, mesh)
    flops = FlopCounter(model, settings.tokens)
    numbers: dict[str, float] = {"parameters": parameter_count(params), "trained": parameter_count(trained)}
    state = init_state(trained, optimizer_of(settings).make(), mesh, donate=True)
    del model, params, trained
    batch = put_batch(rows(settings), mesh)
    doing("compiling the step")
    begun = time.perf_counter()
    # This executable is also the one that runs: a call of `step` would compile the same program a second time.
    compiled = step.lower(state, batch, frozen).compile()
    numbers["compile_seconds"] = time.perf_counter() - begun
    memory = compiled.memory_analysis()
    planned = {name: getattr(memory, f"{name}_size_in_bytes") / GIB for name in ("argument", "output", "alias", "temp")}
    planned["host_temp"] = memory.host_temp_size_in_bytes / GIB
    known(**numbers, planned_gib_a_device=planned)
    seconds, losses, masked = [], [], []
    for number in range(settings.warmup + settings.steps):
        doing(f"step {number} of {settings.warmup + settings.steps}, of which {settings.warmup} are for warm-up")
        begun = time.perf_counter()
        state, metrics = compiled(state, batch, frozen)
        metrics = jax.device_get(jax.block_until_ready(metrics))
        elapsed = time.perf_counter() - begun
        if number >= settings.warmup:
            seconds.append(elapsed)
            losses.append(float(metrics["loss"]))
            masked.append(float(metrics["num_masked"]))
    median = report.summarize(seconds)["median_s"]
    tokens = settings.batch * settings.tokens
    total = flops.step(tokens, float(np.mean(masked)), span(rows(settings)))
    chip = chip_of(jax.devices()[0].device_kind)
    result = {
        **numbers,
        "planned_gib_a_device": planned,
        "allocator_peak_gib": [peak_bytes(device) for device in mesh.devices.flat],
        "seconds": report.summarize(seconds),
        "tokens_per_second": tokens / median,
        "tflop_a_step": total / 1e12,
        "tflops_a_device": total / median / mesh.size / 1e12,
        "mfu": None if chip is None else total / median / mesh.size / chip.peak_flops,
        "losses": losses,
    }
    known(**result)
    if trace is not None:
        doing("a profile of one step")
        # The traced step comes after the timed ones, so that tracing slows none of them.
        with jax.profiler.trace(str(trace)):
            jax.block_until_ready(compiled(state, batch, frozen))
        result["profile"] = profiles.summary(trace, compiled.as_text())
        known(profile=result["profile"])
    return result


def peak_bytes(device: jax.Device) -> float | None:
    """Returns the peak of the memory in use in GiB; None if the allocator does not count it (on a CPU)."""
    stats = device.memory_stats() or {}
    return stats["peak_bytes_in_use"] / GIB if "peak_bytes_in_use" in stats else None


def torch_settings(settings: TrainStepBenchSettings) -> dict[str, Any]:
    """Returns the arguments of `torch_side.train_step` for the same model and batch."""
    return {
        "config": settings.config().to_dict(),
        "batch": settings.batch,
        "tokens": settings.tokens,
        "recompute": settings.remat != "none",
        "bfloat16": settings.compute_dtype == "bfloat16",
        "warmup": settings.warmup,
        "steps": settings.steps,
    }


def measure_torch(settings: TrainStepBenchSettings) -> dict[str, Any]:
    """Measures the same model and batch in plain PyTorch in a new process, on the first GPU or else on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        result = pathlib.Path(folder) / "torch.json"
        arguments = ["train_step", json.dumps(torch_settings(settings)), str(result)]
        subprocess.run([sys.executable, torch_side.__file__, *arguments], check=True)
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def main() -> None:
    """Measures, prints and adds the result to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="nano-cpu")
    parser.add_argument("--list", action="store_true", help="print the presets and exit")
    parser.add_argument("--torch", action="store_true", help="also measure plain PyTorch")
    parser.add_argument("--trace", type=pathlib.Path, help="folder for a profile of one step")
    parser.add_argument("--out", type=pathlib.Path, default=report.RESULTS / "train_step.json")
    for field in dataclasses.fields(TrainStepBenchSettings):
        choices = {
            "remat": get_args(Remat),
            "layer_form": get_args(LayerForm),
            "products": get_args(Products),
            "attention": get_args(Backend),
            "moments": get_args(Moments),
        }
        flag = "--" + field.name.replace("_", "-")
        if field.type == "bool":
            parser.add_argument(flag, action="store_true", default=None)
        else:
            kind = int if "int" in str(field.type) else str
            parser.add_argument(flag, type=kind, choices=choices.get(field.name))
    given = vars(parser.parse_args())
    if given["list"]:
        for name, preset in PRESETS.items():
            print(f"{name}: {preset}")
        return
    changes = {field.name: given[field.name] for field in dataclasses.fields(TrainStepBenchSettings)}
    settings = dataclasses.replace(
        PRESETS[given["preset"]], **{name: value for name, value in changes.items() if value is not None}
    )
    print(settings, flush=True)
    other_work = report.OtherWork()
    # PyTorch's process ends before jax takes the memory of the GPU.
    torch_result = measure_torch(settings) if given["torch"] else None
    sharding.make_mesh(settings.mesh)  # must run before the backend starts, so that a CPU provides the devices
    result: dict[str, Any] = {
        "date": report.now(),
        "hardware": {**report.hardware(), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"},
        "versions": report.versions(["jax", "jaxlib", "flax", "optax", "numpy"]),
        "settings": dataclasses.asdict(settings),
        "jax": measure(settings, given["trace"]),
    }
    if torch_result is not None:
        result["torch"] = torch_result
        result["torch_over_jax"] = result["torch"]["seconds"]["median_s"] / result["jax"]["seconds"]["median_s"]
    result["other_work"] = other_work.share()
    for side in ("jax", "torch"):
        for name, value in result.get(side, {}).items():
            print(f"{side} {name}: {value}")
    report.add_json(given["out"], given["preset"], result)
    print(f"added {given['preset']} to {given['out']}")


if __name__ == "__main__":
    main()
