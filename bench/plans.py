"""Makes the plans of the documentation: compiles the train step of Dream-7B, and writes memory, time and price.

    python bench/plans.py [--only v6e-8x1 h200-1] [--docs]

Each plan takes one to several minutes on two cores. Needs the extra `plan`, and `plan-gpu` for GPUs: if a plan cannot be
compiled on this machine, the result file keeps its old result. Writes bench/results/plans.json after each plan, and at the
end the tables in docs/memory.md; with --docs it only writes the tables from the result file.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import report
import tyro

from dream_jax.files import read_json
from dream_jax.plan import PlanSettings, RunPlan, make_plan
from dream_jax.plan.report import gib
from dream_jax.trainer import TrainSettings

RESULTS = report.RESULTS / "plans.json"
DOCS = report.REPOSITORY / "docs" / "memory.md"
BEGIN, END = "<!-- written by bench/plans.py: begin -->", "<!-- written by bench/plans.py: end -->"

FULL: Mapping[str, Any] = {"model": "dream-7b", "remat": "full", "steps": 300}


def _case(topology: str, mesh: str, batch_size: int, max_length: int, **more: Any) -> tuple[str, dict[str, Any]]:
    return topology, {**FULL, "mesh": mesh, "batch_size": batch_size, "max_length": max_length, **more}


# Name, topology and settings. Full-parameter fine-tuning with float32 masters and bfloat16 compute, except "-lora" and
# "-nf4": an adapter of rank 32 on all projections, over a base in bfloat16 or four bits.
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "v6e-8x1": _case("v6e:2x4", "8x1", 8, 4096),
    "v6e-4x2": _case("v6e:2x4", "4x2", 8, 4096),
    "v5p-4x1": _case("v5p:2x2x1", "4x1", 8, 4096),
    "v5p-4x1-2048": _case("v5p:2x2x1", "4x1", 8, 2048),
    "v5p-4x1-dots": _case("v5p:2x2x1", "4x1", 8, 4096, remat="dots"),
    "v5e-16x1": _case("v5e:4x4", "16x1", 16, 2048),
    "v5e-8x1": _case("v5e:2x4", "8x1", 8, 2048),
    "v5e-8x1-int8": _case("v5e:2x4", "8x1", 8, 2048, moments="int8"),
    "v5e-8x1-lora": _case("v5e:2x4", "8x1", 8, 4096, lora_rank=32),
    "v5e-8x1-nf4": _case("v5e:2x4", "8x1", 8, 4096, lora_rank=32, base="nf4"),
    "v5p-32k": _case("v5p:2x2x2", "1x1x8", 1, 32_768),
    "h100-8x1": _case("h100:8", "8x1", 8, 4096),
    "h100-1-int8": _case("h100:1", "1x1", 4, 4096, moments="int8"),
    "h100-1-lora": _case("h100:1", "1x1", 4, 4096, lora_rank=32),
    "h200-8x1": _case("h200:8", "8x1", 8, 4096),
    "h200-1": _case("h200:1", "1x1", 4, 4096),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanTableSettings:
    """The choice of the plans to make."""

    only: tuple[str, ...] = ()
    """names of plans; all by default"""
    docs: bool = False
    """compile nothing, write the tables only"""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.only) - set(CASES))
        if unknown:
            raise ValueError(f"{unknown} are not names of plans; the names are {', '.join(CASES)}")


def results() -> dict[str, Any]:
    """Returns name -> plan from the result file."""
    return read_json(RESULTS) if RESULTS.is_file() else {}


def tables(found: Mapping[str, Any]) -> str:
    """Returns the tables of docs/memory.md, made from the content of the result file."""
    lines = [
        "| plan | hardware | mesh | rows x tokens | remat, moments | given | working | peak | has | fits | arithmetic |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    compiled = [(name, one["plan"]) for name, one in found.items() if one["plan"]["compile_seconds"] is not None]
    for name, plan in compiled:
        memory, settings = plan["memory"], plan["settings"]
        given = memory["parameters"] + memory["optimizer"] + memory["batch"]
        peak = f"{gib(memory['peak'])}" if memory["refused"] is None else f"over {gib(memory['limit'])}"
        off = "" if memory["refused"] else f" ({memory['estimate'] / memory['peak'] - 1:+.0%})"
        lines.append(
            f"| {name} | {plan['hardware']} | {settings['mesh']} | {settings['batch_size']} x {settings['max_length']} | "
            f"{settings['remat']}, {_trains(settings)} | {gib(given)} | "
            f"{gib(memory['working']) if memory['refused'] is None else '-'} | {peak} | {gib(memory['limit'])} | "
            f"{'yes' if plan['fits'] else 'no'} | {gib(memory['estimate'])}{off} |"
        )
    lines += [
        "",
        "| plan | s a step, fast to slow | MFU | GiB sent: gathered, scattered, summed, passed on | RMB for 300 steps |",
        "|---|---|---|---|---|",
    ]
    for name, plan in compiled:
        if not plan["fits"]:
            continue
        time, price = plan["time"], plan["price"]
        sent = {one["kind"]: one["sent"] for one in plan["collectives"]}
        moved = [sent.get(kind, 0.0) for kind in ("all-gather", "reduce-scatter", "all-reduce")]
        moved.append(sent.get("collective-permute", 0.0) + sent.get("all-to-all", 0.0))
        rmb = "-" if price["rmb"] is None else f"{price['rmb'][0]:.0f} to {price['rmb'][1]:.0f}"
        lines.append(
            f"| {name} | {time['fast']:.2f} to {time['slow']:.2f} | {time['mfu'][0]:.0%} to {time['mfu'][1]:.0%} | "
            f"{', '.join(f'{size / 2**30:.1f}' for size in moved)} | {rmb} |"
        )
    versions = sorted({f"{name} {version}" for _, plan in compiled for name, version in plan["versions"].items()})
    dates = sorted(one["date"][:10] for one in found.values())
    lines += ["", f"Compiled {dates[0]} to {dates[-1]} by {', '.join(versions)}." if dates else "Nothing compiled yet."]
    return "\n".join(lines)


def _trains(settings: Mapping[str, Any]) -> str:
    if settings.get("lora_rank") is None:
        return str(settings["moments"])
    return f"rank {settings['lora_rank']} on {'bfloat16' if settings['base'] == 'auto' else settings['base']}"


def write_tables() -> None:
    """Writes the tables between their marks in docs/memory.md."""
    text = DOCS.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n\n{tables(results())}\n\n{END}{after}", encoding="utf-8")


def one_plan(name: str) -> RunPlan:
    """Returns the plan of one of `CASES`, compiled if the compiler is installed."""
    topology, settings = CASES[name]
    training = TrainSettings.flat(out=pathlib.Path("unused"), **settings)
    return make_plan(training, PlanSettings(plan=True, topology=topology))


def main(settings: PlanTableSettings) -> None:
    """Compiles the plans and writes the result and the tables."""
    for name in () if settings.docs else settings.only or tuple(CASES):
        plan = one_plan(name)
        memory = plan.memory
        print(
            f"{name}: peak {gib(memory.peak)} of {gib(memory.limit)} GiB, {'fits' if plan.fits else 'does not fit'}, "
            f"{'not compiled' if plan.compile_seconds is None else f'{plan.compile_seconds:.0f} s'}",
            flush=True,
        )
        if plan.compile_seconds is None:
            print(f"  {'; '.join(plan.advice)}: the file keeps its old result")
            continue
        plain = plan.plain()
        plain["settings"].pop("out")
        found = results() | {name: {"date": report.now(), "plan": plain}}
        report.write_json(RESULTS, {key: found[key] for key in CASES if key in found})
    write_tables()
    print(f"wrote {RESULTS.name} and the tables in docs/{DOCS.name}")


if __name__ == "__main__":
    main(tyro.cli(PlanTableSettings, description=__doc__))
