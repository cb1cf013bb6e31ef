"""What the accelerator benchmark measures: the table of its stages, from the most to the least important.

A stage is one process. To measure another setting, add a row here, such as `cached(4, 3)` for 4 rows and 3 tokens a pass;
`small` derives the shapes for a CPU from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One process of the benchmark.

    Attributes:
      name: the name of its result file, and what `--only` takes.
      module: the module of `stages` whose `run` measures it.
      options: the argument of `run`.
      limit_s: number of seconds after which the process is ended. Its results until then are kept.
      needs_s: the stage is skipped if fewer seconds are left.
    """

    name: str
    module: str
    options: Mapping[str, Any]
    limit_s: float
    needs_s: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.needs_s <= self.limit_s:
            raise ValueError(f"stage {self.name}: {self.needs_s=} must be above 0 and at most {self.limit_s=}")


_SAMPLER: Mapping[str, Any] = {"model": "dream-7b", "prompt": 512, "new": 512, "block": 32}
_STEP: Mapping[str, Any] = {
    "model": "dream-7b",
    "batch": 4,
    "tokens": 4096,
    "moments": "int8",
    "remat": "full",
    "warmup": 1,
    "steps": 3,
}
# The policy that `--remat auto` takes on an H200 for this step, and for the same step with an adapter, see docs/memory.md.
AUTO = "products"
_ATTENTION = {"batch": 4, "queries": 2048, "keys": 2048, "heads": 28, "kv_heads": 4, "head_dim": 128}


BLOCK_DIFFUSION = "block diffusion"
"""The mode of rows that sample from a model of block diffusion, with its exact cache."""


def exact(batch: int, passes: int, **more: Any) -> dict[str, Any]:
    """Returns a row of a sampler stage without a cache."""
    return {"mode": "exact", "batch": batch, "passes": passes, **more}


def cached(batch: int, tokens_a_pass: int, **more: Any) -> dict[str, Any]:
    """Returns a row of a sampler stage with `WindowCache()` and blocks."""
    return {"mode": "cached", "batch": batch, "tokens_a_pass": tokens_a_pass, **more}


def block_diffusion(batch: int, tokens_a_pass: int, **more: Any) -> dict[str, Any]:
    """Returns a row of a sampler stage with `BlockCache()`."""
    return {"mode": BLOCK_DIFFUSION, "batch": batch, "tokens_a_pass": tokens_a_pass, **more}


def _sampling(name: str, rows: list[dict[str, Any]], limit_s: float, **changes: Any) -> Stage:
    return Stage(name=name, module="sampling", options={**_SAMPLER, **changes, "rows": rows}, limit_s=limit_s)


def _training(
    name: str,
    limit_s: float = 75.0,
    profile: bool = False,
    otherwise: Sequence[str] = (),
    flags: str | None = None,
    **changes: Any,
) -> Stage:
    options = {"settings": {**_STEP, **changes}, "profile": profile, "otherwise": otherwise, "flags": flags}
    return Stage(name=name, module="training", options=options, limit_s=limit_s, needs_s=30.0)


def _torch_row(name: str, head_rows: str, **more: Any) -> dict[str, Any]:
    sizes = {"batch": 1, "prompt": 512, "new_tokens": 512, "steps": 32}
    return {"name": name, **sizes, "head_rows": head_rows, **more}


