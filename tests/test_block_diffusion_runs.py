"""Runs of train.py by block diffusion: which size a step has, what is refused, resuming, and where the mask goes."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
from commands import run_script
from flax import nnx

import dream_jax
from dream_jax import masks, pretrained, sharding
from dream_jax.flops import FlopCounter
from dream_jax.objective import CartWeight, InverseTimeWeight, LinearWeight
from dream_jax.tokenizer import ByteTokenizer
from dream_jax.train_step import StepConfig
from dream_jax.trainer import TrainSettings, steps, train
from dream_jax.trainer.build import describe_model

BLOCKS = InverseTimeWeight()


def test_steps_have_equal_shares_of_the_sizes():
    config = StepConfig(global_batch=2, weight=BLOCKS, block_sizes=(4, 8, 16), total_steps=7)
    assert [config.block_size(step) for step in range(9)] == [4, 4, 4, 8, 8, 16, 16, 16, 16]
    assert StepConfig(global_batch=2, weight=BLOCKS, block_sizes=(4,)).block_size(5) == 4
    assert StepConfig(global_batch=2).block_size(5) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_sizes": (4, 8)}, r"give their number as total_steps"),
        ({"block_sizes": (4,), "weight": CartWeight(0.1)}, r"take the weight inverse-time, linear or uniform"),
        ({"block_sizes": (4,), "mask": masks.Causal()}, r"brings a mask of its own"),
        ({"block_sizes": (4,), "anneal_steps": 2}, r"brings a mask of its own"),
        ({"complementary": True}, r"complementary=True is for block diffusion"),
        ({"mask": masks.BlockDiffusion(4)}, r"give its size as block_sizes; for one stream take BlockCausal"),
    ],
)
def test_steps_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        StepConfig(**{"global_batch": 2, "weight": BLOCKS} | change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_diffusion": "4", "weight": "cart"}, "give --weight inverse-time, linear or uniform"),
        ({"block_diffusion": "4:8", "mask": "causal"}, "leave out --mask causal"),
        ({"block_diffusion": "4", "anneal_steps": 5}, "leave out --anneal-steps 5"),
        ({"block_diffusion": "4:x"}, "must be a number of tokens, such as 16"),
        ({"block_diffusion": "0"}, "block_diffusion=0 must be at least 1"),
        ({"block_diffusion": "1:2:4", "steps": 2}, "more sizes than there are steps"),
        ({"mask": "block-diffusion:16"}, "for that give --block-diffusion 16 instead"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings.flat(**settings)


def test_refusal_is_one_line():
    found = run_script("train.py", "--complementary")
    assert found.returncode == 1
    assert "--complementary is for block diffusion" in found.stderr
    assert found.stderr.count("\n") == 1


def test_weight_is_inverse_time_unless_given():
    assert isinstance(TrainSettings.flat().loss.loss_weight(), CartWeight)
    blocks = TrainSettings.flat(block_diffusion="4:8")
    assert blocks.loss.block_sizes == (4, 8)
    assert isinstance(blocks.loss.loss_weight(), InverseTimeWeight)
    assert not blocks.warnings()
    assert isinstance(blocks.replaced(weight="linear").loss.loss_weight(), LinearWeight)
    # settings.json has the weight in force, as it always had, so that older runs resume.
    assert (TrainSettings().plain()["weight"], blocks.plain()["weight"]) == ("cart", "inverse-time")


def losses(out):
    with (out / "metrics.csv").open() as file:
        return [(row["step"], row["loss"], row["num_masked"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Settings of runs with one layer, and the first of them: four steps, two for each size, with complementary copies."""
    folder = tmp_path_factory.mktemp("blocks")
    (folder / "data").mkdir()
    for split in ("train", "test"):
        rows = [{"input": f"{n}+{n}=", "output": f"{n + n} or so"} for n in range(10)]
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ByteTokenizer().save(folder)
    config = dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=1, hidden_size=32, intermediate_size=48)
    dream_jax.save(dream_jax.Dream(config, rngs=nnx.Rngs(0)), folder / "base", tokenizer_dir=folder)
    base = {"steps": 4, "batch_size": 4, "eval_rows": 2, "samples": 0, "eval_tokens": 1, "log_to": (), "max_length": 24}
    base |= {"data": str(folder / "data"), "model": str(folder / "base"), "save_every": 1, "keep": 9}
    base |= {"block_diffusion": "2:3", "complementary": True, "learning_rate": 1e-2}
    made = TrainSettings.flat(**base, out=folder / "run")
    counted = []

    def counting(model, length, block=None):
        counted.append(block)
        return FlopCounter(model, length, block)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(steps, "FlopCounter", counting)
        summary = train(made)
    assert counted == [2, 3]  # one counter for each size; every step has the MFU of its own size
    return made, summary


@pytest.mark.slow
def test_trained_mask_is_that_of_the_last_size(run):
    made, summary = run
    assert summary["mask"] == "block-diffusion:3"
    assert (summary["settings"]["block_diffusion"], summary["settings"]["weight"]) == ("2:3", "inverse-time")
    model = dream_jax.load(made.run.out / "model")
    assert model.trained_mask == "block-diffusion:3"
    # Every maskable token is masked in one of the two copies: 4 rows of 24 tokens, without prompts of 4 or 6 bytes.
    for _, _, masked in losses(made.run.out):
        assert 4 * 18 <= float(masked) <= 4 * 20
    mesh = sharding.make_mesh("1x1")
    further = made.replaced(model=str(made.run.out / "model"), block_diffusion=None, complementary=False, weight="auto")
    with pytest.raises(
        ValueError, match="trained by block diffusion, under the mask block-diffusion:3: give --block-diff"
    ):
        describe_model(further, mesh)
    assert describe_model(further.replaced(mask="causal"), mesh).trained_mask == "causal"
    assert describe_model(further.replaced(block_diffusion="8"), mesh).trained_mask == "block-diffusion:8"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "changes"), [(1, {}), (3, {"mesh": "2x2x2", "accumulation": 2})], ids=["same mesh", "other mesh"]
)
def test_run_goes_on_in_the_middle_of_a_size(run, tmp_path, kept, changes):
    made, _ = run
    shutil.copytree(made.run.out, tmp_path / "out")
    (tmp_path / "out" / "summary.json").unlink()
    for step in range(kept + 1, 5):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / str(step))
    train(made.replaced(out=tmp_path / "out", **changes))
    if not changes:
        assert losses(tmp_path / "out") == losses(made.run.out)
        found, wanted = (dream_jax.load(out / "model") for out in (tmp_path / "out", made.run.out))
        np.testing.assert_array_equal(found.embed.embedding[...], wanted.embed.embedding[...])
    found, wanted = (np.array(losses(out), float) for out in (tmp_path / "out", made.run.out))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
def test_adapter_on_packed_texts(run, tmp_path):
    made, _ = run
    out = tmp_path / "packed"
    changes = {
        "pack": True,
        "eos_tail": 2,
        "max_length": 48,
        "lora_rank": 2,
        "eval_rows": 0,
        "held_out": 0.0,
        "steps": 2,
    }
    summary = train(made.replaced(out=out, complementary=False, **changes))
    assert summary["mask"] == pretrained.describe_adapter(out / "adapter").mask == "block-diffusion:3"
    assert np.isfinite(np.array(losses(out), float)).all()
