"""The loss is the published one, and no [B, T, V] array stands behind it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import CHECKPOINTS, LOSSES, arrays, facts, model
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from marking import slow

from dream_jax import objective, sharding
from dream_jax.config import PRESETS
from dream_jax.model import abstract_model, merge_params, split_params
from dream_jax.objective import (
    CartWeight,
    Focal,
    InverseTimeWeight,
    LinearWeight,
    UniformWeight,
    draw_noise,
    masked_diffusion_loss,
)
from dream_jax.plan.hlo import collectives

SMALL = dataclasses.replace(
    PRESETS["nano"],
    num_hidden_layers=1,
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def weight_of(name):
    if name.startswith("cart:"):
        return CartWeight(float(name.removeprefix("cart:")))
    return {"original": InverseTimeWeight(), "linear": LinearWeight(), "uniform": UniformWeight()}[name]


@functools.cache
def make(config=SMALL):
    graphdef, shapes = split_params(abstract_model(config))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.2, leaf.shape), leaf.dtype)

    return merge_params(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))


def batch(rows=3, length=10, share=0.5, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 250, (rows, length)).astype(np.int32)
    return tokens, rng.random((rows, length)) < share, rng.uniform(0.1, 0.9, rows).astype(np.float32)


def value_and_gradient(dream, *arguments, **options):
    graphdef, params = split_params(dream)

    def loss(params):
        return masked_diffusion_loss(merge_params(graphdef, params), *arguments, **options)

    (value, aux), gradient = jax.device_get(jax.jit(jax.value_and_grad(loss, has_aux=True))(params))
    return value, aux, gradient


# Published numbers


@functools.cache
def published_run(checkpoint, name):
    golden = arrays(checkpoint)
    return value_and_gradient(
        model(checkpoint), golden["loss_tokens"], golden["loss_masked"], golden["loss_t"], weight_of(name)
    )


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
class TestPublished:
    @pytest.mark.parametrize("name", LOSSES)
    @pytest.mark.optimised
    def test_loss(self, checkpoint, name):
        golden, wanted = arrays(checkpoint), facts(checkpoint)["losses"][name]
        value, aux, gradient = published_run(checkpoint, name)
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, wanted["loss"], rtol=1e-5)
        norm = math.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradient)))
        np.testing.assert_allclose(norm, wanted["grad_norm"], rtol=1e-4)
        masked = golden["loss_masked"]
        np.testing.assert_allclose(
            aux["token_nll"], np.where(masked, golden["loss_token_nll"], 0), rtol=1e-5, atol=1e-6
        )
        assert aux["num_masked"] == masked.sum()
        np.testing.assert_allclose(aux["nll"], golden["loss_token_nll"][masked].mean(), rtol=1e-5)

    @pytest.mark.parametrize("name", ["original", "cart:0.3"])
    @pytest.mark.optimised
    def test_gradients(self, checkpoint, name):
        golden, dream = arrays(checkpoint), model(checkpoint)
        gradient = published_run(checkpoint, name)[2]
        layers = gradient["layers"]
        found = {
            "embed": gradient["embed"]["embedding"],
            "q0_bias": layers["attn"]["q"]["bias"][0].reshape(-1),
            "down_last": layers["mlp"]["down"]["kernel"][-1].T,  # torch has [out, in]
            "norm": gradient["norm"]["scale"],
        }
        for part, value in found.items():
            wanted = golden[f"grad_{name.replace(':', '_')}_{part}"]
            assert value.shape == wanted.shape
            np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max(), err_msg=part)
        assert not np.any(found["embed"][dream.config.pad_token_id])

    @pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("cart")])
    @pytest.mark.optimised
    def test_weights(self, checkpoint, name):
        golden = arrays(checkpoint)
        masked = golden["loss_masked"]
        found = weight_of(name)(masked, golden["loss_t"])
        wanted = golden[f"loss_weight_{name.replace(':', '_')}"]
        np.testing.assert_allclose(found[masked], wanted[masked], rtol=1e-5, atol=1e-7)

    def test_what_was_recorded_is_what_is_computed(self, checkpoint):
        golden = arrays(checkpoint)
        noisy = np.where(golden["loss_masked"], model(checkpoint).config.mask_token_id, golden["loss_tokens"])
        np.testing.assert_array_equal(noisy, golden["loss_noisy"])


# Weights


@given(
    masked=st.lists(st.lists(st.booleans(), min_size=23, max_size=23), min_size=2, max_size=2),
    p=st.sampled_from([0.01, 0.1, 0.3, 0.8, 0.999]),
)
@settings(max_examples=40, deadline=None)
def test_cart_is_the_dense_formula(masked, p):
    masked = np.array(masked)
    distance = np.abs(np.subtract.outer(np.arange(23), np.arange(23)))
    kernel = np.where(distance > 0, 0.5 * p * (1 - p) ** (np.maximum(distance, 1) - 1), 0.0)
    wanted = (~masked) @ kernel.T
    found = jax.jit(CartWeight(p))(masked, np.ones(2, np.float32))
    assert found.dtype == jnp.float32
    # At masked positions; an unmasked one would not count itself either.
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_cart_is_linear_in_the_length():
    count = jax.make_jaxpr(CartWeight(0.1))(np.zeros((1, 4096), bool), np.ones(1, np.float32))
    assert max(math.prod(v.aval.shape) for eqn in count.eqns for v in eqn.outvars) < 3 * 4096
    masked = np.random.default_rng(0).random((16, 4096)) < 0.3
    mean = np.mean(np.asarray(jax.jit(CartWeight(0.1))(masked, np.ones(16, np.float32)))[:, 200:-200])
    np.testing.assert_allclose(mean, 0.7, atol=0.01)  # E[w | t] = 1 - t in the interior


def test_simple_weights():
    masked, t = np.ones((2, 3), bool), np.array([0.25, 0.5], np.float32)
    for weight, wanted in [
        (UniformWeight(), [[1] * 3, [1] * 3]),
        (LinearWeight(), [[0.75] * 3, [0.5] * 3]),
        (InverseTimeWeight(), [[4] * 3, [2] * 3]),
    ]:
        found = weight(masked, t)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(InverseTimeWeight()(masked[:1], np.zeros(1, np.float32)), [[0] * 3])


@pytest.mark.parametrize("p", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_cart_out_of_range_raises(p):
    with pytest.raises(ValueError, match=f"geometric_p={p}"):
        CartWeight(p)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": -1.0}, {"gamma": 0.5}, {"gamma": float("nan")}])
def test_focal_out_of_range_raises(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        Focal(**options)


# The chunked loss against the plain one


def naive_loss(dream, tokens, masked, t, weight, attention_mask=None, focal=None):
    """Full logits, shifted, under autodiff."""
    noisy = jnp.where(masked, dream.config.mask_token_id, tokens)
    logits = dream(noisy, attention_mask)
    logits = jnp.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
    nll = (
        jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, jnp.asarray(tokens)[..., None], axis=-1)[..., 0]
    )
    value = nll if focal is None else focal.alpha * (1 - jnp.exp(-nll)) ** focal.gamma * nll
    total = jnp.sum(jnp.where(masked, weight(masked, t) * value, 0.0))
    count = jnp.maximum(jnp.sum(masked, dtype=jnp.float32), 1.0)
    return total / count, jnp.argmax(logits, axis=-1) == tokens


def naive(dream, *arguments, **options):
    graphdef, params = split_params(dream)
    run = lambda params: naive_loss(merge_params(graphdef, params), *arguments, **options)
    (value, right), gradient = jax.device_get(jax.jit(jax.value_and_grad(run, has_aux=True))(params))
    return value, right, gradient


def assert_trees_close(found, wanted, relative=2e-5):
    # The floor: some gradients are nothing but rounding, as that of a key bias, which moves all scores alike.
    floor = 1e-6 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))

    def compare(path, a, b):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=relative, atol=relative * np.abs(b).max() + floor, err_msg=name)

    jax.tree_util.tree_map_with_path(compare, found, wanted)


TIED = dataclasses.replace(SMALL, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("chunk", "config", "focal"),
    # 30 rows in all: chunks of one row, of 7 (the last one is part empty), of exactly all, of more than there are.
    [
        (1, SMALL, None),
        (7, SMALL, Focal()),
        (7, TIED, None),
        (30, SMALL, Focal(alpha=0.5, gamma=1.5)),
        (999, SMALL, None),
    ],
)
@pytest.mark.optimised
def test_chunks_change_nothing(monkeypatch, chunk, config, focal):
    monkeypatch.setattr(objective, "_LOGIT_ELEMENTS", chunk * config.vocab_size)
    tokens, masked, t = batch()
    masked[:, :3] = [[True, True, False], [True, False, True], [False, True, True]]  # the shift's first two columns
    tokens[0, 5] = config.pad_token_id
    arguments = (make(config), tokens, masked, t, CartWeight(0.3))
    value, aux, gradient = value_and_gradient(*arguments, focal=focal)
    wanted, right, wanted_gradient = naive(*arguments, focal=focal)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert aux["num_correct"] == np.sum(right & masked)
    assert_trees_close(gradient, wanted_gradient)


def test_correct_tokens_are_counted():
    """With the most probable tokens as the targets, all are right."""
    dream = make()
    tokens, masked, t = batch()
    logits = dream(np.where(masked, SMALL.mask_token_id, tokens))
    best = np.argmax(np.concatenate([logits[:, :1], logits[:, :-1]], axis=1), axis=-1)
    aux = value_and_gradient(dream, np.where(masked, best, tokens).astype(np.int32), masked, t)[1]
    assert aux["num_correct"] == aux["num_masked"] == masked.sum()


def test_nothing_masked(monkeypatch):
    monkeypatch.setattr(objective, "_LOGIT_ELEMENTS", 4 * SMALL.vocab_size)
    tokens, masked, _ = batch()
    for weight in (InverseTimeWeight(), CartWeight()):
        value, aux, gradient = value_and_gradient(
            make(), tokens, np.zeros_like(masked), np.zeros(3, np.float32), weight
        )
        assert value == aux["nll"] == aux["num_masked"] == aux["num_correct"] == 0
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))  # finite, that is, and 0


def test_everything_masked():
    tokens, masked, t = batch()
    arguments = (make(), tokens, np.ones_like(masked), t, UniformWeight())
    value, _, gradient = value_and_gradient(*arguments)
    wanted, _, wanted_gradient = naive(*arguments)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert_trees_close(gradient, wanted_gradient)
    value, _, gradient = value_and_gradient(make(), tokens, np.ones_like(masked), t, CartWeight())
    assert value == 0  # no context, no weight


@pytest.mark.optimised
def test_extreme_logits_stay_finite():
    """A softmax without its peak subtracted would overflow."""
    dream = make()
    graphdef, params = split_params(dream)
    params = params | {"lm_head": {"kernel": params["lm_head"]["kernel"] * 1000}}
    arguments = (merge_params(graphdef, params), *batch(), UniformWeight())
    value, _, gradient = value_and_gradient(*arguments)
    wanted, _, wanted_gradient = naive(*arguments)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    assert value > 100
    assert_trees_close(gradient, wanted_gradient, relative=1e-4)


@given(nll=st.floats(1e-4, 30.0), gamma=st.sampled_from([1.0, 1.5, 2.0, 5.0]))
@settings(max_examples=60, deadline=None)
def test_focal_is_the_derivative_of_its_formula(nll, gamma):
    focal = Focal(alpha=0.25, gamma=gamma)
    plain = lambda ce: 0.25 * (1 - jnp.exp(-ce)) ** gamma * ce
    value, slope = objective._focal_value_and_slope(jnp.float32(nll), focal)
    np.testing.assert_allclose(value, plain(jnp.float32(nll)), rtol=1e-6)
    np.testing.assert_allclose(slope, jax.grad(plain)(jnp.float32(nll)), rtol=1e-5)


@pytest.mark.parametrize("focal", [None, Focal()])
def test_parts_of_a_batch_add_up(focal):
    tokens, masked, t = batch(4)
    options = {"weight": CartWeight(0.3), "focal": focal}
    whole, _, gradient = value_and_gradient(make(), tokens, masked, t, **options)
    parts = [
        value_and_gradient(make(), tokens[part], masked[part], t[part], normalizer=jnp.asarray(masked.sum()), **options)
        for part in (slice(0, 1), slice(1, 4))
    ]
    np.testing.assert_allclose(sum(value for value, _, _ in parts), whole, rtol=1e-6)
    assert_trees_close(jax.tree.map(np.add, parts[0][2], parts[1][2]), gradient)


def test_left_padding_changes_nothing():
    tokens, masked, t = batch(2, 8)
    pads = np.full((2, 3), SMALL.pad_token_id, np.int32)
    longer = np.concatenate([pads, tokens], axis=1), np.concatenate([pads < 0, masked], axis=1)
    mask = np.tile(np.arange(11) >= 3, (2, 1))
    # Column 0 has no predecessor in the one and a pad in the other.
    masked[:, 0] = longer[1][:, 3] = False
    plain = value_and_gradient(make(), tokens, masked, t, UniformWeight())
    for kind in (bool, np.int32):
        padded = value_and_gradient(make(), *longer, t, UniformWeight(), mask.astype(kind))
        np.testing.assert_allclose(padded[0], plain[0], rtol=1e-6)
        np.testing.assert_allclose(padded[1]["token_nll"][:, 3:], plain[1]["token_nll"], atol=1e-5)
        assert_trees_close(padded[2], plain[2])


def test_right_pads_are_attended_and_learned():
    tokens, masked, t = batch(1, 8)
    tokens[:, 5:], masked[:, 4:] = SMALL.pad_token_id, [True, True, False, True]
    aux = masked_diffusion_loss(make(), tokens, masked, t)[1]
    assert np.all(aux["token_nll"][0, [5, 7]] > 0)
    other = tokens.copy()
    other[0, 6] = 7  # a pad that is attended to
    moved = masked_diffusion_loss(make(), other, masked, t)[1]["token_nll"]
    assert np.abs(moved - aux["token_nll"])[0, 0 if masked[0, 0] else np.argmax(masked[0])] > 1e-6


@pytest.mark.slow
def test_bfloat16_compute_is_near():
    dream = make(dataclasses.replace(SMALL, num_hidden_layers=2))
    graphdef = split_params(abstract_model(dream.config, compute_dtype=jnp.bfloat16))[0]
    near = merge_params(graphdef, split_params(dream)[1])
    arguments = (*batch(6, 16), CartWeight(0.1))
    value, _, gradient = value_and_gradient(near, *arguments)
    wanted, _, wanted_gradient = value_and_gradient(dream, *arguments)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, wanted, rtol=0.01)
    # The floor: the gradient of a key bias is nearly all rounding.
    floor = 0.01 * max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(wanted_gradient))
    for found, exact in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        assert found.dtype == jnp.float32  # of the master weights
        assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact) + floor


def test_cross_entropy_in_bfloat16_promotes_nothing():
    """Strictly: sums in float32, gradients back in the dtype of what they are gradients of."""
    rng = np.random.default_rng(0)
    tokens, masked = (jnp.asarray(part) for part in batch()[:2])
    exact = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(3, 10, 16), (16, 264)]]

    def loss(hidden, kernel):
        weight = masked.astype(jnp.float32)
        return objective._masked_cross_entropy(None, (1, 1), False, hidden, kernel, tokens, masked, weight)[0] / 7

    wanted = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*exact)
    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*[x.astype(jnp.bfloat16) for x in exact])
    assert found[0].dtype == jnp.float32
    np.testing.assert_allclose(found[0], wanted[0], rtol=0.01)
    for near, far in zip(found[1], wanted[1], strict=True):
        assert near.dtype == jnp.bfloat16
        assert np.linalg.norm(near.astype(jnp.float32) - far) < 0.03 * np.linalg.norm(far)


def sizes(jaxpr):
    """Elements of every array in a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield math.prod(getattr(variable.aval, "shape", ()))
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_no_array_over_tokens_and_vocabulary(monkeypatch):
    config = dataclasses.replace(SMALL, vocab_size=5000)
    rows, length, chunk = 4, 32, 16
    monkeypatch.setattr(objective, "_LOGIT_ELEMENTS", chunk * config.vocab_size)
    graphdef, params = split_params(abstract_model(config))

    def loss(params, tokens, masked, t):
        return masked_diffusion_loss(merge_params(graphdef, params), tokens, masked, t)[0]

    program = jax.value_and_grad(loss)
    found = max(sizes(jax.make_jaxpr(program)(params, *batch(rows, length)).jaxpr))
    # The embedding table and the output projection are the largest things there are.
    assert chunk * config.vocab_size <= found == config.hidden_size * config.vocab_size
    assert found < rows * length * config.vocab_size / 3
    # The compiled program too: all that it keeps beside its inputs and outputs is less than the logits would be.
    memory = jax.jit(program).lower(params, *batch(rows, length)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < rows * length * config.vocab_size * 4
    naive_program = lambda params, *arguments: naive_loss(merge_params(graphdef, params), *arguments, CartWeight())[0]
    naive_sizes = sizes(jax.make_jaxpr(jax.value_and_grad(naive_program))(params, *batch(rows, length)).jaxpr)
    assert max(naive_sizes) == rows * length * config.vocab_size  # the test sees what it looks for


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: np.ones((3, 9), bool)}, "masked has shape \\(3, 9\\)"),
        ({2: np.ones(2, np.float32)}, "t has shape \\(2,\\)"),
        ({2: np.ones((3, 1), np.float32)}, "t has shape \\(3, 1\\)"),
        ({4: np.ones((3, 9), bool)}, "attention_mask has shape"),
    ],
)
def test_shapes_that_do_not_fit_raise(change, message):
    arguments = [*batch(), UniformWeight(), None]
    for index, value in change.items():
        arguments[index] = value
    with pytest.raises(ValueError, match=message):
        masked_diffusion_loss(make(), *arguments)


