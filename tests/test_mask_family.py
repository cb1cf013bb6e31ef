"""Every mask, through the model, the loss and the sampler: padding and batching change nothing, caches are right."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marking import slow

from dream_jax import masks
from dream_jax.attention import Window
from dream_jax.config import PRESETS
from dream_jax.model import abstract_model, merge_params, padded_positions, split_params
from dream_jax.objective import UniformWeight, masked_diffusion_loss
from dream_jax.sampler import FastDLLMCache, SamplerConfig, Stream, Threshold, WindowCache, generate
from dream_jax.sampler.loop import canvas_layout
from dream_jax.sampler.state import StaticSettings

NAMES = [
    "bidirectional",
    slow("causal"),
    "prefix",
    "block-causal:4",
    "block-diffusion:4",
    "window:3",
    slow("window:4:0"),
]
CONFIG = dataclasses.replace(PRESETS["nano"], num_hidden_layers=2, hidden_size=64, intermediate_size=96)


@functools.cache
def model(trained_mask="bidirectional"):
    """Weights large enough that attention matters."""
    graphdef, shapes = split_params(abstract_model(CONFIG))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.15, leaf.shape), jnp.float32)

    found = merge_params(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))
    found.trained_mask = trained_mask
    return found


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, 256, length).astype(np.int32)


def laid(rows, width=None):
    """Rows (tokens, padding on the left, prompt) as a batch: tokens, valid positions, positions of the answer."""
    width = width or max(left + len(tokens) for tokens, left, _ in rows)
    batch = np.full((len(rows), width), CONFIG.pad_token_id, np.int32)
    valid, answer = np.zeros(batch.shape, bool), np.zeros(batch.shape, bool)
    for line, (tokens, left, prompt) in enumerate(rows):
        batch[line, left : left + len(tokens)] = tokens
        valid[line, left : left + len(tokens)] = True
        answer[line, left + prompt :] = True
    return batch, valid, answer


def logits(name, rows, width=None):
    tokens, valid, answer = laid(rows, width)
    mask = masks.parse(name).for_rows(valid, answer) & masks.KeyPadding(valid)
    found = np.asarray(model()(tokens, mask, padded_positions(jnp.asarray(valid))))
    return [found[line, left : left + len(one)] for line, (one, left, _) in enumerate(rows)]


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_batching_change_no_logits(name):
    long, short = text(11), text(7, 1)
    wanted = [logits(name, [(long, 0, 5)])[0], logits(name, [(short, 0, 3)])[0]]
    if name != "bidirectional":
        assert np.abs(wanted[0] - logits("bidirectional", [(long, 0, 5)])[0]).max() > 1e-2
    for rows, width in [
        ([(long, 0, 5), (short, 4, 3)], None),  # on the left
        ([(long, 0, 5), (short, 0, 3)], None),  # on the right
        ([(long, 3, 5), (short, 1, 3)], 17),  # on both sides
    ]:
        for found, one in zip(logits(name, rows, width), wanted, strict=True):
            np.testing.assert_allclose(found, one, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_loss_does_not_feel_padding(name):
    """As the train step asks for it: padding hidden by `attention_mask`, the rest by the mask."""
    mask, tokens = masks.parse(name), text(9)

    def nll(left):
        batch, valid, answer = laid([(tokens, left, 4)])
        masked = answer & (np.arange(batch.shape[1]) % 2 == left % 2)
        placed = mask.for_rows(valid, answer)
        time = np.full(1, 0.5, np.float32)
        return masked_diffusion_loss(model(), batch, masked, time, UniformWeight(), valid, mask=placed)[0]

    assert float(nll(3)) == pytest.approx(float(nll(0)), rel=1e-5)
    if name != "bidirectional":
        batch, valid, answer = laid([(tokens, 0, 4)])
        masked, time = answer & (np.arange(9) % 2 == 0), np.full(1, 0.5, np.float32)
        plain = masked_diffusion_loss(model(), batch, masked, time, UniformWeight(), valid)[0]
        assert abs(float(nll(0)) - float(plain)) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_window_of_queries_attends_as_the_whole_does(name):
    """With a cache of the same tokens, a window computes the same as a pass over all of them."""
    rows = [(text(12), 2, 5), (text(9, 1), 5, 2)]
    tokens, valid, answer = laid(rows)
    mask = masks.parse(name).for_rows(valid, answer) & masks.KeyPadding(valid)
    positions = padded_positions(jnp.asarray(valid))
    hidden, kv_cache = jax.jit(lambda model: model.hidden_and_kv_cache(jnp.asarray(tokens), mask, positions))(model())
    index = jnp.array([[6, 7, 8, 9], [9, 10, 11, 12]])
    at = lambda x: jnp.take_along_axis(jnp.asarray(x), index, axis=1)
    window = Window(kv_cache, index)
    found, updated = jax.jit(lambda model: model.hidden_window(at(tokens), mask.at(index), at(positions), window))(
        model()
    )
    wanted = jnp.take_along_axis(hidden, index[:, :, None], axis=1)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(updated.k, kv_cache.k, rtol=0, atol=1e-4)


# --- whether a cache is exact

PROMPT, BLOCK, TOTAL = 4, 4, 16


def cached_error(name):
    """Largest error of the logits of a block when the cache outside it is from before the block was written."""
    canvas = jnp.full((1, TOTAL), CONFIG.mask_token_id, jnp.int32).at[0, :PROMPT].set(text(PROMPT))
    valid, answer = np.ones((1, TOTAL), bool), np.arange(TOTAL)[None] >= PROMPT
    mask, positions = masks.parse(name).for_rows(valid, answer), jnp.arange(TOTAL)[None]
    begin, end = PROMPT, PROMPT + BLOCK
    run = jax.jit(lambda model, canvas: model.hidden_and_kv_cache(canvas, mask, positions))
    _, kv_cache = run(model(), canvas)
    canvas = canvas.at[0, begin:end:2].set(text(2, 3))  # half of the block is written
    wanted, _ = run(model(), canvas)
    index = jnp.arange(begin - 1, end)[None]
    found, _ = model().hidden_window(canvas[:, begin - 1 : end], mask.at(index), index, Window(kv_cache, index))
    return float(jnp.max(jnp.abs(model().unembed(found) - model().unembed(wanted[:, begin - 1 : end]))))


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("causal", True),
        ("prefix", True),
        slow("window:4:0", True),
        ("block-causal:4", True),
        ("block-diffusion:4", True),  # the sampler's blocks are the mask's
        slow("block-causal:2", True),
        ("block-causal:8", False),  # the mask's block goes on beyond the sampler's
        slow("block-causal:3", False),
        ("window:3", False),
        ("bidirectional", False),
    ],
)
def test_cache_is_exact_where_nothing_cached_sees_the_block(name, exact):
    error = cached_error(name)
    assert (error < 1e-5) if exact else (error > 1e-2), f"{name}: {error:.2e}"


# --- the sampler


def config(**options):
    chosen = {"max_new_tokens": 12, "steps": 12, "alg": "entropy", "block_length": 4}
    return SamplerConfig(**chosen | options)


@functools.cache
def sampled(trained="bidirectional", **options):
    return generate(model(trained), np.stack([text(8, seed) for seed in range(8)]), config(**options))


@pytest.mark.parametrize("name", ["prefix", pytest.param("window:3", marks=pytest.mark.slow)])
def test_sampling_is_under_the_mask_that_was_trained(name):
    given = sampled(mask=masks.parse(name))
    assert not np.array_equal(given.commit_step, sampled().commit_step)
    np.testing.assert_array_equal(sampled(name).tokens, given.tokens)
    np.testing.assert_array_equal(sampled(name).commit_step, given.commit_step)
    # And told otherwise, under the other.
    np.testing.assert_array_equal(sampled(name, mask=masks.Bidirectional()).commit_step, sampled().commit_step)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "prefix", "block-causal:4"])
def test_cached_sampling_is_exact_where_the_mask_makes_it_so(name):
    """A full pass at each block; and one at the first alone, where windows reach back over the block before."""
    mask = masks.parse(name)
    wanted = sampled(mask=mask)
    for cache in (WindowCache(), WindowCache(left=4, refresh_blocks=None)):
        found = sampled(mask=mask, cache=cache)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.commit_step, wanted.commit_step)


def test_cached_sampling_is_not_exact_without():
    """The same cache under the bidirectional mask: what the test above would see if a cache were wrong."""
    found = sampled(cache=WindowCache())
    wanted = sampled()
    same = np.array_equal(found.tokens, wanted.tokens) and np.array_equal(found.commit_step, wanted.commit_step)
    assert not same


CACHES = {
    "window": {"cache": WindowCache(left=2, right=3, refresh_passes=3)},
    "dual": {"cache": FastDLLMCache(variant="dual"), "steps": 24},
    "guided": {"guidance": 1.0, "cache": WindowCache()},
    "threshold": {"commit": Threshold(0.1), "alg": "maskgit_plus", "cache": WindowCache()},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cache"),
    [("prefix", "window"), ("prefix", "dual"), ("block-causal:3", "guided"), ("block-causal:3", "threshold")],
)
def test_sampling_does_not_feel_padding_or_company(name, cache):
    """The two masks that go by where a row begins and answers, through every kind of pass."""
    settings = config(mask=masks.parse(name), **CACHES[cache])
    prompts = [text(8), text(5, 1)]
    alone = [generate(model(), prompt[None], settings) for prompt in prompts]
    batch, valid, _ = laid([(prompts[0], 0, 0), (prompts[1], 3, 0)])
    together = generate(model(), batch, settings, prompt_mask=valid)
    for line, one in enumerate(alone):
        begin = 3 * line
        np.testing.assert_array_equal(together.tokens[line, begin:], one.tokens[0])
        np.testing.assert_array_equal(together.commit_step[line, begin:], one.commit_step[0])
    for answer in Stream(model(), [one.tolist() for one in prompts], settings, batch_size=1):
        np.testing.assert_array_equal(answer.tokens, alone[answer.prompt].tokens[0])
        np.testing.assert_array_equal(answer.commit_step, alone[answer.prompt].commit_step[0])


def test_full_passes_are_those_without_a_cache():
    mask = masks.Prefix()
    found, wanted = sampled(mask=mask, cache=WindowCache(refresh_passes=1)), sampled(mask=mask)
    np.testing.assert_array_equal(found.commit_step, wanted.commit_step)


def test_bidirectional_costs_nothing():
    """The sampler hands the model padding alone, and the loss is the program that it is without any mask."""
    valid = jnp.ones((2, 8), bool)
    layout = canvas_layout(model(), valid, StaticSettings.of(config(), 4, [4]))
    assert isinstance(layout.mask, masks.KeyPadding)
    tokens, time = text(8)[None], np.full(1, 0.5, np.float32)

    def program(**options):
        run = lambda model: masked_diffusion_loss(model, tokens, tokens > 99, time, UniformWeight(), **options)[0]
        return jax.jit(run).lower(model()).as_text()

    assert program() == program(mask=masks.parse("bidirectional").for_rows(valid, valid))
    assert program() != program(mask=masks.Causal())


def test_mask_for_certain_rows_is_no_setting():
    with pytest.raises(ValueError, match="holds arrays for particular rows"):
        SamplerConfig(mask=masks.Prefix(np.array([3])))
