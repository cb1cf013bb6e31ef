"""Held-out likelihood on a fixed grid of noise levels: the score by which the checkpoints of a run are compared.

Noise levels, masked positions and rows are the same at every step, for every model and on every mesh, so two
scores differ only because the weights differ. (A validation loss at random levels varies more between draws
than between epochs.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool

from dream_jax import masks, sharding
from dream_jax.batch import Batch
from dream_jax.block_diffusion import block_diffusion_loss
from dream_jax.data import BatchOptions, Row, TokenRow, lay_out
from dream_jax.masks import Mask
from dream_jax.model import Dream
from dream_jax.objective import TIME_BUCKETS, UniformWeight, masked_diffusion_loss
from dream_jax.train_step import NLL_BY_TIME
from dream_jax.trainer.settings import TrainSettings

Pair = tuple[Row, TokenRow]
"""A row as text, and the same row as tokens."""
LEVELS = tuple((number + 0.5) / 8 for number in range(8))
"""The noise levels of the grid: probabilities that a maskable position is masked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridScore:
    """The score of a model on held-out rows. A mean over no tokens is NaN.

    Attributes:
      nll: mean negative log-likelihood in nats per masked token, over all levels.
      nll_se: standard error of `nll`, computed over rows, because the tokens of one row are not independent.
      nll_by_time: as `nll`, for the levels in [0, 1/4), [1/4, 1/2), [1/2, 3/4) and [3/4, 1) separately.
      masked_accuracy: share of the masked tokens for which the true token is the most probable one.
      eos_accuracy: as `masked_accuracy`, for end-of-text tokens only, which include padding.
      num_masked: number of masked tokens over all levels.
      rows: number of rows.
    """

    nll: float
    nll_se: float
    nll_by_time: tuple[float, ...]
    masked_accuracy: float
    eos_accuracy: float
    num_masked: int
    rows: int

    def row(self) -> dict[str, float]:
        """Returns the numbers of the score, by the names of the columns of `eval.csv`."""
        plain = dataclasses.asdict(self)
        by_time = dict(zip(NLL_BY_TIME, plain.pop("nll_by_time"), strict=True))
        return {"nll": plain.pop("nll"), "nll_se": plain.pop("nll_se"), **by_time, **plain}

    def line(self) -> str:
        """Returns the score as one line of text."""
        by_time = " ".join(f"{value:.3f}" for value in self.nll_by_time)
        return (
            f"held-out nll {self.nll:.4f} +- {self.nll_se:.4f} (by noise level {by_time})  "
            f"masked acc {self.masked_accuracy:.3f}  end-of-text acc {self.eos_accuracy:.3f}"
        )


