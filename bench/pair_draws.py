"""Measures by how much shared noise lowers the variance of the margin of a pair: `python bench/pair_draws.py --model DIR`.

The margin is (B(w) - B_ref(w)) - (B(l) - B_ref(l)), where B are likelihood bounds. For each pair it is estimated many times
with other noise, under each value of --shared-draws, and the variance over these repetitions is averaged over the pairs.
The reference is the same model with other weights: by default the model with random numbers added to its matrices.
"""

import dataclasses
import functools
import json
import pathlib
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import report
import tyro
from flax import nnx

from dream_jax import masks, pretrained
from dream_jax.bounds import MOST_ROWS, POSITIVE, SEED, IntegerRange, check_numbers
from dream_jax.data import EncodeOptions, PairRows, ReadOptions, kept_pairs, lay_out_pairs, open_source
from dream_jax.data.options import BatchOptions
from dream_jax.inference import find_tokenizer
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.posttraining.answer_bounds import answer_bounds, draw_masks
from dream_jax.posttraining.pair_driver import pair_arrays
from dream_jax.posttraining.pair_metrics import pair_margins
from dream_jax.posttraining.preference_settings import SharedDraws
from dream_jax.shapes import ParamTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairDrawSettings:
    """Model, pairs and repetitions."""

    model: str = "nano"
    """directory of the model"""
    reference: str | None = None
    """directory of the reference; by default the model with its matrices changed by --change"""
    data: str
    """file of pairs"""
    pairs: int = 32
    """number of pairs"""
    pair_draws: int = 4
    """number of noise levels of a bound"""
    repetitions: int = 32
    """number of estimates of each margin"""
    change: float = 0.02
    """standard deviation of the change of the matrices, as a share of their own"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the noise and of the change"""
    out: pathlib.Path | None = None
    """JSON file for the result"""

    def __post_init__(self) -> None:
        several = IntegerRange(2, MOST_ROWS)
        check_numbers(self, pairs=several, pair_draws=several, repetitions=several, change=POSITIVE, seeds=SEED)


def changed(params: ParamTree, share: float, key: jax.Array) -> ParamTree:
    """Returns parameters in which normal numbers are added to each matrix, with `share` of its own deviation."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(
        tree,
        [
            leaf + share * jnp.std(leaf) * jax.random.normal(one, leaf.shape, leaf.dtype) if leaf.ndim > 1 else leaf
            for leaf, one in zip(leaves, keys, strict=True)
        ],
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "draws", "shared"))
def margins(
    graphdef: nnx.GraphDef[Dream],
    policy: ParamTree,
    reference: ParamTree,
    arrays: dict[str, jax.Array],
    key: jax.Array,
    draws: int,
    shared: SharedDraws,
) -> jax.Array:
    """Returns one estimate of the margin of each pair, float32 [P]."""
    found = []
    for params in (policy, reference):
        is_reference = params is reference
        model: Dream = merge_params(graphdef, params)
        _, masked = draw_masks(key, arrays["draw"][:, 0], arrays["maskable"], draws, shared, of_reference=is_reference)
        bound_PAn, _, _ = answer_bounds(
            model, arrays["tokens"], arrays["maskable"], masked, arrays["valid"], masks.Bidirectional()
        )
        found.append(jnp.mean(bound_PAn, axis=-1))
    size_PA = jnp.sum(arrays["maskable"], axis=-1, dtype=jnp.float32)
    return pair_margins("vrpo", found[0], found[1], size_PA)


def measure(settings: PairDrawSettings, seed: int) -> dict[str, float]:
    """Returns the mean variance of a margin for each value of --shared-draws."""
    model = pretrained.load(settings.model, layers="stacked")
    tokenizer = find_tokenizer(None, settings.model, model)
    rows = PairRows(open_source(settings.data, options=ReadOptions(held_out=0.0)), tokenizer, EncodeOptions())
    kept = kept_pairs(rows, 2048)
    width = int(kept.lengths_NA.max())
    numbers = kept.numbers[: settings.pairs].tolist()
    laid = [rows.fitted(one, width) for one in numbers]
    batch = lay_out_pairs(laid, width, tokenizer.pad_id, BatchOptions(), np.arange(len(laid)), np.array(numbers))
    graphdef, policy = split_params(model)
    if settings.reference is None:
        reference = changed(policy, settings.change, jax.random.key(seed))
    else:
        reference = split_params(pretrained.load(settings.reference, layers="stacked"))[1]
    found = {}
    for shared in get_args(SharedDraws):
        each = [
            np.asarray(
                margins(
                    graphdef, policy, reference, pair_arrays(batch), jax.random.key(1000 * seed + number),
                    settings.pair_draws, shared,
                )
            )
            for number in range(settings.repetitions)
        ]  # fmt: skip
        found[shared] = float(np.var(np.stack(each), axis=0, ddof=1).mean())
    return found


def main(settings: PairDrawSettings) -> None:
    """Prints the variances and their ratios for every seed, and writes them."""
    results: dict[str, Any] = {"settings": {"model": pathlib.Path(settings.model).name, "pairs": settings.pairs}}
    results["settings"] |= {"pair_draws": settings.pair_draws, "repetitions": settings.repetitions}
    results["hardware"], results["seeds"] = report.hardware(), {}
    for seed in settings.seeds:
        found = measure(settings, seed)
        found |= {f"none / {name}": found["none"] / found[name] for name in ("all", "models")}
        results["seeds"][str(seed)] = found
        print(f"seed {seed}: " + "  ".join(f"{name} {value:.4g}" for name, value in found.items()), flush=True)
    if settings.out is not None:
        settings.out.write_text(json.dumps(results, indent=2) + "\n")
        print(f"wrote {settings.out}")


if __name__ == "__main__":
    main(tyro.cli(PairDrawSettings, description=__doc__))
