"""The mask of a run goes where its weights go: settings, model, adapter, evaluation; and not where nobody would know it."""

import dataclasses
import json
import pathlib
import runpy
import sys

import numpy as np
import pytest
from flax import nnx

import dream_jax
from dream_jax import files, pretrained, sharding
from dream_jax.data import TokenizedRows
from dream_jax.evaluation.likelihood import model_nll
from dream_jax.sampler import SamplerConfig
from dream_jax.tokenizer import ByteTokenizer
from dream_jax.trainer import TrainSettings, train
from dream_jax.trainer.build import describe_model
from dream_jax.trainer.heldout import Grid, lay_out_held_out

ROOT = pathlib.Path(__file__).parent.parent


def settings(out, **changes):
    base = {"steps": 2, "batch_size": 4, "eval_rows": 2, "samples": 0, "eval_tokens": 1, "log_to": (), "max_length": 24}
    base |= {"out": out, "data": str(out.parent / "data"), "model": str(out.parent / "base")}
    return TrainSettings.flat(**base | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of one layer on a few rows, with answers too long to be sampled."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "data").mkdir()
    for split in ("train", "test"):
        rows = [{"input": f"{n}+{n}=", "output": f"{n + n} or so"} for n in range(10)]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ByteTokenizer().save(folder)
    model = dream_jax.Dream(dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=1), rngs=nnx.Rngs(0))
    dream_jax.save(model, folder / "base", tokenizer_dir=folder)
    return folder / "prefix", train(settings(folder / "prefix", mask="prefix"))


def test_run_notes_its_mask(run):
    out, summary = run
    assert json.loads((out / "settings.json").read_text())["mask"] == "prefix"
    assert summary["mask"] == summary["settings"]["mask"] == "prefix"
    assert json.loads((out / "model" / "dream_jax.json").read_text())["mask"] == "prefix"
    assert pretrained.describe(out / "model").trained_mask == "prefix"
    assert dream_jax.load(out / "model").trained_mask == "prefix"
    assert pretrained.describe(out.parent / "base").trained_mask == "bidirectional"
    assert pretrained.describe("dream-7b").trained_mask == "bidirectional"


def test_evaluation_is_under_it(run):
    out, summary = run
    model, chosen = dream_jax.load(out / "model"), settings(out, mask="prefix")
    rows = TokenizedRows(chosen.source("test"), ByteTokenizer()).first(chosen.evaluation.eval_rows, 24)
    grid = Grid(lay_out_held_out([row for _, row in rows], 24, ByteTokenizer().pad_id), 2, sharding.make_mesh("1x1"))
    assert grid.score(model).nll == pytest.approx(summary["eval"]["nll"], rel=1e-6)
    # Not causal: with one layer a prompt's keys are those of its embeddings, and the two are one.
    model.trained_mask = "bidirectional"
    assert grid.score(model).nll != pytest.approx(summary["eval"]["nll"], rel=1e-6)


@pytest.mark.slow
def test_training_goes_on_under_it_and_adapters_carry_theirs(run, tmp_path):
    out, _ = run
    told = out.parent / "told"
    chosen = settings(told, model=str(out / "model"), lora_rank=2, mask="block-causal:4", eval_rows=0, held_out=0)
    assert train(chosen)["mask"] == "block-causal:4"
    adapter = told / "adapter"
    assert pretrained.describe_adapter(adapter).mask == "block-causal:4"
    assert dream_jax.load(out / "model", adapter=adapter).trained_mask == "block-causal:4"
    merged = dream_jax.merge_adapter(dream_jax.load(out / "model", adapter=adapter))
    assert merged.trained_mask == "block-causal:4"
    assert dream_jax.load(out / "model", base="int8").trained_mask == "prefix"
    mesh, untold = sharding.make_mesh("1x1"), settings(out.parent / "untold", model=str(out / "model"))
    assert describe_model(untold, mesh).trained_mask == "prefix"
    untold = untold.replaced(adapter=str(adapter))
    assert describe_model(untold, mesh).trained_mask == "block-causal:4"
    with pytest.raises(ValueError, match="trained under the mask 'block-causal:4', but the published code"):
        pretrained.convert_to_hf(out / "model", tmp_path / "hf", adapter=adapter)


