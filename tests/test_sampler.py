"""The sampler takes the published trajectories, token for token, whatever the batch, the padding and the mesh."""

import dataclasses
import functools
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import CHECKPOINTS, GOLDEN, arrays, facts, model
from marking import slow

from dream_jax import masks, schedule
from dream_jax.config import PRESETS
from dream_jax.model import abstract_model, merge_params, padded_positions, split_params
from dream_jax.pretrained import load
from dream_jax.sampler import (
    SamplerConfig,
    WindowCache,
    bucket_length,
    callbacks,
    generate,
    loop,
    passes,
    propose,
    state,
)

BLOCKS = SamplerConfig(
    max_new_tokens=10, steps=6, alg="entropy", temperature=0.7, block_length=4, cache=WindowCache(refresh_passes=2)
)
CASES = [f"s{number}" for number in range(15)]
RANDOM = [
    SamplerConfig(max_new_tokens=10, steps=6, alg="origin"),
    SamplerConfig(max_new_tokens=10, steps=6, alg="entropy", temperature=0.7, top_p=0.95),
    SamplerConfig(max_new_tokens=10, steps=6, alg="maskgit_plus", temperature=0.7, top_k=20, alg_temp=0.3),
    SamplerConfig(max_new_tokens=10, steps=6, alg="topk_margin", alg_temp=0.5),
]


def config_of(case):
    names = {field.name for field in dataclasses.fields(SamplerConfig)}
    return SamplerConfig(**{name: value for name, value in case.items() if name in names})


def case_of(checkpoint, name):
    return next(case for case in facts(checkpoint)["sample_cases"] if case["id"] == name)


