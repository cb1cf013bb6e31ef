"""Small moments follow large ones, lie where their parameters lie, and come back from a checkpoint to the bit."""

import dataclasses
import functools
import importlib.util
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec
from marking import slow

from dream_jax import sharding
from dream_jax.batch import Batch
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.config import PRESETS
from dream_jax.model import abstract_model, split_params
from dream_jax.optimizer import OptimizerConfig, adam, shardings, state_bytes, update_if
from dream_jax.optimizer.codes import BLOCK, QuantisedMoment, dequantise, quantise, random_bits
from dream_jax.plan.hardware import find_hardware
from dream_jax.plan.traffic import bytes_read
from dream_jax.target import target_platform
from dream_jax.train_step import StepConfig, TrainState, abstract_state, init_state, make_train_step, put_batch
from dream_jax.trainer import TrainSettings, train

VARIANTS = {
    "float32": {},
    "bfloat16": {"moments": "bfloat16"},
    "int8": {"moments": "int8"},
    "adafactor": {"kind": "adafactor"},
}
SMALLER = ["bfloat16", "int8", "adafactor"]


def config(variant="float32", **changes):
    return OptimizerConfig(**{"learning_rate": 1e-3, "total_steps": 100} | VARIANTS[variant] | changes)


def update(transform):
    """The jitted update, as `train_step` calls it: optax mixes its integer counters with floats."""

    def run(gradients, state, params):
        with jax.numpy_dtype_promotion("standard"):
            return transform.update(gradients, state, params)

    return jax.jit(run)


def moments_of(state):
    return next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu"))


def nu_of(state):
    return moments_of(state).nu


def tree(rng, scale=1.0):
    shapes = {
        "norm": {"scale": (70,)},
        "lm_head": {"kernel": (24, 70)},
        "layers": {"mlp": {"up": {"kernel": (2, 9, 64)}}},
    }
    draw = lambda shape: jnp.asarray(rng.normal(0, scale, shape), jnp.float32)
    return jax.tree.map(draw, shapes, is_leaf=lambda leaf: isinstance(leaf, tuple))


# -------------------------------------------------------------------------------------------------- the transformation


@pytest.mark.optimised
def test_float32_is_adamw_of_optax_to_the_bit():
    ours = config(weight_decay=0.1, clip_norm=0.5, b1=0.8, b2=0.99, eps=1e-6)
    decayed = {"norm": {"scale": False}, "lm_head": {"kernel": True}, "layers": {"mlp": {"up": {"kernel": True}}}}
    adamw = optax.adamw(ours.schedule(), b1=0.8, b2=0.99, eps=1e-6, weight_decay=0.1, mask=decayed)
    theirs = optax.chain(optax.clip_by_global_norm(0.5), adamw)
    rng = np.random.default_rng(0)
    params = tree(rng)
    transforms = [ours.make(), theirs]
    states = [transform.init(params) for transform in transforms]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for _ in range(5):
        gradients, found = tree(rng), []
        for place, transform in enumerate(transforms):
            updates, states[place] = update(transform)(gradients, states[place], params)
            found.append(updates)
        jax.tree.map(np.testing.assert_array_equal, *found)
        jax.tree.map(np.testing.assert_array_equal, *states)
        params = optax.apply_updates(params, found[0])


def test_adafactor_is_that_of_optax_with_an_absolute_learning_rate_and_decay():
    transform = config("adafactor", weight_decay=0.1, clip_norm=None, warmup_share=0.0, learning_rate=1.0).make()
    theirs = optax.adafactor(1.0, multiply_by_parameter_scale=False)
    rng = np.random.default_rng(0)
    kernel = {"lm_head": {"kernel": jnp.asarray(rng.normal(size=(128, 160)), jnp.float32)}}
    gradients = jax.tree.map(lambda x: jnp.sin(100 * x), kernel)
    found = update(transform)(gradients, transform.init(kernel), kernel)[0]["lm_head"]["kernel"]
    wanted = update(theirs)(gradients, theirs.init(kernel), kernel)[0]["lm_head"]["kernel"]
    np.testing.assert_allclose(found, wanted - 0.1 * kernel["lm_head"]["kernel"], rtol=1e-5, atol=1e-6)


def test_adafactor_is_clipped_to_a_root_mean_square_of_one():
    options = {"weight_decay": 0.0, "clip_norm": None, "warmup_share": 0.0, "learning_rate": 1.0, "total_steps": 10**6}
    transform, kernel = config("adafactor", **options).make(), {"lm_head": {"kernel": jnp.ones((128, 160))}}
    gradients, state, step = jax.tree.map(lambda x: jnp.sin(100 * x), kernel), transform.init(kernel), update(transform)
    for _ in range(20):
        _, state = step(gradients, state, kernel)
    # Far beyond what its second moment has seen.
    found = step(jax.tree.map(lambda g: 100 * g, gradients), state, kernel)[0]["lm_head"]["kernel"]
    assert np.sqrt(np.mean(np.square(found))) == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("variant", ["bfloat16", "int8"])
