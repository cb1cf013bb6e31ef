"""Products in fp8: their roundings by hand, their gradients, their scales on a mesh, and where they are refused."""

import dataclasses
import functools
import importlib.util
import re
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from dream_jax import float8, sharding, xla_flags
from dream_jax.batch import Batch
from dream_jax.config import PRESETS
from dream_jax.model import abstract_model, merge_params, split_params
from dream_jax.objective import masked_diffusion_loss
from dream_jax.plan.hardware import find_hardware
from dream_jax.train_step import OptimizerConfig, StepConfig, init_state, make_train_step, put_batch
from dream_jax.trainer import TrainSettings
from dream_jax.trainer.build import build_step, describe_model

RNG = np.random.default_rng(0)
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def normal(*shape, spread=0.0):
    return (RNG.normal(size=shape) * 10.0 ** RNG.uniform(-spread, 0, shape)).astype(np.float32)


def by_hand(x, dtype):
    """The numbers that an 8-bit format keeps of a matrix, in float64."""
    scale = 2.0 ** np.ceil(np.log2(np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)))
    return (x / np.float32(scale)).astype(dtype).astype(np.float64) * scale


@functools.partial(jax.jit, static_argnums=3)
def with_gradients(x, kernel, cotangent, kind):
    with float8.products(kind):
        found, pull = jax.vjp(float8.matrix_product, x, kernel)
        return found, *pull(cotangent)


def test_product_and_gradients_are_those_of_the_rounded_matrices():
    x, kernel, cotangent = normal(24, 32, spread=3), normal(32, 16), normal(24, 16, spread=5)
    x8, kernel8, cotangent8 = by_hand(x, E4M3), by_hand(kernel, E4M3), by_hand(cotangent, E5M2)
    wanted = x8 @ kernel8, cotangent8 @ kernel8.T, x8.T @ cotangent8
    for found, exact in zip(with_gradients(x, kernel, cotangent, "fp8-emulated"), wanted, strict=True):
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
    plain = with_gradients(x, kernel, cotangent, "compute")
    np.testing.assert_allclose(plain[0], x @ kernel, rtol=1e-5, atol=1e-5)
    # Three and two bits of mantissa: relative errors of at most 1/16 and 1/8, which mostly cancel in a sum.
    for exact, rounded, most in zip(plain, wanted, (0.05, 0.1, 0.1), strict=True):
        assert 0.005 < np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < most


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e25])
def test_any_magnitude_is_scaled(scale):
    x, kernel = (normal(8, 16) * scale).astype(np.float32), normal(16, 8)
    found, dx, dkernel = with_gradients(x, kernel, normal(8, 8), "fp8-emulated")
    assert all(np.all(np.isfinite(one)) for one in (found, dx, dkernel))
    # Below 1e-12 the scale stays as it is, so that such numbers become zero.
    wanted = x @ kernel if scale > 1e-12 else np.zeros((8, 8))
    np.testing.assert_allclose(found, wanted, atol=0.1 * np.abs(x).max() * 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_not_hidden(bad):
    """A step with such a product is skipped, as without fp8."""
    x = normal(8, 16)
    x[3, 4] = bad
    found, _, dkernel = with_gradients(x, normal(16, 8), normal(8, 8), "fp8-emulated")
    assert np.all(np.isnan(found)) and np.all(np.isnan(dkernel))


def test_scale_is_that_of_the_whole_matrix_on_a_mesh():
    mesh, kind = sharding.make_mesh("4x2"), "fp8-emulated"
    x, kernel, cotangent = normal(32, 64, spread=4), normal(64, 16), normal(32, 16)
    whole = with_gradients(x, kernel, cotangent, kind)
    axes = (PartitionSpec("fsdp"), PartitionSpec("fsdp", "tensor"), PartitionSpec("fsdp", "tensor"))
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(one, NamedSharding(mesh, spec))
            for one, spec in zip((x, kernel, cotangent), axes, strict=True)
        ]
        divided = with_gradients(*arrays, kind)
    for one, other in zip(divided, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(other).max())


# ------------------------------------------------------------------------------------------------------- in a step


SMALL = dataclasses.replace(PRESETS["nano"], num_hidden_layers=1, hidden_size=64, intermediate_size=96)
GRAPHDEF, SHAPES = split_params(abstract_model(SMALL))


def random_params():
    rng = np.random.default_rng(0)
    draw = lambda path, leaf: rng.normal(path[-1].key == "scale", 0.05, leaf.shape).astype(np.float32)
    return jax.tree_util.tree_map_with_path(draw, SHAPES)


ROWS = Batch(
    tokens_BT=RNG.integers(0, 256, (4, 16)).astype(np.int32),
    maskable_BT=np.ones((4, 16), bool),
    row_B=np.arange(4, dtype=np.int32),
)


def test_the_choice_ends_with_its_context():
    model, masked = merge_params(GRAPHDEF, random_params()), RNG.random((4, 16)) < 0.5
    loss = lambda: float(masked_diffusion_loss(model, ROWS.tokens_BT, masked, np.full(4, 0.5, np.float32))[0])
    before = loss()
    with float8.products("fp8-emulated"):
        inside = loss()
    assert inside != before and inside == pytest.approx(before, rel=0.01)
    assert loss() == before


