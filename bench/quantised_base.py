"""Measures the memory of a quantised base, and the difference of its logits and answers from those of the float weights.

    python bench/quantised_base.py --model PATH|PRESET [--data sudoku] [--rows 16] [--out FILE]

Rows of a data set, with half of each response masked, go through the float32 model and through each kind of base. The
logits of the masked positions are compared: root mean square of the error / root mean square of the logits, mean KL
divergence in nats, and share of positions with the same most probable token. Then the same prompts are answered with the
preset `fast` at temperature 0; the share of equal tokens is that of all positions of the answers.

"int8 on a GPU" uses the products that a GPU computes in a window pass: codes times scales, both in bfloat16. Here they are
computed in a pass over whole rows, of which there are few. The result stands beside "bfloat16", the same model without
codes. The untrained tiny checkpoint of the tests is also measured, on random tokens.

Writes FILE (JSON). Needs the extra `bench`. What a window pass on a GPU reads with each base is in the result of
bench/sampler_plans.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report
import tyro
from rich.console import Console
from rich.table import Table

from dream_jax import lora, pretrained, quantisation
from dream_jax.data import TokenizedRows, lay_out, length_report, open_source
from dream_jax.inference import find_tokenizer
from dream_jax.model import Dream, parameter_count, split_params
from dream_jax.sampler import Preset, SamplerConfig, generate
from dream_jax.target import target_platform
from dream_jax.tokenizer import Tokenizer

NEW_TOKENS = 32  # number of new tokens of an answer
PRESETS_ASKED: tuple[Preset, ...] = ("fast",)  # this preset computes passes over windows of 32 tokens
TINY = report.REPOSITORY / "tests" / "golden" / "tiny_a" / "hf"


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantisedBaseSettings:
    """The model and the rows of the comparison."""

    model: str = "runs/demo/model"
    """A directory or a preset; a preset has random weights, whose results say little about trained ones."""
    tokenizer: str | None = None
    """Directory of a tokenizer, or "bytes"; by default the tokenizer of the model."""
    data: str = "sudoku"
    """data as for train.py --data, of which held-out rows are used"""
    rows: int = 16
    """Number of rows."""
    out: pathlib.Path = report.RESULTS / "quantised_base.json"
    """Result file."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows={self.rows} must be at least 1")