def prompt(*lengths, seed=0):
    """Rows of these lengths, padded on the left, and their mask. Ids below 100: no special token of either model."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    valid = np.arange(longest) >= longest - np.array(lengths)[:, None]
    return np.where(valid, rng.integers(0, 100, valid.shape), 121).astype(np.int32), valid


def counts(masked, config):
    """Tokens that each step writes."""
    fractions, found = jnp.asarray(schedule.write_fractions(config.steps, config.eps)), []
    table = np.asarray(schedule.write_counts(jnp.arange(masked + 1), fractions))
    for step in range(config.steps):
        found.append(int(table[masked, step]))
        masked -= found[-1]
    return np.array(found)


# Published trajectories


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("form", ["stacked", slow("apart")])
@pytest.mark.optimised
def test_published_trajectory(form, checkpoint, name):
    golden, case = arrays(checkpoint), case_of(checkpoint, name)
    config = config_of(case)
    assert {"id", "prompt_lens"} | {f.name for f in dataclasses.fields(config)} >= set(case)  # none is left out
    dream, start, valid = model(checkpoint, form), golden[f"{name}_prompt"], golden[f"{name}_mask"]
    out = generate(dream, start, config, prompt_mask=valid)
    valid_BT = np.concatenate([valid.astype(bool), np.ones((len(start), config.max_new_tokens), bool)], axis=1)
    np.testing.assert_array_equal(out.tokens[valid_BT], golden[f"{name}_sequences"][valid_BT])
    assert out.tokens.dtype == out.commit_step.dtype == jnp.int32
    history = golden[f"{name}_history"]
    assert len(history) == config.steps
    for step, canvas in enumerate(history):
        np.testing.assert_array_equal(out.canvas_at(step)[valid_BT], canvas[valid_BT], err_msg=f"step {step}")
    mask = dream.config.mask_token_id
    before = np.pad(start, ((0, 0), (0, config.max_new_tokens)), constant_values=mask)
    np.testing.assert_array_equal(out.canvas_at(-1)[valid_BT], before[valid_BT])
    assert np.all(np.asarray(out.commit_step)[:, : start.shape[1]] == -1)
    # One forward pass for each step that writes.
    previous = np.concatenate([before[None], history[:-1]])
    assert int(out.forwards) == sum(np.any((a != b)[valid_BT]) for a, b in zip(previous, history, strict=True))


@pytest.mark.optimised
def test_skipped_steps():
    golden = arrays("tiny_a")
    for name, forwards in [("s4", 15), ("s11", 1), ("s12", 8)]:  # steps = length; 1 step; 32 steps for 8 tokens
        case = case_of("tiny_a", name)
        out = generate(model("tiny_a"), golden[f"{name}_prompt"], config_of(case))
        wanted = counts(case["max_new_tokens"], config_of(case))
        assert int(out.forwards) == np.sum(wanted > 0) <= forwards
        np.testing.assert_array_equal(
            np.bincount(out.commit_step[0, -case["max_new_tokens"] :], minlength=len(wanted)), wanted
        )
    assert int(generate(model("tiny_a"), golden["s4_prompt"], config_of(case_of("tiny_a", "s4"))).forwards) == 15


# The loop


@pytest.mark.parametrize("config", [*map(slow, RANDOM), BLOCKS], ids=lambda config: config.alg)
@pytest.mark.optimised
def test_driver_is_a_python_loop_over_the_step(config):
    dream, (start, valid) = model("tiny_a"), prompt(5, 8)
    mask_id = dream.config.mask_token_id
    canvas = np.concatenate([np.where(valid, start, dream.config.pad_token_id), np.full((2, 10), mask_id)], axis=1)
    canvas[0, 4] = mask_id  # and an infilling
    valid_BT = np.concatenate([valid, np.ones((2, 10), bool)], axis=1)
    keys, positions = jax.random.split(jax.random.key(3), 2), padded_positions(jnp.asarray(valid_BT))
    masked_B = [11, 10]
    static = state.StaticSettings.of(config, 12, masked_B)
    dynamic = state.DynamicSettings.of(config, static.steps, masked_B)
    canvas = jnp.asarray(canvas, jnp.int32)
    wanted = loop.denoise(dream, canvas, valid_BT, keys, dynamic, None, static=static)

    layout = passes.CanvasLayout(jnp.asarray(valid_BT), positions, masks.KeyPadding(jnp.asarray(valid_BT)))
    step = jax.jit(functools.partial(loop.step, static=static))
    carry = state.begin(dream, canvas, static)
    while np.any(state.active(carry)):
        carry = step(dream, layout, keys, dynamic, None, carry)
    for name, found, value in zip(carry._fields, carry, wanted, strict=True):
        if name != "kv_cache":
            np.testing.assert_array_equal(found, value, err_msg=name)
    assert not np.any(carry.canvas_BT == mask_id)


@pytest.mark.slow
def test_logits_in_chunks(monkeypatch):
    dream, (start, valid) = model("tiny_a"), prompt(5, 8)
    for config in (RANDOM[1], dataclasses.replace(RANDOM[1], temperature=0.0)):
        whole = generate(dream, start, config, jax.random.key(0), valid)
        monkeypatch.setattr(propose, "_LOGIT_ELEMENTS", 2 * 128 * 3)  # 3 of the 10 positions of both rows
        loop.denoise.clear_cache()
        chunked = generate(dream, start, config, jax.random.key(0), valid)
        monkeypatch.undo()
        loop.denoise.clear_cache()
        np.testing.assert_array_equal(chunked.tokens, whole.tokens)
        np.testing.assert_array_equal(chunked.commit_step, whole.commit_step)


@pytest.mark.slow
@pytest.mark.optimised
def test_all_logits_never_exist():
    """Compiled for B=4, T=1024, V=152,064: no array has as many elements, and all temporary memory is less than theirs."""
    config = dataclasses.replace(PRESETS["nano"], vocab_size=152_064, mask_token_id=151_666, pad_token_id=151_643)
    dream = abstract_model(config)
    options = SamplerConfig(max_new_tokens=768, steps=768, alg="entropy", temperature=0.2, top_p=0.95)
    window = dataclasses.replace(options, block_length=32, cache=WindowCache())
    all_logits = 4 * 1024 * 152_064
    for one in (options, window):
        shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 4))
        canvas, valid_BT = shape(jnp.int32, 4, 1024), shape(jnp.bool, 4, 1024)
        static = state.StaticSettings.of(one, 768, [768] * 4)
        dynamic = state.DynamicSettings.of(one, static.steps, [768] * 4)
        compiled = loop.denoise.lower(dream, canvas, valid_BT, keys, dynamic, None, static=static).compile()
        sizes = [
            np.prod([int(size) for size in match.split(",")], dtype=np.int64)
            for match in set(re.findall(r"\b(?:pred|[a-z]+[0-9]+)\[([0-9,]+)\]", compiled.as_text()))
        ]
        assert 152_064 * 128 <= max(sizes) < all_logits / 8  # the embedding is there, and a block of logits
        assert compiled.memory_analysis().temp_size_in_bytes < 4 * all_logits / 2


@pytest.mark.slow
@pytest.mark.optimised
def test_one_row_pays_only_for_what_it_needs():
    """XLA moves the body of a loop that sees the same rows each time out of it, where it runs in every step."""
    config = dataclasses.replace(PRESETS["nano"], vocab_size=20_000)
    options = SamplerConfig(max_new_tokens=64, steps=64, alg="entropy", block_length=32, cache=WindowCache())
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    static = state.StaticSettings.of(options, 32, [64])
    dynamic = state.DynamicSettings.of(options, static.steps, [64])
    arrays = abstract_model(config), shape(jnp.int32, 1, 128), shape(jnp.bool, 1, 128), keys, dynamic, None
    found = set(
        re.findall(r'op_name="jit\(denoise\)/([^"]*)"', loop.denoise.lower(*arrays, static=static).compile().as_text())
    )
    full = {name for name in found if "layers/while" in name}
    assert full and all(re.match(r"while/body/cond/branch_1_fun/", name) for name in full)
    logits = {name for name in found if "unembed" in name}
    assert logits and all(re.match(r"while/body/propose/cond/branch_[1-9][0-9]*_fun/", name) for name in logits)


# Randomness


@pytest.mark.slow
@pytest.mark.parametrize("config", RANDOM, ids=lambda config: config.alg)
def test_key_decides(config):
    dream, (start, _) = model("tiny_a"), prompt(6)
    one, again, other = (generate(dream, start, config, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.tokens, again.tokens)
    np.testing.assert_array_equal(one.commit_step, again.commit_step)
    assert not np.array_equal(one.commit_step, other.commit_step) or not np.array_equal(one.tokens, other.tokens)
    old = generate(dream, start, config, jax.random.PRNGKey(1))  # the old kind of key means the same
    np.testing.assert_array_equal(old.tokens, one.tokens)
    assert not np.any(np.asarray(one.canvas_at(config.steps - 1)) == dream.config.mask_token_id)


@pytest.mark.slow
def test_key_is_asked_for_only_when_something_is_random():
    dream, (start, _) = model("tiny_a"), prompt(6)
    for config in RANDOM:
        assert config.is_random
        with pytest.raises(ValueError, match=r"pass key=jax.random.key\(0\)"):
            generate(dream, start, config)
    for config in (
        SamplerConfig(max_new_tokens=4, steps=2, alg="entropy", top_p=0.9),
        SamplerConfig(max_new_tokens=4, steps=2, alg="entropy", alg_temp=0.0),
        SamplerConfig(max_new_tokens=4, steps=1),  # origin, all at once
    ):
        assert not config.is_random
        generate(dream, start, config)
    assert SamplerConfig().is_random


@pytest.mark.parametrize(
    "config", [SamplerConfig(max_new_tokens=10, steps=6, alg="entropy"), RANDOM[0], *map(slow, RANDOM[1:])], ids=str
)
@pytest.mark.optimised
def test_rows_do_not_depend_on_the_batch(config):
    """Left-padded beside longer rows, or alone without padding: the same tokens, at the same steps."""
    dream, (start, valid) = model("tiny_b"), prompt(4, 9, 6, 1)
    keys = jax.random.split(jax.random.key(7), 4)
    together = generate(dream, start, config, keys, valid)
    for row in range(4):
        alone = generate(dream, start[row : row + 1, valid[row].argmax() :], config, keys[row : row + 1])
        width = alone.tokens.shape[1]
        np.testing.assert_array_equal(together.tokens[row, -width:], alone.tokens[0])
        np.testing.assert_array_equal(together.commit_step[row, -width:], alone.commit_step[0])


def test_one_key_gives_each_row_its_own():
    dream, (start, _) = model("tiny_a"), prompt(6)
    twice = np.repeat(start, 2, axis=0)
    key = jax.random.key(5)
    out = generate(dream, twice, RANDOM[1], key)
    assert not np.array_equal(out.tokens[0], out.tokens[1])
    rows = jnp.stack([jax.random.fold_in(key, row) for row in range(2)])
    np.testing.assert_array_equal(out.tokens, generate(dream, twice, RANDOM[1], rows).tokens)


# Infilling


@pytest.mark.parametrize("new", [0, slow(7)])
@pytest.mark.parametrize(
    "config",
    [
        SamplerConfig(steps=5, alg="entropy"),
        SamplerConfig(steps=5, alg="maskgit_plus", temperature=0.9),
        SamplerConfig(steps=5),
    ],
    ids=lambda config: config.alg,
)
def test_infilling_with_unequal_rows(config, new):
    """The published code takes the batch's mean count, and overwrites prompts of rows that have fewer masks."""
    dream, (start, valid) = model("tiny_a"), prompt(12, 12, 10)
    mask, config = dream.config.mask_token_id, dataclasses.replace(config, max_new_tokens=new)
    start[0, 2:11], start[1, 5], start[2, [4, 9]] = mask, mask, mask
    out = generate(dream, start, config, jax.random.key(0), valid)
    valid_BT = np.pad(valid, ((0, 0), (0, new)), constant_values=True)
    before = np.pad(start, ((0, 0), (0, new)), constant_values=mask)
    given = valid_BT & (before != mask)
    np.testing.assert_array_equal(out.tokens[given], before[given])
    np.testing.assert_array_equal(out.commit_step[given], -1)
    open_positions = valid_BT & (before == mask)
    assert np.all(np.asarray(out.commit_step)[open_positions] >= 0)
    assert np.all(np.asarray(out.commit_step)[open_positions] < config.steps)
    if config.alg == "origin":
        return
    for row in range(3):
        written = np.bincount(out.commit_step[row][open_positions[row]], minlength=config.steps)
        np.testing.assert_array_equal(written, counts(open_positions[row].sum(), config))


