"""Stacked and apart, joined and separate: the same numbers, the same files, and no second copy of the weights in memory."""

import dataclasses
import filecmp
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden_numbers import GOLDEN, arrays, model
from marking import slow

import dream_jax
from dream_jax import hf, layer_forms, lora, masks, pretrained, sharding
from dream_jax.attention import Window
from dream_jax.config import PRESETS
from dream_jax.layer_forms import form_of
from dream_jax.lora import LoraConfig
from dream_jax.model import Dream, abstract_model, merge_params, split_params

TINY = GOLDEN / "tiny_a" / "hf"
CONFIG = LoraConfig(rank=3, alpha=5.0, targets=("q", "o", "gate"))


def flat(dream):
    return {name: np.asarray(leaf) for name, leaf in hf.flat(split_params(dream)[1]).items()}


def assert_same(found, wanted):
    found, wanted = flat(found), flat(wanted)
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def tokens(rows=4, length=12):
    return np.random.default_rng(0).integers(0, 120, (rows, length)).astype(np.int32)


def joined(dream):
    copied = merge_params(*split_params(dream))
    layer_forms.join(copied)
    return copied


def adapted(dream, config=CONFIG):
    found = lora.attach(dream, config, jax.random.key(1))
    rng = np.random.default_rng(1)
    leaves = {
        name: {
            "lora_a": jnp.asarray(
                rng.normal(0, 0.1, (dream.config.num_hidden_layers, *linear.in_shape, config.rank)), "f4"
            ),
            "lora_b": jnp.asarray(
                rng.normal(0, 0.1, (dream.config.num_hidden_layers, config.rank, *linear.out_shape)), "f4"
            ),
        }
        for name, linear in lora.projections_by_layer(found)[0].items()
        if name in config.targets
    }
    lora.put_adapter(found, config, leaves)
    return found


# The same numbers


def test_conversions_are_inverse():
    dream = model("tiny_a")
    apart = layer_forms.apart(dream)
    assert apart.is_apart and not dream.is_apart
    assert layer_forms.apart(apart) is apart and layer_forms.stacked(dream) is dream
    assert_same(layer_forms.stacked(apart), dream)
    for one in (dream, apart):
        both = joined(one)
        assert {"layers.0.attn.qkv.kernel", "layers.attn.qkv.kernel"} & flat(both).keys()
        assert not any(".q." in name or ".up." in name for name in flat(both))
        assert all(np.array_equal(a, b) for a, b in zip(*map(flat_canonical, (both, dream)), strict=True))
        layer_forms.separate(both)
        assert_same(both, one)
        np.testing.assert_array_equal(both(tokens()), one(tokens()))


def flat_canonical(dream):
    return map(np.asarray, jax.tree.leaves(layer_forms.canonical(split_params(dream)[1])))


