"""A loss or gradient that is no number costs its step and nothing else: weights, moments and schedule stay as they are."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marking import slow

from dream_jax import sharding, train_step
from dream_jax.batch import Batch
from dream_jax.config import PRESETS
from dream_jax.model import abstract_model, merge_params, split_params
from dream_jax.objective import draw_noise
from dream_jax.optimizer import OptimizerConfig, state_bytes, update_if, updates_done
from dream_jax.train_step import (
    NLL_BY_TIME,
    StepConfig,
    abstract_state,
    init_state,
    make_train_step,
    noise_key,
    put_batch,
)

ROWS, LENGTH = 8, 16
SMALL = dataclasses.replace(PRESETS["nano"], num_hidden_layers=2, hidden_size=64, intermediate_size=96)
GRAPHDEF, SHAPES = split_params(abstract_model(SMALL))
# A token whose embedding is NaN: a batch that shows it to the model has a loss that is no number, others never read it.
POISON = 255

OPTIMIZERS = {
    "adamw": {},
    "bfloat16": {"moments": "bfloat16"},
    "int8": {"moments": "int8"},
    "host": {"moments_on_host": True},
    "adafactor": {"kind": "adafactor"},
    "unclipped": {"clip_norm": None},
}


def config(**options):
    return OptimizerConfig(learning_rate=1e-2, total_steps=10, warmup_share=0.5, weight_decay=0.1, **options)


@functools.cache
def step(mesh, name, accumulation=1):
    optimizer = config(**OPTIMIZERS[name])
    made = StepConfig(global_batch=ROWS, accumulation=accumulation)
    return make_train_step(GRAPHDEF, optimizer.make(), optimizer.schedule(), made, sharding.make_mesh(mesh))


def first_state(mesh, name):
    rng = np.random.default_rng(0)
    draw = lambda path, leaf: rng.normal(path[-1].key == "scale", 0.05, leaf.shape).astype(np.float32)
    params = jax.tree_util.tree_map_with_path(draw, SHAPES)
    params["embed"]["embedding"][POISON] = np.nan
    return init_state(params, config(**OPTIMIZERS[name]).make(), sharding.make_mesh(mesh))


def batch(number, mesh, poisoned):
    tokens = np.random.default_rng(number).integers(0, 200, (ROWS, LENGTH)).astype(np.int32)
    if poisoned:
        tokens[3, 0] = POISON  # in a prompt, where it is always seen
    maskable = np.broadcast_to(np.arange(LENGTH) >= 4, tokens.shape)
    rows = Batch(tokens_BT=tokens, maskable_BT=maskable, row_B=np.arange(ROWS, dtype=np.int32))
    return put_batch(rows, sharding.make_mesh(mesh))


def copied(tree):
    return jax.tree.map(np.asarray, tree)


@pytest.mark.parametrize(
    ("mesh", "name", "accumulation"),
    [("1x1", "adamw", 1), ("1x1", "adafactor", 1), slow("4x2", "int8", 2)]
    + [slow("1x1", name, 1) for name in ("bfloat16", "int8", "host", "unclipped")]
    + [slow("8x1", "adamw", 1), slow("2x2x2", "adamw", 1), slow("2x4", "adafactor", 1)],
)
def test_a_poisoned_step_changes_nothing_but_the_step_number(mesh, name, accumulation):
    run, state = step(mesh, name, accumulation), first_state(mesh, name)
    state, metrics = run(state, batch(0, mesh, poisoned=False))
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])
    before, rate = copied((state.params, state.opt_state)), []
    for number in (1, 2):
        state, metrics = run(state, batch(number, mesh, poisoned=True))
        assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss"] + metrics["grad_norm"])
        assert int(state.step) == number + 1
        rate.append(float(metrics["learning_rate"]))
        jax.tree.map(np.testing.assert_array_equal, copied((state.params, state.opt_state)), before)
    # And goes on as if the poisoned batches had never been: the schedule has seen one update.
    state, metrics = run(state, batch(3, mesh, poisoned=False))
    assert metrics["skipped"] == 0 and np.isfinite(metrics["loss"])
    assert rate == [float(metrics["learning_rate"])] * 2
    assert float(metrics["learning_rate"]) == pytest.approx(float(config().schedule()(1)))
    assert int(updates_done(state.opt_state)) == 2
    moved = jax.tree.map(lambda new, old: not np.array_equal(new, old), copied(state.params), before[0])
    assert all(jax.tree.leaves(moved))
    finite = jax.tree.map(lambda leaf: np.isfinite(leaf.astype(np.float32)).all(), copied(state.opt_state))
    assert all(jax.tree.leaves(finite))


def test_after_a_skip_the_update_is_the_one_it_would_have_been():
    """The same batch and noise with and without two skipped steps before: the same weights, bit for bit."""
    run = step("1x1", "adamw")
    state = first_state("1x1", "adamw")
    for number in (0, 1):
        state, _ = run(state, batch(number, "1x1", poisoned=True))
    skipped, metrics = run(state, batch(2, "1x1", poisoned=False))
    fresh = dataclasses.replace(first_state("1x1", "adamw"), step=jnp.int32(2))  # the noise is that of the step
    direct, wanted = run(fresh, batch(2, "1x1", poisoned=False))
    jax.tree.map(np.testing.assert_array_equal, copied(metrics), copied(wanted))
    jax.tree.map(np.testing.assert_array_equal, copied(skipped), copied(direct))


# Weights that outweigh what 128 tokens take.
WIDE = dataclasses.replace(SMALL, hidden_size=256, intermediate_size=1024)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "name"), [("1x1", "adamw"), slow("1x1", "int8"), slow("8x1", "adamw"), slow("8x1", "bfloat16")]
)
@pytest.mark.optimised
def test_the_choice_takes_no_memory(monkeypatch, mesh, name):
    """Old and new arrays are chosen between while they are written, never held side by side."""
    graphdef, shapes = split_params(abstract_model(WIDE))
    devices, optimizer = sharding.make_mesh(mesh), config(**OPTIMIZERS[name])

    def temporaries(update):
        monkeypatch.setattr(train_step, "update_if", update)
        made = make_train_step(graphdef, optimizer.make(), optimizer.schedule(), StepConfig(global_batch=ROWS), devices)
        state = abstract_state(shapes, optimizer.make(), devices)
        return made.lower(state, batch(0, mesh, poisoned=False)).compile().memory_analysis().temp_size_in_bytes

    def unguarded(usable, optimizer, gradients, opt_state, params):
        updates, after = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), after

    def side_by_side(*arguments):
        old, new = jax.lax.optimization_barrier((arguments[:2:-1], unguarded(*arguments)))
        return jax.tree.map(lambda new, old: jnp.where(arguments[0], new, old), new, old)

    weights = state_bytes(shapes) / devices.size
    plain = temporaries(unguarded)
    assert temporaries(update_if) - plain < 0.05 * weights
    if (mesh, name) == ("1x1", "adamw"):  # what it would look like
        assert temporaries(side_by_side) - plain > 0.3 * weights


def test_losses_by_noise_level_and_at_the_end_token():
    """By hand from all logits: the four are means over disjoint rows, and two kinds of tokens are masked."""
    tokens = np.full((ROWS, LENGTH), SMALL.pad_token_id, np.int32)
    tokens[:, :8] = 65
    maskable = np.broadcast_to(np.arange(LENGTH) >= 4, tokens.shape)
    data = Batch(tokens_BT=tokens, maskable_BT=maskable, row_B=np.arange(ROWS, dtype=np.int32))
    state = first_state("1x1", "adamw")
    t, masked = draw_noise(noise_key(0, 0), jnp.asarray(data.row_B), jnp.asarray(maskable), ROWS)
    hidden = np.where(masked, SMALL.mask_token_id, tokens)
    logits = np.asarray(merge_params(GRAPHDEF, state.params)(hidden), np.float64)
    logits = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)  # position i is predicted at i - 1
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    metrics = copied(step("1x1", "adamw")(state, put_batch(data, sharding.make_mesh("1x1")))[1])
    assert NLL_BY_TIME == ("nll_t_0_25", "nll_t_25_50", "nll_t_50_75", "nll_t_75_100")
    for quarter, name in enumerate(NLL_BY_TIME):
        inside = masked & (np.floor(4 * t) == quarter)[:, None]
        assert inside.any()
        np.testing.assert_allclose(metrics[name], nll[inside].mean(), rtol=1e-5)
    ends = masked & (tokens == SMALL.pad_token_id)
    assert 0 < ends.sum() < masked.sum()
    assert metrics["eos_accuracy"] == pytest.approx((logits.argmax(-1) == tokens)[ends].mean())