def test_epsilon_is_that_of_optax(variant):
    options = {"b1": 0.9, "b2": 0.95, "eps": 1e-3}
    ours = config(variant, clip_norm=None, weight_decay=0.0, learning_rate=1.0, warmup_share=0.0, **options).make()
    theirs, params = optax.scale_by_adam(**options), {"norm": {"scale": jnp.zeros(64)}}
    gradients = {"norm": {"scale": jnp.full(64, 1e-5)}}  # 1e-3 beside it decides the length of the step
    found = update(ours)(gradients, ours.init(params), params)[0]["norm"]["scale"]
    wanted = update(theirs)(gradients, theirs.init(params), params)[0]["norm"]["scale"]
    np.testing.assert_allclose(found, -wanted, rtol=1e-4)


@functools.cache
def regression(variant, steps=300, seed=0):
    """Losses and weights of noisy linear regression whose inputs, and so gradients, span three orders of magnitude."""
    rng = np.random.default_rng(seed)
    spread_D = 10.0 ** rng.uniform(-3, 0, 64)
    inputs_SBD = jnp.asarray(rng.normal(0, 1, (steps, 32, 64)) * spread_D, jnp.float32)
    wanted_DF = jnp.asarray(rng.normal(0, 1, (64, 40)), jnp.float32)
    params = {"lm_head": {"kernel": jnp.zeros((64, 40))}, "norm": {"scale": jnp.zeros(40)}}
    optimizer = config(variant, learning_rate=0.02, total_steps=steps, weight_decay=0.0, clip_norm=None)
    transform = optimizer.make()

    def loss(params, inputs_BD):
        found_BF = inputs_BD @ params["lm_head"]["kernel"] + params["norm"]["scale"]
        return jnp.mean(jnp.square(found_BF - inputs_BD @ wanted_DF - 0.5))

    def step(carry, inputs_BD):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params, inputs_BD)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transform.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = (params, transform.init(params))
    (params, _), losses = jax.jit(lambda carry: jax.lax.scan(step, carry, inputs_SBD))(carry)
    return np.asarray(losses), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


@pytest.mark.parametrize(("variant", "tolerance"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_small_moments_follow_the_float32_trajectory(variant, tolerance):
    losses, weights = regression("float32")
    found_losses, found_weights = regression(variant)
    assert losses[-1] < 0.05 * losses[0]  # there is a trajectory to follow
    # Of how far float32 has come: the loss at every step, the weights at the end.
    assert np.max(np.abs(found_losses - losses)) < tolerance * losses[0]
    assert np.linalg.norm(found_weights - weights) < tolerance * np.linalg.norm(weights)
    assert np.any(found_losses != losses)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scan_over_updates_is_a_loop_over_them(variant):
    transform, rng = config(variant).make(), np.random.default_rng(0)
    params = tree(rng)
    gradients = [tree(rng) for _ in range(3)]

    def body(state, gradient):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transform.update(gradient, state, params)
        return state, updates

    start = transform.init(params)
    last, scanned = jax.jit(lambda state: jax.lax.scan(body, state, jax.tree.map(lambda *x: jnp.stack(x), *gradients)))(
        start
    )
    state, step = start, update(transform)
    for number, gradient in enumerate(gradients):
        updates, state = step(gradient, state, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[number], b, rtol=1e-5, atol=1e-8),  # noqa: B023 - used at once
            scanned,
            updates,
        )
    assert jax.tree.structure(last) == jax.tree.structure(state)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail("changes"), last, start)


# --------------------------------------------------------------------------------------------------------------- codes


RNG = np.random.default_rng(1)
ARRAYS = {
    "random": RNG.normal(size=(3, 5, 96)),
    "constant": np.full((4, 64), -0.37),
    "zero": np.zeros((2, 40)),
    "huge range": RNG.choice([-1, 1], (64, 64)) * 10.0 ** RNG.uniform(-35, 35, (64, 64)),
    "orders in a block": RNG.choice([-1, 1], (64, 64)) * 10.0 ** RNG.uniform(-6, 0, (64, 64)),
    "one large": np.where(np.arange(64) == 40, 1e8, RNG.normal(size=(8, 64))),
    "short axis": RNG.normal(size=(6, 7)),
    "axis that blocks do not divide": RNG.normal(size=(2, 3, 70)),
    "vector": RNG.normal(size=33),
    "largest float": np.full(32, 8e37) * np.linspace(0, 1, 32),
}


