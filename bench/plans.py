"""Makes the plans of the documentation: compiles the train step of Dream-7B, and writes memory, time and price.

    python bench/plans.py [--only v6e-8x1 h200-1] [--no-compile] [--recount] [--docs]

Each plan takes one to several minutes on two cores. Needs the extra `plan`, and `plan-gpu` for GPUs: if a plan cannot be
compiled on this machine, the result file keeps its old result. Writes bench/results/plans.json after each plan, and at the
end the tables in docs/memory.md. With --recount it compiles nothing and computes everything else again, for the sizes and
collectives in the result file; with --docs it only writes the tables from the result file.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, get_args

import report
import tyro

from dream_jax.config import PRESETS
from dream_jax.files import read_json
from dream_jax.plan import PlanSettings, RunPlan, make_plan
from dream_jax.plan.compile import Compiled, Refusal
from dream_jax.plan.hlo import Collective
from dream_jax.plan.report import gib
from dream_jax.remat import Remat
from dream_jax.step_memory import kept_bytes, matrix_count, recomputed_attention, recomputed_products
from dream_jax.trainer import TrainSettings

RESULTS = report.RESULTS / "plans.json"
DOCS = report.REPOSITORY / "docs" / "memory.md"
BEGIN, END = "<!-- written by bench/plans.py: begin -->", "<!-- written by bench/plans.py: end -->"
BEGIN_POLICIES = "<!-- written by bench/plans.py: policies -->"
BEGIN_AUTO = "<!-- written by bench/plans.py: auto -->"

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
    # What `--remat auto` takes.
    "auto-h100-1-lora": _case("h100:1", "1x1", 4, 4096, lora_rank=32, remat="auto"),
    "auto-h100-1-host": _case("h100:1", "1x1", 4, 4096, moments="bfloat16", moments_on_host=True, remat="auto"),
    "auto-h100-8x1": _case("h100:8", "8x1", 8, 4096, remat="auto"),
    **{
        f"auto-h200-1-{moments}-{length}": _case(
            "h200:1", "1x1", 16_384 // length, length, moments=moments, remat="auto"
        )
        for moments in ("float32", "bfloat16")
        for length in (2048, 4096, 8192)
    },
    "auto-h200-1-int8-4096": _case("h200:1", "1x1", 4, 4096, moments="int8", remat="auto"),
    "auto-v6e-8x1": _case("v6e:2x4", "8x1", 8, 4096, remat="auto"),
    "auto-v5p-4x1": _case("v5p:2x2x1", "4x1", 8, 4096, remat="auto"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanTableSettings:
    """The choice of the plans to make."""

    only: tuple[str, ...] = ()
    """names of plans; all by default"""
    compile: bool = True
    """compile the steps; --no-compile plans by arithmetic, and keeps every result that was compiled"""
    recount: bool = False
    """compile nothing, but compute times and shares of memory again for what was compiled before"""
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
    every = [(name, one["plan"]) for name, one in found.items() if one["plan"]["compile_seconds"] is not None]
    compiled = [(name, plan) for name, plan in every if plan.get("remat") is None]
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
    versions = sorted({f"{name} {version}" for _, plan in every for name, version in plan["versions"].items()})
    dates = sorted(one["date"][:10] for one in found.values())
    lines += ["", f"Compiled {dates[0]} to {dates[-1]} by {', '.join(versions)}." if dates else "Nothing compiled yet."]
    return "\n".join(lines)


def auto_table(found: Mapping[str, Any]) -> str:
    """Returns the table of docs/memory.md of what `--remat auto` takes, made from the content of the result file."""
    lines = [
        "| hardware | rows x tokens | moments | took | peak | of | size | s a step, fast to slow | why |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found.values():
        plan = one["plan"]
        if plan.get("remat") is None:
            continue
        memory, settings, time = plan["memory"], plan["settings"], plan["time"]
        why = plan["remat"].partition(", ")[2].partition(";")[0]
        lines.append(
            f"| {plan['hardware']} | {settings['batch_size']} x {settings['max_length']} | {_trains(settings)} | "
            f"`{settings['remat']}` | {gib(memory['peak'])} | {gib(memory['limit'])} | "
            f"{'compiled' if memory['compiled'] else 'arithmetic'} | {time['fast']:.2f} to {time['slow']:.2f} | {why} |"
        )
    return "\n".join(lines)


def policy_table(model: str = "dream-7b", length: int = 4096) -> str:
    """Returns the table of docs/memory.md with the cost of each rematerialisation policy, for bfloat16 activations."""
    config = PRESETS[model]
    forward = 2.0 * matrix_count(config) / config.num_hidden_layers + recomputed_attention(config, "full", length)
    lines = [
        "| `--remat` | keeps of each layer | bytes | MFLOP repeated: products | attention | share of the forward pass |",
        "|---|---|---|---|---|---|",
    ]
    for remat in get_args(Remat):
        products = recomputed_products(config, remat)
        attention = recomputed_attention(config, remat, length)
        lines.append(
            f"| `{remat}` | {KEEPS[remat]} | {kept_bytes(config, remat, 2):,} | {products / 1e6:.1f} | "
            f"{attention / 1e6:.1f} | {(products + attention) / forward:.0%} |"
        )
    return "\n".join(lines)


# What each policy keeps, in words.
KEEPS: Mapping[Remat, str] = {
    "none": "everything (an estimate)",
    "products": "the input, the results of q, k, v, o, gate, up, and the output of the attention",
    "dots": "the input, the results of q, k, v, o, gate, up",
    "except-up": "the input, the results of q, k, v, o, gate, and the output of the attention",
    "except-mlp": "the input, the results of q, k, v, o, and the output of the attention",
    "qkv-attention": "the input, the results of q, k, v, and the output of the attention",
    "attention": "the input and the output of the attention",
    "qkv": "the input and the results of q, k, v",
    "full": "the input",
    "offload": "the input, in host memory",
}


def _trains(settings: Mapping[str, Any]) -> str:
    if settings.get("lora_rank") is None:
        return f"{settings['moments']}{' on the host' if settings['moments_on_host'] else ''}"
    return f"rank {settings['lora_rank']} on {'bfloat16' if settings['base'] == 'auto' else settings['base']}"


def write_tables() -> None:
    """Writes the tables between their marks in docs/memory.md."""
    text = DOCS.read_text(encoding="utf-8")
    for begin, content in written_tables().items():
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{content}\n\n{END}{rest.split(END, 1)[1]}"
    DOCS.write_text(text, encoding="utf-8")


def written_tables() -> dict[str, str]:
    """Returns the tables of docs/memory.md, by the mark before each; `END` is the mark after it."""
    found = results()
    return {BEGIN: tables(found), BEGIN_POLICIES: policy_table(), BEGIN_AUTO: auto_table(found)}


def one_plan(name: str, *, compiles: bool = True) -> RunPlan:
    """Returns the plan of one of `CASES`, compiled if that is wanted and the compiler is installed."""
    topology, settings = CASES[name]
    training = TrainSettings.flat(out=pathlib.Path("unused"), **settings)
    return make_plan(training, PlanSettings(plan=True, topology=topology, compile=compiles))


def recounted(name: str, stored: Mapping[str, Any]) -> RunPlan:
    """Returns the plan of one of `CASES` for a step that was compiled before; `stored` is its plan in the result file."""
    topology, settings = CASES[name]
    training = TrainSettings.flat(out=pathlib.Path("unused"), **{**settings, "remat": stored["settings"]["remat"]})
    memory, seconds = stored["memory"], stored["compile_seconds"]
    found: Compiled | Refusal | None = None
    if memory["compiled"]:
        moved = tuple(Collective(**one) for one in stored["collectives"])
        given = memory["peak"] - memory["working"]
        found = Compiled(peak=memory["peak"], given=given, collectives=moved, seconds=seconds)
    elif memory["refused"] is not None:
        found = Refusal(needed=memory["peak"], words=memory["refused"], seconds=seconds)
    plan = make_plan(training, PlanSettings(plan=True, topology=topology, compile=False), found)
    return dataclasses.replace(plan, remat=stored.get("remat"), versions=stored["versions"])


def recount() -> None:
    """Makes all plans of the result file again, without compiling."""
    found = results()
    for name, one in found.items():
        plain = recounted(name, one["plan"]).plain()
        plain["settings"].pop("out")
        one["plan"] = plain
    report.write_json(RESULTS, found)


def main(settings: PlanTableSettings) -> None:
    """Compiles the plans and writes the result and the tables."""
    if settings.recount:
        recount()
    for name in () if settings.docs or settings.recount else settings.only or tuple(CASES):
        plan = one_plan(name, compiles=settings.compile)
        memory = plan.memory
        print(
            f"{name}: peak {gib(memory.peak)} of {gib(memory.limit)} GiB, {'fits' if plan.fits else 'does not fit'}, "
            f"{'not compiled' if plan.compile_seconds is None else f'{plan.compile_seconds:.0f} s'}",
            flush=True,
        )
        before = results().get(name)
        if plan.compile_seconds is None and (
            settings.compile or (before is not None and before["plan"]["memory"]["compiled"])
        ):
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
