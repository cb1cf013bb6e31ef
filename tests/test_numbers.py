"""Numbers that no run can use: every setting refuses them by name, and weights and logits that are NaN are named.

The settings are found by introspection. A new dataclass with numbers is a failure here until it checks them, or until it
is listed in `NO_SETTINGS`.
"""

import collections.abc
import dataclasses
import importlib
import json
import math
import pkgutil
import shutil
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
from commands import ROOT, run_script
from flax import nnx
from marking import slow
from safetensors.numpy import load_file, save_file

import dream_jax
import mask_study
from dream_jax import finite, pretrained
from dream_jax.bounds import FloatRange, IntegerRange, check_numbers, number_fields, shown
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.evaluation import likelihood
from dream_jax.lora import LoraConfig, attach
from dream_jax.masks import SlidingWindow, parse
from dream_jax.model import Dream
from dream_jax.optimizer import OptimizerConfig
from dream_jax.sampler import SamplerConfig, Stream, Threshold, generate
from dream_jax.sharding import parse_mesh_shape
from dream_jax.tokenizer import ByteTokenizer

SCRIPTS = ("sample", "serve", "train", "study", "convert/hf_to_flax", "convert/flax_to_hf", "convert/qwen2_to_dream",
           "convert/ar_to_dream", "convert/gsm8k_to_s1k", "convert/pairs")  # fmt: skip
HARNESS = "dream_jax.evaluation.harness"  # importing it imports lm_eval; it has no dataclass


def modules() -> Iterator[types.ModuleType]:
    """Yields all modules of dream_jax and mask_study, and the scripts."""
    for package in (dream_jax, mask_study):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name != HARNESS:
                yield importlib.import_module(found.name)
    sys.path[:0] = [str(ROOT), str(ROOT / "convert")]
    try:
        for script in SCRIPTS:
            yield importlib.import_module(script.rpartition("/")[2])
    finally:
        del sys.path[:2]


def classes() -> dict[str, type]:
    """Returns every dataclass with numbers among its fields, by its name."""
    found = {}
    for module in modules():
        for kind in vars(module).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__:
                found[kind.__name__] = kind
    return {name: kind for name, kind in sorted(found.items()) if number_fields(kind)}


# Dataclasses with numbers that no user gives: they hold results, descriptions, tables and the state of programs.
NO_SETTINGS = {
    "CacheChoice", "Chat", "Intake", "Numeral", "PeftConfig", "Row", "Term", "_Announcement", "AppSettings", "EngineCounts",
    "Family", "Gap", "Limits", "Probable", "Program", "RowView", "Task", "TokenNote", "Update", "_Choice", "_GapText",
    "AdaptationArm",
    "AdditionTask", "Arm", "BatchPlan", "Bound", "Chip", "Choice", "Collective", "Comparison", "Compiled", "Context",
    "Conversion", "CopyTask", "Cost", "CountdownTask", "Destination", "DeviceBytes", "Estimate", "GridScore", "Hardware",
    "LengthReport", "MemoryPlan", "MemoryShare", "Outlook", "PackedPlan", "Paired", "PlannedRows", "PreparedRun", "Problem",
    "Problems",
    "Question", "Refusal", "RematChoice", "ReversalTask", "RunPlan", "RunPrice", "RunSegment", "Sample",
    "ScatteredSudokuTask", "ScoredText", "Shortage", "StaticSettings", "StepShape", "StepTime", "StudyRun",
    "SampledAnswer", "StudyTask", "SudokuTask", "TaskFormat", "Tensor", "TensorLayout", "TextAnswer", "TrainedModel",
    "WeightCopy", "WeightUnit", "WeightsDescription", "Work", "WorkUnit", "XlaFlag", "_Follower", "_Grid", "_LastAndBest",
    "_TiledMask", "MemoryParts", "OrderedBlocks", "OrderedStreams", "StreamBlocks", "StreamTiles", "_Seen",
    "BatchSizes", "PairScorer", "RolloutPlan", "RunMaterials", "Selection",
}  # fmt: skip

