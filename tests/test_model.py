"""The transformer computes what the published one does, in one scan, in both directions."""

import dataclasses
import functools
import time
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_numbers import CHECKPOINTS, arrays, model

from dream_jax import masks, sharding
from dream_jax.attention import Window
from dream_jax.config import PRESETS
from dream_jax.model import (
    Dream,
    RMSNorm,
    abstract_model,
    merge_params,
    padded_positions,
    parameter_count,
    rotary_angles,
    rotate,
    rotation,
    split_params,
)
from dream_jax.remat import Remat
from dream_jax.target import target_platform

SMALL = dataclasses.replace(PRESETS["nano"], num_hidden_layers=2, hidden_size=64, intermediate_size=96)
TIED = dataclasses.replace(SMALL, tie_word_embeddings=True)


@functools.cache
def make(config=SMALL, seed=0):
    """A model whose weights are large enough that every part of it shows."""
    graphdef, shapes = split_params(abstract_model(config))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        return jnp.asarray(rng.normal(path[-1].key == "scale", 0.1, leaf.shape), leaf.dtype)

    return merge_params(graphdef, jax.tree_util.tree_map_with_path(draw, shapes))


def remade(model, **options):
    """The same weights under other options."""
    graphdef = split_params(abstract_model(model.config, **options))[0]
    return merge_params(graphdef, split_params(model)[1])


def tokens(batch=2, length=12, config=SMALL, seed=0):
    return np.random.default_rng(seed).integers(0, 250, (batch, length)).astype(np.int32)


# Published numbers


@pytest.mark.optimised
@pytest.mark.parametrize("name", CHECKPOINTS)
class TestPublished:
    def test_logits(self, name):
        golden = arrays(name)
        logits = model(name)(golden["fwd_tokens"])
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, golden["fwd_logits"], rtol=0, atol=1e-4)

    @pytest.mark.parametrize("given", [True, False])
    def test_left_padded_logits(self, name, given):
        golden = arrays(name)
        valid = golden["pad_mask"].astype(bool)
        assert not np.all(valid)
        positions = golden["pad_positions"] if given else None
        logits = model(name)(golden["pad_tokens"], golden["pad_mask"], positions)
        np.testing.assert_allclose(logits[valid], golden["pad_logits"][valid], rtol=0, atol=1e-4)
        np.testing.assert_array_equal(padded_positions(jnp.asarray(valid)), golden["pad_positions"])

    def test_hidden_states(self, name):
        """Embedding and each layer by itself, from the published input of the layer to its published output."""
        golden, dream = arrays(name), model(name)
        shape = golden["fwd_tokens"].shape
        positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        turn = rotation(positions, dream.config.head_dim, dream.config.rope_theta)
        x = dream.embed(jnp.asarray(golden["fwd_tokens"]))
        np.testing.assert_array_equal(x, golden["fwd_hidden_0"])
        last = dream.config.num_hidden_layers
        for number in range(last):
            layer = jax.tree.map(lambda leaf, number=number: leaf[number], dream.layers)
            x = jnp.asarray(golden[f"fwd_hidden_{number}"])
            x, _ = jax.jit(lambda layer, x: layer(x, turn, masks.Bidirectional(), "auto"))(layer, x)
            if number == last - 1:  # the last one is published after the final norm
                x = dream.norm(x)
            np.testing.assert_allclose(x, golden[f"fwd_hidden_{number + 1}"], rtol=0, atol=1e-5)

    def test_hidden_after_the_scan(self, name):
        golden, dream = arrays(name), model(name)
        shape = golden["fwd_tokens"].shape
        positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
        hidden = dream.hidden(jnp.asarray(golden["fwd_tokens"]), masks.Bidirectional(), positions)
        wanted = golden[f"fwd_hidden_{dream.config.num_hidden_layers}"]
        np.testing.assert_allclose(hidden, wanted, rtol=0, atol=1e-4)
        np.testing.assert_allclose(dream.unembed(hidden), golden["fwd_logits"], rtol=0, atol=1e-4)