def test_nothing_to_write_costs_nothing():
    start, _ = prompt(6, 6)
    out = generate(model("tiny_a"), start, SamplerConfig(max_new_tokens=0, steps=4, alg="entropy"))
    np.testing.assert_array_equal(out.tokens, start)
    assert int(out.forwards) == 0
    assert np.all(out.commit_step == -1)


def test_first_position_can_be_written():
    """It has no predecessor; the published shift lets it predict itself."""
    dream, (start, _) = model("tiny_a"), prompt(6)
    start[0, 0] = dream.config.mask_token_id
    out = generate(dream, start, SamplerConfig(max_new_tokens=0, steps=1, alg="entropy"))
    assert int(out.tokens[0, 0]) == int(jnp.argmax(dream(start)[0, 0]))
    empty = generate(dream, np.zeros((2, 0), np.int32), SamplerConfig(max_new_tokens=5, steps=2, alg="entropy"))
    assert empty.tokens.shape == (2, 5)
    np.testing.assert_array_equal(empty.tokens[0], empty.tokens[1])


def test_what_padding_holds_does_not_matter():
    dream, (start, valid) = model("tiny_a"), prompt(3, 9)
    config = SamplerConfig(max_new_tokens=6, steps=6, alg="entropy")
    out = generate(dream, start, config, prompt_mask=valid)
    for filling in (0, dream.config.mask_token_id, -1):
        other = generate(dream, np.where(valid, start, filling), config, prompt_mask=valid.astype(np.int32))
        np.testing.assert_array_equal(other.tokens[:, 9:], out.tokens[:, 9:])
        np.testing.assert_array_equal(other.commit_step, out.commit_step)


