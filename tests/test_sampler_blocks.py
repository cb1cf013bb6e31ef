"""Blocks, caches and commit rules: the published Fast-dLLM exactly; and ours, exact as well when every pass is full."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import CHECKPOINTS, GOLDEN, model
from hypothesis import given, settings
from hypothesis import strategies as st
from marking import slow

from dream_jax.model import merge_params, split_params
from dream_jax.pretrained import load
from dream_jax.sampler import (
    Count,
    EntropyBound,
    Factor,
    FastDLLMCache,
    NoCache,
    SamplerConfig,
    Threshold,
    WindowCache,
    generate,
    loop,
    passes,
    rules,
)

BASE = SamplerConfig(max_new_tokens=12, steps=9, alg="entropy", block_length=5)
SURE = dataclasses.replace(BASE, alg="maskgit_plus", commit=Threshold(0.2))
CACHED = dataclasses.replace(SURE, cache=WindowCache(left=2, right=1, refresh_passes=3))


def prompt(*lengths, seed=0):
    """Rows of these lengths, padded on the left, and their mask. Ids below 100: no special token of either model."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    valid = np.arange(longest) >= longest - np.array(lengths)[:, None]
    return np.where(valid, rng.integers(0, 100, valid.shape), 121).astype(np.int32), valid


def order_of(out):
    """Which positions were written before which: commit steps, numbered without gaps."""
    steps = np.asarray(out.commit_step)
    return np.stack([np.unique(row, return_inverse=True)[1] for row in steps])


# The published Fast-dLLM


def fast_cases(checkpoint):
    return json.loads((GOLDEN / checkpoint / "fast_golden.json").read_text())["cases"]


def fast_config(case):
    by_threshold = case["alg"] == "confidence_threshold"
    return SamplerConfig.fast_dllm(
        cache=case["cache"],
        block_length=case["block_length"],
        max_new_tokens=case["max_new_tokens"],
        steps=case["steps"],
        temperature=case["temperature"],
        alg="maskgit_plus" if by_threshold else case["alg"],
        commit=Threshold(case["threshold"]) if by_threshold else None,
    )


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("first", range(0, 16, 2))
@pytest.mark.parametrize("form", ["stacked", slow("apart")])
@pytest.mark.optimised
def test_published_fast_dllm(form, checkpoint, first):
    """Tokens and forward passes. Both recorded prompts in one left-padded batch, which the published code cannot do."""
    cases = fast_cases(checkpoint)
    pair = [cases[first], cases[first + 1]]
    assert len(cases) == 16 and fast_config(pair[0]) == fast_config(pair[1])
    with np.load(GOLDEN / checkpoint / "fast_golden.npz") as golden:
        prompts = [golden[f"{case['id']}_prompt"][0] for case in pair]
        wanted = [golden[f"{case['id']}_sequences"][0] for case in pair]
    longest = max(map(len, prompts))
    assert len({*map(len, prompts)}) == 2
    start = np.stack([np.pad(one, (longest - len(one), 0)) for one in prompts]).astype(np.int32)
    valid = np.stack([np.arange(longest) >= longest - len(one) for one in prompts])
    out = generate(model(checkpoint, form), start, fast_config(pair[0]), prompt_mask=valid)
    for row in range(2):
        np.testing.assert_array_equal(out.tokens[row, -len(wanted[row]) :], wanted[row])
        assert int(out.passes[row]) == pair[row]["forwards"]


@pytest.mark.parametrize("number", [2, 11])
@pytest.mark.optimised
def test_published_fast_dllm_alone(number):
    """One row: as many forward passes in all as the published code."""
    case = fast_cases("tiny_b")[number]
    with np.load(GOLDEN / "tiny_b" / "fast_golden.npz") as golden:
        out = generate(model("tiny_b"), golden[f"{case['id']}_prompt"].astype(np.int32), fast_config(case))
        np.testing.assert_array_equal(out.tokens, golden[f"{case['id']}_sequences"])
    assert int(out.forwards) == int(out.passes[0]) == case["forwards"]


# Ours


@pytest.mark.parametrize("temperature", [0.0, slow(0.7)])
@pytest.mark.optimised
def test_a_full_pass_every_time_is_exact(temperature):
    dream, (start, valid) = model("tiny_a"), prompt(4, 8)
    start[1, 2] = dream.config.mask_token_id  # and a gap to fill in
    key = jax.random.key(1)
    exact = dataclasses.replace(BASE, block_length=None, temperature=temperature)
    wanted = generate(dream, start, dataclasses.replace(BASE, temperature=temperature), key, valid)
    found = generate(
        dream,
        start,
        dataclasses.replace(BASE, temperature=temperature, cache=WindowCache(left=3, right=2, refresh_passes=1)),
        key,
        valid,
    )
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.commit_step, wanted.commit_step)
    np.testing.assert_array_equal(found.passes, wanted.passes)
    if temperature == 0:  # else the numbers drawn are those of other steps
        one = dataclasses.replace(exact, block_length=20, cache=WindowCache(refresh_passes=1))
        wanted, found = generate(dream, start, exact, key, valid), generate(dream, start, one, key, valid)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(order_of(found), order_of(wanted))


