"""Block diffusion: two streams compute what rows with a clean past and one noised block compute, one block at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dream_jax import masks
from dream_jax.config import PRESETS
from dream_jax.model import abstract_model, merge_params, padded_positions, split_params

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


@pytest.mark.parametrize("size", [1, 3, LENGTH])
def test_states_of_two_streams_are_those_of_single_blocks(size):
    tokens, valid, answer, masked = batch()
    mask = masks.BlockDiffusion(size).for_rows(valid, answer) & masks.KeyPadding(valid)
    found = jax.jit(lambda model, *arrays: model.hidden_two_streams(*arrays))(
        model(), jnp.asarray(noised(tokens, masked)), jnp.asarray(tokens), mask, padded_positions(jnp.asarray(valid))
    )
    wanted = block_states(size)
    np.testing.assert_allclose(np.asarray(found)[answer], wanted[answer], rtol=0, atol=1e-5)
    assert np.abs(wanted[answer]).max() > 0.5
