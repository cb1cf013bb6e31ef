"""Adapters as a user meets them: directories, runs that train them, commands that use them, and their refusals."""

import csv
import importlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dream_jax
from dream_jax import checkpoint, hf, inference, lora, pretrained, sharding
from dream_jax.flops import FlopCounter
from dream_jax.lora import LoraConfig
from dream_jax.model import Dream, parameter_count, split_params
from dream_jax.tokenizer import ByteTokenizer, write_template
from dream_jax.trainer import TrainSettings, train
from dream_jax.trainer.weights import describe

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = LoraConfig(rank=3, alpha=5.0, dropout=0.1, targets=("q", "o", "gate"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A converted directory of a random nano."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "tokenizer").mkdir()
    ByteTokenizer().save(folder / "tokenizer")
    model = Dream(dream_jax.PRESETS["nano"], rngs=nnx.Rngs(1))
    dream_jax.save(model, folder / "model", tokenizer_dir=folder / "tokenizer")
    return folder / "model"


@pytest.fixture
def tiny(golden_dir):
    return golden_dir / "tiny_a" / "hf"


def adapted(model, config=CONFIG):
    found = lora.attach(model, config, jax.random.key(1))
    rng = np.random.default_rng(1)
    for linear in lora.projections(found).values():
        if linear.lora_b is not None:
            linear.lora_b[...] = jnp.asarray(rng.normal(0, 0.1, linear.lora_b.shape), jnp.float32)
    return found


def tokens():
    return np.random.default_rng(0).integers(0, 120, (4, 12)).astype(np.int32)


def flat(model):
    return {name: np.asarray(leaf) for name, leaf in hf.flat(split_params(model)[1]).items()}


# Directories


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, "4x2"])
def test_there_and_back(tiny, tmp_path, mesh):
    model = adapted(pretrained.load(tiny))
    dream_jax.save_adapter(model, tmp_path / "adapter")
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").rglob("*") if path.is_file())
    assert size < 2 * 4 * parameter_count(lora.split(split_params(model)[1])[0]) + 40_000  # the base is not in it
    again = dream_jax.load(tiny, mesh=mesh, adapter=tmp_path / "adapter")
    assert lora.config_of(again) == CONFIG
    wanted, found = flat(model), flat(again)
    assert wanted.keys() == found.keys()
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
    if mesh is not None:
        params = split_params(again)[1]
        places = sharding.parameter_shardings(params, sharding.make_mesh(mesh))
        for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    merged = dream_jax.merge_adapter(again)
    np.testing.assert_allclose(merged(tokens()), model(tokens()), rtol=0, atol=1e-4)
    dream_jax.save(merged, tmp_path / "merged")
    np.testing.assert_allclose(dream_jax.load(tmp_path / "merged")(tokens()), merged(tokens()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("base", [None, "int8"])
def test_an_adapter_serves_every_kind_of_base(tiny, tmp_path, base):
    """Saved over nf4 in float32, loaded over another base and dtype: it is the same adapter of the same weights."""
    model = adapted(pretrained.load(tiny, base="nf4"))
    dream_jax.save_adapter(model, tmp_path / "adapter")
    again = dream_jax.load(tiny, "bfloat16", adapter=tmp_path / "adapter", base=base)
    assert lora.base_of(again) == (base or "bfloat16")
    for name, leaf in hf.flat(lora.split(split_params(again)[1])[0]).items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, flat(model)[name])


@pytest.mark.parametrize(
    ("layout", "mesh", "kind"),
    [
        ("published", None, "nf4"),
        ("published", "4x2", "int8"),
        ("converted", None, "int8"),
        ("converted", "4x2", "nf4"),
    ],
)
def test_a_base_is_quantised_as_it_is_read(tiny, tmp_path, monkeypatch, kind, mesh, layout):
    """Layer by layer, to the very codes of the whole model; and it knows which weights it came from."""
    source, whole = tiny, pretrained.load(tiny)
    if layout == "converted":
        source = tmp_path / "converted"
        pretrained.convert_from_hf(tiny, source)
    for room in (hf, checkpoint):
        monkeypatch.setattr(room, "load_params", lambda *_, **__: pytest.fail("the float model was read whole"))
    found = pretrained.load(source, mesh=mesh, base=kind)
    assert found.base_identity == lora.identity(whole)
    wanted = flat(lora.with_base(whole, kind))
    assert flat(found).keys() == wanted.keys()
    for name, leaf in flat(found).items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
    if mesh is not None:
        codes = split_params(found)[1]["layers"]["mlp"]["down"]["codes"]
        assert codes.addressable_shards[0].data.size == codes.size // 8


def test_what_is_not_quantised_has_the_asked_dtype(tiny):
    params = hf.flat(split_params(pretrained.load(tiny, "bfloat16", base="nf4"))[1])
    dtypes = {name.rpartition(".")[2]: str(leaf.dtype) for name, leaf in params.items() if name != "lm_head.kernel"}
    assert dtypes == {"embedding": "bfloat16", "scale": "bfloat16", "bias": "bfloat16"} | {
        "codes": "uint8",
        "scales": "float32",
    }
    assert params["lm_head.kernel"].dtype == jnp.bfloat16


def test_the_prompts_format_travels_with_the_adapter(tiny, tmp_path):
    model = adapted(pretrained.load(tiny))
    write_template(tmp_path, "chat")
    model.tokenizer_dir = str(tmp_path)
    dream_jax.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "prompt_format.json").read_text()) == {"template": "chat"}


