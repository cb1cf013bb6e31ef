"""What a caller may do to the text: hooks in the loop, guidance, forced tokens, an end that comes later."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import model
from marking import slow

from dream_jax.sampler import SamplerConfig, Stream, Threshold, WindowCache, generate, loop, propose

EXACT = SamplerConfig(max_new_tokens=10, steps=7, alg="entropy")
CACHED = dataclasses.replace(
    EXACT, alg="maskgit_plus", block_length=4, commit=Threshold(0.2), cache=WindowCache(refresh_passes=3)
)
BOTH = pytest.mark.parametrize("config", [EXACT, CACHED], ids=["exact", "cached"])


def prompt(*lengths, seed=0):
    """Rows of these lengths, padded on the left, and their mask. Ids below 100: no special token of either model."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    valid = np.arange(longest) >= longest - np.array(lengths)[:, None]
    return np.where(valid, rng.integers(0, 100, valid.shape), 121).astype(np.int32), valid


# Hooks


def even_at_even_positions(moment, position, logits):
    """The parity of the token is that of its position: a rule that needs the canvas index, the position and the logits."""
    odd = jnp.take_along_axis(moment.positions_BT, position, axis=1) % 2 == 1
    return jnp.where((jnp.arange(logits.shape[-1]) % 2 == 1) == odd[:, :, None], logits, -jnp.inf)


@BOTH
def test_logits_hook(config, monkeypatch):
    dream, (start, valid) = model("tiny_a"), prompt(5, 8)
    config = dataclasses.replace(config, logits_hook=even_at_even_positions, forbidden_tokens=range(0, 100, 3))
    out = generate(dream, start, config, prompt_mask=valid)
    for row, length in enumerate((5, 8)):
        new = np.asarray(out.tokens)[row, 8:]
        np.testing.assert_array_equal(new % 2, (length + np.arange(10)) % 2)
        assert not set(new.tolist()) & set(range(0, 100, 3))  # and what is forbidden stays so
    monkeypatch.setattr(propose, "_LOGIT_ELEMENTS", 2 * 128 * 3)  # a few positions at a time
    loop.denoise.clear_cache()
    np.testing.assert_array_equal(generate(dream, start, config, prompt_mask=valid).tokens, out.tokens)
    loop.denoise.clear_cache()


def first_step_again(moment):
    """Masks again whatever the first step wrote: nothing but what was given is left after it."""
    new = moment.positions_BT >= 8
    return jnp.where(new & (moment.step_B[:, None] == 1), 120, moment.canvas_BT)


@pytest.mark.slow
def test_token_hook():
    dream, (start, _) = model("tiny_a"), prompt(8)
    config = dataclasses.replace(EXACT, steps=10)
    plain = generate(dream, start, config)
    first = int(np.flatnonzero(np.asarray(plain.commit_step)[0] == 1)[0])  # step 0 writes nothing, step 1 one token

    def seven(moment):
        return moment.canvas_BT.at[:, first - start.shape[1] - 10].set(
            jnp.where(moment.step_B == 1, 7, moment.canvas_BT[:, first - start.shape[1] - 10])
        )

    out = generate(dream, start, dataclasses.replace(config, token_hook=seven))
    assert int(out.tokens[0, first]) == 7 != int(plain.tokens[0, first])
    assert int(out.commit_step[0, first]) == 1
    np.testing.assert_array_equal(out.tokens[0, :8], start[0])
    # The rest is written to fit: as if the token had been given.
    given = generate(dream, start, dataclasses.replace(config, steps=1, forced_tokens=[(first - 8, 7)]))
    second = int(np.flatnonzero(np.asarray(out.commit_step)[0] == 2)[0])
    assert int(out.tokens[0, second]) == int(given.tokens[0, second])

    again = generate(dream, start, dataclasses.replace(config, token_hook=first_step_again))
    steps = np.asarray(again.commit_step)[0]
    assert not np.any(steps == 1) and not np.any(np.asarray(again.tokens) == 120)


# What is given


@pytest.mark.slow
@BOTH
def test_forced_tokens(config):
    dream, (start, valid) = model("tiny_a"), prompt(5, 8)
    forced = dataclasses.replace(config, forced_tokens=[(3, 17), (9, 4)])
    out = generate(dream, start, forced, prompt_mask=valid)
    assert np.all(np.asarray(out.tokens)[:, [8 + 3, 8 + 9]] == [17, 4])
    assert np.all(np.asarray(out.commit_step)[:, [8 + 3, 8 + 9]] == -1)
    # The same as a prompt that has text on both sides of its gaps.
    canvas = np.pad(start, ((0, 0), (0, 10)), constant_values=120)
    canvas[:, [11, 17]] = [17, 4]
    gaps = dataclasses.replace(config, max_new_tokens=0)
    both = generate(dream, canvas, gaps, prompt_mask=np.pad(valid, ((0, 0), (0, 10)), constant_values=True))
    if config is CACHED:  # the schedule has as many steps
        np.testing.assert_array_equal(both.tokens, out.tokens)
    whole = next(Stream(dream, [start[1].tolist()], forced))
    np.testing.assert_array_equal(whole.tokens, out.tokens[1])


