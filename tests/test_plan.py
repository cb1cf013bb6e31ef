"""Plans: the table of chips, the arithmetic against compilers, time and money, refusals, and `train.py --plan`."""

import dataclasses
import importlib.util
import json
import pathlib
import runpy
import sys
import typing

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dream_jax import sharding, step_memory
from dream_jax.chips import CHIPS, chip_of
from dream_jax.device_memory import shortage
from dream_jax.plan import PlanSettings, RunPlan, arithmetic, cost, hardware, make_plan, planner, render
from dream_jax.plan.compile import Compiled, compile_step
from dream_jax.plan.hardware import Hardware, find_hardware
from dream_jax.plan.hlo import Collective
from dream_jax.remat import Remat
from dream_jax.trainer import TrainSettings
from dream_jax.trainer.build import abstract_step

ROOT = pathlib.Path(__file__).parent.parent
GIB = 2**30

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed; the extra `plan` brings it"
)


def training(**options):
    return TrainSettings.flat(**{"batch_size": 8, "mesh": "8x1", "max_length": 64, "steps": 100, **options})


def dream_7b(**options):
    return training(**{"model": "dream-7b", "remat": "full", "max_length": 4096, **options})


def estimated(settings, topology, **options):
    return make_plan(settings, PlanSettings(plan=True, topology=topology, compile=False, **options))


# --- the table


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("cpu", None),
        ("TPU v3", None),
    ],
)
def test_chip_of_a_device_kind(kind, name):
    found = chip_of(kind)
    assert (found and found.name) == name


def test_table_is_consistent():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert all(chip_of(kind) == chip for kind in chip.kinds)
        assert 10 * GIB < chip.memory < 200 * GIB
        # A chip computes some hundred operations for each byte from its memory, and its memory outruns its links.
        assert 100 < chip.peak_flops / chip.memory_bandwidth < 700
        assert chip.interconnect < chip.memory_bandwidth
        assert (chip.node is None) == (chip.platform == "tpu") == (chip.network_bandwidth is None)
        if chip.topology:
            example = chip.topology.split()[0]
            assert find_hardware(example, compiles=False).chip == chip


@needs_libtpu
@pytest.mark.parametrize("name", [chip.name for chip in CHIPS.values() if chip.platform == "tpu" and chip.topology])
def test_memory_of_a_tpu_is_what_libtpu_says(name):
    found = find_hardware(CHIPS[name].topology)
    assert found.devices[0].device_kind in CHIPS[name].kinds
    place = NamedSharding(found.mesh(f"{found.num_devices}x1"), PartitionSpec())
    large = jax.ShapeDtypeStruct((2**16, 2**22), jnp.float32, sharding=place)  # 1 TiB, and as much for the result
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.jit(lambda x: x + 1).lower(large).compile()
    said = shortage(caught.value)
    assert said.asked == 2 * 2**40
    assert f"{CHIPS[name].memory / GIB:.2f}G" in said.words


# --- memory


def test_what_a_step_is_given_is_exact():
    settings, mesh = training(mesh="4x2", max_length=16, moments="bfloat16"), sharding.make_mesh("4x2")
    step = abstract_step(settings, mesh, 16)
    found = step_memory.bytes_on_device(step, planner._shape(settings, mesh, rows_of(16)), "cpu")
    compiled = compile_step(step, unknown_trips=2.0)
    assert isinstance(compiled, Compiled)
    assert found.given == compiled.given
    assert compiled.peak > compiled.given
    assert {"all-gather", "all-reduce"} <= {one.kind for one in compiled.collectives}


def rows_of(length):
    return planner.PlannedRows(max_length=length, masked_share=0.5)


def test_sizes_without_devices_say_the_same_as_devices():
    settings = training()
    absent = dataclasses.replace(find_hardware("v5e:2x4", compiles=False)).mesh("8x1")
    here = sharding.make_mesh("8x1")
    shapes = [planner._shape(settings, mesh, rows_of(64)) for mesh in (absent, here)]
    assert shapes[0] == shapes[1]
    steps = [abstract_step(settings, mesh, 64) for mesh in (absent, here)]
    assert step_memory.bytes_on_device(steps[0], shapes[0], "tpu") == step_memory.bytes_on_device(
        steps[1], shapes[1], "tpu"
    )
    with pytest.raises(ValueError, match="has no devices, so the step cannot be compiled"):
        steps[0].step.lower(steps[0].state, steps[0].batch)