def test_published_layout_cannot_say_it(run, tmp_path):
    model = dream_jax.load(run[0] / "model")
    for export in (
        lambda: dream_jax.export_hf(model, tmp_path / "hf"),
        lambda: pretrained.convert_to_hf(run[0] / "model", tmp_path / "hf"),
    ):
        with pytest.raises(
            ValueError, match="trained under the mask 'prefix', but the published code uses bidirectional"
        ):
            export()
    assert not (tmp_path / "hf").exists()
    model.trained_mask = "bidirectional"
    dream_jax.export_hf(model, tmp_path / "hf")
    assert dream_jax.load(tmp_path / "hf").trained_mask == "bidirectional"


def test_name_in_a_directory_is_checked(run, tmp_path):
    directory = tmp_path / "model"
    dream_jax.save(dream_jax.load(run[0] / "model"), directory)
    path = directory / "dream_jax.json"
    fields = json.loads(path.read_text())
    (directory / files.CHECKSUMS).unlink()  # as in a directory of version 0.1; they would tell that the file was edited
    path.write_text(json.dumps(fields | {"mask": "casual"}))
    with pytest.raises(ValueError, match=r"dream_jax.json: mask 'casual' is not one of"):
        dream_jax.load(directory)
    del fields["mask"]  # as written before there was one
    path.write_text(json.dumps(fields))
    assert dream_jax.load(directory).trained_mask == "bidirectional"


def test_likelihood_of_rows_without_prompts(run):
    tokenizer, model = ByteTokenizer(), dream_jax.load(run[0] / "model")
    with pytest.raises(ValueError, match="where the prompt of each row ends"):
        model_nll(model, tokenizer, 2)
    row = (np.arange(7, dtype=np.int32), np.arange(7) > 3)
    found = []
    for name in ("causal", "block-causal:3", "bidirectional"):
        model.trained_mask = name
        nll = model_nll(model, tokenizer, 2)
        alone, beside = nll([row])[0], nll([row, (np.arange(8, dtype=np.int32), np.arange(8) > 3)])[0]
        assert alone == pytest.approx(beside, rel=1e-5)  # with one more token of padding
        found.append(alone)
    assert len(set(found)) == 3


@pytest.mark.parametrize("flags", [("--mask", "casual"), ("--mask", "causal", "--anneal-steps", "5")])
def test_training_refuses(flags, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    said = " ".join(capsys.readouterr().err.split())  # which breaks lines where the terminal ends
    assert ended.value.code != 0
    assert "mask 'casual' is not one of" in said or "ends with bidirectional attention" in said


@pytest.mark.slow
def test_sampling_from_the_command_line(run, capsys, monkeypatch):
    """By default as trained; told otherwise, otherwise; and the file of answers knows."""
    asked = []
    generate = dream_jax.generate
    monkeypatch.setattr(
        dream_jax, "generate", lambda model, *rest, **kw: asked.append((model, rest)) or generate(model, *rest, **kw)
    )

    def sample(*flags):
        command = ["sample.py", "--model", str(run[0] / "model"), "--max-new-tokens", "2", *flags]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
        return ended.value.code

    assert sample("--prompt", "1+1=") == 0
    assert sample("--prompt", "1+1=", "--mask", "window:2:0") == 0
    (model, (_, first, *_)), (other, (_, second, *_)) = asked
    assert (model.trained_mask, first.mask) == ("prefix", None)
    assert other.trained_mask == "window:2:0" and second.mask is None
    assert isinstance(first, SamplerConfig)
    capsys.readouterr()
    assert sample("--prompt", "1+1=", "--mask", "window") != 0
    assert "mask 'window' is not one of" in capsys.readouterr().err