def in_blocks(x):
    """[..., d] -> the block's largest magnitude at every element, by hand."""
    largest = np.zeros_like(x)
    for start in range(0, x.shape[-1], BLOCK):
        part = slice(start, start + BLOCK)
        largest[..., part] = np.abs(x[..., part]).max(-1, keepdims=True)
    return largest


@pytest.mark.parametrize("noise", ["low", "high", "random"])
@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("name", ARRAYS)
def test_codes_keep_their_error_bound(name, dtype, noise):
    x = ARRAYS[name].astype(np.float32)
    x = x if dtype == "int8" else np.abs(x)
    drawn = {"low": np.zeros(x.shape), "high": np.full(x.shape, 0.99999), "random": RNG.random(x.shape)}[noise]
    stored = jax.jit(quantise, static_argnums=2)(jnp.asarray(x), jnp.asarray(drawn.astype(np.float32)), dtype)
    assert stored.codes.shape == x.shape and stored.codes.dtype == dtype
    assert stored.absmax.shape == (*x.shape[:-1], -(-x.shape[-1] // BLOCK)) and stored.absmax.dtype == np.float32
    found, largest = np.asarray(jax.jit(dequantise)(stored)), in_blocks(x)
    share, octaves = {"int8": (0.093, 16), "uint8": (0.092, 32)}[dtype]
    floor = largest.astype(np.float64) * 2.0**-octaves
    error = np.abs(found.astype(np.float64) - x)
    above = np.abs(x) >= floor
    tiny = np.finfo(np.float32).tiny  # results below it are zero to some hardware
    assert np.all(error[above] <= share * np.abs(x)[above] + tiny)
    assert np.all(error[~above] <= floor[~above] * 1.0001 + tiny)
    whole = (np.abs(x) == largest) | (x == 0)
    np.testing.assert_allclose(found[whole], x[whole], rtol=1e-6, atol=tiny)
    assert np.all(np.sign(found) * np.sign(x) >= 0)
    if dtype == "uint8":
        assert np.all(found[x > 1e-25] > 0)  # a second moment that becomes zero lets a weight jump


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_rounding_has_no_bias(dtype):
    x = np.abs(RNG.normal(size=64)).astype(np.float32)
    draws = 4096
    noise = jnp.asarray(RNG.random((draws, 64)), jnp.float32)
    stored = quantise(jnp.broadcast_to(jnp.asarray(x), (draws, 64)), noise, dtype)
    # One standard deviation of the mean is at most half a step of 9.2 % over the root of the draws.
    np.testing.assert_allclose(np.mean(dequantise(stored), axis=0), x, rtol=5 * 0.046 / np.sqrt(draws))


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_tiny_blocks_become_zero_and_lost_ones_stay_lost(dtype):
    x = np.array([[1e-39] * 32, [np.nan] + [1.0] * 31, [np.inf] + [1.0] * 31], np.float32)
    found = np.asarray(dequantise(quantise(jnp.asarray(x), jnp.full(x.shape, 0.5), dtype)))
    np.testing.assert_array_equal(found[0], 0)
    assert not np.any(np.isfinite(found[1])) and not np.isfinite(found[2, 0])


def decaying(optimizer, steps, moment="nu"):
    """A moment of weights with one gradient, beside others that go on having it, over the steps."""
    transform = optimizer.make()
    params = {"norm": {"scale": jnp.ones(32)}}
    ones, state, step = jnp.ones(32), transform.init(params), update(transform)
    _, state = step({"norm": {"scale": ones}}, state, params)
    found = []
    for _ in range(steps):
        _, state = step({"norm": {"scale": jnp.where(jnp.arange(32) < 16, ones, 0.0)}}, state, params)
        kept = getattr(moments_of(state), moment)["norm"]["scale"]
        found.append(np.asarray(dequantise(kept) if isinstance(kept, QuantisedMoment) else kept, np.float32))
    return np.array(found)


@pytest.mark.parametrize("moment", ["mu", "nu"])
@pytest.mark.parametrize(
    ("variant", "decay", "steps"),
    [("bfloat16", 0.95, 60), ("int8", 0.95, 60), ("int8", 0.999, 1000), ("bfloat16", "bound", 150)],
)
def test_moments_do_not_stall(variant, decay, steps, moment):
    decay = adam.BFLOAT16_LARGEST_DECAY if decay == "bound" else decay
    changes = {"b1": decay, "b2": max(decay, 0.95)} if moment == "mu" else {"b2": decay}
    found = decaying(config(variant, clip_norm=None, **changes), steps, moment)
    wanted = (1 - decay) * decay ** np.arange(1, steps + 1)
    # The mean of 16 weights, whose codes are drawn apart: rounding to nearest would leave int8 where it began.
    np.testing.assert_allclose(found[-1, 16:].mean(), wanted[-1], rtol=0.25)
    np.testing.assert_allclose(found[-1, :16].mean(), 1 - decay ** (steps + 1), rtol=0.14)


def test_bfloat16_refuses_decays_under_which_it_would_stall():
    for name in ("b1", "b2"):
        with pytest.raises(ValueError, match=f"{name}=0.99 is too slow for bfloat16"):
            config("bfloat16", **{name: 0.99})
    # The reason: without the refusal one moment never gets where it is drawn to, and a slower one does not move.
    allowed = config("bfloat16", clip_norm=None)
    object.__setattr__(allowed, "b2", 0.99)
    assert np.all(decaying(allowed, 600)[-1, :16] < 0.85)
    object.__setattr__(allowed, "b2", 0.999)
    found = decaying(allowed, 50)
    np.testing.assert_array_equal(found[-1, 16:], found[0, 16:])


def test_no_weight_jumps_because_its_neighbours_are_large():
    """Gradients of one block over nine orders of magnitude: Adam's steps stay about one, also in 8 bits."""
    transform = config("int8", clip_norm=None, weight_decay=0.0, learning_rate=1.0, warmup_share=0.0).make()
    rng, step = np.random.default_rng(3), update(transform)
    scales = 10.0 ** np.linspace(-9, 0, 32)
    params = {"norm": {"scale": jnp.zeros((8, 32))}}
    state, largest = transform.init(params), []
    for _ in range(60):
        gradients = jnp.asarray(rng.normal(size=(8, 32)) * scales, jnp.float32)
        updates, state = step({"norm": {"scale": gradients}}, state, params)
        largest.append(np.abs(updates["norm"]["scale"]).max())
    assert max(largest) < 3.0


def test_codes_are_drawn_anew_for_each_step_and_parameter():
    transform = config("int8", clip_norm=None).make()
    same = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
    params = {"norm": {"scale": same}, "lm_head": {"kernel": same}}
    _, state = update(transform)(params, transform.init(params), params)
    one, other = (nu_of(state)[a][b].codes for a, b in (("norm", "scale"), ("lm_head", "kernel")))
    assert np.any(one != other)
    later = jax.tree.map(lambda leaf: leaf if leaf.ndim else leaf + 5, transform.init(params))
    _, state = update(transform)(params, later, params)
    assert np.any(one != nu_of(state)["norm"]["scale"].codes)


# --------------------------------------------------------------------------------------------------------------- sizes


SEVEN = split_params(abstract_model(PRESETS["dream-7b"]))[1]
NANO = split_params(abstract_model(PRESETS["nano"]))[1]


@pytest.mark.parametrize(("variant", "share"), [("bfloat16", 0.5001), ("int8", 0.30), ("adafactor", 0.02)])
def test_state_is_smaller(variant, share):
    def size(params, variant):
        return state_bytes(jax.eval_shape(config(variant).make().init, params))

    assert size(SEVEN, "float32") == pytest.approx(2 * 4 * 7_615_616_512, rel=1e-6)
    assert size(SEVEN, variant) <= share * size(SEVEN, "float32")
    if variant != "adafactor":  # which does not factor axes below 128: nano has many
        assert size(NANO, variant) <= share * size(NANO, "float32")


def held(leaf):
    return np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64) * leaf.dtype.itemsize


@pytest.mark.parametrize("mesh", ["8x1", "4x2"])
@pytest.mark.parametrize("variant", ["float32", "bfloat16", "int8"])
def test_state_of_7b_is_divided(variant, mesh):
    state = abstract_state(SEVEN, config(variant).make(), sharding.make_mesh(mesh)).opt_state
    per_device = sum(held(leaf) for leaf in jax.tree.leaves(state))
    assert per_device < 1.001 / 8 * state_bytes(state)


@pytest.mark.slow
def test_update_of_7b_moves_no_moment_between_devices():
    """Compiled for eight devices: besides the sum of the clipped norm, a block's maximum stays on its device."""
    mesh, transform = sharding.make_mesh("8x1"), config("int8").make()
    state = abstract_state(SEVEN, transform, mesh)
    with jax.set_mesh(mesh):
        places = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state))

        def run(gradients, opt_state, params):
            with jax.numpy_dtype_promotion("standard"):
                return transform.update(gradients, opt_state, params)

        compiled = jax.jit(run, out_shardings=places).lower(state.params, state.opt_state, state.params).compile()
    found = set(re.findall(r"\b(all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text()))
    assert found <= {"all-reduce"}


@pytest.mark.parametrize(
    ("mesh", "row", "column"),
    [("4x2", PartitionSpec("fsdp"), PartitionSpec("tensor")), ("8x1", PartitionSpec("fsdp"), PartitionSpec())],
)
def test_rows_and_columns_of_a_square_matrix_lie_where_their_axis_lies(mesh, row, column):
    params = {"lm_head": {"kernel": jax.ShapeDtypeStruct((256, 256), jnp.float32)}}
    params["norm"] = {"scale": jax.ShapeDtypeStruct((256,), jnp.float32)}
    state = abstract_state(params, config("adafactor").make(), sharding.make_mesh(mesh)).opt_state
    factored = next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "v_row")) if hasattr(s, "v_row"))
    assert factored.v_row["lm_head"]["kernel"].sharding.spec == row  # which sums over the last axis: V
    assert factored.v_col["lm_head"]["kernel"].sharding.spec == column
    assert factored.v["lm_head"]["kernel"].shape == (1,)
    assert factored.v["lm_head"]["kernel"].sharding.spec == PartitionSpec()
    assert factored.v["norm"]["scale"].shape == (256,)


