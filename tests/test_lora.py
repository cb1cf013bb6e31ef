"""Adapters: what they add, what is trained, what is merged, and the frozen base beneath them."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_numbers import arrays
from golden_numbers import model as golden_model

from dream_jax import lora, masks, sharding
from dream_jax.batch import Batch
from dream_jax.config import PRESETS
from dream_jax.lora import LoraConfig
from dream_jax.model import Linear, abstract_model, merge_params, parameter_count, split_params
from dream_jax.objective import masked_diffusion_loss
from dream_jax.shapes import joined
from dream_jax.train_step import (
    OptimizerConfig,
    StepConfig,
    abstract_state,
    dropout_keys,
    init_state,
    make_train_step,
    put_batch,
)

SMALL = dataclasses.replace(PRESETS["nano"], num_hidden_layers=2, hidden_size=64, intermediate_size=96)
CONFIG = LoraConfig(rank=4, alpha=8.0)


@functools.cache
def base(config=SMALL):
    graphdef, shapes = split_params(abstract_model(config))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.1, leaf.shape), leaf.dtype)

    return merge_params(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))


def adapted(config=CONFIG, model=None, seed=1):
    """An adapter that does something: B is random."""
    found = lora.attach(base() if model is None else model, config, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    for linear in lora.projections(found).values():
        if linear.lora_b is not None:
            linear.lora_b[...] = jnp.asarray(rng.normal(0, 0.1, linear.lora_b.shape), jnp.float32)
    return found


def tokens(batch=2, length=12, seed=0):
    return np.random.default_rng(seed).integers(0, 250, (batch, length)).astype(np.int32)


# What is trained


def test_a_7b_adapter_is_under_two_percent():
    """Rank 32 on every projection of Dream-7B: 80.7 million of 7.6 billion."""
    model = lora.attached_shapes(abstract_model(PRESETS["dream-7b"]), LoraConfig(rank=32, alpha=64.0))
    adapter, rest = lora.split(split_params(model)[1])
    config = model.config
    width, narrow, mlp = config.hidden_size, 4 * config.head_dim, config.intermediate_size
    pairs = 2 * (width + width) + 2 * (width + narrow) + 3 * (width + mlp)
    assert parameter_count(adapter) == 28 * 32 * pairs == 80_740_352
    assert parameter_count(rest) == config.num_parameters
    assert parameter_count(adapter) < 0.02 * config.num_parameters
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(adapter)} == {"float32"}


def test_a_new_adapter_changes_nothing_and_leaves_the_model_alone():
    model, text = base(), tokens()
    before = model(text)
    found = lora.attach(model, CONFIG, jax.random.key(0))
    np.testing.assert_array_equal(found(text), before)
    assert lora.config_of(found) == CONFIG and lora.config_of(model) is None
    for name, linear in lora.projections(found).items():
        inputs = np.prod(linear.in_shape)
        a = np.asarray(linear.lora_a[...])
        bound = 1 / np.sqrt(inputs)
        assert 0.95 * bound < np.abs(a).max() <= bound, name
        np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.1)
        assert not np.array_equal(a[0], a[1])  # layers draw their own


@pytest.mark.parametrize("mesh", ["8x1", "4x2"])
def test_a_new_adapter_lies_on_the_mesh_and_does_not_depend_on_it(mesh):
    graphdef, params = split_params(base())
    placed = jax.device_put(params, sharding.parameter_shardings(params, sharding.make_mesh(mesh)))
    found = split_params(lora.attach(merge_params(graphdef, placed), CONFIG, jax.random.key(0)))[1]
    wanted = split_params(lora.attach(base(), CONFIG, jax.random.key(0)))[1]
    places = sharding.parameter_shardings(found, sharding.make_mesh(mesh))
    adapter = lora.split(found)[0]
    for (path, leaf), one, place in zip(
        jax.tree_util.tree_leaves_with_path(adapter),
        jax.tree.leaves(lora.split(wanted)[0]),
        jax.tree.leaves(lora.split(places)[0]),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, one, err_msg=str(path))
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim), path
    # It is divided: no device holds much more than its share.
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter))
    assert max(sharding.bytes_per_device(adapter).values()) < 0.6 * whole


def test_split_is_by_name_and_joined_undoes_it():
    params = split_params(adapted())[1]
    adapter, rest = lora.split(params)
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(adapter)} == {"lora_a", "lora_b"}
    assert jax.tree.structure(joined(rest, adapter)) == jax.tree.structure(params)
    assert jax.tree.structure(rest) == jax.tree.structure(split_params(base())[1])


# What it computes


def explicit(params, config):
    """W + alpha / r A B, written out, in place of the adapter."""
    adapter, rest = lora.split(params)
    for part in ("attn", "mlp"):
        for name, pair in adapter["layers"].get(part, {}).items():
            a, b = pair["lora_a"], pair["lora_b"]
            kernel = rest["layers"][part][name]["kernel"]
            product = jnp.einsum("lir,lro->lio", a.reshape(len(a), -1, config.rank), b.reshape(len(b), config.rank, -1))
            rest["layers"][part][name] |= {
                "kernel": kernel.astype(jnp.float32) + config.alpha / config.rank * product.reshape(kernel.shape)
            }
    return rest


@pytest.mark.parametrize("targets", [lora.TARGETS, ("o", "up")])
def test_logits_and_gradients_are_those_of_the_explicit_sum(targets):
    config = LoraConfig(rank=3, alpha=5.0, targets=targets)
    model = adapted(config)
    assert lora.config_of(model) == config
    graphdef, params = split_params(model)
    plain = split_params(base())[0]
    adapter, rest = lora.split(params)
    text = jnp.asarray(tokens())

    def through_adapter(adapter):
        return merge_params(graphdef, joined(rest, adapter))(text)

    def through_sum(adapter):
        return merge_params(plain, explicit(joined(rest, adapter), config))(text)

    assert np.abs(through_adapter(adapter) - base()(text)).max() > 0.1
    np.testing.assert_allclose(through_adapter(adapter), through_sum(adapter), rtol=0, atol=1e-4)
    score = lambda logits: jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2)
    found = jax.jit(jax.grad(lambda adapter: score(through_adapter(adapter))))(adapter)
    wanted = jax.jit(jax.grad(lambda adapter: score(through_sum(adapter))))(adapter)
    for (path, one), two in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        assert np.abs(two).max() > 1e-6, path
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * np.abs(two).max(), err_msg=str(path))


@pytest.mark.parametrize("targets", [lora.TARGETS, ("k", "gate")])
def test_merged_is_base_and_adapter(targets):
    model = adapted(LoraConfig(rank=3, alpha=5.0, targets=targets))
    merged = lora.merge(model)
    assert jax.tree.structure(split_params(merged)[1]) == jax.tree.structure(split_params(base())[1])
    assert lora.config_of(merged) is None and lora.config_of(model) is not None
    text = tokens()
    np.testing.assert_allclose(merged(text), model(text), rtol=0, atol=1e-4)
    assert np.abs(merged(text) - base()(text)).max() > 0.1
    assert lora.merge(base()) is base()


def test_merging_adds_in_float32_and_rounds_once():
    params = split_params(base())[1]
    graphdef = split_params(abstract_model(SMALL, param_dtype=jnp.bfloat16))[0]
    model = adapted(model=merge_params(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)))
    found = split_params(lora.merge(model))[1]
    wanted = explicit(split_params(model)[1], CONFIG)
    for name in ("q", "o"):
        kernel = found["layers"]["attn"][name]["kernel"]
        assert kernel.dtype == jnp.bfloat16
        exact = np.asarray(wanted["layers"]["attn"][name]["kernel"], np.float32)
        assert np.all(np.abs(kernel.astype(jnp.float32) - exact) <= 2.0**-8 * np.abs(exact) + 1e-9)


# Dropout


def linear_with_adapter(dropout, width=64, rank=64):
    """A projection whose output is its (dropped) input."""
    linear = jax.eval_shape(
        lambda: Linear((width,), (width,), use_bias=False, stddev=1.0, dtype=jnp.float32, rngs=nnx_rngs())
    )
    linear.kernel, linear.lora_a = (type(linear.kernel)(value) for value in (jnp.zeros((width, width)), jnp.eye(width)))
    linear.lora_b, linear.lora_alpha, linear.lora_dropout = type(linear.kernel)(jnp.eye(width)), float(rank), dropout
    return linear


def nnx_rngs():
    from flax import nnx

    return nnx.Rngs(0)


def test_dropout_statistics():
    linear, x = linear_with_adapter(0.25), jnp.ones((8, 500, 64))
    keys = jax.random.split(jax.random.key(0), 8)
    y = np.asarray(linear(x, keys))
    np.testing.assert_allclose(np.unique(y), [0.0, 1 / 0.75], rtol=1e-6)
    # 256,000 draws: four standard errors.
    np.testing.assert_allclose(np.mean(y == 0), 0.25, atol=4 * np.sqrt(0.25 * 0.75 / y.size))
    np.testing.assert_allclose(y.mean(axis=(0, 1)), 1.0, atol=0.06)  # no channel is favoured
    assert len({row.tobytes() for row in y}) == 8
    np.testing.assert_array_equal(linear(x, keys), y)
    np.testing.assert_array_equal(linear(x[3:5], keys[3:5]), y[3:5])  # a row follows its key
    np.testing.assert_array_equal(linear(x), x)  # no key, no dropout
    np.testing.assert_array_equal(linear_with_adapter(0.0)(x, keys), x)


def test_every_layer_and_projection_drops_its_own():
    """Of one row's key each projection of each layer makes another mask."""
    seen = []
    model = adapted(LoraConfig(rank=2, alpha=1.0, dropout=0.5))
    original = jax.random.bernoulli

    def spy(key, p, shape):
        drawn = original(key, p, shape)
        jax.debug.callback(lambda data: seen.append(tuple(np.asarray(data).ravel())), jax.random.key_data(key))
        return drawn

    text = jnp.asarray(tokens(batch=1))
    keys = dropout_keys(0, 0, jnp.arange(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.random, "bernoulli", spy)
        hidden = model.hidden(text, masks.Bidirectional(), jnp.arange(12)[None], keys)
        jax.block_until_ready(hidden)
        jax.effects_barrier()
    assert len(seen) == len(set(seen)) == 7 * SMALL.num_hidden_layers
    plain = model.hidden(text, masks.Bidirectional(), jnp.arange(12)[None])
    assert np.abs(hidden - plain).max() > 1e-2


def test_keys_follow_seed_step_and_row():
    rows = jnp.arange(4)
    data = [np.asarray(jax.random.key_data(dropout_keys(seed, step, rows))) for seed, step in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(key) for keys in data for key in keys}) == 12
    permuted = jax.random.key_data(dropout_keys(0, 1, rows[::-1]))
    np.testing.assert_array_equal(permuted, data[1][::-1])