# Windows over a KV cache


def test_a_window_sees_what_was_kept():
    """A window gives the hidden states of a full pass if no token outside it has changed; otherwise its cache is stale."""
    dream = make()
    text = jnp.asarray(tokens())
    positions = jnp.broadcast_to(jnp.arange(12), text.shape)
    valid = jnp.asarray(np.arange(12) >= [[0], [3]])
    mask = masks.KeyPadding(valid)
    whole, kv_cache = dream.hidden_and_kv_cache(text, mask, positions)
    np.testing.assert_array_equal(whole, dream.hidden(text, mask, positions))
    assert kv_cache.k.shape == kv_cache.v.shape == (2, 2, 12, 4, 8)  # [L, B, S, K, H]

    position = jnp.array([[2, 3, 4], [7, 8, 9]])
    rows = jnp.arange(2)[:, None]
    look = jax.jit(
        lambda text, kv_cache, where: dream.hidden_window(text[rows, position], mask, position, Window(kv_cache, where))
    )
    found, after = look(text, kv_cache, position)
    np.testing.assert_allclose(found, whole[rows, position], rtol=0, atol=1e-5)
    np.testing.assert_allclose(after.k, kv_cache.k, rtol=0, atol=1e-5)

    # Another token inside the window: the first layer sees it as a full pass does; the cache outside the window stays.
    other = text.at[rows, position[:, 1:2]].add(1)
    found, after = look(other, kv_cache, position)
    _, fresh = dream.hidden_and_kv_cache(other, mask, positions)
    np.testing.assert_allclose(after.k[0], fresh.k[0], rtol=0, atol=1e-5)
    outside = np.ones((2, 12), bool)
    outside[rows, position] = False
    np.testing.assert_array_equal(np.asarray(after.v)[:, outside], np.asarray(kv_cache.v)[:, outside])
    assert not np.allclose(np.asarray(after.v)[1][~outside], np.asarray(kv_cache.v)[1][~outside], atol=1e-3)
    # At positions past the end the window's keys and values are neither attended to nor cached.
    unseen, after = look(other, kv_cache, jnp.full_like(position, 12))
    np.testing.assert_array_equal(after.k, kv_cache.k)
    np.testing.assert_allclose(unseen[:, 0], whole[rows, position][:, 0], rtol=0, atol=1e-5)
    assert not np.allclose(found[:, 0], unseen[:, 0], atol=1e-3)


# Parts


@pytest.mark.parametrize(
    ("dtype", "stored"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
def test_rmsnorm(dtype, stored):
    """The last case is the final norm of a model with float32 masters, which no layer's cast has reached."""
    rng = np.random.default_rng(0)
    norm = RMSNorm(96, epsilon=1e-3, dtype=jnp.dtype(stored))
    norm.scale[...] = jnp.asarray(rng.normal(1, 0.3, 96), norm.scale[...].dtype)
    x = jnp.asarray(rng.normal(0, 0.05, (2, 5, 96)), jnp.dtype(dtype))
    out = norm(x)
    assert out.dtype == dtype
    x64 = np.asarray(x, np.float64)
    wanted = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-3) * np.asarray(norm.scale[...], np.float64)
    # Up to three roundings to the dtype, each of half a unit in the last place.
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=1e-6 if dtype == "float32" else 3 * 2**-8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rotary_embedding(dtype):
    rng = np.random.default_rng(1)
    positions = np.array([[0, 1, 255, 256, 257, 2047]])
    x = jnp.asarray(rng.normal(size=(1, 6, 3, 8)), jnp.dtype(dtype))
    angles = rotary_angles(jnp.asarray(positions), 8, 10_000.0)
    assert (angles.dtype, angles.shape) == (jnp.float32, (1, 6, 1, 4))
    wanted_angles = positions[..., None, None] / 10_000.0 ** (np.arange(4) / 4)
    np.testing.assert_allclose(angles, wanted_angles, rtol=3e-7)
    assert angles[0, 4, 0, 0] == 257
    out = rotate(x, rotation(jnp.asarray(positions), 8, 10_000.0))
    assert out.dtype == dtype
    # As complex numbers: channel i is the real part, channel i + H/2 the imaginary one.
    x64 = np.asarray(x, np.float64)
    turned = (x64[..., :4] + 1j * x64[..., 4:]) * np.exp(1j * np.asarray(angles, np.float64))
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    tolerance = 1e-6 if dtype == "float32" else 2**-8 * np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=0, atol=tolerance)