# -------------------------------------------------------------------------------------------------------- in the step


ROWS, LENGTH, STEPS = 16, 24, 8
# Blocks, heads and vocabulary that eight devices really split.
SMALL = dataclasses.replace(PRESETS["nano"], num_hidden_layers=2, hidden_size=256, intermediate_size=256)
GRAPHDEF, SHAPES = split_params(abstract_model(SMALL))


@functools.cache
def parameters():
    rng = np.random.default_rng(0)
    draw = lambda path, leaf: rng.normal(path[-1].key == "scale", 0.05, leaf.shape).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw, SHAPES)


def batch(step, mesh):
    """Counting from a random byte; the first tokens are the prompt."""
    tokens = (np.random.default_rng(step).integers(0, 256, (ROWS, 1)) + np.arange(LENGTH)) % 256
    maskable = np.broadcast_to(np.arange(LENGTH) >= 4, tokens.shape)
    rows = Batch(tokens_BT=tokens.astype(np.int32), maskable_BT=maskable, row_B=np.arange(ROWS, dtype=np.int32))
    return put_batch(rows, sharding.make_mesh(mesh))


@functools.cache
def compiled(variant, mesh):
    optimizer = config(variant, total_steps=STEPS)
    step_config = StepConfig(global_batch=ROWS)
    return make_train_step(GRAPHDEF, optimizer.make(), optimizer.schedule(), step_config, sharding.make_mesh(mesh))


