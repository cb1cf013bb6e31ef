"""Measures the modes of the sampler: speed relative to the machine's peak, and the share of correct answers.

    python bench/sampler.py speed [--batches 1 4] [--lengths 64+64 64+256] [--torch] [--out FILE]
    python bench/sampler.py quality --model runs/demo/model [--out FILE]

`speed` samples from random weights in several modes and times each after a warm-up. Its tokens per second are compared
with a roofline: the rate of a large matrix product, measured in the same run, divided by the operations per token. Modes
that write several tokens per pass follow a fixed schedule, because with random weights no token is confident enough
for a rule by confidence. `--torch` also times the published loop (`torch_reference.py`).

`quality` lets a model that was trained on sudoku solve held-out puzzles with every preset and some settings between them.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import report
import tyro
from flax import nnx
from rich.console import Console
from rich.table import Table
from sampler_modes import sample_flops, speed_modes

import dream_jax
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.data.sources import SUDOKU_GIVENS
from dream_jax.data.sudoku import TEST_SIZE, SudokuSource
from dream_jax.sampler import NoCache, SamplerConfig, Threshold, WindowCache
from dream_jax.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Measures the speed of each mode, with random weights."""

    preset: str = "small"
    """Name of the architecture in `dream_jax.config.PRESETS`."""
    dtype: str = "float32"
    """Dtype of weights and computation."""
    batches: tuple[int, ...] = (1, 4)
    """Numbers of rows."""
    lengths: tuple[str, ...] = ("64+64", "64+256")
    """Numbers of prompt tokens and new tokens, as PROMPT+NEW."""
    block_length: int = 32
    repeats: int = 3
    torch: bool = False
    """Also time the published PyTorch loop (batch 1; needs the extra `bench`)."""
    allow_busy: bool = False
    """Measure even while other processes compute. The result records their share, and should not be quoted."""
    out: pathlib.Path = report.RESULTS / "sampler_speed.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """Measures how many sudoku puzzles each mode solves."""

    model: str = "runs/demo/model"
    puzzles: int = 1600
    """Number of held-out puzzles. The first 200 are those that train.py solves, which are too few to distinguish
    settings that differ by 1 %."""
    batch_size: int = 200
    out: pathlib.Path = report.RESULTS / "sampler_quality.json"


# --------------------------------------------------------------------------------------------------------- speed


def peak_rate(dtype: str, seconds: float = 1.0) -> float:
    """Returns the floating-point operations per second of a large matrix product: the best rate within `seconds`."""
    size = 2048
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(x))
    best, begun = 0.0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


def measured(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Returns the times of `repeats` calls, as `report.summarize`."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return report.summarize(seconds)


def speed(settings: Speed, console: Console) -> None:
    """Times every mode, prints a table and writes the result."""
    config = PRESETS[settings.preset]
    model = jax.jit(lambda: dream_jax.Dream(config, rngs=nnx.Rngs(0), param_dtype=settings.dtype))()
    peak = peak_rate(settings.dtype)
    other_work = report.OtherWork()
    console.print(f"a matrix product runs at {peak / 1e9:.0f} GFLOP/s")
    table = Table("mode", "batch", "prompt + new", "s", "tokens/s", "roofline", "share", "passes")
    rows = []
    for lengths in settings.lengths:
        prompt_length, new = (int(part) for part in lengths.split("+"))
        for batch in settings.batches:
            prompt = np.random.default_rng(0).integers(0, config.pad_token_id, (batch, prompt_length)).astype(np.int32)
            for name, sampler in speed_modes(new, settings.block_length).items():
                run = lambda prompt=prompt, sampler=sampler: jax.block_until_ready(
                    dream_jax.generate(model, prompt, sampler)
                )
                out = run()
                times = measured(run, settings.repeats)
                flops = sum(
                    sample_flops(config, sampler, prompt_length, steps, int(passes))
                    for steps, passes in zip(np.asarray(out.commit_step)[:, prompt_length:], out.passes, strict=True)
                )
                rate, roofline = batch * new / times["median_s"], batch * new * peak / flops
                rows.append(
                    {"mode": name, "batch": batch, "prompt": prompt_length, "new": new, "tokens_per_s": rate}
                    | {"roofline_tokens_per_s": roofline, "forwards": int(out.forwards)}
                    | times
                )
                cells = (f"{times['median_s']:.3f}", f"{rate:.1f}", f"{roofline:.1f}", f"{rate / roofline:.0%}")
                table.add_row(name, str(batch), lengths, *cells, str(int(out.forwards)))
        if settings.torch:
            times = torch_loop(config, prompt_length, new, settings.repeats)
            rows.append({"mode": "PyTorch", "batch": 1, "prompt": prompt_length, "new": new} | times)
            table.add_row("PyTorch", "1", lengths, f"{times['median_s']:.3f}", f"{new / times['median_s']:.1f}")
    console.print(table)
    busy = other_work.share()
    if busy > 0.05 and not settings.allow_busy:
        raise RuntimeError(
            f"other processes used {busy:.0%} of the cores; wait until they have ended, or pass --allow-busy"
        )
    write(settings, console, {"peak_flops": peak, "other_work_share": busy, "rows": rows})


def torch_loop(config: DreamConfig, prompt_length: int, new: int, repeats: int) -> dict[str, Any]:
    """Returns the times of the published loop in PyTorch, for one row."""
    import torch
    import torch_reference as reference

    torch.set_num_threads(report.num_cores())
    model = reference.random_model(config.to_dict(), seed=0)
    prompt = torch.from_numpy(np.random.default_rng(0).integers(0, config.pad_token_id, (1, prompt_length)))
    settings = reference.SamplerSettings(max_new_tokens=new, steps=new, alg="entropy", temperature=0.0, top_p=None)

    def run() -> None:
        reference.diffusion_generate(model, prompt, settings, mask_token_id=config.mask_token_id, head_rows="all")

    run()
    return measured(run, repeats)


# ------------------------------------------------------------------------------------------------------- quality


def quality_modes(new: int) -> Mapping[str, SamplerConfig]:
    """Returns name -> configuration of each mode, from the most accurate to the fastest."""
    exact = SamplerConfig.preset("exact", max_new_tokens=new)
    balanced = SamplerConfig.preset("balanced", max_new_tokens=new)
    narrow = dataclasses.replace(balanced, cache=WindowCache(left=8, refresh_passes=4))
    return {
        "exact": exact,
        "exact, half the steps": dataclasses.replace(exact, steps=new // 2),
        "balanced": balanced,
        "balanced, nothing kept": dataclasses.replace(balanced, cache=NoCache()),
        "balanced, narrow windows": narrow,
        **{
            f"balanced, threshold {tau}": dataclasses.replace(balanced, commit=Threshold(tau))
            for tau in (0.95, 0.99, 0.995, 0.999)
        },
        "fast": SamplerConfig.preset("fast", max_new_tokens=new),
        "Fast-dLLM dual": SamplerConfig.fast_dllm(
            cache="dual",
            block_length=new // 2,
            max_new_tokens=new,
            steps=new,
            alg="maskgit_plus",
            commit=Threshold(0.9),
        ),
    }


def quality(settings: Quality, console: Console) -> None:
    """Solves the puzzles in every mode, prints a table and writes the result."""
    model = dream_jax.load(settings.model)
    if model.tokenizer_dir is None:
        raise ValueError(f"{settings.model} has no tokenizer; train it with train.py --data sudoku")
    tokenizer = load_tokenizer(model.tokenizer_dir)
    source = SudokuSource("test", size=settings.puzzles, min_givens=SUDOKU_GIVENS)
    puzzles = [source[index] for index in range(len(source))]
    first = min(TEST_SIZE, len(puzzles))
    prompts = np.array([tokenizer.encode(str(row.prompt)) for row in puzzles], np.int32)
    new = max(len(tokenizer.encode(row.response)) for row in puzzles) + 1
    table = Table("mode", "solved", f"of the first {first}", "passes a row", "forwards", "s")
    rows = []
    for name, sampler in quality_modes(new + new % 2).items():
        sampler = dataclasses.replace(sampler, vocab_limit=tokenizer.vocab_limit, forbidden_tokens=(tokenizer.mask_id,))
        solved: list[bool] = []
        passes, forwards, seconds = 0, 0, 0.0
        for begin in range(0, len(prompts), settings.batch_size):
            batch = prompts[begin : begin + settings.batch_size]
            jax.block_until_ready(dream_jax.generate(model, batch, sampler))
            start = time.perf_counter()
            out = jax.block_until_ready(dream_jax.generate(model, batch, sampler))
            seconds += time.perf_counter() - start
            passes, forwards = passes + int(np.sum(out.passes)), forwards + int(out.forwards)
            for tokens, row in zip(np.asarray(out.tokens)[:, batch.shape[1] :], puzzles[begin:], strict=False):
                ids = [*tokens.tolist(), tokenizer.eos_id]
                text = tokenizer.decode(ids[: ids.index(tokenizer.eos_id)], skip_special=True)
                solved.append(text.strip() == row.response.strip())
        rows.append(
            {"mode": name, "solved": sum(solved), "puzzles": len(puzzles), "solved_of_first": sum(solved[:first])}
            | {"first": first, "passes_per_row": passes / len(puzzles)}
            | {"forwards": forwards, "seconds": seconds, "config": repr(sampler)}
        )
        cells = (str(sum(solved[:first])), f"{passes / len(puzzles):.2f}", str(forwards), f"{seconds:.2f}")
        table.add_row(name, f"{sum(solved)}/{len(puzzles)}", *cells)
    console.print(table)
    write(settings, console, {"rows": rows})


# ---------------------------------------------------------------------------------------------------------- main


def write(settings: Speed | Quality, console: Console, results: dict[str, Any]) -> None:
    """Writes results with date, hardware, versions and settings to `settings.out`."""
    plain = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    if "model" in plain:
        plain["model"] = pathlib.Path(
            plain["model"]
        ).name  # only the name is stored, because a path means nothing on another machine
    about = {
        "date": report.now(),
        "hardware": report.hardware() | {"devices": [str(device) for device in jax.devices()]},
        "versions": report.versions(["jax", "jaxlib", "flax", "numpy"]),
    }
    report.write_json(settings.out, about | {"settings": plain} | results)
    console.print(f"wrote {settings.out}")


def main() -> int:
    """Runs the chosen command and returns the exit status."""
    chosen = tyro.cli(
        Annotated[Speed, tyro.conf.subcommand("speed")] | Annotated[Quality, tyro.conf.subcommand("quality")],
        description=__doc__,
    )
    console = Console()
    console.print(chosen)
    if isinstance(chosen, Speed):
        speed(chosen, console)
    else:
        quality(chosen, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
