"""Trains a model from random weights on GSM8K, small enough for two CPU cores: nano layers with Dream's vocabulary.

    python bench/gsm8k_scratch.py --assets DIR [--steps 320] [--weight uniform] [--out docs/runs/gsm8k-nano]

DIR holds `data/gsm8k` (7,473 training questions) and `dream-v0-instruct-7b` with the tokenizer, as for the environment
variable `DREAM_JAX_ASSETS`. The script trains with `dream_jax.trainer.train` as `train.py` does, evaluates on test
questions at a fixed grid of noise levels during the run, and writes report, curves and evaluations of the run to OUT. It
prints whether the nll fell, and whether it rose again.

    python bench/gsm8k_scratch.py --assets DIR --baseline

trains nothing and writes `unigram.json` beside a stored run: the nll of a model that knows only how often each token is
among the learned tokens of the training rows, on the same rows and masked positions. No model that reads its context
should have more.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import os
import pathlib
import shutil
import sys
import tempfile
from typing import Literal

import numpy as np
import report
import tyro
from flax import nnx
from rich.console import Console

import dream_jax
from dream_jax import sharding
from dream_jax.batch import Batch
from dream_jax.data import TokenizedRows
from dream_jax.files import new_directory, write_json
from dream_jax.reports.record import read_record
from dream_jax.reports.run_report import write_report
from dream_jax.tokenizer import load_tokenizer
from dream_jax.trainer import TrainSettings, train
from dream_jax.trainer.heldout import Grid, lay_out_held_out

KEPT = ("eval.csv", "metrics.csv", "summary.json", "data.json", "settings.json", "parts.json", "incidents.jsonl")


RISE = 0.01
"""Allowed rise of the nll from its minimum to the end, as a share of the minimum."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gsm8kScratchSettings:
    """Size and folders of the run."""

    assets: pathlib.Path
    """Folder that holds data/gsm8k and dream-v0-instruct-7b."""
    steps: int = 320
    batch_size: int = 8
    max_length: int = 256
    eval_every: int = 40
    eval_rows: int = 64
    learning_rate: float = 1e-3
    weight: Literal["uniform", "linear", "inverse-time", "cart"] = "uniform"
    """weight of the loss; uniform is the weight of the evaluation"""
    out: pathlib.Path = report.REPOSITORY / "docs" / "runs" / "gsm8k-nano"
    """folder of the results; must not exist yet, but with --baseline it must"""
    baseline: bool = False
    """train nothing; write the nll of the frequencies of the tokens"""


def make_model(folder: pathlib.Path, tokenizer: pathlib.Path) -> None:
    """Writes a model with random weights: the layers of nano with the vocabulary of Dream-7B."""
    small, nano = dream_jax.PRESETS["small"], dream_jax.PRESETS["nano"]
    special = {name: getattr(small, name) for name in ("vocab_size", "mask_token_id", "pad_token_id")}
    model = dream_jax.Dream(dataclasses.replace(nano, **special), rngs=nnx.Rngs(0))
    dream_jax.save(model, folder, tokenizer_dir=tokenizer)