def test_absent_devices_decide_the_compute_dtype():
    for topology, wanted in [("v5e:2x4", "bfloat16"), ("h100:8", "bfloat16")]:
        mesh = find_hardware(topology, compiles=False).mesh("8x1")
        assert abstract_step(dream_7b(), mesh, 64).model.compute_dtype == wanted
    assert abstract_step(dream_7b(), sharding.make_mesh("8x1"), 64).model.compute_dtype == "float32"


RESULTS = ROOT / "bench" / "results" / "plans.json"
COMPILED = {
    name: one["plan"]
    for name, one in json.loads(RESULTS.read_text(encoding="utf-8")).items()
    if one["plan"]["memory"]["compiled"]
}


@pytest.fixture(scope="module")
def bench():
    """The names in bench/plans.py, whose imports are found beside it."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        return runpy.run_path(str(ROOT / "bench" / "plans.py"))
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("name", COMPILED)
def test_arithmetic_is_near_what_was_compiled(bench, name):
    topology, settings = bench["CASES"][name]
    # With "auto" arithmetic alone may take another policy than with the compiler.
    settings = settings | {"remat": COMPILED[name]["settings"]["remat"]}
    plan = estimated(TrainSettings.flat(**settings), topology)
    assert plan.memory.peak == pytest.approx(COMPILED[name]["memory"]["peak"], rel=0.15)


def test_what_auto_took_fits_into_the_share_in_force():
    every = {name: one["plan"] for name, one in json.loads(RESULTS.read_text(encoding="utf-8")).items()}
    auto = {name: plan for name, plan in every.items() if plan["remat"] is not None}
    assert {plan["chip"] for plan in auto.values()} == {"h100", "h200", "v5p", "v6e"}
    for plan in auto.values():
        memory = plan["memory"]
        assert memory["limit"] == Hardware.limit_of(CHIPS[plan["chip"]])
        assert plan["fits"] and memory["peak"] <= memory["limit"]
        assert plan["remat"].startswith(f"remat auto: {plan['settings']['remat']}, ")


def test_tables_of_the_documentation_are_those_of_the_results(bench):
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    for begin, content in bench["written_tables"]().items():
        assert text.split(begin)[1].split(bench["END"])[0].strip() == content
    assert bench["KEEPS"].keys() == set(typing.get_args(Remat))


def test_settings_move_memory_the_right_way():
    def peak(**options):
        return estimated(dream_7b(**options), "v6e:2x4").memory.estimate

    base = peak()
    assert peak(remat="none") > peak(remat="dots") > base > peak(moments="bfloat16") > peak(moments="int8")
    assert peak(batch_size=16) > base
    assert peak(max_length=8192) > base
    assert peak(attention="xla") > base
    on_host = estimated(dream_7b(moments_on_host=True), "v6e:2x4").memory
    assert on_host.estimate < base
    assert on_host.host == pytest.approx(7.09 * GIB, rel=0.01)


# --- arithmetic, time and money


@pytest.mark.parametrize(("length", "gflop"), [(2048, 44.9), (4096, 47.4), (8192, 52.3)])
def test_flops_of_a_token(length, gflop):
    # By hand: 6 x 7.07e9 + 12 x 28 x 3584 x S. The head counts at every position here.
    mesh = find_hardware("v6e:2x4", compiles=False).mesh("8x1")
    settings = dream_7b(max_length=length)
    step = abstract_step(settings, mesh, length)
    shape = dataclasses.replace(planner._shape(settings, mesh, rows_of(length)), masked_share=1.0)
    tokens = 8 * length
    assert arithmetic.model_flops(step, shape) / tokens / 1e9 == pytest.approx(gflop, rel=0.002)
    # Recomputing the layers is a third of their work, the head's and the last product of the MLP apart.
    head = 6 * 3584 * 152064 * tokens
    last = 2 * 28 * 3584 * 18944 * tokens
    body = arithmetic.model_flops(step, shape) - head
    assert step_memory.remat_flops(step, shape, "tpu") == pytest.approx(body / 3 - last, rel=0.01)
    assert step_memory.remat_flops(step, dataclasses.replace(shape, remat="none"), "tpu") == 0


def test_adapter_costs_two_thirds_of_the_work_and_no_gradients_of_the_base():
    whole = estimated(dream_7b(), "v6e:2x4")
    adapter = estimated(dream_7b(lora_rank=32), "v6e:2x4")
    four_bits = estimated(dream_7b(lora_rank=32, base="nf4"), "v6e:2x4")
    assert (adapter.trained, adapter.frozen) == (80_740_352, 7_615_616_512)
    assert four_bits.frozen == adapter.frozen and four_bits.time == dataclasses.replace(
        adapter.time, memory_traffic=four_bits.time.memory_traffic
    )
    # 4 + 12 S terms over 6 + 12 S terms, and the adapter's own.
    assert 0.65 < adapter.time.model_flops / whole.time.model_flops < 0.75
    # As many bytes as one of the adapter's two float32 moments: nothing of the base's. (B is whole on every device here.)
    assert adapter.memory.gradients == pytest.approx(adapter.memory.optimizer / 2, rel=0.01)
    assert adapter.memory.gradients < 4 * adapter.trained
    # A weight in two bytes, and in half a byte and its scale; norms, embedding and head stay as they are.
    assert adapter.memory.parameters == pytest.approx(whole.memory.parameters / 2, rel=0.15)
    assert four_bits.memory.parameters < 0.5 * adapter.memory.parameters
    assert four_bits.memory.estimate < adapter.memory.estimate < whole.memory.estimate


def test_loss_goes_round_as_the_fullest_device_needs():
    shape = step_memory.StepShape(
        batch=8,
        accumulation=1,
        length=4096,
        mesh={"fsdp": 8, "tensor": 1, "sequence": 1},
        remat="full",
        masked_share=0.5,
    )
    # One row a device, 882 logits at a time: the latest row has t = 15/16, 3840 of 4096 positions.
    assert arithmetic.loss_chunks(shape, 152064, "tpu") == 5
    # All rows on one device: half of them.
    together = dataclasses.replace(shape, mesh={"fsdp": 1, "tensor": 1, "sequence": 1})
    assert arithmetic.loss_chunks(together, 152064, "tpu") == 19
    assert arithmetic.loss_chunks(dataclasses.replace(shape, masked_share=0.05), 152064, "tpu") == 1


def test_time_and_price_by_hand():
    found = find_hardware("v6e:2x4", compiles=False)
    moved = [Collective(kind="all-gather", count=1, sent=40e9), Collective(kind="all-reduce", count=1, sent=40e9)]
    time = cost.step_time(
        found, (0.25, 0.5), model_flops=6 * 918e12, remat_flops=2 * 918e12, traffic=0.32e12, collectives=moved
    )
    # Eight chips: 8 / 8 peaks at a half and at a quarter; four links of 100 GB/s, or two.
    assert time.compute == pytest.approx((4.0, 2.0))
    assert time.memory_traffic == pytest.approx(0.2)
    assert time.network == pytest.approx((0.4, 0.2))
    assert (time.fast, time.slow) == pytest.approx((2.0, 4.4))
    assert time.mfu == pytest.approx((6 / 8 / 4.4, 6 / 8 / 2.0))
    settings = TrainSettings.flat(steps=1800, price_per_chip_hour=14.2, currency="rmb", rmb_per_usd=7.1)
    price = cost.price(found, time, settings)
    assert price.hours == pytest.approx((1.0, 2.2))
    assert price.usd == pytest.approx((16.0, 35.2))
    assert price.rmb == pytest.approx((113.6, 249.92))
    dollars = settings.replaced(price_per_chip_hour=2.0, currency="usd")
    assert cost.price(found, time, dollars) == price
    listed = cost.price(found, time, TrainSettings())
    assert listed.usd_per_chip_hour == CHIPS["v6e"].usd_per_chip_hour


def test_slowest_link_decides():
    def network(topology):
        moved = [Collective(kind="all-gather", count=1, sent=45e9)]
        rest = {"model_flops": 1.0, "remat_flops": 0.0, "traffic": 0.0}
        return cost.step_time(find_hardware(topology, compiles=False), (0.5, 0.5), collectives=moved, **rest).network

    assert network("h100:8") == pytest.approx((0.2, 0.1))
    assert network("h100:2x8") == pytest.approx((1.8, 0.9))


def test_chips_are_paid_not_devices():
    found = find_hardware("tpu7x:2x2x1", compiles=False)
    assert (found.num_devices, found.num_chips) == (8, 4)
    plan = estimated(dream_7b(), "tpu7x:2x2x1")
    assert plan.price.chips == 4
    assert plan.price.usd is None
    assert "pass --price-per-chip-hour" in render(plan)


# --- what does not fit


@pytest.mark.parametrize(
    ("topology", "changes"),
    [
        ("h100:1", {"b2": 0.99}),  # too slow for bfloat16 moments
        ("v6e:2x2", {"mesh": "4x1", "moments_on_host": True}),  # not with int8 moments
        ("h100:1", {"lora_rank": 512, "merge": True}),  # not into a base of codes
    ],
)
def test_a_change_that_the_settings_exclude_is_not_suggested(topology, changes):
    """What does not fit is told so, and not refused for what only the planner has tried."""
    settings = TrainSettings.flat(model="dream-7b", max_length=4096, batch_size=32, remat="none", **changes)
    plan = make_plan(settings, PlanSettings(plan=True, topology=topology, compile=False))
    assert not plan.fits and plan.advice
    assert not any("--lora-rank" in line for line in plan.advice if "lora_rank" in changes)


def test_suggestions_would_fit():
    plan = estimated(dream_7b(max_length=2048, remat="none"), "v5e:2x4")
    assert not plan.fits
    text = render(plan)
    assert "NO: a device needs" in text
    assert any("--moments" in line for line in plan.advice)
    smaller = estimated(dream_7b(max_length=2048, moments="int8"), "v5e:2x4")
    assert smaller.fits
    assert smaller.memory.peak < 0.9 * CHIPS["v5e"].memory
    chips = [line for line in plan.advice if line.startswith("as many devices of")]
    assert chips and "v5p" in chips[0] and "v5e" not in chips[0]


def test_tight_fit_says_so():
    plan = estimated(dream_7b(), "v6e:2x4")
    text = render(plan)
    assert "YES: it fits" in text and "tight" not in text
    tight = dataclasses.replace(plan.memory, peak=int(0.99 * plan.memory.limit))
    assert "tight" in render(dataclasses.replace(plan, memory=tight))


def test_more_rows_can_be_taken_in_parts_or_by_more_chips():
    plan = estimated(dream_7b(batch_size=128), "v6e:2x4")
    assert any("--accumulation" in line for line in plan.advice)
    assert any("--mesh 16x1" in line or "--mesh 32x1" in line for line in plan.advice)


def test_hopeless_settings_are_told_so():
    plan = estimated(dream_7b(mesh="1x1", batch_size=1, max_length=2048), "a100-40:1")
    assert not plan.fits
    found = planner.suggestions(
        dream_7b(mesh="1x1", batch_size=1, optimizer="adafactor"),
        find_hardware("v6e:1x1", compiles=False),
        rows_of(4096),
    )
    assert any("chips with more memory" in line or "as many devices of" in line for line in found)


# --- refusals


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x4", "v5e:2x4; v5p:2x2x1"),
        ("v6e", "is not known"),
        ("v4:2x2x1", "is not known"),
        ("v6e:2x2x2", "has 2 axes"),
        ("v5p:2x4", "has 3 axes"),
        ("h100:16", r"h100:2x8 \(two nodes"),
        ("h100:2x16", "at most 8 GPUs"),
        ("h100:2x2x2", "write h100:8"),
    ],
)
def test_unknown_topologies_raise(topology, message):
    with pytest.raises(ValueError, match=message):
        find_hardware(topology, compiles=False)


def test_here_there_is_nothing_to_plan_for():
    with pytest.raises(ValueError, match="no known accelerator here .*--topology"):
        find_hardware(None)


def test_mesh_and_batch_must_fit():
    with pytest.raises(ValueError, match="mesh 4x1 has 4 devices, but v5e:2x4 has 8"):
        estimated(training(mesh="4x1"), "v5e:2x4")
    with pytest.raises(ValueError, match="12 rows, which fsdp=8 does not divide"):
        estimated(training(batch_size=12), "v5e:2x4")
    with pytest.raises(ValueError, match="max_length=4096 is more than"):
        estimated(training(max_length=4096), "v5e:2x4")
    with pytest.raises(ValueError, match="a plan is made by one process"):
        estimated(training(coordinator="host:1"), "v5e:2x4")


def test_missing_libtpu_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"dream-jax\[plan\].*--no-compile"):
        find_hardware("v6e:2x4")
    # GPUs are then planned by arithmetic.
    plan = make_plan(training(), PlanSettings(plan=True, topology="h100:8"))
    assert plan.compile_seconds is None
    assert any("dream-jax[plan-gpu]" in line for line in plan.advice)
    assert "no description" in find_hardware("b200:8").missing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": True, "utilization": (0.6, 0.3)}, "utilization"),
        ({"plan": True, "utilization": (0.0, 0.3)}, "utilization"),
        ({"topology": "v6e:2x4"}, "--topology only has a meaning in a plan; add --plan"),
    ],
)
def test_plan_settings_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        PlanSettings(**options)


# --- data


def test_data_gives_length_masked_share_and_epochs():
    read = estimated(training(max_length=None), "v5e:2x4").rows
    assert read.max_length == 40
    assert read.rows == 1_000_000
    assert read.epochs == pytest.approx(100 * 8 / 1_000_000)
    # Of 40 positions the 20 of the answer may be masked, and half of these are.
    assert read.masked_share == pytest.approx(0.25)
    asked = estimated(training(max_length=48), "v5e:2x4", read_data=True).rows
    assert (asked.max_length, asked.rows) == (48, 1_000_000)
    assert estimated(training(max_length=48), "v5e:2x4").rows.rows is None


# --- as users meet it


def train_py(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return done.value.code, *capsys.readouterr()


def test_train_py_prints_a_plan(monkeypatch, capsys, tmp_path):
    out = tmp_path / "plans" / "plan.json"
    arguments = ["--plan", "--no-compile", "--topology", "v6e:2x4", "--mesh", "8x1", "--model", "dream-7b"]
    arguments += ["--max-length", 4096, "--batch-size", 8, "--remat", "full", "--plan-out", out]
    code, text, _ = train_py(monkeypatch, capsys, *arguments, "--price-per-chip-hour", 15)
    assert code == 0
    for part in ("7,615,616,512 parameters trained", "all-gather", "MFU", "RMB", "YES: it fits", f"wrote {out}"):
        assert part in text
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["fits"] and found["devices"] == 8
    assert found["price"]["usd_per_chip_hour"] == pytest.approx(15 / 7.1)
    code, text, _ = train_py(monkeypatch, capsys, *arguments, "--remat", "none")
    assert code == 3
    assert "NO: a device needs" in text and "what would help" in text


def test_train_py_says_what_is_wrong_with_a_plan(monkeypatch, capsys):
    code, _, error = train_py(monkeypatch, capsys, "--plan", "--topology", "v9:8")
    assert code == 1 and "error: topology 'v9:8' is not known" in error
    code, _, error = train_py(monkeypatch, capsys, "--topology", "v6e:2x4")
    assert code != 0 and "add --plan" in error


# --- compiled


@needs_libtpu
def test_plan_compiled_for_a_tpu():
    plan = make_plan(training(), PlanSettings(plan=True, topology="v5e:2x4"))
    assert isinstance(plan, RunPlan) and plan.fits
    assert plan.memory.compiled and plan.compile_seconds > 0
    assert "libtpu" in plan.versions
    given = plan.memory.parameters + plan.memory.optimizer + plan.memory.batch
    assert given < plan.memory.peak < plan.memory.limit
    moved = {one.kind: one.count for one in plan.collectives}
    # Weights of four layers are gathered forward and backward, and their gradients scattered.
    assert moved["all-gather"] >= 2 * 4
    assert "compiled in" in render(plan)


@needs_libtpu
def test_compiler_that_runs_out_of_memory_is_a_no_not_a_traceback():
    settings = training(batch_size=2048, max_length=2048, attention="xla")
    plan = make_plan(settings, PlanSettings(plan=True, topology="v5e:2x4"))
    assert not plan.fits
    assert "15.75G" in plan.memory.refused
    text = render(plan)
    assert "NO: a device needs at least" in text and "the compiler: " in text


def test_other_errors_of_a_compiler_are_not_hidden(monkeypatch):
    class Step:
        def lower(self, *arguments):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    step = dataclasses.make_dataclass("Fake", ["step", "state", "batch", "frozen"])(Step(), None, None, None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        compile_step(step, unknown_trips=1.0)


def test_description_of_a_gpu_is_whole():
    text = hardware.target_description(CHIPS["h200"])
    assert "memory_bandwidth: 4800000000000" in text and 'device_description_str: "NVIDIA H200"' in text
    assert text.count("{") == text.count("}")
