"""Back to Hugging Face: what a run has made, or a base with its adapter added, as the published code reads it."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run_script
from flax import nnx
from safetensors.numpy import load_file

import dream_jax
from dream_jax import hf, lora, pretrained
from dream_jax.lora import LoraConfig
from dream_jax.model import split_params
from dream_jax.reports.model_card import find_run, model_card
from dream_jax.tokenizer import ByteTokenizer, load_tokenizer
from dream_jax.trainer import TrainSettings, train

TOKENS = np.random.default_rng(0).integers(0, 250, (3, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run from scratch, and one that trains an adapter on what that has made."""
    folder = tmp_path_factory.mktemp("runs")
    small = dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=2)
    ByteTokenizer().save(folder / "tokenizer")
    base = dream_jax.Dream(small, rngs=nnx.Rngs(0))
    dream_jax.save(base, folder / "base", tokenizer_dir=folder / "tokenizer")
    options = {"steps": 3, "batch_size": 8, "eval_rows": 4, "samples": 0, "model": str(folder / "base")}
    train(TrainSettings.flat(**options, learning_rate=1e-3, out=folder / "whole"))
    options |= {"model": str(folder / "whole" / "model"), "lora_rank": 4, "lora_targets": "q,o,down"}
    train(TrainSettings.flat(**options, learning_rate=1e-2, out=folder / "lora"))
    return folder


def tensors(directory):
    return {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}


def flax_to_hf(*arguments):
    return run_script("convert/flax_to_hf.py", *arguments)


@pytest.mark.slow
def test_a_run_is_exported_with_its_card(runs, tmp_path):
    done = flax_to_hf(runs / "whole" / "model", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = dream_jax.load(tmp_path / "out")
    np.testing.assert_array_equal(found(TOKENS), dream_jax.load(runs / "whole" / "model")(TOKENS))
    name = "byte_tokenizer.json"
    assert (tmp_path / "out" / name).read_bytes() == (runs / "tokenizer" / name).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    summary = json.loads((runs / "whole" / "summary.json").read_text())
    for part in (
        "`sudoku`: 1000000 rows were trained on",
        "Trained from `base`, a directory of the machine that the run was made on",
        "| `learning_rate` | 0.001 |",
        f"| exact accuracy | {summary['eval']['exact_accuracy']:.5g} |",
        "stored in float32",
        "## What was not checked",
        "Only 4 held-out rows were answered",
    ):
        assert part in card
    assert "rounding the trained weights" not in card
    # No path of this machine; a hub id is named where the hub looks for it.
    assert str(runs) not in card and "base_model" not in card
    settings = json.loads((runs / "whole" / "settings.json").read_text())
    copy = shutil.copytree(runs / "whole", tmp_path / "copy")
    # The form of a name does not tell: weights/dream-7b may have been a folder where the run was made.
    hub = "Dream-org/Dream-v0-Instruct-7B"
    (copy / "settings.json").write_text(json.dumps(settings | {"model": hub}))
    assert "base_model" not in model_card(copy, name="x", dtype="float32", adapter=False)
    data = json.loads((copy / "data.json").read_text())
    assert data["sources"] == {str(runs / "base"): "local", "sudoku": "built in"}
    assert "whose source is not recorded" in model_card(copy, name="x", dtype="float32", adapter=False)
    (copy / "data.json").write_text(json.dumps(data | {"sources": {hub: "hub"}}))
    card = model_card(copy, name="x", dtype="float32", adapter=False)
    assert f'base_model: "{hub}"' in card and f"Trained from `{hub}` of the Hugging Face hub." in card


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["converted", "published"])
def test_an_adapter_is_added_as_merging_adds_it(runs, tmp_path, layout):
    base = runs / "whole" / "model"
    if layout == "published":
        pretrained.convert_to_hf(base, tmp_path / "base")
        base = tmp_path / "base"
    done = flax_to_hf(base, tmp_path / "out", "--adapter", runs / "lora" / "adapter")
    assert done.returncode == 0, done.stderr
    merged = dream_jax.merge_adapter(dream_jax.load(base, adapter=runs / "lora" / "adapter"))
    wanted = {name: np.asarray(leaf) for name, leaf in hf.flat(split_params(merged)[1]).items()}
    found = {
        name: np.asarray(leaf) for name, leaf in hf.flat(split_params(dream_jax.load(tmp_path / "out"))[1]).items()
    }
    before = {name: np.asarray(leaf) for name, leaf in hf.flat(split_params(dream_jax.load(base))[1]).items()}
    changed = {name for name, leaf in found.items() if not np.array_equal(leaf, before[name])}
    assert changed == {f"layers.{part}.kernel" for part in ("attn.q", "attn.o", "mlp.down")}
    for name, leaf in wanted.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-6, atol=1e-8, err_msg=name)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a base with a low-rank adapter added" in card and "| `lora_rank` | 4 |" in card


@pytest.mark.slow
def test_the_sum_is_rounded_once(runs, tmp_path):
    """Stored in bfloat16: the float32 sum rounded, not the sum of what was rounded."""
    base, adapter = runs / "whole" / "model", runs / "lora" / "adapter"
    pretrained.convert_to_hf(base, tmp_path / "out", adapter=adapter, dtype="bfloat16")
    pretrained.convert_to_hf(base, tmp_path / "exact", adapter=adapter)
    exact, found = tensors(tmp_path / "exact"), tensors(tmp_path / "out")
    for name, leaf in found.items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, exact[name].astype(jnp.bfloat16))