STAGES: tuple[Stage, ...] = (
    Stage(
        name="ceilings",
        module="ceilings",
        options={"size": 8192, "mib": 2048, "seconds": 0.5},
        limit_s=45.0,
        needs_s=10.0,
    ),
    _sampling(
        "sample-apart",
        [
            exact(1, 32, profile=True),
            cached(1, 4, profile=True),
            cached(1, 1, repeats=1),
            exact(16, 8, repeats=1),
            cached(16, 4, repeats=1),
        ],
        limit_s=120.0,
        layers="apart",
    ),
    _training("train-int8"),
    _sampling(
        "sample-blocks",
        [block_diffusion(1, 4), block_diffusion(16, 4, repeats=1)],
        limit_s=75.0,
        layers="apart",
    ),
    _training("train-auto", profile=True, remat=AUTO, otherwise=("except-up", "except-mlp")),
    _training("train-fp8", products="fp8", remat=AUTO, otherwise=("except-up", "except-mlp")),
    _training("train-lora-auto", lora_rank=32, moments="float32", remat=AUTO),
    _training("train-lora", lora_rank=32, moments="float32"),
    _sampling(
        "sample-int8",
        [cached(1, 1, repeats=1), cached(1, 4), exact(1, 32)],
        limit_s=75.0,
        layers="apart",
        base="int8",
    ),
    Stage(
        name="torch-sampler",
        module="pytorch",
        options={
            "work": "sampler",
            "model": "dream-7b",
            "rows": [_torch_row("all rows", "all"), _torch_row("masked rows", "masked")],
        },
        limit_s=60.0,
    ),
    Stage(
        name="attention-odd",
        module="attention_check",
        options={"shape": _ATTENTION, "odd": True, "repeats": 0},
        limit_s=45.0,
        needs_s=15.0,
    ),
    Stage(
        name="attention",
        module="attention_check",
        options={"shape": _ATTENTION, "repeats": 5},
        limit_s=60.0,
    ),
    _training("train-packed", texts=8),
    _training("train-float32", moments="float32"),
    _sampling("sample-stacked", [exact(1, 32), cached(1, 4), cached(1, 1, repeats=1)], limit_s=60.0),
    _training("train-2048", batch=8, tokens=2048),
    _training("train-0.5b", limit_s=45.0, model="dream-0.5b", batch=16, tokens=2048, moments="float32"),
    Stage(
        name="torch-train-0.5b",
        module="pytorch",
        options={
            "work": "train_step",
            "model": "dream-0.5b",
            "rows": [
                {
                    "name": "logits of masked rows",
                    **{"batch": 16, "tokens": 2048, "recompute": True, "bfloat16": True, "warmup": 2, "steps": 4},
                }
            ],
        },
        limit_s=45.0,
    ),
    # Flags of XLA that may pay, see dream_jax/xla_flags.py: the same step as train-auto.
    *(
        _training(f"train-auto-{flags}", remat=AUTO, flags=flags)
        for flags in ("no-rematerialization", "no-triton-products", "cublaslt", "no-command-buffers")
    ),
)


def small(stage: Stage) -> Stage:
    """Returns the same stage with shapes that a CPU computes in seconds, for tests of the benchmark itself."""
    options = {**stage.options, "cpu": True}
    if stage.module == "ceilings":
        options |= {"size": 64, "mib": 1, "seconds": 0.0}
    elif stage.module == "attention_check":
        options |= {"shape": {"batch": 2, "queries": 16, "keys": 16, "heads": 4, "kv_heads": 2, "head_dim": 8}}
        options |= {"repeats": min(1, options["repeats"])}
    elif stage.module == "sampling":
        options |= {"model": "nano", "prompt": 8, "new": 8, "block": 4}
        options["rows"] = [_small_row(row) for row in options["rows"]]
    elif stage.module == "training":
        settings = options["settings"]
        # Products in fp8 need a GPU; elsewhere the same roundings are computed slowly.
        products = {"products": "fp8-emulated"} if settings.get("products") == "fp8" else {}
        options["settings"] = {
            **settings,
            **products,
            "model": "nano",
            "batch": 2,
            "tokens": 16,
            "warmup": 1,
            "steps": 1,
        }
    elif stage.module == "pytorch":
        options |= {"model": "nano", "rows": [_small_torch_row(row) for row in options["rows"]]}
    return dataclasses.replace(stage, options=options)


def _small_row(row: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {"batch": min(row["batch"], 2), "repeats": 1}
    return {**row, **changes, **({"passes": 2} if row["mode"] == "exact" else {})}


def _small_torch_row(row: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"batch": 1, "prompt": 8, "new_tokens": 8, "tokens": 16, "steps": 2, "warmup": 1, "repeats": 1}
    return {**row, **{name: value for name, value in sizes.items() if name in row}}