# Steps

ROWS, LENGTH, STEPS = 16, 24, 4
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, total_steps=STEPS)


def batch(step, rows=ROWS):
    rng = np.random.default_rng(step)
    text = (rng.integers(0, 256, (rows, 1)) + np.arange(LENGTH)) % 256
    maskable = np.broadcast_to(np.arange(LENGTH) >= 4, text.shape)
    return Batch(tokens_BT=text.astype(np.int32), maskable_BT=maskable, row_B=np.arange(rows, dtype=np.int32))


@functools.cache
def trained(mesh="1x1", accumulation=1, kind=None, dropout=0.2):
    """Metrics of the first steps, the adapter after them, and the frozen base."""
    model = base() if kind is None else lora.with_base(base(), kind)
    graphdef, params = split_params(lora.attach(model, dataclasses.replace(CONFIG, dropout=dropout), jax.random.key(0)))
    place = sharding.make_mesh(mesh)
    adapter, rest = lora.split(params)
    rest = jax.device_put(rest, sharding.parameter_shardings(rest, place))
    config = StepConfig(global_batch=ROWS, accumulation=accumulation)
    transform = OPTIMIZER.make()
    step = make_train_step(graphdef, transform, OPTIMIZER.schedule(), config, place)
    state, found = init_state(adapter, transform, place), []
    for number in range(STEPS):
        state, metrics = step(state, put_batch(batch(number), place), rest)
        found.append([float(metrics[name]) for name in ("loss", "grad_norm")])
    return np.array(found), state, rest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "accumulation", "kind"),
    [("4x2", 2, None), ("2x2x2", 1, "nf4")],
)
def test_meshes_and_accumulation_change_nothing(mesh, accumulation, kind):
    """With dropout on: what a row does not see follows from seed, step and row alone."""
    wanted, found = trained(kind=kind)[0], trained(mesh, accumulation, kind)[0]
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], wanted[:, 1], rtol=1e-4)
    if kind is None:
        assert np.abs(trained(dropout=0.0)[0][1:, 0] / wanted[1:, 0] - 1).max() > 1e-4  # it does drop something


