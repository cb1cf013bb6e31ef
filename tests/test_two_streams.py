"""The attention of two streams computes what the mask says, and only the keys that it needs."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from jax.sharding import NamedSharding, PartitionSpec
from marking import slow
from test_block_diffusion import batch, model, noised

from dream_jax import PRESETS, layer_forms, masks, sharding
from dream_jax import attention as attention_module
from dream_jax.attention import Sources, splash_streams, two_streams, xla
from dream_jax.flops import FlopCounter
from dream_jax.model import TokenSources, abstract_model, merge_params, padded_positions, split_params
from dream_jax.plan import arithmetic
from dream_jax.plan.hardware import find_hardware
from dream_jax.step_memory import matrix_count
from dream_jax.trainer import TrainSettings
from dream_jax.trainer.build import abstract_step, step_shape

TOKENS = 150  # two chunks, the last of which is not full
ROWS = [(0, 0), (7, 90), (20, 3)]  # for each row the padding on the left and the length of the prompt


def answers():
    """True at the tokens of the answers, and at the valid tokens, each [B, T]."""
    left, prompt = np.array(ROWS).T[:, :, None]
    return np.arange(TOKENS) >= left + prompt, np.arange(TOKENS) >= left


def mask_of(kind, size):
    """The mask of one stream, and which tokens are answers."""
    answer, valid = answers()
    if kind == "fixed":
        return masks.BlockDiffusion(size), np.ones((1, TOKENS), bool)
    if kind == "rows":
        return masks.BlockDiffusion(size).for_rows(valid, answer) & masks.KeyPadding(valid), answer
    lengths = np.array([[60, 80], [140, 0]])
    packed = masks.Packed(lengths)
    position = np.asarray(packed.positions(TOKENS))
    answer = (position >= [[10], [100]]) & np.asarray(packed.valid(TOKENS))
    return masks.BlockDiffusion(size).for_texts(position, answer) & packed, answer


def sources_of(mask, rows):
    starts = (masks.starts_of_blocks(mask, TOKENS), masks.starts_of_texts(mask, TOKENS))
    return TokenSources(*(jnp.broadcast_to(one, (rows, TOKENS)) for one in starts))


def cases(kind, size):
    """Pairs of a mask of both streams and the queries [B, T] that count: those of both streams, and the sources."""
    mask, answer = mask_of(kind, size)
    streams = masks.two_streams(mask)
    clean = answers()[1] if kind == "rows" else np.ones_like(answer)
    sources = Sources(streams, sources_of(mask, len(answer)).indices())
    return [(streams, np.concatenate([answer, clean], axis=1)), (sources, answer)]


@pytest.mark.parametrize("size", [slow(1), 4, slow(16), slow(400)])
@pytest.mark.parametrize("kind", ["fixed", "rows", "packed"])
def test_chunks_have_all_keys_that_their_queries_see(kind, size):
    for mask, counts in cases(kind, size):
        dense = np.asarray(mask.dense(counts.shape[1], 2 * TOKENS)) & counts[..., None]
        found = two_streams.chunks(mask, counts.shape[1], 2 * TOKENS)
        assert [chunk.queries[0] for chunk in found] == [0, *(chunk.queries[1] for chunk in found)][:-1]
        stop = None if isinstance(mask, Sources) else np.asarray(two_streams.spans(mask, TOKENS)[1])
        for chunk in found:
            seen = dense[:, slice(*chunk.queries)].any(axis=(0, 1))
            start, end = (index - TOKENS for index in chunk.queries)
            keys = chunk.keys
            if chunk.more and stop[:, start:end].max() > keys[-1][1] - TOKENS:
                keys = chunk.more
            computed = np.zeros(2 * TOKENS, bool)
            for span in keys:
                computed[slice(*span)] = True
            assert not (seen & ~computed).any()


@pytest.mark.parametrize("size", [slow(1), 4, slow(16), slow(400)])
@pytest.mark.parametrize("kind", ["rows", "packed"])
def test_splash_computes_the_mask_of_each_row_from_one_number(kind, size):
    """The tiles have all keys that a query sees, and the function of the kernel gives the mask within them."""
    for mask, counts in cases(kind, size):
        of_sources = isinstance(mask, Sources)
        streams = mask.mask if of_sources else mask
        only_blocks = next(part for part in masks.conjuncts(streams) if hasattr(part, "size"))
        others = next(part for part in masks.conjuncts(streams) if part is not only_blocks)
        wanted = np.asarray(mask.dense(counts.shape[1], 2 * TOKENS))
        blocks = splash_streams.StreamBlocks(size, TOKENS, of_sources)
        tiles = blocks.tiles((counts.shape[1], 2 * TOKENS))
        code = jnp.broadcast_to(splash_streams.codes(mask, 2 * TOKENS), counts.shape)
        seen = np.asarray(tiles.mask_function(code[:, :, None], jnp.arange(2 * TOKENS)))
        rest = Sources(others, mask.source_BT) if of_sources and isinstance(others, masks.Segments) else others
        seen = seen & np.asarray(rest.dense(counts.shape[1], 2 * TOKENS))
        np.testing.assert_array_equal(seen[counts], wanted[counts])
        possible = tiles[slice(0, counts.shape[1]), slice(0, 2 * TOKENS)]
        assert not (wanted[counts] & ~np.broadcast_to(possible, wanted.shape)[counts]).any()


def results(attend, mask, counts, heads=2):
    """The outputs of the queries that count, and the gradients of a weighted sum of them."""
    rng = np.random.default_rng(0)
    shapes = [(len(counts), counts.shape[1], heads, 4), *[(len(counts), 2 * TOKENS, 1, 4)] * 2]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    weights = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)

    @jax.jit
    def run(arrays, mask):
        def loss(arrays):
            out = attend(*arrays, mask)
            counted = jnp.where(counts[..., None, None], out, 0)
            return jnp.sum(counted * weights), (counted, jnp.isfinite(out).all())

        gradients, (out, finite) = jax.grad(loss, has_aux=True)(arrays)
        return [out, *gradients], finite

    return run(arrays, mask)


def assert_same(attend, mask, counts):
    (found, finite), (wanted, _) = results(attend, mask, counts), results(xla.attention, mask, counts)
    assert finite
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(other).max())))


@pytest.mark.parametrize(
    ("kind", "size", "which"),
    [
        ("rows", 4, 0),
        slow("rows", 1, 0),
        slow("rows", 16, 0),
        slow("fixed", 16, 0),
        slow("packed", 4, 0),
        slow("rows", 4, 1),
        slow("packed", 16, 1),
    ],
)
def test_chunks_compute_outputs_and_gradients_of_the_mask(kind, size, which):
    mask, counts = cases(kind, size)[which]
    assert two_streams.chunks(mask, counts.shape[1], 2 * TOKENS) is not None
    assert_same(attention_module.attention, mask, counts)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size", "which"), [("rows", 4, 0), ("packed", 16, 1)])
def test_splash_computes_outputs_and_gradients_of_the_mask(kind, size, which):
    mask, counts = cases(kind, size)[which]
    with attention_module.target_platform("tpu", interpret=True):
        q_BTNH, k_BSKH = jnp.zeros((1, counts.shape[1], 2, 4)), jnp.zeros((1, 2 * TOKENS, 1, 4))
        assert attention_module.choose("auto", q_BTNH, k_BSKH, mask) == "splash"
        assert_same(attention_module.attention, mask, counts)


def test_computed_keys_are_few():
    """At 4096 tokens and blocks of 16 both copies together need about 1.25 times the keys of one token without blocks."""
    assert two_streams.computed_keys(16, 4096) / 4096 == pytest.approx(1.28, abs=0.02)
    assert two_streams.computed_keys(4096, 4096) / 4096 < 2.6


@pytest.mark.slow
def test_last_layer_computes_only_what_predicts_tokens():
    """With the layers apart the last layer computes T queries and not 2T; the states and gradients are the same."""
    tokens, valid, answer, masked = batch()
    mask = masks.BlockDiffusion(3).for_rows(valid, answer) & masks.KeyPadding(valid)
    arrays = jnp.asarray(noised(tokens, masked)), jnp.asarray(tokens), mask, padded_positions(jnp.asarray(valid))

    def states_and_gradient(layers):
        found = model() if layers == "stacked" else layer_forms.apart(model())
        graphdef, params = split_params(found)

        def loss(params):
            states = merge_params(graphdef, params).hidden_two_streams(*arrays)
            return jnp.sum(jnp.where(answer[..., None], states, 0) ** 2), states

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (stacked, states), (apart, same) = states_and_gradient("stacked"), states_and_gradient("apart")
    np.testing.assert_allclose(np.asarray(states)[answer], np.asarray(same)[answer], rtol=0, atol=1e-5)
    kernel = stacked["layers"]["attn"]["q"]["kernel"]
    for number in range(len(kernel)):
        other = apart["layers"][number]["attn"]["q"]["kernel"]
        np.testing.assert_allclose(kernel[number], other, rtol=0, atol=1e-4 * float(jnp.abs(other).max()))


@pytest.mark.parametrize("layers", ["apart", slow("stacked")])
def test_operations_are_those_of_the_traced_program(monkeypatch, layers):
    """The planner and the MFU count the operations that the program has, less what a chunk computes besides the mask."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from two_streams import operations

    config = dataclasses.replace(PRESETS["nano"], num_hidden_layers=3)
    size, tokens, rows = 16, 1024, 2
    model = abstract_model(config)

    def states(model, tokens_BT, start_B):
        model = layer_forms.apart(model) if layers == "apart" else model
        mask, positions_BT = masks.BlockDiffusion(size, start_B), jnp.zeros_like(tokens_BT)
        return model.hidden_two_streams(tokens_BT, tokens_BT, mask, positions_BT)

    graphdef, params = split_params(model)
    shapes = jax.ShapeDtypeStruct((rows, tokens), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda params, *arrays: states(merge_params(graphdef, params), *arrays))(params, *shapes)
    found = operations(jaxpr.jaxpr, 1.0, float) / (rows * tokens)
    both = 2 * 2 * matrix_count(config) / 3  # operations of a layer for both copies of a token
    scores = 4 * config.num_attention_heads * config.head_dim
    keys = two_streams.computed_keys(size, tokens)
    if layers == "stacked":
        assert found == 3 * (both + scores * keys)
        return
    last = found - 2 * (both + scores * keys)
    chunks = two_streams.chunks(Sources(masks.TwoStream(size), np.zeros((1, tokens), np.int32)), tokens, 2 * tokens)
    pairs = sum((chunk.queries[1] - chunk.queries[0]) * sum(b - a for a, b in chunk.keys) for chunk in chunks)
    keys_and_values = 2 * 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    assert last == both / 2 + keys_and_values + scores * pairs / tokens
    needed = FlopCounter(model, tokens, size).step(1.0, 0.0) / 3  # the forward pass
    assert 0.75 * found < needed < found
    assert needed < 1.9 * FlopCounter(model, tokens).step(1.0, 0.0) / 3