# What an instance needs besides its defaults.
NEEDED: dict[str, dict[str, Any]] = {
    "AdaptSettings": {"src": "a", "dst": Path("b")},
    "AdapterSettings": {"lora_rank": 2},
    "ArrangeSettings": {"src": Path("a"), "dst": Path("b")},
    "BlockCausal": {"size": 4},
    "DreamConfig": dataclasses.asdict(PRESETS["nano"]),
    "EntropyBound": {"gamma": 0.1},
    "ExportSettings": {"src": "a", "dst": "b"},
    "Factor": {"factor": 1.0},
    "LoraConfig": {"rank": 2, "alpha": 4.0},
    "OptimizerConfig": {"learning_rate": 1e-3, "total_steps": 10},
    "PairSettings": {"src": Path("a"), "dst": Path("b"), "file": Path("c")},
    "PlanSettings": {"plan": True},
    "Planned": {
        "topology": "v6e:1x1",
        "settings": {},
        "hours": (1.0, 2.0),
        "peak_gib": 1.0,
        "fits": True,
        "how": "compiled",
    },
    "SampleSettings": {"prompt": "x"},
    "StartSettings": {"dst": Path("a"), "src": "b"},
    "SlidingWindow": {"left": 1, "right": 1},
    "StepConfig": {"global_batch": 4},
    "StudyPlan": {"tasks": ("addition",), "variants": ("causal",)},
    "Threshold": {"tau": 0.5},
    "TwoStream": {"size": 4},
    "BlockDiffusion": {"size": 4},
}

FLOATS = [math.nan, math.inf, -math.inf, 1e-46, -1e-46, 1e-39, 1e39, -1e39, 1e300, 10**400, True, "1"]
INTEGERS = [-1, 2**31, 2**63, 2**64, 10**400, 10**5000, -(10**5000), math.nan, math.inf, 1.5, True, "1"]
BYTES = {"max_shard_size"}  # numbers that may need more than 32 bits


