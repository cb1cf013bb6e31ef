"""Writes the figures of the README and the docs from `bench/results/` and `docs/study/`, so that none is copied.

    python docs/write_tables.py [--check] [--split]

A table stands between two comments, `<!-- docs/write_tables.py: NAME -->` and `<!-- end -->`. With --check nothing is
written, and the exit status is 1 when a file differs from the data; tests/test_docs.py does the same.

The pages in `TEMPLATES` also say numbers in their sentences. Each is rendered from the Jinja template of the same name in
`docs/templates/`, with the functions of `docs/page_numbers.py`: `{{ share("sudoku", "bidirectional") }}`. Edit the
template, not the page. The slides of `docs/talk/` are made into HTML too, where the package `markdown` is installed
(extra `docs`).
--split also counts anew what test rows of the study share with training rows, in `docs/study/split.json`.
"""

from __future__ import annotations

import base64
import csv
import functools
import html
import importlib.util
import json
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT)]
from stages import tables  # noqa: E402 - it is found in bench/

FILES = (
    "README.md",
    "README.zh.md",
    "docs/index.md",
    "docs/benchmarks.md",
    "docs/block_diffusion.md",
    "docs/memory.md",
    "docs/sample.md",
    "docs/study.md",
    "docs/study.zh.md",
)
TEMPLATES = (
    "docs/study.md",
    "docs/study.zh.md",
    "docs/findings.md",
    "docs/findings.zh.md",
    "docs/what-a-mask-costs.md",
    "docs/what-a-mask-costs.zh.md",
    "docs/talk/slides.md",
    "docs/talk/slides.zh.md",
)
SLIDES = {"docs/talk/slides.html": "docs/talk/slides.md", "docs/talk/slides.zh.html": "docs/talk/slides.zh.md"}
BLOCK = re.compile(r"(<!-- docs/write_tables\.py: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def read(name: str) -> Any:
    """The content of a file of `bench/results/`."""
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; None becomes an empty cell."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |\n" for line in lines)