def test_a_window_over_everything_is_exact():
    """The cache is then never older than the pass before, so queries see the current canvas."""
    dream, (start, valid) = model("tiny_b"), prompt(4, 8)
    config = dataclasses.replace(SURE, cache=WindowCache(left=40, right=None, refresh_blocks=None))
    wanted, found = (generate(dream, start, one, prompt_mask=valid) for one in (SURE, config))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.commit_step, wanted.commit_step)


def test_the_cache_is_used():
    """With one full pass for three blocks the cache becomes stale, which changes the answers."""
    dream, (start, _) = model("tiny_a"), prompt(6)
    exact, stale = (
        generate(dream, start, dataclasses.replace(SURE, cache=cache))
        for cache in (NoCache(), WindowCache(refresh_blocks=None))
    )
    assert not np.array_equal(stale.tokens, exact.tokens)
    assert stale.commit_step[0, 6] == exact.commit_step[0, 6]  # the first pass is full


def test_passes_are_counted():
    dream, (start, _) = model("tiny_a"), prompt(6, 6)
    one_a_pass = dataclasses.replace(SURE, commit=Threshold(1.0), max_new_tokens=10)
    made = []
    for cache in (NoCache(), WindowCache(), WindowCache(refresh_passes=4), FastDLLMCache(variant="dual")):
        out = generate(dream, start, dataclasses.replace(one_a_pass, cache=cache))
        np.testing.assert_array_equal(out.passes, [10, 10])
        assert set(np.asarray(out.commit_step)[0, 6:].tolist()) == set(range(10))
        made.append(int(out.forwards))
    assert made == [10, 10, 10, 10]  # rows in step share their passes


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    "config",
    [
        slow(SURE, id="blocks"),
        pytest.param(CACHED, id="cached"),
        slow(dataclasses.replace(BASE, cache=WindowCache(), stop_at_end=True), id="schedule"),
        slow(
            SamplerConfig.fast_dllm(cache="dual", block_length=4, max_new_tokens=12, steps=9, alg="topk_margin"),
            id="fast_dllm",
        ),
    ],
)
@pytest.mark.optimised
def test_rows_do_not_depend_on_the_batch(config, temperature):
    dream, (start, valid) = model("tiny_b"), prompt(4, 8, 6, 1, 7, 8, 2, 5)
    config = dataclasses.replace(config, temperature=temperature)
    keys = jax.random.split(jax.random.key(7), 8)
    together = generate(dream, start, config, keys, valid)
    assert len({*np.asarray(together.passes).tolist()}) > 1 or config.commit == Count()  # each at its own pace
    for row in range(8):
        alone = generate(dream, start[row : row + 1, valid[row].argmax() :], config, keys[row : row + 1])
        width = alone.tokens.shape[1]
        np.testing.assert_array_equal(together.tokens[row, -width:], alone.tokens[0])
        np.testing.assert_array_equal(together.commit_step[row, -width:], alone.commit_step[0])
        assert int(together.passes[row]) == int(alone.passes[0])


@pytest.mark.slow
def test_full_passes_in_groups(monkeypatch):
    """Rows that want a full pass, a few at a time: the same answers, and no row pays for another's."""
    dream, (start, valid) = model("tiny_a"), prompt(4, 8, 6, 1, 7)
    whole = generate(dream, start, CACHED, prompt_mask=valid)
    for tokens in (1, 60):  # one row a group; three, of which the last group has two
        monkeypatch.setattr(passes, "REFRESH_TOKENS", tokens)
        loop.denoise.clear_cache()
        found = generate(dream, start, CACHED, prompt_mask=valid)
        np.testing.assert_array_equal(found.tokens, whole.tokens)
        np.testing.assert_array_equal(found.passes, whole.passes)
        assert int(found.forwards) > int(whole.forwards)
    monkeypatch.undo()
    loop.denoise.clear_cache()


@pytest.mark.slow
def test_mesh_changes_nothing(monkeypatch):
    monkeypatch.setattr(passes, "REFRESH_TOKENS", 1)
    loop.denoise.clear_cache()
    spread = load(GOLDEN / "tiny_a" / "hf", mesh="2x4")
    for lengths in ((4, 8, 6, 5, 8, 3, 7, 1), (5, 8, 2)):  # rows that the mesh divides, and rows that it does not
        start, valid = prompt(*lengths)
        wanted = generate(model("tiny_a"), start, CACHED, prompt_mask=valid)
        found = generate(spread, start, CACHED, prompt_mask=valid)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.passes, wanted.passes)
    loop.denoise.clear_cache()