def test_positions_stay_exact_under_bfloat16():
    """bfloat16 has no 257: rounded positions would make these two calls the same."""
    exact = make(SMALL)
    rounded = remade(exact, compute_dtype=jnp.bfloat16)
    text = tokens(4, 6)
    far, near = (np.broadcast_to(np.array([0, 1, 2, 3, 4, last]), text.shape) for last in (257, 256))
    truth = exact(text, None, far)
    moved = np.linalg.norm(exact(text, None, near) - truth)
    np.testing.assert_array_less(np.linalg.norm(rounded(text, None, far) - truth), moved / 2)


def test_every_parameter_matters():
    """Perturb any one, biases included: the logits move."""
    dream = make()
    graphdef, params = split_params(dream)
    text, before = tokens(), dream(tokens())
    leaves, structure = jax.tree.flatten(params)
    for number, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        # Unevenly: a constant added to all keys changes no softmax.
        noise = jnp.asarray(np.random.default_rng(7).normal(0, 0.1, leaves[number].shape), jnp.float32)
        changed = [leaf + noise if index == number else leaf for index, leaf in enumerate(leaves)]
        after = merge_params(graphdef, jax.tree.unflatten(structure, changed))(text)
        name = jax.tree_util.keystr(path)
        if name == "['layers']['attn']['k']['bias']":
            # Moves a query's scores by the same for all keys but for their rotation, which depends on the position.
            assert np.abs(after - before).max() > 1e-6, name
        else:
            assert np.abs(after - before).max() > 1e-2, name


def test_split_and_merge_are_inverse():
    dream = make()
    again = merge_params(*split_params(dream))
    assert again.config == dream.config
    np.testing.assert_array_equal(again(tokens()), dream(tokens()))
    assert parameter_count(split_params(dream)[1]) == SMALL.num_parameters


# Behaviour


def test_attention_goes_both_ways():
    dream, text = make(), tokens(1)
    changed = text.copy()
    changed[0, -1] += 1
    moved = np.abs(dream(changed) - dream(text)).max(axis=-1)[0]
    assert np.all(moved > 1e-4)


def test_rows_do_not_see_each_other():
    dream, text = make(), tokens(3)
    whole = dream(text)
    for row in range(3):
        np.testing.assert_allclose(whole[row : row + 1], dream(text[row : row + 1]), rtol=0, atol=1e-5)


def test_padding_changes_nothing_for_real_tokens():
    dream, text = make(), tokens(2, 8)
    padded = np.concatenate([np.full((2, 3), SMALL.pad_token_id, np.int32), text], axis=1)
    valid = np.arange(11) >= 3
    for attention_mask in (np.tile(valid, (2, 1)), np.tile(valid, (2, 1)).astype(np.int32)):
        logits = dream(padded, attention_mask)
        np.testing.assert_allclose(logits[:, 3:], dream(text), rtol=0, atol=1e-5)
        assert np.all(np.isfinite(logits))
    other = padded.copy()
    other[:, :3] = 5
    np.testing.assert_array_equal(dream(other, attention_mask)[:, 3:], logits[:, 3:])


def test_packed_texts_are_as_if_alone():
    dream = make()
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    segments = np.array([[1] * 5 + [2] * 7])
    positions = np.concatenate([np.arange(5), np.arange(7)])[None]
    packed = dream(np.concatenate([first, second], axis=1), masks.Segments(segments, segments), positions)
    np.testing.assert_allclose(packed[:, :5], dream(first), rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:], dream(second), rtol=0, atol=1e-5)