def find(rows: Sequence[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The one row that has these values."""
    (found,) = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    return found


def _h200_figures() -> dict[str, str]:
    """The figures of the Status box, as they are written there."""
    data = read("h200")
    full = find(data["train_step"], model="dream-7b", moments="float32", lora_rank=None)
    adapter = find(data["train_step"], lora_rank=32)
    sampler = data["sampler"]["rows"]
    cached = "`WindowCache()`, blocks of 32, 4 tokens a pass"
    return {
        "date": data["date"],
        "full_speed": f"{full['tokens_per_s']:,}",
        "full_mfu": f"{full['mfu']:.1%}".replace("%", " %"),
        "full_peak": f"{full['peak_gib']:g}",
        "adapter_speed": f"{adapter['tokens_per_s']:,}",
        "adapter_peak": f"{adapter['peak_gib']:g}",
        "exact": f"{find(sampler, mode='exact, a token a pass', batch=1)['tokens_per_s']:g}",
        "torch": f"{find(sampler, mode='the published loop in PyTorch, logits of masked rows')['tokens_per_s']:g}",
        "cached": f"{find(sampler, mode=cached, batch=1)['tokens_per_s']:g}",
        "cached_16": f"{find(sampler, mode=cached, batch=16)['tokens_per_s']:g}",
    }


def status() -> str:
    """What was verified on which hardware."""
    f = _h200_figures()
    return table(
        ("Status", "verified on", "result"),
        [
            (
                "published logits, losses, gradients, every token of the sampler",
                "CPU, float32, two tiny checkpoints",
                "reproduced: logits to 1e-4, losses to 1e-5 relative, tokens exactly (`make test`)",
            ),
            (
                "training step of `dream-7b`, 4 x 4096 tokens",
                f"one H200, {f['date']}",
                f"all weights: {f['full_speed']} tokens/s, {f['full_mfu']} MFU, {f['full_peak']} GiB; "
                f"LoRA of rank 32: {f['adapter_speed']} tokens/s, {f['adapter_peak']} GiB",
            ),
            (
                "sampling from `dream-7b`, 512 + 512 tokens",
                f"one H200, {f['date']}",
                f"exact {f['exact']} tokens/s (published PyTorch loop {f['torch']}); cached blocks, 4 tokens a pass "
                f"(enforced, not chosen by confidence): "
                f"{f['cached']}, and {f['cached_16']} at batch 16",
            ),
            (
                "several devices",
                "eight CPU devices, two processes",
                "losses equal to 1e-5 relative across meshes and with two processes; several GPUs, NCCL and TPU slices not "
                "tried",
            ),
            ("TPU v5e, v5p, v6e", "compiled only", "memory and collectives planned; nothing has run"),
            (
                "Dream-7B's own weights",
                "not run here",
                "speeds are those of its shapes; no benchmark score was reproduced",
            ),
        ],
    )


def status_zh() -> str:
    """The same in Chinese."""
    f = _h200_figures()
    return table(
        ("现状", "验证环境", "结果"),
        [
            (
                "官方实现的 logits、损失、梯度、采样的每个 token",
                "CPU、float32、两个微型检查点",
                "已复现：logits 误差 1e-4 以内，损失相对误差 1e-5 以内，token 完全一致（`make test`）",
            ),
            (
                "`dream-7b` 训练步，4 x 4096 个 token",
                f"一块 H200，{f['date']}",
                f"全参数：{f['full_speed']} tokens/s，MFU {f['full_mfu']}，{f['full_peak']} GiB；"
                f"秩 32 的 LoRA：{f['adapter_speed']} tokens/s，{f['adapter_peak']} GiB",
            ),
            (
                "`dream-7b` 采样，512 + 512 个 token",
                f"一块 H200，{f['date']}",
                f"精确模式 {f['exact']} tokens/s（官方 PyTorch 循环 {f['torch']}）；分块缓存、每次前向填 4 个 token"
                f"（强制设定，不由置信度决定）："
                f"{f['cached']}，批大小 16 时 {f['cached_16']}",
            ),
            (
                "多设备",
                "8 个 CPU 设备、2 个进程",
                "不同网格、两个进程下的损失相对误差都在 1e-5 以内；多块 GPU、NCCL 与 TPU 切片尚未试过",
            ),
            ("TPU v5e、v5p、v6e", "仅编译", "给出了内存与通信量的估算，没有实际运行"),
            ("Dream-7B 官方权重", "未在此运行", "测速只用了相同形状的模型；未复现任何基准分数"),
        ],
    )


def h200_train_step() -> str:
    """Speed and memory of the training step on one H200."""
    rows = []
    for row in read("h200")["train_step"]:
        settings = [f"{row['model']}, {row['rows']} x {row['tokens']}, remat {row['remat']}"]
        settings += [f"{row['moments']} moments"] if row["moments"] else []
        settings += [f"LoRA rank {row['lora_rank']}, bfloat16 base"] if row["lora_rank"] else []
        notes = [f"planned {row['planned_gib']} GiB"] if row["planned_gib"] else []
        notes += [f"needs memory fraction {row['memory_fraction']:g}"] if row["memory_fraction"] else []
        if "pytorch_seconds" in row:
            ratio = row["pytorch_seconds"] / row["seconds"]
            notes.append(f"plain PyTorch {row['pytorch_seconds']} s: {ratio:.2f} times ours")
        speed = (f"{row['seconds']:.3f}", f"{row['tokens_per_s']:,}", f"{row['mfu']:.1%}".replace("%", " %"))
        rows.append((", ".join(settings), *speed, row["peak_gib"], "; ".join(notes)))
    return table(("settings", "s a step", "tokens/s", "MFU", "peak GiB", "notes"), rows)


def h200_sampler() -> str:
    """Speed of the sampler on one H200."""
    rows = [
        (row["mode"], row["batch"], row["ms_per_pass"], row["tokens_per_s"], row["least_ms_per_pass"])
        for row in read("h200")["sampler"]["rows"]
    ]
    return table(("mode", "batch", "ms a pass", "tokens/s", "least ms by arithmetic"), rows)


def h200_layers_apart() -> str:
    """Speed of a sampler whose layers are not stacked."""
    rows = [
        (row["mode"], row["batch"], row["ms_per_pass"], row["tokens_per_s"])
        for row in read("h200")["sampler_layers_apart"]["rows"]
    ]
    return table(("mode", "batch", "ms a pass", "tokens/s"), rows)


def h200_attention() -> str:
    """Time of one layer's attention on one H200."""
    rows = [
        (row["mask"], row["backend"], row["forward_ms"], row["with_backward_ms"], row["temporaries_mib"])
        for row in read("h200")["attention"]["rows"]
    ]
    header = ("mask", "backend", "forward, ms", "forward and backward, ms", "temporaries, MiB")
    return table(header, rows)


def pytorch_cpu() -> str:
    """Times on two CPU cores against the published PyTorch code."""
    rows = []
    for name, label in (("forward", "forward pass"), ("train", "training step"), ("sampler", "sampler")):
        data = read(f"pytorch_cpu_{name}")
        found = data["results"][name]
        masked = found.get("torch_masked_rows_over_jax")
        times = (f"{found['torch']['median_s']:.2f}", f"{found['jax']['median_s']:.2f}")
        ratio = f"{found['torch_over_jax']:.2f}"
        rows.append((label, data["date"][:10], *times, ratio, f"{masked:.2f}" if masked else None))
    header = (
        "`small`, float32",
        "date",
        "PyTorch, s",
        "ours, s",
        "PyTorch / ours",
        "PyTorch with logits of masked rows only / ours",
    )
    return table(header, rows)


def sampler_quality() -> str:
    """Sudokus solved under each mode of the sampler, by two models."""
    first, second = read("sampler_quality")["rows"], read("sampler_quality_seed1")["rows"]
    rows = []
    for one, other in zip(first, second, strict=True):
        shares = [f"{100 * row['solved'] / row['puzzles']:.1f} %" for row in (one, other)]
        rows.append((one["mode"], *shares, f"{one['passes_per_row']:.1f}", f"{one['seconds']:.1f}"))
    header = ("mode", "solved, seed 0", "solved, seed 1", "passes a row (seed 0)", "seconds for 1600 (seed 0)")
    return table(header, rows)


def server_throughput() -> str:
    """Times of the server for all answers, against `Stream` on the same prompts, and where they were measured."""
    data = read_server()
    if data is None:
        return _SERVER_MISSING
    hardware, versions, settings = data["hardware"], data["versions"], data["settings"]
    where = (
        f"Measured on {data['date'][:10]}: {hardware['cores']} cores ({hardware['cpu']}), Python {versions['python']}, jax "
        f"{versions['jax']}; the model `{settings['model']}`, {settings['rows']} rows, {settings['max_new_tokens']} new "
        f"tokens, medians of {settings['repeats']} runs in turns.\n\n"
    )
    rows = []
    for row in data["throughput"]:
        times = (f"{row[f'{name}_seconds']['median_s']:.2f}" for name in ("stream", "http"))
        passes = f"{row['stream_forwards']} / {row['http_forwards']}"
        pass_ms = f"{1000 * row['stream_seconds']['median_s'] / row['stream_forwards']:.0f}"
        ratio = f"{row['http_over_stream']:.3f}"
        rows.append((row["model"], row["preset"], row["answers"], passes, pass_ms, *times, ratio))
    header = (
        "model",
        "preset",
        "answers",
        "passes of `Stream` / HTTP",
        "ms a pass",
        "`Stream`, s",
        "HTTP, s",
        "rate of HTTP / rate of `Stream`",
    )
    return where + table(header, rows)


def server_load() -> str:
    """Waiting times of the clients of the server."""
    data = read_server()
    if data is None:
        return _SERVER_MISSING
    rows = []
    for row in data["load"]:
        times = (row[name][share] for name in ("first_text_s", "end_s") for share in ("p50", "p95"))
        cells = (None if seconds is None else f"{seconds:.3f}" for seconds in times)
        rows.append((row["preset"], row["clients"], f"{row['answers_per_s']:.1f}", *cells))
    return table(("preset", "clients", "answers/s", "first text p50, s", "p95", "end p50, s", "p95"), rows)


def read_server() -> Any | None:
    """The measurement of the server, or None as long as there is none."""
    return read("server") if (ROOT / "bench" / "results" / "server.json").exists() else None


_SERVER_MISSING = (
    "Not measured yet: `python bench/server.py` writes the data, and `python docs/write_tables.py` this table.\n"
)


def planned_aims() -> str:
    """The aims for one H200, and what the compiled programs allow."""
    found = read("accelerator_planned")
    return tables.table(tables.aim_header(found), tables.aim_rows(found))


def planned_train_step() -> str:
    """The least time of the training step, by the compiled program."""
    # The last column is the time of compiling, which is of no interest here.
    rows = [row[:-1] for row in tables.train_rows(read("accelerator_planned"))]
    return tables.table(tables.TRAIN_HEADER[:-1], rows)


def planned_sampler() -> str:
    """The least time of the modes of the sampler, by the compiled programs."""
    return tables.table(tables.SAMPLE_HEADER, tables.sample_rows(read("accelerator_planned")))


def sampler_plans() -> str:
    """Memory of the sampler, copies of weights and bytes read, by the compiled programs."""
    rows = []
    for row in read("sampler_plans").values():
        place = f"{row['hardware']}, mesh {row['mesh']}"
        sizes = [f"{row[name] / 2**30:.2f}" for name in ("peak", "temporaries", "weights_copied")]
        share = f"{row['bytes_read'] / row['weights_in_bfloat16']:.2f}" if "bytes_read" in row else None
        rows.append((place, row["layers"], row["base"] or "bfloat16", row["mode"], row["batch"], *sizes, share))
    header = (
        "hardware",
        "layers",
        "weights",
        "program",
        "batch",
        "peak GiB",
        "of it temporaries",
        "weights copied, GiB",
        "bytes read / bfloat16 weights",
    )
    return table(header, rows)


def two_streams() -> str:
    """Memory and operations of a step of block diffusion, by the compiled and the traced programs."""
    rows = []
    for row in read("two_streams").values():
        settings = row["settings"]
        rank = settings.get("lora_rank")
        trains = f"LoRA, rank {rank}" if rank else f"all weights, {settings.get('moments', 'float32')} moments"
        ratios = (f"{row[key]['two'] / row[key]['one']:.2f}" for key in ("needed", "computed"))
        size = f"{settings['batch_size']} x {settings['max_length']}"
        sizes = (f"{row[key] / 2**30:.1f}" for key in ("peak", "limit"))
        how = "compiled" if row["compiled"] else "arithmetic"
        rows.append((row["hardware"], size, trains, f"`{row['remat']}`", *sizes, how, *ratios))
    header = (
        "hardware",
        "rows x tokens",
        "trains",
        "`--remat auto` takes",
        "peak GiB",
        "of",
        "by",
        "needed",
        "computed",
    )
    return table(header, rows)


def data() -> str:
    """The first and later starts on large data, beyond those of ten rows."""
    found = read("data")
    cells = []
    for name, one in found["results"].items():
        beyond = one["beyond_ten_rows"]
        cells.append(
            (
                f"{one['all_first']['rows']:,} {name.partition('-')[0]}",
                f"{one['bytes'] / 1e9:.2f}",
                f"{beyond['first_start_seconds']:.1f}",
                f"{beyond['later_start_seconds']:.1f}",
                *(f"{beyond[f'{when}_peak_bytes'] / 1e9:.3f}" for when in ("first", "later")),
                f"{beyond['bytes_per_second'] / 1e6:.2f}",
                f"{beyond['share_of_the_tokenizer_alone']:.2f}",
            )
        )
    header = (
        "data",
        "GB",
        "first start, s",
        "later start, s",
        "memory of the first, GB",
        "of the later, GB",
        "MB/s",
        "share",
    )
    hardware = found["hardware"]
    versions = ", ".join(
        f"{name} {found['versions'][name]}" for name in ("tokenizers", "transformers", "grain", "python")
    )
    about = (
        f"{found['date'][:10]}, {hardware['cores']} cores ({hardware['cpu']}), {versions}. Other programs used "
        f"{found['other_work_share']:.1%} of the machine. Memory and times are beyond those of ten rows."
    )
    return f"{table(header, cells)}\n{about}\n"


def cpu_pages() -> str:
    """Training steps on a CPU with and without large memory pages."""
    found = read("cpu_pages")
    rows = []
    for row in found["results"]:
        medians = (f"{statistics.median(row[name]):.3f}" for name in ("without", "with"))
        rows.append((f"{row['rows']} x {row['tokens']}", row["threads"], *medians, f"{row['ratio']:.2f}"))
    about = (
        f"{found['date'][:10]}, {found['settings']['repeats']} processes each; other programs used "
        f"{found['other_work_share']:.1%} of the machine."
    )
    header = ("rows x tokens", "threads", "a step, s", "with large pages, s", "ratio")
    return f"{table(header, rows)}\n{about}\n"


def floors() -> str:
    """The fewest nats that each kind of model can have on countdown."""
    with (ROOT / "docs" / "study" / "floors.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    cells = [
        [
            row["model"],
            *(f"{float(row[name]):.3f}" for name in ("nats_an_answer", "on_eight_levels")),
            None if row["nats_a_token_on_grid"] == "nan" else f"{float(row['nats_a_token_on_grid']):.3f}",
        ]
        for row in rows
    ]
    return table(("model", "bound of an answer", "mean over eight levels", "a masked token on the grid"), cells)


def _read_table(name: str) -> list[dict[str, str]] | None:
    """The rows of a table of docs/study, or None if it does not exist."""
    path = ROOT / "docs" / "study" / name
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _of_seeds(row: dict[str, str], digits: int, factor: float = 1.0, sign: str = "") -> str:
    """A mean with its interval, or with its lowest and highest seed, as `mask_study.tables.of_seeds`."""
    from mask_study.tables import of_seeds

    numbers = {name: float(row[name]) for name in ("mean", "low", "high", "least", "most")}
    return of_seeds(numbers | {"interval": row["interval"]}, digits, factor, sign)


# The arms of the comparison by the names that they have in floors.csv. In evaluation the first token of a block is known
# to the other tokens of the block.
_ARM_FLOORS = {
    "autoregressive": "two streams, blocks of 1",
    "bidirectional": "bidirectional",
    "two streams, blocks of 1": "two streams, blocks of 1",
    "two streams, blocks of 4": "two streams, blocks of 4, first token first",
    "two streams, blocks of 16": "two streams, blocks of 16, first token first",
    "one stream, block-causal:4": "block-causal:4",
    "one stream, causal": "causal",
}


def block_diffusion_study(*, chinese: bool = False) -> str:
    """Block diffusion beside other ways to train at equal FLOPs: bounds, floors and shares."""
    rows = _read_table("block_diffusion.csv")
    if rows is None:
        if chinese:
            return "未运行：`block_diffusion.csv` 还不存在。\n"
        return "Not run: there is no `block_diffusion.csv` yet.\n"
    floors = {row["model"]: float(row["nats_an_answer"]) for row in _read_table("floors.csv") or []}
    lines = []
    for task, arm in dict.fromkeys((row["task"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["arm"]) == (task, arm)]
        means = {row["measure"]: row for row in mine if not row["minus"]}
        beside = {row["measure"]: row for row in mine if row["minus"]}
        # In every other task the prompt determines the answer, or (GSM8K) the floor is not known.
        floor = floors.get(_ARM_FLOORS.get(arm, "")) if task == "countdown" else 0.0 if task == "sudoku" else None
        difference = beside.get("nats a token")
        shares = [
            _of_seeds(means[name], 0, 100.0) if name in means else None
            for name in ("a token a pass", "a token a pass, the first of a block first", "a quarter of the passes")
        ]
        lines.append(
            (
                task,
                arm,
                mine[0]["steps"],
                _of_seeds(means["nats an answer"], 2),
                None if floor is None else f"{floor:.2f}",
                _of_seeds(means["nats a token"], 3),
                None if difference is None else _of_seeds(difference, 3, 1.0, "+"),
                *shares,
            )
        )
    if chinese:
        from mask_study.tables import translated

        lines = [tuple(translated(cell) if isinstance(cell, str) else cell for cell in line) for line in lines]
        header = (
            "任务", "方式", "步数", "一个答案的界，nat", "下限", "每 token 的 nat", "减去双向", "逐个 token 的全对率，%",
            "每块首 token 先写，%", "四分之一前向次数的全对率，%",
        )  # fmt: skip
    else:
        header = (
            "task", "trained as", "steps", "bound of an answer, nats", "floor", "nats a token", "minus bidirectional",
            "right, a token a pass, %", "the first of a block first, %", "right, a quarter of the passes, %",
        )  # fmt: skip
    return table(header, lines)


def refreshing(*, chinese: bool = False) -> str:
    """Right answers with a cache that is refreshed every 1, 2 and 4 blocks and never."""
    rows = _read_table("refreshing.csv")
    if rows is None:
        command = "`python -m mask_study.refreshing`"
        return f"未运行：{command}。\n" if chinese else f"Not run: {command} makes the data.\n"
    ways = list(dict.fromkeys(row["of"] for row in rows))
    lines = []
    for task, variant in dict.fromkeys((row["task"], row["variant"]) for row in rows):
        found = {row["of"]: row for row in rows if (row["task"], row["variant"]) == (task, variant)}
        lines.append((task, variant, *(_of_seeds(found[way], 0, 100.0) if way in found else None for way in ways)))
    if chinese:
        from mask_study.tables import translated

        words = {
            "no cache": "不用缓存",
            "every block": "每块",
            "every 2 blocks": "每 2 块",
            "every 4 blocks": "每 4 块",
        }
        lines = [tuple(translated(cell) if isinstance(cell, str) else cell for cell in line) for line in lines]
        return table(("任务", "注意力掩码", *(words.get(way, "从不") for way in ways)), lines)
    return table(("task", "mask", *ways), lines)


BLOCKS: dict[str, Callable[[], str]] = {
    "cpu-pages": cpu_pages,
    "data": data,
    "floors": floors,
    "status": status,
    "status-zh": status_zh,
    "h200-train-step": h200_train_step,
    "h200-sampler": h200_sampler,
    "h200-layers-apart": h200_layers_apart,
    "h200-attention": h200_attention,
    "planned-aims": planned_aims,
    "planned-train-step": planned_train_step,
    "planned-sampler": planned_sampler,
    "sampler-plans": sampler_plans,
    "two-streams": two_streams,
    "pytorch-cpu": pytorch_cpu,
    "sampler-quality": sampler_quality,
    "server-throughput": server_throughput,
    "server-load": server_load,
    "block-diffusion-study": block_diffusion_study,
    "block-diffusion-study-zh": functools.partial(block_diffusion_study, chinese=True),
    "refreshing": refreshing,
    "refreshing-zh": functools.partial(refreshing, chinese=True),
}


def filled(text: str) -> str:
    """The text of a file with all its tables written from the data. Raises KeyError for a table of an unknown name."""
    return BLOCK.sub(lambda match: f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[3]}", text)


@functools.cache
def _page_numbers() -> Any:
    """The module docs/page_numbers.py, which imports the study; only pages with a template need it."""
    spec = importlib.util.spec_from_file_location("page_numbers", ROOT / "docs" / "page_numbers.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def _numbers(chinese: bool) -> Any:
    return _page_numbers().Numbers(chinese)


def template_of(name: str) -> pathlib.Path:
    """The template of a page of `TEMPLATES`."""
    return ROOT / "docs" / "templates" / pathlib.Path(name).name


def rendered(name: str, template: str | None = None) -> str:
    """The text of a page, with all numbers and tables from the data.

    Args:
      name: a member of `TEMPLATES`.
      template: the text of its template; None reads the file.

    Raises:
      jinja2.UndefinedError: the template calls a function that does not exist.
      KeyError: it asks for a number that the study does not have.
    """
    import jinja2

    from mask_study.runs import read_rows
    from mask_study.tables import fill_text

    numbers = _numbers(name.endswith(".zh.md"))
    numbers.computed.clear()
    source = template_of(name).read_text(encoding="utf-8") if template is None else template
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    page = environment.from_string(source, globals=numbers.names())
    page.render()  # the first time counts the differences that the page computes itself
    text = page.render()
    study = ROOT / "docs" / "study"
    rows = (read_rows(study / f"{table}.csv") for table in ("summary", "costs", "differences", "floors"))
    return filled(fill_text(text, ROOT / name, *rows))


def slides(source: str, folder: pathlib.Path) -> str:
    """The HTML of a deck: one section for each part of the Markdown between lines `---`, with its pictures inside.

    Args:
      source: the Markdown of the deck.
      folder: the folder from which its links to pictures start.
    """
    import markdown

    def embedded(found: re.Match[str]) -> str:
        path = folder / found[1]
        kind = "svg+xml" if path.suffix == ".svg" else path.suffix[1:]
        return f'src="data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"'

    parts = re.split(r"^---$", source, flags=re.MULTILINE)
    title = parts[0].strip().splitlines()[0].lstrip("# ")
    sections = [
        f'<section id="{number}">\n{markdown.markdown(part, extensions=["tables", "fenced_code"])}\n'
        f"<footer>{number} / {len(parts)}</footer>\n</section>"
        for number, part in enumerate(parts, 1)
    ]
    pages = re.sub(r'src="([^":]+)"', embedded, "\n".join(sections))
    language = "zh" if re.search("[\u4e00-\u9fff]", title) else "en"
    page = _SLIDE_PAGE.replace("LANGUAGE", language).replace("TITLE", html.escape(title))
    return page.replace("SECTIONS", pages)


_SLIDE_PAGE = """<!doctype html>
<html lang="LANGUAGE">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
body { margin: 0; background: #d9dee3; color: #1f2933; font: 20px/1.4 system-ui, "Noto Sans CJK SC", sans-serif; }
section { position: relative; box-sizing: border-box; width: min(100vw, 1280px); min-height: 680px; margin: 16px auto;
  padding: 40px 64px; background: #fff; }
h1 { font-size: 34px; margin: 0 0 18px; color: #1764ab; }
table { border-collapse: collapse; font-size: 17px; }
th, td { border: 1px solid #c3ccd5; padding: 4px 10px; text-align: left; }
pre { font: 15px/1.25 ui-monospace, Menlo, Consolas, monospace; background: #f3f5f7; padding: 12px; overflow-x: auto; }
code { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 0.88em; }
img { max-width: 100%; max-height: 430px; }
blockquote { margin: 14px 0; padding: 2px 16px; border-left: 4px solid #1764ab; color: #45525f; font-size: 18px; }
footer { position: absolute; right: 24px; bottom: 14px; color: #62707f; font-size: 14px; }
@media print { body { background: #fff; } section { margin: 0; break-after: page; } }
</style>
</head>
<body>
SECTIONS
<script>
const slides = [...document.querySelectorAll("section")];
const at = () => slides.reduce((best, one, i) =>
  Math.abs(one.getBoundingClientRect().top) < Math.abs(slides[best].getBoundingClientRect().top) ? i : best, 0);
document.addEventListener("keydown", (event) => {
  const step = {ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1}[event.key];
  if (!step) return;
  event.preventDefault();
  slides[Math.max(0, Math.min(slides.length - 1, at() + step))].scrollIntoView();
});
</script>
</body>
</html>
"""


def main() -> int:
    """Writes the tables and pages, or says which files differ."""
    if "--split" in sys.argv:
        split = json.dumps(_page_numbers().make_split(), indent=2) + "\n"
        (ROOT / "docs" / "study" / "split.json").write_text(split, encoding="utf-8")
    stale = []
    made: dict[str, Callable[[], str]] = {
        name: functools.partial(lambda name: filled((ROOT / name).read_text(encoding="utf-8")), name)
        for name in FILES
        if name not in TEMPLATES
    }
    made |= {name: functools.partial(rendered, name) for name in TEMPLATES}
    if importlib.util.find_spec("markdown") is not None:
        made |= {
            name: functools.partial(lambda source: slides(rendered(source), ROOT / "docs" / "talk"), of)
            for name, of in SLIDES.items()
        }
    for name, make in made.items():
        path = ROOT / name
        new = make()
        if not path.is_file() or new != path.read_text(encoding="utf-8"):
            stale.append(name)
            if "--check" not in sys.argv:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(new, encoding="utf-8")
    print(f"{'differ from the data' if '--check' in sys.argv else 'written'}: {', '.join(stale) or 'none'}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
