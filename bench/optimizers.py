"""Compares optimizer states, or products, of different precision: trains one model with each variant and seed.

    python bench/optimizers.py [--steps 600] [--seeds 0 1 2] [--variants float32 int8] [--out FILE]
    python bench/optimizers.py --variants bfloat16-products fp8-products --out bench/results/products.json

Each run is `dream_jax.trainer.train` on sudoku; for one seed all variants use the same data, noise and initial weights.
Writes FILE (JSON: for each variant the last losses, held-out accuracy and likelihood, bytes of state, and the difference
from the first variant with its standard error) and the curves as CSV in the same folder: variant, seed, step, loss, nll,
grad_norm.
Needs the extra `bench`.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import pathlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import report
import tyro
from rich.console import Console
from rich.table import Table

from dream_jax import pretrained
from dream_jax.model import split_params
from dream_jax.optimizer import state_bytes
from dream_jax.trainer import Diverged, TrainSettings, train

OptimizerVariant = Literal["float32", "bfloat16", "int8", "adafactor", "bfloat16-products", "fp8-products"]
CHOICES: Mapping[str, Mapping[str, str]] = {
    "float32": {},
    "bfloat16": {"moments": "bfloat16"},
    "int8": {"moments": "int8"},
    "adafactor": {"optimizer": "adafactor"},
    # With float32 moments; fp8 is emulated, because only GPUs have it, with the roundings that a GPU would make.
    "bfloat16-products": {"compute_dtype": "bfloat16"},
    "fp8-products": {"compute_dtype": "bfloat16", "products": "fp8-emulated"},
}
CURVE = ("loss", "nll", "grad_norm")
LAST = 50  # number of last steps whose mean is the last loss; the loss of one step depends mostly on its noise level t


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerBenchSettings:
    """Size of the runs, and which variants are compared."""

    steps: int = 600
    """steps of each run"""
    batch_size: int = 64
    """rows per step"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of weights, data order and noise; each variant runs with each seed"""
    variants: tuple[OptimizerVariant, ...] = ("float32", "bfloat16", "int8", "adafactor")
    """variants to run; each is compared with the first one"""
    mesh: str = "1x1"
    """Mesh of the devices, as for train.py."""
    model: str = "nano"
    """A preset, or the directory of a model."""
    data: str = "sudoku"
    """Data, as for train.py."""
    eval_rows: int = 200
    """Number of held-out rows that are evaluated at the end of each run."""
    out: pathlib.Path = report.RESULTS / "optimizers.json"
    """Result file; the curves are written to the same folder."""

    def __post_init__(self) -> None:
        if not self.seeds or not self.variants:
            raise ValueError(f"{self.seeds=} and {self.variants=} must not be empty")
        self.training("float32", 0, pathlib.Path("unused"))  # wrong settings raise before the first run

    def training(self, variant: str, seed: int, out: pathlib.Path) -> TrainSettings:
        """Returns the training settings of the run of one variant and seed."""
        return TrainSettings.flat(
            mesh=self.mesh,
            model=self.model,
            data=self.data,
            out=out,
            steps=self.steps,
            batch_size=self.batch_size,
            save_every=self.steps,
            eval_rows=self.eval_rows,
            seed=seed,
            **CHOICES[variant],
        )


def one_run(
    settings: OptimizerBenchSettings, variant: str, seed: int, folder: pathlib.Path
) -> tuple[dict[str, Any], list[Any]]:
    """Trains one variant with one seed; returns the result of the run, and the rows of its curve."""
    training = settings.training(variant, seed, folder / f"{variant}-{seed}")
    try:
        summary = train(training)
    except Diverged as diverged:
        return {"seed": seed, "diverged": str(diverged)}, curve(training.run.out)
    rows = curve(training.run.out)
    last = rows[-LAST:]
    result = {
        "seed": seed,
        "last_loss": statistics.fmean(row["loss"] for row in last),
        "last_nll": statistics.fmean(row["nll"] for row in last),
        "largest_grad_norm": max(row["grad_norm"] for row in rows),
        "eval": summary["eval"],
        "seconds": summary["seconds"],
    }
    return result, rows


def curve(run: pathlib.Path) -> list[dict[str, float]]:
    """Returns the rows of the metrics.csv of a run, with the columns step and `CURVE`."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: float(row[name]) for name in ("step", *CURVE)} for row in csv.DictReader(file)]


def compare(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Returns, for each variant but the first, its last nll minus that of the first: the mean and the standard error."""
    found: dict[str, Any] = {}
    first = next(iter(results))
    base = {run["seed"]: run["last_nll"] for run in results[first] if "last_nll" in run}
    for variant, runs in results.items():
        pairs = [run["last_nll"] - base[run["seed"]] for run in runs if "last_nll" in run and run["seed"] in base]
        if variant == first or not pairs:
            continue
        error = statistics.stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.nan
        found[variant] = {
            f"nll_minus_{first}": statistics.fmean(pairs),
            "standard_error": None if math.isnan(error) else error,
            "relative": statistics.fmean(pairs) / statistics.fmean(base.values()),
        }
    return found


def main(settings: OptimizerBenchSettings) -> None:
    """Runs all variants and seeds, prints a table and writes both files."""
    console = Console()
    console.print(settings)
    other_work = report.OtherWork()
    results: dict[str, list[dict[str, Any]]] = {}
    curves: list[dict[str, Any]] = []
    sizes: dict[str, int] = {}
    shapes = split_params(pretrained.describe(settings.model, layers="stacked"))[1]
    with tempfile.TemporaryDirectory() as folder:
        for variant in settings.variants:
            optimizer = settings.training(variant, 0, pathlib.Path(folder)).optimizer_config()
            sizes[variant] = state_bytes(jax.eval_shape(optimizer.make().init, shapes))
            results[variant] = []
            for seed in settings.seeds:
                console.rule(f"{variant}, seed {seed}")
                result, rows = one_run(settings, variant, seed, pathlib.Path(folder))
                results[variant].append(result)
                curves += [{"variant": variant, "seed": seed, **row} for row in rows]
    differences = compare(results)
    table = Table(
        "variant",
        "state, bytes",
        f"nll of the last {LAST} steps, by seed",
        f"less that of {settings.variants[0]}",
        "exact",
    )
    for name, runs in results.items():
        difference = differences.get(name)
        table.add_row(
            name,
            f"{sizes[name]:,}",
            " ".join(f"{run['last_nll']:.4f}" if "last_nll" in run else "diverged" for run in runs),
            ""
            if difference is None
            else f"{difference[f'nll_minus_{settings.variants[0]}']:+.4f} +- {difference['standard_error'] or 0:.4f}",
            " ".join(f"{run['eval'].get('exact_accuracy', math.nan):.3f}" for run in runs if "eval" in run),
        )
    console.print(table)
    plain = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    report.write_json(
        settings.out,
        {
            "date": report.now(),
            "hardware": {**report.hardware(), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"},
            "other_work": other_work.share(),
            "versions": report.versions(["jax", "jaxlib", "flax", "optax", "numpy"]),
            "settings": plain,
            "state_bytes": sizes,
            "results": results,
            f"against_{settings.variants[0]}": differences,
        },
    )
    with settings.out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("variant", "seed", "step", *CURVE))
        writer.writeheader()
        writer.writerows({**row, "step": int(row["step"])} for row in curves)
    console.print(f"wrote {settings.out} and {settings.out.with_suffix('.csv').name}")


if __name__ == "__main__":
    main(tyro.cli(OptimizerBenchSettings, description=__doc__))
