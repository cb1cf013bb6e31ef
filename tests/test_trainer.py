"""The training loop as a user meets it: one folder a run, stopping, going on, refusals, several processes."""

import collections
import csv
import dataclasses
import json
import math
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from shared_run import settings

import dream_jax
from dream_jax import pretrained, sharding
from dream_jax.checkpoint import RunCheckpoints
from dream_jax.data import TokenizedRows, make_batches
from dream_jax.tokenizer import ByteTokenizer
from dream_jax.trainer import Diverged, Stopped, TrainSettings, prepared, steps, train
from dream_jax.trainer.folder import check_folder, claimed_folder
from dream_jax.trainer.heldout import Grid, lay_out_held_out
from dream_jax.trainer.incidents import read_incidents


def plain(out, **changes):
    """Of a run with the default weight."""
    base = {"steps": 12, "batch_size": 8, "save_every": 5, "eval_rows": 4, "out": out}
    return TrainSettings.flat(**(base | changes))


def held_out_rows(chosen, max_length):
    """The held-out rows of a run, as it scores them."""
    rows = TokenizedRows(chosen.source("test"), ByteTokenizer()).first(chosen.evaluation.eval_rows, max_length)
    return lay_out_held_out([row for _, row in rows], max_length, ByteTokenizer().pad_id)