def first_state(variant, mesh):
    return init_state(parameters(), config(variant, total_steps=STEPS).make(), sharding.make_mesh(mesh))


def steps(variant, mesh, state, first, last):
    losses = []
    for number in range(first, last):
        state, metrics = compiled(variant, mesh)(state, batch(number, mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def run(variant, mesh):
    return steps(variant, mesh, first_state(variant, mesh), 0, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "mesh"),
    [("bfloat16", "4x2"), ("int8", "4x2"), ("adafactor", "4x2")],
)
def test_meshes_change_nothing(variant, mesh):
    wanted = run(variant, "1x1")[1]
    assert np.all(np.isfinite(wanted))
    assert wanted != run("float32", "4x2")[1]  # it is the variant
    np.testing.assert_allclose(run(variant, mesh)[1], wanted, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["4x2"])
@pytest.mark.parametrize("variant", [slow("bfloat16"), "int8"])
def test_moments_lie_where_their_parameters_lie(variant, mesh):
    state = run(variant, mesh)[0]
    whole = state_bytes(state.opt_state)
    per_device = sharding.bytes_per_device(state.opt_state)
    assert len(per_device) == 8 and max(per_device.values()) < 1.1 * whole / 8
    places = jax.tree_util.tree_leaves_with_path(state.params)
    moments = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu"))
    is_leaf = lambda leaf: isinstance(leaf, QuantisedMoment)
    for stored in (moments.mu, moments.nu):
        for (path, param), leaf in zip(places, jax.tree.leaves(stored, is_leaf=is_leaf), strict=True):
            leaf = leaf.codes if isinstance(leaf, QuantisedMoment) else leaf
            assert leaf.dtype == ("bfloat16" if variant == "bfloat16" else leaf.dtype) and leaf.dtype.itemsize < 4
            assert leaf.shape == param.shape
            assert leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim), path
    # The step keeps what the checkpoint will be restored into.
    jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim) or pytest.fail("moved"),
        abstract_state(SHAPES, config(variant, total_steps=STEPS).make(), sharding.make_mesh(mesh)),
        state,
    )


