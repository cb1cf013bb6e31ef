"""Sampling under the mask of block diffusion: with its cache every answer is that of a sampler that computes everything."""

import collections
import dataclasses
import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_script
from flax import nnx
from golden_numbers import GOLDEN, model

import dream_jax
from dream_jax import masks
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.pretrained import load
from dream_jax.sampler import (
    BlockCache,
    EntropyBound,
    Factor,
    NoCache,
    SamplerConfig,
    Stream,
    Threshold,
    block_passes,
    generate,
    growth,
    loop,
    passes,
)
from dream_jax.tokenizer import ByteTokenizer

SIZE = 4
MASK = f"block-diffusion:{SIZE}"
EXACT = SamplerConfig.preset("exact", max_new_tokens=14, trained_mask=MASK)
SURE = dataclasses.replace(EXACT, alg="maskgit_plus", steps=14, commit=Threshold(0.2))
EVERYTHING = dataclasses.replace(
    EXACT,
    commit=EntropyBound(2.5),
    temperature=0.7,
    top_p=0.9,
    guidance=1.5,
    forced_tokens=((0, 7), (1, 8), (2, 9), (3, 7), (5, 6), (9, 5)),
)
FACTOR = dataclasses.replace(SURE, commit=Factor(3.0), alg="topk_margin", alg_temp=0.5)


def blocks(name="tiny_a", form="stacked", **config) -> Dream:
    """The model as one of block diffusion, which this random one is as well as any other."""
    graphdef, params = split_params(model(name, form))
    found = merge_params(graphdef, params)
    found.trained_mask = MASK
    found.config = dataclasses.replace(found.config, **config)
    return found


