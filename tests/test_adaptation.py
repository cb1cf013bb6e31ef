"""The adaptation of autoregressive weights to diffusion: every arm trains, measures are exact, runs resume."""

import concurrent.futures
import dataclasses
import importlib
import json
import math
import shutil
import time

import jax
import numpy as np
import pytest
from commands import ROOT, run_script
from llama_checkpoints import write_llama
from test_llama import with_tokenizer

import dream_jax
from dream_jax import masks
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.data.rows import Row
from dream_jax.model import abstract_model
from dream_jax.pretrained import adapt_llama
from dream_jax.tokenizer import load_tokenizer
from dream_jax.trainer.recipes import read_recipe
from mask_study import adaptation, adapting
from mask_study.adapting import ADAPTATION_ARMS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adaptation")
    adapt_llama(with_tokenizer(write_llama(folder / "llama", num_hidden_layers=1)), folder / "dream")
    return folder / "dream"


@pytest.fixture(scope="module")
def start(checkpoint):
    return dream_jax.load(checkpoint, layers="stacked")


ROWS = np.random.default_rng(3).integers(3, 99, (4, 12), dtype=np.int32)


def test_nats_are_those_of_the_logits(start):
    arm = ADAPTATION_ARMS["bidirectional"]
    model = adapting.start_of(arm, start, 0)
    found = adapting.nats_at(model, arm, ROWS, 0.5, 1)
    masked = (np.random.default_rng(1).random(ROWS.shape) < 0.5) & (np.arange(12) > 0)
    logits = model(np.where(masked, model.config.mask_token_id, ROWS))
    logp = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    each = -np.take_along_axis(logp[:, :-1], ROWS[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.nats_R, (each * masked[:, 1:]).sum(axis=1), rtol=1e-5)
    assert found.masked_R.tolist() == masked.sum(axis=1).tolist()
    unshifted = ADAPTATION_ARMS["unshifted"]
    found = adapting.nats_at(adapting.start_of(unshifted, start, 0), unshifted, ROWS, 0.5, 1)
    each = -np.take_along_axis(logp, ROWS[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.nats_R, (each * masked).sum(axis=1), rtol=1e-5)


def test_autoregressive_nats_are_those_of_the_causal_mask(start):
    found = adapting.autoregressive_nats(start, ROWS)
    logp = np.asarray(jax.nn.log_softmax(start(ROWS, attention_mask=masks.Causal()), axis=-1))
    each = -np.take_along_axis(logp[:, :-1], ROWS[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.nats_R, each.sum(axis=1), rtol=1e-5)
    assert found.masked_R.tolist() == [11] * 4


def test_arms_have_equal_flops_and_their_own_start(start):
    small = abstract_model(PRESETS["smollm2-135m"])
    steps = {name: adapting.steps_of(arm, small, 96, 8, 60) for name, arm in ADAPTATION_ARMS.items()}
    assert steps["bidirectional"] == steps["annealed"] == steps["unshifted"] == steps["random weights"] == 60
    assert 20 < steps["two streams, blocks of 16"] < 60 and 30 < steps["autoregressive"] <= 60
    random = adapting.start_of(ADAPTATION_ARMS["random weights"], start, 0)
    table = np.asarray(random.embed.embedding[...])
    assert np.abs(table - np.asarray(start.embed.embedding[...])).max() > 0.01
    assert adapting.start_of(ADAPTATION_ARMS["causal"], start, 0).trained_mask == "causal"
    assert (
        adapting.start_of(ADAPTATION_ARMS["two streams, growing blocks"], start, 0).trained_mask == "block-diffusion:16"
    )
    assert start.trained_mask == "bidirectional"


@pytest.mark.slow  # each arm compiles several programs
@pytest.mark.parametrize("name", ["autoregressive", "annealed", "two streams, growing blocks"])
def test_every_arm_learns(name, start):
    arm = ADAPTATION_ARMS[name]
    model = adapting.start_of(arm, start, 0)
    seen = []

    def measure(step, trained):
        seen.append((step, adapting.levels_of(trained, arm, ROWS)))

    rows = np.tile(ROWS[:1], (8, 1))  # one text, which every arm can learn
    trained = adapting.adapt(model, arm, rows, rate=3e-2, steps=10, batch=8, seed=0, measure=measure, every=5)
    assert [step for step, _ in seen] == [5, 10] and trained.seconds > 0
    assert set(seen[0][1]) == ({"exact"} if arm.autoregressive else {"0.1", "0.3", "0.5", "0.7", "0.9"})
    assert np.mean(trained.nats[-3:]) < 0.8 * trained.nats[0], trained.nats
    assert trained.model.trained_mask == arm.trained_mask
    # The weights of the start are not changed.
    assert np.isfinite(np.asarray(start.embed.embedding[...])).all()


def test_a_loss_that_is_not_finite_ends_the_run(start):
    arm = ADAPTATION_ARMS["autoregressive"]
    model = adapting.start_of(arm, start, 0)
    model.norm.scale[...] = model.norm.scale[...] * np.inf
    with pytest.raises(
        FloatingPointError, match="autoregressive, rate 0.001, seed 0: the loss of step 0 is not finite"
    ):
        adapting.adapt(model, arm, ROWS, rate=1e-3, steps=1, batch=4, seed=0)


def test_runs_come_in_the_order_of_importance():
    settings = adaptation.AdaptationSettings(arms=("bidirectional", "random weights"), rates=(1e-3, 1e-4), seeds=2)
    found = [(run.arm, run.rate, run.seed) for run in adaptation.adaptation_runs(settings)]
    assert found == [
        ("start", 0.0, 0),
        ("bidirectional", 1e-3, 0),
        ("random weights", 1e-3, 0),
        ("bidirectional", 1e-3, 1),
        ("bidirectional", 1e-4, 0),
        ("random weights", 1e-4, 0),
    ]
    names = [run.file for run in adaptation.adaptation_runs(adaptation.AdaptationSettings())]
    assert len(set(names)) == len(names) and names[0] == "start.json"


def test_summary_has_intervals_and_differences():
    def record(arm, seed, nats):
        return {"arm": arm, "rate": 3e-4, "seed": seed, "steps": 7, "settings": {"test_rows": 4},
                "training_nats": [nats], "bound": {"nats": nats},
                "curve": [{"step": 7, "nats": {"0.1": nats}}]}  # fmt: skip

    records = [{"arm": "start", "rate": 0.0, "seed": 0}]
    records += [record("bidirectional", seed, 3.0 + seed) for seed in range(2)]
    records += [record("unshifted", seed, 4.0 + seed) for seed in range(2)]
    rows = {(row["arm"], row["measure"], row["minus"]): row for row in adaptation.summary(records)}
    assert rows["unshifted", "bound", ""]["mean"] == 4.5 and rows["unshifted", "bound", ""]["steps"] == 7
    apart = rows["unshifted", "nats at t = 0.1", "bidirectional"]
    assert apart["mean"] == apart["low"] == apart["high"] == 1.0 and apart["seeds"] == 2


def test_maps_of_heads_are_drawn(tmp_path):
    heads = {"attention": {"heads": {"first": [[0.5, 0.1], [0.0, 1.0]]}}}
    records = [{"arm": "start", "attention": {"masked, causal": heads["attention"]}}]
    records += [{"arm": "bidirectional", "rate": 3e-4, "seed": 0, **heads}, {"arm": "causal", "rate": 3e-4, "seed": 1}]
    path = adaptation.draw_heads(records, tmp_path / "heads.png")
    assert path.read_bytes().startswith(b"\x89PNG") and [one.name for one in tmp_path.iterdir()] == ["heads.png"]
    with pytest.raises(ValueError, match="no run has the attention of its heads"):
        adaptation.draw_heads(records[2:], tmp_path / "none.png")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arms": ("two",)}, "arm 'two' is not one of: bidirectional; annealed"),
        ({"rates": ()}, "must be one or more different numbers"),
        ({"rates": (1e-3, 1e-3)}, "must be one or more different numbers"),
        ({"samples": 11}, "must be even"),
        ({"width": 3}, "width=3"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        adaptation.AdaptationSettings(**options)


@pytest.fixture
def texts(tmp_path):
    lines = [{"prompt": f"what is {n} and {n + 1}", "response": f"it is {2 * n + 1}, the sum"} for n in range(400)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "texts.jsonl"


def test_texts_begin_with_the_token_of_a_text(checkpoint, texts):
    words = load_tokenizer(checkpoint)
    settings = adaptation.AdaptationSettings(data=str(texts), width=20, batch=4, test_rows=2, prompts=1)
    found = adaptation.read_texts(settings, words)
    assert found.test_RT.shape == (2, 20) and (found.train_RT[:, 0] == words.bos_id).all()
    assert words.decode(found.train_RT[0, 1:]).startswith("what is ")
    assert found.questions[0].startswith("what is ") and found.questions[0].endswith("\n")
    with pytest.raises(ValueError, match="training texts of at least 199 tokens, but 4 are needed"):
        adaptation.read_texts(dataclasses.replace(settings, width=200), words)


def test_no_message_of_a_chat_is_lost():
    chat = tuple({"role": role, "content": role * 2} for role in ("system", "user", "assistant", "user"))
    assert adapting.text_of(Row(prompt=chat, response="yes")) == (
        "systemsystem\nuseruser\nassistantassistant\nuseruser\n",
        "yes",
    )
    assert adapting.text_of(Row(prompt="", response="a text", document=True)) == ("", "a text")
    assert adapting.text_of(Row(prompt=(), response="a text", document=True)) == ("", "a text")


def test_a_run_that_diverges_does_not_stop_the_others(checkpoint, texts, tmp_path, monkeypatch):
    def make(run, *_):
        if run.rate > 1:
            raise FloatingPointError(f"{run.arm}, rate {run.rate:g}: the loss of step 3 is not finite")
        curve = [{"step": 4, "nats": {"0.1": 1.0}}]
        return {"steps": 4, "training_nats": [1.0], "curve": curve, "bound": {"nats": 1.0}}

    start = {"autoregressive": {"nats": 1.0, "accuracy": 0.5}, "nats": {}}
    monkeypatch.setattr(adaptation, "measure_start", lambda *_: start)
    monkeypatch.setattr(adaptation, "make", make)
    settings = adaptation.AdaptationSettings(
        model=str(checkpoint), data=str(texts), width=20, batch=4, test_rows=2, arms=("causal",), rates=(9.0, 1e-3),
        seeds=1, out=tmp_path / "out",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"1 runs have no result \(causal, rate 9: the loss .*give lower --rates"):
        adaptation.main(settings)
    made = sorted(path.name for path in (tmp_path / "out" / "runs").glob("*.json"))
    assert made == ["causal-rate-0-001-seed-0.json", "start.json"]


def test_processes_that_share_a_folder_convert_the_weights_once(checkpoint, tmp_path, monkeypatch):
    made = []

    def convert(_, target):
        made.append(target)
        time.sleep(0.2)  # long enough that the other process would begin too
        shutil.copytree(checkpoint, target)

    monkeypatch.setattr(adaptation, "adapt_autoregressive", convert)
    settings = adaptation.AdaptationSettings(out=tmp_path)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(adaptation.start_model, [settings] * 2))
    assert len(found) == 2 and made == [tmp_path / "smollm2"]


def test_a_recipe_takes_the_converted_weights(checkpoint, tmp_path, monkeypatch):
    """The name smollm2 stands for a directory, to which the weights of the package are converted once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    train = importlib.import_module("train")
    made = []

    def convert(source, target):
        made.append((source, str(target)))
        shutil.copytree(checkpoint, target)
        return DreamConfig.from_file(target)

    monkeypatch.setattr(train, "adapt_autoregressive", convert)
    settings = read_recipe("smol-to-dream", ROOT / "recipes").train_settings()
    for _ in range(2):
        assert train.with_weights(settings).network.model == "weights/smollm2-as-dream"
    assert made == [("smollm2", "weights/smollm2-as-dream")]
    assert train.with_weights(settings.replaced(model="nano")).network.model == "nano"


@pytest.mark.slow
def test_the_recipe_is_one_command(checkpoint, texts, tmp_path, monkeypatch):
    """Samples are taken before and after; the weights are a tiny model here."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "weights" / "smollm2-as-dream")
    command = ("train.py", "--recipe", "smol-to-dream", "--data", texts, "--steps", "2", "--max-length", "64")
    ended = run_script(*command, "--eval-rows", "4", "--samples", "1", "--sample-tokens", "4")
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "runs" / "smol-to-dream" / "samples.json").read_text())
    assert len(found["before"]) == len(found["after"]) == 1
    assert (tmp_path / "runs" / "smol-to-dream" / "model" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_quick_study_resumes(checkpoint, texts, tmp_path):
    command = ("mask_study/adaptation.py", "--quick", "--out", tmp_path / "out", "--model", checkpoint, "--data", texts)
    command += ("--width", "24", "--batch", "2", "--arms", "two streams, blocks of 16", "unshifted", "autoregressive")
    first = run_script(*command)
    assert first.returncode == 0, first.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out" / "runs").glob("*.json")}
    every = {name for name, arm in adaptation.ADAPTATION_ARMS.items() if not arm.annealed}
    assert len(found) == 4 and set(found["start"]["nats"]) == {*every, "causal, unshifted"}  # for later commands too
    run = found["two-streams--blocks-of-16-rate-0-0003-seed-0"]
    assert run["steps"] <= 4 == found["unshifted-rate-0-0003-seed-0"]["steps"]
    assert 0 < run["bound"]["nats"] < 3 * math.log(128) and run["bound"]["error"] > 0
    assert len(run["answers"]) == 1 and len(run["attention"]["heads"]["first"][0]) == 4
    assert len(run["bound"]["of_texts"]) == 8 and run["curve"][-1]["step"] == run["steps"]
    exact = found["autoregressive-rate-0-0003-seed-0"]
    assert exact["bound"]["error"] == 0 and exact["bound"]["nats"] == pytest.approx(
        exact["curve"][-1]["nats"]["exact"], abs=1e-4
    )
    assert (tmp_path / "out" / adaptation.HEADS).read_bytes().startswith(b"\x89PNG")
    again = run_script(*command)
    assert again.returncode == 0 and "made " not in again.stdout and "unshifted" in again.stdout
    other = run_script(*command, "--samples", "12")
    assert other.returncode == 1 and "give another --out" in other.stderr
    (tmp_path / "out" / "runs" / "start.json").write_text("{}")
    damaged = run_script(*command)
    assert damaged.returncode == 1 and "start.json is not the file of a finished run" in damaged.stderr
    (tmp_path / "out" / "runs" / "start.json").write_text(json.dumps(found["start"] | {"nats": [1.5]}))
    damaged = run_script(*command)
    assert damaged.returncode == 1 and "start.json: nats: Expected `object`, got `array`" in damaged.stderr