@pytest.mark.parametrize("ids", [SMALL.vocab_size, -100])
def test_ids_outside_the_vocabulary_raise(ids):
    tokens, masked, t = batch()
    tokens = np.array(tokens)
    tokens[0, 3] = ids
    with pytest.raises(ValueError, match="outside the vocabulary"):
        masked_diffusion_loss(make(), tokens, masked, t)


def test_a_second_call_compiles_nothing():
    model, arguments = make(), batch()
    masked_diffusion_loss(model, *arguments)
    before = objective._loss._cache_size()
    masked_diffusion_loss(model, *[np.array(argument) for argument in arguments])
    assert objective._loss._cache_size() == before


@pytest.mark.parametrize("rows", [slow(4), 3])  # rows that the mesh divides, and rows that it does not
@pytest.mark.parametrize("mesh", [slow("2x4"), "2x2x2", slow("1x1x8")])
def test_loss_under_the_mesh_of_the_model(mesh, rows):
    graphdef, params = split_params(make())
    mesh = sharding.make_mesh(mesh)
    spread = merge_params(graphdef, jax.device_put(params, sharding.parameter_shardings(params, mesh)))
    arguments = batch(rows=rows, length=16)

    @jax.grad
    def gradient(params, *arguments):
        return masked_diffusion_loss(merge_params(graphdef, params), *arguments)[0]

    found, aux = masked_diffusion_loss(spread, *arguments)
    wanted, wanted_aux = masked_diffusion_loss(make(), *arguments)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(aux["token_nll"], wanted_aux["token_nll"], rtol=1e-4, atol=1e-5)
    with jax.set_mesh(mesh):
        found = jax.jit(gradient)(split_params(spread)[1], *arguments)
    wanted = jax.jit(gradient)(params, *arguments)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_loop_over_chunks_moves_nothing_between_devices(monkeypatch):
    """Under fsdp the projection is gathered before the loop: what a step moves does not depend on the number of chunks."""
    monkeypatch.setattr(objective, "_CPU_ROWS", 4)
    graphdef, params = split_params(make())
    mesh = sharding.make_mesh("8x1")
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        params,
        sharding.parameter_shardings(params, mesh),
    )
    arguments = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.batch_sharding(mesh)) for x in batch(rows=8, length=16)
    ]

    def loss(params, *arguments):
        return masked_diffusion_loss(merge_params(graphdef, params), *arguments)[0]

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(shapes, *arguments).compile().as_text()
    once, often = (sum(one.sent for one in collectives(text, unknown_trips=trips)) for trips in (1, 100))
    assert once == often > 0