def test_only_differences_of_positions_matter():
    dream, text = make(), tokens()
    positions = np.broadcast_to(np.arange(12), text.shape)
    np.testing.assert_allclose(dream(text, None, positions + 100), dream(text), rtol=0, atol=1e-4)
    assert np.abs(dream(text, None, positions * 2) - dream(text)).max() > 1e-2


def test_tied_embeddings():
    dream, text = make(TIED), tokens()
    params = split_params(dream)[1]
    assert "lm_head" not in params
    assert parameter_count(params) == TIED.num_parameters
    table = params["embed"]["embedding"]
    untied = merge_params(split_params(abstract_model(SMALL))[0], params | {"lm_head": {"kernel": table.T}})
    np.testing.assert_allclose(dream(text), untied(text), rtol=0, atol=1e-5)


def test_bfloat16_compute_is_near():
    dream = make()
    near = remade(dream, compute_dtype=jnp.bfloat16)
    assert near.compute_dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(split_params(near)[1])} == {jnp.dtype("float32")}
    wanted, logits = dream(tokens()), near(tokens())
    assert logits.dtype == jnp.float32
    error = np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < error < 0.02  # something was rounded, and not much


def test_compute_dtype_is_that_of_the_parameters():
    dream = jax.jit(lambda: Dream(SMALL, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))()
    assert dream.compute_dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(split_params(dream)[1])} == {jnp.dtype("bfloat16")}
    logits = dream(tokens())
    assert logits.dtype == jnp.float32
    assert np.all(np.isfinite(logits))


def loss_gradient(dream, text):
    """Lowers a program with forward and backward pass, as training has it."""
    graphdef, params = split_params(dream)

    def loss(params, text):
        return jnp.mean(jax.nn.logsumexp(merge_params(graphdef, params)(text), axis=-1) ** 2)

    return jax.jit(jax.grad(loss)).lower(params, text), params


@pytest.mark.slow
@pytest.mark.optimised
def test_remat_changes_memory_and_nothing_else():
    dream = make(dataclasses.replace(SMALL, num_hidden_layers=4))
    text, gradients, temporary = tokens(4, 32), {}, {}
    for remat in get_args(Remat):
        lowered, params = loss_gradient(remade(dream, remat=remat), text)
        compiled = lowered.compile()
        gradients[remat], temporary[remat] = compiled(params, text), compiled.memory_analysis().temp_size_in_bytes
    assert temporary["none"] > temporary["products"] > temporary["except-mlp"] > temporary["full"]
    assert temporary["none"] > temporary["dots"] > temporary["full"]
    for remat in get_args(Remat):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max()),
            gradients[remat],
            gradients["none"],
        )


@pytest.mark.parametrize("remat", ["full", "offload"])
def test_offload_moves_what_each_layer_is_given_to_the_host_and_back(remat):
    # In what is asked of the compiler: a CPU has one memory, and moves nothing.
    dream, text = remade(make(), remat=remat), tokens(2, 8)
    graphdef, params = split_params(dream)
    asked = str(jax.make_jaxpr(jax.grad(lambda params: jnp.sum(merge_params(graphdef, params)(text))))(params))
    moves = {name: f"devices=(MemorySpace.{name},)" in asked for name in ("Host", "Device")}
    assert moves == dict.fromkeys(("Host", "Device"), remat == "offload")


def test_context_parallelism_splits_activations():
    """Each device's share of what the backward pass keeps shrinks with the devices that share a row."""
    dream, text, temporary = make(dataclasses.replace(SMALL, num_hidden_layers=4)), tokens(1, 64), {}
    for mesh in ("1x1x1", "1x1x4"):
        with jax.set_mesh(sharding.make_mesh(mesh)):
            temporary[mesh] = loss_gradient(dream, text)[0].compile().memory_analysis().temp_size_in_bytes
    assert temporary["1x1x4"] < 0.5 * temporary["1x1x1"]