# What may be written


@pytest.mark.parametrize("alg", [slow("origin"), "entropy"])
def test_forbidden_tokens_are_never_written(alg):
    dream, (start, _) = model("tiny_a"), prompt(5, 5, 5, 5)
    forbidden = (120, *range(0, 90, 3))
    limited = SamplerConfig(
        max_new_tokens=40, steps=4, alg=alg, temperature=50.0, vocab_limit=90, forbidden_tokens=forbidden
    )
    written = np.asarray(generate(dream, start, limited, jax.random.key(0)).tokens)[:, 5:]
    assert set(written.ravel().tolist()) <= set(range(90)) - set(forbidden)
    assert len(set(written.ravel().tolist())) > 40  # nearly flat: almost all the others occur
    free = dataclasses.replace(limited, vocab_limit=None, forbidden_tokens=())
    everything = np.asarray(generate(dream, start, free, jax.random.key(0)).tokens)[:, 5:]
    assert np.any(everything >= 90) and np.any(everything % 3 == 0)
    # The limit alone, and at temperature 0: the best of the others.
    greedy = SamplerConfig(max_new_tokens=8, steps=1, alg="entropy", vocab_limit=60)
    logits = np.asarray(dream(np.pad(start, ((0, 0), (0, 8)), constant_values=120)))[:, 4:-1, :60]
    np.testing.assert_array_equal(generate(dream, start, greedy).tokens[:, 5:], logits.argmax(-1))


