"""The fixed-grid likelihood against logits and arithmetic by hand, and what it may not depend on."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx
from marking import slow

from dream_jax import sharding
from dream_jax.config import PRESETS
from dream_jax.data import BatchOptions, Row, RowList, TokenizedRows, make_batches, token_row
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.tokenizer import ByteTokenizer
from dream_jax.trainer.heldout import LEVELS, Grid, lay_out_held_out

SMALL = dataclasses.replace(PRESETS["nano"], num_hidden_layers=1, hidden_size=64, intermediate_size=96)
LENGTH = 16


TEXTS = [Row(prompt=f"{n}?", response="yes" * (1 + n % 3)) for n in range(5)]
ROWS = [token_row(row, ByteTokenizer()) for row in TEXTS]
PAD = ByteTokenizer().pad_id


def laid_out(tokens_of=ROWS, options=None, length=LENGTH):
    return lay_out_held_out(tokens_of, length, PAD, options)


def made_batches(rows, **changes):
    return make_batches(
        TokenizedRows(RowList(rows), ByteTokenizer()), max_length=LENGTH, seed=0, num_threads=0, **changes
    )


def model(mesh=None):
    made = Dream(SMALL, rngs=nnx.Rngs(0))
    if mesh is None:
        return made
    graphdef, params = split_params(made)
    return merge_params(graphdef, jax.device_put(params, sharding.parameter_shardings(params, mesh)))


def by_hand(batch):
    """nll [levels, rows, T] and what of it is right, from all logits, in float64."""
    tokens, maskable = batch.tokens_BT, batch.maskable_BT
    generator = np.random.default_rng(0)
    masked = np.stack([maskable & (generator.random(maskable.shape) < level) for level in LEVELS])
    nll, right = np.zeros(masked.shape), np.zeros(masked.shape, bool)
    for number, hidden in enumerate(masked):
        logits = np.asarray(model()(np.where(hidden, SMALL.mask_token_id, tokens)), np.float64)
        logits = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)  # position i is predicted at i - 1
        norm = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        nll[number] = norm - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
        right[number] = logits.argmax(-1) == tokens
    return tokens, masked, np.where(masked, nll, 0), right & masked


def test_score_is_that_of_all_logits():
    tokens, masked, nll, right = by_hand(laid_out())
    mesh = sharding.make_mesh("1x1")
    score = Grid(laid_out(), 2, mesh).score(model(mesh))  # three batches, of which the last is half empty
    assert (score.rows, score.num_masked) == (5, masked.sum())
    np.testing.assert_allclose(score.nll, nll.sum() / masked.sum(), rtol=1e-5)
    quarters = [nll[2 * k : 2 * k + 2].sum() / masked[2 * k : 2 * k + 2].sum() for k in range(4)]
    np.testing.assert_allclose(score.nll_by_time, quarters, rtol=1e-5)
    assert score.masked_accuracy == pytest.approx(right.sum() / masked.sum())
    ends = masked & (tokens == SMALL.pad_token_id)
    assert score.eos_accuracy == pytest.approx((right & ends).sum() / ends.sum())
    # The error of a ratio of sums, by leaving out one row at a time.
    total, count = nll.sum((0, 2)), masked.sum((0, 2))
    without = (total.sum() - total) / (count.sum() - count)
    jackknife = math.sqrt(4 / 5 * np.sum((without - without.mean()) ** 2))
    assert score.nll_se == pytest.approx(jackknife, rel=0.05)
    row = score.row()
    assert (row["nll"], row["nll_t_25_50"]) == (score.nll, score.nll_by_time[1])
    assert f"nll {score.nll:.4f} +- {score.nll_se:.4f}" in score.line()


@pytest.mark.parametrize(("mesh", "size"), [("1x1", 5), slow("2x1", 4), slow("8x1", 8), ("2x2x2", 2)])
def test_neither_mesh_nor_batch_change_it(mesh, size):
    wanted = Grid(laid_out(), 1, sharding.make_mesh("1x1")).score(model(sharding.make_mesh("1x1")))
    devices = sharding.make_mesh(mesh)
    found = Grid(laid_out(), size, devices).score(model(devices))
    np.testing.assert_allclose(list(found.row().values()), list(wanted.row().values()), rtol=1e-5)
    assert found.num_masked == wanted.num_masked


@pytest.mark.parametrize("eos_tail", [None, 0, 2, 99])
def test_rows_are_laid_out_as_training_lays_them_out(eos_tail):
    """Ends that a model is never taught must not be scored: they would drown the rest, and rise as it learns."""
    options = BatchOptions(eos_tail=eos_tail)
    with made_batches(TEXTS, batch_size=5, options=options) as batches:
        batch = next(batches)
    valid = np.ones(batch.tokens_BT.shape, bool) if batch.valid_BT is None else batch.valid_BT
    wanted = {tuple(map(bytes, row)) for row in zip(batch.tokens_BT, batch.maskable_BT, valid, strict=True)}
    batch = laid_out(options=options)
    found = {tuple(map(bytes, row)) for row in zip(batch.tokens_BT, batch.maskable_BT, batch.valid_BT, strict=True)}
    assert found == wanted and len(found) == 5


def test_no_more_ends_are_scored_than_batches_of_like_rows_show():
    options = BatchOptions(width_step=4)
    for one in ROWS:
        copies = [Row(prompt="1?", response="x" * (one.length - 3))] * 4  # of the row's length
        with made_batches(copies, batch_size=4, options=options) as batches:
            batch = next(batches)
        alone = laid_out([one], options)
        assert batch.maskable_BT.sum(1).tolist() == [alone.maskable_BT.sum()] * 4
        assert batch.tokens_BT.shape[1] == alone.valid_BT.sum()
        # Where responses are cut to the length of one of them, a row shows at most its own end, and then pads of others.
        assert laid_out([one], BatchOptions(cut_responses=True)).valid_BT.sum() == one.length


def test_a_tail_of_ends_is_scored_as_far_as_it_is_taught():
    """What is hidden before a row changes nothing of it."""
    mesh = sharding.make_mesh("1x1")
    one = ROWS[0]
    limited = Grid(laid_out([one], BatchOptions(eos_tail=1)), 1, mesh)
    alone = Grid(laid_out([one], length=one.length + 1), 1, mesh)
    assert limited.digest != alone.digest != Grid(laid_out([one]), 1, mesh).digest
    for grid in (limited, alone):  # the same tokens hidden in both
        grid._masked = [np.zeros(grid._tokens_RT.shape, bool) for _ in LEVELS]
        for masked in grid._masked:
            masked[:, -4:] = True
    scores = [grid.score(model(mesh)) for grid in (limited, alone)]
    assert scores[0].num_masked == scores[1].num_masked == 4 * len(LEVELS)
    np.testing.assert_allclose(scores[0].nll, scores[1].nll, rtol=1e-5)


def test_a_digest_tells_grids_apart():
    mesh = sharding.make_mesh("1x1")
    assert (
        Grid(laid_out(), 1, mesh).digest
        == Grid(laid_out(), 2, mesh).digest
        != Grid(laid_out(ROWS[:-1]), 1, mesh).digest
    )


def test_what_there_is_nothing_of_is_not_a_number():
    mesh = sharding.make_mesh("1x1")
    one = dataclasses.replace(laid_out(ROWS[:1]), maskable_BT=np.zeros((1, LENGTH), bool))
    score = Grid(one, 1, mesh).score(model(mesh))
    assert math.isnan(score.nll) and math.isnan(score.nll_se) and math.isnan(score.eos_accuracy)
    assert score.num_masked == 0
