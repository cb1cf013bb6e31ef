"""Without a number of steps, each row takes as many as it has masks, in its prompt and after it."""

import dataclasses

import jax
import numpy as np
import pytest
from golden_numbers import model
from marking import slow

from dream_jax.sampler import SamplerConfig, Stream, WindowCache, generate, loop

EXACT = SamplerConfig.preset("exact", max_new_tokens=6, temperature=0.7)
CONFIGS = {
    "exact": EXACT,
    "origin": dataclasses.replace(EXACT, alg="origin"),
    "blocks": dataclasses.replace(EXACT, block_length=4, cache=WindowCache(refresh_passes=2)),
    "some": dataclasses.replace(EXACT, steps=7, block_length=4),
}


def masked(dream, ids, *gaps):
    """The ids with a mask at each of these indices."""
    return [dream.config.mask_token_id if index in gaps else token for index, token in enumerate(ids)]


@pytest.mark.parametrize("inside", [6, slow(2)])
def test_masks_of_the_prompt_are_masks_like_the_new_ones(inside):
    dream, key, given = model("tiny_a"), jax.random.key(4), [5, 6, 7]
    appended = generate(dream, np.array([given]), EXACT, key)
    prompt = [*given, *[dream.config.mask_token_id] * inside]
    filled = generate(dream, np.array([prompt]), dataclasses.replace(EXACT, max_new_tokens=6 - inside), key)
    np.testing.assert_array_equal(filled.tokens, appended.tokens)
    np.testing.assert_array_equal(filled.commit_step, appended.commit_step)
    assert int(filled.forwards) == int(appended.forwards) == 5  # of 6 steps, the first writes nothing


@pytest.mark.parametrize("masks", [9, *map(slow, (0, 1, 2))])
def test_the_steps_are_those_of_the_number_of_masks(masks):
    dream = model("tiny_a")
    prompt = np.array([masked(dream, range(1, 12), *range(1, masks + 1))])
    key = jax.random.key(0)
    out = generate(dream, prompt, EXACT, key)
    wanted = generate(dream, prompt, dataclasses.replace(EXACT, steps=masks + 6), key)
    np.testing.assert_array_equal(out.tokens, wanted.tokens)
    np.testing.assert_array_equal(out.commit_step, wanted.commit_step)


@pytest.mark.parametrize("name", ["blocks", *map(slow, ("exact", "origin", "some"))])
def test_a_row_does_not_depend_on_its_batch(name):
    dream, config, keys = model("tiny_a"), CONFIGS[name], jax.random.split(jax.random.key(3), 3)
    rng = np.random.default_rng(0)
    gaps = [(), (2,), tuple(range(1, 8))]
    prompts = np.array([masked(dream, rng.integers(0, 100, 8).tolist(), *one) for one in gaps])
    batch = generate(dream, prompts, config, keys)
    stream = {one.prompt: one for one in Stream(dream, prompts.tolist(), config, keys, batch_size=2)}
    for index, prompt in enumerate(prompts):
        alone = generate(dream, prompt[None], config, keys[index : index + 1])
        for tokens, commit_step, passes in (
            (batch.tokens[index], batch.commit_step[index], int(batch.passes[index])),
            (stream[index].tokens, stream[index].commit_step, stream[index].passes),
        ):
            np.testing.assert_array_equal(tokens, alone.tokens[0])
            np.testing.assert_array_equal(commit_step, alone.commit_step[0])
            assert name == "origin" or passes == int(alone.passes[0])
    if name == "exact":
        assert batch.passes.tolist() == [5, 6, 12]


def test_programs_are_shared_by_numbers_of_masks():
    dream, config = model("tiny_a"), dataclasses.replace(EXACT, max_new_tokens=0, temperature=0.0)
    ids, before = list(range(1, 13)), loop.denoise._cache_size()
    for masks in range(1, 12):
        generate(dream, np.array([masked(dream, ids, *range(1, masks + 1))]), config)
    assert loop.denoise._cache_size() - before == 2  # up to 8 and up to 12 masks


def test_a_block_takes_its_share_of_the_masks():
    config = SamplerConfig(max_new_tokens=8, steps=72, alg="entropy", block_length=32)
    assert config.block_steps(8) == 72 and config.block_steps(72) == 32 and config.block_steps(64) == 36
    every = dataclasses.replace(config, steps=None)
    assert [every.block_steps(masks) for masks in (0, 1, 8, 32, 72)] == [1, 1, 8, 32, 32]
    assert dataclasses.replace(every, block_length=None).block_steps(72) == 72


def test_an_end_before_given_tokens_ends_nothing():
    """The text goes on after the gap, so masks after an end-of-text token in the gap are still written."""
    dream = model("tiny_a")
    mask, end = dream.config.mask_token_id, dream.config.pad_token_id

    def only_end(moment, positions, logits):
        return logits.at[..., end].add(1e6)

    config = SamplerConfig(max_new_tokens=3, steps=None, alg="entropy", stop_at_end=True, logits_hook=only_end)
    open_end = generate(dream, np.array([[5, mask, mask]]), config)
    assert int(open_end.forwards) == 1
    given_after = generate(dream, np.array([[5, mask, mask, 7]]), config)
    assert int(given_after.forwards) > 1 and np.asarray(given_after.commit_step)[0, 1:3].max() >= 0