def bits(state):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.optimised
@pytest.mark.parametrize("variant", [slow("float32"), slow("bfloat16"), slow("int8"), slow("adafactor")])
def test_a_restored_run_goes_on_to_the_bit_and_onto_another_mesh(variant, tmp_path):
    half = STEPS // 2
    state, losses = steps(variant, "4x2", first_state(variant, "4x2"), 0, half)
    before = bits(state)
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(half, state, {})
        del state

        def restored(mesh) -> TrainState:
            optimizer = config(variant, total_steps=STEPS).make()
            return checkpoints.restore(abstract_state(SHAPES, optimizer, sharding.make_mesh(mesh)))[0]

        for mesh in ("4x2", "1x1"):
            again = restored(mesh)
            assert bits(again) == before
            _, rest = steps(variant, mesh, again, half, STEPS)
            if mesh == "4x2":
                assert losses + rest == run(variant, "4x2")[1]
            else:
                np.testing.assert_allclose(losses + rest, run(variant, "4x2")[1], rtol=1e-5)
        # Another way to store the moments is another run.
        with pytest.raises(ValueError, match="does not fit the parameters and the optimizer"):
            other = "bfloat16" if variant == "int8" else "int8"
            checkpoints.restore(abstract_state(SHAPES, config(other).make(), sharding.make_mesh("1x1")))


# ------------------------------------------------------------------------------------------------------ on the host


def test_moments_on_host_are_refused_where_devices_cannot_reach_it(tmp_path, monkeypatch):
    optimizer, mesh = config(moments_on_host=True), sharding.make_mesh("1x1")
    optimizer.check_devices(mesh)
    monkeypatch.setattr(shardings, "_memory_kinds", lambda device: {"device"})
    message = re.escape("needs the memory 'pinned_host', but cpu devices here have ['device']")
    with pytest.raises(ValueError, match=message):
        optimizer.check_devices(mesh)
    with pytest.raises(ValueError, match=message):
        init_state(parameters(), optimizer.make(), mesh)
    with pytest.raises(ValueError, match=message):
        train(TrainSettings.flat(out=tmp_path / "run", moments_on_host=True, eval_rows=0))
    assert not (tmp_path / "run").exists()
    config().check_devices(mesh)


