"""Prompts that come and go: every answer is what `generate` makes of the prompt alone."""

import dataclasses

import jax
import numpy as np
import pytest
from golden_numbers import GOLDEN, model
from marking import slow

from dream_jax.pretrained import load
from dream_jax.sampler import SamplerConfig, Stream, Threshold, WindowCache, generate, loop

CACHED = SamplerConfig(
    max_new_tokens=12,
    alg="maskgit_plus",
    temperature=0.7,
    block_length=5,
    commit=Threshold(0.2),
    cache=WindowCache(refresh_passes=3),
)
EXACT = SamplerConfig(max_new_tokens=12, steps=9, alg="entropy", temperature=0.7)


def prompts(count, longest=8, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 100, length).tolist() for length in rng.integers(1, longest + 1, count)]


@pytest.mark.parametrize("config", [slow(EXACT), CACHED], ids=["exact", "cached"])
def test_answers_are_those_of_each_prompt_alone(config):
    dream, asked, keys = model("tiny_a"), prompts(11), jax.random.split(jax.random.key(3), 11)
    asked[4] = [5, dream.config.mask_token_id, 7]  # a gap to fill in: more masks than the others
    stream = Stream(dream, asked, config, keys, batch_size=3)
    answers = {answer.prompt: answer for answer in stream}
    assert sorted(answers) == list(range(11))
    for index, prompt in enumerate(asked):
        alone = generate(dream, np.array([prompt]), config, keys[index : index + 1])
        np.testing.assert_array_equal(answers[index].tokens, alone.tokens[0])
        np.testing.assert_array_equal(answers[index].commit_step, alone.commit_step[0])
        assert answers[index].passes == int(alone.passes[0])
    # Rows that are done make room: fewer passes than one after the other, and than waiting for the slowest of each three.
    total = sum(answer.passes for answer in answers.values())
    assert max(total / 3, max(answer.passes for answer in answers.values())) <= stream.forwards < total


@pytest.mark.slow
def test_programs_are_those_of_the_buckets():
    dream = model("tiny_a")
    config = dataclasses.replace(EXACT, max_new_tokens=3, steps=2, temperature=0.0)
    before = loop.resume._cache_size()
    assert len(list(Stream(dream, prompts(40, longest=24), config, batch_size=8))) == 40
    assert loop.resume._cache_size() - before == 4  # 8, 12, 16, 24


def test_nothing_to_write():
    dream = model("tiny_a")
    config = dataclasses.replace(EXACT, max_new_tokens=0, temperature=0.0)
    asked = [[1, 2, 3], [4, dream.config.mask_token_id]]
    stream = Stream(dream, asked, config, batch_size=2)
    answers = {answer.prompt: answer for answer in stream}
    assert answers[0].tokens.tolist() == asked[0] and answers[0].passes == 0
    assert answers[1].tokens[0] == 4 and answers[1].tokens[1] != dream.config.mask_token_id
    assert list(Stream(dream, [], config)) == []


@pytest.mark.slow
def test_mesh_changes_nothing():
    spread, asked, keys = load(GOLDEN / "tiny_a" / "hf", mesh="2x2"), prompts(5), jax.random.split(jax.random.key(3), 5)
    wanted = {answer.prompt: answer for answer in Stream(model("tiny_a"), asked, CACHED, keys, batch_size=2)}
    for answer in Stream(spread, asked, CACHED, keys, batch_size=2):
        np.testing.assert_array_equal(answer.tokens, wanted[answer.prompt].tokens)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("asked", "options", "message"),
    [
        ([[1]], {"batch_size": 0}, "batch_size=0"),
        ([[1], [2]], {"keys": jax.random.split(jax.random.key(0), 3)}, "for 2 prompts"),
        ([[1]], {"keys": None}, "pass key="),
        ([[1], [128]], {}, "prompt 1: prompt ids span 128..128"),
    ],
)
def test_refusals(asked, options, message):
    options = {"keys": jax.random.split(jax.random.key(0), len(asked))} | options
    with pytest.raises(ValueError, match=message):
        Stream(model("tiny_a"), asked, EXACT, **options)