@pytest.mark.slow
def test_only_the_adapter_is_trained_and_kept():
    _, state, rest = trained(kind="nf4")
    graphdef, params = split_params(lora.attach(lora.with_base(base(), "nf4"), CONFIG, jax.random.key(0)))
    data, t = batch(0), np.full(ROWS, 0.5, np.float32)
    masked = data.maskable_BT & (np.random.default_rng(0).random((ROWS, LENGTH)) < 0.5)
    before, after = (
        float(masked_diffusion_loss(merge_params(graphdef, joined(rest, adapter)), data.tokens_BT, masked, t)[0])
        for adapter in (lora.split(params)[0], state.params)
    )
    assert after < before - 0.02
    leaves = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(state.params)}
    assert leaves == {"lora_a", "lora_b"}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert parameter_count(moments) == 2 * parameter_count(state.params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(rest))
    for linear in state.params["layers"]["attn"].values():
        assert np.abs(linear["lora_b"]).max() > 1e-3


def lowered(config, kind=None, remat="none", frozen=True, rows=ROWS, accumulation=1):
    """The step for shapes: with an adapter on a frozen base, or of all parameters."""
    model, mesh = abstract_model(config, remat=remat), sharding.make_mesh("1x1")
    if frozen:
        model = lora.attached_shapes(model, CONFIG)
        model = model if kind is None else lora.with_base_shapes(model, kind)
    graphdef, params = split_params(model)
    trained, rest = lora.split(params) if frozen else (params, {})
    transform = OPTIMIZER.make()
    step_config = StepConfig(global_batch=rows, accumulation=accumulation)
    step = make_train_step(graphdef, transform, OPTIMIZER.schedule(), step_config, mesh)
    return step.lower(abstract_state(trained, transform, mesh), put_batch(batch(0, rows), mesh), rest)