def test_end_penalty():
    dream, (start, _) = model("tiny_a"), prompt(6)
    end = dream.config.pad_token_id
    for penalty, share in ((-1e4, 1.0), (1e4, 0.0)):
        out = generate(dream, start, dataclasses.replace(EXACT, end_penalty=penalty))
        assert np.mean(np.asarray(out.tokens)[0, 6:] == end) == share
    # Half of it matters half as much: exactly where the end token overtakes the best of the others.
    one = dataclasses.replace(EXACT, steps=1, max_new_tokens=1)
    logits = np.asarray(dream(np.pad(start, ((0, 0), (0, 1)), constant_values=120)))[0, 5]
    gap = float(logits[end] - np.delete(logits, end).max())
    for more, wanted in ((-1e-3, True), (1e-3, False)):
        out = generate(dream, start, dataclasses.replace(one, end_penalty=gap + more))
        assert (int(out.tokens[0, 6]) == end) is wanted


# Guidance


def test_guidance_is_that_of_two_canvases():
    """The first step's tokens, computed from two plain forward passes."""
    dream, (start, valid) = model("tiny_a"), prompt(5, 8)
    config = SamplerConfig(max_new_tokens=10, steps=1, alg="entropy", guidance=1.5)
    out = generate(dream, start, config, prompt_mask=valid)
    canvas = np.pad(start, ((0, 0), (0, 10)), constant_values=120)
    valid_BT = np.pad(valid, ((0, 0), (0, 10)), constant_values=True)
    given, free = (np.asarray(dream(tokens, valid_BT))[:, 7:-1] for tokens in (canvas, np.where(valid_BT, 120, canvas)))
    np.testing.assert_array_equal(out.tokens[:, 8:], np.argmax(free + 2.5 * (given - free), axis=-1))
    assert not np.array_equal(out.tokens, generate(dream, start, dataclasses.replace(config, guidance=0.0)).tokens)
    assert int(out.forwards) == 1


@pytest.mark.slow
def test_guidance_with_a_cache():
    """Exact when every pass is full; rows do not depend on the batch."""
    dream, (start, valid) = model("tiny_b"), prompt(5, 8, 3)
    start = np.where(valid, start, 0)
    config = dataclasses.replace(CACHED, guidance=0.7, temperature=0.7)
    full = dataclasses.replace(config, cache=WindowCache(refresh_passes=1))
    plain = dataclasses.replace(config, cache=EXACT.cache)
    key = jax.random.key(2)
    wanted, found = (generate(dream, start, one, key, valid) for one in (plain, full))
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    together = generate(dream, start, config, key, valid)
    for row, length in enumerate((5, 8, 3)):
        row_key = jax.random.fold_in(key, row)[None]
        alone = generate(dream, start[row : row + 1, -length:], config, row_key)
        np.testing.assert_array_equal(together.tokens[row, -length - 10 :], alone.tokens[0])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forced_tokens": [(10, 3)]}, "offset 10 is outside"),
        ({"forced_tokens": [(-1, 3)]}, "offset -1 is outside"),
        ({"forced_tokens": [(1, 3), (1, 4)]}, "has an offset twice"),
        ({"end_penalty": float("nan")}, "end_penalty=nan"),
        ({"guidance": float("inf")}, "guidance=inf"),
        ({"forced_tokens": [(1, 128)]}, "forced token 128"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        generate(model("tiny_a"), prompt(4)[0], dataclasses.replace(EXACT, **options))


# What is noted about the written tokens


@pytest.mark.parametrize("config", [EXACT, slow(CACHED)], ids=["exact", "cached"])
def test_recording_changes_no_token(config):
    dream, (start, valid) = model("tiny_a"), prompt(5, 8)
    plain = generate(dream, start, config, prompt_mask=valid)
    assert plain.recorded is None
    out = generate(dream, start, config, prompt_mask=valid, record="logprobs")
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.commit_step, plain.commit_step)
    written = np.asarray(out.commit_step) >= 0
    confidence = np.asarray(out.recorded.confidence_BT)
    assert confidence.shape == written.shape
    assert np.isfinite(confidence[written]).all() and np.isnan(confidence[~written]).all()
    # At temperature 0 the most probable token is written.
    most_probable = np.asarray(out.recorded.logprobs.top_token_BMK)[:, :, 0]
    np.testing.assert_array_equal(most_probable[written], np.asarray(out.tokens)[written])
