"""Measures the memory of a quantised base, and the difference of its logits from those of the float weights.

    python bench/quantised_base.py --model PATH|PRESET [--data sudoku] [--rows 16] [--out FILE]

Rows of a data set, with half of each response masked, go through the float32 model and through each kind of base. The
logits of the masked positions are compared: root mean square of the error / root mean square of the logits, mean KL
divergence in nats, and share of positions with the same most probable token. Writes FILE (JSON). Needs the extra `bench`.
"""

from __future__ import annotations

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
from dream_jax.tokenizer import Tokenizer


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
    # With the right shift the logits at i - 1 predict token i.
    return jnp.asarray(np.asarray(model(tokens))[:, :-1][masked[:, 1:]])


def main(settings: QuantisedBaseSettings) -> None:
    """Compares all kinds of codes, prints a table and writes the result."""
    console, other_work = Console(), report.OtherWork()
    console.print(settings)
    exact = pretrained.load(settings.model)
    tokens, masked = canvases(settings, find_tokenizer(settings.tokenizer, settings.model, exact))
    wanted, weights = at_masks(exact, tokens, masked), parameter_count(exact.layers)
    results: dict[str, Any] = {}
    for kind in quantisation.KINDS:
        model = pretrained.load(settings.model, base=kind)
        nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(split_params(model)[1]["layers"]))
        results[kind] = {
            **lora.logit_error(wanted, at_masks(model, tokens, masked)),
            "bytes_a_weight": nbytes / weights,
        }
    table = Table("base", "bytes a weight of the layers", "logit error", "KL, nats", "same first choice")
    for name_of_kind, found in results.items():
        figures = (found[name] for name in ("bytes_a_weight", "relative", "kl", "same_top"))
        table.add_row(name_of_kind, *(f"{figure:.3g}" for figure in figures))
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
        },
    )
    console.print(f"wrote {settings.out}")


if __name__ == "__main__":
    main(tyro.cli(QuantisedBaseSettings, description=__doc__))
