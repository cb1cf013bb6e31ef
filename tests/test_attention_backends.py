"""The flash backends compute what plain attention computes; each is taken where it can serve, and says why where not.

Splash runs here by interpretation. cuDNN cannot run without its GPU: its calls are answered by jax's own plain attention,
which shows that they mean the right thing, and lowered for a GPU, which shows that they reach cuDNN. Values on the
hardware itself are for bench/check_attention.py.
"""

import contextlib
import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, PartitionSpec
from marking import slow

from dream_jax import PRESETS, Dream, masks, sharding, target
from dream_jax import attention as attention_module
from dream_jax.attention import cudnn, packed, splash, xla

KINDS = ["all", "padding", "lengths", "segments"]

# Masks that the same tokens as queries and keys have, of rows that are padded on the left and on the right.
FAMILY = {
    "causal": lambda batch, length: masks.Causal(),
    "window": lambda batch, length: masks.SlidingWindow(3, 2),
    "window back": lambda batch, length: masks.SlidingWindow(3, 0),
    "blocks": lambda batch, length: masks.BlockCausal(4),
    "two streams": lambda batch, length: masks.TwoStream(4),
    "causal window": lambda batch, length: masks.Causal() & masks.SlidingWindow(4, 4),
    "causal or blocks": lambda batch, length: masks.Causal() | masks.BlockCausal(3),
    "causal, padding": lambda batch, length: masks.Causal() & make_mask("padding", batch, length, length),
    "causal, lengths": lambda batch, length: make_mask("lengths", batch, length, length) & masks.Causal(),
    "window, lengths": lambda batch, length: masks.SlidingWindow(3, 0) & make_mask("lengths", batch, length, length),
    "blocks, segments, padding": lambda batch, length: (
        masks.BlockCausal(4) & own_segments(batch, length) & make_mask("padding", batch, length, length)
    ),
    "prefix": lambda batch, length: masks.Prefix(np.arange(batch) + 2),
    "blocks of rows": lambda batch, length: masks.BlockCausal(4, np.arange(batch)),
    "not causal or self": lambda batch, length: ~masks.Causal() | masks.SlidingWindow(0, 0),
}
# What splash has no ids for, and what cuDNN must be shown: all that is not compiled in or told by lengths.
DIFFER = {"prefix", "blocks of rows"}
NATIVE = {
    "causal": {"is_causal"},
    "window back": {"is_causal", "local_window_size"},
    "causal, lengths": {"is_causal", "key_value_seq_lengths"},
}


def own_segments(batch, length):
    ids = np.sort(np.random.default_rng(3).integers(0, 3, (batch, length)), axis=1)
    return masks.Segments(ids, ids)


