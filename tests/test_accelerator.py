"""bench/accelerator.py: its stages run on a CPU with small shapes, in processes that cannot harm each other."""

import json
import pathlib
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from commands import run_script

ROOT = pathlib.Path(__file__).parent.parent
BENCH = ROOT / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Imports are found beside bench/accelerator.py, as when it is run."""
    monkeypatch.syspath_prepend(str(BENCH))


# The driver, with stages that need no jax.


def python_stage(source: str) -> list[str]:
    """The command of a stage that runs this source, with `write(**values)` and its turn already waited for."""
    lines = """
        import json, pathlib, sys, time
        path = pathlib.Path(sys.argv[1])
        def write(**values):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        if not sys.stdin.readline():
            sys.exit(1)
    """
    return [sys.executable, "-S", "-c", textwrap.dedent(lines) + textwrap.dedent(source)]


def drive(tmp_path, sources, *, limit_s=20.0, needs_s=0.5, seconds=60.0):
    """Runs stages with these sources, by name, and returns the content of accelerator.json."""
    import accelerator
    from stages.stage import Stage

    stages = [Stage(name=name, module="none", options={}, limit_s=limit_s, needs_s=needs_s) for name in sources]

    def start(stage):
        command = [*python_stage(sources[stage.name]), str(accelerator.result_path(tmp_path, stage.name))]
        return accelerator.StageProcess(command, tmp_path / "stages" / f"{stage.name}.log", {})

    deadline = time.monotonic() + seconds + accelerator.RESERVE_S
    found = accelerator.run_stages(
        stages, tmp_path, deadline, start, {"date": "2026-11-30", "commit": "", "hardware": {}}
    )
    assert json.loads((tmp_path / "accelerator.json").read_text()) == found
    return found


def test_failed_stage_leaves_the_others(bench, tmp_path):
    sources = {
        "good": "write(a=1)",
        "bad": "write(b=2, doing='the second product'); raise ValueError('no such kernel')",
        "missing": "print('not installed here: torch'); sys.exit(3)",
        "last": "write(c=3)",
    }
    found = drive(tmp_path, sources)["stages"]
    assert [found[name]["status"] for name in sources] == ["measured", "failed", "skipped", "measured"]
    assert found["good"]["values"] == {"a": 1} and found["last"]["values"] == {"c": 3}
    assert found["bad"]["values"]["b"] == 2
    assert found["bad"]["reason"] == "ValueError: no such kernel (it was at: the second product)"
    assert found["missing"]["reason"] == "not installed here: torch"


def test_stage_that_runs_over_its_limit_is_ended_and_keeps_what_it_measured(bench, tmp_path):
    child = "import subprocess; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    sources = {"hangs": f"{child}; write(a=1, doing='compiling'); time.sleep(60)", "last": "write(c=3)"}
    begun = time.monotonic()
    found = drive(tmp_path, sources, limit_s=1.0)["stages"]
    assert time.monotonic() - begun < 15
    assert (found["hangs"]["status"], found["hangs"]["values"]["a"]) == ("ended", 1)
    assert found["hangs"]["reason"] == "it took more than its 1 s (it was at: compiling)"
    assert found["last"]["status"] == "measured"


def test_no_stage_begins_when_time_is_out(bench, tmp_path):
    sources = {"first": "write(a=1); time.sleep(1.2)", "second": "write(b=1)"}
    found = drive(tmp_path, sources, needs_s=1.0, seconds=2.0)["stages"]
    assert [found[name]["status"] for name in sources] == ["measured", "skipped"]
    assert "were left, and it needs 1 s" in found["second"]["reason"]
    assert not (tmp_path / "stages" / "second.json").exists()


def test_next_stage_waits_for_its_turn(bench, tmp_path):
    """Its process exists while another measures, so that its imports cost no time of the device."""
    sources = {
        "first": "time.sleep(0.5); write(end=time.monotonic())",
        "second": "write(begin=time.monotonic())",
    }
    found = drive(tmp_path, sources)["stages"]
    assert found["second"]["values"]["begin"] > found["first"]["values"]["end"]


# The stages


def result(tmp_path, name="stage"):
    from stages.results import StageResult

    return StageResult(tmp_path / f"{name}.json")


def stage(name):
    from stages.stage import STAGES, small

    return small(next(one for one in STAGES if one.name == name))


def test_stages_have_different_names_and_fit_into_the_table(bench):
    from stages import tables
    from stages.stage import STAGES, small

    from dream_jax import xla_flags

    names = [one.name for one in STAGES]
    assert len(set(names)) == len(names)
    assert names[0] == "ceilings"  # the others divide by its figures
    assert {name for aim in tables.AIMS for name in aim.stages} <= {
        *names,
        "sample-apart",
        "sample-int8",
        "train-auto",
        "train-fp8",
    }
    assert all((BENCH / "stages" / f"{one.module}.py").is_file() for one in STAGES)
    assert all(small(one).options["cpu"] for one in STAGES)
    flags = {one.options["flags"] for one in STAGES if one.options.get("flags")}
    assert flags and flags <= set(xla_flags.CANDIDATES)


def test_stages_refuse_a_cpu_for_the_real_shapes(bench, tmp_path):
    import importlib

    from stages.results import NotAvailable
    from stages.stage import STAGES

    for one in STAGES:
        if one.module != "pytorch":
            with pytest.raises(NotAvailable, match="pass --small"):
                importlib.import_module(f"stages.{one.module}").run(one.options, result(tmp_path))
    assert not list(tmp_path.iterdir())


def test_ceilings(bench, tmp_path):
    from stages import ceilings

    got = result(tmp_path)
    ceilings.run(stage("ceilings").options, got)
    for name in ("product_tflops", "bandwidth_tb_per_s", "read_bandwidth_tb_per_s", "float8_product_tflops"):
        assert got.values[name] > 0
    assert "CPU" in got.values["device"] or "cpu" in got.values["device"]
    assert json.loads(got.path.read_text()) == got.values


@pytest.mark.slow
def test_attention_check(bench, tmp_path):
    from stages import attention_check

    got = result(tmp_path)
    attention_check.run(stage("attention-odd").options, got)
    assert got.values["within_bounds"]
    assert (got.values["shape"]["queries"], got.values["shape"]["keys"]) == (1, 5)
    plain = [row for row in got.values["rows"] if row["backend"] == "xla"]
    assert [row["mask"] for row in plain] == ["bidirectional", "left padding", "lengths", "segments"]
    assert all(row["auto"] and set(row["errors"]) == {"out", "dq", "dk", "dv"} for row in plain)
    assert all("refusal" in row for row in got.values["rows"] if row["backend"] != "xla")


def test_packed_rows_of_the_training_stage(bench):
    import train_step

    from dream_jax.data import MOST_TEXTS

    assert train_step.MOST_TEXTS == MOST_TEXTS
    settings = train_step.TrainStepBenchSettings(model="nano", batch=2, tokens=16, texts=3)
    batch = train_step.rows(settings)
    np.testing.assert_array_equal(batch.length_BM.sum(axis=1), [16, 16])
    assert np.count_nonzero(batch.length_BM) == 6
    assert sorted(batch.text_BM[batch.text_BM >= 0]) == list(range(6))
    assert 16 / 3 < train_step.span(batch) < 16


def test_wrong_attention_fails_the_stage(bench, tmp_path, monkeypatch):
    import check_attention
    from stages import attention_check

    bidirectional = list(check_attention.AttentionShape.masks(check_attention.AttentionShape(1, 1, 1, 1, 1, 1)))[:1]
    monkeypatch.setattr(check_attention.AttentionShape, "masks", lambda self: bidirectional)
    monkeypatch.setattr(check_attention, "errors", lambda found, wanted: dict.fromkeys(check_attention.ARRAYS, np.inf))
    got = result(tmp_path)
    with pytest.raises(RuntimeError, match="bidirectional, xla: out"):
        attention_check.run(stage("attention-odd").options, got)
    assert got.values["within_bounds"] is False


@pytest.mark.slow
def test_training_step_and_its_profile(bench, tmp_path):
    from stages import training

    got = result(tmp_path)
    training.run(stage("train-auto").options, got)
    values = got.values
    assert values["tokens_per_second"] > 0 and len(values["losses"]) == 1 and values["mfu"] is None
    profile = values["profile"]
    assert profile["busy_ms"] > 0 and sum(profile["scopes"].values()) == pytest.approx(profile["busy_ms"])
    named = {name for name in profile["scopes"] if name not in ("?", "(no scope)")}
    assert {"layers/mlp", "loss", "optimizer"} <= named
    assert any(name.endswith(", backward") for name in named)
    # The events of a CPU are not all named, but most of the time belongs to an operation of the program.
    assert profile["scopes"].get("?", 0.0) < 0.5 * profile["busy_ms"]


@pytest.mark.slow
def test_sampler(bench, tmp_path):
    from stages import sampling

    got = result(tmp_path)
    ceilings = {"product_tflops": 0.1, "read_bandwidth_tb_per_s": 0.01}
    (tmp_path / "ceilings.json").write_text(json.dumps(ceilings))
    options = stage("sample-apart").options
    sampling.run({**options, "rows": [{**options["rows"][0], "profile": False}, options["rows"][1]]}, got)
    exact, cached = got.values["rows"]
    # 2 passes write 8 tokens; a token a pass would take 8 passes of the same length.
    assert exact["passes_a_row"] == 2 and exact["tokens_per_s"] == pytest.approx(1e3 / exact["ms_a_pass"])
    assert cached["passes_a_row"] == 2 and cached["tokens_per_s"] == pytest.approx(4e3 / cached["ms_a_pass"])
    assert exact["least_ms_a_pass"] > 0 and cached["least_ms_a_pass"] > 0
    (profile,) = got.values["profiles"]
    assert profile["of"] == "cached, 4 a pass, B=1" and profile["busy_ms"] > 0
    assert any(name.startswith("layers/") for name in profile["scopes"])


def test_scopes():
    sys.path.insert(0, str(BENCH))
    import profiles

    names = {
        "jit(_train_step)/jvp(layers)/while/body/closed_call/checkpoint/attention/dot_general": "layers/attention",
        "jit(f)/transpose(jvp(layers))/while/body/checkpoint/mlp/jit(silu)/mul": "layers/mlp, backward",
        "jit(f)/transpose(jvp(layers))/while/body/checkpoint/rematted_computation/mlp/dot_general": (
            "layers/mlp, recomputed"
        ),
        "jit(f)/optimizer/add": "optimizer",
        "jit(f)/while/body/propose/unembed/BD,DV->BV/dot_general": "propose/unembed",
        "jit(f)/add": "(no scope)",
        "copy": "(no scope)",
    }
    assert {name: profiles.scope(name) for name in names} == names


# The bare image

# What an accelerator's image does not have, or need not have. Only jax, flax, optax, orbax, numpy, einops and jaxtyping are
# asked for.
ABSENT = (
    *("array_record", "datasets", "docstring_parser", "fastapi", "grain", "huggingface_hub", "jinja2", "matplotlib"),
    *("msgspec", "psutil", "pyarrow", "rich", "safetensors", "scipy", "tensorboardX", "tokenizers", "torch"),
    *("transformers", "tyro", "uvicorn"),
)
BARE = """
import importlib.abc, pathlib, sys
absent = set(sys.argv[1].split(","))

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top, frame = name.partition(".")[0], sys._getframe(1)
        while "importlib" in frame.f_code.co_filename:
            frame = frame.f_back
        # Flax needs rich, and jax needs scipy, so they are there; but our own code must not import them.
        if top in absent and not (top in ("rich", "scipy") and "site-packages" in frame.f_code.co_filename):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.path[:0] = [str(pathlib.Path("bench").absolute()), str(pathlib.Path().absolute())]
