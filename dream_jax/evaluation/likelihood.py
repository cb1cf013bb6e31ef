"""A Monte Carlo estimate of a bound on log p(text): how probable a masked diffusion model finds a text.

Let N be the number of scored tokens x. Draw m uniformly from 1..N, and a uniformly random set of m scored tokens; mask
this set and nothing else. Then -log p(x) <= the expectation of N / m times the summed cross entropy of the masked
tokens. This is the continuous-time bound with weight 1 / t, but with the actual number of masked tokens instead of its
mean: the expectation is the same, and the noise is smaller. If the model predicts the same joint distribution in every
order of the tokens, the bound is equal to -log p(x).

Samples are stratified. If there are at least 2 N samples, each number m is one stratum; otherwise (0, 1] is divided
into strata of equal width with two draws of t in each, and m = ceil(t N). The differences between the draws of a
stratum give an unbiased estimate of the variance of the mean. With tokens before and after that are not scored, the
result is the likelihood of an infilling.

A model that was trained by block diffusion writes a text block by block, so -log p is a sum over blocks, each given the
clean blocks before it. With the right shift, the first token of a block is predicted from the clean token before it, and
never sees its own block. Its cross entropy is therefore exact. The other tokens of the block have the bound above, with the
first token known: that is the order of writing in which no information is lost. So the bound of a block is

    cross entropy of the first token + E of (n - 1) / m times the summed cross entropies of m masked tokens

for n tokens and m uniform in 1..n-1. With blocks of one token nothing is random, and the result is exactly the
autoregressive -log p. Each row is computed as two streams, so that all its blocks have clean tokens before them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import numpy as np
import scipy.stats

from dream_jax import masks
from dream_jax.block_diffusion import block_diffusion_loss
from dream_jax.bounds import MOST_ROWS, IntegerRange, check
from dream_jax.inference import batches, left_padded
from dream_jax.model import Dream
from dream_jax.objective import UniformWeight, masked_diffusion_loss
from dream_jax.tokenizer import Tokenizer

FEWEST_SAMPLES = 10  # With fewer than five pairs of draws the variance is too uncertain for an interval.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passage:
    """One row of tokens, some of which are scored.

    Attributes:
      tokens: int [T], the token ids.
      scored: bool [T], true at tokens whose likelihood is wanted, at least one; the other tokens are never masked.

    Raises: ValueError if the shapes differ, or if no token is scored.
    """

    tokens: np.ndarray
    scored: np.ndarray

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.tokens.shape != self.scored.shape:
            raise ValueError(f"tokens {self.tokens.shape} and scored {self.scored.shape} must both have the shape [T]")
        if not self.scored.any():
            raise ValueError("nothing is scored: the text has no token; pass a text with at least one")

    @property
    def num_scored(self) -> int:
        """The number of scored tokens, called N in the formulas of this module."""
        return int(self.scored.sum())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """The estimated upper bound on -log p of one passage.

    Attributes:
      nats: the estimate of the bound, in nats.
      variance: the estimated variance of `nats`, in nats squared, from the differences between the draws of
        each stratum.
      freedom: degrees of freedom of `variance` (Welch and Satterthwaite's formula); 0 if the estimate is exact.
    """

    nats: float
    variance: float
    freedom: float

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval (low, high) of the Monte Carlo mean, in nats."""
        half = float(scipy.stats.t.ppf(0.975, self.freedom)) * math.sqrt(self.variance) if self.variance else 0.0
        return self.nats - half, self.nats + half


BlockRows = list[tuple[Passage, np.ndarray]]
"""One pair for each row: the passage, and which of its tokens are masked, bool [T]. T may differ between rows."""

TokenNLL = Callable[[BlockRows], list[np.ndarray]]
"""Function from rows to the cross entropy of each token of a row: float [T] for each row, in nats, 0 if not masked."""

BoundsOfModel = Callable[[Sequence[Passage], int, Sequence[Sequence[int]]], list[Bound]]
"""Function from passages, the number of samples of each, and the seed of each, to the bound of each."""

MaskedRows = list[tuple[np.ndarray, np.ndarray]]
"""One pair for each row: its tokens, int [T], and which of them are masked, bool [T]. T may differ between rows."""

NLL = Callable[[MaskedRows], np.ndarray]
"""Function from rows to the cross entropy of each row, summed over its masked tokens: float [rows], in nats."""


def check_samples(samples: int) -> None:
    """Raises ValueError unless `samples` is even and large enough for an interval."""
    check(
        "samples",
        samples,
        IntegerRange(FEWEST_SAMPLES, MOST_ROWS, "an even number, because every stratum needs two draws"),
    )
    if samples % 2:
        raise ValueError(f"{samples=} must be even: every stratum needs two draws")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """The masked sets that were drawn for one passage.

    Attributes:
      masks: bool [samples, T], true at the masked tokens of each sample.
      stratum: int [samples], the index of the stratum of each sample; every index from 0 to the largest occurs.
    """

    masks: np.ndarray
    stratum: np.ndarray


def draw_masks(scored: np.ndarray, samples: int, seed: Sequence[int]) -> Draws:
    """Draws the masked sets of one passage, at least two in every stratum.

    A passage with one scored token has only one possible set. It is returned once, and the bound is exact.

    Args:
      scored: bool [T], true at tokens whose likelihood is wanted.
      samples: the number of sets; even and at least `FEWEST_SAMPLES`.
      seed: nonnegative integers; the same seed and the same `scored` give the same sets.

    Raises: ValueError for a number of samples that `check_samples` refuses.
    """
    check_samples(samples)
    positions = np.flatnonzero(scored)
    if len(positions) == 1:
        return Draws(masks=scored[None, :].copy(), stratum=np.zeros(1, int))
    generator = np.random.default_rng(list(seed))
    if 2 * len(positions) <= samples:
        # Samples beyond a multiple of N go to the smallest sets, whose large weight N / m gives the largest variance.
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
    """Returns the bound of each passage; the samples of all passages go to `nll` in one call.

    Args:
      passages: the passages to score.
      samples: the number of samples for each passage; even and at least `FEWEST_SAMPLES`.
      nll: function that runs the model, such as that of `model_nll`.
      seeds: the seed of each passage, as for `draw_masks`.

    Raises: ValueError for a number of samples that `check_samples` refuses.
    """
    draws = [draw_masks(one.scored, samples, seed) for one, seed in zip(passages, seeds, strict=True)]
    rows = [(one.tokens, mask) for one, drawn in zip(passages, draws, strict=True) for mask in drawn.masks]
    found = np.asarray(nll(rows), np.float64)
    nats_by_passage = np.split(found, np.cumsum([len(drawn.masks) for drawn in draws])[:-1])
    return [
        _bound(one.num_scored, drawn, nats) for one, drawn, nats in zip(passages, draws, nats_by_passage, strict=True)
    ]


def _bound(num_scored: int, draws: Draws, nats: np.ndarray) -> Bound:
    values = num_scored / draws.masks.sum(axis=1) * nats
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
    """Returns the degrees of freedom of a sum of estimated variances: at least 5, or 0 if all variances are 0.

    The formula of Welch and Satterthwaite is corrected by + 2 and - 2, because the square of a variance that was
    estimated with f degrees of freedom is on average (f + 2) / f times too large.
    """
    squares = float(np.sum(variances**2 / (freedoms + 2)))
    return max(5.0, float(np.sum(variances)) ** 2 / squares - 2) if squares else 0.0


def block_bounds(
    passages: Sequence[Passage], samples: int, token_nll: TokenNLL, seeds: Sequence[Sequence[int]], *, size: int
) -> list[Bound]:
    """Returns the bound of each passage under block diffusion, as the docstring of the module describes it.

    Args:
      passages: the passages to score. The tokens of a passage from the first scored one on must all be scored.
      samples: the number of samples of each block; even and at least `FEWEST_SAMPLES`.
      token_nll: function that runs the model, such as that of `block_nll`; all rows go to it in one call.
      seeds: the seed of each passage. Each block of a passage has draws of its own.
      size: number of tokens in a block; the blocks are counted from the first scored token.

    Raises: ValueError for a number of samples that `check_samples` refuses, or a passage with tokens after the scored ones.
    """
    check_samples(samples)
    rows: BlockRows = []
    drawn_by_passage: list[tuple[np.ndarray, list[tuple[np.ndarray, Draws]]]] = []
    for passage, seed in zip(passages, seeds, strict=True):
        positions = np.flatnonzero(passage.scored)
        after = len(passage.tokens) - int(positions[0]) - len(positions)
        if after:
            raise ValueError(
                f"{after} tokens after the first scored token are not scored; a model that was trained by block diffusion "
                "does not see what follows a block, so it has no likelihood of an infilling: leave out the text after it, "
                "or evaluate a model with bidirectional attention"
            )
        first = np.zeros(len(passage.tokens), bool)
        first[positions[::size]] = True
        blocks = []
        for number, start in enumerate(range(0, len(positions), size)):
            rest = np.zeros(len(passage.tokens), bool)
            rest[positions[start + 1 : start + size]] = True
            if rest.any():
                blocks.append((rest, draw_masks(rest, samples, (*seed, number))))
        # The first row gives the cross entropies of the first tokens. Each further row has one sample of every block.
        sampled = np.zeros((max((len(draws.masks) for _, draws in blocks), default=0), len(first)), bool)
        for _, draws in blocks:
            sampled[: len(draws.masks)] |= draws.masks
        rows += [(passage, masked) for masked in (first, *sampled)]
        drawn_by_passage.append((first, blocks))
    nats = iter(token_nll(rows))
    found = []
    for first, blocks in drawn_by_passage:
        parts = [Bound(nats=float(np.sum(next(nats), where=first, dtype=np.float64)), variance=0.0, freedom=0.0)]
        number = max((len(draws.masks) for _, draws in blocks), default=0)
        sampled_nats = np.array([next(nats) for _ in range(number)], np.float64)
        for rest, draws in blocks:
            sums = np.sum(sampled_nats[: len(draws.masks)], axis=1, where=draws.masks)
            parts.append(_bound(int(rest.sum()), draws, sums))
        found.append(total(parts))
    return found


def total(parts: Sequence[Bound]) -> Bound:
    """Returns the bound on -log p of all passages together, the sum of their bounds; passages are independent."""
    variances, freedoms = np.array([(part.variance, part.freedom) for part in parts]).T
    return Bound(
        nats=sum(part.nats for part in parts),
        variance=float(variances.sum()),
        freedom=_freedom(variances, freedoms),
    )


def check_mask(model: Dream) -> masks.Mask:
    """Returns the mask under which the model was trained, if likelihoods can be computed under it.

    Raises:
      ValueError: the mask depends on where the prompt ends, and rows of a likelihood have no prompt.
    """
    attends = masks.parse(model.trained_mask)
    if isinstance(attends, masks.Prefix):
        raise ValueError(
            f"the mask {model.trained_mask!r} needs to know where the prompt of each row ends, but rows of a "
            "likelihood have no prompt; evaluate a task with sampled answers, or pass another --mask"
        )
    return attends


def model_bounds(model: Dream, tokenizer: Tokenizer, batch_size: int) -> BoundsOfModel:
    """Returns the function from passages to their bounds, for the mask under which the model was trained.

    For a model that was trained by block diffusion it is `block_bounds` with two streams, otherwise `bounds`. The
    arguments, and what the function raises, are those of `model_nll`. The function of a model of block diffusion also
    raises ValueError for a passage of several tokens without a token before the scored ones, if blocks are longer than 1.

    Raises:
      ValueError: the mask depends on where the prompt ends, and rows of a likelihood have no prompt.
    """
    attends = check_mask(model)
    if isinstance(attends, masks.BlockDiffusion):
        token_nll, size = block_nll(model, tokenizer, batch_size), attends.size

        def of_blocks(passages: Sequence[Passage], samples: int, seeds: Sequence[Sequence[int]]) -> list[Bound]:
            # Without a token before it, the first token is predicted from its own position, which sees the whole block.
            if size > 1 and any(one.scored[0] and one.num_scored > 1 for one in passages):
                raise ValueError(
                    "a passage begins with a scored token, but a model of block diffusion predicts the first token of a "
                    "block from the token before it; put the beginning-of-text token before the passage, not scored"
                )
            return block_bounds(passages, samples, token_nll, seeds, size=size)

        return of_blocks
    nll = model_nll(model, tokenizer, batch_size)
    return lambda passages, samples, seeds: bounds(passages, samples, nll, seeds)


def model_nll(model: Dream, tokenizer: Tokenizer, batch_size: int) -> NLL:
    """Returns the function from rows to their cross entropies, with the mask under which the model was trained.

    The function computes up to `batch_size` rows with lengths of one bucket together, padded on the left, and raises
    ValueError for a row that is longer than the model allows, and for logits that are no numbers.

    Raises:
      ValueError: the mask depends on where the prompt ends, and rows of a likelihood have no prompt; or the model was
        trained by block diffusion, and `model_bounds` must be called.
    """
    attends = check_mask(model)
    if isinstance(attends, masks.BlockDiffusion):
        raise ValueError(
            f"the mask {model.trained_mask!r} needs two streams, in which each block has clean tokens before it; call "
            "model_bounds"
        )
    level = np.full(batch_size, 0.5, np.float32)  # The uniform weight does not depend on the noise level.

    def compute(tokens_BT: np.ndarray, valid_BT: np.ndarray, _: np.ndarray, masked_BT: np.ndarray) -> jax.Array:
        mask = attends.for_rows(valid_BT, masked_BT)
        weight = UniformWeight()
        aux = masked_diffusion_loss(model, tokens_BT, masked_BT, level, weight, valid_BT, mask=mask)[1]
        return aux["token_nll"]

    token_nll = _in_batches(model, tokenizer, batch_size, compute)

    def nll(rows: MaskedRows) -> np.ndarray:
        found = token_nll([(Passage(tokens=tokens, scored=masked), masked) for tokens, masked in rows])
        return np.array([tokens.sum() for tokens in found])

    return nll


def block_nll(model: Dream, tokenizer: Tokenizer, batch_size: int) -> TokenNLL:
    """Returns the function from rows to the cross entropies of their tokens under block diffusion, by two streams.

    A token is predicted from the masked tokens of its block and the clean tokens of earlier blocks. The blocks are counted
    from the first scored token. The arguments, and what the function raises, are those of `model_nll`.

    Raises:
      ValueError: the model was not trained by block diffusion.
    """
    attends = check_mask(model)
    if not isinstance(attends, masks.BlockDiffusion):
        raise ValueError(f"the model was trained under the mask {model.trained_mask!r}, not by block diffusion")
    size = attends.size

    def compute(tokens_BT: np.ndarray, valid_BT: np.ndarray, scored_BT: np.ndarray, masked_BT: np.ndarray) -> jax.Array:
        level = np.full(tokens_BT.shape, 0.5, np.float32)  # The uniform weight does not depend on the noise level.
        weight = UniformWeight()
        _, aux = block_diffusion_loss(
            model, tokens_BT, masked_BT, level, weight, valid_BT, size=size, answer_BT=scored_BT
        )
        return aux["token_nll"]

    return _in_batches(model, tokenizer, batch_size, compute)


def _in_batches(
    model: Dream,
    tokenizer: Tokenizer,
    batch_size: int,
    compute: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], jax.Array],
) -> TokenNLL:
    """Returns the function from rows to the cross entropies of their tokens, which computes them in batches.

    `compute` gets tokens, and which of them are valid, scored and masked: arrays [B, T] with padding on the left. Rows that
    fill up a batch have no scored token. It returns the cross entropies [B, T].
    """
    longest = model.config.max_position_embeddings

    def token_nll(rows: BlockRows) -> list[np.ndarray]:
        out = [np.zeros(0)] * len(rows)
        for batch in batches([len(passage.tokens) for passage, _ in rows], batch_size):
            longest_here = max(len(rows[index][0].tokens) for index in batch)
            if longest_here > longest:
                raise ValueError(
                    f"a text has {longest_here} tokens with its context, but the model takes at most {longest}"
                )
            tokens_BT, valid_BT = left_padded([rows[index][0].tokens for index in batch], batch_size, tokenizer.pad_id)
            scored_BT, masked_BT = np.zeros_like(valid_BT), np.zeros_like(valid_BT)
            for line, index in enumerate(batch):
                passage, masked = rows[index]
                scored_BT[line, -len(masked) :], masked_BT[line, -len(masked) :] = passage.scored, masked
            found = np.asarray(compute(tokens_BT, valid_BT, scored_BT, masked_BT), np.float64)[: len(batch)]
            if not np.isfinite(found).all():
                raise ValueError(
                    "the logits of a text are no numbers (NaN or infinity), so it has no likelihood: the weights are "
                    "damaged or too large for their dtype"
                )
            for line, index in enumerate(batch):
                out[index] = found[line, -len(rows[index][1]) :]
        return out

    return token_nll