def inputs(batch, queries, keys, heads, kv_heads, width=16, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (batch, queries, heads, width), (batch, keys, kv_heads, width), (batch, keys, kv_heads, width)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def make_mask(kind, batch, queries, keys):
    rng = np.random.default_rng(1)
    if kind == "all":
        return masks.Bidirectional()
    if kind == "padding":  # on the left: none in the first row, more and more below
        return masks.KeyPadding(np.arange(keys) >= np.arange(batch)[:, None] * (keys // (batch + 1)))
    if kind == "lengths":
        return masks.KeyLengths(keys - np.arange(batch, dtype=np.int32) * (keys // (batch + 1)))
    segments = np.sort(rng.integers(-1, 3, (batch, keys)), axis=1)
    # Queries in another order than the keys, each with an id that some key has.
    return masks.Segments(rng.permuted(segments, axis=1)[:, :queries], segments)


def value_and_gradients(attend, arrays, mask):
    """Outputs and the gradients of a weighted sum of them, in which every output counts differently."""

    @jax.jit
    def run(arrays, mask):
        def loss(arrays):
            out = attend(*arrays, mask)
            weights = np.random.default_rng(2).normal(size=out.shape)
            return jnp.sum(out * jnp.asarray(weights, out.dtype)), out

        gradients, out = jax.grad(loss, has_aux=True)(arrays)
        return [out, *gradients]

    return run(arrays, mask)


def meaningful(attend):
    """`attend` with zeros for queries that see nothing: their outputs differ between backends, and are finite."""

    def run(q, k, v, allowed):
        out = attend(q, k, v, allowed)
        sees = jnp.any(allowed.dense(q.shape[1], k.shape[1]), axis=-1)[..., None, None]
        return jnp.where(jnp.isfinite(out), jnp.where(sees, out, 0), jnp.nan)

    return run


def assert_same(found, wanted, atol=1e-5):
    for a, b, name in zip(found, wanted, ("out", "dq", "dk", "dv"), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(b))))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol * scale, err_msg=name)


def attend(backend):
    return functools.partial(attention_module.attention, backend=backend)


# --- splash


@pytest.fixture
def interpreted():
    """As on a TPU, with its kernels carried out by array operations."""
    with attention_module.target_platform("tpu", interpret=True):
        yield


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "kv_heads"),
    [
        (3, 5, 5, 6, 2),  # far below one tile
        (2, 128, 256, 4, 4),  # whole tiles, no grouping
        (1, 7, 140, 7, 1),  # a window of queries, one key/value head
        slow(2, 300, 1000, 2, 1),  # several blocks of keys, both lengths odd ones
    ],
)
def test_splash_is_attention(batch, queries, keys, heads, kv_heads, kind):
    arrays, mask = inputs(batch, queries, keys, heads, kv_heads), make_mask(kind, batch, queries, keys)
    found = value_and_gradients(attend("splash"), arrays, mask)
    assert_same(found, value_and_gradients(xla.attention, arrays, mask))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", [slow(name) if " " in name else name for name in sorted(FAMILY.keys() - DIFFER)])
def test_splash_is_attention_under_every_mask(name):
    arrays, mask = inputs(2, 140, 140, 4, 2), FAMILY[name](2, 140)
    found = value_and_gradients(meaningful(attend("splash")), arrays, mask)
    assert_same(found, value_and_gradients(meaningful(xla.attention), arrays, mask))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", sorted(FAMILY.keys() - DIFFER))
def test_splash_leaves_out_what_is_hidden(monkeypatch, name):
    """What is compiled in is the mask itself, padded: tiles that it leaves empty are not computed."""
    seen, make = [], splash.splash_attention_kernel.make_splash_mha
    monkeypatch.setattr(
        splash.splash_attention_kernel, "make_splash_mha", lambda mask, **kw: seen.append(mask) or make(mask, **kw)
    )
    length, mask = 140, FAMILY[name](1, 140)
    attend("splash")(*inputs(1, length, length, 2, 2), mask)
    compiled = np.asarray(seen[0].masks[0][:, :])
    wanted = np.ones((length, length), bool)
    for part in masks.conjuncts(mask):
        if masks.is_fixed(part):
            wanted &= np.asarray(part.dense(length, length))[0]
    assert compiled.shape == (256, 256)
    np.testing.assert_array_equal(compiled[:length, :length], wanted)
    assert compiled.any(axis=1).all()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (FAMILY["prefix"](2, 8), "the mask Prefix differs from row to row"),
        (FAMILY["blocks of rows"](2, 8) & masks.Causal(), "the mask BlockCausal differs from row to row"),
        (masks.Causal().at(np.zeros((2, 8), int)), "the mask Queries differs from row to row"),
        (own_segments(2, 8) & own_segments(2, 8), "a token has one segment id, and these masks give it two"),
        (~masks.Causal(), "no result for queries that may attend to no key"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_splash_says_why_not(mask, reason):
    arrays = inputs(2, 8, 8, 4, 2)
    with pytest.raises(ValueError, match=reason):
        attend("splash")(*arrays, mask)
    np.testing.assert_array_equal(attend("auto")(*arrays, mask), xla.attention(*arrays, mask))


@pytest.mark.usefixtures("interpreted")
def test_order_needs_all_tokens_on_a_device():
    """A device with half of the queries cannot use a compiled-in causal order, so auto takes another backend."""
    arrays, mask = inputs(2, 12, 12, 4, 2), masks.Causal()
    with jax.set_mesh(mesh((2, 2, 2))):
        with pytest.raises(ValueError, match="the mesh divides the tokens"):
            attend("splash")(*arrays, mask)
        assert attention_module.choose("auto", *arrays[:2], mask) == "xla"
        assert attention_module.choose("auto", *arrays[:2], masks.Bidirectional()) == "splash"
    with jax.set_mesh(mesh((4, 2, 1))):
        assert attention_module.choose("auto", *arrays[:2], mask) == "splash"
        found = value_and_gradients(attend("splash"), arrays, mask)
    assert_same(found, value_and_gradients(xla.attention, arrays, mask))


@pytest.mark.usefixtures("interpreted")
def test_splash_in_bfloat16():
    arrays = inputs(2, 40, 40, 4, 2, dtype=jnp.bfloat16)
    out = jax.jit(attend("splash"))(*arrays, make_mask("lengths", 2, 40, 40))
    assert out.dtype == jnp.bfloat16
    wanted = xla.attention(*(x.astype(jnp.float32) for x in arrays), make_mask("lengths", 2, 40, 40))
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, rtol=2**-7, atol=0.02)