@pytest.mark.slow
def test_filters_have_an_effect():
    dream, (start, _) = model("tiny_a"), prompt(6)
    base = SamplerConfig(max_new_tokens=12, steps=12, alg="entropy", temperature=2.0)
    key = jax.random.key(0)
    plain = generate(dream, start, base, key).tokens
    for change in ({"top_k": 3}, {"top_p": 0.5}, {"alg_temp": 2.0}, {"eps": 0.5}):
        other = generate(dream, start, dataclasses.replace(base, **change), key).tokens
        assert not np.array_equal(other, plain), change
    # One token kept is the most probable one, at any temperature. The order may be another: all are certain.
    one_step = {"max_new_tokens": 8, "steps": 1, "alg": "maskgit_plus"}
    greedy = generate(dream, start, SamplerConfig(**one_step)).tokens
    hot = generate(dream, start, SamplerConfig(temperature=5.0, top_k=1, **one_step), key).tokens
    np.testing.assert_array_equal(hot, greedy)


@pytest.mark.slow
def test_alg_temp_softens_the_order():
    """A small one keeps the strict order, a large one draws positions almost evenly."""
    dream, (start, _) = model("tiny_a"), prompt(6)
    config = SamplerConfig(max_new_tokens=12, steps=12, alg="maskgit_plus")
    strict = generate(dream, start, config)
    many = np.repeat(start, 200, axis=0)
    first = lambda out: np.argmax(np.asarray(out.commit_step)[:, 6:] == 1, axis=1)
    hard = generate(dream, many, dataclasses.replace(config, alg_temp=1e-6), jax.random.key(0))
    assert np.all(first(hard) == first(strict)[0])
    soft = first(generate(dream, many, dataclasses.replace(config, alg_temp=1e3), jax.random.key(0)))
    found = np.bincount(soft, minlength=12)
    assert np.sum((found - 200 / 12) ** 2 / (200 / 12)) < 40  # chi-square, 11 degrees of freedom


def test_origin_writes_at_the_rate_of_the_schedule():
    dream, (start, _) = model("tiny_a"), prompt(6)
    config = SamplerConfig(max_new_tokens=16, steps=5)
    steps = np.asarray(generate(dream, np.repeat(start, 100, axis=0), config, jax.random.key(0)).commit_step)[:, 6:]
    found = np.bincount(steps.ravel(), minlength=5) / steps.size
    np.testing.assert_allclose(found, -np.diff(schedule.timesteps(5)), atol=0.05)


# Compilation, watching, meshes