def verdict(path: pathlib.Path) -> tuple[bool, str]:
    """Returns whether the nll fell and stayed low, and a sentence with the numbers.

    All scores use the same rows, noise levels and masks, so their differences are less random than their intervals suggest.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(int(row["step"]), float(row["nll"]), float(row["nll_se"])) for row in csv.DictReader(file)]
    first, last, best = rows[0], rows[-1], min(rows, key=lambda row: row[1])
    holds = best[1] < first[1] - 1.96 * first[2] and last[1] - best[1] <= RISE * best[1]
    return holds, (
        f"nll {first[1]:.4f} +- {1.96 * first[2]:.4f} after step {first[0]}, least {best[1]:.4f} after step {best[0]}, "
        f"{last[1]:.4f} after step {last[0]}: a rise of {last[1] - best[1]:.4f}, at most {RISE:.0%} are allowed"
    )


ADDED = 0.01
"""Added to the count of every token of the vocabulary, so that none has the probability 0."""


def unigram(
    tokens_RT: np.ndarray, learned_RT: np.ndarray, grid: Grid, scored_RT: np.ndarray, vocab_size: int, end: int
) -> tuple[float, float, float]:
    """Returns what the frequencies of the training tokens tell about the masked tokens of a grid.

    Args:
      tokens_RT, learned_RT: int32 and bool [R, T], the training rows and their tokens that are learned.
      grid: the grid of the held-out rows, whose masked positions are scored.
      scored_RT: int32 [R, T], the held-out rows.
      vocab_size: number of tokens of the vocabulary.
      end: the end-of-text token.

    Returns:
      The nats per masked token of the frequencies; those of a model that also knows where the end tokens are, and uses the
      frequencies of the other tokens elsewhere; and the share of end tokens among the masked tokens.
    """
    count_V = np.bincount(tokens_RT[learned_RT], minlength=vocab_size) + ADDED
    nats_V = np.log(count_V.sum()) - np.log(count_V)
    others_V = np.log(count_V.sum() - count_V[end]) - np.log(count_V)
    others_V[end] = 0.0
    masked_LRT = grid.masked_LRT
    mean = lambda values_RT: float(np.sum(values_RT * masked_LRT) / masked_LRT.sum())
    return mean(nats_V[scored_RT]), mean(others_V[scored_RT]), mean(scored_RT == end)


def write_baseline(settings: Gsm8kScratchSettings) -> None:
    """Writes `unigram.json` into the folder of a stored run.

    Raises:
      FileNotFoundError: the folder has no evaluations of a run.
    """
    if not (settings.out / "eval.csv").is_file():
        raise FileNotFoundError(f"{settings.out} has no eval.csv; give the folder of a stored run as --out")
    os.environ["DREAM_JAX_ASSETS"] = str(settings.assets.resolve())
    words = load_tokenizer(settings.assets / "dream-v0-instruct-7b")
    train = TrainSettings.flat(data="gsm8k", max_length=settings.max_length, eos_tail=16, eval_rows=settings.eval_rows)
    options, encoding = train.batches.options(), train.rows.encode_options()

    def laid(split: Literal["train", "test"], number: int | None) -> Batch[np.ndarray]:
        source = train.source(split)
        rows = TokenizedRows(source, words, encoding).first(
            len(source) if number is None else number, settings.max_length
        )
        return lay_out_held_out([row for _, row in rows], settings.max_length, words.pad_id, options)

    learned, scored = laid("train", None), laid("test", settings.eval_rows)
    grid = Grid(scored, len(scored.tokens_BT), sharding.make_mesh("1x1"))
    size = dream_jax.PRESETS["small"].vocab_size
    nll, ends_known, share = unigram(learned.tokens_BT, learned.maskable_BT, grid, scored.tokens_BT, size, words.pad_id)
    found = {"nll": round(nll, 4), "nll_ends_known": round(ends_known, 4), "share_of_ends": round(share, 4)}
    found |= {"rows": len(scored.tokens_BT), "masked_tokens": int(grid.masked_LRT.sum())}
    found |= {"training_rows": len(learned.tokens_BT), "added_to_each_count": ADDED}
    write_json(settings.out / "unigram.json", found)
    print(
        f"unigram nll {nll:.4f}, or {ends_known:.4f} if the end tokens are known, on {len(scored.tokens_BT)} rows, "
        f"{found['masked_tokens']} masked tokens"
    )


def main(settings: Gsm8kScratchSettings) -> int:
    """Trains, stores the run and prints the verdict; returns 1 if the nll did not fall or did not stay low."""
    console = Console()
    if settings.baseline:
        write_baseline(settings)
        return 0
    if settings.out.exists():
        raise FileExistsError(f"{settings.out} exists; remove it, or give another --out")
    settings = dataclasses.replace(settings, out=settings.out.resolve())
    assets = settings.assets.resolve()
    os.environ["DREAM_JAX_ASSETS"] = str(assets)
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        # Paths are relative to the temporary folder, so that the stored files contain no path of this machine.
        make_model(pathlib.Path("weights"), assets / "dream-v0-instruct-7b")
        train(
            TrainSettings.flat(
                model="weights",
                data="gsm8k",
                out=pathlib.Path("run") / settings.out.name,
                steps=settings.steps,
                batch_size=settings.batch_size,
                max_length=settings.max_length,
                eos_tail=16,
                learning_rate=settings.learning_rate,
                weight=settings.weight,
                eval_every=settings.eval_every,
                eval_rows=settings.eval_rows,
                eval_tokens=0,  # a model of this size gives no correct answer, so only its likelihood is measured
                samples=2,
                sample_tokens=48,
                save_every=settings.steps,
                keep=1,
                log_every=20,
            )
        )
        with new_directory(settings.out) as unfinished:
            for name in KEPT:
                if (path := pathlib.Path("run") / settings.out.name / name).is_file():
                    shutil.copyfile(path, unfinished / name)
    # The samples are not stored, because they contain text of the data set.
    write_report(read_record(settings.out))
    holds, words = verdict(settings.out / "eval.csv")
    console.print(words)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Gsm8kScratchSettings, description=__doc__)))