def test_a_block_that_is_longer_than_the_text_counts_as_the_text():
    """`--block-diffusion 4096` with rows of 64 tokens is one block of 64, for the MFU and for plans."""
    settings = {"model": "nano", "batch_size": 2, "max_length": 64, "mesh": "1x1"}
    found = []
    for size in (64, 4096):
        training, mesh = TrainSettings.flat(**settings, block_diffusion=str(size)), sharding.make_mesh("1x1")
        step = abstract_step(training, mesh, 64)
        counter = FlopCounter(step.model, 64, size)
        planned = arithmetic.model_flops(step, step_shape(training, mesh, 64))
        found.append((counter.step(1.0, 0.0), counter.step(1.0, 0.0, 32.0), planned))
    assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")
@pytest.mark.parametrize(
    ("hardware", "mesh", "package"), [("h200:1", "1x1", "jax_cuda12_plugin"), ("v6e:2x4", "8x1", "libtpu")]
)
def test_compiled_attention_has_no_array_over_all_pairs(hardware, mesh, package):
    """At 1024 tokens of the published heads: kernels of the hardware, and nothing of 2T x 2T."""
    if importlib.util.find_spec(package) is None:
        pytest.skip("needs the extra plan or plan-gpu, to compile for hardware that is not here")
    tokens, devices = 1024, find_hardware(hardware).mesh(mesh)
    rows = devices.shape["fsdp"]

    def shaped(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices, PartitionSpec("fsdp")))

    def gradients(q, k, v, start_B):
        mask = masks.TwoStream(16, start_B)
        return jax.grad(lambda qkv: attention_module.attention(*qkv, mask).astype(jnp.float32).sum())((q, k, v))

    arrays = shaped(rows, 2 * tokens, 28, 128), *[shaped(rows, 2 * tokens, 4, 128)] * 2
    with jax.set_mesh(devices):
        text = jax.jit(gradients).lower(*arrays, shaped(rows, dtype=jnp.int32)).compile().as_text()
    assert "__cudnn$fmhaScaleBias" in text if hardware == "h200:1" else "tpu_custom_call" in text
    assert not re.search(rf"\b(bf16|f32|pred)\[(\d+,)*{2 * tokens},{2 * tokens}\b", text)
    assert not re.search(rf"\b(bf16|f32|pred)\[(\d+,)*{tokens},{tokens}\b", text)