def compilations(run):
    """How many programs XLA compiles while `run` runs."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        run()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return len(seen)


@pytest.mark.slow
def test_lengths_of_one_bucket_share_programs():
    dream = model("tiny_a")
    config = SamplerConfig(max_new_tokens=9, steps=3, alg="entropy", eps=0.011)
    run = lambda length: generate(dream, prompt(length)[0], config)
    other = dataclasses.replace(config, alg="maskgit_plus")
    for length in (9, 10, 11, 12):  # compiles another loop, and what cuts off the padding of each length
        generate(dream, prompt(length)[0], other)
    before = loop.denoise._cache_size()
    assert compilations(lambda: run(10)) > 0
    assert loop.denoise._cache_size() == before + 1
    assert compilations(lambda: run(10)) == 0
    assert compilations(lambda: [run(length) for length in (9, 12, 11)]) == 0  # other lengths have the same loop
    assert loop.denoise._cache_size() == before + 1
    assert compilations(lambda: [run(length) for length in (9, 10, 11, 12)]) == 0
    run(13)
    assert loop.denoise._cache_size() == before + 2


def test_buckets():
    found = [bucket_length(length) for length in range(200)]
    assert found[:26] == [0] + [8] * 8 + [12] * 4 + [16] * 4 + [24] * 8 + [32]
    assert all(length <= bucket <= max(8, 1.5 * length) for length, bucket in enumerate(found) if length)
    assert found == sorted(found)
    assert len(set(found)) == 12  # 0, 8, 12, 16, 24, ... 192, 256


@pytest.mark.slow
@pytest.mark.parametrize("config", [RANDOM[0], SamplerConfig(max_new_tokens=10, steps=16, alg="entropy")], ids=str)
def test_watching(config):
    dream, (start, valid) = model("tiny_a"), prompt(4, 7)
    seen = []
    arguments = (dream, start, config, jax.random.key(0), valid)
    out = generate(*arguments, on_step=lambda step, canvas: seen.append((step, canvas.copy())))
    quiet = generate(*arguments)
    np.testing.assert_array_equal(out.tokens, quiet.tokens)
    np.testing.assert_array_equal(out.commit_step, quiet.commit_step)
    valid_BT = np.pad(valid, ((0, 0), (0, 10)), constant_values=True)
    for step, canvas in seen:
        assert canvas.shape == out.tokens.shape
        np.testing.assert_array_equal(canvas[valid_BT], out.canvas_at(step)[valid_BT])
    # Every step that wrote something, once, in order.
    wrote = sorted(set(np.asarray(out.commit_step)[np.asarray(out.commit_step) >= 0].tolist()))
    assert [step for step, _ in seen] == wrote
    assert int(out.forwards) == len(wrote)


def test_watching_sees_no_step_that_wrote_nothing():
    config = SamplerConfig(max_new_tokens=3, steps=16, alg="origin")
    seen = []
    out = generate(model("tiny_a"), prompt(4)[0], config, jax.random.key(0), on_step=lambda step, _: seen.append(step))
    assert seen == sorted(set(np.asarray(out.commit_step)[0, 4:].tolist()))
    assert len(seen) == int(out.forwards) < 16


def test_watchers_at_the_same_time_see_their_own():
    dream, config = model("tiny_a"), SamplerConfig(max_new_tokens=6, steps=6, alg="entropy")

    def watch(token):
        seen = []
        for _ in range(5):
            generate(
                dream, np.full((1, 4), token), config, on_step=lambda _, canvas: seen.append(canvas[0, :4].tolist())
            )
        return seen

    with ThreadPoolExecutor(2) as pool:
        for token, seen in zip((5, 9), pool.map(watch, (5, 9)), strict=True):
            assert seen == [[token] * 4] * len(seen) and len(seen) == 25


def test_listener_is_forgotten_after_an_error():
    dream, (start, _) = model("tiny_a"), prompt(6)
    config = SamplerConfig(max_new_tokens=4, steps=2, alg="entropy")

    def listen(step, canvas):
        raise OSError("the terminal is gone")

    with pytest.raises(jax.errors.JaxRuntimeError, match="the terminal is gone"):
        generate(dream, start, config, on_step=listen)
    assert not callbacks._listeners
    seen = []
    generate(dream, start, config, on_step=lambda step, _: seen.append(step))
    assert len(seen) == 2 and not callbacks._listeners


def test_the_prompt_comes_back_as_it_was_given():
    dream, config = model("tiny_a"), SamplerConfig(max_new_tokens=2, steps=1, alg="entropy")
    given, valid = np.array([[7, 7, 3, 4], [1, 2, 3, 4]]), np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
    for options in (config, dataclasses.replace(config, max_new_tokens=0)):
        out = generate(dream, given, options, prompt_mask=valid)
        np.testing.assert_array_equal(out.tokens[:, :4], given)
        np.testing.assert_array_equal(out.canvas_at(-1)[:, :4], given)


def test_choosing_the_mask_token_is_writing_it():
    """As published: it then counts as masked again. The step is one of the run's, to the end."""
    graphdef, params = split_params(model("tiny_a"))
    mask = model("tiny_a").config.mask_token_id
    params["lm_head"]["kernel"] = jnp.zeros_like(params["lm_head"]["kernel"]).at[:, mask].set(1.0)
    params["norm"]["scale"] = jnp.zeros_like(params["norm"]["scale"])  # all logits 0: the first id, never the mask
    other = merge_params(graphdef, params)
    config = SamplerConfig(max_new_tokens=4, steps=3, alg="entropy", forbidden_tokens=range(mask))
    out = generate(other, prompt(4)[0], config)
    np.testing.assert_array_equal(out.tokens[0, 4:], [mask] * 4)
    assert set(np.asarray(out.commit_step)[0, 4:].tolist()) == {2}