def filled(hint: Any, value: Any) -> Any:
    """Returns a value of a type in which every number is `value`: (value, value) for `tuple[float, float] | None`."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated or isinstance(hint, types.UnionType) or origin is typing.Union:
        return filled(inside[0], value)
    if origin is tuple and inside[-1] is not ...:
        return tuple(filled(one, value) for one in inside)
    if origin in (tuple, collections.abc.Sequence):
        return (filled(inside[0], value),)
    return value


def complaints(kind: type, field: str) -> Iterator[str]:
    """Yields what is wrong with how a dataclass takes numbers that no run can use."""
    example = kind(**NEEDED.get(kind.__name__, {}))
    hint = typing.get_type_hints(kind)[field]
    is_float = isinstance(number_fields(kind)[field].widest, FloatRange)
    for value in FLOATS if is_float else INTEGERS:
        where = f"{kind.__name__}.{field}={shown(value)}"
        try:
            made = dataclasses.replace(example, **{field: filled(hint, value)})
        except ValueError as error:
            if field not in str(error) or len(str(error)) > 500:
                yield f"{where}: the message is {error!s:.500}"
        except jaxtyping.TypeCheckError:  # in tests jaxtyping checks types too (see conftest.py)
            if type(value) is (float if is_float else int):
                yield f"{where}: jaxtyping refuses the type"
        else:
            if is_float:
                small = np.float32(value) if type(value) is float else np.float32(np.nan)
                usable = np.isfinite(small) and (small == 0 or abs(small) >= np.finfo(np.float32).tiny)
            else:
                largest = 2 ** (63 if field in BYTES else 31)
                usable = type(value) is int and -largest <= value < largest
            if not usable or getattr(made, field) != filled(hint, value):
                yield f"{where} is accepted"


def test_settings_are_usable_or_refused_by_name() -> None:
    found = classes()
    settings = found.keys() - NO_SETTINGS
    assert settings >= {
        "RunSettings", "SamplerConfig", "EvaluateSettings", "SampleSettings", "StudySettings", "DreamConfig",
        "ExportSettings", "WindowCache", "CartWeight", "BatchOptions", "SlidingWindow", "PriceSettings", "PlanSettings",
    }  # fmt: skip
    assert found.keys() >= NO_SETTINGS and NEEDED.keys() <= settings
    wrong = [
        one
        for name in sorted(settings)
        for field in number_fields(found[name])
        for one in complaints(found[name], field)
    ]
    assert wrong == []


def test_shares_are_shares_after_rounding() -> None:
    """float32 rounds these to 1, which is outside; exactly 1 is inside for top_p."""
    almost = 1 - 1e-12
    for wrong in (
        lambda: OptimizerConfig(learning_rate=1e-3, total_steps=1, b1=almost),
        lambda: LoraConfig(rank=1, alpha=1.0, dropout=almost),
        lambda: SamplerConfig(eps=almost),
    ):
        with pytest.raises(ValueError, match=r"=0.99.* is outside .0, 1.: float32 rounds it to 1"):
            wrong()
    assert SamplerConfig(top_p=almost).top_p == almost
    with pytest.raises(ValueError, match="top_p=1.0000000001 is outside"):
        SamplerConfig(top_p=1 + 1e-10)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    share: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    count: int | None = None

    def __post_init__(self) -> None:
        check_numbers(self, share=FloatRange(0.0, 1.0, note="it is a share"), sizes=IntegerRange(1, 9))


def test_messages_say_field_value_and_remedy() -> None:
    found = []
    for values in (
        {"share": 2}, {"sizes": (1, 10)}, {"sizes": [0]}, {"count": 10**400}, {"count": "x"}, {"share": None},
        {"share": [0.5]}, {"count": []}, {"count": {}},
    ):  # fmt: skip
        with pytest.raises(ValueError) as error:
            Example(**values)  # type: ignore[arg-type]
        found.append(str(error.value))
    assert found == [
        "share=2 is outside [0, 1]; it is a share",
        "sizes=10 is too large: the largest value is 9",
        "sizes=0 must be at least 1",
        "count=(an integer of 401 digits) is too large: the largest value is 2147483647",
        "count='x' must be a whole number",
        "share=None must be a number; it is a share",
        "share=[0.5] must be a number; it is a share",
        "count=[] must be a whole number",
        "count={} must be a whole number",
    ]
    assert Example(sizes=(np.int64(3),), share=np.float32(1.0)).count is None
    with pytest.raises(TypeError, match=r"Example has no numbers in the fields \['shares'\]"):
        check_numbers(Example(), shares=FloatRange())


@pytest.mark.parametrize(
    "name", ["window:99999999999999", "window:1:99999999999", "block-causal:0", "window:" + "9" * 5000]
)
def test_masks_have_sizes_that_fit(name: str) -> None:
    with pytest.raises(ValueError, match=f"mask '{name[:12]}") as error:
        parse(name)
    assert len(str(error.value)) < 300
    assert parse(f"window:{2**30}") == SlidingWindow(2**30, 2**30)


@pytest.mark.parametrize("shape", ["100x100x100", "65537x1", "9" * 5000 + "x1", "4300x4300"])
def test_meshes_have_devices_that_can_be(shape: str) -> None:
    with pytest.raises(ValueError, match=r"mesh .* has more than 65536 devices"):
        parse_mesh_shape(shape)
    assert parse_mesh_shape("256x16x16") == (256, 16, 16)


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        (
            "sample.py",
            ("--prompt", "x", "--seed", 2**64),
            "seed=18446744073709551616 is too large: the largest value is",
        ),
        (
            "sample.py",
            ("--prompt", "x", "--steps", 10**9),
            "steps=1000000000 is too large: the largest value is 1048576",
        ),
        ("sample.py", ("--prompt", "x", "--temperature", "1e-46"), "temperature=1e-46 is too close to 0"),
        ("sample.py", ("--prompt", "x", "--guidance", "1e300"), "guidance=1e+300 is too large"),
        ("sample.py", ("--prompt", "x", "--mask", "window:99999999999999"), "mask 'window:99999999999999'"),
        ("train.py", ("--steps", 10**11), "steps=100000000000 is too large: the largest value is 1000000000"),
        ("train.py", ("--price-per-chip-hour", "inf"), "price_per_chip_hour=inf must be a finite number"),
        ("train.py", ("--plan", "--steps", 10**400), "steps=(an integer of 401 digits) is too large"),
        ("train.py", ("--mesh", "100x100x100"), "mesh 100x100x100 has more than 65536 devices"),
        ("evaluate.py", ("--guidance", 1, "--samples", 10**9), ""),
        ("evaluate.py", ("--samples", 10**9), "samples=1000000000 is too large"),
        ("study.py", ("--seed", -1), "seed=-1 must not be negative"),
        ("convert/gsm8k_to_s1k.py", ("a", "b", "--rows", -5), "rows=-5 must be at least 1"),
        ("convert/flax_to_hf.py", ("a", "b", "--max-shard-size", 0), "max_shard_size=0 must be at least 1"),
        ("convert/hf_to_flax.py", ("a", "b", "--mesh", "9" * 20 + "x1"), "devices, the largest possible number"),
    ],
)
def test_commands_refuse_numbers(script: str, arguments: tuple[object, ...], said: str) -> None:
    done = run_script(script, *arguments)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    words = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert said in words


# Weights


def damaged(source: Path, target: Path, value: float, dtype: Any = np.float32) -> Path:
    """Copies a checkpoint with one weight of layer 1 changed to `value`."""
    shutil.copytree(source, target)
    (file,) = target.glob("*.safetensors")
    tensors = {name: x.astype(dtype) for name, x in load_file(file).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -math.nan])
def test_largest_magnitude(dtype: Any, value: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 30)).astype(dtype)
    for view in (x, x.T, x[3:9, 2:7], -np.abs(x), np.abs(x), np.zeros((2, 3), dtype)):
        assert finite.largest_magnitude(view) == np.abs(view).max()
    changed = x.copy()
    changed[7, 9] = value
    assert not np.isfinite(finite.largest_magnitude(changed))
    assert finite.largest_magnitude(np.zeros((0, 4), dtype)) == 0


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_weights_that_are_no_numbers_are_named(golden_dir: Path, tmp_path: Path, value: float, dtype: Any) -> None:
    source = damaged(golden_dir / "tiny_a" / "hf", tmp_path / "hf", value, dtype)
    said = r"model.safetensors: model.layers.1.mlp.up_proj.weight holds weights that are no numbers \(NaN or infinity\)"
    with pytest.raises(ValueError, match=said):
        pretrained.convert_from_hf(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    with pytest.raises(ValueError, match=said):
        dream_jax.load(source)


def test_weights_that_a_cast_makes_infinite_are_named(golden_dir: Path, tmp_path: Path) -> None:
    source = damaged(golden_dir / "tiny_a" / "hf", tmp_path / "hf", 1e6)
    said = "up_proj.weight holds a weight of magnitude 1e.06, which is infinite in float16; choose bfloat16 or float32"
    with pytest.raises(ValueError, match=said):
        pretrained.convert_from_hf(source, tmp_path / "converted", dtype="float16")
    pretrained.convert_from_hf(source, tmp_path / "converted", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"weights/layer_001: layers.mlp.up.kernel holds weights that are no numbers"):
        pretrained.convert_to_hf(tmp_path / "converted", tmp_path / "exported", dtype="float16")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("mesh", [None, "2x1"])
def test_converted_weights_that_are_no_numbers_are_named(tmp_path: Path, mesh: str | None) -> None:
    model = Dream(dataclasses.replace(PRESETS["nano"], num_hidden_layers=2), rngs=nnx.Rngs(0))
    kernel = model.layers.mlp.gate.kernel
    kernel[...] = kernel[...].at[1, 2, 3].set(np.nan)
    dream_jax.save(model, tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"weights/layer_001: layers.mlp.gate.kernel holds weights that are no numbers"
    ):
        dream_jax.load(tmp_path / "model", mesh=mesh)


def test_layers_are_counted_before_anything_is_made(golden_dir: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(golden_dir / "tiny_a" / "hf", tmp_path / "hf"))
    fields = json.loads((source / "config.json").read_text())
    for layers, said in (
        (10**6, "num_hidden_layers=1000000 is too large"),
        (4000, "num_hidden_layers=4000, but the checkpoint holds"),
    ):
        (source / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": layers}))
        with pytest.raises(ValueError, match=said):
            pretrained.convert_from_hf(source, tmp_path / "converted")


@pytest.mark.parametrize("text", ["Infinity", "NaN", "1e400", "1e-46", "-1"])
def test_config_numbers_are_finite(tmp_path: Path, text: str) -> None:
    whole = json.dumps(PRESETS["nano"].to_dict()).replace('"rope_theta": 10000.0', f'"rope_theta": {text}')
    (tmp_path / "config.json").write_text(whole)
    with pytest.raises(ValueError, match=rf"config.json.*(rope_theta|{text} is not a number of JSON)"):
        DreamConfig.from_file(tmp_path)


def test_adapter_rank_is_at_most_the_narrower_side() -> None:
    model = Dream(dataclasses.replace(PRESETS["nano"], num_hidden_layers=1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"rank=65 is more than 64, the narrower side of the projection k"):
        attach(model, LoraConfig(rank=65, alpha=1.0), jax.random.key(0))
    attach(model, LoraConfig(rank=65, alpha=1.0, targets=("q",)), jax.random.key(0))


# Logits


@pytest.fixture(scope="module")
def broken() -> Dream:
    """A model whose logits are NaN wherever the token 65 is seen, and numbers elsewhere."""
    model = Dream(dataclasses.replace(PRESETS["nano"], num_hidden_layers=1), rngs=nnx.Rngs(0))
    model.embed.embedding[...] = model.embed.embedding[...].at[65].set(np.nan)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"alg": "entropy"},
        slow({"alg": "origin"}),
        slow({"alg": "maskgit_plus", "temperature": 1.0, "top_p": 0.9, "top_k": 5}),
        slow({"alg": "topk_margin", "alg_temp": 0.5}),
        {"alg": "maskgit_plus", "block_length": 4, "commit": Threshold(0.9), "cache": dream_jax.WindowCache()},
    ],
    ids=str,
)
def test_logits_that_are_no_numbers_end_a_generation(broken: Dream, options: dict[str, Any]) -> None:
    config = SamplerConfig(max_new_tokens=8, steps=4, **options)
    key = jax.random.key(0)
    good, bad = np.full((2, 8), 66), np.full((2, 8), 66)
    bad[1, 3] = 65
    generate(broken, good, config, key)
    with pytest.raises(ValueError, match=r"row 1: the logits are no numbers"):
        generate(broken, bad, config, key)
    stream = Stream(broken, [[66] * 8, [65] * 8], config, jax.random.split(key, 2), batch_size=1)
    assert next(stream).prompt == 0
    with pytest.raises(ValueError, match=r"prompt 1: the logits are no numbers"):
        next(stream)


def test_hooks_and_weights_of_infinite_logits_are_named(broken: Dream) -> None:
    hook = lambda moment, position, logits: logits * np.float32(-np.inf)
    with pytest.raises(ValueError, match=r"row 0: the logits are no numbers"):
        generate(broken, np.full((1, 8), 66), SamplerConfig(max_new_tokens=4, steps=2, alg="entropy", logits_hook=hook))


OUTERMOST = [
    *({name: value} for name in ("temperature", "alg_temp") for value in (1e-30, 1e30)),
    *({name: value} for name in ("guidance", "end_penalty") for value in (1e30, -1e30)),
    {"top_p": 1e-30},
    {"eps": 1e-30},
    {"temperature": 1e-30, "guidance": 1e30},
]


@pytest.mark.parametrize("options", OUTERMOST, ids=str)
def test_the_outermost_values_work(broken: Dream, options: dict[str, Any]) -> None:
    """Every accepted float gives tokens of the vocabulary."""
    given = {"temperature": 0.5, "vocab_limit": 257, "forbidden_tokens": (260,)} | options
    out = generate(
        broken, np.full((2, 8), 66), SamplerConfig(max_new_tokens=8, steps=4, alg="entropy", **given), jax.random.key(0)
    )
    tokens = np.asarray(out.tokens)[:, 8:]
    assert tokens.min() >= 0 and tokens.max() < 257


def test_likelihood_of_no_number_is_refused(broken: Dream) -> None:
    nll = likelihood.model_nll(broken, ByteTokenizer(), 2)
    masked = np.arange(8) > 4
    assert np.isfinite(nll([(np.full(8, 66), masked)])).all()
    with pytest.raises(ValueError, match="the logits of a text are no numbers"):
        nll([(np.full(8, 65), masked)])