def products(lowered):
    """Shapes of the results of all matrix products, before any compiler has dropped those that nobody reads."""
    found = re.findall(r"stablehlo.dot_general .*-> tensor<([\dx]*)x[a-z]\w*>", lowered.as_text())
    return {tuple(int(size) for size in shape.split("x") if size != "1") for shape in found}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_gradient_of_a_frozen_kernel_is_formed(accumulation):
    # No other product has a result of these shapes.
    config = dataclasses.replace(SMALL, vocab_size=1111, intermediate_size=112)
    width, mlp, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    kernels = {(width, mlp), (mlp, width), (width, vocab), (vocab, width)}
    everything = products(lowered(config, frozen=False, accumulation=accumulation))
    assert {frozenset(shape) for shape in everything & kernels} == {frozenset((width, mlp)), frozenset((width, vocab))}
    assert not products(lowered(config, accumulation=accumulation)) & kernels
    assert not products(lowered(config, "nf4", accumulation=accumulation)) & kernels


@functools.cache
def grown(kind, remat):
    """Bytes of temporaries that one more layer costs, and its kernels."""
    sizes = {}
    for layers in (4, 12):
        config = dataclasses.replace(SMALL, num_hidden_layers=layers, hidden_size=128, intermediate_size=512)
        sizes[layers] = lowered(config, kind, remat, rows=1).compile().memory_analysis().temp_size_in_bytes
    return (sizes[12] - sizes[4]) / 8, parameter_count(abstract_model(config).layers) // 12


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.optimised
def test_no_second_copy_of_the_base_exists(remat):
    """Kernels are dequantised layer by layer, in the backward pass again: temporaries do not grow with depth by them."""
    size, kernels = grown("nf4", remat)
    activations = 24 * (11 * 128 + 3 * 512 + 7 * CONFIG.rank + 8 * 24)  # one row of 24 tokens
    # A copy in the compute dtype (float32 here) would be 4 bytes a weight.
    assert size < 4 * 2 * activations + 0.25 * kernels, (size, kernels)