@pytest.mark.usefixtures("interpreted")
def test_splash_never_feels_hidden_keys():
    q, k, v = inputs(2, 6, 6, 4, 2)
    for mask in (masks.KeyPadding(np.arange(6) > np.array([[0], [-1]])), masks.KeyLengths(np.array([6, 3]))):
        row, key = (0, 0) if isinstance(mask, masks.KeyPadding) else (1, 5)
        changed = [x.at[row, key].set(1e4) for x in (k, v)]
        out = jax.jit(attend("splash"))
        np.testing.assert_array_equal(out(q, k, v, mask), out(q, *changed, mask))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "mask",
    [masks.KeyPadding(np.array([[False] * 4, [True] * 4])), masks.KeyLengths(np.array([0, 4]))],
    ids=lambda mask: type(mask).__name__,
)
def test_splash_row_of_padding_stays_finite(mask):
    for array in value_and_gradients(attend("splash"), inputs(2, 4, 4, 4, 2), mask):
        assert np.all(np.isfinite(array))


# Mesh, rows and heads; what one device then sees of the queries, and where the output lies.
SPLITS = {
    "rows and heads": ((4, 2, 1), 4, 4, 2, (1, 12, 2, 16), PartitionSpec("fsdp", None, "tensor")),
    "queries too": ((2, 2, 2), 2, 4, 2, (1, 6, 2, 16), PartitionSpec("fsdp", "sequence", "tensor")),
    "nothing divides": ((4, 2, 1), 3, 3, 1, (3, 12, 3, 16), PartitionSpec()),
    "key heads do not": ((2, 4, 1), 2, 4, 2, (1, 12, 4, 16), PartitionSpec("fsdp")),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "kind"),
    [
        *(slow("rows and heads", kind) for kind in KINDS),
        *(slow("queries too", kind) for kind in KINDS if kind != "segments"),
        ("queries too", "segments"),
        ("nothing divides", "segments"),
        ("key heads do not", "lengths"),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_splash_under_a_mesh(monkeypatch, split, kind):
    shape, batch, heads, kv_heads, local, spec = SPLITS[split]
    seen = []
    kernel = splash._kernel
    monkeypatch.setattr(splash, "_kernel", lambda q, *rest, **kw: seen.append(q.shape) or kernel(q, *rest, **kw))
    arrays, mask = inputs(batch, 12, 12, heads, kv_heads), make_mask(kind, batch, 12, 12)
    wanted = value_and_gradients(xla.attention, arrays, mask)
    with jax.set_mesh(mesh(shape)):
        found = value_and_gradients(attend("splash"), arrays, mask)
        out = jax.jit(attend("splash"))(*arrays, mask)
    assert set(seen) == {local}
    assert out.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh(shape), spec), 4)
    assert_same(found, wanted)