def losses(out):
    with (out / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(nano_run):
    return nano_run, json.loads((nano_run / "summary.json").read_text())


NANO = {"mesh": "8x1", "steps": 20, "batch_size": 32, "eval_rows": 0, "save_every": 20}


@pytest.fixture(scope="module")
def nano_losses(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "nano"
    train(plain(out, **NANO))
    return np.array([loss for _, loss in losses(out)])


def test_a_run_leaves_what_it_promises(finished):
    out, summary = finished
    assert [step for step, _ in losses(out)] == [*range(1, 13)]
    assert summary["settings"]["steps"] == 12
    assert summary["learning_rate"] == 2e-3  # none was given
    data = json.loads((out / "data.json").read_text())
    assert data["rows"] == summary["data"] and data["rows"]["whole"] == data["rows"]["kept"] == 1_000_000
    # Puzzle and solution fill the row: of twenty tokens that are learned the last is end-of-text.
    assert data["batches"]["eos_share"] == 1 / 20 and data["batches"]["padding_share"] == 0
    assert data["batches"]["epochs"] == 12 * 8 / 1_000_000
    assert summary["last_losses"] == [loss for _, loss in losses(out)][-10:]
    assert 0.0 <= summary["eval"]["exact_accuracy"] <= 1.0
    assert summary["eval"]["rows"] == 4
    assert summary["seconds"] > 0
    assert sum(summary["bytes_per_device"].values()) == pytest.approx(3 * 4 * summary["parameters"], rel=0.01)
    assert any((out / "tensorboard").iterdir())
    model = dream_jax.load(out / "model")
    assert dream_jax.generate(
        model, np.array([[50, 51]]), dream_jax.SamplerConfig(max_new_tokens=2, steps=2, alg="entropy")
    ).tokens.shape == (1, 4)


def test_a_finished_run_is_not_touched(finished):
    out, _ = finished
    before = (out / "metrics.csv").read_bytes()
    with pytest.raises(FileExistsError, match="finished run; pass --overwrite"):
        train(settings(out))
    assert (out / "metrics.csv").read_bytes() == before


def test_a_foreign_folder_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(FileExistsError, match="holds no run"):
        train(plain(tmp_path, overwrite=True))
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_overwrite_goes_on_with_an_unfinished_run(finished, tmp_path):
    """`make demo` twice, the first stopped half-way: the second loses nothing. A run with other settings goes."""
    out = tmp_path / "unfinished"
    shutil.copytree(finished[0], out)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / "12")
    train(settings(out, overwrite=True))
    kept = [(out / "checkpoints" / "10" / "state").stat().st_mtime_ns, losses(out)]
    assert kept == [(finished[0] / "checkpoints" / "10" / "state").stat().st_mtime_ns, losses(finished[0])]
    train(settings(out, overwrite=True, steps=3))
    assert len(losses(out)) == 3


def test_a_folder_has_one_run_at_a_time(tmp_path):
    out = tmp_path / "shared"
    with claimed_folder(plain(out)):
        with pytest.raises(BlockingIOError, match="another process.* is writing"):
            train(plain(out))
        assert (out / "settings.json").is_file()
    with claimed_folder(plain(out)):
        pass  # let go of


def test_settings_that_an_earlier_version_did_not_have_are_at_their_defaults(tmp_path):
    out = tmp_path / "out"
    with claimed_folder(plain(out)):
        kept = json.loads((out / "settings.json").read_text())
        for name in ("ignore_field", "data_split", "eval_split", "data_config"):
            del kept[name]
        (out / "settings.json").write_text(json.dumps(kept))
    assert check_folder(plain(out))
    with pytest.raises(FileExistsError, match="data_split was None, now 'a'"):
        check_folder(plain(out, data_split="a"))
    # An earlier version accepted --cart-p with weights that do not use it.
    (out / "settings.json").write_text(json.dumps(kept | {"weight": "linear", "cart_p": 0.3}))
    assert check_folder(plain(out, weight="linear"))
    (out / "settings.json").write_text(json.dumps(kept | {"cart_p": 0.3}))
    with pytest.raises(FileExistsError, match="cart_p was 0.3, now 0.1"):
        check_folder(plain(out))


def test_what_is_left_of_a_removal_is_still_a_run(tmp_path):
    """Killed while --overwrite was removing a run: the same command can do it again."""
    out = tmp_path / "out"
    with claimed_folder(plain(out, steps=7)):
        (out / "checkpoints").mkdir()
    assert not check_folder(plain(out, overwrite=True))
    with pytest.raises(FileExistsError, match="steps was 7, now 12"):
        check_folder(plain(out))
    (out / "settings.json").write_text("")
    with pytest.raises(ValueError, match="settings.json is not valid JSON"):
        check_folder(plain(out, overwrite=True))


@pytest.mark.slow
def test_a_run_does_not_go_on_with_other_text(tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"

    def write(answer):
        data.write_text("".join(json.dumps({"input": f"{n:02}", "output": answer}) + "\n" for n in range(40)))

    write("yes")
    options = {"data": str(data), "steps": 4, "save_every": 2, "eval_rows": 0}
    train(plain(out, **options))
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / "4")
    write("nay")
    with pytest.raises(ValueError, match="digest of the rows was"):
        train(plain(out, **options))


@pytest.mark.slow
def test_a_diverged_run_keeps_its_batches_and_saves_nothing_of_it(tmp_path):
    out = tmp_path / "wild"
    wild = plain(out, learning_rate=1e30, clip_norm=0, save_every=1, max_skipped=3, eval_rows=0)
    said = r"step 4 has loss .* the last of 3 in a row .*newest checkpoint is of step 1.*Try a smaller"
    for _ in range(2):  # the same command comes to the same end
        with pytest.raises(Diverged, match=said):
            train(wild)
        assert not (out / "summary.json").exists()
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["1"]
        with (out / "metrics.csv").open() as file:
            found = [(int(row["step"]), float(row["skipped"]), float(row["loss"])) for row in csv.DictReader(file)]
        assert [row[:2] for row in found] == [(1, 0), (2, 1), (3, 1), (4, 1)]
        assert np.isfinite(found[0][2]) and not np.isfinite([row[2] for row in found[1:]]).any()
    batches = [dict(np.load(out / "skipped" / f"step-{step}.npz")) for step in (2, 3, 4)]
    rows = TokenizedRows(wild.source("train"), ByteTokenizer())
    with make_batches(rows, batch_size=8, max_length=40, seed=0) as again:
        wanted = [next(again) for _ in range(4)][1:]
    for batch, other in zip(batches, wanted, strict=True):
        assert batch.keys() == {"tokens", "maskable", "row"}
        for name, array in (("tokens", other.tokens_BT), ("maskable", other.maskable_BT), ("row", other.row_B)):
            np.testing.assert_array_equal(batch[name], array)


@pytest.fixture
def weights_may_be_nan(monkeypatch):
    """Lets tests make a loss NaN by weights that are NaN, which are refused when they are read."""
    monkeypatch.setattr("dream_jax.checkpoint.weights.check_parameters", lambda *_: None)


@pytest.mark.slow
@pytest.mark.usefixtures("weights_may_be_nan")
def test_a_poisoned_batch_costs_its_step(tmp_path, capsys):
    """One row in ten makes the loss of its batch NaN; the run goes on, and says so."""
    small = dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=1)
    model = dream_jax.Dream(small, rngs=nnx.Rngs(0))
    model.embed.embedding[...] = model.embed.embedding[...].at[ord("Q")].set(np.nan)
    dream_jax.save(model, tmp_path / "model")
    rows = [{"input": "Q" if n == 7 else f"{n}", "output": "yes"} for n in range(10)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data": str(tmp_path / "train.jsonl"), "model": str(tmp_path / "model"), "tokenizer": "bytes"}
    options |= {"mesh": "1x1", "batch_size": 2, "steps": 10, "eval_rows": 0, "held_out": 0.0, "learning_rate": 1e-3}
    options |= {"save_every": 1, "keep": 20, "max_skipped": 2}
    summary = train(plain(tmp_path / "out", **options))
    with (tmp_path / "out" / "metrics.csv").open() as file:
        skipped = [int(row["step"]) for row in csv.DictReader(file) if float(row["skipped"])]
    assert len(skipped) == 2 and skipped[0] <= 5 < skipped[1]  # once an epoch
    assert [step + 1 for step, loss in enumerate(summary["last_losses"]) if loss is None] == skipped
    said = capsys.readouterr().out
    assert all(f"warning: step {step} is skipped, 1 in a row: its loss is nan" in said for step in skipped)
    incidents = [(one["kind"], one["step"]) for one in read_incidents(tmp_path / "out")]
    assert incidents == [("warning", None), *(("skipped", step) for step in skipped)]  # the first: a high learning rate
    # No checkpoint of a skipped step, except of the last.
    saved = sorted(int(path.name) for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert saved == [step for step in range(1, 11) if step not in skipped or step == 10]
    assert not (tmp_path / "out" / "skipped").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("weights_may_be_nan")
def test_a_state_saved_amid_skipped_steps_keeps_its_score(tmp_path):
    """Skipped steps leave the weights as they were evaluated, and what is saved then has that score."""
    small = dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=1)
    model = dream_jax.Dream(small, rngs=nnx.Rngs(0))
    model.embed.embedding[...] = model.embed.embedding[...].at[ord("Q")].set(np.nan)
    dream_jax.save(model, tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, letters in (("train", "Q" * 8), ("test", "abcdefgh")):
        rows = [json.dumps({"input": one, "output": "yes"}) for one in letters]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(rows))
    options = {"data": str(tmp_path / "data"), "model": str(tmp_path / "model"), "tokenizer": "bytes", "samples": 0}
    options |= {"mesh": "1x1", "batch_size": 2, "eval_every": 2, "save_every": 100, "max_skipped": 9, "steps": 5}
    options |= {"max_length": 32}

    class Stop:
        asked = 0

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def requested(self):
            self.asked += 1
            return self.asked == 3

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "StopSignal", Stop)
        with pytest.raises(Stopped):
            train(plain(tmp_path / "out", **options))
    with (tmp_path / "out" / "eval.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["step"] == "2" and math.isfinite(float(row["nll"]))
    chosen = plain(tmp_path / "out", **options)
    measure = Grid(held_out_rows(chosen, 32), 2, sharding.make_mesh("1x1")).digest
    assert row["grid"] == measure[:12]
    with RunCheckpoints(tmp_path / "out" / "checkpoints", keep=5, measure=measure) as checkpoints:
        assert checkpoints.latest_step() == 3 and checkpoints.score(3) == float(row["nll"])


@pytest.mark.slow
def test_the_best_state_is_kept_and_can_be_handed_over(tmp_path):
    """A learning rate that wrecks what it has learned: the best evaluation is not the last."""
    options = {"steps": 12, "eval_every": 2, "save_every": 100, "keep": 1, "warmup_share": 0.9, "learning_rate": 0.5}
    summary = train(plain(tmp_path / "out", final="best", **options))
    with (tmp_path / "out" / "eval.csv").open() as file:
        scores = {int(row["step"]): float(row["nll"]) for row in csv.DictReader(file)}
    assert [*scores] == [2, 4, 6, 8, 10, 12]
    best = min(scores, key=scores.get)
    assert best < 12
    assert summary["best"] == {"step": best, "nll": scores[best]} and summary["step"] == best
    assert sorted(int(path.name) for path in (tmp_path / "out" / "checkpoints").iterdir()) == [best, 12]
    # The model that was written is the best one.
    np.testing.assert_allclose(summary["eval"]["nll"], scores[best], rtol=1e-6)
    model = dream_jax.load(tmp_path / "out" / "model")
    chosen = plain(tmp_path / "out", **options)
    score = Grid(held_out_rows(chosen, 40), 8, sharding.make_mesh("1x1")).score(model)
    np.testing.assert_allclose(score.nll, scores[best], rtol=1e-5)


@pytest.mark.slow
def test_rows_that_fit_alone_are_answered_though_they_would_not_fit_together(tmp_path):
    """A long prompt with a short answer, and the reverse: no batch is wider than the model."""
    (tmp_path / "tokenizer").mkdir()
    ByteTokenizer().save(tmp_path / "tokenizer")
    small = dataclasses.replace(dream_jax.PRESETS["nano"], num_hidden_layers=1, max_position_embeddings=64)
    model = dream_jax.Dream(small, rngs=nnx.Rngs(0))
    dream_jax.save(model, tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer")
    rows = [{"input": f"{n}" + "x" * 55, "output": "yes"} for n in range(2)]
    rows += [{"input": f"{n}", "output": "y" * 40} for n in range(2)]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data": str(tmp_path / "data"), "model": str(tmp_path / "model"), "mesh": "1x1"}
    options |= {"batch_size": 4, "steps": 1}
    found = train(plain(tmp_path / "out", **options))["eval"]
    assert (found["rows"], found["too_long"]) == (4, 0)
    found = train(plain(tmp_path / "short", **options | {"eval_tokens": 30}))["eval"]
    assert (found["rows"], found["too_long"]) == (2, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "accumulation"), [("4x2", 1), ("8x1", 2), ("2x4", 4)])
def test_first_losses_of_nano_are_those_of_any_mesh(nano_losses, tmp_path, mesh, accumulation):
    out = tmp_path / "out"
    summary = train(plain(out, **NANO | {"mesh": mesh, "accumulation": accumulation}))
    found = np.array([loss for _, loss in losses(out)])
    assert len(found) == 20
    # Divided over the eight devices: each holds far less than a whole copy of parameters and moments.
    sizes = summary["bytes_per_device"].values()
    assert len(sizes) == 8 and max(sizes) < 3 * 4 * summary["parameters"] / 6
    np.testing.assert_allclose(found, nano_losses, rtol=1e-5)


@pytest.mark.slow
def test_a_run_goes_on_under_the_other_form_of_the_layers(nano_losses, tmp_path):
    """Layers that are apart in a step have the same losses, and the checkpoints know nothing of it."""
    out = tmp_path / "out"
    train(plain(out, **NANO | {"layers": "apart", "save_every": 10}))
    np.testing.assert_allclose([loss for _, loss in losses(out)], nano_losses, rtol=1e-5)
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoints" / "20")
    train(plain(out, **NANO | {"layers": "stacked", "save_every": 10}))
    np.testing.assert_allclose([loss for _, loss in losses(out)], nano_losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "both"}, "layers='both' is not one of"),
        ({"mesh": "8"}, "not of the form FSDPxTENSOR"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"eval_every": 0}, "eval_every=0 must be at least 1"),
        ({"max_skipped": 0}, "max_skipped=0 must be at least 1"),
        ({"weight": "cart", "cart_p": 1.5}, "outside"),
        ({"weight": "linear", "cart_p": 0.3}, "--cart-p 0.3 is for --weight cart, but the weight is linear"),
        ({"block_diffusion": "4", "cart_p": 0.3}, "for --weight cart, but the weight is inverse-time"),
        ({"learning_rate": -1.0}, "must be a positive number"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"num_processes": 2}, "need --coordinator"),
        ({"process_id": 3}, "process_id=3 need --coordinator"),
        ({"out": pathlib.Path("gs://bucket/run")}, "is an address"),
        ({"eval_tokens": -1}, "eval_tokens=-1"),
        ({"attention": "flash"}, "attention='flash' is not one of"),
        ({"length_policy": "left"}, "length_policy='left' is not one of"),
        ({"eos_tail": -1}, "eos_tail=-1"),
        ({"samples": -1}, "samples=-1"),
        ({"log_to": ("mlflow",)}, "known are tensorboard, wandb, trackio"),
        ({"price_per_chip_hour": -1.0}, "must not be negative"),
        ({"rmb_per_usd": 0.0}, "must be a positive number"),
        ({"mix": ("gsm8k",), "mix_weights": (1.0,)}, "one for each of mix"),
    ],
)
def test_settings_that_cannot_be(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        plain(**{"out": tmp_path / "x"} | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "dream-7b"}, "dream-7b has no tokenizer files; pass --tokenizer"),
        ({"data": "s1ks"}, "neither a known name"),
        ({"mesh": "8x1", "batch_size": 12}, "does not divide"),
        ({"max_length": 20}, "max_length"),
        ({"model": "no/such/place/here"}, "no/such/place/here"),
    ],
)
def test_refusals_leave_no_folder_and_read_no_weights(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: pytest.fail("weights were read before the refusal"))
    with pytest.raises((ValueError, OSError), match=message):
        train(plain(tmp_path / "x", **change))
    assert not (tmp_path / "x").exists()