@pytest.mark.slow
@pytest.mark.optimised
def test_no_second_copy_of_the_codes_exists():
    """They are found in the stack of all layers; one of int8 would be half a byte a weight larger than one of nf4."""
    assert grown("int8", "none") == grown("nf4", "none")


# The frozen base


def test_quantised_bases_run_and_their_error_is_told(capsys):
    """On the published layout's tiny checkpoint, whose logits are recorded."""
    golden, model = arrays("tiny_a"), golden_model("tiny_a")
    exact, errors = model(golden["fwd_tokens"]), {}
    for kind in lora.KINDS:
        quantised = lora.with_base(model, kind)
        assert lora.base_of(quantised) == kind
        errors[kind] = lora.logit_error(exact, quantised(golden["fwd_tokens"]))
        with capsys.disabled():
            print(f"\n{kind}: {errors[kind]}")
    # Of normal weights in blocks of 64 the codes miss 0.6 % (int8) and 9.2 % (nf4), as root mean squares: 15 times.
    assert 1e-3 < errors["int8"]["relative"] < 0.05
    assert 8 < errors["nf4"]["relative"] / errors["int8"]["relative"] < 32
    assert errors["int8"]["kl"] < 0.01 < errors["nf4"]["kl"] and errors["int8"]["same_top"] > 0.95
    same = lora.logit_error(exact, exact)
    assert same["relative"] == 0.0 and same["same_top"] == 1.0 and abs(same["kl"]) < 1e-6


def test_quantised_bytes():
    layers = split_params(lora.with_base_shapes(abstract_model(PRESETS["dream-7b"]), "nf4"))[1]["layers"]
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
    weights = parameter_count(abstract_model(PRESETS["dream-7b"]).layers)
    assert nbytes / weights == pytest.approx(0.5 + 4 / 64, rel=1e-3)
    whole = split_params(lora.with_base_shapes(abstract_model(PRESETS["dream-7b"], param_dtype=jnp.bfloat16), "nf4"))[1]
    # README: a base of 5.9 GB.
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(whole)) == pytest.approx(5.85e9, rel=0.002)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_merging_into_a_quantised_base(kind):
    model = lora.with_base(base(), kind)
    both = adapted(model=model)
    with pytest.raises(ValueError, match=f"the base is {kind}, which cannot store the sum: load the float base"):
        lora.merge(both)
    merged = lora.merge(both, dequantised=True)
    assert lora.base_of(merged) == "float32" and lora.config_of(merged) is None
    np.testing.assert_allclose(merged(tokens()), both(tokens()), rtol=0, atol=1e-4)
    plain = lora.merge(model, dequantised=True)
    np.testing.assert_allclose(plain(tokens()), model(tokens()), rtol=0, atol=1e-4)


def test_a_base_in_bfloat16_compute():
    """Codes and scales are not rounded to the compute dtype on their way into a layer."""
    model = lora.with_base(base(), "int8")
    params = split_params(model)[1]
    graphdef = split_params(lora.with_base_shapes(abstract_model(SMALL, compute_dtype=jnp.bfloat16), "int8"))[0]
    near = merge_params(graphdef, params)(tokens())
    float_graphdef = split_params(abstract_model(SMALL, compute_dtype=jnp.bfloat16))[0]
    wanted = merge_params(float_graphdef, split_params(lora.merge(model, dequantised=True))[1])(tokens())
    np.testing.assert_allclose(near, wanted, rtol=0, atol=1e-5)


# Identity