@pytest.mark.parametrize("mesh", [None, slow("4x2"), slow("2x2x2")])
def test_logits_and_windows(mesh):
    """Under a mesh that shards heads and tokens, too; `test_sampler` compares whole trajectories."""
    stacked, apart = (pretrained.load(TINY, mesh=mesh, layers=form) for form in ("stacked", "apart"))
    both = joined(apart)
    if mesh is not None:
        kernel = both.layers[0].attn.qkv.kernel[...]
        assert kernel.sharding.shard_shape(kernel.shape)[1] == kernel.shape[1] // 2  # whole key/value heads
        kernel = both.layers[1].mlp.gate_up.kernel[...]
        assert kernel.sharding.shard_shape(kernel.shape)[2] == kernel.shape[2] // 2
    golden = arrays("tiny_a")
    text = np.resize(golden["fwd_tokens"], (4, golden["fwd_tokens"].shape[1]))
    logits = both(text)
    np.testing.assert_allclose(logits, np.resize(golden["fwd_logits"], logits.shape), rtol=0, atol=1e-4)
    for one in (apart, joined(stacked)):
        np.testing.assert_allclose(one(text), logits, rtol=0, atol=1e-4)

    positions = jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape)
    position = jnp.broadcast_to(jnp.arange(2, 6), (4, 4))

    @jax.jit
    def look(dream):
        hidden, kv_cache = dream.hidden_and_kv_cache(jnp.asarray(text), masks.Bidirectional(), positions)
        other = jnp.asarray(text)[:, 2:6] + 1
        return hidden, dream.hidden_window(other, masks.Bidirectional(), position, Window(kv_cache, position))

    with sharding.mesh_context(stacked):
        for found, wanted in zip(*map(jax.tree.leaves, (look(both), look(stacked))), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_a_mesh_that_shards_only_the_heads_of_q_keeps_q_apart_from_k_and_v():
    """8 query heads on 4 devices, but 2 key/value heads: joined, every device would hold all query heads."""
    config = dataclasses.replace(PRESETS["nano"], num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2)
    with jax.set_mesh(sharding.make_mesh("1x4")):
        dream = jax.eval_shape(joined, abstract_model(config))
    assert dream.layers.attn.qkv is None and dream.layers.attn.q is not None
    assert dream.layers.mlp.gate_up is not None and dream.layers.mlp.up is None


@pytest.mark.parametrize("remat", ["none", slow("full"), slow("dots"), slow("offload")])
def test_gradients(remat):
    """Of stacked parameters: through a scan, and through slices of them, as a training step takes them."""
    graphdef, params = split_params(pretrained.load(TINY, remat=remat, layers="stacked"))

    def loss(params, convert):
        return jnp.mean(jax.nn.logsumexp(convert(merge_params(graphdef, params))(tokens()), axis=-1) ** 2)

    wanted, found = (
        jax.jit(jax.grad(loss), static_argnums=1)(params, convert)
        for convert in (lambda dream: dream, layer_forms.apart)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, wanted)


def test_jax_traces_one_layer_for_all(monkeypatch):
    calls = []
    layer = dream_jax.model.Layer
    call = layer.__call__
    monkeypatch.setattr(layer, "__call__", lambda *args: calls.append(1) or call(*args))
    dream = layer_forms.apart(model("tiny_b"))
    jax.jit(lambda dream: dream(tokens(2, 7))).lower(dream)
    assert len(calls) == 1 < dream.config.num_hidden_layers


# Reading


@pytest.mark.parametrize(
    ("source", "mesh", "base"),
    [
        ("hf", None, "int8"),
        ("converted", None, None),
        slow("converted", "4x2", "nf4"),
        slow("hf", "4x2", None),
        slow("nano", None, None),
        slow("nano", "2x2x2", "int8"),
    ],
)
def test_read_apart(tmp_path, source, mesh, base):
    path = {"hf": TINY, "converted": tmp_path / "c", "nano": "nano"}[source]
    if source == "converted":
        pretrained.save(model("tiny_a"), path)
    stacked = pretrained.load(path, "bfloat16", mesh, base=base, layers="stacked")
    apart = pretrained.load(path, "bfloat16", mesh, base=base, layers="apart")
    assert_same(apart, layer_forms.apart(stacked))
    assert apart.is_apart and lora.base_of(apart) == (base or "bfloat16")
    assert lora.identity(apart) == lora.identity(stacked)
    for ours, theirs in zip(
        *(jax.tree.leaves(split_params(one)[1]) for one in (apart, layer_forms.apart(stacked))), strict=True
    ):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)
    described = pretrained.describe(path, "bfloat16", layers="apart")
    if base is None:
        assert jax.tree.map(jnp.shape, split_params(described)[1]) == jax.tree.map(jnp.shape, split_params(apart)[1])


@pytest.mark.usefixtures("unchecked")
def test_auto_is_apart_on_gpus_only():
    assert form_of("auto") == form_of("auto", sharding.make_mesh("1x1")) == "stacked"
    assert form_of("apart") == "apart"
    with pytest.raises(ValueError, match="layers='both' is not one of"):
        form_of("both")
    with pytest.raises(ValueError, match="layers='auto' is not one of"):
        Dream(PRESETS["nano"], rngs=nnx.Rngs(0), layers="auto")


def test_describing_does_not_start_jax():
    """A program that describes a model first can still divide the CPU into the devices of its mesh."""
    code = "from dream_jax import pretrained, sharding; pretrained.describe('nano'); sharding.make_mesh('3x1')"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=pathlib.Path(__file__).parents[1])


# Adapters, quantised bases, files