def kinds(state):
    """Where the large arrays of a state lie; the counters stay on the device."""
    assert all(leaf.sharding.memory_kind == "device" for leaf in jax.tree.leaves(state) if not leaf.ndim)
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.ndim}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [slow("float32"), "int8"])
def test_moments_on_host_stay_there_and_change_nothing(variant, tmp_path):
    optimizer, mesh = config(variant, total_steps=STEPS, moments_on_host=True), sharding.make_mesh("4x2")
    step = make_train_step(GRAPHDEF, optimizer.make(), optimizer.schedule(), StepConfig(global_batch=ROWS), mesh)
    state, losses = init_state(parameters(), optimizer.make(), mesh), []
    assert kinds(state.opt_state) == {"pinned_host"} and kinds(state.params) == {"device"}
    for number in range(STEPS):
        before = state
        state, metrics = step(state, batch(number, "4x2"))
        losses.append(float(metrics["loss"]))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim)
    wanted, wanted_losses = run(variant, "4x2")
    if variant == "float32":  # on the device optax's own, whose roundings are other ones
        np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
        for leaf, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(wanted.params), strict=True):
            np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-6)
    else:
        assert losses == wanted_losses
        assert bits(state) == bits(wanted)
    assert kinds(state.opt_state) == {"pinned_host"} and kinds(state.params) == {"device"}
    assert max(sharding.bytes_per_device(state.opt_state).values()) < 100  # the counters
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(run(variant, "4x2")[0]), strict=True):
        assert leaf.sharding.spec == other.sharding.spec
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(STEPS, state, {})
        again, _ = checkpoints.restore(abstract_state(SHAPES, optimizer.make(), sharding.make_mesh("8x1")))
    assert bits(again) == bits(state)
    assert kinds(again.opt_state) == {"pinned_host"} and kinds(again.params) == {"device"}


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sgd"}, "kind='sgd' is not one of"),
        ({"moments": "int4"}, "moments='int4' is not one of"),
        ({"kind": "adafactor", "moments": "int8"}, "moments='int8' is a setting of AdamW"),
        ({"kind": "adafactor", "moments_on_host": True}, "moments_on_host=True is a setting of AdamW"),
        ({"kind": "adafactor", "b1": 0.5}, "b1=0.5 is a setting of AdamW"),
    ],
)
def test_choices_that_exclude_each_other(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**changes)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "changes",
    [
        {"eps": 0.0},
        {"eps": np.nan},
        {"learning_rate": np.inf},
        {"weight_decay": np.nan},
        {"weight_decay": -0.1},
        {"clip_norm": np.inf},
        {"total_steps": 10.5},
    ],
    ids=str,
)
def test_numbers_out_of_range(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        config(**changes)


def test_int8_moments_on_the_host_are_refused_for_tpus():
    tpu = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((8, 1, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=tpu)
    with pytest.raises(ValueError, match="int8 moments does not compile for TPUs"):
        config("int8", moments_on_host=True).check_devices(mesh)
    config("bfloat16", moments_on_host=True).check_devices(mesh)


def test_settings_name_the_optimizer_and_warn():
    found = TrainSettings.flat(moments="int8").optimizer_config()
    assert (found.kind, found.moments, found.moments_on_host) == ("adamw", "int8", False)
    settings = TrainSettings.flat(moments="bfloat16", moments_on_host=True)
    found = settings.optimizer_config()
    assert (found.moments, found.moments_on_host) == ("bfloat16", True)
    assert any("copies every moment to the devices and back" in line for line in settings.warnings())
    settings = TrainSettings.flat(optimizer="adafactor")
    assert settings.optimizer_config().kind == "adafactor"
    assert any("unstable for masked diffusion" in line for line in settings.warnings())
    with pytest.raises(ValueError, match="Adafactor does not use it"):
        TrainSettings.flat(optimizer="adafactor", moments="int8")


# A parameter is updated one chunk at a time.


@pytest.mark.parametrize("variant", ["bfloat16", "int8"])
def test_chunks_change_nothing(variant, monkeypatch):
    params, gradients = (tree(np.random.default_rng(seed)) for seed in (0, 1))
    transform, found = config(variant).make(), []
    for chunk in (1 << 20, 9 * 64, 1):
        monkeypatch.setattr(adam, "_CHUNK_ELEMENTS", chunk)
        step, state = update(transform), transform.init(params)
        for _ in range(3):
            updates, state = step(gradients, state, params)
        found.append(jax.device_get((updates, state)))
    for other in found[1:]:
        # XLA may contract other multiplications and additions inside a loop: a unit in the last place of an update.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), other[0], found[0][0])
        jax.tree.map(np.testing.assert_array_equal, other[1], found[0][1])


@pytest.mark.parametrize("variant", [slow("bfloat16"), "int8"])
def test_update_for_gpus_gives_the_same_numbers(variant):
    """It is traced in another form, in which XLA for GPUs stores no float32 moments."""
    params, gradients = ({"lm_head": tree(np.random.default_rng(seed))["lm_head"]} for seed in (0, 1))
    transform, found = config(variant).make(), {}
    for platform in ("cpu", "gpu"):
        with target_platform(platform):
            state = transform.init(params)
            for _ in range(2):
                updates, state = update(transform)(gradients, state, params)
        found[platform] = jax.device_get((updates, state))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found["gpu"][0], found["cpu"][0])
    for one, other in zip(*map(jax.tree.leaves, (found["gpu"][1], found["cpu"][1])), strict=True):
        if one.dtype.itemsize == 1:  # another rounding of a moment may round its code to the other neighbour
            assert np.mean(one != other) < 0.01
        else:
            np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "most_read", "most_temporaries"), [("int8", 23, 1.0), ("bfloat16", 16.5, 0.1)])
