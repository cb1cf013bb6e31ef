"""A base in int8 or nf4 that samples: its forms, its presets, and the program that an H200 would run."""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT, run_script
from flax import nnx
from golden_numbers import GOLDEN, arrays
from golden_numbers import model as golden_model
from marking import slow

import dream_jax
from dream_jax import layer_forms, lora, quantisation
from dream_jax.model import Dream, split_params
from dream_jax.plan import traffic
from dream_jax.plan.hardware import find_hardware
from dream_jax.pretrained import load
from dream_jax.quantisation import COMPILER_OPTIONS
from dream_jax.sampler import SamplerConfig, WindowCache, compiled, generate
from dream_jax.target import target_platform


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory with a model of two layers with random weights, whose products in bfloat16 can be fused."""
    path = tmp_path_factory.mktemp("int8") / "model"
    config = dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=2)
    dream_jax.save(Dream(config, rngs=nnx.Rngs(1)), path)
    return path


def tokens(seed=0, rows=2, length=12):
    return np.random.default_rng(seed).integers(0, 250, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("name", ["tiny_a", slow("tiny_b")])
def test_joined_codes_are_the_codes(name):
    """Codes and scales are joined as they are: equal logits, and equal arrays when they are separated again."""
    separate, joined = (
        load(GOLDEN / name / "hf", base="int8", layers="apart", joined=joined) for joined in (False, True)
    )
    assert joined.layer_modules()[0].attn.qkv.codes is not None and joined.layer_modules()[0].mlp.gate is None
    ids = arrays(name)["fwd_tokens"]
    np.testing.assert_allclose(joined(ids), separate(ids), rtol=0, atol=1e-4)
    assert lora.base_of(joined) == "int8"
    layer_forms.separate(joined)
    jax.tree.map(np.testing.assert_array_equal, split_params(joined)[1], split_params(separate)[1])


def test_what_is_not_joined():
    """nf4 has two elements in a byte and gains nothing; an adapter belongs to one projection."""
    nf4 = load(GOLDEN / "tiny_a" / "hf", base="nf4", layers="apart", joined=True)
    assert nf4.layer_modules()[0].attn.qkv is None


def test_one_key_value_head_can_be_quantised():
    """The hash of a bias [1, H] was refused, so that models with one key/value head could not be quantised as they load."""
    assert golden_model("tiny_b").config.num_key_value_heads == 1
    float_model = golden_model("tiny_b")
    assert lora.identity(float_model) == load(GOLDEN / "tiny_b" / "hf", base="int8").base_identity


def test_rounded_scales_change_little():
    model = load(GOLDEN / "tiny_a" / "hf", base="int8")
    ids = arrays("tiny_a")["fwd_tokens"]
    before = model(ids)
    lora.round_scales(model)
    leaves = jax.tree_util.tree_leaves_with_path(split_params(model)[1])
    scales = [leaf for path, leaf in leaves if path[-1].key == "scales"]
    assert len(scales) == 7 and {leaf.dtype for leaf in scales} == {jnp.dtype("bfloat16")}
    assert 0 < lora.logit_error(before, model(ids))["relative"] < 0.01


def test_options_of_xla_are_for_int8_on_gpus(small, monkeypatch):
    model = load(small, "bfloat16", base="int8")
    assert not compiled.needs_options(model)
    with target_platform("gpu"):
        assert compiled.needs_options(model)
        assert not compiled.needs_options(load(small, "bfloat16"))
        assert not compiled.needs_options(load(small, "bfloat16", base="nf4"))
        assert not jax.eval_shape(lambda model: jnp.array(compiled.needs_options(model)), model).weak_type
        monkeypatch.setenv("XLA_FLAGS", f"--{next(iter(COMPILER_OPTIONS))}=false")
        assert not compiled.needs_options(model)
        monkeypatch.setenv("XLA_FLAGS", f"--{next(iter(COMPILER_OPTIONS))}=true")
        assert compiled.needs_options(model)
        monkeypatch.delenv("XLA_FLAGS")
        monkeypatch.setattr(compiled, "COMPILER_OPTIONS", {"xla_gpu_option_of_the_past": True})
        compiled._has_options.cache_clear()
        assert not compiled.needs_options(model)
    compiled._has_options.cache_clear()


def test_only_programs_with_options_multiply_with_the_codes(small):
    model, x = load(small, "bfloat16", base="int8"), jnp.zeros((4, 128), jnp.bfloat16)
    codes, seen = jnp.zeros((128, 128), jnp.int8), []
    program = compiled.ModelProgram(lambda model, x: seen.append(quantisation.is_fused(x, codes, 128)) or x)
    for run in (program, program.lower, jax.jit(program)):
        run(model, x)  # for a CPU
        with target_platform("gpu"):
            run(model, x)
        program.clear_cache()
    # A program inside another one has its options, and the last program has none.
    assert seen == [False, True, False, True, False, False]


@pytest.mark.slow
def test_programs_with_options_sample(small, monkeypatch):
    """A cached sampler whose window passes multiply with the codes writes nearly the tokens of dequantised kernels."""
    calls, fused_product = [], quantisation._fused_product
    monkeypatch.setattr(quantisation, "_fused_product", lambda *arrays: calls.append(1) or fused_product(*arrays))
    model = load(small, "bfloat16", base="int8", attention_backend="xla")
    config = SamplerConfig(max_new_tokens=8, steps=8, block_length=4, cache=WindowCache(), alg="entropy")
    plain = generate(model, tokens(), config, jax.random.key(0))
    with target_platform("gpu"):
        assert compiled.needs_options(model)
        # A program without the options of XLA must not multiply with the codes: the kernels would be written to memory.
        model(tokens())
        assert not calls
        fused = generate(model, tokens(), config, jax.random.key(0))
    assert calls
    assert np.mean(np.asarray(plain.tokens) == np.asarray(fused.tokens)) > 0.5
    assert int(plain.forwards) == int(fused.forwards)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["int8", "nf4"])
@pytest.mark.parametrize(("preset", "mesh"), [("exact", "4x2"), ("balanced", "1x1"), ("fast", "1x1"), ("fast", "4x2")])
def test_every_preset_samples_from_codes(small, preset, mesh, base):
    flags = ("--prompt", "2 + 2 =", "--tokenizer", "bytes", "--max-new-tokens", "16", "--template", "raw")
    run = run_script("sample.py", "--model", small, "--base", base, "--preset", preset, "--mesh", mesh, *flags)
    assert run.returncode == 0, run.stdout + run.stderr


# ------------------------------------------------------------------------------------------------ compiled for an H200


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_anew")  # jax cannot read a stored program for a device that is not here
def test_window_pass_on_an_h200_reads_codes(monkeypatch):
    """A window pass at batch 1 reads at most 0.6 of the bytes of bfloat16 weights, and writes no dequantised kernel."""
    hardware = find_hardware("h200:1")
    if hardware.devices is None:
        pytest.skip(f"compiling for an H200 needs XLA's compiler for GPUs: {hardware.missing}")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    modes = importlib.import_module("sampler_modes")
    config, mesh = dataclasses.replace(dream_jax.PRESETS["dream-7b"], num_hidden_layers=1), hardware.mesh("1x1")
    bfloat16, int8 = (modes.abstract_model(config, mesh, layers="apart", base=base) for base in (None, "int8"))
    everywhere = dream_jax.sharding.replicated(mesh)
    lowered = modes.lower_window_pass(int8, batch=1, length=1024, window=33, array_sharding=everywhere, unembeds=False)
    text = lowered.compile().as_text()
    weights, codes = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(split_params(model)[1]["layers"]))
        for model in (bfloat16, int8)
    )
    read = traffic.bytes_read(text)
    assert codes < 0.52 * weights and read < 0.6 * weights, (codes / weights, read / weights)
    smallest = 3584 * 512  # the codes of one projection, k or v
    assert not traffic.weight_copies(text, least=smallest, weights="model")