def canvases(settings: QuantisedBaseSettings, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Returns token ids int32 [B, T] with half of each response masked, and bool [B, T], true at masked positions."""
    rows = TokenizedRows(open_source(settings.data, "test", 0), tokenizer)
    longest = length_report(rows, 2048, limit=settings.rows).longest
    found = [row for _, row in rows.first(settings.rows, longest)]
    if not found:
        raise ValueError(f"no row of {settings.data} fits in 2048 tokens")
    batch = lay_out(found, [longest - row.prompt_length for row in found], longest, tokenizer.pad_id)
    masked = batch.maskable_BT & (np.random.default_rng(0).random(batch.maskable_BT.shape) < 0.5)
    return np.where(masked, tokenizer.mask_id, batch.tokens_BT).astype(np.int32), masked


def at_masks(model: Dream, tokens: np.ndarray, masked: np.ndarray) -> jax.Array:
    """Returns the logits that predict the masked positions, float32 [masked positions, V]."""
    # A pass has few rows, so that its products are those of a window pass.
    rows = max(1, quantisation.MOST_FUSED_ROWS // tokens.shape[1])
    logits = np.concatenate([np.asarray(model(tokens[at : at + rows])) for at in range(0, len(tokens), rows)])
    # With the right shift the logits at i - 1 predict token i.
    return jnp.asarray(logits[:, :-1][masked[:, 1:]])


def answers(model: Dream, tokens: np.ndarray, new_tokens: int) -> dict[str, np.ndarray]:
    """Returns the new tokens, int32 [B, new_tokens], for each of `PRESETS_ASKED`; a prompt is the first half of a row."""
    prompt = tokens[:, : tokens.shape[1] // 2]
    settings: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "temperature": 0.0,
        "forbidden_tokens": (model.config.mask_token_id,),
    }
    return {
        preset: np.asarray(generate(model, prompt, SamplerConfig.preset(preset, **settings)).tokens)[
            :, prompt.shape[1] :
        ]
        for preset in PRESETS_ASKED
    }


def compared(path: str, tokens: np.ndarray, masked: np.ndarray, new_tokens: int) -> dict[str, Any]:
    """Compares the model at `path` in float32 with its quantised and bfloat16 versions.

    Returns:
      A dict from the name of the weights to the errors of the logits (see `lora.logit_error`), `bytes_a_weight` of the
      layers, and `equal_tokens`, the share of equal tokens in the answers for each preset.
    """
    exact = pretrained.load(path)
    wanted, wanted_answers = at_masks(exact, tokens, masked), answers(exact, tokens, new_tokens)
    weights = parameter_count(exact.layers)
    results: dict[str, Any] = {}
    for name in (*quantisation.KINDS, "bfloat16", "int8 on a GPU"):
        dtype = "float32" if name in quantisation.KINDS else "bfloat16"
        base: Any = None if name == "bfloat16" else "int8" if name == "int8 on a GPU" else name
        model = pretrained.load(path, dtype, base=base, attention_backend="xla")
        if name == "int8 on a GPU":
            lora.round_scales(model)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(split_params(model)[1]["layers"]))
        with contextlib.ExitStack() as contexts:
            if name == "int8 on a GPU":
                contexts.enter_context(target_platform("gpu"))
                contexts.enter_context(quantisation.fusing())
            found, found_answers = at_masks(model, tokens, masked), answers(model, tokens, new_tokens)
        results[name] = {
            **lora.logit_error(wanted, found),
            "bytes_a_weight": nbytes / weights,
            "equal_tokens": {
                preset: float(np.mean(found_answers[preset] == those)) for preset, those in wanted_answers.items()
            },
        }
    return results


def main(settings: QuantisedBaseSettings) -> None:
    """Compares all kinds of codes, prints a table and writes the result."""
    console, other_work = Console(), report.OtherWork()
    console.print(settings)
    described = pretrained.describe(settings.model)
    tokens, masked = canvases(settings, find_tokenizer(settings.tokenizer, settings.model, described))
    results = compared(settings.model, tokens, masked, NEW_TOKENS)
    random = np.random.default_rng(0)
    vocabulary = pretrained.describe(str(TINY)).config.vocab_size
    tiny = random.integers(0, vocabulary - 8, (16, 64)).astype(np.int32)
    tiny_results = compared(str(TINY), tiny, random.random(tiny.shape) < 0.5, NEW_TOKENS)
    for title, some in ((settings.model, results), ("tiny checkpoint, untrained", tiny_results)):
        table = Table(
            "weights", "bytes a weight of the layers", "logit error", "KL, nats", "same first choice", "equal tokens"
        )
        table.title = title
        for name_of_kind, found in some.items():
            figures = (found[name] for name in ("bytes_a_weight", "relative", "kl", "same_top"))
            equal = ", ".join(f"{preset} {share:.1%}" for preset, share in found["equal_tokens"].items())
            table.add_row(name_of_kind, *(f"{figure:.3g}" for figure in figures), equal)
        console.print(table)
    plain = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    report.write_json(
        settings.out,
        {
            "date": report.now(),
            "hardware": {**report.hardware(), "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"},
            "other_work": other_work.share(),
            "versions": report.versions(["jax", "jaxlib", "flax", "numpy"]),
            "settings": plain,
            "masked_positions": int(masked[:, 1:].sum()),
            "results": results,
            "tiny": tiny_results,
        },
    )
    console.print(f"wrote {settings.out}")


if __name__ == "__main__":
    main(tyro.cli(QuantisedBaseSettings, description=__doc__))