def test_data_in_the_folder_to_overwrite_is_refused(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "more.jsonl").write_text("")
    with pytest.raises(ValueError, match="contains .*more.jsonl, which is read"):
        check_folder(settings(out, overwrite=True, mix=(str(out / "more.jsonl"),)))


def test_weights_that_cannot_be_read_cost_no_earlier_run(finished, tmp_path):
    """--overwrite throws the old run away only when the new one can begin."""
    out, weights = tmp_path / "out", tmp_path / "weights"
    shutil.copytree(finished[0], out)
    shutil.copytree(finished[0] / "model", weights)
    largest = max((weights / "weights").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(ValueError, match="convert the source again"):
        train(settings(out, overwrite=True, model=str(weights)))
    assert (out / "summary.json").read_bytes() == (finished[0] / "summary.json").read_bytes()
    assert losses(out) == losses(finished[0])


def test_home_is_one_folder():
    assert plain(pathlib.Path("~/run")).run.out == pathlib.Path.home() / "run"


def test_unwise_settings_are_named():
    assert any("1/t^2" in line for line in TrainSettings.flat(weight="inverse-time").warnings())
    assert any(
        "published recipe" in line for line in TrainSettings.flat(model="weights", learning_rate=1e-3).warnings()
    )
    assert TrainSettings().warnings() == []


def test_losses_fall_in_a_few_steps(finished):
    values = [loss for _, loss in losses(finished[0])]
    assert values[-1] < 0.8 * values[0]
    assert all(np.isfinite(values))
    assert jax.device_count() == 8


def test_rows_are_tokenised_once_for_a_run(tmp_path, monkeypatch):
    """Measuring, batches, the held-out likelihood, answers and samples share one tokenisation of each row."""

    asked = collections.Counter()

    class Counting(ByteTokenizer):
        def encode(self, text, *options):
            asked[text] += 1
            return super().encode(text, *options)

    for split, number in (("train", 12), ("test", 6)):
        lines = [json.dumps({"input": f"{split} {n}", "output": f"a {split} {n}"}) for n in range(number)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(prepared, "open_tokenizer", lambda *_: Counting())
    options = {"data": str(tmp_path), "mesh": "1x1", "eval_rows": 5, "samples": 3, "batch_size": 4}
    run = prepared.prepare(plain(tmp_path / "out", **options), sharding.make_mesh("1x1"))
    with run.batches as batches:
        for _ in range(7):
            next(batches)
    for _ in range(2):
        assert len(run.held_out.first(5, run.max_length)) == 5
        assert len(run.held_out.first(3, run.max_length)) == 3
    assert len(asked) == 2 * (12 + 5) and set(asked.values()) == {1}