def test_compiled_for_an_h200_no_float32_moment_is_stored(variant, most_read, most_temporaries):
    """Bytes per weight; float32 moments read 20 (the gradient twice, parameters and moments) and write 12."""
    if not importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("needs the extra plan-gpu, to compile for an H200")
    mesh, transform = find_hardware("h200:1").mesh("1x1"), config(variant).make()
    shapes = {"layers": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((28, 3584, 18944), jnp.float32)}}}}
    state = abstract_state(shapes, transform, mesh)

    def run(params, opt_state, gradients):
        with jax.numpy_dtype_promotion("standard"):
            usable = jnp.isfinite(optax.tree.norm(gradients))
            return update_if(usable, transform, gradients, opt_state, params)

    with jax.set_mesh(mesh):
        wanted = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.opt_state))
        jitted = jax.jit(run, donate_argnums=(0, 1, 2), out_shardings=wanted)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Some donated buffers were not usable")  # the gradient has no successor
            compiled = jitted.lower(state.params, state.opt_state, state.params).compile()
    weights = 28 * 3584 * 18944
    assert bytes_read(compiled.as_text()) < most_read * weights
    assert compiled.memory_analysis().temp_size_in_bytes < most_temporaries * weights


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")
def test_compiled_for_an_h200_moments_of_8_bits_need_no_more_temporary_memory():
    """Of a whole step, in which gradients are added to arrays of zeros: the update must not keep these arrays."""
    if not importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("needs the extra plan-gpu, to compile for an H200")
    mesh, temporaries = find_hardware("h200:1").mesh("1x1"), {}
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 4, "vocab_size": 4096, "mask_token_id": 4001, "pad_token_id": 4000}
    small = dataclasses.replace(PRESETS["dream-7b"], **sizes)
    graphdef, shapes = split_params(abstract_model(small, compute_dtype="bfloat16", remat="full"))
    for moments in ("float32", "int8"):
        optimizer = OptimizerConfig(learning_rate=1e-4, total_steps=10, moments=moments)
        array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
        rows = Batch(tokens_BT=array(jnp.int32, 2, 128), maskable_BT=array(bool, 2, 128), row_B=array(jnp.int32, 2))
        step = make_train_step(graphdef, optimizer.make(), optimizer.schedule(), StepConfig(global_batch=2), mesh)
        compiled = step.lower(abstract_state(shapes, optimizer.make(), mesh), rows).compile()
        temporaries[moments] = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries["int8"] < 1.1 * temporaries["float32"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_of_layers_that_are_apart(variant):
    """The moments of every layer have the sharding of the parameter, without the axis of layers."""
    shapes = split_params(abstract_model(SMALL, layers="apart"))[1]
    state = abstract_state(shapes, config(variant).make(), sharding.make_mesh("2x2")).opt_state
    found = [(shardings.path_names(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    specs = {
        tuple(
            name for name in names if name in ("mu", "nu", "v_row", "v_col", "v", "codes", "absmax")
        ): leaf.sharding.spec
        for names, leaf in found
        if "layers.1.mlp.gate.kernel" in ".".join(names)
    }
    whole = PartitionSpec("fsdp", "tensor")
    wanted = {
        "int8": {(name, leaf): whole for name in ("mu", "nu") for leaf in ("codes", "absmax")},
        "adafactor": {("v_row",): PartitionSpec("fsdp"), ("v_col",): PartitionSpec("tensor"), ("v",): PartitionSpec()},
    }
    assert specs == wanted.get(variant, {("mu",): whole, ("nu",): whole})


def test_random_bits_are_uniform_and_independent():
    """Of rows, steps and parameters: every bit is set half of the time, and equal to another row's half of the time."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(5), jnp.arange(8))
    bits = np.asarray(random_bits(keys, (8, 64, 128))).reshape(8, -1)
    ones = np.unpackbits(bits.view(np.uint8), axis=-1).reshape(8, -1, 32)
    expected = 5 * 0.5 / np.sqrt(bits.shape[1])  # five standard deviations
    assert np.all(np.abs(ones.mean(1) - 0.5) < expected)
    for other in (np.roll(ones, 1, axis=0), np.roll(ones, 1, axis=1), np.roll(ones, 128, axis=1)):
        assert np.all(np.abs((ones == other).mean(1) - 0.5) < expected)
    for half in (bits & 0xFFFF, bits >> 16):
        counts = np.array([np.bincount(row // 256, minlength=256) for row in half])
        assert np.all(np.abs(counts - 32) < 6 * np.sqrt(32))
    # A part of the rows has the same bits, so that chunks and meshes change nothing.
    np.testing.assert_array_equal(random_bits(keys[3:5], (2, 64, 128)).reshape(2, -1), bits[3:5])
    np.testing.assert_array_equal(random_bits(keys, (8,)), bits[:, 0])


def test_float32_moments_exist_for_one_chunk_at_a_time(monkeypatch):
    shapes = {"layers": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((32, 256, 512), jnp.float32)}}}}
    transform, temporaries = config("int8").make(), {}
    for chunk in (256 * 512, 32 * 256 * 512):
        monkeypatch.setattr(adam, "_CHUNK_ELEMENTS", chunk)
        arguments = (shapes, jax.eval_shape(transform.init, shapes), shapes)

        def run(gradients, state, params):
            with jax.numpy_dtype_promotion("standard"):
                return transform.update(gradients, state, params)

        compiled = jax.jit(run, donate_argnums=(0, 1)).lower(*arguments).compile()
        temporaries[chunk] = compiled.memory_analysis().temp_size_in_bytes
    small, large = temporaries.values()
    assert small < large / 3 and small < 8.5 * 32 * 256 * 512  # bytes; one float32 array takes 4 for each weight
