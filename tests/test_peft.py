"""Adapters in the layout of PEFT: what they compute, what is refused by name, and the way there and back."""

import json
import math
import pathlib
import re
import shutil
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from commands import run_script
from safetensors.numpy import load_file, save_file

import dream_jax
from dream_jax import hf, lora, pretrained, sharding
from dream_jax.lora import LoraConfig
from dream_jax.model import split_params
from dream_jax.trainer import TrainSettings
from dream_jax.trainer import weights as run_weights

# Projection -> (inputs, outputs) of golden/tiny_a, by the names of the published checkpoint.
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@pytest.fixture(scope="module")
def tiny():
    return pathlib.Path(__file__).parent / "golden" / "tiny_a" / "hf"


@pytest.fixture(scope="module")
def published(tiny):
    """The tensors of the published checkpoint, by name."""
    return load_file(tiny / "model.safetensors")


def layers_of(published):
    return 1 + max(int(name.split(".")[2]) for name in published if name.startswith("model.layers."))


def make_peft(folder, published, modules, *, ranks=lambda _: 4, name="", dtype=np.float32, **config):
    """Writes a PEFT directory by hand; `modules` are names such as "model.layers.0.self_attn.q_proj"."""
    generator, tensors = np.random.default_rng(7), {}
    for module in modules:
        outputs, inputs = published[f"{module}.weight"].shape
        rank, stem = ranks(module), f"base_model.model.{module}"
        tensors[f"{stem}.lora_A{name}.weight"] = generator.normal(0, 0.1, (rank, inputs)).astype(dtype)
        tensors[f"{stem}.lora_B{name}.weight"] = generator.normal(0, 0.1, (outputs, rank)).astype(dtype)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    ends = sorted({module.rpartition(".")[2] for module in modules})
    fields = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ends,
        "base_model_name_or_path": "some/base",
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return tensors


def merged_by_hand(tiny, target, published, tensors, scaling):
    """A Hugging Face directory whose weights are W + scaling B A, computed by numpy from the published tensors."""
    changed = dict(published)
    for name, a in tensors.items():
        if ".lora_A." in name:
            b = tensors[name.replace(".lora_A.", ".lora_B.")].astype(np.float64)
            module = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            added = scaling(module) * (b @ a.astype(np.float64))
            changed[f"{module}.weight"] = (changed[f"{module}.weight"].astype(np.float64) + added).astype(np.float32)
    shutil.copytree(tiny, target)
    save_file(changed, target / "model.safetensors")
    return target


def tokens():
    return np.random.default_rng(0).integers(0, 120, (2, 12)).astype(np.int32)


def all_modules(published, *ends):
    modules = [f"model.layers.{layer}.{name}" for layer in range(layers_of(published)) for name in PROJECTIONS]
    return [module for module in modules if not ends or module.endswith(ends)]


def one_of(number):
    return lambda module: number if "layers.1" in module else 2