def mesh(shape):
    return Mesh(np.array(jax.devices()).reshape(shape), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.slow
def test_model_on_splash():
    """Under a scan, remat and a mesh, as in training."""
    config = dataclasses.replace(PRESETS["nano"], num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 9), np.int32)
    mask = make_mask("segments", 4, 9, 9)
    model = Dream(config, rngs=nnx.Rngs(0), remat="full")

    def gradients(backend):
        model.attention_backend = backend
        return jax.jit(jax.grad(lambda model: jnp.mean(jnp.square(model(tokens, mask)))))(model)

    wanted = jax.tree.leaves(gradients("xla"))
    with attention_module.target_platform("tpu", interpret=True), jax.set_mesh(mesh((4, 2, 1))):
        found = jax.tree.leaves(gradients("splash"))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.max(jnp.abs(b))))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", ["segments", slow("texts")])
def test_splash_lowers_to_a_tpu_kernel(kind):
    arrays = inputs(2, 130, 130, 4, 2, width=128, dtype=jnp.bfloat16)
    mask = masks.Packed(np.array([[70, 60], [9, 0]])) if kind == "texts" else make_mask(kind, 2, 130, 130)
    with attention_module.target_platform("tpu"):
        text = lowered("tpu", attend("auto"), arrays, mask)
    assert text.count("tpu_custom_call") >= 3  # forward, and backward for dq and for dk and dv
    assert not re.search(r"tensor<[\dx]*130x130x", text)


# --- cuDNN


@pytest.fixture
def cudnn_present(monkeypatch):
    """As on a machine that has cuDNN."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)


@pytest.fixture
def cudnn_answered(monkeypatch):
    """Calls for cuDNN are answered by jax's plain attention; each is appended to the list that this gives."""
    calls, plain = [], jax.nn.dot_product_attention

    def answer(q, k, v, *, implementation, **arguments):
        assert implementation == "cudnn"
        calls.append({"queries": q.shape[1], "keys": k.shape[1], **arguments})
        with jax.numpy_dtype_promotion("standard"):
            return plain(q, k, v, implementation="xla", **arguments)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return calls