@pytest.mark.slow
def test_other_weights_are_refused_and_leave_nothing(runs, tmp_path):
    done = flax_to_hf(runs / "base", tmp_path / "out", "--adapter", runs / "lora" / "adapter")
    assert done.returncode == 1 and "was trained on the weights" in done.stderr and "--any-base" in done.stderr
    assert list(tmp_path.iterdir()) == []
    done = flax_to_hf(runs / "base", tmp_path / "out", "--adapter", runs / "lora" / "adapter", "--any-base")
    assert done.returncode == 0, done.stderr
    done = flax_to_hf(runs / "whole" / "model", tmp_path / "more", "--run", tmp_path)
    assert done.returncode == 1 and "holds no settings.json" in done.stderr and not (tmp_path / "more").exists()
    done = flax_to_hf(runs / "whole" / "model", tmp_path / "more", "--adapter", tmp_path)
    assert done.returncode == 1 and "adapter.json" in done.stderr and not (tmp_path / "more").exists()
    pretrained.convert_to_hf(runs / "base", tmp_path / "published")
    with pytest.raises(ValueError, match="is not a converted directory"):
        pretrained.convert_to_hf(tmp_path / "published", tmp_path / "more")


def test_a_card_without_a_run_says_that_nothing_is_known(tmp_path):
    card = model_card(None, name="orphan", dtype="bfloat16", adapter=False)
    assert card.count("Not known") == 3 and "How these weights were trained" in card and "base_model" not in card
    assert find_run(None, tmp_path / "model") is None


@pytest.mark.slow
def test_what_was_not_measured_is_not_claimed(runs, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "settings.json").write_text((runs / "whole" / "settings.json").read_text())
    card = model_card(run, name="x", dtype="bfloat16", adapter=False)
    for part in (
        "The run was not finished",
        "None was made.",
        "no data.json",
        "no held-out row",
        "rounding the trained",
    ):
        assert part in card


def test_a_card_says_what_the_run_took_where_it_was_given_nothing(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(TrainSettings.flat(final="best").plain()))
    summary = {"learning_rate": 2e-3, "step": 500, "seconds": 1.0, "devices": "1 x cpu", "eval": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    card = model_card(tmp_path, name="x", dtype="float32", adapter=False)
    assert "| `learning_rate` | 0.002 |" in card and "| `focal` | False |" in card
    assert (
        "These are the weights after step 500." in card and "| `steps` | 1500 |" in card and "`max_length`" not in card
    )


@pytest.mark.slow
def test_torch_computes_the_same(runs, tmp_path):
    """The export as transformers' Qwen2, the causal mask replaced by one that hides nothing."""
    torch = pytest.importorskip("torch", reason="the parity test needs torch (the extra bench)")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    base, adapter = runs / "whole" / "model", runs / "lora" / "adapter"
    pretrained.convert_to_hf(base, tmp_path / "out", adapter=adapter)
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    rope = {"rope_type": "default", "rope_theta": float(fields["rope_theta"])}
    config = Qwen2Config(**{name: fields[name] for name in sizes}, hidden_act="silu", rope_parameters=rope)
    theirs = Qwen2ForCausalLM(config).eval()
    weights = {name: torch.from_numpy(leaf.copy()) for name, leaf in tensors(tmp_path / "out").items()}
    theirs.load_state_dict(weights)
    everything = torch.zeros((len(TOKENS), 1, TOKENS.shape[1], TOKENS.shape[1]))  # added to the scores
    with torch.inference_mode():
        wanted = theirs(input_ids=torch.from_numpy(TOKENS).long(), attention_mask=everything).logits.numpy()
        causal = theirs(input_ids=torch.from_numpy(TOKENS).long()).logits.numpy()
    ours = np.asarray(dream_jax.load(base, adapter=adapter)(TOKENS))
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    assert np.abs(ours - causal).max() > 1e-2  # the mask was off


@pytest.mark.slow
def test_real_tokenizer_files_come_out_unchanged(assets, tmp_path):
    """From a checkpoint through a run's folder to the export: the bytes that the published tokenizer was read from."""
    published = assets / "dream-v0-instruct-7b"
    small = dataclasses.replace(
        dream_jax.PRESETS["small"], hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = dream_jax.Dream(small, rngs=nnx.Rngs(0))
    dream_jax.save(model, tmp_path / "model", tokenizer_dir=published)
    rows = "".join(json.dumps({"prompt": f"{n}", "response": "yes"}) + "\n" for n in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    options = {"model": str(tmp_path / "model"), "data": str(tmp_path / "rows.jsonl"), "out": tmp_path / "run"}
    train(TrainSettings.flat(**options, steps=1, batch_size=4, eval_rows=0))
    pretrained.convert_to_hf(tmp_path / "run" / "model", tmp_path / "out", dtype="bfloat16")
    names = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (published / name).read_bytes()
    assert load_tokenizer(tmp_path / "out").mask_id == 151666
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "Dream" and config["torch_dtype"] == "bfloat16"


@pytest.mark.slow
def test_every_target_is_added(tmp_path):
    """Merging layer by layer, of all seven projections, is what `lora.merge` does to the whole model."""
    small = dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=2, tie_word_embeddings=True)
    base = dream_jax.Dream(small, rngs=nnx.Rngs(3))
    dream_jax.save(base, tmp_path / "base")
    model = lora.attach(dream_jax.load(tmp_path / "base"), LoraConfig(rank=3, alpha=5.0), jax.random.key(1))
    for linear in lora.projections(model).values():
        linear.lora_b[...] = jax.random.normal(jax.random.key(2), linear.lora_b.shape) * 0.1
    dream_jax.save_adapter(model, tmp_path / "adapter")
    pretrained.convert_to_hf(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", max_shard_size=100_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    found = dream_jax.load(tmp_path / "out")
    np.testing.assert_allclose(found(TOKENS), dream_jax.merge_adapter(model)(TOKENS), atol=1e-5)
    assert np.abs(np.asarray(found(TOKENS)) - np.asarray(base(TOKENS))).max() > 0.05
