"""Times dream_jax and PyTorch in one run on one machine, with the same weights, in float32 on the CPU.

    python bench/compare_pytorch.py [--only forward|train|sampler] [--repeats 7] [--out FILE]

There are three workloads on the preset `small` (few small layers with the vocabulary of Dream-7B, 152,064 tokens): a
forward pass with all logits, a training step, and sampling. Both sides must first agree: logits within 1e-3 absolute,
losses within 1e-4 relative. Then all are warmed up, and the timed runs alternate, so that a change in the speed of the
machine affects all of them.

`torch` is the published algorithm in eager PyTorch (`torch_reference.py`). `torch_masked_rows` computes logits at masked
positions only, which shows how much of a difference is due to the algorithm and how much to the framework. `jax` is this
project through its public functions. Needs the extra `bench`.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import numpy as np
import report
import torch
import torch_reference as reference
import tyro
from rich.console import Console
from rich.table import Table

import dream_jax
from dream_jax import objective, sharding, train_step
from dream_jax.batch import Batch
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.model import split_params

LOGITS_TOLERANCE = 1e-3  # absolute
LOSS_TOLERANCE = 1e-4  # relative
CHECKED_TRAIN_STEPS = 3
MOST_OTHER_WORK = 0.05  # maximum share of the cores that other processes may use
IDLE_CHECK_SECONDS = 3.0
SETTLE_SECONDS = 0.05  # until the worker threads of the other framework stop spinning

Workload = Literal["forward", "train", "sampler"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyTorchComparisonSettings:
    """Sizes of the workloads, and how often each runs."""

    only: Workload | None = None
    """The only workload to run; by default all three run."""
    repeats: int = 7
    """Number of timed runs of each side."""
    warmup: int = 2
    """Number of runs of each side before the timed ones."""
    out: pathlib.Path | None = None
    """Result file; by default bench/results/pytorch_cpu.json, or pytorch_cpu_WORKLOAD.json with --only."""
    preset: str = "small"
    """Name of the architecture in `dream_jax.config.PRESETS`."""
    allow_busy: bool = False
    """Measure even while other processes compute. The result records their share, and should not be quoted."""
    seed: int = 0
    """Seed of the weights, tokens and masked positions."""
    forward_batch: int = 2
    forward_length: int = 512
    train_batch: int = 4
    train_length: int = 256
    learning_rate: float = 1e-5
    prompt_length: int = 64
    new_tokens: int = 64
    steps: int = 16
    temperature: float = 0.2
    top_p: float = 0.95

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"{self.preset=} is not one of {sorted(PRESETS)}")
        if self.repeats < 1 or self.warmup < 1:
            raise ValueError(f"{self.repeats=} and {self.warmup=} must be at least 1")

    @property
    def result_path(self) -> pathlib.Path:
        """The result file: `out`, or its default."""
        name = "pytorch_cpu.json" if self.only is None else f"pytorch_cpu_{self.only}.json"
        return self.out or report.RESULTS / name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sides:
    """One model with the same weights in both frameworks."""

    torch: Any
    jax: Any
    config: DreamConfig


# ------------------------------------------------------------------------------------------- weights and data


def make_sides(settings: PyTorchComparisonSettings) -> Sides:
    """Draws random weights in torch, and loads them in jax from a Hugging Face directory."""
    config = PRESETS[settings.preset]
    model = reference.random_model(config.to_dict(), seed=settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_model(model, config.to_dict(), folder)
        loaded = dream_jax.load(folder, dtype="float32")
    return Sides(torch=model, jax=loaded, config=config)


def random_tokens(settings: PyTorchComparisonSettings, config: DreamConfig, batch: int, length: int) -> np.ndarray:
    """Returns random token ids int64 [B, T], none of them special tokens."""
    special = min(config.mask_token_id, config.pad_token_id)
    return np.random.default_rng(settings.seed).integers(0, special, (batch, length))


def require_equal_logits(sides: Sides, tokens_BT: np.ndarray) -> float:
    """Returns the largest difference of the logits. Raises AssertionError if it exceeds LOGITS_TOLERANCE."""
    with torch.inference_mode():
        theirs = reference.logits(sides.torch, torch.from_numpy(tokens_BT)).numpy()
    difference = float(np.abs(theirs - np.asarray(sides.jax(tokens_BT))).max())
    if not difference <= LOGITS_TOLERANCE:
        raise AssertionError(f"logits differ by {difference:.2g}, more than {LOGITS_TOLERANCE}; nothing was timed")
    return difference


# ----------------------------------------------------------------------------------------------------- timing


def require_quiet(other_share: float, settings: PyTorchComparisonSettings) -> None:
    """Raises RuntimeError if other processes use the machine, because they do not slow both sides equally.

    The OpenMP threads of torch wait for each other by spinning. While another process used one of two cores, a run of 0.2 s
    took up to 4 s in torch, while jax was hardly slower, so the ratio would mean nothing.
    """
    if other_share > MOST_OTHER_WORK and not settings.allow_busy:
        raise RuntimeError(
            f"other processes use {other_share:.0%} of the cores, more than {MOST_OTHER_WORK:.0%}; "
            f"wait until they have ended, or pass --allow-busy to try the script"
        )


def time_alternating(runs: Mapping[str, Callable[[], Any]], settings: PyTorchComparisonSettings) -> dict[str, Any]:
    """Runs A B C A B C ..., and returns the times of each and the ratio of its median to that of "jax"."""
    for _ in range(settings.warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    other_work = report.OtherWork()
    for _ in range(settings.repeats):
        for name, run in runs.items():
            gc.collect()
            time.sleep(SETTLE_SECONDS)
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    other_share = other_work.share()
    require_quiet(other_share, settings)
    result: dict[str, Any] = {name: report.summarize(values) for name, values in seconds.items()}
    result["other_work_share"] = other_share
    for name in runs:
        if name != "jax":
            result[f"{name}_over_jax"] = result[name]["median_s"] / result["jax"]["median_s"]
    return result


# -------------------------------------------------------------------------------------------------- workloads


def compare_forward(sides: Sides, settings: PyTorchComparisonSettings) -> dict[str, Any]:
    """Compares the time of the logits, float32 [B, T, V], of a batch without padding."""
    tokens_BT = random_tokens(settings, sides.config, settings.forward_batch, settings.forward_length)
    agreement = {"logits_max_difference": require_equal_logits(sides, tokens_BT)}
    torch_tokens = torch.from_numpy(tokens_BT)
    jax_tokens = jax.numpy.asarray(tokens_BT, jax.numpy.int32)

    @torch.inference_mode()
    def run_torch() -> None:
        reference.logits(sides.torch, torch_tokens)

    runs = {
        "torch": run_torch,
        "jax": lambda: jax.block_until_ready(sides.jax(jax_tokens)),
    }
    return {"agreement": agreement, **time_alternating(runs, settings)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JaxTraining:
    """The training step of dream_jax on one batch, and the noise and learning rates of its steps for use in torch."""

    step: Callable[[], float]
    """Runs the next step and returns the loss before its update."""
    noise: Callable[[int], tuple[np.ndarray, np.ndarray]]
    """The masked positions, bool [B, T], and the noise levels, float32 [B], of the i-th step."""
    learning_rate: Callable[[int], float]
    """The learning rate of the i-th step."""


def make_jax_training(
    sides: Sides, settings: PyTorchComparisonSettings, tokens_BT: np.ndarray, num_steps: int
) -> JaxTraining:
    """Builds the training step of dream_jax, on random masks of the given tokens, for `num_steps` steps."""
    mesh = sharding.make_mesh("1x1")
    optimizer = train_step.OptimizerConfig(learning_rate=settings.learning_rate, total_steps=num_steps)
    schedule = optimizer.schedule()
    config = train_step.StepConfig(global_batch=len(tokens_BT), seed=settings.seed)
    graphdef, params = split_params(sides.jax)
    step = train_step.make_train_step(graphdef, optimizer.make(), schedule, config, mesh)
    state = train_step.init_state(params, optimizer.make(), mesh)
    maskable_BT = np.ones(tokens_BT.shape, bool)
    row_B = np.arange(len(tokens_BT), dtype=np.int32)
    rows = Batch(tokens_BT=tokens_BT.astype(np.int32), maskable_BT=maskable_BT, row_B=row_B)
    batch = train_step.put_batch(rows, mesh)

    def run() -> float:
        nonlocal state
        state, metrics = step(state, batch)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    def noise(index: int) -> tuple[np.ndarray, np.ndarray]:
        key = train_step.noise_key(config.seed, index)
        t_B, masked_BT = objective.draw_noise(key, row_B, maskable_BT, len(tokens_BT))
        return np.array(masked_BT), np.array(t_B)

    return JaxTraining(step=run, noise=noise, learning_rate=lambda index: float(schedule(index)))


def compare_train(sides: Sides, settings: PyTorchComparisonSettings) -> dict[str, Any]:
    """Compares the time of a training step (CART loss, gradients, clipping, AdamW) on the same masks and rates."""
    tokens_BT = random_tokens(settings, sides.config, settings.train_batch, settings.train_length)
    logits_difference = require_equal_logits(sides, tokens_BT)
    num_steps = CHECKED_TRAIN_STEPS + settings.warmup + settings.repeats
    training = make_jax_training(sides, settings, tokens_BT, num_steps)
    noise = [training.noise(index) for index in range(num_steps)]
    optimizer = reference.adamw(sides.torch, learning_rate=settings.learning_rate)
    torch_tokens = torch.from_numpy(tokens_BT)

    def make_torch_step(head_rows: reference.HeadRows, first: int) -> Callable[[], float]:
        steps = iter(range(first, num_steps))

        def run() -> float:
            index = next(steps)
            masked_BT, t_B = map(torch.from_numpy, noise[index])
            optimizer.param_groups[0]["lr"] = training.learning_rate(index)
            return reference.train_step(
                sides.torch,
                optimizer,
                torch_tokens,
                masked_BT,
                t_B,
                mask_token_id=sides.config.mask_token_id,
                head_rows=head_rows,
            )

        return run

    run_torch = make_torch_step("all", first=0)
    losses = [(run_torch(), training.step()) for _ in range(CHECKED_TRAIN_STEPS)]
    difference = max(abs(theirs / ours - 1) for theirs, ours in losses)
    if not difference <= LOSS_TOLERANCE:
        raise AssertionError(f"losses of torch and jax differ by {difference:.2g} relative: {losses}")
    agreement = {
        "logits_max_difference": logits_difference,
        "losses_torch_jax": losses,
        "loss_max_relative_difference": difference,
    }
    # The torch contestants share one model and optimizer, because the time of a step does not depend on the values.
    runs = {
        "torch": run_torch,
        "torch_masked_rows": make_torch_step("masked", first=CHECKED_TRAIN_STEPS),
        "jax": training.step,
    }
    masked_share = float(np.mean([masked_BT.mean() for masked_BT, _ in noise]))
    return {"agreement": agreement, "masked_share": masked_share, **time_alternating(runs, settings)}


def compare_sampler(sides: Sides, settings: PyTorchComparisonSettings) -> dict[str, Any]:
    """Compares the time of sampling from one prompt by entropy; every jax run gets a new random key."""
    prompt_BP = random_tokens(settings, sides.config, 1, settings.prompt_length)
    canvas_BT = np.pad(prompt_BP, ((0, 0), (0, settings.new_tokens)), constant_values=sides.config.mask_token_id)
    agreement: dict[str, Any] = {"logits_max_difference": require_equal_logits(sides, canvas_BT)}
    options = {
        "max_new_tokens": settings.new_tokens,
        "steps": settings.steps,
        "alg": "entropy",
        "temperature": settings.temperature,
        "top_p": settings.top_p,
    }

    def run_torch(head_rows: reference.HeadRows, **changes: Any) -> np.ndarray:
        tokens = reference.diffusion_generate(
            sides.torch,
            torch.from_numpy(prompt_BP),
            reference.SamplerSettings(**{**options, **changes}),
            mask_token_id=sides.config.mask_token_id,
            head_rows=head_rows,
        )
        return tokens.numpy()

    keys = (jax.random.key(settings.seed + i) for i in itertools.count())

    def run_jax(**changes: Any) -> dream_jax.Sample:
        config = dream_jax.SamplerConfig(**{**options, **changes})
        return jax.block_until_ready(dream_jax.generate(sides.jax, prompt_BP, config, key=next(keys)))

    # Reported but not required: with random weights two confidences may be equal to within rounding.
    greedy = run_torch("all", temperature=0.0) == np.asarray(run_jax(temperature=0.0).tokens)
    agreement["greedy_equal_new_tokens"] = int(greedy[:, settings.prompt_length :].sum())
    agreement["greedy_new_tokens"] = settings.new_tokens
    runs: dict[str, Callable[[], Any]] = {
        "torch": lambda: run_torch("all"),
        "torch_masked_rows": lambda: run_torch("masked"),
        "jax": run_jax,
    }
    return {
        "agreement": agreement,
        "jax_forwards": int(run_jax().forwards),
        **time_alternating(runs, settings),
    }


WORKLOADS: Mapping[Workload, Callable[[Sides, PyTorchComparisonSettings], dict[str, Any]]] = {
    "forward": compare_forward,
    "sampler": compare_sampler,
    "train": compare_train,  # last: it changes the weights
}


# ------------------------------------------------------------------------------------------------------- main


def print_table(results: Mapping[str, dict[str, Any]], console: Console) -> None:
    """One row per workload and contestant."""
    table = Table("workload", "contestant", "median, s", "least, s", "times jax")
    for workload, result in results.items():
        for name in ("torch", "torch_masked_rows", "jax"):
            if name in result:
                ratio = 1.0 if name == "jax" else result[f"{name}_over_jax"]
                median, least = result[name]["median_s"], result[name]["min_s"]
                table.add_row(workload, name, f"{median:.3f}", f"{least:.3f}", f"{ratio:.2f}")
        table.add_section()
    console.print(table)


def main(settings: PyTorchComparisonSettings) -> None:
    """Runs the comparisons, prints the table and writes the result."""
    console = Console()
    console.print(settings)
    torch.set_num_threads(report.num_cores())  # XLA takes every core it may run on, too
    other_work = report.OtherWork()
    time.sleep(IDLE_CHECK_SECONDS)
    require_quiet(other_work.share(), settings)
    console.print("making the weights")
    sides = make_sides(settings)
    results: dict[str, dict[str, Any]] = {}
    for name, compare in WORKLOADS.items():
        if settings.only in (None, name):
            console.print(f"comparing: {name}")
            results[name] = compare(sides, settings)
            console.print(results[name]["agreement"])
    print_table(results, console)
    plain = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    report.write_json(
        settings.result_path,
        {
            "date": report.now(),
            "hardware": {
                **report.hardware(),
                "torch_threads": torch.get_num_threads(),
                # torch waits by spinning unless this is "passive": run with both, and quote torch's better
                # one.
                "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            },
            "versions": report.versions(["torch", "transformers", "jax", "jaxlib", "flax", "optax", "numpy"]),
            "settings": {
                **plain,
                "dtype": "float32",
                "torch_mode": "eager",
                "architecture": sides.config.to_dict(),
            },
            "results": results,
        },
    )
    console.print(f"wrote {settings.result_path}")


if __name__ == "__main__":
    main(tyro.cli(PyTorchComparisonSettings, description=__doc__))
