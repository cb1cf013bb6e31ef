"""A Monte Carlo bound on log p(text): how probable a text is to a masked diffusion model.

For N tokens to be scored, -log p(x) <= mean over m = 1..N, and over the sets of m of them, of N / m times the cross
entropy at the set when it alone is masked. It is the continuous-time bound with weight 1 / t, with the number of masked
tokens instead of its mean: the same expectation, less noise. For a model whose predictions fit together, whatever
the order, it is no bound but the likelihood itself.

Samples are stratified. Where there are enough, each number m is a stratum of its own; else t runs over (0, 1] in strata of
equal width with two draws each, and m = ceil(t N). How the draws of a stratum differ says, without bias, how uncertain the
mean is. Conditioning on what stands before and after gives the likelihood of an infilling.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats

from dream_jax import masks
from dream_jax.inference import batches, left_padded
from dream_jax.model import Dream
from dream_jax.objective import UniformWeight, masked_diffusion_loss
from dream_jax.tokenizer import Tokenizer

FEWEST_SAMPLES = 10  # five pairs: fewer give no interval worth the name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """Tokens, int [T], and which of them are scored, bool [T]; the others are always seen. At least one is scored."""

    tokens: np.ndarray
    scored: np.ndarray

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.tokens.shape != self.scored.shape:
            raise ValueError(f"tokens {self.tokens.shape} and scored {self.scored.shape} must be two equal [T]")
        if not self.scored.any():
            raise ValueError("nothing is scored: the text has no token")

    @property
    def num_scored(self) -> int:
        """N."""
        return int(self.scored.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """The bound on -log p of one passage.

    Attributes:
      nats: its estimate.
      variance: of that estimate, by how the draws of each stratum differ.
      freedom: degrees of freedom of the variance (Welch and Satterthwaite's); 0 where the estimate is exact.
    """

    nats: float
    variance: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the Monte Carlo mean."""
        half = float(scipy.stats.t.ppf(0.975, self.freedom)) * math.sqrt(self.variance) if self.variance else 0.0
        return self.nats - half, self.nats + half


MaskedRows = list[tuple[np.ndarray, np.ndarray]]
"""Pairs (tokens int [T], masked bool [T])."""

NLL = Callable[[MaskedRows], np.ndarray]
"""Cross entropy in nats summed over the masked tokens of each row: float [rows]."""


def check_samples(samples: int) -> None:
    """Raises ValueError unless `samples` is even and large enough for an interval."""
    if samples < FEWEST_SAMPLES or samples % 2:
        raise ValueError(f"{samples=} must be even and at least {FEWEST_SAMPLES}: two draws in each stratum")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """Masked sets of one passage, bool [samples, T], and the stratum of each, int [samples], from 0 on without gap."""

    masks: np.ndarray
    stratum: np.ndarray


def draw_masks(scored: np.ndarray, samples: int, seed: Sequence[int]) -> Draws:
    """The masked sets of one passage; every stratum has two or more.

    A passage with one scored token has one set only, and that is returned once: its bound is exact.

    Args:
      scored: bool [T].
      samples: see `check_samples`.
      seed: whole numbers from 0 on; the same seed gives the same sets for passages of equal shape.
    """
    check_samples(samples)
    positions = np.flatnonzero(scored)
    if len(positions) == 1:
        return Draws(masks=scored[None, :].copy(), stratum=np.zeros(1, int))
    generator = np.random.default_rng(list(seed))
    if 2 * len(positions) <= samples:
        # What is left over goes to the small sets, whose weight N / m makes them vary most.
        stratum = np.sort(np.arange(samples) % len(positions))
        counts = stratum + 1
    else:
        stratum = np.arange(samples) // 2
        t = (stratum + 1.0 - generator.random(samples)) / (samples // 2)  # in (0, 1]
        counts = np.ceil(t * len(positions)).astype(int)
    masks = np.zeros((samples, len(scored)), bool)
    for row, count in enumerate(counts):
        masks[row, generator.choice(positions, min(count, len(positions)), replace=False)] = True
    return Draws(masks=masks, stratum=stratum)


def bounds(passages: Sequence[Passage], samples: int, nll: NLL, seeds: Sequence[Sequence[int]]) -> list[Bound]:
    """The bound of each passage; all their samples go to `nll` in one call.

    Args:
      passages: what is scored.
      samples: for each passage; even.
      nll: the model.
      seeds: of each passage.

    Raises: ValueError for a number of samples that makes no pairs.
    """
    draws = [draw_masks(one.scored, samples, seed) for one, seed in zip(passages, seeds, strict=True)]
    rows = [(one.tokens, mask) for one, drawn in zip(passages, draws, strict=True) for mask in drawn.masks]
    found = np.asarray(nll(rows), np.float64)
    parts = np.split(found, np.cumsum([len(drawn.masks) for drawn in draws])[:-1])
    return [_bound(one, drawn, part) for one, drawn, part in zip(passages, draws, parts, strict=True)]


def _bound(passage: Passage, draws: Draws, nats: np.ndarray) -> Bound:
    values = passage.num_scored / draws.masks.sum(axis=1) * nats
    if len(values) == 1:
        return Bound(nats=float(values[0]), variance=0.0, freedom=0.0)
    sizes = np.bincount(draws.stratum)
    means = np.bincount(draws.stratum, values) / sizes
    squares = np.bincount(draws.stratum, (values - means[draws.stratum]) ** 2)
    variances = squares / (sizes - 1) / sizes / len(sizes) ** 2
    return Bound(
        nats=float(means.mean()),
        variance=float(variances.sum()),
        freedom=_freedom(variances, sizes - 1),
    )


def _freedom(variances: np.ndarray, freedoms: np.ndarray) -> float:
    """Degrees of freedom of a sum of estimated variances, at least 5.

    With + 2 and - 2, because the square of an estimated variance is too large by (f + 2) / f on average.
    """
    squares = float(np.sum(variances**2 / (freedoms + 2)))
    return max(5.0, float(np.sum(variances)) ** 2 / squares - 2) if squares else 0.0


def total(parts: Sequence[Bound]) -> Bound:
    """The bound of independent passages together: log p of the whole file."""
    variances, freedoms = np.array([(part.variance, part.freedom) for part in parts]).T
    return Bound(
        nats=sum(part.nats for part in parts),
        variance=float(variances.sum()),
        freedom=_freedom(variances, freedoms),
    )


def check_mask(model: Dream) -> masks.Mask:
    """The mask of the model's likelihoods.

    Raises:
      ValueError: it goes by the prompt, which rows without one do not tell.
    """
    attends = masks.parse(model.trained_mask)
    if isinstance(attends, masks.Prefix):
        raise ValueError(
            "a likelihood is of rows that do not say where their prompts end, and the mask of this evaluation is "
            f"{model.trained_mask!r}; evaluate by sampling, or under another --mask"
        )
    return attends


def model_nll(model: Dream, tokenizer: Tokenizer, batch_size: int) -> NLL:
    """The model as a function of rows, under the mask that it was trained under.

    Rows whose lengths share a bucket are computed together, padded on the left.

    Raises:
      ValueError: a mask that goes by the prompt, which such rows do not tell.
    """
    attends = check_mask(model)
    longest = model.config.max_position_embeddings

    def nll(rows: MaskedRows) -> np.ndarray:
        out = np.zeros(len(rows))
        for batch in batches([len(tokens) for tokens, _ in rows], batch_size):
            longest_here = max(len(rows[index][0]) for index in batch)
            if longest_here > longest:
                raise ValueError(
                    f"a text of {longest_here} tokens, with what goes before it; the model takes {longest}"
                )
            tokens_BT, valid_BT = left_padded([rows[index][0] for index in batch], batch_size, tokenizer.pad_id)
            masked_BT = np.zeros_like(valid_BT)
            for line, index in enumerate(batch):
                masked_BT[line, -len(rows[index][1]) :] = rows[index][1]
            level = np.full(batch_size, 0.5, np.float32)  # read by no uniform weight
            mask = attends.for_rows(valid_BT, masked_BT)
            _, aux = masked_diffusion_loss(model, tokens_BT, masked_BT, level, UniformWeight(), valid_BT, mask=mask)
            out[list(batch)] = np.asarray(aux["token_nll"], np.float64).sum(axis=1)[: len(batch)]
        return out

    return nll
