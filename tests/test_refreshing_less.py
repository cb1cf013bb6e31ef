"""Settings of the cache that refresh less: equal to today's where they claim to be, and less work elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import GOLDEN, model
from marking import slow

from dream_jax import masks
from dream_jax.pretrained import load
from dream_jax.sampler import SamplerConfig, Stream, Threshold, WindowCache, generate, loop, passes, window_passes
from dream_jax.sampler.passes import Block

CONFIG = SamplerConfig(max_new_tokens=24, alg="maskgit_plus", block_length=4, commit=Threshold(0.02))
LESS = WindowCache(left=2, right=1, refresh_blocks=3, suffix=5, renew_left=6, refresh_passes=4)


def with_cache(cache, config=CONFIG, **changes):
    return dataclasses.replace(config, cache=cache, **changes)


def prompt(*lengths, seed=0):
    """Rows of these lengths, padded on the left, and their mask. Ids below 100: no special token of either model."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    valid = np.arange(longest) >= longest - np.array(lengths)[:, None]
    return np.where(valid, rng.integers(0, 100, valid.shape), 121).astype(np.int32), valid


def check_equal(found, wanted):
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.commit_step, wanted.commit_step)
    np.testing.assert_array_equal(found.passes, wanted.passes)


def total(out, name):
    """The number of passes of a kind that the first row needed, and of the tokens that they computed of it."""
    counts = [(kind, count) for kind, count in out.counts.of_row(0).items() if kind.name == name]
    return sum(count for _, count in counts), sum(kind.queries * count for kind, count in counts)


# Suffix windows


def test_tokens_in_view():
    """Given text after the block is seen, and the last token; of the masks only some."""
    text = ["..aa____b____", "aaaaaaaaa____"]  # padding, tokens and masks; the blocks are the first two masks
    open_BT = jnp.array([[one == "_" for one in row] for row in text])
    valid_BT = jnp.array([[one != "." for one in row] for row in text])
    block = Block(jnp.array([4, 9]), jnp.array([6, 11]))
    for suffix, wanted in {
        0: ["..xxxx..x...x", "xxxxxxxxxxx.x"],
        1: ["..xxxxx.x...x", "xxxxxxxxxxxxx"],
        3: ["..xxxxxxxx..x", "xxxxxxxxxxxxx"],
        9: ["..xxxxxxxxxxx", "xxxxxxxxxxxxx"],
    }.items():
        found = window_passes.tokens_in_view(open_BT, valid_BT, block, suffix)
        assert ["".join(".x"[int(one)] for one in row) for row in found] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("cache", [WindowCache(left=2, right=None, refresh_passes=3), WindowCache()], ids=repr)
def test_a_suffix_window_over_the_rest_of_the_row_changes_nothing(cache):
    dream, (start, valid) = model("tiny_a"), prompt(4, 9)
    start[1, 3:5] = dream.config.mask_token_id  # and a gap to fill in
    wanted = generate(dream, start, with_cache(cache), prompt_mask=valid)
    wide = dataclasses.replace(cache, suffix=24)
    found = generate(dream, start, with_cache(wide), prompt_mask=valid)
    check_equal(found, wanted)
    assert total(found, "full") == total(wanted, "full") and total(found, "window") == total(wanted, "window")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prefix", "window:3:2"])
def test_suffix_windows_under_other_masks(name):
    dream, (start, valid) = model("tiny_a"), prompt(4, 9)
    config = with_cache(WindowCache(), mask=masks.parse(name))
    wanted = generate(dream, start, config, prompt_mask=valid)
    found = generate(dream, start, with_cache(WindowCache(suffix=24), config), prompt_mask=valid)
    check_equal(found, wanted)
    if name == "prefix":  # under this mask no token sees a later block
        check_equal(generate(dream, start, with_cache(WindowCache(suffix=0), config), prompt_mask=valid), wanted)


