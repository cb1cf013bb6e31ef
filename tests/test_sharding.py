"""Two tables give every array its place, and refuse what they do not know."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import TypeCheckError

from dream_jax import distributed, layer_forms, lora, sharding
from dream_jax.config import PRESETS
from dream_jax.lora import LoraConfig
from dream_jax.model import abstract_model, split_params

REFUSALS = (ValueError, TypeCheckError)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("8x1", (8, 1, 1)), ("4x2", (4, 2, 1)), ("1x16x1", (1, 16, 1)), ("10x12", (10, 12, 1)), ("2x1x4", (2, 1, 4))],
)
def test_mesh_shape(text, sizes):
    assert sharding.parse_mesh_shape(text) == sizes


@pytest.mark.parametrize(
    "text", ["", "8", "8x", "x8", "0x1", "8x0", "-8x1", "8 x 1", "8,1", "8x1x1x1", "axb", "08x1", "8x1\n"]
)
def test_malformed_mesh_shape_raises(text):
    with pytest.raises(ValueError) as error:
        sharding.parse_mesh_shape(text)
    assert repr(text) in str(error.value)
    assert "8x1" in str(error.value)


@pytest.mark.parametrize("shape", ["4x2", (4, 2), (4, 2, 1)])
def test_mesh(shape):
    mesh = sharding.make_mesh(shape)
    assert dict(mesh.shape) == {"fsdp": 4, "tensor": 2, "sequence": 1}
    assert sharding.make_mesh(mesh) is mesh


def test_mesh_may_use_some_of_the_devices():
    assert sharding.make_mesh("2x1").devices.ravel().tolist() == jax.devices()[:2]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_the_callers_is_taken_over(axis_type):
    theirs = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
    ours = sharding.make_mesh(theirs)
    assert dict(ours.shape) == {"fsdp": 4, "tensor": 2, "sequence": 1}
    assert set(ours.axis_types) == {AxisType.Auto}
    assert ours.devices.ravel().tolist() == theirs.devices.ravel().tolist()
    assert sharding.make_mesh(ours) == ours


@pytest.mark.parametrize("axes", [("data",), ("tensor", "fsdp"), ("fsdp",), ("fsdp", "tensor", "expert")])
def test_a_mesh_with_other_axes_raises(axes):
    theirs = jax.make_mesh((1,) * len(axes), axes, axis_types=(AxisType.Auto,) * len(axes))
    with pytest.raises(ValueError, match="parameters are sharded over"):
        sharding.make_mesh(theirs)


def test_too_few_devices_message():
    count = len(jax.devices())
    with pytest.raises(ValueError, match=f"mesh {count + 1}x1 needs {count + 1} devices, but there are {count}"):
        sharding.make_mesh(f"{count + 1}x1")


@pytest.mark.slow
def test_cpu_devices_are_made_for_the_mesh():
    """In a process of its own, whose backend has not started."""
    code = "from dream_jax.sharding import make_mesh; print(dict(make_mesh('3x2').shape), len(__import__('jax').devices()))"
    settings = {key: value for key, value in os.environ.items() if key not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}

    def run(**more):
        return subprocess.run(
            [sys.executable, "-c", code],
            env=settings | {"JAX_PLATFORMS": "cpu"} | more,
            capture_output=True,
            text=True,
        )

    made = run()
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip() == "{'fsdp': 3, 'tensor': 2, 'sequence': 1} 6"
    refused = run(JAX_NUM_CPU_DEVICES="2")  # what the user has set stands
    assert "mesh 3x2 needs 6 devices, but there are 2 cpu device(s)" in refused.stderr
    assert "JAX_NUM_CPU_DEVICES=6" in refused.stderr


@pytest.mark.parametrize(
    ("coordinator", "num_processes", "process_id", "message"),
    [
        ("localhost:1", 2, 2, "process_id=2 is outside 0..1"),
        ("localhost:1", 2, -1, "process_id=-1"),
        ("localhost:1", 3, 0, "8 devices, which 3 processes cannot share evenly"),
        ("localhost", 2, 0, "not of the form host:port"),
    ],
)
def test_processes_that_do_not_fit_raise(coordinator, num_processes, process_id, message):
    with pytest.raises(ValueError, match=message):
        distributed.join(
            num_devices=8, coordinator=coordinator, num_processes=num_processes, process_id=process_id, cluster="off"
        )


def test_logical_axes_go_to_mesh_axes_or_nowhere():
    places = [place if isinstance(place, tuple) else (place,) for place in sharding.LOGICAL_TO_MESH.values()]
    assert {axis for place in places for axis in place} <= {*sharding.MESH_AXES, None}
    named = {axis for axes in sharding.PARAMETER_AXES.values() for axis in axes}
    assert named <= {*sharding.LOGICAL_TO_MESH}


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "mlp"), (64, 32), ("fsdp", "tensor")),
        (("layers", "mlp", "embed"), (3, 32, 64), (None, "tensor", "fsdp")),
        # An axis that its mesh axis does not divide stays whole; trailing ones are left out.
        (("embed", "kv_heads", "head_dim"), (64, 3, 8), ("fsdp",)),
        (("embed", "mlp"), (66, 32), (None, "tensor")),
        # The same mesh axis cannot split two axes of one array: the first has it.
        (("vocab", "mlp"), (32, 32), ("tensor",)),
        (("vocab", "mlp"), (33, 32), (None, "tensor")),
        (("batch", None, "width"), (8, 5, 64), ("fsdp",)),
        # A mesh axis of size 1 splits nothing.
        (("batch", "tokens"), (8, 5), ("fsdp",)),
        ((), (), ()),
    ],
)
def test_partition_spec(axes, shape, spec):
    found = sharding.partition_spec(axes, shape, {"fsdp": 4, "tensor": 2, "sequence": 1})
    assert found == PartitionSpec(*spec)


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        # Parameters lie over the devices that share a row too, as far as these divide them.
        (("embed", "mlp"), (48, 32), (("fsdp", "sequence"), "tensor")),
        (("embed", "mlp"), (8, 32), ("fsdp", "tensor")),
        (("embed", "mlp"), (9, 32), ("sequence", "tensor")),
        (("batch", "tokens", "width"), (8, 6, 64), ("fsdp", "sequence")),
        # What one of them splits already is left to it.
        (("tokens", "embed"), (6, 64), ("sequence", "fsdp")),
        (("token_group", None), (6, 5), (("fsdp", "sequence"),)),
    ],
)
def test_partition_spec_of_context_parallelism(axes, shape, spec):
    found = sharding.partition_spec(axes, shape, {"fsdp": 2, "tensor": 2, "sequence": 3})
    assert found == PartitionSpec(*spec)


def test_partition_spec_refuses():
    with pytest.raises(REFUSALS, match="names 2 axes of an array with shape"):
        sharding.partition_spec(("embed", "mlp"), (4, 4, 4), {"fsdp": 2})
    with pytest.raises(REFUSALS, match="'emebd' has no row in LOGICAL_TO_MESH"):
        sharding.partition_spec(("emebd",), (4,), {"fsdp": 2})


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_has_a_row(name):
    config = LoraConfig(rank=4, alpha=8.0)
    adapted = lora.attached_shapes(abstract_model(PRESETS[name]), config)

    def with_joined_projections(model):
        layer_forms.join(model)
        return model

    joined = jax.eval_shape(with_joined_projections, abstract_model(PRESETS[name]))
    rows = set()
    for model in (adapted, joined):
        specs = sharding.parameter_specs(split_params(model)[1], sharding.make_mesh("4x2"))
        paths = jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
        rows |= {".".join(part.key for part in path) for path, _ in paths}
    tied = {"lm_head.kernel"} if PRESETS[name].tie_word_embeddings else set()
    assert rows == {*sharding.PARAMETER_AXES} - tied
    assert any(config.tie_word_embeddings for config in PRESETS.values())  # both kinds are seen


def test_axes_of_layers_that_are_apart():
    assert sharding.parameter_axes(("layers", "3", "attn", "q", "kernel")) == ("embed", "heads", "head_dim")
    assert sharding.parameter_axes(("layers", "attn", "q", "codes")) == ("layers", "embed", "heads", "head_dim")
    assert sharding.parameter_axes(("layers", "3", "attn")) is sharding.parameter_axes(()) is None


def test_strategy():
    """What the tables mean for Dream-7B: every matrix is split both ways, vectors over D are whole."""
    specs = sharding.parameter_specs(split_params(abstract_model(PRESETS["dream-7b"]))[1], sharding.make_mesh("4x2"))
    layers = specs["layers"]
    assert specs["embed"]["embedding"] == PartitionSpec("tensor", "fsdp")
    assert specs["lm_head"]["kernel"] == PartitionSpec("fsdp", "tensor")
    assert layers["attn"]["q"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert layers["attn"]["k"]["kernel"] == PartitionSpec(None, "fsdp", "tensor")
    assert layers["attn"]["o"]["kernel"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert layers["attn"]["q"]["bias"] == PartitionSpec(None, "tensor")
    assert layers["mlp"]["down"]["kernel"] == PartitionSpec(None, "tensor", "fsdp")
    assert layers["attn_norm"]["scale"] == specs["norm"]["scale"] == PartitionSpec()


def test_codes_and_scales_lie_like_the_kernel_they_stand_for():
    model = lora.with_base_shapes(abstract_model(PRESETS["dream-7b"]), "nf4")
    layers = sharding.parameter_specs(split_params(model)[1], sharding.make_mesh("4x2"))["layers"]
    for leaf in ("codes", "scales"):
        assert layers["attn"]["q"][leaf] == PartitionSpec(None, "fsdp", "tensor")
        assert layers["attn"]["o"][leaf] == PartitionSpec(None, "tensor", None, "fsdp")
        assert layers["mlp"]["down"][leaf] == PartitionSpec(None, "tensor", "fsdp")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"layers": {"attn": {"q": {"weight": np.zeros((2, 3))}}}}, "'layers.attn.q.weight' has no row"),
        (
            {"lm_head": {"kernel": np.zeros((2, 3, 4))}},
            "'lm_head.kernel'.*names 2 axes of an array with shape",
        ),
    ],
)
def test_unknown_parameter_or_rank_raises(tree, message):
    with pytest.raises(REFUSALS, match=message):
        sharding.parameter_specs(tree, sharding.make_mesh("4x2"))


def test_shardings_and_bytes():
    mesh = sharding.make_mesh("4x2")
    tree = {"lm_head": {"kernel": jnp.ones((64, 32))}, "norm": {"scale": jnp.ones((64,))}}
    placed = jax.device_put(tree, sharding.parameter_shardings(tree, mesh))
    assert sharding.bytes_per_device(placed) == {str(device): 64 * 32 * 4 // 8 + 64 * 4 for device in jax.devices()}
    one = {"scale": jax.device_put(np.ones(6, np.float32), jax.devices()[1])}
    assert {name: size for name, size in sharding.bytes_per_device(one).items() if size} == {str(jax.devices()[1]): 24}


def test_mesh_of_live_arrays():
    mesh = sharding.make_mesh("2x2")
    placed = jax.device_put(jnp.ones((4,)), sharding.batch_sharding(mesh))
    assert placed.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("fsdp")), 1)
    assert sharding.mesh_of({"a": jnp.ones(3), "b": {"c": placed}}) == mesh
    assert sharding.mesh_of({"a": jnp.ones(3), "b": np.ones(3)}) is None
    assert sharding.mesh_of({"a": jax.device_put(jnp.ones(3), sharding.replicated(mesh))}) == mesh
    assert sharding.mesh_of({}) is None


def test_constrain_and_token_shards_follow_the_current_mesh():
    x = jnp.ones((8, 6))
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.token_shards(8, 6) == (1, 1)
    with jax.set_mesh(sharding.make_mesh("2x2x2")):
        assert sharding.token_shards(8, 6) == (2, 2)
        assert sharding.token_shards(7, 6) == (1, 2)
        assert sharding.token_shards(8, 5) == (2, 1)
    with jax.set_mesh(sharding.make_mesh("4x2")):
        assert sharding.token_shards(8, 6) == (4, 1)
        out = jax.jit(lambda x: sharding.constrain(x, "batch", "vocab"))(np.ones((8, 6), np.float32))
        assert out.sharding.shard_shape(out.shape) == (2, 3)
        with pytest.raises(REFUSALS, match="names 1 axes"):
            sharding.constrain(out, "batch")