@pytest.mark.parametrize("layers", ["stacked", "apart"])
def test_a_new_adapter_is_sharded_over_the_mesh_of_the_model(layers, monkeypatch):
    """Also by the program that takes the stacked matrices apart, which was compiled without the mesh."""
    meshes, put_adapter = [], lora.put_adapter
    monkeypatch.setattr(
        lora,
        "put_adapter",
        lambda *args: meshes.append(jax.sharding.get_abstract_mesh()) or put_adapter(*args),
    )
    mesh = sharding.make_mesh("2x2")
    dream = lora.attach(pretrained.load("nano", mesh=mesh, layers=layers), CONFIG, jax.random.key(0))
    assert meshes == [mesh.abstract_mesh]
    params = split_params(dream)[1]
    for leaf, wanted in zip(
        jax.tree.leaves(params), jax.tree.leaves(sharding.parameter_shardings(params, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.shape, leaf.sharding)


def test_adapters():
    stacked, apart = model("tiny_a"), model("tiny_a", "apart")
    wanted, found = adapted(stacked), adapted(apart)
    assert lora.config_of(found) == CONFIG and lora.config_of(apart) is None
    assert lora.identity(found) == lora.identity(apart) == lora.identity(stacked)
    logits = wanted(tokens())
    layer_forms.join(found)  # joins nothing that has an adapter
    names = flat(found)
    assert "layers.0.attn.q.lora_a" in names and "layers.0.mlp.gate.lora_a" in names
    np.testing.assert_allclose(found(tokens()), logits, rtol=0, atol=1e-5)
    merged = lora.merge(found)
    assert_same(merged, layer_forms.apart(lora.merge(wanted)))
    layer_forms.join(merged)
    np.testing.assert_allclose(merged(tokens()), logits, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="has an adapter already"):
        lora.attach(found, CONFIG, jax.random.key(0))
    with pytest.raises(ValueError, match="projections_by_layer"):
        lora.projections(found)


@pytest.mark.slow
def test_quantised_bases():
    wanted, found = (lora.with_base(one, "int8") for one in (model("tiny_a"), model("tiny_a", "apart")))
    assert_same(found, layer_forms.apart(wanted))
    assert lora.identity(found) == lora.identity(wanted)
    layer_forms.join(found)
    assert found.layer_modules()[0].mlp.gate_up.codes is not None
    np.testing.assert_allclose(found(tokens()), wanted(tokens()), rtol=0, atol=1e-5)
    merged = layer_forms.apart(lora.merge(wanted, dequantised=True))
    assert_same(lora.merge(found, dequantised=True), merged)
    lora.merge_inside(found, dequantised=True)
    assert_same(found, merged)


def assert_same_files(found, wanted):
    names = sorted(str(path.relative_to(wanted)) for path in wanted.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file())
    differing = filecmp.cmpfiles(found, wanted, names, shallow=False)[1:]
    # Orbax writes times into the first two of these files, and the others have sizes and checksums of all files.
    timed = ("_CHECKPOINT_METADATA", "commit_success.txt", "adapter.json", "dream_jax.json", "checksums.json")
    assert [name for name in differing[0] if pathlib.Path(name).name not in timed] == []
    assert differing[1] == []


@pytest.mark.parametrize("mesh", [None, slow("2x2x2")])
def test_written_files_are_the_same(tmp_path, mesh):
    stacked = pretrained.load(TINY, mesh=mesh)
    apart = pretrained.load(TINY, mesh=mesh, layers="apart", joined=True)
    for form, dream in (("stacked", stacked), ("apart", apart)):
        pretrained.save(dream, tmp_path / form / "converted")
        pretrained.export_hf(dream, tmp_path / form / "hf")
        pretrained.save_adapter(adapted(dream), tmp_path / form / "adapter")
    assert_same_files(tmp_path / "apart", tmp_path / "stacked")
    wrong = merge_params(*split_params(apart))
    for layer in wrong.layers:
        layer.mlp.gate_up.kernel = nnx.Param(jnp.zeros((3, 2, 5)))
    for write in (pretrained.save, pretrained.export_hf):
        with pytest.raises(ValueError, match=r"layers\.mlp\.up\.kernel"):
            write(wrong, tmp_path / "wrong")


@pytest.mark.parametrize("form", ["apart", slow("stacked")])
def test_an_adapter_of_one_form_is_read_into_the_other(tmp_path, form):
    other = {"stacked": "apart", "apart": "stacked"}[form]
    wanted = adapted(model("tiny_a", form))
    pretrained.save_adapter(wanted, tmp_path / "adapter")
    found = dream_jax.load(TINY, adapter=tmp_path / "adapter", layers=other, joined=True)
    assert found.is_apart == (other == "apart")
    assert lora.config_of(found) == CONFIG
    np.testing.assert_allclose(found(tokens()), wanted(tokens()), rtol=0, atol=1e-5)


# Memory

LOAD = """
import sys
import jax, numpy as np
import dream_jax

def kilobytes(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

warm, path, dtype, joined = sys.argv[1:]
load = lambda path: jax.block_until_ready(dream_jax.load(path, dtype, layers="apart", joined=joined == "joined"))
load(warm)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # from here on VmHWM is the largest memory again
before = kilobytes("VmRSS")
model = load(path)
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model)) / 1024
print((kilobytes("VmHWM") - before) / weights)
"""


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_reading_apart_makes_no_second_copy(tmp_path):
    """The memory of the process grows by at most 1.1 times the weights, from both kinds of directories."""
    config = dataclasses.replace(
        PRESETS["nano"], num_hidden_layers=24, hidden_size=640, intermediate_size=1536, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    dream = jax.jit(lambda: Dream(config, rngs=nnx.Rngs(0)))()
    pretrained.save(dream, tmp_path / "converted")
    pretrained.export_hf(dream, tmp_path / "hf")
    pretrained.save(model("tiny_a"), tmp_path / "tiny")
    for name, warm, dtype, joined in (
        ("hf", TINY, "float32", "joined"),
        ("converted", tmp_path / "tiny", "float32", "joined"),
    ):
        command = [sys.executable, "-c", LOAD, warm, tmp_path / name, dtype, joined]
        # The allocator keeps freed arrays of less than 32 MB for later unless it maps each of them, as it does larger ones.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        ratio = float(done.stdout)
        assert 0.9 < ratio < 1.1, (ratio, name, dtype, joined)
