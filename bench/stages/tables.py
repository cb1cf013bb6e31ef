"""Writes the results of the accelerator benchmark as Markdown: the aims beside what was measured, then all figures.

A plan (`stages.planned`) has the same form as a measurement, so the same functions write its tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]

# s1K has 1000 texts, nearly all of which fill 4096 tokens.
S1K_TOKENS = 5 * 1000 * 4096
RMB_PER_HOUR = 27.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Aim:
    """A figure that the project wants to reach.

    Attributes:
      name: what is measured.
      wanted: the aim.
      at_most: whether the figure has to be at most the aim; otherwise at least.
      unit: how the figure is written: "share", "times", "tokens/s" or "RMB".
      stages: the stages that measure it; the table names them if there is no figure.
      value: returns the figure from the results; None if it was not measured.
    """

    name: str
    wanted: float
    unit: str
    stages: tuple[str, ...]
    value: Callable[[Found], float | None]
    at_most: bool = False


def values(found: Found, stage: str) -> Mapping[str, Any]:
    """Returns the values that a stage has measured; empty if it has measured nothing."""
    of_stage: Mapping[str, Any] = found["stages"].get(stage, {}).get("values", {})
    return of_stage


def _row(found: Found, stage: str, name: str) -> Mapping[str, Any]:
    return next((row for row in values(found, stage).get("rows", ()) if row["name"] == name), {})


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _share_of_roof(stage: str, name: str) -> Callable[[Found], float | None]:
    def value(found: Found) -> float | None:
        row = _row(found, stage, name)
        return _ratio(row.get("least_ms_a_pass"), row.get("ms_a_pass"))

    return value


def _speed(stage: str, name: str) -> Callable[[Found], float | None]:
    return lambda found: _row(found, stage, name).get("tokens_per_s")


def _of(stage: str, name: str) -> Callable[[Found], float | None]:
    return lambda found: values(found, stage).get(name)


def _times_cached(row: str) -> Callable[[Found], float | None]:
    def value(found: Found) -> float | None:
        blocks = _row(found, "sample-blocks", f"block diffusion, {row}").get("tokens_per_s")
        return _ratio(blocks, _row(found, "sample-apart", f"cached, {row}").get("tokens_per_s"))

    return value


def _times_torch(found: Found) -> float | None:
    ours = _row(found, "sample-apart", "exact, 1 a pass, B=1").get("ms_a_pass")
    return _ratio(_row(found, "torch-sampler", "all rows").get("ms_a_pass"), ours)


def _price(found: Found) -> float | None:
    speeds = [values(found, stage).get("tokens_per_second") for stage in _FULL_4096]
    best = max((speed for speed in speeds if speed is not None), default=None)
    return None if best is None else S1K_TOKENS / best / 3600 * RMB_PER_HOUR


_FULL_4096 = ("train-int8", "train-float32", "train-auto")

AIMS: tuple[Aim, ...] = (
    Aim(
        name="exact sampling, batch 1: share of the arithmetic roof of the same run",
        wanted=0.80,
        unit="share",
        stages=("sample-apart", "ceilings"),
        value=_share_of_roof("sample-apart", "exact, 1 a pass, B=1"),
    ),
    Aim(
        name="exact sampling, batch 1: speed over the published PyTorch loop",
        wanted=1.35,
        unit="times",
        stages=("sample-apart", "torch-sampler"),
        value=_times_torch,
    ),
    Aim(
        name="exact sampling, batch 16: share of the arithmetic roof of the same run",
        wanted=0.90,
        unit="share",
        stages=("sample-apart", "ceilings"),
        value=_share_of_roof("sample-apart", "exact, 1 a pass, B=16"),
    ),
    Aim(
        name="cached sampling, 1 token a pass, batch 1",
        wanted=165,
        unit="tokens/s",
        stages=("sample-apart",),
        value=_speed("sample-apart", "cached, 1 a pass, B=1"),
    ),
    Aim(
        name="cached sampling, 1 token a pass, batch 1, int8 base",
        wanted=260,
        unit="tokens/s",
        stages=("sample-int8",),
        value=_speed("sample-int8", "cached, 1 a pass, B=1"),
    ),
    Aim(
        name="cached sampling, 4 tokens a pass, batch 1",
        wanted=512,
        unit="tokens/s",
        stages=("sample-apart",),
        value=_speed("sample-apart", "cached, 4 a pass, B=1"),
    ),
    Aim(
        name="cached sampling, 4 tokens a pass, batch 16",
        wanted=1100,
        unit="tokens/s",
        stages=("sample-apart",),
        value=_speed("sample-apart", "cached, 4 a pass, B=16"),
    ),
    *(
        Aim(
            name=f"a model of block diffusion, 4 tokens a pass, batch {batch}: speed over cached sampling",
            wanted=wanted,
            unit="times",
            stages=("sample-blocks", "sample-apart"),
            value=_times_cached(f"4 a pass, B={batch}"),
        )
        for batch, wanted in ((1, 1.4), (16, 2.5))
    ),
    Aim(
        name="training step, all weights, 4 x 4096, int8 moments, remat full: MFU",
        wanted=0.50,
        unit="share",
        stages=("train-int8",),
        value=_of("train-int8", "mfu"),
    ),
    Aim(
        name="the same with the remat policy that auto takes: MFU",
        wanted=0.55,
        unit="share",
        stages=("train-auto",),
        value=_of("train-auto", "mfu"),
    ),
    Aim(
        name="training step, LoRA of rank 32, 4 x 4096, remat full: MFU",
        wanted=0.50,
        unit="share",
        stages=("train-lora",),
        value=_of("train-lora", "mfu"),
    ),
    Aim(
        name="the same adapter with the remat policy that auto takes: MFU",
        wanted=0.50,
        unit="share",
        stages=("train-lora-auto",),
        value=_of("train-lora-auto", "mfu"),
    ),
    Aim(
        name="training step with float8 products: speed over bfloat16",
        wanted=1.25,
        unit="times",
        stages=("train-fp8", "train-auto"),
        value=lambda found: _ratio(
            values(found, "train-fp8").get("tokens_per_second"), values(found, "train-auto").get("tokens_per_second")
        ),
    ),
    Aim(
        name=f"s1K, 5 epochs of 1000 x 4096 tokens, all weights, at {RMB_PER_HOUR:g} RMB an hour",
        wanted=15.0,
        unit="RMB",
        stages=_FULL_4096,
        value=_price,
        at_most=True,
    ),
)


def shown(value: float, unit: str) -> str:
    """Returns a figure with its unit."""
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit == "times":
        return f"{value:.2f} times"
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"


def aim_header(found: Found) -> tuple[str, ...]:
    """Returns the header for `aim_rows`. A plan has bounds, so its last column says whether the aim is possible."""
    return ("aim", "wanted", *(("planned", "possible") if found.get("planned") else ("measured", "reached")))


def aim_rows(found: Found) -> list[tuple[str, str, str, str]]:
    """Returns a row for each aim: its name, the aim, the figure or why there is none, and whether it was reached."""
    rows = []
    for aim in AIMS:
        value = aim.value(found)
        wanted = f"{'at most' if aim.at_most else 'at least'} {shown(aim.wanted, aim.unit)}"
        if value is None:
            rows.append(
                (
                    aim.name,
                    wanted,
                    "; ".join(_why(found, stage) for stage in aim.stages if not values(found, stage)),
                    "-",
                )
            )
        else:
            reached = value <= aim.wanted if aim.at_most else value >= aim.wanted
            rows.append((aim.name, wanted, shown(value, aim.unit), "yes" if reached else "no"))
    return rows


def _why(found: Found, stage: str) -> str:
    if found.get("planned"):
        return f"{stage} is not planned"
    entry = found["stages"].get(stage)
    if entry is None:
        return f"{stage} did not run"
    return f"{stage}: {entry['status']}" + (f" ({entry['reason'][:120]})" if entry.get("reason") else "")


TRAIN_HEADER = ("stage", "s a step", "tokens/s", "MFU", "peak GiB", "compiled, s")
SAMPLE_HEADER = ("stage", "mode", "ms a pass", "tokens/s", "least ms", "share of the roof", "peak GiB")


def train_rows(found: Found) -> list[tuple[str, ...]]:
    """Returns a row for each training stage with a result."""
    rows: list[tuple[str, ...]] = []
    for name, entry in found["stages"].items():
        got = entry.get("values", {})
        if "tokens_per_second" not in got:
            continue
        peak = next((peak for peak in got.get("allocator_peak_gib") or () if peak is not None), None)
        rows.append(
            (
                name.removeprefix("train-"),
                f"{got['seconds']['median_s']:.3f}",
                f"{got['tokens_per_second']:,.0f}",
                _shown(got.get("mfu"), "share"),
                _number(peak, ".1f"),
                _number(got.get("compile_seconds"), ".0f"),
            )
        )
    return rows


def sample_rows(found: Found) -> list[tuple[str, ...]]:
    """Returns a row for each mode of the sampler that has a result."""
    rows: list[tuple[str, ...]] = []
    for stage, entry in found["stages"].items():
        if not stage.startswith("sample-"):
            continue
        for row in entry.get("values", {}).get("rows", ()):
            share = _ratio(row.get("least_ms_a_pass"), row["ms_a_pass"])
            rows.append(
                (
                    stage.removeprefix("sample-"),
                    row["name"],
                    f"{row['ms_a_pass']:.2f}",
                    f"{row['tokens_per_s']:.1f}",
                    _number(row.get("least_ms_a_pass"), ".2f"),
                    _shown(share, "share"),
                    _number(row.get("allocator_peak_gib"), ".1f"),
                )
            )
    return rows


def torch_rows(found: Found) -> list[tuple[str, ...]]:
    """Returns a row for each measurement of PyTorch."""
    rows: list[tuple[str, ...]] = []
    for stage, entry in found["stages"].items():
        for row in entry.get("values", {}).get("rows", ()) if stage.startswith("torch-") else ():
            rows.append(
                (
                    stage.removeprefix("torch-"),
                    row["name"],
                    f"{row['seconds']['median_s']:.3f}",
                    _number(row.get("ms_a_pass"), ".2f"),
                    _number(row.get("tokens_per_second"), ",.0f"),
                    _number(row.get("allocator_peak_gib"), ".1f"),
                )
            )
    return rows


def attention_rows(found: Found) -> list[tuple[str, ...]]:
    """Returns a row for each mask and backend that was checked, even and odd lengths."""
    rows: list[tuple[str, ...]] = []
    for stage in ("attention", "attention-odd"):
        got = values(found, stage)
        for row in got.get("rows", ()):
            if "refusal" in row:
                continue
            shape = got["shape"]
            rows.append(
                (
                    f"{shape['queries']} x {shape['keys']}",
                    row["mask"],
                    row["backend"] + (" (auto)" if row["auto"] else ""),
                    f"{max(row['errors'].values()):.1e}" + (" WRONG" if row.get("wrong") else ""),
                    _number(row.get("forward_ms"), ".2f"),
                    _number(row.get("with_backward_ms"), ".2f"),
                    _number(row.get("temporaries_mib"), ".0f"),
                    f"{row['seconds']:.1f}",
                )
            )
    return rows


def profile_tables(found: Found, most: int = 12) -> list[str]:
    """Returns the tables of each profile: the kinds of kernels, the named scopes, and the largest kernels."""
    parts = []
    for stage, entry in found["stages"].items():
        got = entry.get("values", {})
        profiles = [{"of": "one step", **got["profile"]}] if "profile" in got else got.get("profiles", [])
        for one in profiles:
            parts.append(f"### {stage}, {one['of']}: {one['busy_ms']:.2f} ms\n")
            for header, name in (("kind", "kinds"), ("scope", "scopes")):
                items = list(one[name].items())[:most]
                parts.append(table((header, "ms"), [(key, f"{ms:.2f}") for key, ms in items]))
            rows = [(row["kernel"], f"{row['ms']:.2f}", f"{row['events']:.0f}") for row in one["kernels"][:most]]
            parts.append(table(("kernel", "ms", "events"), rows))
    return parts


def scope_tables(found: Found, most: int = 10) -> list[str]:
    """Returns, for a plan, a table of the bytes and of the largest named scopes of each program."""
    rows = []
    for stage, entry in found["stages"].items():
        got = entry.get("values", {})
        for one in [got, *got.get("rows", ())]:
            if "scopes_ms" in one:
                scopes = [f"{name} {ms:.2f}" for name, ms in list(one["scopes_ms"].items())[:most]]
                nbytes = one.get("gb_a_pass", one.get("gb_a_step"))
                rows.append((stage, one.get("name", "one step"), f"{nbytes:.1f}", "; ".join(scopes)))
    return [table(("stage", "program", "GB moved", "ms by named scope"), rows)] if rows else []


def markdown(found: Found) -> str:
    """Returns the whole report as a text in Markdown."""
    ceilings = values(found, "ceilings")
    planned = bool(found.get("planned"))
    parts = ["# Accelerator benchmark" + (", planned" if planned else "")]
    about = [
        str(ceilings.get("device", "no device was described")),
        found["date"][:10],
        f"commit {found['commit'][:7]}",
    ]
    about += [f"jax {ceilings['versions']['jax']}"] if "versions" in ceilings else []
    parts.append("; ".join(about) + ".")
    if planned:
        parts.append(
            "Nothing was measured: these are times by the operations and bytes of programs that were compiled for this "
            "device, each kernel at the ceiling of its arithmetic or of the memory, whichever is slower."
        )
    if found.get("small"):
        parts.append("Small shapes, which measure nothing of use.")
    lines = [
        f"{label} {_number(ceilings.get(name), '.4g')} {unit}"
        for label, name, unit in (
            ("bfloat16 product", "product_tflops", "TFLOP/s"),
            ("float8 product", "float8_product_tflops", "TFLOP/s"),
            ("memory, read and write", "bandwidth_tb_per_s", "TB/s"),
            ("memory, read", "read_bandwidth_tb_per_s", "TB/s"),
        )
    ]
    parts.append(f"Ceilings: {', '.join(lines)}.")
    parts.append("## Aims\n\n" + table(aim_header(found), aim_rows(found)))
    sections: list[tuple[str, Sequence[str], Iterable[Sequence[str]]]] = [
        ("Training step", TRAIN_HEADER, train_rows(found)),
        ("Sampler", SAMPLE_HEADER, sample_rows(found)),
        ("PyTorch", ("work", "rows", "s", "ms a pass", "tokens/s", "peak GiB"), torch_rows(found)),
        (
            "Attention against float32",
            ("queries x keys", "mask", "backend", "error", "forward, ms", "and backward, ms", "temporaries, MiB", "s"),
            attention_rows(found),
        ),
    ]
    for title, header, rows in sections:
        rows = list(rows)
        if rows:
            parts.append(f"## {title}\n\n{table(header, rows)}")
    profiles = profile_tables(found) + scope_tables(found)
    if profiles:
        parts.append("## Where the time goes")
        parts += profiles
    stages = [
        (name, entry["status"], _number(entry.get("seconds"), ".1f"), entry.get("reason", ""))
        for name, entry in found["stages"].items()
    ]
    parts.append("## Stages\n\n" + table(("stage", "status", "s", "reason"), stages))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table in Markdown with this header and these rows."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |\n" for line in lines
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _shown(value: float | None, unit: str) -> str:
    return "-" if value is None else shown(value, unit)