# Directories that are refused


@pytest.fixture
def saved(tiny, tmp_path):
    dream_jax.save_adapter(adapted(pretrained.load(tiny)), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_another_model_is_refused_with_the_values(saved):
    with pytest.raises(ValueError, match="belongs to another model: vocab_size is 264, the adapter's 128"):
        dream_jax.load("nano", adapter=saved)


def test_other_weights_are_noticed(saved, tiny, tmp_path):
    """Fine-tuned, or with an adapter merged: the shapes are the same and the weights are not."""
    dream_jax.save(lora.merge(adapted(pretrained.load(tiny), LoraConfig(rank=1, alpha=1.0))), tmp_path / "other")
    with pytest.raises(ValueError, match="trained on the weights .* but these weights .* any_base=True"):
        dream_jax.load(tmp_path / "other", adapter=saved)
    assert lora.config_of(dream_jax.load(tmp_path / "other", adapter=saved, any_base=True)) == CONFIG
    with pytest.raises(ValueError, match="float16 rounds the weights"):
        dream_jax.load(tiny, "float16", adapter=saved)


def test_models_that_cannot_be_saved(tiny, tmp_path):
    model = pretrained.load(tiny)
    for write in (dream_jax.save, dream_jax.export_hf):
        with pytest.raises(ValueError, match="save_adapter, or call merge_adapter first"):
            write(adapted(model), tmp_path / "x")
        with pytest.raises(ValueError, match="a base in int8 codes cannot be saved"):
            write(lora.with_base(model, "int8"), tmp_path / "x")
    with pytest.raises(ValueError, match="has no adapter"):
        dream_jax.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_directory_is_replaced_only_by_its_kind(saved, tiny):
    model = adapted(pretrained.load(tiny))
    with pytest.raises(FileExistsError, match="overwrite"):
        dream_jax.save_adapter(model, saved)
    before = (saved / "adapter.json").stat().st_ino
    dream_jax.save_adapter(model, saved, overwrite=True)
    assert (saved / "adapter.json").stat().st_ino != before
    with pytest.raises(FileExistsError, match=r"holds no config.json"):
        dream_jax.save(pretrained.load(tiny), saved, overwrite=True)
    dream_jax.save(pretrained.load(tiny), saved.parent / "model")
    with pytest.raises(FileExistsError, match=r"holds no adapter.json"):
        dream_jax.save_adapter(model, saved.parent / "model", overwrite=True)


def test_a_failed_save_leaves_nothing(tiny, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("no more")

    monkeypatch.setattr(checkpoint, "written_files", fails)
    with pytest.raises(OSError, match="no more"):
        dream_jax.save_adapter(adapted(pretrained.load(tiny)), tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "adapter.json").unlink(), "holds no adapter.json"),
        (lambda path: (path / "adapter.json").write_text("{"), "not valid JSON"),
        (lambda path: (path / "adapter.json").write_text("[1]"), "holds a list, not an object"),
        (lambda path: (path / "adapter.json").write_text('{"format": 9}'), "format 9, but this version reads format 1"),
        (lambda path: (path / "adapter.json").write_text('{"format": 1}'), "not what save_adapter writes"),
        (lambda path: largest(path).unlink(), "is missing; adapter.json lists the sizes; save the adapter again"),
        (lambda path: largest(path).write_bytes(b"x"), "has 1 bytes, but"),
    ],
)
def test_damage_is_noticed_before_weights_are_read(saved, tiny, monkeypatch, damage, message):
    damage(saved)
    monkeypatch.setattr(hf, "load_params", lambda *_, **__: pytest.fail("weights were read first"))
    with pytest.raises((ValueError, OSError), match=message):
        dream_jax.load(tiny, adapter=saved)


