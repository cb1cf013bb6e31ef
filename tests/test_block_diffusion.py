"""Block diffusion: two streams compute what rows with a clean past and one noised block compute, one block at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from marking import slow

from dream_jax import block_diffusion_loss, masks, sharding
from dream_jax.block_diffusion import complement, draw_block_noise, draw_packed_block_noise
from dream_jax.config import PRESETS
from dream_jax.model import abstract_model, merge_params, padded_positions, split_params
from dream_jax.objective import CartWeight, InverseTimeWeight, UniformWeight, masked_diffusion_loss

CONFIG = dataclasses.replace(PRESETS["nano"], num_hidden_layers=2, hidden_size=32, intermediate_size=48)
LENGTH = 8
# For each row the number of padding tokens on the left, and the length of the prompt.
ROWS = [(0, 3), (2, 1), (1, 0), (0, 0)]


@functools.cache
def model():
    """Weights large enough that attention matters."""
    graphdef, shapes = split_params(abstract_model(CONFIG))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.2, leaf.shape), jnp.float32)

    return merge_params(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))


@functools.cache
def batch():
    """Tokens, valid positions, positions of the answers, and masked positions; all are arrays [B, T]."""
    rng = np.random.default_rng(1)
    shape = (len(ROWS), LENGTH)
    left, prompt = np.array(ROWS).T[:, :, None]
    valid, answer = np.arange(LENGTH) >= left, np.arange(LENGTH) >= left + prompt
    tokens = np.where(valid, rng.integers(0, 256, shape), CONFIG.pad_token_id).astype(np.int32)
    return tokens, valid, answer, answer & (rng.random(shape) < 0.6)


def noised(tokens, masked):
    return np.where(masked, CONFIG.mask_token_id, tokens).astype(np.int32)


@jax.jit
def plain_states(model, tokens, mask, positions):
    return model.hidden(tokens, mask, positions)


def block_states(size):
    """The state that predicts each answer token, from single rows [clean past | noised block | what comes after]."""
    tokens, valid, answer, masked = batch()
    found = np.zeros((*tokens.shape, CONFIG.hidden_size), np.float32)
    positions = padded_positions(jnp.asarray(valid))
    for row, (left, prompt) in enumerate(ROWS):
        mask = masks.BlockDiffusion(size).for_rows(valid[row, None], answer[row, None]) & masks.KeyPadding(
            valid[row, None]
        )
        for begin in range(left + prompt, LENGTH, size):
            here = np.arange(LENGTH)
            canvas = noised(tokens[row], masked[row] & (here >= begin))
            states = plain_states(model(), jnp.asarray(canvas[None]), mask, positions[row, None])[0]
            for token in range(begin, min(begin + size, LENGTH)):
                found[row, token] = states[token if token == left else token - 1]
    return found


@pytest.mark.parametrize("size", [3, slow(1), slow(LENGTH)])
def test_states_of_two_streams_are_those_of_single_blocks(size):
    tokens, valid, answer, masked = batch()
    mask = masks.BlockDiffusion(size).for_rows(valid, answer) & masks.KeyPadding(valid)
    found = jax.jit(lambda model, *arrays: model.hidden_two_streams(*arrays))(
        model(), jnp.asarray(noised(tokens, masked)), jnp.asarray(tokens), mask, padded_positions(jnp.asarray(valid))
    )
    wanted = block_states(size)
    np.testing.assert_allclose(np.asarray(found)[answer], wanted[answer], rtol=0, atol=1e-5)
    assert np.abs(wanted[answer]).max() > 0.5


# --- the loss

WEIGHT = InverseTimeWeight()


def noise(size):
    """Noise levels and masked positions of the batch; a first token that padding would predict is not masked."""
    _, valid, answer, _ = batch()
    t, masked = draw_block_noise(jax.random.key(3), np.arange(len(ROWS)), answer, len(ROWS), size=size, valid_BT=valid)
    starts = valid & ~np.roll(valid, 1, axis=1) & (np.arange(LENGTH) > 0)
    return np.asarray(t), np.asarray(masked) & ~starts


def of_params(loss):
    """Returns the jitted function of the parameters of the model that returns value, values to report, and gradients."""
    graphdef, _ = split_params(model())
    return jax.jit(jax.value_and_grad(lambda params: loss(merge_params(graphdef, params)), has_aux=True))


def assert_same(found, wanted):
    """Compares losses and gradients of two functions from `of_params`."""
    (value, _), gradients = found
    (wanted_value, _), wanted_gradients = wanted
    assert float(value) == pytest.approx(float(wanted_value), rel=1e-5)
    assert float(value) > 1
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * float(np.abs(other).max()) + 1e-9)


def two_streams(size):
    tokens, valid, answer, _ = batch()
    t, masked = noise(size)
    return of_params(
        lambda model: block_diffusion_loss(model, tokens, masked, t, WEIGHT, valid, size=size, answer_BT=answer)
    )


@functools.cache
def one_block_at_a_time(size=3):
    """The same loss from rows of one stream, one for each block of each row, in which only this block is noised."""
    tokens, valid, answer, _ = batch()
    t, masked = noise(size)
    block = np.where(answer, np.cumsum(answer, axis=1) - 1, -size) // size
    rows, blocks = np.nonzero([[(one == number).any() for number in range(LENGTH)] for one in block])
    masked_here = masked[rows] & (block[rows] == blocks[:, None])
    level = np.where(block[rows] == blocks[:, None], t[rows], 0).max(axis=1)
    mask = masks.BlockDiffusion(size).for_rows(valid[rows], answer[rows])
    return of_params(
        lambda model: masked_diffusion_loss(
            *(model, tokens[rows], masked_here, level, WEIGHT, valid[rows]),
            mask=mask,
            normalizer=jnp.float32(masked.sum()),
        )
    )(split_params(model())[1])


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["1x1", "4x2", "2x2x2"])
def test_loss_is_that_of_single_blocks(shape):
    params = split_params(model())[1]
    mesh = sharding.make_mesh(shape)
    with jax.set_mesh(mesh):
        found = two_streams(3)(jax.device_put(params, sharding.parameter_shardings(params, mesh)))
    assert_same(found, one_block_at_a_time())


@pytest.mark.parametrize("prompt", [0, 1, 3])
def test_blocks_of_one_token_are_autoregressive(prompt):
    """The loss is that of the prefix mask, which is causal without a prompt or with one of one token."""
    tokens = batch()[0][3:]
    answer = np.arange(LENGTH)[None] >= prompt
    ones = np.ones(tokens.shape, np.float32)
    _, aux = block_diffusion_loss(model(), tokens, answer, ones, UniformWeight(), size=1, answer_BT=answer)
    mask = masks.Prefix(np.array([prompt]))
    assert (mask.draw(4) == masks.Causal().draw(4)) == (prompt < 2)
    logits = model()(tokens, mask)[:, :-1]
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), tokens[:, 1:, None], axis=2)[..., 0]
    begin = max(prompt, 1)
    np.testing.assert_allclose(aux["token_nll"][:, begin:], nll[:, begin - 1 :], rtol=1e-5, atol=1e-5)
    assert not np.asarray(aux["token_nll"])[:, :prompt].any()


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [False, True])
def test_one_block_is_masked_diffusion(prompt):
    """Under the mask of one block; without a prompt this is the bidirectional mask."""
    tokens, valid, answer, _ = batch()
    tokens, valid, answer = (x[:2] if prompt else x[3:] for x in (tokens, valid, answer))
    masked = answer & (np.arange(LENGTH) % 3 != 1)
    t = np.full(tokens.shape, 0.6, np.float32)
    mask = masks.BlockDiffusion(LENGTH).for_rows(valid, answer) if prompt else masks.Bidirectional()
    found = of_params(
        lambda model: block_diffusion_loss(model, tokens, masked, t, WEIGHT, valid, size=LENGTH, answer_BT=answer)
    )
    wanted = of_params(lambda model: masked_diffusion_loss(model, tokens, masked, t[:, 0], WEIGHT, valid, mask=mask))
    params = split_params(model())[1]
    assert_same(found(params), wanted(params))


@functools.cache
def packed_batch():
    """The texts of the batch in two rows: their lengths, and a function that packs arrays [B, T] in the same way."""
    _, valid, _, _ = batch()
    lengths = valid.sum(1)
    width = int(max(lengths[:2].sum(), lengths[2:].sum())) + 2

    def pack(x):
        rows = [np.concatenate([np.asarray(x)[i][valid[i]] for i in pair]) for pair in ((0, 1), (2, 3))]
        return np.stack([np.pad(row, (0, width - len(row))) for row in rows])

    return masks.Packed(np.array([lengths[:2], lengths[2:]])), pack, width


def test_noise_of_packed_texts_is_that_of_rows():
    """The numbers of a text are those of the end of a row of the same width."""
    _, valid, answer, _ = batch()
    packed, pack, width = packed_batch()
    key, order = jax.random.key(5), np.array([[2, 0], [3, 1]])
    valid, answer = (np.pad(x, ((0, 0), (width - LENGTH, 0))) for x in (valid, answer))
    found = draw_block_noise(key, order.reshape(-1), answer, 4, size=2, valid_BT=valid)
    t, masked, here = (pack(np.asarray(x)[:, width - LENGTH :]) for x in (*found, answer))
    packed_t, packed_masked = draw_packed_block_noise(key, packed, order, here, size=2)
    np.testing.assert_array_equal(packed_masked, masked)
    np.testing.assert_array_equal(np.asarray(packed_t)[here], t[here])


@pytest.mark.slow
def test_packed_texts_are_learned_as_in_rows_of_their_own():
    tokens, _, answer, _ = batch()
    packed, pack, _ = packed_batch()
    t, masked = noise(3)
    found = of_params(
        lambda model: block_diffusion_loss(
            *(model, pack(tokens), pack(masked), pack(t), WEIGHT, packed), size=3, answer_BT=pack(answer)
        )
    )
    assert_same(found(split_params(model())[1]), one_block_at_a_time())


# --- the noise


def test_noise_levels_are_spread_over_blocks_and_rows():
    rows, length, size = 64, 128, 4
    maskable = np.ones((rows, length), bool)
    maskable[:, :8] = False
    t, masked = map(np.asarray, draw_block_noise(jax.random.key(0), np.arange(rows), maskable, rows, size=size))
    levels = t[:, 8::size]
    np.testing.assert_array_equal(np.repeat(levels, size, axis=1), t[:, 8:])
    assert ((levels >= 0) & (levels < 1)).all()
    # Of every block the levels of the rows are stratified; of every row those of the blocks are spread evenly.
    gaps = np.diff(np.sort(levels, axis=0), axis=0)
    np.testing.assert_allclose(gaps, 1 / rows, atol=1e-5)
    assert np.diff(np.sort(levels, axis=1), axis=1).max() < 0.08
    turns = np.arange(levels.shape[1]) * ((np.sqrt(5) - 1) / 2)
    np.testing.assert_allclose((levels - levels[:, :1] - turns) % 1 % 0.999999, 0, atol=1e-5)
    assert not masked[:, :8].any()
    for low in np.arange(0, 1, 0.25):
        here = (t[:, 8:] >= low) & (t[:, 8:] < low + 0.25)
        assert masked[:, 8:][here].mean() == pytest.approx(low + 0.125, abs=0.05)
    # A row has the same noise in another order of rows.
    some = np.array([5, 2])
    alone = draw_block_noise(jax.random.key(0), some, maskable[:2], rows, size=size)
    for one, whole in zip(alone, (t, masked), strict=True):
        np.testing.assert_array_equal(one, whole[some])


def test_complement_masks_every_other_token():
    answer = batch()[2]
    t, masked = noise(2)
    other_t, other = complement(t, masked, answer)
    np.testing.assert_array_equal(masked.astype(int) + np.asarray(other), answer)
    np.testing.assert_allclose(other_t, 1 - t)


def test_wrong_arguments_of_the_loss_raise():
    tokens, valid, answer, masked = batch()
    t = np.full(tokens.shape, 0.5, np.float32)
    for message, changed in {
        r"CART counts.*take the weight inverse-time, linear or uniform": {"weight": CartWeight(0.1)},
        r"size=0 must be at least 1": {"size": 0},
        r"t has shape \(4,\), but the tokens have \(4, 8\)": {"t_BT": t[:, 0]},
        r"answer has shape \(4, 7\)": {"answer_BT": answer[:, 1:]},
        r"1 tokens of prompts or padding are masked": {"masked_BT": masked | (np.arange(8) == 1) & (valid ^ answer)},
        r"attention_mask is the mask Causal, but block diffusion has a mask": {"attention_mask": masks.Causal()},
        r"lengths for 1 rows, but the tokens have 4": {"attention_mask": masks.Packed(np.array([[8]]))},
    }.items():
        given = {"masked_BT": masked, "t_BT": t, "attention_mask": valid, "size": 2, "answer_BT": answer}
        with pytest.raises((ValueError, TypeCheckError), match=message):
            block_diffusion_loss(model(), tokens, **given | changed)
