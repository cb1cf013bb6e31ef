"""Plans every recipe for one H100, one H200 and a v6e-8, and writes hours, price and memory to the file of the recipe.

    python bench/recipes.py [--only s1k-full-4096] [--compile]

A plan by arithmetic takes seconds. With --compile the step is compiled if the compiler is installed (the extras `plan` and
`plan-gpu`), which takes a minute or more. Everything after the line `MARK` in the file of a recipe is overwritten.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import report
import tyro

from dream_jax.files import write_file
from dream_jax.plan import PlanSettings, make_plan
from dream_jax.trainer.recipes import Recipe, names, read_recipe

FOLDER = report.REPOSITORY / "recipes"
MARK = "# Plans for some hardware; written by bench/recipes.py."

# Settings that differ from the recipe, by recipe and topology. One H100 has too little memory for moments beside weights
# and gradients, so full fine-tuning on it keeps the moments in the memory of the host. It also has too little for the
# second copy of all gradients that accumulation needs, so it uses smaller batches, more steps and a lower rate.
_H100_ROWS = {2048: 8, 4096: 4, 8192: 2}
_H100: Mapping[str, Any] = {"accumulation": 1, "moments": "bfloat16", "moments_on_host": True}


def _full(length: int) -> dict[str, dict[str, Any]]:
    rows = _H100_ROWS[length]
    return {
        "h100:1": {**_H100, "batch_size": rows, "steps": 310 * 16 // rows, "learning_rate": 5e-6},
        "h200:1": {},
        "v6e:2x4": {"mesh": "8x1", "accumulation": 1 if length == 2048 else 2, "moments": "float32"},
    }


def _adapter(length: int) -> dict[str, dict[str, Any]]:
    return {"h100:1": {}, "h200:1": {}, "v6e:2x4": {"mesh": "8x1", "accumulation": 1 if length == 2048 else 2}}


CASES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    **{f"s1k-full-{length}": _full(length) for length in (2048, 4096, 8192)},
    **{f"s1k-lora-{length}": _adapter(length) for length in (2048, 4096, 8192)},
    "dream-sft": {
        "h100:1": {**_H100, "batch_size": 4, "steps": 144_000, "learning_rate": 2e-6},
        "h200:1": {},
        "v6e:2x4": {"mesh": "8x1", "accumulation": 72, "moments": "float32"},
    },
    "d1-sft": {"h100:1": {}, "h200:1": {}, "v6e:2x4": {"mesh": "8x1", "accumulation": 1}},
    "gsm8k-0.5b": {"h100:1": {}, "h200:1": {}, "v6e:2x4": {"mesh": "8x1", "accumulation": 1}},
    "gsm8k-rewards": {"h100:1": {}, "h200:1": {}, "v6e:2x4": {"mesh": "8x1"}},
    "pretrain": {"h100:1": {}, "h200:1": {}, "v6e:2x4": {"mesh": "8x1", "accumulation": 4}},
    "ar-start": {
        "h100:1": {**_H100, "batch_size": 8, "steps": 80_000, "learning_rate": 5e-6, "anneal_steps": 8000},
        "h200:1": {},
        "v6e:2x4": {"mesh": "8x1", "accumulation": 16, "moments": "float32"},
    },
    # A row of block diffusion has two streams, and so as many tokens as two rows.
    "block-lora-4096": {"h100:1": {}, "h200:1": {}, "v6e:2x4": {"mesh": "8x1", "accumulation": 2}},
    "block-full-4096": {
        "h100:1": {**_H100, "batch_size": 2, "steps": 620 * 8, "learning_rate": 5e-6},
        "h200:1": {},
        "v6e:2x4": {"mesh": "8x1", "accumulation": 2, "moments": "float32"},
    },
    "block-ar-2048": {
        "h100:1": {**_H100, "batch_size": 2, "steps": 7600 * 32, "learning_rate": 2e-6},
        "h200:1": {},
        "v6e:2x4": {"mesh": "8x1", "accumulation": 8, "moments": "float32"},
    },
    "smol-to-dream": {"h100:1": {}, "h200:1": {}, "v6e:2x4": {"mesh": "8x1"}},
    "block-nano": {"h100:1": {}, "h200:1": {}, "v6e:2x4": {"mesh": "8x1"}},
    # A pair is 8 rows: two answers with 4 draws each.
    "dream-vrpo": {
        "h100:1": {**_H100, "batch_size": 1, "steps": 950 * 64, "learning_rate": 6e-8},
        "h200:1": {},
        "v6e:2x4": {"mesh": "8x1", "accumulation": 8},
    },
    "dream-vrpo-lora": {"h100:1": {}, "h200:1": {}, "v6e:2x4": {"mesh": "8x1", "accumulation": 8}},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecipeCostSettings:
    """The choice of recipes and hardware, and the way to plan."""

    only: tuple[str, ...] = ()
    """names of recipes; all by default"""
    topology: tuple[str, ...] = ()
    """topologies to plan, all by default; the file keeps its results for others"""
    compile: bool = False
    """compile the steps instead of estimating by arithmetic"""


def blocks(recipe: Recipe, settings: RecipeCostSettings) -> list[str]:
    """Returns the [[planned]] tables of a recipe as TOML, one for each topology."""
    known = {one.topology: one for one in recipe.planned}
    found = []
    for topology, changes in CASES[recipe.name].items():
        before = known.get(topology)
        if settings.topology and topology not in settings.topology and before is not None:
            found.append(
                _block(topology, before.settings, before.hours, before.rmb, before.peak_gib, before.fits, before.how)
            )
            continue
        model = recipe.like or recipe.settings["model"]
        training = recipe.train_settings(**{"model": model, **changes, "out": pathlib.Path("unused")})
        plan = make_plan(training, PlanSettings(plan=True, topology=topology, compile=settings.compile))
        how = "arithmetic" if plan.compile_seconds is None else "compiled"
        peak = plan.memory.peak / 2**30
        found.append(_block(topology, changes, plan.price.hours, plan.price.rmb, peak, plan.fits, how))
        print(f"{recipe.name} {topology}: {plan.price.hours[0]:.2f} to {plan.price.hours[1]:.2f} h, {peak:.1f} GiB, "
              f"{'fits' if plan.fits else 'DOES NOT FIT'} ({how})", flush=True)  # fmt: skip
    return found


def _block(
    topology: str,
    settings: Mapping[str, Any],
    hours: tuple[float, float],
    rmb: tuple[float, float] | None,
    peak: float,
    fits: bool,
    how: str,
) -> str:
    inner = ", ".join(f"{name} = {_toml(value)}" for name, value in settings.items())
    lines = ["[[planned]]", f"topology = {_toml(topology)}", f"settings = {{ {inner} }}" if inner else "settings = {}"]
    lines.append(f"hours = [{hours[0]:.3g}, {hours[1]:.3g}]")
    if rmb is not None:
        lines.append(f"rmb = [{rmb[0]:.3g}, {rmb[1]:.3g}]")
    return "\n".join([*lines, f"peak_gib = {peak:.4g}", f"fits = {_toml(fits)}", f"how = {_toml(how)}"])


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def main(settings: RecipeCostSettings) -> None:
    """Plans the chosen recipes and writes their files."""
    unknown = sorted(set(settings.only) - set(CASES)) + sorted(set(names(FOLDER)) ^ set(CASES))
    if unknown:
        raise ValueError(f"{unknown} must have both a file in recipes/ and an entry in CASES of bench/recipes.py")
    for name in settings.only or tuple(CASES):
        recipe = read_recipe(name, FOLDER)
        before = recipe.file.read_text(encoding="utf-8").partition(MARK)[0].rstrip()
        text = "\n\n".join([before, MARK, *blocks(recipe, settings)]) + "\n"
        write_file(recipe.file, text)


if __name__ == "__main__":
    main(tyro.cli(RecipeCostSettings, description=__doc__))