def largest(path):
    files = [file for file in (path / "weights").rglob("*") if file.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


# Runs


def settings(weights, out, **changes):
    base = {"mesh": "1x1", "model": str(weights), "steps": 6, "batch_size": 8, "save_every": 2, "eval_rows": 2}
    base |= {"lora_rank": 4, "lora_dropout": 0.1, "base": "nf4", "learning_rate": 1e-2, "out": out}
    return TrainSettings.flat(**(base | changes))


def losses(out):
    with (out / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, train(settings(weights, out))


def test_a_run_leaves_an_adapter_and_nothing_of_the_base(finished, weights):
    out, summary = finished
    assert not (out / "model").exists()
    adapter = pretrained.describe_adapter(out / "adapter")
    assert adapter.config == LoraConfig(rank=4, alpha=8.0, dropout=0.1)
    assert adapter.identity == summary["base_identity"] == lora.identity(pretrained.load(weights))
    assert summary["parameters"] == 856_192
    assert summary["trained_parameters"] == 38_912 < 0.05 * summary["parameters"]
    size = sum(path.stat().st_size for path in (out / "checkpoints" / "6").rglob("*") if path.is_file())
    assert size < 1.5 * 3 * 4 * summary["trained_parameters"] + 100_000
    # What it learned is in the adapter.
    model = dream_jax.load(weights, adapter=out / "adapter")
    assert max(float(jnp.abs(linear.lora_b[...]).max()) for linear in lora.projections(model).values()) > 1e-3
    assert summary["eval"]["nll"] > 0


@pytest.mark.slow
@pytest.mark.optimised
def test_a_run_that_goes_on_comes_to_the_same_end(finished, weights, tmp_path, capsys):
    """The base comes from its directory again, quantised to the same codes. Kills are test_interruptions.py's."""
    out = unfinished(finished, tmp_path)
    shutil.rmtree(out / "adapter")
    head, *rows = (out / "metrics.csv").read_text().splitlines()
    (out / "metrics.csv").write_text("\n".join([head, *rows[:5]]) + "\n")
    train(settings(weights, out))
    assert "38,912 parameters beside 856,192 frozen ones, 4.54%" in capsys.readouterr().out
    assert losses(out) == losses(finished[0])
    for name, leaf in hf.flat(adapter_of(out)).items():
        np.testing.assert_array_equal(leaf, hf.flat(adapter_of(finished[0]))[name], err_msg=name)


def adapter_of(out):
    return pretrained.adapter_params(pretrained.describe_adapter(out / "adapter"), None)


def unfinished(finished, tmp_path):
    out = tmp_path / "unfinished"
    shutil.copytree(finished[0], out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / "6")
    return out


def test_a_base_that_changed_since_is_noticed(finished, weights, tmp_path):
    """Another model under the same name: the adapter was trained on what lay there before."""
    out, moved = unfinished(finished, tmp_path), tmp_path / "moved"
    shutil.copytree(weights, moved)
    recorded = json.loads((out / "settings.json").read_text())
    (out / "settings.json").write_text(json.dumps(recorded | {"model": str(moved)}))
    model = dream_jax.load(moved)
    model.layers.mlp.up.kernel[...] = model.layers.mlp.up.kernel[...].at[1, 2, 3].multiply(1.5)
    dream_jax.save(model, moved, overwrite=True, tokenizer_dir=weights)
    before = losses(out)
    with pytest.raises(ValueError, match="are not those that this run began with"):
        train(settings(moved, out))
    assert losses(out) == before and (out / "checkpoints" / "4").is_dir()


@pytest.mark.slow
def test_going_on_from_an_adapter(finished, weights, tmp_path):
    """On another kind of base and another mesh; with --merge the whole model is written too."""
    out = tmp_path / "more"
    changes = {"lora_rank": None, "lora_dropout": None, "base": "auto", "mesh": "4x2", "steps": 2, "eval_rows": 0}
    changes |= {"adapter": str(finished[0] / "adapter"), "merge": True, "accumulation": 2, "remat": "full"}
    train(settings(weights, out, **changes))
    adapter = pretrained.describe_adapter(out / "adapter")
    assert adapter.config == LoraConfig(rank=4, alpha=8.0, dropout=0.1)
    before, after = hf.flat(adapter_of(finished[0])), hf.flat(adapter_of(out))
    moved = {name: np.abs(after[name] - before[name]).max() for name in before}
    assert 1e-4 < max(moved.values()) < 0.1  # it went on from there: a new one would have B = 0 and another A
    merged, both = dream_jax.load(out / "model"), dream_jax.load(weights, adapter=out / "adapter")
    np.testing.assert_allclose(merged(tokens()), both(tokens()), rtol=0, atol=1e-4)
    other = tmp_path / "other"
    model = dream_jax.load(weights)
    model.norm.scale[...] = model.norm.scale[...] * 1.5
    dream_jax.save(model, other, tokenizer_dir=weights)
    with pytest.raises(ValueError, match="give --model the weights that it was trained on"):
        train(settings(other, tmp_path / "x", **changes))
    assert not (tmp_path / "x").exists()


def test_sampling_with_an_adapter(finished, weights, capsys, monkeypatch):
    """Merged over float weights, beside them over codes."""
    monkeypatch.syspath_prepend(ROOT)
    script = importlib.import_module("sample")  # types of settings are looked up in the module, so it has to be one
    given = {"model": str(weights), "adapter": str(finished[0] / "adapter"), "prompt": "1+1=", "max_new_tokens": 2}
    for changes, kinds in (
        ({}, ("float32", None)),
        ({"base": "nf4"}, ("nf4", LoraConfig(rank=4, alpha=8.0, dropout=0.1))),
    ):
        settings = script.SampleSettings(**given | changes)
        model = inference.prepare(settings).load()
        assert (lora.base_of(model), lora.config_of(model)) == kinds
        assert script.run(settings) == 0
        assert "--- answer" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--any-base"):
        script.run(script.SampleSettings(**given | {"model": "nano"}))
    assert script.run(script.SampleSettings(**given | {"model": "nano", "any_base": True})) == 0
    with pytest.raises(ValueError, match="--any-base needs an adapter"):
        script.SampleSettings(prompt="x", any_base=True)


def test_prompts_are_written_as_the_adapter_was_trained(finished, weights):
    adapter = finished[0] / "adapter"
    assert json.loads((adapter / "prompt_format.json").read_text()) == {"template": "raw"}

    def find(**changes):
        settings = inference.ModelSettings(model=str(weights), **changes)
        return inference.prepare(settings, default_template="chat").template

    assert find() == "chat" and find(adapter=str(adapter)) == "raw"


# Settings


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 8.0}, "--lora-alpha has no effect"),
        ({"base": "nf4"}, "--base has no effect.* give --lora-rank or --adapter"),
        ({"merge": True}, "--merge has no effect"),
        ({"lora_dropout": 0.0}, "--lora-dropout has no effect"),
        ({"lora_rank": 0}, "rank=0 must be at least 1"),
        ({"lora_rank": 4, "lora_targets": "q,w"}, "'q,w' are neither all nor some of"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "outside"),
        ({"lora_rank": 4, "adapter": "x"}, "rank, alpha and targets are read from --adapter x"),
        ({"adapter": "x", "lora_targets": "q"}, "leave --lora-\\* out"),
        ({"adapter": "x", "lora_dropout": -1.0}, "lora_dropout=-1.0 is outside"),
        ({"lora_rank": 4, "base": "nf4", "merge": True}, "--merge cannot add an adapter to a base in nf4"),
    ],
)
def test_settings_that_cannot_be(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings.flat(out=tmp_path / "x", **change)


def test_defaults_and_warnings():
    checkpointed = TrainSettings.flat(model="weights", lora_rank=32)
    assert checkpointed.lora.new_adapter() == LoraConfig(rank=32, alpha=64.0)
    assert (
        checkpointed.optimizer_config().learning_rate == 10 * TrainSettings.flat(model="weights").default_rate() == 5e-5
    )
    assert checkpointed.warnings() == []
    some = TrainSettings.flat(model="weights", lora_rank=8, lora_alpha=4.0, lora_targets="q,v", lora_dropout=0.05)
    assert some.lora.new_adapter() == LoraConfig(rank=8, alpha=4.0, dropout=0.05, targets=("q", "v"))

    def warned(text, **changes):
        return any(
            text in line for line in TrainSettings.flat(**({"model": "weights", "lora_rank": 8} | changes)).warnings()
        )

    assert warned("has random weights", model="nano")
    assert warned("far above the 5e-5 to 2e-4", learning_rate=1e-2)
    assert warned("alpha / rank is 10", lora_alpha=80.0)
    assert warned("twice the memory of --base bfloat16", base="float32", compute_dtype="bfloat16")
    assert warned("state of an adapter is small", moments="int8")


@pytest.mark.parametrize("base", ["auto", "nf4"])
def test_a_frozen_matrix_costs_no_gradient_of_its_own(base):
    """FLOPs of a token: 4 a frozen weight, 6 a trained one; codes are counted as the weights they mean."""
    whole = FlopCounter(describe(TrainSettings(), "float32"), 40)
    adapted = FlopCounter(describe(TrainSettings.flat(lora_rank=4, base=base), "float32"), 40)
    per_token = [counter.step(1, 0) for counter in (whole, adapted)]
    config = dream_jax.PRESETS["nano"]
    layers = config.num_parameters - 2 * config.vocab_size * config.hidden_size
    attention = 12 * config.num_hidden_layers * config.hidden_size * 40
    assert per_token == [6 * layers + attention, 4 * layers + 6 * 38_912 + attention]


def test_the_base_is_stored_as_it_is_computed_with():
    def stored(**changes):
        return lora.base_of(describe(TrainSettings.flat(lora_rank=4, **changes), changes.pop("compute_dtype")))

    assert stored(compute_dtype="bfloat16") == "bfloat16"
    assert stored(compute_dtype="bfloat16", base="float32") == "float32"
    assert stored(compute_dtype="float32", base="int8") == "int8"
    assert lora.base_of(describe(TrainSettings.flat(compute_dtype="bfloat16"), "bfloat16")) == "float32"  # masters


@pytest.mark.slow
def test_rounding_to_the_compute_dtype_changes_nothing():
    """Why auto may store the base in bfloat16: each layer would round it there anyway."""
    master, stored = pretrained.load("nano", compute_dtype="bfloat16"), pretrained.load("nano", "bfloat16")
    np.testing.assert_array_equal(stored(tokens()), master(tokens()))