import accelerator
modules = {stage.module for stage in accelerator.STAGES}
for module in sorted(modules):
    __import__(f"stages.{module}")
import dream_jax, dream_jax.train_step, dream_jax.lora, dream_jax.quantisation
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "an import has started jax: it would take the device from another process"
print("imported", *sorted(modules))
"""


def test_core_and_stages_import_on_a_bare_image():
    """The process of a stage imports all it needs without the libraries of the commands, and without starting a device."""
    command = [sys.executable, "-c", BARE, ",".join(ABSENT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("imported attention_check ceilings")


@pytest.mark.slow
def test_whole_command_with_small_shapes(tmp_path):
    out = tmp_path / "out"
    only = ("ceilings", "torch-sampler", "attention-odd", "sample-stacked")
    done = run_script("bench/accelerator.py", "--small", "--out", out, "--only", *only)
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "accelerator.json").read_text())
    assert tuple(found["stages"]) == only
    from_torch = {name for name in found["stages"] if name.startswith("torch-")}
    for name, entry in found["stages"].items():
        assert entry["status"] == "measured" or (name in from_torch and "not installed" in entry["reason"]), (
            name,
            entry,
        )
    table = (out / "table.md").read_text()
    assert "## Aims" in table and "exact, 1 a pass, B=1" in table


def test_command_refuses_a_wrong_limit():
    done = run_script("bench/accelerator.py", "--minutes", "0")
    assert done.returncode == 2 and "--minutes 0.0 is outside [0.1, 120]" in done.stderr


# The tables


def found_of(**stages):
    return {
        "date": "2026-11-30T08:00:00+00:00",
        "commit": "0123456789",
        "stages": {name.replace("_", "-"): {"status": "measured", "values": values} for name, values in stages.items()},
    }


def test_aims(bench):
    from stages import tables

    rows = [
        {"name": "exact, 1 a pass, B=1", "ms_a_pass": 20.0, "least_ms_a_pass": 17.0, "tokens_per_s": 50.0},
        {"name": "cached, 4 a pass, B=1", "ms_a_pass": 8.0, "tokens_per_s": 500.0},
    ]
    found = found_of(
        sample_apart={"rows": rows},
        torch_sampler={"rows": [{"name": "all rows", "ms_a_pass": 31.0, "seconds": {"median_s": 1.0}}]},
        train_int8={"tokens_per_second": 10_000.0, "mfu": 0.5, "seconds": {"median_s": 1.6}},
    )
    aims = {name: cells for name, *cells in tables.aim_rows(found)}
    assert aims["exact sampling, batch 1: share of the arithmetic roof of the same run"] == [
        *("at least 80.0 %", "85.0 %", "yes")
    ]
    assert aims["exact sampling, batch 1: speed over the published PyTorch loop"][1:] == ["1.55 times", "yes"]
    assert aims["cached sampling, 4 tokens a pass, batch 1"][1:] == ["500 tokens/s", "no"]
    assert aims["training step, all weights, 4 x 4096, int8 moments, remat full: MFU"][1:] == ["50.0 %", "yes"]
    # 20.48 million tokens at 10,000 tokens/s take 0.569 hours.
    (price,) = [cells for name, cells in aims.items() if name.startswith("s1K")]
    assert price == ["at most 15.0 RMB", "15.4 RMB", "no"]
    assert aims["training step, LoRA of rank 32, 4 x 4096, remat full: MFU"][1:] == ["train-lora did not run", "-"]


def test_markdown_says_why_a_stage_has_no_figure(bench):
    from stages import tables

    found = found_of(ceilings={"device": "1 x NVIDIA H200", "product_tflops": 784.0})
    found["stages"]["train-lora"] = {
        "status": "ended",
        "seconds": 75.0,
        "reason": "it took more than its 75 s",
        "values": {},
    }
    text = tables.markdown(found)
    assert "bfloat16 product 784 TFLOP/s" in text
    assert "| train-lora | ended | 75.0 | it took more than its 75 s |" in text
    assert "train-lora: ended (it took more than its 75 s)" in text


# The plan

# What XLA writes for a GPU, shortened: a loop over 3 layers with a product and an attention call, a product of float8, and
# a conditional in a loop whose end is not known.
PROGRAM = """HloModule jit_f

