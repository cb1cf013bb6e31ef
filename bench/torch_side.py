"""Times the sampler and the training step in plain PyTorch (`torch_reference.py`), on the first GPU or else on the CPU.

    python bench/torch_side.py WORK SETTINGS RESULT

WORK is "train_step" or "sampler", SETTINGS is a JSON object with the arguments of the function of this name, and RESULT is
the JSON file to write. It runs in a process of its own and imports no jax, because jax and PyTorch each keep most of the
memory of a GPU until their process ends. Needs torch, transformers and safetensors.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

GIB = 2**30


def train_step(
    *, config: Mapping[str, Any], batch: int, tokens: int, recompute: bool, bfloat16: bool, warmup: int, steps: int
) -> dict[str, Any]:
    """Times training steps with logits at masked positions only, fused AdamW and float32 weights.

    Args:
      config: the fields of a published config.json.
      batch, tokens: the rows of a step, and the tokens of a row.
      recompute: whether the activations of each layer are computed again in the backward pass.
      bfloat16: whether the products are in bfloat16 (autocast).
      warmup, steps: number of steps that are not timed, and of steps that are.

    Returns:
      The times in seconds, the tokens per second, and on a GPU the peak of the allocated memory in GiB.
    """
    import torch
    import torch_reference as reference

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = reference.build_model(config, device=device)
    if recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    optimizer = reference.adamw(model, learning_rate=1e-5)
    generator = torch.Generator(device).manual_seed(0)
    tokens_BT = torch.randint(0, 256, (batch, tokens), device=device, generator=generator)
    # Evenly spaced noise levels, because dream_jax also spreads them over the batch.
    t_B = (torch.arange(batch, device=device) + 0.5) / batch
    seconds = []
    for number in range(warmup + steps):
        masked_BT = torch.rand(tokens_BT.shape, device=device, generator=generator) < t_B[:, None]
        _finish(device)
        begun = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            reference.train_step(
                model, optimizer, tokens_BT, masked_BT, t_B, mask_token_id=config["mask_token_id"], head_rows="masked"
            )
        _finish(device)
        if number >= warmup:
            seconds.append(time.perf_counter() - begun)
    result = _result(seconds, device)
    return result | {"tokens_per_second": batch * tokens / result["seconds"]["median_s"]}


def sampler(
    *,
    config: Mapping[str, Any],
    batch: int,
    prompt: int,
    new_tokens: int,
    steps: int,
    head_rows: str,
    top_p: float | None = None,
    temperature: float = 0.0,
    bfloat16: bool = True,
    repeats: int = 2,
) -> dict[str, Any]:
    """Times the published loop: `steps` forward passes that write `new_tokens` tokens in order of their entropy.

    Args:
      config: the fields of a published config.json.
      batch, prompt: number of rows, and of prompt tokens of each row.
      new_tokens, steps: number of new tokens, and of passes.
      head_rows: "all" or "masked", where logits are computed.
      top_p, temperature: as in `torch_reference.SamplerSettings`.
      bfloat16: whether the weights are in bfloat16, else in float32.
      repeats: number of timed runs after the first one.

    Returns:
      The times in seconds, the milliseconds of a pass, and on a GPU the peak of the allocated memory in GiB.
    """
    import torch
    import torch_reference as reference

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = reference.build_model(config, device=device, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    return sampler_of(
        model,
        mask_token_id=config["mask_token_id"],
        vocab_size=config["pad_token_id"],
        batch=batch,
        prompt=prompt,
        settings=reference.SamplerSettings(
            max_new_tokens=new_tokens, steps=steps, alg="entropy", temperature=temperature, top_p=top_p
        ),
        head_rows=head_rows,
        repeats=repeats,
    )


def sampler_of(
    model: Any,
    *,
    mask_token_id: int,
    vocab_size: int,
    batch: int,
    prompt: int,
    settings: Any,
    head_rows: Any,
    repeats: int,
) -> dict[str, Any]:
    """Times the published loop on a model that exists already; the ids of the prompt are below `vocab_size`."""
    import torch
    import torch_reference as reference

    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    prompt_BP = torch.randint(0, vocab_size, (batch, prompt), device=device, generator=generator)
    seconds = []
    for number in range(1 + repeats):
        _finish(device)
        begun = time.perf_counter()
        reference.diffusion_generate(model, prompt_BP, settings, mask_token_id=mask_token_id, head_rows=head_rows)
        _finish(device)
        if number:
            seconds.append(time.perf_counter() - begun)
    result = _result(seconds, device)
    return result | {"ms_a_pass": 1e3 * result["seconds"]["median_s"] / settings.steps}


def _finish(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _result(seconds: list[float], device: Any) -> dict[str, Any]:
    import torch

    result: dict[str, Any] = {
        "torch": torch.__version__,
        "seconds": {"median_s": statistics.median(seconds), "min_s": min(seconds), "all_s": seconds},
    }
    if device.type == "cuda":
        result["allocator_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return result


WORK: Mapping[str, Callable[..., dict[str, Any]]] = {"train_step": train_step, "sampler": sampler}


def main() -> None:
    """Runs the work that is named on the command line, and writes its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORK)
    parser.add_argument("settings", type=json.loads)
    parser.add_argument("result", type=pathlib.Path)
    given = parser.parse_args()
    given.result.write_text(json.dumps(WORK[given.work](**given.settings)), encoding="utf-8")


if __name__ == "__main__":
    main()