def lowered(platform, attend, arrays, mask):
    """The program of value and gradients for a platform that is not here.

    For tests that are `unchecked`: jax puts descriptions of arrays in place of a mask's arrays.
    """

    def loss(arrays, mask):
        return jnp.sum(attend(*arrays, mask).astype(jnp.float32))

    step = jax.jit(jax.value_and_grad(loss))
    return step.trace(arrays, mask).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("batch", "queries", "keys", "heads", "kv_heads"), [(3, 6, 6, 6, 2), (2, 5, 9, 4, 4), (2, 8, 5, 4, 1)]
)
def test_cudnn_is_asked_for_attention(cudnn_answered, batch, queries, keys, heads, kv_heads, kind):
    arrays, mask = inputs(batch, queries, keys, heads, kv_heads), make_mask(kind, batch, max(queries, keys), keys)
    if kind == "segments":
        mask = masks.Segments(mask.query_BT[:, np.arange(queries) % keys], mask.key_BS)
    found = value_and_gradients(cudnn.attention, arrays, mask)
    assert_same(found, value_and_gradients(xla.attention, arrays, mask))
    for call in cudnn_answered:
        assert ("mask" in call) == (kind in ("padding", "segments"))
        # An odd number of keys gets one more, which is hidden by the number of valid keys if there is no mask.
        assert ("key_value_seq_lengths" in call) == (kind == "lengths" or (kind == "all" and keys % 2 == 1))
        assert call["queries"] % 2 == call["keys"] % 2 == 0  # jax refuses the gradients of odd lengths
        if "mask" in call:
            assert call["mask"].shape == (batch, 1, call["queries"], call["keys"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_cudnn_is_asked_for_attention_under_every_mask(cudnn_answered, name):
    arrays, mask = inputs(2, 12, 12, 4, 2), FAMILY[name](2, 12)
    found = value_and_gradients(meaningful(cudnn.attention), arrays, mask)
    assert_same(found, value_and_gradients(meaningful(xla.attention), arrays, mask))
    for call in cudnn_answered:
        assert call.keys() - {"queries", "keys"} == NATIVE.get(name, {"mask"})


@pytest.mark.parametrize("name", NATIVE)
def test_cudnn_is_shown_an_order_that_a_device_cannot_know(cudnn_answered, name):
    arrays, mask = inputs(2, 12, 12, 4, 2), FAMILY[name](2, 12)
    wanted = value_and_gradients(xla.attention, arrays, mask)
    with jax.set_mesh(sharding.make_mesh("2x2x2")):
        assert_same(value_and_gradients(cudnn.attention, arrays, mask), wanted)
    assert all(call["queries"] == 6 and "mask" in call and "is_causal" not in call for call in cudnn_answered)
    cudnn_answered.clear()
    with jax.set_mesh(sharding.make_mesh("4x2")):
        assert_same(value_and_gradients(cudnn.attention, arrays, mask), wanted)
    assert all(call.keys() - {"queries", "keys"} == NATIVE[name] for call in cudnn_answered)


@pytest.mark.parametrize("kind", KINDS)
def test_cudnn_under_context_parallelism(cudnn_answered, kind):
    """Each device has its share of the queries, and of the mask's rows, and all keys."""
    arrays, mask = inputs(2, 6, 6, 4, 2), make_mask(kind, 2, 6, 6)
    wanted = value_and_gradients(xla.attention, arrays, mask)
    with jax.set_mesh(sharding.make_mesh("2x2x2")):
        assert_same(value_and_gradients(cudnn.attention, arrays, mask), wanted)
    # 3 of the 6 queries, and one more, because jax refuses the gradients of odd lengths.
    assert {call["queries"] for call in cudnn_answered} == {4}


def test_cudnn_is_never_given_a_length_of_zero(cudnn_answered):
    found = value_and_gradients(cudnn.attention, inputs(3, 4, 4, 4, 2), masks.KeyLengths(np.array([0, 2, 9])))
    assert all(np.all(np.isfinite(array)) for array in found)
    with jax.disable_jit():
        cudnn.attention(*inputs(3, 4, 4, 4, 2), masks.KeyLengths(np.array([0, 2, 9])))
    np.testing.assert_array_equal(cudnn_answered[-1]["key_value_seq_lengths"], [1, 2, 4])


TEXTS = masks.Packed(np.array([[5, 3, 0], [8, 2, 2], [12, 0, 0], [1, 1, 9]], np.int32))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("mask", [TEXTS, slow(masks.Causal() & TEXTS)], ids=["texts", "causal"])
def test_splash_attends_within_texts(mask):
    arrays = inputs(4, 12, 12, 4, 2)
    assert attention_module.choose("auto", *arrays[:2], mask) == "splash"
    wanted = value_and_gradients(xla.attention, arrays, mask)
    assert_same(value_and_gradients(attend("splash"), arrays, mask), wanted)


def packed_layout(wrong=None):
    """What jax's function for cuDNN's packed layout means, in plain arithmetic.

    wrong: None, "grouped" as in versions of jax that count the offsets of keys in query heads, or "always".
    """

    def ids(seqlen, offsets, tokens):
        assert offsets.shape == (seqlen.shape[0], seqlen.shape[1] + 1)
        token = jnp.arange(tokens)[:, None]
        inside = (token >= offsets[:, None, :-1]) & (token < (offsets[:, :-1] + seqlen)[:, None])
        inside = inside & (offsets[:, None, :-1] >= 0)
        return jnp.where(inside.any(-1), jnp.argmax(inside, -1), -1)

    def answer(q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type):
        assert q.shape[1] % 2 == 0  # jax refuses gradients of odd lengths
        assert mask_type == fused_attention_stablehlo.MaskType.PADDING and scale == q.shape[-1] ** -0.5
        if wrong == "always" or (wrong == "grouped" and q.shape[2] != k.shape[2]):
            kv_offsets = kv_offsets * 2
        query, key = ids(q_seqlen, q_offsets, q.shape[1]), ids(kv_seqlen, kv_offsets, k.shape[1])
        assert wrong or isinstance(query, jax.core.Tracer) or (query >= 0).all()
        return xla.attention(q, k, v, masks.Segments(query, key))

    return answer


@pytest.fixture
def hopper(monkeypatch):
    """As on a machine with a GPU of the Hopper generation, whose kernel is answered by `packed_layout`."""

    def answers(wrong):
        packed.usable.cache_clear()
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", packed_layout(wrong))

    yield answers
    packed.usable.cache_clear()


@pytest.mark.parametrize(("wrong", "repeats"), [(None, 2), slow("grouped", 2), slow("always", None)])
def test_cudnn_is_told_where_texts_are(hopper, cudnn_answered, wrong, repeats):
    """Keys are repeated: some releases of jax are wrong for grouped heads. If jax is always wrong, the mask is a bias."""
    arrays = inputs(4, 12, 12, 4, 2)
    wanted = value_and_gradients(xla.attention, arrays, TEXTS)
    hopper(wrong)
    for mesh_shape in ("1x1", "4x2"):
        with jax.set_mesh(sharding.make_mesh(mesh_shape)):
            assert_same(value_and_gradients(cudnn.attention, arrays, TEXTS), wanted)
    odd = [array[:, :11] for array in arrays]
    full = masks.Packed(np.array([[5, 6, 0], [7, 2, 2], [11, 0, 0], [1, 1, 9]], np.int32))
    assert_same(value_and_gradients(cudnn.attention, odd, full), value_and_gradients(xla.attention, odd, full))
    assert packed.usable(4, 2, 16, arrays[0].dtype) == repeats
    assert bool(cudnn_answered) == (repeats is None)
    # A device that holds a part of the queries is shown the mask.
    cudnn_answered.clear()
    with jax.set_mesh(sharding.make_mesh("2x2x2")):
        assert_same(value_and_gradients(cudnn.attention, arrays, TEXTS), wanted)
    assert all("mask" in call for call in cudnn_answered) and cudnn_answered


def test_packed_layout_is_not_used_where_it_cannot_be_tried(monkeypatch):
    packed.usable.cache_clear()
    assert packed.usable(4, 2, 64, np.dtype("bfloat16")) is None  # this machine has no GPU

    def refuse(*_, **__):
        raise NotImplementedError("Packed layout requires a GPU with at least Hopper architecture.")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "dot_product_attention", refuse)
    packed.usable.cache_clear()
    assert packed.usable(4, 2, 64, np.dtype("bfloat16")) is None
    packed.usable.cache_clear()


@pytest.mark.usefixtures("cudnn_present", "unchecked")
def test_packed_layout_lowers_to_its_custom_call(monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(packed, "usable", lambda *_: 1)
    arrays = inputs(4, 24, 24, 4, 2, 64, jnp.bfloat16)
    with attention_module.target_platform("gpu"):
        text = lowered("cuda", attend("auto"), arrays, masks.Packed(np.array([[10, 5], [24, 0], [1, 1], [7, 9]])))
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    assert re.search(r"max_seg_per_batch[^,]*3", text) and "24x24" not in text


@pytest.mark.usefixtures("cudnn_present", "unchecked")
@pytest.mark.parametrize("shape", [None, (4, 2, 1)], ids=["one device", "mesh"])
@pytest.mark.parametrize(
    ("kind", "call", "mask_type"),
    [
        ("all", "fmhaSoftmax", "NO_MASK"),
        ("lengths", "fmhaSoftmax", "PADDING"),
        ("padding", "fmhaScaleBiasSoftmax", "NO_MASK"),
        ("segments", "fmhaScaleBiasSoftmax", "NO_MASK"),
        ("causal", "fmhaSoftmax", "CAUSAL"),
        ("window back", "fmhaSoftmax", "CAUSAL"),
        ("causal, lengths", "fmhaSoftmax", "PADDING_CAUSAL"),
    ],
)
def test_cudnn_lowers_to_its_custom_calls(kind, call, mask_type, shape):
    keys = 24 if kind in FAMILY else 40
    mask = FAMILY[kind](4, 24) if kind in FAMILY else make_mask(kind, 4, 24, 40)
    arrays = inputs(4, 24, keys, 4, 2, 64, jnp.bfloat16)
    with attention_module.target_platform("gpu"), jax.set_mesh(mesh(shape)) if shape else contextlib.nullcontext():
        text = lowered("cuda", attend("auto"), arrays, mask)
    local = (1, 2) if shape else (4, 4)
    assert sorted(set(re.findall(r"__cudnn\$(\w+)", text))) == [call, f"{call}Backward"]
    assert set(re.findall(r"mask_type\\22: \\22([A-Z_]+)", text)) == {mask_type}
    assert f"tensor<{local[0]}x{local[1]}x24x64xbf16>" in text  # each device's part
    assert not re.search(rf"tensor<\d+x(4|2x2|2)x24x{keys}xf32>", text)  # no scores
    window = set(re.findall(r"sliding_window_length\\22: (\d+)", text))
    assert window == ({"4"} if kind == "window back" else {"0"})


@pytest.mark.usefixtures("cudnn_present", "unchecked")
@pytest.mark.parametrize("kind", [*KINDS, "causal", "causal, lengths", "window back"])
def test_cudnn_has_gradients_for_odd_lengths(kind):
    """jax itself refuses them: "Unsupported sequence length"."""
    keys = 25 if kind in FAMILY else 41
    mask = FAMILY[kind](2, 25) if kind in FAMILY else make_mask(kind, 2, 25, 41)
    with attention_module.target_platform("gpu"):
        text = lowered("cuda", attend("cudnn"), inputs(2, 25, keys, 4, 2, 64, jnp.bfloat16), mask)
    assert "tensor<2x4x26x64xbf16>" in text and f"tensor<2x{keys + 1}x2x64xbf16>" in text


# --- choosing


@pytest.mark.usefixtures("cudnn_present")
@pytest.mark.parametrize(
    ("platform", "dtype", "width", "mask", "chosen"),
    [
        ("cpu", "float32", 16, "all", "xla"),
        ("cpu", "bfloat16", 64, "all", "xla"),
        ("gpu", "bfloat16", 64, "all", "cudnn"),
        ("gpu", "float16", 128, "lengths", "cudnn"),
        ("gpu", "bfloat16", 128, "segments", "cudnn"),
        ("gpu", "bfloat16", 128, "causal", "cudnn"),
        ("gpu", "float32", 64, "all", "xla"),
        ("gpu", "bfloat16", 12, "all", "xla"),
        ("gpu", "bfloat16", 512, "all", "xla"),
        ("tpu", "float32", 16, "padding", "splash"),
        ("tpu", "bfloat16", 128, "segments", "splash"),
        ("tpu", "float16", 128, "segments", "xla"),
        ("gpu", "bfloat16", 128, "prefix", "cudnn"),
        ("tpu", "bfloat16", 128, "causal", "splash"),
        ("tpu", "bfloat16", 128, "blocks, segments, padding", "splash"),
        ("tpu", "bfloat16", 128, "prefix", "xla"),
    ],
)
def test_auto_takes_what_can_serve(platform, dtype, width, mask, chosen):
    q, k, _ = inputs(2, 6, 6, 4, 2, width, dtype)
    with attention_module.target_platform(platform):
        mask = FAMILY[mask](2, 6) if mask in FAMILY else make_mask(mask, 2, 6, 6)
        assert attention_module.choose("auto", q, k, mask) == chosen
        assert attention_module.choose(chosen, q, k, mask) == chosen
        assert attention_module.choose("xla", q, k, mask) == "xla"


@pytest.mark.usefixtures("cudnn_present")
@pytest.mark.parametrize(
    ("backend", "platform", "dtype", "width", "mask", "message"),
    [
        (
            "splash",
            "cpu",
            "bfloat16",
            64,
            "all",
            'TPU kernel, and this computation is for "cpu"; use the backend "xla"',
        ),
        ("splash", "tpu", "float16", 64, "all", "float32 or bfloat16, not float16; change the compute dtype"),
        ("splash", "tpu", "bfloat16", 64, "prefix", "the mask Prefix differs from row to row"),
        (
            "cudnn",
            "cpu",
            "bfloat16",
            64,
            "all",
            'NVIDIA GPUs, and this computation is for "cpu"; use the backend "xla"',
        ),
        ("cudnn", "tpu", "bfloat16", 64, "all", 'this computation is for "tpu"'),
        ("cudnn", "gpu", "float32", 64, "all", "bfloat16 or float16, not float32; change the compute dtype"),
        ("cudnn", "gpu", "bfloat16", 12, "all", 'a multiple of 8, but got 12. Use the backend "xla"'),
        ("cudnn", "gpu", "bfloat16", 512, "all", "but got 512"),
    ],
)
def test_backend_that_cannot_serve_says_why(backend, platform, dtype, width, mask, message):
    arrays = inputs(2, 6, 6, 4, 2, width, dtype)
    mask = FAMILY[mask](2, 6) if mask in FAMILY else make_mask(mask, 2, 6, 6)
    with attention_module.target_platform(platform), pytest.raises(ValueError, match=re.escape(message)) as caught:
        attention_module.attention(*arrays, mask, backend)
    assert f'the attention backend "{backend}" cannot serve this call: ' in str(caught.value)


def test_machine_without_cudnn(monkeypatch):
    def missing():
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", missing)
    q, k, _ = inputs(1, 4, 4, 2, 2, 64, jnp.bfloat16)
    with attention_module.target_platform("gpu"):
        assert attention_module.choose("auto", q, k, masks.Bidirectional()) == "xla"
        with pytest.raises(ValueError, match='cuDNN is not detected. Install the extra "cuda"'):
            attention_module.choose("cudnn", q, k, masks.Bidirectional())


@pytest.mark.usefixtures("cudnn_present")
@pytest.mark.parametrize(("capability", "chosen"), [("7.5", "xla"), ("8.0", "cudnn"), ("12.0", "cudnn")])
def test_gpu_that_is_too_old(monkeypatch, capability, chosen):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    q, k, _ = inputs(1, 4, 4, 2, 2, 64, jnp.bfloat16)
    assert attention_module.choose("auto", q, k, masks.Bidirectional()) == chosen
    if chosen == "xla":
        assert "8.0 (Ampere) or newer, not 7.5" in attention_module.refusal("cudnn", q, k, masks.Bidirectional())


# --- the target


def test_target_is_that_of_the_mesh_then_of_the_machine(monkeypatch):
    tpu = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    absent = AbstractMesh((2, 1, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=tpu)
    assert target.current_target() == target.Target("cpu")
    with jax.sharding.use_abstract_mesh(absent):
        assert target.current_target() == target.Target("tpu")
        with attention_module.target_platform("gpu"):
            assert target.current_target() == target.Target("gpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert target.current_target() == target.Target("tpu")
    with jax.set_mesh(mesh((8, 1, 1))):  # CPU devices beside a TPU
        assert target.current_target() == target.Target("cpu")


def test_function_is_traced_anew_for_another_target():
    attend = jax.jit(attention_module.attention)
    arrays = inputs(1, 8, 8, 2, 2)
    texts = {}
    for platform in ("cpu", "tpu", "cpu"):
        with attention_module.target_platform(platform):
            traced = attend.trace(*arrays, masks.Bidirectional())
            texts[platform] = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "tpu_custom_call" in texts["tpu"]
    assert "custom_call" not in texts["cpu"]


@pytest.mark.usefixtures("unchecked")
def test_unknown_targets_raise():
    with pytest.raises(ValueError, match=r"platform='cuda' is not one of \('cpu', 'gpu', 'tpu'\)"):
        attention_module.target_platform("cuda")
    with pytest.raises(ValueError, match="interpret=True is for TPU kernels"):
        attention_module.target_platform("gpu", interpret=True)
