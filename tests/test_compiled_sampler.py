"""The sampler of Dream-7B, compiled for accelerators that are not here: which copies of weights its programs make.

Needs the compilers that the extras `plan-gpu` and `plan` bring. The published shapes are compiled, without any weights.
"""

import importlib.util
import pathlib
import sys

import pytest

import dream_jax
from dream_jax.plan import traffic
from dream_jax.plan.hardware import find_hardware

BENCH = pathlib.Path(__file__).parent.parent / "bench"
PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
needs_gpu_compiler = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, PLUGINS)),
    reason="XLA's plugin for CUDA is not installed; the extra `plan-gpu` brings it",
)
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; the extra `plan` brings it"
)
# A program for a device that is not here cannot be read from the cache of compiled programs.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_anew")]

PROMPT, NEW = 512, 512


@pytest.fixture(scope="module")
def modes():
    """The module bench/sampler_modes.py."""
    sys.path.insert(0, str(BENCH))
    try:
        import sampler_modes

        yield sampler_modes
    finally:
        sys.path.remove(str(BENCH))


class Compiled:
    """A compiled program of the sampler, and its weights."""

    def __init__(self, modes, hardware, mesh, *, layers, lower, base=None):
        mesh = find_hardware(hardware).mesh(mesh)
        everywhere = dream_jax.sharding.replicated(mesh)
        self.model = modes.abstract_model(dream_jax.PRESETS["dream-7b"], mesh, layers=layers, base=base)
        self.program = lower(self.model, array_sharding=everywhere).compile()
        self.text = self.program.as_text()
        least = modes.smallest_projection(self.model, mesh)
        self.copies = traffic.weight_copies(self.text, least=least, weights="model")


def sampling(modes, name):
    """A function that lowers exact sampling, or cached sampling of a token a pass, for one row."""
    config = modes.speed_modes(NEW, 32)[name]
    return lambda model, **options: modes.lower(model, config, batch=1, prompt=PROMPT, **options)


def window_pass(modes):
    return lambda model, **options: modes.lower_window_pass(model, batch=1, length=PROMPT + NEW, window=33, **options)


@needs_gpu_compiler
@pytest.mark.parametrize("name", ["exact", "cached, 1 a pass"])
def test_no_weights_are_copied_on_an_h200(modes, name):
    found = Compiled(modes, "h200:1", "1x1", layers="apart", lower=sampling(modes, name))
    assert found.copies == (), traffic.named(found.copies)
    assert found.program.memory_analysis().temp_size_in_bytes < 0.5 * 2**30


@needs_gpu_compiler
def test_stacked_layers_are_copied_on_an_h200(modes):
    """The test above can fail: the copies that a measured profile showed are found in the program that makes them."""
    found = Compiled(modes, "h200:1", "1x1", layers="stacked", lower=sampling(modes, "exact"))
    shapes = sorted(copy.shape.partition("{")[0] for copy in found.copies if copy.times == 28)
    wide, narrow = ["bf16[1,3584,18944]"] * 2, ["bf16[1,3584,4,128]"] * 2
    others = ["bf16[1,18944,3584]", "bf16[1,28,128,3584]", "bf16[1,3584,28,128]"]
    assert set(wide + narrow + others) <= set(shapes)
    assert "bf16[3584,4608]" in shapes  # q, k and v, joined in every pass
    assert shapes.count(wide[0]) == shapes.count(narrow[0]) == 2


@needs_gpu_compiler
def test_window_pass_reads_little_more_than_the_weights(modes):
    apart = Compiled(modes, "h200:1", "1x1", layers="apart", lower=window_pass(modes))
    assert apart.copies == (), traffic.named(apart.copies)
    weights = modes.weights_read(apart.model)
    assert weights == pytest.approx(14.14e9, rel=0.01)
    assert weights < traffic.bytes_read(apart.text) < 1.1 * weights
    stacked = Compiled(modes, "h200:1", "1x1", layers="stacked", lower=window_pass(modes))
    assert traffic.bytes_read(stacked.text) > 1.8 * weights


@needs_libtpu
@pytest.mark.parametrize("name", ["exact", "cached, 1 a pass"])
def test_temporaries_on_eight_v6e_chips(modes, name):
    found = Compiled(modes, "v6e:2x4", "1x8", layers="stacked", lower=sampling(modes, name))
    assert found.copies == (), traffic.named(found.copies)
    assert found.program.memory_analysis().temp_size_in_bytes < 0.4 * 2**30