def test_padding_takes_no_position():
    """What must fit the model's positions is the text, not the width of the batch."""
    longest = model("tiny_a").config.max_position_embeddings
    start = np.concatenate([np.zeros((1, longest), int), prompt(6)[0]], axis=1)
    valid = np.arange(start.shape[1])[None] >= longest
    config = SamplerConfig(max_new_tokens=4, steps=2, alg="entropy")
    alone = generate(model("tiny_a"), prompt(6)[0], config)
    padded = generate(model("tiny_a"), start, config, prompt_mask=valid)
    np.testing.assert_array_equal(padded.tokens[:, longest:], alone.tokens)


def test_nothing_to_write_needs_no_key():
    out = generate(model("tiny_a"), prompt(4)[0], SamplerConfig(max_new_tokens=0, temperature=0.5))
    np.testing.assert_array_equal(out.tokens, prompt(4)[0])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [slow("8x1"), slow("2x4"), "2x2x2"])
@pytest.mark.parametrize("checkpoint", [slow("tiny_a"), "tiny_b"])
def test_mesh_changes_nothing(checkpoint, mesh):
    spread = load(GOLDEN / checkpoint / "hf", mesh=mesh)
    assert len(jax.tree.leaves(spread)[0].sharding.device_set) == 8
    for lengths in ((4, 9, 6, 5, 9, 3, 7, 8), (5, 9, 2)):  # rows that the mesh divides, and rows that it does not
        start, valid = prompt(*lengths)
        config = SamplerConfig(max_new_tokens=8, steps=4, alg="entropy")
        wanted = generate(model(checkpoint), start, config, prompt_mask=valid)
        found = generate(spread, start, config, prompt_mask=valid)
        np.testing.assert_array_equal(found.tokens, wanted.tokens)
        np.testing.assert_array_equal(found.commit_step, wanted.commit_step)
        assert int(found.forwards) == int(wanted.forwards)


def test_sample_passes_through_jit():
    out = generate(model("tiny_a"), prompt(6)[0], SamplerConfig(max_new_tokens=4, steps=2, alg="entropy"))
    again = jax.jit(lambda sample: sample)(out)
    np.testing.assert_array_equal(again.canvas_at(0), out.canvas_at(0))


# Refusals


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"steps": 0}, "steps=0"),
        ({"alg": "random"}, "'random'"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, "top_p=0.0 is outside"),
        ({"top_p": 1.1}, "top_p=1.1 is outside"),
        ({"top_k": 0}, "top_k=0"),
        ({"alg_temp": -1.0}, "alg_temp=-1.0"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": 1.0}, "eps=1.0"),
        ({"vocab_limit": 0}, "vocab_limit=0"),
    ],
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**options)


GREEDY = {"max_new_tokens": 4, "steps": 2, "alg": "entropy"}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("start", "options", "arguments", "message"),
    [
        (np.zeros(4, np.int32), {}, {}, "integers of shape \\[batch, tokens\\]"),
        (np.zeros((1, 4), np.float32), {}, {}, "got float32"),
        (np.zeros((0, 4), np.int32), {}, {}, "no rows"),
        (np.zeros((1, 0), np.int32), {"max_new_tokens": 0}, {}, "the canvas is empty"),
        (prompt(4)[0], {}, {"prompt_mask": np.ones((1, 5), bool)}, "prompt_mask has shape"),
        (
            prompt(4, 4)[0],
            {},
            {"prompt_mask": np.array([[1, 1, 1, 1], [1, 1, 1, 0]])},
            "row 1 has padding after a valid",
        ),
        (prompt(4)[0], {}, {"prompt_mask": np.array([[0, 1, 0, 1]])}, "row 0 has padding after a valid"),
        (np.array([[3, 128]]), {}, {}, "3..128, outside 0..127"),
        (np.array([[-1, 5]]), {}, {}, "-1..5, outside 0..127"),
        (prompt(4)[0], {"max_new_tokens": 253}, {}, "257 tokens, more than"),
        (prompt(4, 4)[0], {}, {"key": jax.random.split(jax.random.key(0), 3)}, "got 3 keys for 2 rows"),
        (prompt(4)[0], {"forbidden_tokens": (128,)}, {}, "forbidden token 128 is outside"),
        (prompt(4)[0], {"temperature": 0.5}, {"key": 3}, "pass jax.random.key\\(3\\)"),
        (prompt(4)[0], {"vocab_limit": 2, "forbidden_tokens": (0, 1)}, {}, "leave no token"),
    ],
)
def test_generate_refuses(start, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(model("tiny_a"), start, SamplerConfig(**GREEDY | options), **arguments)
