"""Rematerialisation policies: each keeps and repeats what the tables say; `auto` takes the fastest that fits."""

import dataclasses
import json
import math
from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo

from dream_jax import pretrained, sharding
from dream_jax.attention import target_platform
from dream_jax.chips import CHIPS
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.plan import PlanSettings, make_plan
from dream_jax.remat import KEPT, Remat, RematSetting
from dream_jax.step_memory import kept_bytes, recomputed_attention, recomputed_products
from dream_jax.train_step import init_state, put_batch
from dream_jax.trainer import TrainSettings, remat_choice
from dream_jax.trainer.build import abstract_step, step_shape
from dream_jax.trainer.folder import begun_remat
from dream_jax.trainer.prepared import prepare
from dream_jax.trainer.remat_choice import choose

GIB = 2**30
POLICIES = get_args(Remat)
BATCH, LENGTH = 2, 8
SMALL = DreamConfig(
    **{
        **dataclasses.asdict(PRESETS["nano"]),
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
)


def gradient_of(config, remat, dtype="float32"):
    """Returns the gradient of a loss by the parameters, and the parameters, as shapes."""
    model = Dream(config, rngs=nnx.Rngs(0), remat=remat, compute_dtype=dtype)
    graphdef, params = split_params(model)
    tokens = jnp.arange(BATCH * LENGTH, dtype=jnp.int32).reshape(BATCH, LENGTH)

    def loss(params):
        return jnp.mean(jax.nn.logsumexp(merge_params(graphdef, params)(tokens), axis=-1) ** 2)

    return loss, params


def inner(eqn):
    """Yields the programs inside an operation."""
    for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda one: hasattr(one, "eqns")):
        value = getattr(value, "jaxpr", value)
        if hasattr(value, "eqns"):
            yield value


def count(program, weigh):
    """Returns the sum of `weigh(operation)` over a program, each operation of a scan counted for each of its rounds."""
    total = 0.0
    for eqn in program.eqns:
        if not eqn.outvars:
            continue  # nothing uses it, so the compiler removes it
        rounds = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += weigh(eqn) + rounds * sum(count(one, weigh) for one in inner(eqn))
    return total


def product_flops(eqn):
    if eqn.primitive.name != "dot_general":
        return 0.0
    (contracted, _), _ = eqn.params["dimension_numbers"]
    return 2.0 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)


def kept_by(remat):
    """Returns the bytes that the layers save in the forward pass for the backward pass; parameters are not counted."""
    loss, params = gradient_of(SMALL, remat)
    saved = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params))
    # "dots" saves the results of the products as matrices [L, rows x tokens, ...].
    leading = ((SMALL.num_hidden_layers, BATCH, LENGTH), (SMALL.num_hidden_layers, BATCH * LENGTH))
    results = [leaf for leaf in saved if leaf.shape[:3] == leading[0] or leaf.shape[:2] == leading[1]]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in results)


@pytest.mark.parametrize("remat", [remat for remat in POLICIES if remat not in ("none", "offload", "full")])
def test_each_policy_keeps_and_repeats_what_the_table_says(remat):
    positions = BATCH * LENGTH * SMALL.num_hidden_layers
    assert kept_by(remat) == positions * kept_bytes(SMALL, remat, 4, kernel=False)
    statistics = 4 * SMALL.num_attention_heads * ("attention" in KEPT.get(remat, ()))
    assert kept_bytes(SMALL, remat, 4) == kept_bytes(SMALL, remat, 4, kernel=False) + statistics
    loss, params = gradient_of(SMALL, remat)
    once, params_once = gradient_of(SMALL, "none")
    repeated = count(jax.make_jaxpr(jax.grad(loss))(params).jaxpr, product_flops)
    repeated -= count(jax.make_jaxpr(jax.grad(once))(params_once).jaxpr, product_flops)
    each = recomputed_products(SMALL, remat) + recomputed_attention(SMALL, remat, LENGTH, kernel=False)
    assert repeated == positions * each