VARIANTS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    # name -> (ends of the modules, arguments of make_peft, scaling by module)
    "list": (("q_proj", "v_proj"), {}, lambda _: 8 / 4),
    "every projection": ((), {"target_modules": "all-linear", "name": ".default"}, lambda _: 8 / 4),
    "pattern": (
        ("k_proj", "down_proj"),
        {"target_modules": r".*\.(k_proj|down_proj)", "lora_alpha": 3.5, "lora_dropout": 0.05},
        lambda _: 3.5 / 4,
    ),
    "rank stabilised": (("o_proj", "up_proj"), {"use_rslora": True}, lambda _: 8 / math.sqrt(4)),
    "one layer": (("layers.1.self_attn.q_proj",), {"layers_to_transform": [1]}, lambda _: 8 / 4),
    "ranks and alphas": (
        ("q_proj", "gate_proj"),
        {
            "ranks": one_of(6),
            "r": 2,
            "rank_pattern": {r"^model\.layers\.1\..*": 6},
            "alpha_pattern": {"gate_proj": 5},
        },
        lambda module: (5 if "gate" in module else 8) / one_of(6)(module),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_w_plus_scaled_b_a(tiny, published, tmp_path, variant):
    """The sum is computed by numpy from the files alone; beside the weights and merged into them."""
    ends, arguments, scaling = VARIANTS[variant]
    tensors = make_peft(tmp_path / "peft", published, all_modules(published, *ends), **arguments)
    wanted = dream_jax.load(merged_by_hand(tiny, tmp_path / "merged", published, tensors, scaling))(tokens())
    beside = dream_jax.load(tiny, adapter=tmp_path / "peft")
    if variant == "ranks and alphas":
        assert np.abs(wanted - dream_jax.load(tiny)(tokens())).max() > 0.01
        np.testing.assert_allclose(beside(tokens()), wanted, rtol=0, atol=1e-4)
    np.testing.assert_allclose(dream_jax.merge_adapter(beside)(tokens()), wanted, rtol=0, atol=1e-4)
    config = lora.config_of(beside)
    assert config is not None and config.dropout == arguments.get("lora_dropout", 0.0)


def test_a_merged_export_and_a_mesh(tiny, published, tmp_path):
    """flax_to_hf adds a PEFT adapter layer by layer; on a mesh every device gets its part."""
    tensors = make_peft(tmp_path / "peft", published, all_modules(published, "q_proj", "down_proj"))
    wanted = merged_by_hand(tiny, tmp_path / "merged", published, tensors, lambda _: 8 / 4)
    done = run_script("convert/flax_to_hf.py", tiny, tmp_path / "out", "--adapter", tmp_path / "peft")
    assert done.returncode == 0, done.stderr
    assert "rank 4, alpha 8 on q, down" in done.stdout and "trained on 'some/base'" in done.stdout
    for name, tensor in load_file(wanted / "model.safetensors").items():
        np.testing.assert_allclose(
            load_file(tmp_path / "out" / "model.safetensors")[name], tensor, atol=1e-6, err_msg=name
        )
    alone, shared = (dream_jax.load(tiny, mesh=mesh, adapter=tmp_path / "peft") for mesh in (None, "4x2"))
    for name, leaf in hf.flat(split_params(alone)[1]).items():
        np.testing.assert_array_equal(hf.flat(split_params(shared)[1])[name], leaf, err_msg=name)


def test_bfloat16_tensors_are_read_exactly(tiny, published, tmp_path):
    tensors = make_peft(
        tmp_path / "peft", published, all_modules(published, "o_proj"), dtype=ml_dtypes.bfloat16, task_type="CAUSAL_LM"
    )
    found = pretrained.describe_adapter(tmp_path / "peft")
    params = found.peft.read(pretrained.describe(tiny).config)
    a = tensors["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["layers.attn.o.lora_a"][1].reshape(-1, 4).T, a)
    assert params["layers.attn.o.lora_a"].dtype == np.float32


# There and back


def test_there_and_back_is_exact(tiny, published, tmp_path):
    """Ours to PEFT and again: the same arrays, configuration and base; and PEFT to ours to PEFT."""
    model = lora.attach(
        pretrained.load(tiny), LoraConfig(rank=3, alpha=5.5, dropout=0.1, targets=("q", "o", "gate")), jax.random.key(1)
    )
    for linear in lora.projections(model).values():
        if linear.lora_b is not None:
            linear.lora_b[...] = np.random.default_rng(1).normal(0, 0.1, linear.lora_b.shape).astype(np.float32)
    dream_jax.save_adapter(model, tmp_path / "ours")
    (tmp_path / "ours" / "prompt_format.json").write_text('{"template": "chat"}')
    command = ("convert/adapter_to_peft.py", tmp_path / "ours", tmp_path / "peft", "--base-model", "some/base")
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    assert "rank 3, alpha 5.5 on q, o, gate" in done.stdout
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["q_proj", "o_proj", "gate_proj"] and fields["lora_alpha"] == 5.5
    assert (tmp_path / "peft" / "prompt_format.json").is_file()
    again = dream_jax.load(tiny, adapter=tmp_path / "peft")
    assert lora.config_of(again) == lora.config_of(model)
    for name, leaf in hf.flat(split_params(model)[1]).items():
        np.testing.assert_array_equal(hf.flat(split_params(again)[1])[name], leaf, err_msg=name)
    # It still knows its base: other weights of the same shapes are refused.
    other = pretrained.load(tiny)
    other.norm.scale[...] = other.norm.scale[...] * 2
    with pytest.raises(ValueError, match="trained on the weights with identity"):
        pretrained.put_on(other, pretrained.describe_adapter(tmp_path / "peft"))
    assert run_script(*command).returncode == 1  # exists
    assert run_script(*command, "--overwrite").returncode == 0
    tensors = make_peft(tmp_path / "first", published, all_modules(published, "k_proj"), lora_alpha=16)
    dream_jax.save_adapter(dream_jax.load(tiny, adapter=tmp_path / "first"), tmp_path / "middle")
    pretrained.export_peft(tmp_path / "middle", tmp_path / "last")
    last = load_file(tmp_path / "last" / "adapter_model.safetensors")
    assert last.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(last[name], tensor, err_msg=name)
    with pytest.raises(ValueError, match="is a PEFT directory already"):
        pretrained.export_peft(tmp_path / "last", tmp_path / "more")


def test_what_is_switched_off_is_no_obstacle(tiny, published, tmp_path):
    """All keys that PEFT 0.20 writes for a plain adapter."""
    whole = {
        **{"alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None, "auto_mapping": None},
        **{
            "bias": "none",
            "corda_config": None,
            "ensure_weight_tying": False,
            "eva_config": None,
            "exclude_modules": None,
        },
        **{"fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "kasa_config": None},
        **{"layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {}},
        **{"lora_bias": False, "lora_dropout": 0.05, "lora_ga_config": None, "megatron_config": None},
        **{
            "megatron_core": "megatron.core",
            "modules_to_save": None,
            "monteclora_config": None,
            "peft_version": "0.20.0",
        },
        **{"qalora_group_size": 16, "rank_pattern": {}, "revision": None, "target_parameters": None},
        **{"task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_dora": False},
        **{"use_qalora": False, "use_rslora": False, "velora_config": None},
    }
    make_peft(tmp_path / "peft", published, all_modules(published, "q_proj"), **whole)
    found = pretrained.describe_adapter(tmp_path / "peft")
    assert found.config == LoraConfig(rank=4, alpha=8.0, dropout=0.05, targets=("q",))
    found.check_fits(pretrained.describe(tiny))


def test_peft_itself_computes_the_same(tiny, published, tmp_path):
    """With torch and PEFT installed: the delta of every weight as PEFT computes it."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    tensors = make_peft(tmp_path / "peft", published, all_modules(published, "q_proj", "down_proj"), use_rslora=True)
    root = torch.nn.Module()
    for name, tensor in published.items():
        parent = root
        *parents, leaf = name.removesuffix(".weight").split(".")
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        if name.endswith("_proj.weight"):
            parent.add_module(leaf, torch.nn.Linear(*tensor.shape[::-1], bias=False))
    model = peft.PeftModel.from_pretrained(root, str(tmp_path / "peft"))
    for module in all_modules(published, "q_proj", "down_proj"):
        layer = model.get_submodule(f"base_model.model.{module}")
        a = tensors[f"base_model.model.{module}.lora_A.weight"]
        b = tensors[f"base_model.model.{module}.lora_B.weight"]
        np.testing.assert_allclose(layer.get_delta_weight("default").detach().numpy(), 4 * b @ a, atol=1e-5)


# Training


def test_training_goes_on_from_it(tiny, published, tmp_path):
    tensors = make_peft(tmp_path / "peft", published, all_modules(published, "q_proj"), lora_dropout=0.1)
    settings = TrainSettings.flat(model=str(tiny), adapter=str(tmp_path / "peft"))
    assert lora.config_of(run_weights.describe(settings, "float32")) == LoraConfig(
        rank=4, alpha=8.0, dropout=0.1, targets=("q",)
    )
    assert "PEFT adapter of rank 4" in (run_weights.adapter_note(settings) or "")
    params, frozen = run_weights.read(settings, sharding.make_mesh("1x1"), "float32", begins=True)
    found = np.asarray(hf.flat(params)["layers.attn.q.lora_a"])[0].reshape(-1, 4).T
    np.testing.assert_array_equal(found, tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"])
    assert frozen.identity == lora.identity(pretrained.load(tiny))


# What is refused

REFUSED_KEYS = {
    "use_dora": (True, "use_dora=True, which is not implemented"),
    "bias": ("all", "bias='all'"),
    "modules_to_save": (["lm_head"], "modules_to_save"),
    "fan_in_fan_out": (True, "fan_in_fan_out=True"),
    "lora_bias": (True, "lora_bias"),
    "trainable_token_indices": ([1], "trainable_token_indices"),
    "layer_replication": ([[0, 1]], "layer_replication"),
    "target_parameters": (["x"], "target_parameters"),
    "use_qalora": (1, "use_qalora=1"),
    "peft_type": ("LOHA", "only LORA is implemented"),
    "init_lora_weights": ("pissa", "changes the base weights"),
    "future_scaling": (2.0, r"the key future_scaling \(2.0\), which is not known"),
    "r": (0, "r=0"),
    "lora_alpha": (float("nan"), "lora_alpha|JSON|finite"),
    "lora_dropout": ("0.1", "lora_dropout='0.1'; it must be of the type float"),
    "use_rslora": (1, "use_rslora=1; it must be of the type bool"),
    "target_modules": (["q_proj", "lm_head"], "has an adapter for lm_head"),
    "layers_to_transform": (
        [1],
        "has tensors for model.layers.0.self_attn.q_proj.*, which adapter_config.json does not name",
    ),
    "layers_pattern": ("blocks", "layers_pattern='blocks'"),
    "rank_pattern": ({"q_proj": 8}, "an adapter of rank 8 for this model"),
    "alpha_pattern": ({"(a+)+$": 8}, "too complicated"),
    "exclude_modules": (["q_proj"], "does not name"),
    "base_model_name_or_path": ([], "must be a text"),
}


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_keys_are_refused_by_name(tiny, published, tmp_path, key):
    value, message = REFUSED_KEYS[key]
    make_peft(tmp_path / "peft", published, all_modules(published, "q_proj"), **{key: value})
    with pytest.raises(ValueError, match=message) as refused:
        pretrained.describe_adapter(tmp_path / "peft").check_fits(pretrained.describe(tiny))
    assert "adapter_" in str(refused.value) and "\n" not in str(refused.value)


def test_usual_patterns_are_matched(published, tmp_path):
    layers = "|".join(map(str, range(28)))
    usual = rf".*\.layers\.({layers})\.(self_attn|mlp)\.(q_proj|k_proj)$"
    make_peft(tmp_path / "peft", published, all_modules(published, "q_proj", "k_proj"), target_modules=usual)
    assert pretrained.describe_adapter(tmp_path / "peft").config.targets == ("q", "k")


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a|b)*", "(x+x+)+y", ".*.*.*.*q", "(?:a?){30}a{30}", "[", "a" * 3000),
        *(r"(?x)(?:[a-z._0-9]+) *!", r"(?ix:(?:[a-z._0-9]+) +)!"),  # a space is nothing here, so a group is repeated
        "".join(f"({letter}|.)" for letter in "modelXlayersX0Xself_attnXq_proj") + "!",
    ],
)
def test_patterns_that_could_take_hours(published, tmp_path, pattern):
    make_peft(tmp_path / "peft", published, all_modules(published, "q_proj"), target_modules=pattern)
    with pytest.raises(ValueError, match="target_modules: .*(too complicated|not a regular expression)"):
        pretrained.describe_adapter(tmp_path / "peft")


def damaged(**changes):
    """A function that changes tensors: name -> array, None to remove it, or a text: the new name of the tensor."""

    def change(tensors):
        for name, value in changes.items():
            name = f"base_model.model.model.layers.0.self_attn.q_proj.{name.replace('_weight', '.weight')}"
            if value is None:
                del tensors[name]
            elif isinstance(value, str):
                tensors[value] = tensors[name]
            else:
                tensors[name] = value(tensors[name])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged(lora_A_weight=None), "has only one of lora_A and lora_B for model.layers.0.self_attn.q_proj"),
        (damaged(lora_A_weight=lambda a: a[:, :-1]), r"lora_A.weight has shape \[4, .*\], but an adapter of rank 4"),
        (damaged(lora_A_weight=lambda a: a[None]), "has shape"),
        (damaged(lora_B_weight=lambda b: b * np.nan), "lora_B.weight has values that are not finite"),
        (
            damaged(lora_A_weight="base_model.model.lm_head.lora_A.weight"),
            "lm_head.lora_A.weight is not a tensor of a LoRA",
        ),
        (
            damaged(lora_A_weight="base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight"),
            "are weights of the same module",
        ),
        (
            damaged(
                lora_A_weight="base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
                lora_B_weight="base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight",
            ),
            "has tensors for model.layers.9.self_attn.q_proj, which the model does not have",
        ),
    ],
)
def test_tensors_that_do_not_fit(tiny, published, tmp_path, change, message):
    tensors = make_peft(tmp_path / "peft", published, all_modules(published, "q_proj"))
    change(tensors)
    save_file(
        {name: np.ascontiguousarray(array) for name, array in tensors.items()},
        tmp_path / "peft" / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match=message):
        dream_jax.load(tiny, adapter=tmp_path / "peft")


def test_a_layer_without_tensors(tiny, published, tmp_path):
    """The adapter of a smaller model would otherwise be put on the first layers of a larger one."""
    make_peft(tmp_path / "peft", published, all_modules(published, "layers.0.self_attn.q_proj"))
    with pytest.raises(
        ValueError, match=r"no tensors for model.layers.1.*which adapter_config.json names.*'some/base'"
    ):
        dream_jax.load(tiny, adapter=tmp_path / "peft")


def test_pickles_are_not_opened(published, tmp_path):
    make_peft(tmp_path / "peft", published, all_modules(published, "q_proj"))
    (tmp_path / "peft" / "adapter_model.safetensors").rename(tmp_path / "peft" / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.bin, a pickle, .*safe_serialization=True"):
        pretrained.describe_adapter(tmp_path / "peft")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "it is empty"),
        (("config.json", "model.safetensors"), "it is the directory of a model"),
        (("adapter/adapter.json", "settings.json"), "did you mean its folder adapter"),
        (("adapter_model.safetensors",), "weights of PEFT without their adapter_config.json"),
        (("a.txt", "b.txt"), "it holds a.txt, b.txt"),
        (("adapter.json", "adapter_config.json"), "holds two adapters"),
        (("adapter_config.json",), "has adapter_config.json but no adapter_model.safetensors"),
    ],
)
def test_the_message_says_what_was_found(tiny, tmp_path, files, message):
    for name in files:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    (tmp_path / "x").mkdir(exist_ok=True)
    done = run_script("sample.py", "--model", tiny, "--adapter", tmp_path / "x", "--prompt", "x")
    assert done.returncode == 1 and re.search(message, done.stderr) and done.stderr.count("\n") == 1, done.stderr


def test_no_directory_and_a_file(tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    for name, message in (("file", "is a file"), ("nothing", "does not exist")):
        done = run_script("sample.py", "--model", tiny, "--adapter", tmp_path / name, "--prompt", "x")
        assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