class Grid:
    """Held-out rows with fixed masked positions, and the compiled function that scores a model on them."""

    def __init__(self, rows: Batch[np.ndarray], size: int, mesh: Mesh):
        """Draws the masked positions of the rows for each noise level.

        Args:
          rows: all R rows (at least one) as one batch from `lay_out_held_out`, arrays [R, T].
          size: number of rows in one forward pass, a multiple of the size of the mesh axis "fsdp".
          mesh: the mesh of the models that will be scored.
        """
        self._tokens_RT, self._maskable_RT = rows.tokens_BT, rows.maskable_BT
        self._valid_RT = np.ones(rows.tokens_BT.shape, bool) if rows.valid_BT is None else rows.valid_BT
        maskable_RT = self._maskable_RT
        generator = np.random.default_rng(0)  # fixed seed: the same masked positions for every model
        self._masked = [maskable_RT & (generator.random(maskable_RT.shape) < level) for level in LEVELS]
        self._size = size
        self._mesh = mesh

        def sums(
            model: Dream,
            tokens_BT: jax.Array,
            masked_BT: jax.Array,
            maskable_BT: jax.Array,
            t_B: jax.Array,
            valid_BT: jax.Array,
            mask: Mask,
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            if isinstance(mask, masks.BlockDiffusion):  # a block is predicted from clean blocks before it
                t_BT = jnp.broadcast_to(t_B[:, None], tokens_BT.shape)
                _, aux = block_diffusion_loss(
                    model, tokens_BT, masked_BT, t_BT, UniformWeight(), valid_BT, size=mask.size, answer_BT=maskable_BT
                )
            else:
                _, aux = masked_diffusion_loss(model, tokens_BT, masked_BT, t_B, UniformWeight(), valid_BT, mask=mask)
            ends_BT = aux["token_correct"] & (tokens_BT == model.config.pad_token_id)
            return jnp.sum(aux["token_nll"], 1), jnp.sum(aux["token_correct"], 1), jnp.sum(ends_BT, 1)

        # The sums are replicated, because every process reads those of all rows.
        self._sums = jax.jit(sums, out_shardings=sharding.replicated(mesh))

    @property
    def masked_LRT(self) -> Bool[np.ndarray, "L R T"]:
        """The masked positions, bool [L, R, T]: for each noise level of `LEVELS`, each row and each token."""
        return np.stack(self._masked)

    @property
    def digest(self) -> str:
        """A SHA-256 digest of tokens and masked positions; only scores with equal digests may be compared."""
        found = hashlib.sha256(self._tokens_RT.tobytes() + self._valid_RT.tobytes())
        for masked_RT in self._masked:
            found.update(masked_RT.tobytes())
        return found.hexdigest()

    def score(self, model: Dream) -> GridScore:
        """Returns the score of a model whose parameters are on the mesh, under the mask that it was trained with.

        A model that was trained by block diffusion is scored with two streams: each block after clean tokens, and all
        blocks of a row with the same noise level. The masked positions are the same as for models with other masks.
        """
        attends = masks.parse(model.trained_mask)
        rows = len(self._tokens_RT)
        # Sums over the masked tokens of each level and row, [L, R]: nll, correct tokens, correct end-of-text tokens.
        nll_LR, right_LR, ends_right_LR = (np.zeros((len(LEVELS), rows)) for _ in range(3))
        for number, (level, masked_RT) in enumerate(zip(LEVELS, self._masked, strict=True)):
            for start in range(0, rows, self._size):
                chunk = slice(start, start + self._size)
                # The last batch is padded with rows that have no masked token, and so do not count.
                filling = ((0, max(0, start + self._size - rows)), (0, 0))
                tokens_BT, masked_BT = np.pad(self._tokens_RT[chunk], filling), np.pad(masked_RT[chunk], filling)
                maskable_BT = np.pad(self._maskable_RT[chunk], filling)
                valid_BT = np.pad(self._valid_RT[chunk], filling, constant_values=True)
                # The mask holds numpy arrays, because every process has all rows and computes the same mask.
                mask = jax.tree.map(np.asarray, attends.for_rows(valid_BT, maskable_BT))
                with jax.set_mesh(self._mesh):
                    t_B = np.full(self._size, level, np.float32)
                    found = self._sums(model, tokens_BT, masked_BT, maskable_BT, t_B, valid_BT, mask)
                for target, sums_B in zip((nll_LR, right_LR, ends_right_LR), found, strict=True):
                    target[number, chunk] = np.asarray(sums_B)[: rows - start]
        count_LR = np.stack([masked_RT.sum(1) for masked_RT in self._masked]).astype(float)
        ends = sum(
            int((masked_RT & (self._tokens_RT == model.config.pad_token_id)).sum()) for masked_RT in self._masked
        )
        bucket_L = [int(level * TIME_BUCKETS) for level in LEVELS]
        by_time = [np.isin(bucket_L, number) for number in range(TIME_BUCKETS)]
        return GridScore(
            nll=_ratio(nll_LR.sum(), count_LR.sum()),
            nll_se=_ratio_error(nll_LR.sum(0), count_LR.sum(0)),
            nll_by_time=tuple(_ratio(nll_LR[levels].sum(), count_LR[levels].sum()) for levels in by_time),
            masked_accuracy=_ratio(right_LR.sum(), count_LR.sum()),
            eos_accuracy=_ratio(ends_right_LR.sum(), ends),
            num_masked=int(count_LR.sum()),
            rows=rows,
        )


def lay_out_held_out(
    rows: Sequence[TokenRow], max_length: int, pad_id: int, options: BatchOptions | None = None
) -> Batch[np.ndarray]:
    """Puts all rows into one batch [R, max_length], each with as many end-of-text tokens as in training.

    The remaining positions are padding before the row (not valid). In training the number of end-of-text tokens may
    depend on the other rows of a batch. In that case a row gets as many here as it would get in a batch of equally long
    rows; otherwise the score would include end-of-text tokens that do not occur in training.

    Args:
      rows: the R rows, each at most `max_length` tokens long.
      max_length: the width of the batch.
      pad_id: the id of the end-of-text token, which is also the padding.
      options: the options of the training batches; None for the default options.
    """
    options = BatchOptions() if options is None else options
    lengths = np.array([row.length for row in rows])
    filled = np.full(len(rows), max_length)
    if options.eos_tail is not None:
        filled = np.minimum(filled, lengths + options.eos_tail)
    elif options.cut_responses:
        filled = lengths
    elif options.width_step is not None:
        filled = np.minimum(filled, -(-lengths // options.width_step) * options.width_step)
    regions = filled - np.array([row.prompt_length for row in rows])
    return lay_out(rows, regions, max_length, pad_id)


def rows_at_once(settings: TrainSettings, mesh: Mesh, rows: int) -> int:
    """Returns the number of rows in one forward pass, a multiple of the size of the mesh axis "fsdp".

    It is the number of rows of a microbatch. If there are fewer held-out rows, it is their number, rounded up.
    """
    shards = dict(mesh.shape)["fsdp"]
    return min(max(settings.batches.batch_size // settings.batches.accumulation, 1), -(-rows // shards) * shards)


def _ratio(total: float, count: float) -> float:
    """Returns total / count; NaN if count is 0."""
    return float(total / count) if count else math.nan


def _ratio_error(total_R: np.ndarray, count_R: np.ndarray) -> float:
    """Returns the standard error, by linearisation, of sum(total) / sum(count) for independent rows.

    It is NaN if there are fewer than two rows or if all counts are 0.
    """
    rows, count = len(total_R), count_R.sum()
    if rows < 2 or not count:
        return math.nan
    residual_R = total_R - total_R.sum() / count * count_R
    return float(math.sqrt(rows / (rows - 1) * np.sum(residual_R**2)) / count)