@pytest.mark.parametrize(("remat", "runs"), [("full", 2), ("dots", 2), ("qkv", 2), ("attention", 1), ("products", 1)])
@pytest.mark.parametrize(("platform", "kernel"), [("gpu", "dot_product_attention_fwd_wrapper"), ("tpu", "pallas_call")])
def test_attention_kernel_does_not_run_again_if_its_output_is_kept(remat, runs, platform, kernel, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    config = dataclasses.replace(SMALL, hidden_size=256)
    loss, params = gradient_of(config, remat, "bfloat16")
    with target_platform(platform):
        program = jax.make_jaxpr(jax.grad(loss))(params)
    found = count(program.jaxpr, lambda eqn: eqn.primitive.name == kernel)
    backward = 2 if platform == "tpu" else 0  # two kernels of splash, for the queries and for the keys and values
    assert found == config.num_hidden_layers * (runs + backward)


def test_policies_of_the_table_are_ordered_by_what_they_keep():
    config = PRESETS["dream-7b"]
    assert get_args(RematSetting) == ("auto", *POLICIES)
    assert KEPT.keys() | {"none", "dots", "offload"} == set(POLICIES)
    sizes = [kept_bytes(config, remat, 2) for remat in KEPT]
    assert sizes[:-2] == sorted(sizes[:-2], reverse=True)
    # Whoever keeps more repeats less.
    for one in KEPT:
        for other in KEPT:
            if set(KEPT[one]) >= set(KEPT[other]):
                assert recomputed_products(config, one) <= recomputed_products(config, other)
                assert recomputed_attention(config, one, 4096) <= recomputed_attention(config, other, 4096)


# --- auto


def chosen(limit, compiled=None, begun=None, platform="gpu", **settings):
    """Returns the choice for four rows of Dream-7B on an H200 (or on a CPU), for a limit in GiB."""
    options = {"model": "dream-7b", "compute_dtype": "bfloat16", "batch_size": 4, "moments": "int8"} | settings
    run, mesh = TrainSettings.flat(**options), sharding.make_mesh("1x1")
    found = choose(
        abstract_step(run, mesh, 4096),
        step_shape(run, mesh, 4096),
        platform=platform,
        chip=CHIPS["h200"] if platform == "gpu" else None,
        limit=None if limit is None else int(limit * GIB),
        compiled=compiled,
        begun=begun,
    )
    assert found.reason.startswith(f"remat auto: {found.taken}, ")
    return found


def test_auto_takes_less_with_less_memory():
    taken = [chosen(limit).taken for limit in (400, 139, 125, 110, 102, 97, 93, 87)]
    assert taken[0] == "products" and taken[-1] == "offload"
    kept = [kept_bytes(PRESETS["dream-7b"], remat, 2) for remat in taken]
    assert kept == sorted(kept, reverse=True) and len(set(taken)) > 4
    assert chosen(87, platform="cpu").taken != "offload"  # the memory of a CPU is that of the host
    nothing = chosen(60)
    assert (nothing.taken, nothing.fits) == ("full", False) and "no policy fits" in nothing.reason
    assert chosen(None).taken == "full" and chosen(None, begun="qkv").taken == "qkv"


def test_auto_believes_the_compiler():
    asked = []

    def compiled(remat):
        asked.append(remat)
        return None if len(asked) == 1 else int((131 if len(asked) == 2 else 120) * GIB)

    found = chosen(132, compiled)
    # The first is refused, the second is within the memory but not within its share, the third fits.
    assert (len(asked), found.taken, found.peak) == (3, asked[-1], 120 * GIB)
    assert "as compiled" in found.reason and f"{asked[0]} would need more than there is" in found.reason


def test_resumed_run_keeps_its_policy_if_it_fits():
    assert chosen(400, begun="qkv").taken == "qkv"
    assert chosen(90, begun="products").taken != "products"
    # The compiler decides, if there is one: it may find more than the arithmetic.
    assert chosen(400, lambda remat: int(399 * GIB), begun="qkv").taken != "qkv"


def test_a_plan_says_what_auto_takes_and_counts_with_the_share(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    settings = TrainSettings.flat(model="dream-7b", batch_size=4, max_length=4096, moments="int8", steps=10)
    wanted = PlanSettings(plan=True, topology="h200:1", compile=False)
    less = make_plan(settings, wanted)
    assert less.memory.limit == int(0.75 * 139.8 * GIB) and "=0.75" in less.memory.share
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    more = make_plan(settings, wanted)
    assert more.memory.limit == int(0.95 * CHIPS["h200"].memory) and more.memory.share.startswith("95% of 139.80 GiB")
    assert more.settings["remat"] != less.settings["remat"] and more.settings["remat"] in more.remat
    assert more.time.remat_flops < less.time.remat_flops
    assert less.fits and more.fits


RUN = {"steps": 2, "batch_size": 8, "eval_rows": 0}


def test_a_run_on_a_cpu_takes_none_as_before(tmp_path):
    settings, mesh = TrainSettings.flat(out=tmp_path / "run", **RUN), sharding.make_mesh("1x1")
    run = prepare(settings, mesh)
    assert run.model.remat == "none" and run.remat is not None and run.remat.fits
    named = prepare(settings.replaced(remat="none"), mesh)
    assert named.remat is None and named.graphdef == run.graphdef


@pytest.mark.parametrize("older", [False, True])
def test_a_resumed_run_reads_the_policy_of_its_beginning(tmp_path, older):
    settings, mesh = TrainSettings.flat(out=tmp_path, **RUN), sharding.make_mesh("1x1")
    before = settings.replaced(remat="full") if older else settings
    (tmp_path / "settings.json").write_text(json.dumps(before.plain()))
    (tmp_path / "data.json").write_text(json.dumps({"answer_formats": 2} | ({} if older else {"remat": "full"})))
    assert begun_remat(tmp_path) == "full"
    assert prepare(settings, mesh).model.remat == "full"
    assert begun_remat(tmp_path / "missing") is None


@pytest.mark.slow
def test_a_run_on_an_accelerator_compiles_the_chosen_step_once(tmp_path, monkeypatch):
    """The size of the compiled step decides, and the run does not compile the same step again."""
    settings, mesh = TrainSettings.flat(out=tmp_path / "run", layers="stacked", **RUN), sharding.make_mesh("1x1")
    monkeypatch.setattr(remat_choice, "memory_of_device", lambda devices: 64 * GIB)
    monkeypatch.setattr(remat_choice.sharding, "platform_of", lambda mesh: "gpu")
    tried, compilations = [], []
    size = remat_choice.peak_bytes

    def peak(compiled):
        tried.append(compiled)
        return 65 * GIB if len(tried) == 1 else size(compiled)

    monkeypatch.setattr(remat_choice, "peak_bytes", peak)
    run = prepare(settings, mesh)
    monkeypatch.undo()
    assert len(tried) == 2 and run.model.remat not in ("none", "full")
    assert run.remat is not None and "as compiled" in run.remat.reason
    params = split_params(pretrained.load("nano", mesh=mesh, layers="stacked"))[1]
    state = init_state(params, run.optimizer, mesh)
    with run.batches:
        batch = put_batch(next(run.batches), mesh)
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compilations.append(name) if name.endswith("backend_compile_duration") else None
    )
    run.step(state, batch, {})
    assert compilations == []