# Noise

noise = jax.jit(draw_noise, static_argnums=3)


def test_times_are_stratified():
    maskable = np.ones((32, 4), bool)
    times = []
    for seed in range(3):
        t, _ = noise(jax.random.key(seed), np.arange(32), maskable, 32)
        assert t.dtype == jnp.float32
        ordered = np.sort(t)
        # One in each of 32 equal parts of [0, 1), at the same offset in each.
        np.testing.assert_array_equal(np.floor(ordered * 32), np.arange(32))
        np.testing.assert_allclose(np.diff(ordered), 1 / 32, atol=1e-6)
        assert np.any(np.diff(t) < 0)  # shuffled
        times.append(np.asarray(t))
    assert len({float(np.sort(t)[0]) for t in times}) == 3
    assert not np.array_equal(np.argsort(times[0]), np.argsort(times[1]))


def test_times_are_uniform_over_many_steps():
    keys = jax.vmap(jax.random.key)(np.arange(4000, dtype=np.uint32))
    t = jax.jit(jax.vmap(lambda key: draw_noise(key, jnp.arange(2), jnp.ones((2, 1), bool), 2)[0]))(keys)
    first = np.asarray(t)[:, 0]  # of one row: uniform, whatever the other rows have
    assert np.max(np.abs(np.sort(first) - (np.arange(4000) + 0.5) / 4000)) < 0.03  # Kolmogorov-Smirnov at 0.1 %


