"""What the sampler's modes cost: time beside what the machine could do, and answers beside the right ones.

    python bench/sampler.py speed [--batches 1 4] [--lengths 64+64 64+256] [--torch] [--out FILE]
    python bench/sampler.py quality --model runs/demo/model [--out FILE]

`speed` runs random weights under several modes. Each is timed after a warm-up, its tokens a second stand beside a roofline:
the floating point operations of its passes over the rate of a large matrix product measured in the same run. Modes with
several tokens a pass write what the clock says: random weights are sure of nothing, so confidence rules would write one.
`--torch` times the published loop (`torch_reference.py`) as well.

`quality` lets a model that was trained on sudoku solve held-out puzzles under every preset and a few settings between
them.
"""

from __future__ import annotations

import dataclasses
import math
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

import dream_jax
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.data.sources import SUDOKU_GIVENS
from dream_jax.data.sudoku import TEST_SIZE, SudokuSource
from dream_jax.sampler import NoCache, SamplerConfig, Threshold, WindowCache
from dream_jax.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """Measures the time of each mode."""

    preset: str = "small"
    """Architecture."""
    dtype: str = "float32"
    """Dtype of weights and computation."""
    batches: tuple[int, ...] = (1, 4)
    lengths: tuple[str, ...] = ("64+64", "64+256")
    """Prompt tokens + new tokens."""
    block_length: int = 32
    repeats: int = 3
    torch: bool = False
    """Time the published PyTorch loop as well (batch 1; needs the extra `bench`)."""
    allow_busy: bool = False
    """Time even while other processes compute; the result then says so and is no evidence."""
    out: pathlib.Path = report.RESULTS / "sampler_speed.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quality:
    """Measures how many sudokus each mode solves."""

    model: str = "runs/demo/model"
    puzzles: int = 1600
    """How many held-out ones. They begin with the 200 that train.py solves, on which no setting can be told from another
    that solves one in a hundred less."""
    batch_size: int = 200
    out: pathlib.Path = report.RESULTS / "sampler_quality.json"


# --------------------------------------------------------------------------------------------------------- speed


def speed_modes(new: int, block: int) -> Mapping[str, SamplerConfig]:
    """The configuration of each mode, for `new` tokens."""
    block = min(block, new)
    cached = SamplerConfig(max_new_tokens=new, alg="entropy", block_length=block, cache=WindowCache())
    modes = {"exact": SamplerConfig.preset("exact", max_new_tokens=new)}
    for tokens in (1, 2, 4):
        steps = math.ceil(block / tokens) * math.ceil(new / block)
        modes[f"cached, {tokens} a pass"] = dataclasses.replace(cached, steps=steps)
    if new % block == 0:
        modes["Fast-dLLM dual"] = SamplerConfig.fast_dllm(
            cache="dual", block_length=block, max_new_tokens=new, steps=new
        )
    return modes


def pass_flops(config: DreamConfig, tokens: int, keys: int) -> float:
    """Floating-point operations of all layers for `tokens` queries of a row, each attending to `keys` keys."""
    width, head = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    weights = width * head * (2 * heads + 2 * kv_heads) + 3 * width * config.intermediate_size
    attention = 2 * heads * head * keys
    return 2.0 * tokens * config.num_hidden_layers * (weights + attention)


def sample_flops(config: DreamConfig, sampler: SamplerConfig, prompt: int, steps_B: np.ndarray, passes: int) -> float:
    """The least that one row's passes must compute: its layers, and the logits of its masked positions.

    Args:
      config: architecture.
      sampler: mode.
      prompt: prompt tokens.
      steps_B: the step that wrote each new token.
      passes: forward passes of the row.
    """
    new, length = sampler.max_new_tokens, prompt + sampler.max_new_tokens
    order = np.unique(steps_B, return_inverse=True)[1]
    block = sampler.block_length or new
    rows = sum(
        int(np.sum(order[i : i + block] >= step)) for i in range(0, new, block) for step in {*order[i : i + block]}
    )
    head = 2.0 * rows * config.hidden_size * config.vocab_size
    if isinstance(sampler.cache, NoCache):
        return passes * pass_flops(config, length, length) + head
    full = math.ceil(new / block)
    window = sampler.cache.left + block + (sampler.cache.right or 0)
    return full * pass_flops(config, length, length) + (passes - full) * pass_flops(config, window, length) + head


def peak_rate(dtype: str, seconds: float = 1.0) -> float:
    """Floating-point operations per second of a large matrix product: the best of a few runs."""
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
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return report.summarize(seconds)


def speed(settings: Speed, console: Console) -> None:
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
        raise RuntimeError(f"other processes used {busy:.0%} of the cores; wait for a quiet machine, or --allow-busy")
    write(settings, console, {"peak_flops": peak, "other_work_share": busy, "rows": rows})


def torch_loop(config: DreamConfig, prompt_length: int, new: int, repeats: int) -> dict[str, Any]:
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
    """The modes, from the most accurate to the fastest."""
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
    plain = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    if "model" in plain:
        plain["model"] = pathlib.Path(
            plain["model"]
        ).name  # the name only: a path of this machine says nothing elsewhere
    about = {
        "date": report.now(),
        "hardware": report.hardware() | {"devices": [str(device) for device in jax.devices()]},
        "versions": report.versions(["jax", "jaxlib", "flax", "numpy"]),
    }
    report.write_json(settings.out, about | {"settings": plain} | results)
    console.print(f"wrote {settings.out}")


def main() -> int:
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