%gemm (p0: bf16[64,32], p1: bf16[3,32,16], p2: s32[]) -> bf16[64,16] {
  %p0 = bf16[64,32]{1,0} parameter(0)
  %p1 = bf16[3,32,16]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %slice = bf16[1,32,16]{2,1,0} dynamic-slice(%p1, %p2, %p2, %p2), dynamic_slice_sizes={1,32,16}
  %flat = bf16[32,16]{1,0} bitcast(%slice)
  ROOT %dot = bf16[64,16]{1,0} dot(%p0, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (carry: (s32[], bf16[64,32], bf16[3,32,16])) -> (s32[], bf16[64,32], bf16[3,32,16]) {
  %carry = (s32[], bf16[64,32]{1,0}, bf16[3,32,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%carry), index=1
  %w = bf16[3,32,16]{2,1,0} get-tuple-element(%carry), index=2
  %y = bf16[64,16]{1,0} fusion(%x, %w, %i), kind=kCustom, calls=%gemm, metadata={op_name="jit(f)/layers/while/body/mlp/dot_general"}
  %q = bf16[2,32,1,16]{3,2,1,0} bitcast(%y)
  %a = (bf16[2,1,32,16]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/layers/while/body/attention/fwd"}
  ROOT %next = (s32[], bf16[64,32]{1,0}, bf16[3,32,16]{2,1,0}) tuple(%i, %x, %w)
}

%condition (carry.1: (s32[], bf16[64,32], bf16[3,32,16])) -> pred[] {
  %carry.1 = (s32[], bf16[64,32]{1,0}, bf16[3,32,16]{2,1,0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%small (s: f8e4m3fn[64,32]) -> f32[64,64] {
  %s = f8e4m3fn[64,32]{1,0} parameter(0)
  ROOT %small.dot = f32[64,64]{1,0} custom-call(%s, %s), custom_call_target="__cublas$lt$matmul$f8", metadata={op_name="jit(f)/while/body/cond/mul"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}

%nothing (n: f8e4m3fn[64,32]) -> f32[64,64] {
  %n = f8e4m3fn[64,32]{1,0} parameter(0)
  ROOT %zero = f32[64,64]{1,0} constant(0)
}

ENTRY %main (x: bf16[64,32], w: bf16[3,32,16], s: f8e4m3fn[64,32], on: pred[]) -> f32[64,64] {
  %x.1 = bf16[64,32]{1,0} parameter(0)
  %w.1 = bf16[3,32,16]{2,1,0} parameter(1)
  %s.1 = f8e4m3fn[64,32]{1,0} parameter(2)
  %on = pred[] parameter(3)
  %zero.1 = s32[] constant(0)
  %start = (s32[], bf16[64,32]{1,0}, bf16[3,32,16]{2,1,0}) tuple(%zero.1, %x.1, %w.1)
  %loop = (s32[], bf16[64,32]{1,0}, bf16[3,32,16]{2,1,0}) while(%start), condition=%condition, body=%body, metadata={op_name="jit(f)/layers/while"}, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %choice = f32[64,64]{1,0} conditional(%on, %s.1, %s.1), branch_computations={%nothing, %small}, metadata={op_name="jit(f)/cond"}
}
"""  # noqa: E501


def test_least_time_of_a_program(bench):
    import program_cost

    # The arithmetic is so slow that the bytes do not matter.
    region = program_cost.region_of(PROGRAM, program_cost.DeviceCeilings(product=1e3, float8=2e3, bandwidth=1e12))
    product, attention, small = 2 * 64 * 32 * 16, 4 * (2 * 32 * 16) * 32, 2 * 64 * 64 * 32
    cost = region.total()
    assert cost.flops == 3 * (product + attention) + small
    assert cost.seconds == pytest.approx((3 * (product + attention)) / 1e3 + small / 2e3)
    assert cost.scopes["layers/mlp"] == pytest.approx(3 * product / 1e3)
    # A conditional counts as often as the caller says; a loop of known length does not ask.
    assert region.total(lambda part: 0.0).flops == 3 * (product + attention)
    assert [(part.op_name, part.trips) for part in region.every_part()] == [
        ("jit(f)/layers/while", 3),
        ("jit(f)/cond", None),
    ]

    # The memory is so slow that the arithmetic does not matter.
    region = program_cost.region_of(PROGRAM, program_cost.DeviceCeilings(product=1e15, float8=1e15, bandwidth=1.0))
    of_product = 2 * 64 * 32 + 2 * 32 * 16 + 4 + 2 * 64 * 16  # the slice of the stacked weights, not the stack
    of_attention = 2 * (3 + 1) * 2 * 32 * 16
    of_small = 2 * 64 * 32 + 4 * 64 * 64
    assert region.total().nbytes == 3 * (of_product + of_attention) + of_small
    assert region.total().seconds == pytest.approx(region.total().nbytes)


@pytest.mark.slow
def test_a_stage_is_planned_for_an_h200(bench, monkeypatch, tmp_path):
    pytest.importorskip("jax_cuda12_plugin", reason="needs the extra plan-gpu")
    from stages import planned, stage

    small = stage.small(next(one for one in stage.STAGES if one.name == "sample-apart"))
    monkeypatch.setattr(planned, "STAGES", (stage.STAGES[0], small))
    monkeypatch.setattr(planned, "RESULTS", tmp_path / "planned.json")
    assert planned.main(None) == 0
    found = json.loads((tmp_path / "planned.json").read_text())
    for row in found["stages"]["sample-apart"]["values"]["rows"]:
        assert row["ms_a_pass"] >= row["least_ms_a_pass"] > 0 and row["gb_a_pass"] > 0