@pytest.mark.parametrize("config", [SMALL, TIED], ids=["untied", "tied"])
def test_pad_row_learns_nothing_from_the_lookup(config):
    dream, text = make(config), tokens(config=config)
    text[:, 3:5], text[:, 6] = config.pad_token_id, 7
    lookup = jax.jit(jax.grad(lambda embed: jnp.sum(embed(jnp.asarray(text)) ** 2)))(dream.embed).embedding[...]
    assert not np.any(lookup[config.pad_token_id])
    assert np.all(lookup[7])
    lowered, params = loss_gradient(dream, text)
    whole = lowered.compile()(params, text)["embed"]["embedding"]
    # As an output, the row of the tied table does learn.
    assert np.any(whole[config.pad_token_id]) == config.tie_word_embeddings


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.usefixtures("compiled_anew")
def test_compile_time_does_not_grow_with_depth():
    def seconds(layers):
        jax.clear_caches()
        dream = abstract_model(dataclasses.replace(PRESETS["nano"], num_hidden_layers=layers))
        start = time.perf_counter()
        loss_gradient(dream, tokens(2, 16))[0].compile()
        return time.perf_counter() - start

    seconds(4)  # what only the first compilation pays for
    shallow, deep = [], []
    for _ in range(2):  # alternating: what else the machine does hits both
        shallow.append(seconds(4))
        deep.append(seconds(28))
    assert min(deep) < 1.5 * min(shallow), (shallow, deep)


# Refusals


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((tokens()[0],), "expected \\[batch, tokens\\]"),
        ((tokens(), np.ones((2, 11), bool)), "attention_mask has shape \\(2, 11\\), but the tokens have \\(2, 12\\)"),
        ((tokens(), np.ones((1, 12), bool)), "attention_mask has shape"),
        ((tokens(), None, np.zeros((2, 13), np.int32)), "positions have shape"),
        ((tokens(), None, np.arange(12)), "positions have shape"),
        ((tokens(), masks.KeyPadding(np.ones((2, 11), bool))), "is for 11 keys, but there are 12"),
    ],
)
def test_shapes_that_do_not_fit_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        make()(*arguments)


@pytest.mark.usefixtures("unchecked")
def test_unknown_remat_raises():
    with pytest.raises(ValueError, match="everything"):
        Dream(SMALL, rngs=nnx.Rngs(0), remat="everything")


@pytest.mark.parametrize("ids", [[[3, SMALL.vocab_size]], [[-1, 3]]])
def test_ids_outside_the_vocabulary_raise(ids):
    for tokens in (np.array(ids), jnp.array(ids)):
        with pytest.raises(ValueError, match=f"outside the vocabulary 0..{SMALL.vocab_size - 1}"):
            make()(tokens)


def test_logits_lie_on_the_mesh_of_the_model():
    """Not whole on every device: at 7B and a long batch that would be gigabytes on each."""
    graphdef, params = split_params(make())
    mesh = sharding.make_mesh("4x2")
    spread = merge_params(graphdef, jax.device_put(params, sharding.parameter_shardings(params, mesh)))
    logits = spread(tokens(batch=4))
    np.testing.assert_allclose(logits, make()(tokens(batch=4)), atol=1e-5)
    batch, length, vocab = logits.shape
    assert logits.sharding.shard_shape(logits.shape) == (batch // 4, length, vocab // 2)


@pytest.mark.parametrize(
    ("platform", "layers", "has_barrier"),
    [("gpu", "stacked", False), ("gpu", "apart", True), ("tpu", "stacked", True), ("cpu", "stacked", True)],
)
def test_casts_stay_in_the_loop_over_layers(platform, layers, has_barrier):
    """A barrier keeps the casts of weights where they are; XLA for GPUs keeps those of a stack without one."""
    options = {"compute_dtype": jnp.bfloat16, "layers": layers, "attention_backend": "xla"}
    model = abstract_model(dataclasses.replace(SMALL, num_hidden_layers=1), **options)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    with target_platform(platform):
        traced = jax.make_jaxpr(lambda model, ids: model.hidden(ids, masks.Bidirectional(), ids))(model, ids)
    assert ("optimization_barrier" in str(traced)) == has_barrier