@pytest.mark.slow
def test_a_suffix_window_hides_the_masks_after_it():
    """The answer is another one, and full passes are shorter, in few lengths."""
    dream, (start, _) = model("tiny_a"), prompt(8)
    config = with_cache(WindowCache(suffix=3), max_new_tokens=48)
    out = generate(dream, start, config)
    whole = generate(dream, start, with_cache(WindowCache(), config))
    assert not np.array_equal(out.tokens, whole.tokens)
    full, tokens = total(out, "full")
    assert full == total(whole, "full")[0] == 12 and tokens < 0.8 * total(whole, "full")[1]
    assert len({kind for kind in out.counts.kinds if kind.name == "full"}) <= 6


# Refreshing in part


@pytest.mark.slow
def test_renewing_everything_is_a_full_pass():
    dream, (start, valid) = model("tiny_a"), prompt(4, 9)
    every = WindowCache(left=2, right=None)
    wanted = generate(dream, start, with_cache(every), prompt_mask=valid)
    part = dataclasses.replace(every, refresh_blocks=None, renew_left=40)
    found = generate(dream, start, with_cache(part), prompt_mask=valid)
    check_equal(found, wanted)
    assert total(found, "full")[0] == 1 and total(found, "renewal")[0] == total(wanted, "full")[0] - 1


@pytest.mark.slow
def test_the_blocks_just_written_are_renewed():
    dream, (start, _) = model("tiny_a"), prompt(8)
    stale = WindowCache(refresh_blocks=3)
    renewed = dataclasses.replace(stale, renew_left=4)
    before, after = (generate(dream, start, with_cache(cache)) for cache in (stale, renewed))
    assert not np.array_equal(before.tokens, after.tokens)
    assert total(after, "full")[0] == 2 and total(after, "renewal") == (4, 4 * 8)


# Refreshing by drift


@pytest.mark.slow
def test_refreshing_by_drift():
    dream, (start, valid) = model("tiny_a"), prompt(5, 9)
    made = {}
    for bound in (1e-30, 12.0, 1e30):
        out = generate(dream, start, with_cache(WindowCache(refresh_drift=bound)), prompt_mask=valid)
        made[bound] = total(out, "full")[0]
        if bound == 1e-30:  # no token is certain
            check_equal(out, generate(dream, start, with_cache(WindowCache()), prompt_mask=valid))
        if bound == 1e30:
            never = WindowCache(refresh_blocks=None)
            check_equal(out, generate(dream, start, with_cache(never), prompt_mask=valid))
    assert made[1e-30] == 6 > made[12.0] > made[1e30] == 1


# A threshold that falls


def test_a_threshold_falls_while_a_block_is_filled():
    """Every token has a probability of .8. In a block of 4 with 4 masks the threshold is .9, and with 3 it is .7875."""
    dream, (start, valid) = model("tiny_a"), prompt(5, 9)

    def certain(moment, positions, logits):
        rest = jnp.log(0.2 / (logits.shape[-1] - 1))
        return jnp.broadcast_to(jnp.where(jnp.arange(logits.shape[-1]) == 7, jnp.log(0.8), rest), logits.shape)

    config = dataclasses.replace(CONFIG, max_new_tokens=8, commit=Threshold(0.9, fall=0.5), logits_hook=certain)
    out = generate(dream, start, config, prompt_mask=valid)
    # The first token alone, and then all others of the block.
    assert np.asarray(out.commit_step)[:, 9:].tolist() == [[0, 1, 1, 1, 2, 3, 3, 3]] * 2
    assert (
        repr(Threshold(0.9)) == "Threshold(tau=0.9)"
        and repr(Threshold(0.9, fall=0.5)) == "Threshold(tau=0.9, fall=0.5)"
    )
    with pytest.raises(ValueError, match="fall=2.0 is outside"):
        Threshold(0.9, fall=2.0)


# All of them


