"""Computes statistics of the attention of a model for each layer and head.

The attention probabilities are computed from the queries and keys of the model, for one chunk of queries at a time.
Only their statistics are stored. A model of block diffusion reads each row as two streams, noised and clean, as in its
training; the queries are those of the noised stream.

Letters of axes here: t is a query of one chunk, Q a kind of query (`QUERIES`), X a statistic (`STATISTICS`), and b is B,
or 1 if the mask is the same in all rows. The other letters are those of the model.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from dream_jax import masks
from dream_jax.data import TokenizedRows, lay_out, open_source
from dream_jax.files import replacing
from dream_jax.model import Dream, Layer, rotate, rotation
from dream_jax.tokenizer import Tokenizer

STATISTICS = (
    "entropy",
    "entropy share",
    "distance",
    "offset",
    "right",
    "itself",
    "previous",
    "prompt",
    "masked",
    "first",
)
"""The statistics; each is an average over queries. entropy: of the attention, in nats. entropy share: that entropy
divided by the entropy of uniform attention to all keys that the query may attend to. distance, offset: mean of
|key - query| and of key - query in tokens, weighted by the attention. The others are the shares of the attention on keys
to the right, on the query itself, on the token before it, on the prompt, on masked tokens, and on the first token."""

QUERIES = ("prompt", "masked", "written")
"""Kinds of queries, averaged separately: tokens of the prompt, masked tokens, other tokens of the answer."""

LEVELS = (0.1, 0.5, 0.9, 1.0)
"""Default noise levels: the probability with which each token of the answer is masked."""

_CHUNK = 128  # number of queries at a time; the probabilities are [rows, heads, 128, tokens]


class InspectedRows(NamedTuple):
    """The rows that a model reads.

    Attributes:
      tokens_BT: int32 [B, T], token ids.
      prompt_BT: bool [B, T], true for tokens of the prompt.
      valid_BT: bool [B, T], true except for padding.
    """

    tokens_BT: np.ndarray
    prompt_BT: np.ndarray
    valid_BT: np.ndarray


def attention_statistics(model: Dream, rows: InspectedRows, masked_BT: np.ndarray) -> np.ndarray:
    """Returns the statistics of each layer and head, under the mask under which the model was trained.

    Args:
      model: a Dream; its `trained_mask` is used.
      rows: the rows without noise; padding may be on the left or on the right.
      masked_BT: bool [B, T], true where the model reads the mask token instead.

    Returns:
      float64 [layers, heads, len(QUERIES), len(STATISTICS)]; NaN if there is no query of that kind.

    Raises:
      ValueError: the rows are longer than `max_position_embeddings` of the model.
    """
    length = rows.tokens_BT.shape[1]
    if length > model.config.max_position_embeddings:
        raise ValueError(
            f"rows of {length} tokens exceed the model's {model.config.max_position_embeddings=}; shorten them"
        )
    sums, counts, _ = _statistics(model, *rows, masked_BT)
    with np.errstate(invalid="ignore"):
        found: np.ndarray = np.asarray(sums, np.float64) / np.asarray(counts, np.float64)[:, None]
    return found


@jax.jit
def _statistics(
    model: Dream, tokens_BT: jax.Array, prompt_BT: jax.Array, valid_BT: jax.Array, masked_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns sums over queries [L, N, kinds, statistics], numbers of queries [kinds], and hidden states [B, T, D].

    The hidden states are those after the last norm; under block diffusion those of the noised stream.
    """
    config = model.config
    batch, length = tokens_BT.shape
    noisy_BT = jnp.where(masked_BT, config.mask_token_id, tokens_BT)
    positions_BT = jnp.maximum(jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32) - 1, 0)
    mask = masks.parse(model.trained_mask).for_rows(valid_BT, valid_BT & ~prompt_BT) & masks.KeyPadding(valid_BT)
    kinds_BTQ = jnp.stack([prompt_BT, masked_BT, ~prompt_BT & ~masked_BT], axis=-1) & valid_BT[..., None]
    num_tokens = length
    if isinstance(masks.parse(model.trained_mask), masks.BlockDiffusion):
        # The clean stream has no queries that count, and no masked keys.
        mask, length = masks.two_streams(mask), 2 * length
        noisy_BT = jnp.concatenate([noisy_BT, tokens_BT], axis=1)
        positions_BT, prompt_BT = (jnp.tile(x_BT, (1, 2)) for x_BT in (positions_BT, prompt_BT))
        masked_BT = jnp.pad(masked_BT, ((0, 0), (0, num_tokens)))
        kinds_BTQ = jnp.pad(kinds_BTQ, ((0, 0), (0, num_tokens), (0, 0)))
    attended_bTS = mask.dense(length, length)
    counts_Q = jnp.sum(kinds_BTQ, axis=(0, 1), dtype=jnp.float32)
    first_BS = positions_BT == 0
    turn = rotation(positions_BT, config.head_dim, config.rope_theta)
    groups = config.num_attention_heads // config.num_key_value_heads
    padding = -length % min(_CHUNK, length)
    size = min(_CHUNK, length)

    def cut(x: jax.Array) -> jax.Array:
        """Cuts the queries into chunks: [B, T, ...] -> [chunks, B, size, ...]."""
        x = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    full_BTS = jnp.broadcast_to(attended_bTS, (batch, length, length))
    fixed = tuple(map(cut, (full_BTS, kinds_BTQ, positions_BT)))

    def layer_sums(layer: Layer, x_BTD: jax.Array) -> jax.Array:
        """Returns the sums of the statistics in one layer, [N, kinds, statistics]."""
        normal_BTD = layer.attn_norm(x_BTD)
        q_BTKGH = rotate(layer.attn.q(normal_BTD), turn).reshape(batch, length, -1, groups, config.head_dim)
        k_BSKH = rotate(layer.attn.k(normal_BTD), turn)

        def chunk_sums(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            q_BtKGH, attended_BtS, kinds_BtQ, position_Bt = chunk
            scores = jnp.einsum("BtKGH,BSKH->BKGtS", q_BtKGH, k_BSKH, preferred_element_type=jnp.float32)
            attended_B11tS = attended_BtS[:, None, None]
            p_BKGtS = jax.nn.softmax(jnp.where(attended_B11tS, scores / config.head_dim**0.5, -1e30), axis=-1)
            # Queries that only pad the last chunk may attend to no key, so they add zero.
            p_BKGtS = jnp.where(attended_B11tS, p_BKGtS, 0.0)
            ahead_BtS = (positions_BT[:, None, :] - position_Bt[:, :, None]).astype(jnp.float32)
            entropy = -jnp.sum(p_BKGtS * jnp.log(jnp.where(p_BKGtS > 0, p_BKGtS, 1.0)), axis=-1)
            # Log 2 at least: with one key the entropy is 0, and its share 0 instead of 0 / 0.
            log_most = jnp.log(jnp.maximum(jnp.sum(attended_BtS, axis=-1), 2).astype(jnp.float32))[:, None, None]
            weights = (
                jnp.abs(ahead_BtS),
                ahead_BtS,
                ahead_BtS > 0,
                ahead_BtS == 0,
                ahead_BtS == -1,
                jnp.broadcast_to(prompt_BT[:, None], ahead_BtS.shape),
                jnp.broadcast_to(masked_BT[:, None], ahead_BtS.shape),
                jnp.broadcast_to(first_BS[:, None], ahead_BtS.shape),
            )
            means = [jnp.einsum("BKGtS,BtS->BKGt", p_BKGtS, weight.astype(jnp.float32)) for weight in weights]
            values = jnp.stack([entropy, entropy / log_most, *means], axis=-1)
            return total + jnp.einsum("BKGtX,BtQ->KGQX", values, kinds_BtQ.astype(jnp.float32)), None

        heads = (config.num_key_value_heads, groups)
        zeros = jnp.zeros((*heads, len(QUERIES), len(STATISTICS)), jnp.float32)
        total = jax.lax.scan(chunk_sums, zeros, (cut(q_BTKGH), *fixed))[0]
        return total.reshape(-1, *total.shape[2:])

    def block(x_BTD: jax.Array, layer: Layer) -> tuple[jax.Array, jax.Array]:
        layer = jax.tree.map(lambda leaf: leaf.astype(model.compute_dtype), layer)
        sums = layer_sums(layer, x_BTD)
        return layer(x_BTD, turn, mask, model.attention_backend)[0], sums

    x_BTD, sums = jax.lax.scan(block, model.embed(noisy_BT).astype(model.compute_dtype), model.layers)
    return sums, counts_Q, model.norm(x_BTD[:, :num_tokens]).astype(model.compute_dtype)


def read_rows(data: str, tokenizer: Tokenizer, number: int, longest: int) -> InspectedRows:
    """Reads the first test rows of a source and returns those that fit, padded on the right.

    Args:
      data: the name or path of the data, as for `train.py --data`.
      tokenizer: the tokenizer of the model.
      number: number of rows of the source that are read.
      longest: maximum number of tokens of a row; longer rows are left out.

    Raises:
      ValueError: no row fits, or `open_source` raises it.
    """
    found = [one for _, one in TokenizedRows(open_source(data, "test"), tokenizer).first(number, longest)]
    if not found:
        raise ValueError(f"{data} has no test row that fits into {longest} tokens; give other data")
    width = max(one.length for one in found)
    regions = [width - one.prompt_length for one in found]
    tokens = lay_out(found, regions, width, tokenizer.pad_id).tokens_BT
    position_T = np.arange(width)
    return InspectedRows(
        tokens,
        position_T < np.array([one.prompt_length for one in found])[:, None],
        position_T < np.array([one.length for one in found])[:, None],
    )


def inspect(model: Dream, rows: InspectedRows, seed: int, levels: Sequence[float] = LEVELS) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table: `STATISTICS` for each noise level, layer, head and kind of query.

    A row is a dict with the keys "t" (the noise level), "layer", "head" (indices from 0), "queries" (one of `QUERIES`) and
    the names in `STATISTICS`. Kinds of which there is no query are left out.

    Args:
      model: a Dream; its `trained_mask` is used.
      rows: the rows that the model reads.
      seed: decides which positions are masked. A position that is masked at one level is also masked at higher levels.
      levels: noise levels in [0, 1]: the probability with which each token of the answer is masked.

    Raises:
      ValueError: the rows are longer than `max_position_embeddings` of the model.
    """
    uniform_BT = np.random.default_rng(seed).random(rows.tokens_BT.shape)
    for level in levels:
        masked_BT = rows.valid_BT & ~rows.prompt_BT & (uniform_BT < level)
        found = attention_statistics(model, rows, masked_BT)
        for layer, head, kind in np.ndindex(*found.shape[:3]):
            values = found[layer, head, kind]
            if not np.isnan(values).all():
                where = {"t": level, "layer": layer, "head": head, "queries": QUERIES[kind]}
                yield where | dict(zip(STATISTICS, map(float, values), strict=True))


def draw(lines: Sequence[dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    """Writes a PNG of the rows of `inspect`: heat maps (layers x heads) and means by noise level; returns `path`.

    The heat maps are for masked queries, at the noise level nearest to 0.5.

    Raises:
      ValueError: no row is for masked queries.
    """
    shown = ("entropy share", "distance", "right", "prompt", "masked", "first")
    levels = sorted({line["t"] for line in lines})
    level = min(levels, key=lambda one: abs(one - 0.5))
    masked = [line for line in lines if line["queries"] == "masked"]
    layers, heads = (1 + max(line[name] for line in masked) for name in ("layer", "head"))
    figure = Figure(figsize=(3.3 * 4, 6.4), layout="constrained")
    panels = figure.subplots(2, 4).ravel()
    for axes, name in zip(panels, shown, strict=False):
        values = np.full((layers, heads), np.nan)
        for line in masked:
            if line["t"] == level:
                values[line["layer"], line["head"]] = line[name]
        limits = {} if name == "distance" else {"vmin": 0.0, "vmax": 1.0}
        image = axes.imshow(values, cmap="cividis", aspect="auto", **limits)
        figure.colorbar(image, ax=axes)
        unit = " (tokens)" if name == "distance" else ""
        axes.set(title=f"{name}{unit}, t = {level}", xlabel="head", ylabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
    curves = {
        "entropy share": ("#0072B2", "o"),
        "right": ("#D55E00", "s"),
        "prompt": ("#009E73", "^"),
        "masked": ("#CC79A7", "D"),
        "first": ("#E69F00", "v"),
    }
    for axes, kind in zip(panels[len(shown) :], ("masked", "written"), strict=True):
        for name, (colour, marker) in curves.items():
            found = [
                (one, [line[name] for line in lines if line["t"] == one and line["queries"] == kind]) for one in levels
            ]
            points = [(one, np.mean(values)) for one, values in found if values]
            axes.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker)
        axes.set(title=f"queries that are {kind}", xlabel="noise level t", ylim=(-0.03, 1.03), xlim=(0, 1.03))
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    return path