@pytest.mark.slow
def test_a_step_in_fp8_is_close_to_one_without():
    params, losses, moved = random_params(), {}, {}
    optimizer, mesh = OptimizerConfig(learning_rate=1e-3, total_steps=10), sharding.make_mesh("1x1")
    for kind in ("compute", "fp8-emulated"):
        config = StepConfig(global_batch=4, products=kind)
        step = make_train_step(GRAPHDEF, optimizer.make(), optimizer.schedule(), config, mesh)
        state, metrics = step(init_state(params, optimizer.make(), mesh), put_batch(ROWS, mesh))
        losses[kind] = float(metrics["loss"])
        moved[kind] = np.asarray(
            state.params["layers"]["mlp"]["up"]["kernel"] - params["layers"]["mlp"]["up"]["kernel"]
        )
    assert losses["compute"] != losses["fp8-emulated"]
    assert losses["fp8-emulated"] == pytest.approx(losses["compute"], rel=0.01)
    # The first update of Adam is the sign of the gradient.
    assert 0.9 < np.mean(np.sign(moved["compute"]) == np.sign(moved["fp8-emulated"])) < 1


def test_settings_reach_the_step_and_are_refused_without_fp8():
    settings = TrainSettings.flat(model="nano", products="fp8")
    mesh = sharding.make_mesh("1x1")
    model = describe_model(settings, mesh)
    with pytest.raises(ValueError, match=r"--products fp8 needs NVIDIA GPUs from Hopper on .* this is cpu"):
        build_step(settings, model, mesh)
    build_step(settings.replaced(products="fp8-emulated"), model, mesh)
    with pytest.raises(ValueError, match="products='int4' is not one of"):
        TrainSettings.flat(products="int4")


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_products_without_an_effect_are_refused(base):
    """The codes of a quantised base are multiplied in the dtype of the computation, whatever the products are."""
    settings = TrainSettings.flat(model="nano", lora_rank=4, products="fp8-emulated", base="bfloat16")
    with pytest.raises(
        ValueError, match=f"--products fp8-emulated has no effect on a base in {base}, .*--base bfloat16"
    ):
        settings.replaced(base=base)
    settings.replaced(base=base, products="compute")


@pytest.mark.usefixtures("unchecked")
def test_capabilities_of_other_makers():
    """A GPU of AMD says "gfx942": it is refused with the message of `check_devices`."""
    made = lambda text: types.SimpleNamespace(compute_capability=text)
    assert [float8._capability(made(text)) for text in ("9.0", "gfx942", None)] == [(9, 0), (0,), (0,)]


@pytest.mark.usefixtures("unchecked")
def test_unknown_products_are_refused():
    with pytest.raises(ValueError, match="products='int4' is not one of"):
        float8.products("int4")
    with pytest.raises(ValueError, match="products='int4' is not one of"):
        StepConfig(global_batch=4, products="int4")


@pytest.mark.parametrize(
    ("kind", "platform", "able"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", True),
        ("NVIDIA B200", "gpu", True),
        ("NVIDIA A100-SXM4-80GB", "gpu", False),
        ("TPU v6 lite", "tpu", False),
    ],
)
def test_chips_are_known(kind, platform, able):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    mesh = AbstractMesh((8, 1, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    float8.check_devices(mesh, "compute")
    float8.check_devices(mesh, "fp8-emulated")
    if able:
        float8.check_devices(mesh, "fp8")
    else:
        with pytest.raises(ValueError, match=re.escape(f"but this is {kind}")):
            float8.check_devices(mesh, "fp8")


@pytest.mark.slow
def test_compiled_for_hopper_the_products_are_those_of_cublas_in_fp8():
    if not importlib.util.find_spec("jax_cuda12_plugin"):
        pytest.skip("needs the extra plan-gpu, to compile for an H200")
    mesh = find_hardware("h200:1").mesh("1x1")
    float8.check_devices(mesh, "fp8")
    options = xla_flags.compiler_options("gpu", "fp8", {})
    whole = NamedSharding(mesh, PartitionSpec())
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=whole)
    with jax.set_mesh(mesh):
        arguments = shape(4096, 3584), shape(3584, 18944), shape(4096, 18944)
        text = with_gradients.lower(*arguments, "fp8").compile(compiler_options=options).as_text()
    called = re.findall(r'custom_call_target="([^"]+)"', text)
    assert called.count("__cublas$lt$matmul$f8") == 3 and not any("gemm" in name for name in called)


def test_flags_of_the_user_win():
    chosen = xla_flags.compiler_options("gpu", "fp8", {})
    assert chosen == {"xla_gpu_enable_triton_gemm": False}
    assert xla_flags.compiler_options("gpu", "fp8", {"XLA_FLAGS": "--a=1 --xla_gpu_enable_triton_gemm=true"}) == {}
    assert xla_flags.compiler_options("gpu", "compute", {}) == xla_flags.compiler_options("cpu", "fp8", {}) == {}
    for name, flags in xla_flags.CANDIDATES.items():
        given = {"XLA_FLAGS": f"--b=2 --{flags[0].name}=mine"}
        words = xla_flags.in_environment(name, given).split()
        assert words[:2] == given["XLA_FLAGS"].split() and len(words) == 1 + len(flags)