def prompt(*lengths, seed=0):
    """Rows of these lengths, padded on the left, and their mask. Ids below 100: no special token of either model."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    valid = np.arange(longest) >= longest - np.array(lengths)[:, None]
    return np.where(valid, rng.integers(0, 100, valid.shape), 121).astype(np.int32), valid


def check_equal(found, wanted):
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.commit_step, wanted.commit_step)
    np.testing.assert_array_equal(found.passes, wanted.passes)


def recomputed(dream, start, config, key=None, valid=None):
    return generate(dream, start, dataclasses.replace(config, cache=NoCache()), key, valid)


@pytest.fixture
def computed(monkeypatch):
    """Counts the forward passes that programs make from now on, by the number of tokens: [rows, tokens] of each pass."""
    counts = collections.Counter()

    def counted(method):
        def call(dream, tokens, *arguments):
            jax.debug.callback(functools.partial(counts.update, [tokens.shape]))
            return method(dream, tokens, *arguments)

        return call

    for name in ("hidden", "hidden_and_kv_cache", "hidden_window"):
        monkeypatch.setattr(Dream, name, counted(getattr(Dream, name)))
    loop.denoise.clear_cache()
    yield counts
    loop.denoise.clear_cache()


def test_answers_are_those_without_a_cache_for_fewer_tokens(computed):
    """Rows of mixed lengths write 14 tokens in blocks of 4, one a pass: 80 tokens of each are computed instead of 364."""
    dream, (start, valid), key = blocks(), prompt(4, 9, 1, 6), jax.random.key(3)
    config = dataclasses.replace(SURE, commit=Threshold(1.0), temperature=0.7, stop_at_end=False)
    found = generate(dream, start, config, key, valid)
    jax.effects_barrier()
    # The prompt and the first block; the block before and the block, three times; the block alone in the other passes.
    assert computed == {(4, 16): 1, (4, 8): 3, (4, 4): 10}
    assert sum(number * tokens for (_, tokens), number in computed.items()) == 80
    assert int(found.forwards) == 14
    computed.clear()
    check_equal(found, recomputed(dream, start, config, key, valid))
    jax.effects_barrier()
    assert computed == {(4, 26): 14}
    # The blocks are written one after the other.
    steps = np.asarray(found.commit_step)[:, 9:]
    np.testing.assert_array_equal(np.sort(steps, axis=1), np.broadcast_to(np.arange(14), steps.shape))
    assert all(np.all(np.sort(steps[:, at : at + SIZE])[:, 0] == at) for at in range(0, 14, SIZE))


@pytest.mark.slow
def test_other_settings_change_nothing():
    """Guidance, forced tokens (the first block has no mask at all), an entropy bound, sampling; layers that are apart."""
    dream, (start, valid), key = blocks(form="apart"), prompt(4, 9, 1, 6), jax.random.key(3)
    found = generate(dream, start, EVERYTHING, key, valid)
    check_equal(found, recomputed(dream, start, EVERYTHING, key, valid))
    for at, token in EVERYTHING.forced_tokens:
        assert np.all(np.asarray(found.tokens)[:, 9 + at] == token)
    # Blocks are counted from the first new token, also if it is forced.
    steps = np.asarray(found.commit_step)[:, 9:]
    for before, after in itertools.pairwise(steps[:, at : at + SIZE] for at in range(SIZE, 14, SIZE)):
        assert np.all(before.max(axis=1) <= np.where(after < 0, 99, after).min(axis=1))


@pytest.mark.slow
def test_groups_of_rows_and_a_mesh(computed, monkeypatch):
    """Two blocks are computed only for rows that begin a block, a few at a time: as many on every device."""
    monkeypatch.setattr(passes, "REFRESH_TOKENS", 1)
    monkeypatch.setattr(block_passes, "_TWO_BLOCKS_TOKENS", 1)
    spread = load(GOLDEN / "tiny_a" / "hf", mesh="4x2")
    spread.trained_mask = MASK
    (start, valid), key = prompt(4, 8, 6, 5, 8, 3, 7, 1), jax.random.key(5)
    found = generate(spread, start, FACTOR, key, valid)
    jax.effects_barrier()
    assert set(computed) == {(4, 12), (4, 8), (8, 4)} and computed[4, 12] == 2
    assert sum(computed.values()) == int(found.forwards)
    check_equal(found, recomputed(blocks(), start, FACTOR, key, valid))


# The first token of a block


@pytest.mark.parametrize("config", [dataclasses.replace(EXACT, steps=8), pytest.param(FACTOR, marks=pytest.mark.slow)])
def test_the_first_token_of_a_block_is_written_first(config):
    """It takes a place of a pass: with a schedule every pass writes as many tokens as without the setting."""
    dream, (start, valid), key = blocks(), prompt(4, 9, 1), jax.random.key(3)
    first = dataclasses.replace(config, first_token_first=True, stop_at_end=False)
    found = generate(dream, start, first, key, valid)
    check_equal(found, recomputed(dream, start, first, key, valid))
    steps = np.asarray(found.commit_step)[:, 9:]
    without = generate(dream, start, dataclasses.replace(first, first_token_first=False), key, valid)
    before = np.asarray(without.commit_step)[:, 9:]
    for at in range(0, 14, SIZE):
        block = steps[:, at : at + SIZE]
        np.testing.assert_array_equal(block[:, 0], block.min(axis=1))
    assert any(np.any(before[:, at] > before[:, at : at + SIZE].min(axis=1)) for at in range(0, 14, SIZE))
    if config.steps == 8:
        assert int(found.forwards) == int(without.forwards) < 14
        np.testing.assert_array_equal(np.sort(steps, axis=1), np.sort(before, axis=1))
    # Each row is what it is alone, with other padding on the left.
    padded = np.pad(start[1:2], ((0, 0), (3, 0))), np.pad(valid[1:2], ((0, 0), (3, 0)))
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(np.arange(3))
    alone = generate(dream, padded[0], first, keys[1:2], padded[1])
    np.testing.assert_array_equal(alone.tokens[0, 12:], found.tokens[1, 9:])
    np.testing.assert_array_equal(alone.commit_step[0, 12:], found.commit_step[1, 9:])


@pytest.mark.slow
def test_the_first_token_is_the_one_that_the_text_before_the_block_gives():
    """It does not depend on its block, so it is the most probable token after the prompt and the blocks before."""
    dream, (start, _) = blocks(), prompt(8)
    config = dataclasses.replace(EXACT, max_new_tokens=2 * SIZE, first_token_first=True, stop_at_end=False)
    tokens = np.asarray(generate(dream, start, config).tokens)[0]
    for at in (8, 8 + SIZE):
        alone = dataclasses.replace(config, max_new_tokens=1, first_token_first=False)
        np.testing.assert_array_equal(generate(dream, tokens[None, :at], alone).tokens[0, at], tokens[at])


def test_without_a_prompt_the_first_token_has_no_place_of_its_own():
    """There is no token before it, so it is predicted from its own position, and depends on its block."""
    config = dataclasses.replace(EXACT, max_new_tokens=SIZE + 1, first_token_first=True, stop_at_end=False)
    steps = np.asarray(generate(blocks("tiny_b"), np.zeros((1, 0), np.int32), config).commit_step)[0]
    assert steps[0] > steps[1:SIZE].min()


@pytest.mark.usefixtures("unchecked")
def test_first_token_first_needs_the_blocks_of_the_mask():
    dream, (start, _) = blocks(), prompt(6)
    first = dataclasses.replace(EXACT, first_token_first=True)
    with pytest.raises(ValueError, match="first_token_first is for models of block diffusion"):
        generate(dream, start, dataclasses.replace(first, cache=NoCache(), block_length=8))
    dream.trained_mask = "causal"
    for call in (generate, lambda dream, start, config: Stream(dream, start.tolist(), config)):
        with pytest.raises(ValueError, match=r"not Causal\(\) and block_length=4; leave it out"):
            call(dream, start, dataclasses.replace(first, cache=NoCache()))
    with pytest.raises(ValueError, match=r"not Bidirectional\(\) and block_length=None"):
        SamplerConfig.preset("exact", max_new_tokens=8, first_token_first=True)


# A canvas that grows


@pytest.mark.slow
def test_a_canvas_grows_while_texts_go_on(monkeypatch):
    """The canvas has room for 8 and then 14 new tokens; what is after the end of all texts is not there. So in a stream."""
    modules = [importlib.import_module(f"dream_jax.sampler.{name}") for name in ("generate", "stream")]
    resume, lengths = loop.resume, []

    def noted(dream, batch, new_B, canvas, *arguments, **options):
        lengths.append(canvas.shape[1] - 12)
        return resume(dream, batch, new_B, canvas, *arguments, **options)

    def without_numbers(*arguments, **options):
        """A new batch whose cache holds NaN, as rows that were there before may leave it."""
        batch = loop.new_batch(*arguments, **options)
        cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), batch.state.kv_cache)
        return batch._replace(state=batch.state._replace(kv_cache=cache))

    for module in modules:
        monkeypatch.setattr(module, "resume", noted)
        monkeypatch.setattr(module, "new_batch", without_numbers)
    (start, valid), key = prompt(12, 9), jax.random.split(jax.random.key(0), 2)
    config = dataclasses.replace(SURE, temperature=0.7)
    plain = np.asarray(recomputed(blocks(), start, config, key, valid).tokens)[:, 12:]
    # The token of the first block of the first row, which ends it, and which the second row does not write before it grows.
    token = next(one for one in plain[0, :SIZE].tolist() if one not in plain[1, : 2 * SIZE])
    dream = blocks(pad_token_id=token)
    whole = recomputed(dream, start, config, key, valid)
    assert not lengths
    monkeypatch.setattr(growth, "FIRST_EXTENT", 2 * SIZE)
    check_equal(generate(dream, start, config, key, valid), whole)
    assert lengths == [8, 14]  # the second row goes on
    del lengths[:]
    ended = generate(dream, np.repeat(start[:1], 2, axis=0), config, key[np.array([0, 0])])
    np.testing.assert_array_equal(ended.tokens[1], whole.tokens[0])
    np.testing.assert_array_equal(ended.commit_step[1], whole.commit_step[0])
    assert lengths == [8]
    del lengths[:]
    asked, keys = [start[0], start[0], start[1, 3:], start[0]], key[np.array([0, 0, 1, 0])]
    for answer in Stream(dream, [one.tolist() for one in asked], config, keys, batch_size=2):
        row = int(answer.prompt == 2)
        np.testing.assert_array_equal(answer.tokens, np.asarray(whole.tokens)[row, 3 * row :])
        np.testing.assert_array_equal(answer.commit_step, np.asarray(whole.commit_step)[row, 3 * row :])
        assert answer.passes == int(whole.passes[row])
    assert lengths[0] == 8 and lengths[-1] == 14


def test_room_for_new_tokens():
    config = dataclasses.replace(EXACT, max_new_tokens=3000, block_length=24)
    assert growth.extents(config, only_new=True) == (264, 528, 1056, 2112, 3000)
    assert growth.extents(config, only_new=False) == (3000,)
    assert growth.extents(config, only_new=True, has_listener=True) == (3000,)
    forced = dataclasses.replace(config, forced_tokens=((700, 5),))
    assert growth.extents(forced, only_new=True) == (720, 1440, 2880, 3000)
    assert growth.extents(dataclasses.replace(config, cache=NoCache()), only_new=True) == (3000,)


# Masks inside the prompt, and hooks


def change_the_past(moment):
    """Changes the last token of the prompt at step 4, and the first token of the row at step 6."""
    canvas_BT, step_B1 = moment.canvas_BT, moment.step_B[:, None]
    at_BT = jnp.arange(canvas_BT.shape[1]) == jnp.where(step_B1 == 4, 23, 4)
    return jnp.where(((step_B1 == 4) | (step_B1 == 6)) & at_BT, 50, canvas_BT)


@pytest.mark.slow
def test_gaps_and_hooks():
    """Blocks are counted from the first mask of a row. What is given after a block is not seen while it is written.

    A hook that changes a token whose keys are cached makes the sampler compute the row again.
    """
    dream, (start, valid) = blocks(), prompt(20, 14, seed=1)
    gaps = [8, 9, 14, 17]  # blocks 8..11, 12..15, 16..19, 20..23 of the row, which is padded to 24 tokens
    start[:, gaps] = dream.config.mask_token_id
    config = dataclasses.replace(EXACT, max_new_tokens=6, token_hook=change_the_past)
    found = generate(dream, start, config, prompt_mask=valid)
    check_equal(found, recomputed(dream, start, config, None, valid))
    steps, tokens = np.asarray(found.commit_step), np.asarray(found.tokens)
    assert np.all(tokens[:, 19] == 50) and tokens[0, 0] == 50
    given = np.setdiff1d(np.arange(1, 19), gaps)
    np.testing.assert_array_equal(tokens[:, given], start[:, given])
    assert np.all(steps[:, [8, 9]].max(axis=1) < steps[:, 14]) and np.all(steps[:, 14] < steps[:, 17])
    assert np.all(steps[:, 17] < steps[:, 20:].min(axis=1))
    later = start.copy()
    later[:, 12] = 99 - later[:, 12]
    other = np.asarray(generate(dream, later, config, prompt_mask=valid).tokens)
    np.testing.assert_array_equal(other[:, :12], tokens[:, :12])
    assert np.any(other[:, 14:] != tokens[:, 14:])


# Presets and refusals


def test_presets_of_a_model_of_block_diffusion():
    assert (EXACT.alg, EXACT.steps, EXACT.block_length, EXACT.cache) == ("entropy", None, SIZE, BlockCache())
    for name, least in (("balanced", 0.998), ("fast", 0.9)):
        config = SamplerConfig.preset(name, max_new_tokens=40, trained_mask=MASK)
        assert (config.block_length, config.cache, config.commit) == (SIZE, BlockCache(), Threshold(least))
        assert config.stop_at_end
        by_mask = SamplerConfig.preset(name, max_new_tokens=40, mask=masks.parse(MASK))
        assert by_mask == dataclasses.replace(config, mask=masks.parse(MASK))
        assert SamplerConfig.preset(name, max_new_tokens=40, trained_mask="causal").cache != BlockCache()
        assert SamplerConfig.preset(name, max_new_tokens=40, trained_mask=MASK, cache=NoCache()).cache == NoCache()
    with pytest.raises(ValueError, match='writes one block after the other, .* an order other than "origin"'):
        SamplerConfig.preset("exact", max_new_tokens=9, trained_mask=MASK, alg="origin")


def test_a_model_of_block_diffusion_is_sampled_in_blocks_by_default():
    start, _ = prompt(6)
    dream = blocks(max_position_embeddings=1024)
    by_default = generate(dream, start)
    by_preset = generate(dream, start, SamplerConfig.preset("exact", max_new_tokens=512, trained_mask=MASK))
    assert np.array_equal(by_default.tokens, by_preset.tokens) and by_default.forwards == by_preset.forwards
    with pytest.raises(ValueError, match="the settings have no blocks; pass block_length=4"):
        generate(blocks(), start, SamplerConfig(alg="entropy", max_new_tokens=8))


@pytest.mark.usefixtures("unchecked")
def test_a_cache_that_would_not_be_exact_is_refused():
    start, _ = prompt(6)
    dream = blocks()
    with pytest.raises(ValueError, match="block_length=8 is not the block of the mask block-diffusion:4"):
        generate(dream, start, dataclasses.replace(EXACT, block_length=8))
    with pytest.raises(ValueError, match="block_length=2 is not the block"):
        SamplerConfig.preset("fast", max_new_tokens=8, trained_mask=MASK, block_length=2)
    for mask in ("bidirectional", "causal", "block-causal:4"):
        dream.trained_mask = mask
        with pytest.raises(ValueError, match="needs a model of block diffusion"):
            generate(dream, start, EXACT)
        with pytest.raises(ValueError, match="not be exact under the mask"):
            Stream(dream, start.tolist(), EXACT)
    with pytest.raises(ValueError, match="needs a block_length"):
        SamplerConfig(alg="entropy", cache=BlockCache())
    dream.trained_mask = "causal"
    assert generate(dream, start, dataclasses.replace(EXACT, mask=masks.parse(MASK), max_new_tokens=0)).forwards == 0


# Commands


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model directory of a small random model whose saved mask is one of block diffusion."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tokenizer").mkdir()
    ByteTokenizer().save(folder / "tokenizer")
    dream = dream_jax.Dream(dream_jax.PRESETS["nano"], rngs=nnx.Rngs(1))
    dream.trained_mask = MASK
    dream_jax.save(dream, folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder / "model"


@pytest.mark.slow
def test_the_commands_need_no_flags(trained, tmp_path):
    """Answers of blocks from a directory whose saved mask is one of block diffusion; so does the replay."""
    done = run_script(
        "sample.py",
        *("--model", trained, "--prompt", "2+3=", "--max-new-tokens", 6, "--preset", "fast"),
        *("--replay", tmp_path / "answer.html"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "answer.html").is_file()
    out = tmp_path / "eval"
    asked = ("--task", "sudoku", "--limit", 2, "--max-new-tokens", 6, "--sampler", "fast", "--out", out)
    done = run_script("evaluate.py", "--model", trained, *asked)
    assert done.returncode == 0, done.stderr
    assert "BlockCache()" in (out / "settings.json").read_text()