def test_gaps_are_filled_block_by_block():
    """Blocks begin at masks, wherever these are; given text between them stays."""
    dream, (start, _) = model("tiny_a"), prompt(20)
    gaps = [3, 4, 5, 6, 7, 8, 15, 16]
    start[0, gaps] = dream.config.mask_token_id
    config = dataclasses.replace(CACHED, max_new_tokens=0, block_length=4)
    out = generate(dream, start, config)
    given = np.setdiff1d(np.arange(20), gaps)
    np.testing.assert_array_equal(out.tokens[0, given], start[0, given])
    steps = np.asarray(out.commit_step)[0]
    assert not np.any(np.asarray(out.tokens) == dream.config.mask_token_id)
    assert np.all(steps[given] == -1)
    assert steps[3:7].max() < steps[7:9].min() and steps[7:9].max() < steps[15:17].min()


def test_numbers_do_not_compile_again():
    """What is only a number is handed to one program; what changes the program is compiled once each."""
    dream, (start, _) = model("tiny_a"), prompt(6)
    config = dataclasses.replace(CACHED, temperature=1.0, top_p=0.9, alg_temp=0.1, commit=Threshold(0.9))
    generate(dream, start, config, jax.random.key(0))
    compiled = loop.denoise._cache_size()
    seen = set()
    for change in ({}, {"temperature": 3.0}, {"top_p": 0.3}, {"alg_temp": 9.0}, {"commit": Threshold(0.01)}):
        out = generate(dream, start, dataclasses.replace(config, **change), jax.random.key(0))
        seen.add((tuple(np.asarray(out.tokens)[0].tolist()), tuple(np.asarray(out.commit_step)[0].tolist())))
    assert loop.denoise._cache_size() == compiled
    assert len(seen) == 5  # and each number matters


# The end of a text


def ending_at(checkpoint, token):
    """The model with another token for end-of-text."""
    graphdef, params = split_params(model(checkpoint))
    other = merge_params(graphdef, params)
    other.config = dataclasses.replace(other.config, pad_token_id=token)
    return other


@pytest.mark.parametrize("config", [BASE, CACHED], ids=["schedule", "cached"])
def test_stopping_at_the_end(config):
    dream, (start, valid) = model("tiny_a"), prompt(6, 4)
    plain = generate(dream, start, config, prompt_mask=valid)
    tokens, stopping = np.asarray(plain.tokens), dataclasses.replace(config, stop_at_end=True)
    # A token that the first row writes in the middle of its text.
    token, given = int(tokens[0, 6 + 5]), int(start[0, 3])
    at = 6 + tokens[0, 6:].tolist().index(token)
    out = generate(ending_at("tiny_a", token), start, stopping, prompt_mask=valid)
    found, steps = np.asarray(out.tokens), np.asarray(out.commit_step)
    np.testing.assert_array_equal(found[0, : at + 1], tokens[0, : at + 1])
    last = int(out.passes[0]) - 1
    before = np.asarray(plain.commit_step)[0] <= last
    np.testing.assert_array_equal(found[0, before], tokens[0, before])  # what was written after it already stays
    assert np.all(found[0, ~before] == token) and np.any(~before)
    assert int(out.passes[0]) < int(plain.passes[0])
    assert steps[0].max() == last
    assert token not in tokens[1]
    np.testing.assert_array_equal(found[1], tokens[1])
    # In the prompt it ends nothing.
    assert given not in tokens[0, 6:]
    out = generate(ending_at("tiny_a", given), start, stopping, prompt_mask=valid)
    np.testing.assert_array_equal(out.tokens, tokens)


# Commit rules


def reference_count(rule, confidences):
    """How many of the confidences, in falling order, a rule takes; written as in the papers, in plain Python."""
    if isinstance(rule, Threshold):
        return max(1, sum(c >= np.float32(rule.tau) for c in confidences))
    if isinstance(rule, Factor):
        taken = 0
        while taken < len(confidences) and confidences[taken] >= 1 - rule.factor / (taken + 2):
            taken += 1
        return max(1, taken)
    best = 1
    for k in range(1, len(confidences) + 1):
        entropies = [-c for c in confidences[:k]]
        if sum(entropies) - max(entropies) <= rule.gamma:
            best = k
    return best


choose = jax.jit(rules.choose, static_argnums=0)