def test_masks_are_drawn_at_the_rows_rate_outside_the_prompt():
    maskable = np.ones((16, 4000), bool)
    maskable[:, :1000] = False
    t, masked = noise(jax.random.key(3), np.arange(16), maskable, 16)
    assert masked.dtype == bool
    assert not np.any(masked[:, :1000])
    t, masked = np.asarray(t), np.asarray(masked)
    share = np.mean(masked[:, 1000:], axis=1)
    assert np.all(np.abs(share - t) < 4.5 * np.sqrt(t * (1 - t) / 3000) + 1e-3)
    # Independent from one position to the next, and from one row to the next.
    middle = masked[7:9, 1000:] - share[7:9, None]
    assert abs(np.mean(middle[0, 1:] * middle[0, :-1])) < 0.025
    assert abs(np.mean(middle[0] * middle[1])) < 0.025


def test_noise_belongs_to_the_row():
    """Noise depends on the row index alone: permuted rows have permuted noise, and a part of the batch has its own."""
    key, maskable = jax.random.key(5), np.random.default_rng(0).random((8, 20)) < 0.8
    t, masked = noise(key, np.arange(8), maskable, 8)
    order = np.array([3, 0, 7, 1, 6, 2, 5, 4])
    permuted = noise(key, order, maskable[order], 8)
    np.testing.assert_array_equal(permuted[0], t[order])
    np.testing.assert_array_equal(permuted[1], masked[order])
    for part in (slice(0, 3), slice(3, 8)):
        alone = noise(key, np.arange(8)[part], maskable[part], 8)
        np.testing.assert_array_equal(alone[0], t[part])
        np.testing.assert_array_equal(alone[1], masked[part])
    assert not np.array_equal(masked, noise(jax.random.key(6), np.arange(8), maskable, 8)[1])
