"""One step is one function of state and batch: meshes and accumulation change only the order of additions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import TypeCheckError
from marking import slow

from dream_jax import masks, sharding
from dream_jax.batch import Batch
from dream_jax.config import PRESETS
from dream_jax.model import abstract_model, merge_params, split_params
from dream_jax.objective import Focal, InverseTimeWeight, draw_noise, masked_diffusion_loss
from dream_jax.train_step import (
    NLL_BY_TIME,
    OptimizerConfig,
    StepConfig,
    abstract_state,
    init_state,
    make_train_step,
    noise_key,
    put_batch,
)

REFUSALS = (ValueError, TypeCheckError)
ROWS, LENGTH, STEPS = 16, 24, 20
# Everything that nano splits, every mesh of 8 devices splits here too.
SMALL = dataclasses.replace(PRESETS["nano"], num_hidden_layers=2, hidden_size=64, intermediate_size=96)
GRAPHDEF, SHAPES = split_params(abstract_model(SMALL))
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, total_steps=STEPS)


def named(tree):
    return {".".join(part.key for part in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def parameters():
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        return rng.normal(kind == "scale", 0.05, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, SHAPES)


def batch(step, rows=ROWS):
    """Lines that can be learned: counting from a random byte; the first tokens are the prompt."""
    rng = np.random.default_rng(step)
    tokens = (rng.integers(0, 256, (rows, 1)) + np.arange(LENGTH)) % 256
    maskable = np.broadcast_to(np.arange(LENGTH) >= 4, tokens.shape)
    return Batch(tokens_BT=tokens.astype(np.int32), maskable_BT=maskable, row_B=np.arange(rows, dtype=np.int32))


@functools.cache
def compiled(mesh="1x1", optimizer=OPTIMIZER, **options):
    """The step of one setting: compiling it is what takes the time here."""
    config = StepConfig(global_batch=ROWS, **options)
    return make_train_step(GRAPHDEF, optimizer.make(), optimizer.schedule(), config, sharding.make_mesh(mesh))


def first_state(mesh="1x1", optimizer=OPTIMIZER):
    return init_state(parameters(), optimizer.make(), sharding.make_mesh(mesh))


def put(batch, mesh="1x1"):
    return put_batch(batch, sharding.make_mesh(mesh))


@functools.cache
def run(mesh, accumulation=1):
    """The metrics of the first steps, and the state after them."""
    state, step, found = first_state(mesh), compiled(mesh, accumulation=accumulation), []
    for number in range(STEPS):
        state, metrics = step(state, put(batch(number), mesh))
        found.append([float(metrics[name]) for name in ("loss", "nll", "grad_norm", "num_masked")])
    return np.array(found), state


@pytest.mark.parametrize(
    ("mesh", "accumulation"),
    [("4x2", 1), slow("1x1", 4)] + [slow(mesh, 1) for mesh in ("8x1", "2x4", "1x1x8", "2x2x2")] + [slow("2x1x4", 4)],
)
def test_meshes_and_accumulation_change_nothing(mesh, accumulation):
    wanted, found = run("1x1")[0], run(mesh, accumulation)[0]
    assert np.all(np.isfinite(wanted))
    assert np.mean(wanted[-3:, 1]) < np.mean(wanted[:3, 1]) - 0.05  # it learns: the parameters did move
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1:3], wanted[:, 1:3], rtol=1e-4)
    np.testing.assert_array_equal(found[:, 3], wanted[:, 3])
    assert len(set(wanted[:, 3])) > STEPS / 2  # each step draws its own noise


def reference_step(params, m, v, step, optimizer, config):
    """AdamW by hand, in float64, from the gradient of the loss over the whole batch."""
    data = batch(step)
    # 1 << 30: a stream of its own, apart from the random weights of the same seed.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), 1 << 30), step)
    t, masked = draw_noise(key, jnp.asarray(data.row_B), jnp.asarray(data.maskable_BT), ROWS)

    def loss(params):
        return masked_diffusion_loss(
            merge_params(GRAPHDEF, params), data.tokens_BT, masked, t, config.weight, focal=config.focal
        )

    (value, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    gradient = {name: np.asarray(leaf, np.float64) for name, leaf in named(gradient).items()}
    norm = math.sqrt(sum(np.sum(leaf**2) for leaf in gradient.values()))
    scale = min(1.0, optimizer.clip_norm / norm)
    rate, updated = float(optimizer.schedule()(step)), {}
    for name, leaf in named(params).items():
        g = gradient[name] * scale
        m[name] = optimizer.b1 * m.get(name, 0) + (1 - optimizer.b1) * g
        v[name] = optimizer.b2 * v.get(name, 0) + (1 - optimizer.b2) * g**2
        m_hat = m[name] / (1 - optimizer.b1 ** (step + 1))
        v_hat = v[name] / (1 - optimizer.b2 ** (step + 1))
        decay = optimizer.weight_decay * leaf if name.endswith(("kernel", "embedding")) else 0.0
        updated[name] = np.asarray(leaf - rate * (m_hat / (np.sqrt(v_hat) + optimizer.eps) + decay), np.float32)
    metrics = {
        "loss": value,
        "nll": aux["nll"],
        "masked_accuracy": aux["num_correct"] / aux["num_masked"],
        "num_masked": aux["num_masked"],
        "grad_norm": norm,
        "learning_rate": rate,
        "skipped": 0.0,
    }
    return jax.tree.unflatten(jax.tree.structure(params), updated.values()), metrics


@pytest.mark.optimised
def test_step_is_adamw_by_hand():
    # A large epsilon: without it the update of a tiny gradient is all rounding. Clipping and decay that show.
    optimizer = OptimizerConfig(
        learning_rate=0.01, total_steps=10, warmup_share=0.2, eps=1e-3, weight_decay=0.5, clip_norm=0.5
    )
    options = {"weight": InverseTimeWeight(), "focal": Focal(), "seed": 7}
    step, state = compiled(optimizer=optimizer, **options), first_state(optimizer=optimizer)
    params, m, v = parameters(), {}, {}
    for number in range(3):
        params, wanted = reference_step(params, m, v, number, optimizer, StepConfig(global_batch=ROWS, **options))
        state, metrics = step(state, put(batch(number)))
        # Losses by noise level and the accuracy at end-of-text are test_skipped_steps.py's.
        assert metrics.keys() == wanted.keys() | {"eos_accuracy", *NLL_BY_TIME}
        assert int(state.step) == number + 1
        for name, value in wanted.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
        found = named(state.params)
        for name, value in named(params).items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert wanted["grad_norm"] > optimizer.clip_norm


@pytest.mark.slow
def test_rows_may_come_in_any_order():
    data, order = batch(0), np.random.default_rng(0).permutation(ROWS)
    permuted = jax.tree.map(lambda value: value[order], data)
    _, metrics = compiled("8x1", accumulation=1)(first_state("8x1"), put(permuted, "8x1"))
    np.testing.assert_allclose(metrics["loss"], run("8x1")[0][0, 0], rtol=1e-6)
    assert metrics["num_masked"] == run("8x1")[0][0, 3]


@pytest.mark.slow
def test_what_is_hidden_before_a_row_changes_nothing():
    """Rows of which the first tokens do not exist; also in parts, and split over rows and tokens."""
    start = np.arange(ROWS)[:, None] % 6
    valid = np.arange(LENGTH) >= start
    data = dataclasses.replace(batch(0), maskable_BT=np.arange(LENGTH) >= start + 4, valid_BT=valid)
    other = dataclasses.replace(data, tokens_BT=np.where(valid, data.tokens_BT, 7).astype(np.int32))
    changed = np.where(np.arange(LENGTH) == start, 7, data.tokens_BT).astype(np.int32)
    prompt = dataclasses.replace(data, tokens_BT=changed)
    found = {
        name: [float(metrics[one]) for one in ("loss", "grad_norm")]
        for name, given, mesh, parts in (
            ("plain", data, "1x1", 1),
            ("other", other, "1x1", 1),
            ("prompt", prompt, "1x1", 1),
            ("split", other, "2x1x2", 2),
        )
        for _, metrics in [compiled(mesh, accumulation=parts)(first_state(mesh), put(given, mesh))]
    }
    assert found["plain"] == found["other"]
    assert abs(found["prompt"][0] - found["plain"][0]) > 1e-4  # the first token that exists is seen
    np.testing.assert_allclose(found["split"], found["plain"], rtol=1e-4)


def test_same_seed_same_run():
    _, metrics = compiled("1x1", accumulation=1)(first_state(), put(batch(0)))
    assert float(metrics["loss"]) == run("1x1")[0][0, 0]
    assert float(metrics["learning_rate"]) == pytest.approx(float(OPTIMIZER.schedule()(0)))


@pytest.mark.parametrize("mesh", [slow("8x1"), slow("2x4"), "4x2"])
def test_state_is_divided(mesh):
    _, state = run(mesh)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    for tree in (state.params, moments):
        whole = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        held = sharding.bytes_per_device(tree)
        assert sum(held.values()) < 1.1 * whole
        assert max(held.values()) < 1.1 * whole / 8
    # Each moment lies exactly where its parameter lies.
    places = {name: leaf.sharding for name, leaf in named(state.params).items()}
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    for tree in (adam.mu, adam.nu):
        for name, leaf in named(tree).items():
            assert leaf.sharding.is_equivalent_to(places[name], leaf.ndim), name


@pytest.mark.parametrize("mesh", ["1x1", slow("8x1")])
def test_state_is_donated_and_given_parameters_are_not(mesh):
    given = jax.tree.map(jnp.asarray, parameters())
    state = init_state(given, OPTIMIZER.make(), sharding.make_mesh(mesh))
    compiled(mesh, accumulation=1)(state, put(batch(0), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))


@pytest.mark.parametrize("mesh", ["1x1", "4x2"])
def test_abstract_state_is_that_of_init(mesh):
    abstract = abstract_state(SHAPES, OPTIMIZER.make(), sharding.make_mesh(mesh))

    def same(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)

    jax.tree.map(same, abstract, first_state(mesh))
    # And the steps keep it: else every step would compile anew, or a restored state would not fit.
    jax.tree.map(same, abstract, run(mesh)[1])


def test_schedule():
    rates = [float(OptimizerConfig(learning_rate=2e-3, total_steps=100).schedule()(step)) for step in range(101)]
    assert 0 < rates[0] < 2e-3 / 5  # the first step moves already
    np.testing.assert_allclose(np.diff(rates[:11]), rates[1] - rates[0], rtol=1e-3)  # linear
    assert rates[10] == max(rates) == pytest.approx(2e-3)
    wanted = [1e-3 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in range(10, 101)]
    np.testing.assert_allclose(rates[10:], wanted, rtol=1e-4, atol=1e-9)
    assert rates[100] == pytest.approx(0, abs=1e-9)
    without = OptimizerConfig(learning_rate=2e-3, total_steps=100, warmup_share=0.0).schedule()
    assert float(without(0)) == pytest.approx(2e-3)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_short_runs_have_a_schedule(steps):
    schedule = OptimizerConfig(learning_rate=1.0, total_steps=steps).schedule()
    assert all(0 < float(schedule(step)) <= 1 for step in range(steps))


def test_weight_decay_touches_matrices_only():
    optimizer = OptimizerConfig(learning_rate=1.0, total_steps=10, warmup_share=0.0, weight_decay=0.1, clip_norm=None)
    transform, params = optimizer.make(), jax.tree.map(jnp.ones_like, parameters())
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its integer counter
        updates = named(jax.jit(lambda p: transform.update(zeros, transform.init(p), p)[0])(params))
    moved = {name for name, update in updates.items() if np.any(update)}
    assert moved == {name for name in updates if name.endswith((".kernel", ".embedding"))}
    assert moved and len(moved) < len(updates)
    for name in moved:
        np.testing.assert_allclose(updates[name], -0.1, rtol=1e-5)


def test_clipping_can_be_switched_off():
    for clip_norm, wanted in [(None, 300.0), (1.0, 1.0), (1e6, 300.0)]:
        transform = OptimizerConfig(
            learning_rate=1.0, total_steps=10, clip_norm=clip_norm, b1=0.0, eps=1e6, b2=0.0, warmup_share=0.0
        ).make()
        params = {"norm": {"scale": jnp.ones(9)}}
        gradient = {"norm": {"scale": jnp.full(9, 100.0)}}
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies its integer counter
            updates = transform.update(gradient, transform.init(params), params)[0]
        # With so large an epsilon Adam is gradient descent.
        np.testing.assert_allclose(float(optax.tree.norm(updates)) * 1e6, wanted, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"warmup_share": 1.0}, "warmup_share=1.0"),
        ({"warmup_share": -0.1}, "warmup_share=-0.1"),
        ({"b1": 1.0}, "b1=1.0"),
        ({"b2": -0.5}, "b2=-0.5"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"clip_norm": 0.0}, "clip_norm=0.0"),
    ],
)
def test_optimizer_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{"learning_rate": 1e-3, "total_steps": 10} | options)


@pytest.mark.parametrize("options", [{"global_batch": 0}, {"accumulation": 0}, {"accumulation": 3}])
def test_step_config_refuses(options):
    with pytest.raises(ValueError, match="must be a positive multiple of|must be at least 1"):
        StepConfig(**{"global_batch": 16} | options)


@pytest.mark.usefixtures("unchecked")
def test_step_config_refuses_unknown_forms():
    with pytest.raises(ValueError, match="layers='auto' is not one of"):
        StepConfig(global_batch=16, layers="auto")


@pytest.mark.parametrize(("mesh", "rows", "accumulation"), [("8x1", 12, 1), ("8x1", 16, 4), ("4x2", 6, 1)])
def test_batch_that_the_mesh_cannot_split_raises(mesh, rows, accumulation):
    config = StepConfig(global_batch=rows, accumulation=accumulation)
    with pytest.raises(REFUSALS, match=f"{rows // accumulation} rows, which fsdp={mesh[0]} does not divide"):
        make_train_step(GRAPHDEF, OPTIMIZER.make(), OPTIMIZER.schedule(), config, sharding.make_mesh(mesh))


@pytest.mark.slow
def test_annealing_begins_causal_and_ends_bidirectional():
    """The first step hears nothing of later tokens; from `anneal_steps` on the step is the plain one, bit for bit."""
    tokens, plain = batch(0), compiled()
    maskable = tokens.maskable_BT & (np.arange(LENGTH) < LENGTH - 1)
    same_noise = dataclasses.replace(tokens, maskable_BT=maskable)
    changed = dataclasses.replace(same_noise, tokens_BT=tokens.tokens_BT.copy())
    changed.tokens_BT[:, -1] = (changed.tokens_BT[:, -1] + 7) % 256

    def losses(step, number, *batches):
        found = []
        for one in batches:
            state = dataclasses.replace(first_state(), step=jnp.int32(number))
            found.append(float(step(state, put(one))[1]["loss"]))
        return found

    annealed = compiled(anneal_steps=4)
    # The last token is never masked, so only attention to it can tell the two batches apart.
    first, second = losses(annealed, 0, same_noise, changed)
    assert first == second
    first, second = losses(annealed, 2, same_noise, changed)
    assert first != second
    assert losses(annealed, 4, tokens) == losses(plain, 4, tokens)
    assert losses(annealed, 2, tokens) != losses(plain, 2, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [slow("2x2x2"), "8x1"])
def test_annealing_does_not_depend_on_the_mesh(mesh):
    valid, data = np.arange(LENGTH) >= np.arange(ROWS)[:, None] % 4, batch(0)
    hidden = dataclasses.replace(data, maskable_BT=valid & data.maskable_BT, valid_BT=valid)

    def loss(mesh, **options):
        state = dataclasses.replace(first_state(mesh), step=jnp.int32(2))
        return float(compiled(mesh, anneal_steps=4, **options)(state, put(hidden, mesh))[1]["loss"])

    assert loss(mesh) == pytest.approx(loss("1x1"), rel=1e-5)
    assert loss("1x1", accumulation=2) == pytest.approx(loss("1x1"), rel=1e-5)


def test_annealing_steps_are_counted_from_nothing():
    with pytest.raises(ValueError, match="must not be negative"):
        StepConfig(global_batch=8, anneal_steps=-1)


def test_annealing_leads_to_no_other_mask():
    with pytest.raises(ValueError, match="leads to bidirectional attention"):
        StepConfig(global_batch=8, anneal_steps=1, mask=masks.Causal())


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # while a batch is split in parts, a mask's arrays have an axis more
@pytest.mark.parametrize(("mesh", "accumulation"), [("1x1", 1), slow("8x1", 2)])
def test_step_under_a_mask_is_the_loss_under_it(mesh, accumulation):
    """Rows begin and answer where the batch says so, however it is split."""
    mask = masks.BlockCausal(5) & (masks.Prefix() | masks.SlidingWindow(0, 3))
    valid = np.arange(LENGTH) >= np.arange(ROWS)[:, None] % 4
    maskable = np.arange(LENGTH) >= 4 + np.arange(ROWS)[:, None] % 3
    hidden = dataclasses.replace(batch(0), maskable_BT=maskable, valid_BT=valid)
    step = compiled(mesh, mask=mask, accumulation=accumulation)
    found = step(first_state(mesh), put(hidden, mesh))[1]

    t, masked = draw_noise(noise_key(0, 0), hidden.row_B, maskable, ROWS)
    model = merge_params(GRAPHDEF, parameters())
    placed = mask.for_rows(valid, maskable)
    loss = lambda **options: masked_diffusion_loss(
        model, hidden.tokens_BT, masked, t, StepConfig(global_batch=1).weight, valid, **options
    )[0]
    assert float(found["loss"]) == pytest.approx(float(loss(mask=placed)), rel=1e-5)
    assert float(found["loss"]) != pytest.approx(float(loss()), rel=1e-4)