def test_a_confidence_at_the_threshold_is_enough():
    confidence, candidate = jnp.array([[0.5, 0.25, 0.75, 0.5]]), jnp.array([[True, True, True, False]])
    found = choose(Threshold, jnp.float32(0.5), confidence, candidate, jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(found, [[True, False, True, False]])


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_rules(data):
    # Sixteenths: sums are exact, so that a bound is met exactly or not at all.
    rule = data.draw(
        st.sampled_from([Threshold(0.0), Threshold(0.5), Threshold(1.0), Factor(0.5), Factor(2.0), Factor(50.0)])
        | st.sampled_from([EntropyBound(0.0), EntropyBound(0.25), EntropyBound(3.0)])
    )
    sixteenths = st.integers(0, 16).map(lambda n: n / 16)
    confidence = np.array(data.draw(st.lists(sixteenths, min_size=7, max_size=7)), np.float32)
    if isinstance(rule, EntropyBound):
        confidence = -confidence
    candidate = np.array(data.draw(st.lists(st.booleans(), min_size=7, max_size=7)))
    found = choose(type(rule), jnp.float32(rule.value), confidence[None], candidate[None], jnp.zeros(1, jnp.int32))[0]
    order = sorted(np.flatnonzero(candidate), key=lambda index: -confidence[index])
    wanted = order[: reference_count(rule, [float(confidence[index]) for index in order])] if order else []
    np.testing.assert_array_equal(np.flatnonzero(found), sorted(wanted))


@pytest.mark.parametrize(
    ("rule", "alg", "fewer"),
    [
        (Threshold(0.1), "maskgit_plus", Threshold(0.9)),
        (Threshold(0.02), "topk_margin", Threshold(0.9)),
        (Factor(3.0), "maskgit_plus", Factor(0.1)),
        (EntropyBound(9.0), "entropy", EntropyBound(0.0)),
    ],
    ids=str,
)
def test_rules_in_the_loop(rule, alg, fewer):
    dream, (start, _) = model("tiny_a"), prompt(6)
    config = dataclasses.replace(BASE, alg=alg, cache=WindowCache())
    fast = generate(dream, start, dataclasses.replace(config, commit=rule))
    slow = generate(dream, start, dataclasses.replace(config, commit=fewer))
    assert int(fast.forwards) < int(slow.forwards) <= 12
    assert not np.any(np.asarray(fast.tokens) == dream.config.mask_token_id)


def test_presets():
    dream, (start, _) = model("tiny_a"), prompt(6)
    exact = SamplerConfig.preset("exact", max_new_tokens=12)
    assert exact == SamplerConfig(max_new_tokens=12, steps=None, alg="entropy")
    assert SamplerConfig.preset("exact", max_new_tokens=12, steps=3, top_k=4) == dataclasses.replace(
        exact, steps=3, top_k=4
    )
    for name in ("balanced", "fast"):
        config = SamplerConfig.preset(name, max_new_tokens=40, temperature=0.3)
        assert config.block_length == 32 and config.stop_at_end and config.temperature == 0.3
        out = generate(dream, start, config, jax.random.key(0))
        assert not np.any(np.asarray(out.tokens) == dream.config.mask_token_id)


# Refusals


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SamplerConfig.preset("quick", max_new_tokens=4), "name='quick' is not one of"),
        (lambda: SamplerConfig(alg="entropy", block_length=0), "block_length=0"),
        (lambda: SamplerConfig(alg="entropy", cache=WindowCache()), "needs a block_length"),
        (lambda: SamplerConfig(block_length=4), "without blocks or commit"),
        (lambda: SamplerConfig(alg="entropy", commit=Threshold(0.9)), "needs alg to be one of"),
        (lambda: SamplerConfig(alg="maskgit_plus", commit=EntropyBound(0.9)), "needs alg to be one of"),
        (lambda: Threshold(1.1), "tau=1.1 is outside"),
        (lambda: Factor(0.0), "factor=0.0"),
        (lambda: EntropyBound(-1.0), "gamma=-1.0"),
        (lambda: WindowCache(left=0), "left=0 must be at least 1"),
        (lambda: WindowCache(right=-1), "right=-1"),
        (lambda: WindowCache(refresh_blocks=0), "refresh_blocks=0"),
        (lambda: WindowCache(refresh_passes=0), "refresh_passes=0"),
        (lambda: FastDLLMCache(variant="triple"), "'triple'"),
        (
            lambda: SamplerConfig.fast_dllm(cache="dual", block_length=5, max_new_tokens=12, steps=12),
            "must be a multiple of block_length",
        ),
        (
            lambda: SamplerConfig.fast_dllm(cache="dual", block_length=4, max_new_tokens=12, steps=8),
            "number of blocks, 3",
        ),
        (lambda: SamplerConfig.fast_dllm(cache="dual", block_length=4, max_new_tokens=12, steps=3), "leave masks"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