@pytest.mark.slow
def test_identity_is_of_the_weights_alone():
    model, found = base(), lora.identity(base())
    assert re.fullmatch("[0-9a-f]{64}", found)
    assert lora.identity(adapted()) == found
    assert lora.identity(lora.with_base(model, "nf4")) == found
    graphdef, params = split_params(model)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    assert lora.identity(merge_params(graphdef, half)) == found
    for mesh in ("8x1", "4x2"):
        placed = jax.device_put(params, sharding.parameter_shardings(params, sharding.make_mesh(mesh)))
        assert lora.identity(merge_params(graphdef, placed)) == found
    # Layer by layer, as a checkpoint is read.
    outside = {name: value for name, value in params.items() if name != "layers"}
    pieces = lora.prints(outside, None)
    for layer in range(SMALL.num_hidden_layers):
        pieces += lora.prints({"layers": jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])}, layer)
    assert lora.digest(pieces) == found


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("mesh", ["1x1", "4x2"])
def test_identity_needs_little_memory_and_moves_no_weights(dtype, mesh):
    """A 7B model is told from another where it just fits."""
    config = dataclasses.replace(SMALL, hidden_size=384, num_attention_heads=24, vocab_size=8192)
    model = abstract_model(config, param_dtype=dtype)
    params, place = split_params(model)[1], sharding.make_mesh(mesh)
    places = sharding.parameter_shardings(params, place)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        where = functools.reduce(lambda tree, part: tree[part.key], path, places)
        with jax.set_mesh(place):
            shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
            compiled = lora._sums.lower(shape, path[0].key == "layers").compile()
        size = compiled.memory_analysis()
        # In four bytes a weight: a quarter of a matrix at a time, or less. Of bfloat16 a CPU makes one copy, as integers.
        bound = {"float32": 0.3, "bfloat16": 1.6}[dtype] * size.argument_size_in_bytes
        assert size.temp_size_in_bytes < bound + 10_000, path
        assert "all-gather" not in compiled.as_text(), path


def test_identity_sees_every_change():
    graphdef, params = split_params(base())
    leaves, structure = jax.tree.flatten(params)
    seen = {lora.identity(base())}
    for number, leaf in enumerate(leaves):
        moved = leaf.ravel().at[-1].multiply(1.01).reshape(leaf.shape)
        swapped = jnp.flip(leaf, axis=0)  # the same numbers, elsewhere
        for other in (moved, swapped):
            changed = [other if place == number else one for place, one in enumerate(leaves)]
            seen.add(lora.identity(merge_params(graphdef, jax.tree.unflatten(structure, changed))))
    assert len(seen) == 1 + 2 * len(leaves)
    assert lora.identity(lora.merge(adapted())) not in seen


# Refusals


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"rank": True}, "rank=True"),
        ({"alpha": 0.0}, "alpha=0.0 must be a positive number"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, "dropout=1.0 is outside"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"targets": ("q", "gates")}, "gates"),
        ({"targets": ()}, "must be some of q, k, v"),
        ({"targets": ("q", "q")}, "none of them twice"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"rank": 4, "alpha": 8.0} | change)


def test_targets_are_read():
    assert lora.parse_targets("all") == lora.TARGETS
    assert lora.parse_targets("v, q") == ("q", "v") == LoraConfig(rank=1, alpha=1.0, targets=("v", "q")).targets
    for text in ("", "q,,v", "q,z", "q,q", "qkv", "all,q"):
        with pytest.raises(ValueError, match="neither all nor some of q,k,v"):
            lora.parse_targets(text)


def test_models_that_are_refused():
    with pytest.raises(ValueError, match="has an adapter already"):
        lora.attach(adapted(), CONFIG, jax.random.key(0))
    with pytest.raises(ValueError, match="nf4 already"):
        lora.with_base(lora.with_base(base(), "nf4"), "int8")
    lost = lora.with_base(base(), "nf4")
    lost.base_identity = None
    with pytest.raises(ValueError, match="not known which weights"):
        lora.identity(lost)


def test_dropout_reaches_the_loss():
    model, text = adapted(LoraConfig(rank=4, alpha=8.0, dropout=0.5)), tokens()
    masked, t = text % 2 == 0, np.full(2, 0.5, np.float32)
    plain, _ = masked_diffusion_loss(model, text, masked, t)
    dropped, _ = masked_diffusion_loss(model, text, masked, t, dropout_keys=dropout_keys(0, 0, jnp.arange(2)))
    assert abs(float(plain) - float(dropped)) > 1e-3