@pytest.mark.parametrize("streamed", [False, slow(True)])
def test_rows_do_not_depend_on_the_batch(streamed):
    dream, (start, valid) = model("tiny_b"), prompt(4, 8, 6)
    config = with_cache(dataclasses.replace(LESS, refresh_drift=3.0), temperature=0.7)
    keys = jax.random.split(jax.random.key(7), 3)
    if streamed:
        asked = [row[mask].tolist() for row, mask in zip(start, valid, strict=True)]
        answers = {one.prompt: one for one in Stream(dream, asked, config, keys, batch_size=2)}
        found = [(answers[row].tokens, answers[row].commit_step, answers[row].passes) for row in range(3)]
    else:
        out = generate(dream, start, config, keys, valid)
        found = [(out.tokens[row], out.commit_step[row], int(out.passes[row])) for row in range(3)]
    kinds = set()
    for row, (tokens, steps, made) in enumerate(found):
        alone = generate(dream, start[row : row + 1, valid[row].argmax() :], config, keys[row : row + 1])
        width = alone.tokens.shape[1]
        np.testing.assert_array_equal(tokens[-width:], alone.tokens[0])
        np.testing.assert_array_equal(steps[-width:], alone.commit_step[0])
        assert made == int(alone.passes[0])
        kinds |= {kind.name for kind in alone.counts.of_row(0)}
    assert kinds == {"full", "renewal", "window"}


@pytest.mark.slow
def test_groups_guidance_and_a_mesh(monkeypatch):
    """One row a group gives the same answers; guidance gives a row and its copy the same tokens to see."""
    cache = dataclasses.replace(LESS, refresh_passes=None)
    config = with_cache(cache, guidance=0.5, commit=Threshold(1.0), max_new_tokens=16)
    start, valid = prompt(4, 8, 6, 5)
    wanted = generate(model("tiny_a"), start, config, prompt_mask=valid)
    assert {kind.name for kind in wanted.counts.of_row(0)} == {"full", "renewal", "window"}
    for module, name in ((passes, "REFRESH_TOKENS"), (window_passes, "RENEWAL_TOKENS")):
        monkeypatch.setattr(module, name, 1)
    loop.denoise.clear_cache()
    spread = load(GOLDEN / "tiny_a" / "hf", mesh="2x2")
    for dream in (model("tiny_a"), spread):
        found = generate(dream, start, config, prompt_mask=valid)
        check_equal(found, wanted)
        assert int(found.forwards) > int(wanted.forwards)
    loop.denoise.clear_cache()


def test_settings_that_are_switched_off_are_not_in_the_repr():
    """Files of answers hold the repr of their settings; those of earlier versions can be resumed."""
    assert repr(WindowCache()) == "WindowCache(left=1, right=0, refresh_blocks=1, refresh_passes=None)"
    assert repr(LESS).endswith("refresh_passes=4, suffix=5, renew_left=6)")
    assert repr(WindowCache(refresh_drift=0.5)).endswith("refresh_passes=None, refresh_drift=0.5)")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"suffix": -1}, "suffix=-1 must not be negative; pass None for all tokens"),
        ({"renew_left": 0}, "renew_left=0 must be at least 1"),
        ({"left": 3, "renew_left": 2}, "self.renew_left=2 must be at least self.left=3"),
        ({"refresh_drift": -0.5}, "refresh_drift=-0.5 must not be negative"),
        ({"refresh_drift": 0.5, "refresh_blocks": None}, "self.refresh_drift=0.5 has no effect with .*blocks=None"),
        ({"renew_left": 4}, "self.renew_left=4 has no effect with self.refresh_blocks=1"),
        ({"refresh_drift": 0.5, "refresh_passes": 1}, "refresh_drift=0.5 have no effect with self.refresh_passes=1"),
    ],
    ids=[
        "suffix",
        "renew_left",
        "left",
        "refresh_drift",
        "drift without refreshes",
        "renewal without need",
        "all full",
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        WindowCache(**options)
