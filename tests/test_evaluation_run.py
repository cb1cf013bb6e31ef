"""`evaluate.py` as a user meets it, on a nano model with random weights."""

import json
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import dream_jax
from dream_jax import lora, pretrained
from dream_jax.evaluation import EvaluateSettings, evaluate, ledger
from dream_jax.evaluation.ledger import Ledger, WorkUnit
from dream_jax.evaluation.likelihood import model_nll
from dream_jax.evaluation.progress import watch
from dream_jax.model import merge_params, split_params
from dream_jax.pretrained import directories, save_adapter
from dream_jax.tokenizer import ByteTokenizer
from dream_jax.trainer.console import clock

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model():
    return dream_jax.Dream(dream_jax.PRESETS["nano"], rngs=nnx.Rngs(3))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]


def quiet(**options):
    with open(os.devnull, "w") as nowhere:
        return evaluate(EvaluateSettings(**{"model": "nano"} | options), Console(file=nowhere))


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "evaluate.py", "--model", "nano", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_run_that_is_killed_resumes_to_the_same_file(tmp_path):
    """200 problems under five seeds, and kill -9 in the middle."""
    arguments = ("--seeds", 5, "--temperature", 1, "--max-new-tokens", 4, "--steps", 2, "--batch-size", 25)
    whole = start(*arguments, "--out", tmp_path / "whole")
    stdout, stderr = whole.communicate(timeout=500)
    assert whole.returncode == 0, stderr
    assert "1000/1000 rows  accuracy 0.000  ETA 0:00" in stdout
    assert "| accuracy | 0 (95 %: 0 to 0.01885) |" in stdout  # Wilson's, of 200 problems
    assert "| agreement between seeds | 1 |" in stdout
    assert "| same text under all seeds | 0 |" in stdout

    killed = start(*arguments, "--out", tmp_path / "killed")
    items, seconds = (tmp_path / "killed" / f"{name}.jsonl" for name in ("items", "seconds"))
    # A batch is whole when its time is written.
    while killed.poll() is None and not (seconds.exists() and seconds.stat().st_size):
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "it was done before it could be killed"
    assert 0 < len(items.read_bytes().splitlines()) < 1000

    again = start(*arguments, "--out", tmp_path / "killed")
    stdout, stderr = again.communicate(timeout=500)
    assert again.returncode == 0, stderr
    assert "rows are there already" in stdout
    assert items.read_bytes() == (tmp_path / "whole" / "items.jsonl").read_bytes()
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "killed")]
    clocks = {"seconds", "useful_tokens_per_second", "useful_tokens_per_second_with_compilation"}
    for name in summaries[0].keys() - clocks:
        assert summaries[0][name] == summaries[1][name]


@pytest.mark.slow
def test_the_batch_an_answer_is_in_changes_nothing(tmp_path):
    """Prompts of two buckets of lengths, temperature and all: the same answers one by one and 32 at once."""
    rows = [{"question": "x" * length, "contains": "y"} for length in (3, 14, 5, 13, 1)]
    path = tmp_path / "probe.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"task": "chat", "file": path, "max_new_tokens": 5, "temperature": 0.5}
    quiet(**options, batch_size=1, out=tmp_path / "one")
    quiet(**options, batch_size=32, out=tmp_path / "many")
    one, many = ({row["number"]: row for row in rows_of(tmp_path / name)} for name in ("one", "many"))
    assert one.keys() == many.keys() == {1, 2, 3, 4, 5}
    for number in one:
        for field in ("answer", "correct", "tokens_to_end"):
            assert one[number][field] == many[number][field]
    assert len({row["answer"] for row in one.values()}) > 1


@pytest.mark.slow
def test_another_mask_than_the_trained_one(tmp_path):
    """Asked for, it is that of answers and likelihoods; a run under one mask does not resume under another."""
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "a few words more"}) + "\n")
    given = {"task": "likelihood", "file": path, "samples": 10}
    nats = {}
    for mask in (None, "bidirectional", "causal"):
        quiet(**given, mask=mask, out=tmp_path / str(mask))
        nats[mask] = rows_of(tmp_path / str(mask))[0]["nats"]
    assert nats[None] == nats["bidirectional"] != nats["causal"]
    with pytest.raises(ValueError, match="mask was .causal., now None"):
        quiet(**given, out=tmp_path / "causal")
    path.write_text(json.dumps({"question": "xyz", "contains": "y"}) + "\n")
    given = {"task": "chat", "file": path, "max_new_tokens": 6, "steps": 1}
    quiet(**given, out=tmp_path / "own")
    quiet(**given, mask="causal", out=tmp_path / "other")
    assert rows_of(tmp_path / "own")[0]["answer"] != rows_of(tmp_path / "other")[0]["answer"]
    with pytest.raises(ValueError, match="sideways"):
        EvaluateSettings(mask="sideways")


def test_results_of_other_weights_do_not_resume(model, tmp_path):
    """Trained anew into the same directory: what is there speaks of the weights before."""
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "some words"}) + "\n")
    given = {"task": "likelihood", "file": path, "samples": 10, "model": str(tmp_path / "m"), "tokenizer": "bytes"}
    dream_jax.save(model, tmp_path / "m")
    quiet(**given, out=tmp_path / "out")
    before = (tmp_path / "out" / "items.jsonl").read_text()
    # The same weights, copied.
    (tmp_path / "m").rename(tmp_path / "kept")
    shutil.copytree(tmp_path / "kept", tmp_path / "m")
    quiet(**given, out=tmp_path / "out")
    shutil.rmtree(tmp_path / "m")
    dream_jax.save(dream_jax.Dream(dream_jax.PRESETS["nano"], rngs=nnx.Rngs(4)), tmp_path / "m")
    with pytest.raises(ValueError, match="weights was"):
        quiet(**given, out=tmp_path / "out")
    assert (tmp_path / "out" / "items.jsonl").read_text() == before
    # A run from before a setting was known resumes.
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings.pop("mask") is None
    (tmp_path / "out" / "settings.json").write_text(json.dumps(settings))
    shutil.rmtree(tmp_path / "m")
    shutil.copytree(tmp_path / "kept", tmp_path / "m")
    quiet(**given, out=tmp_path / "out")
    # A mask that likelihoods cannot have is refused before anything is made.
    with pytest.raises(ValueError, match="the mask 'prefix' needs to know where the prompt"):
        quiet(**given, mask="prefix", out=tmp_path / "prefix")
    assert not (tmp_path / "prefix").exists()


@pytest.mark.parametrize("layout", ["converted", "published"])
def test_a_fingerprint_is_of_the_model_alone(model, tmp_path, monkeypatch, layout):
    """Of large files by pieces: one kind of matrix changed is seen wherever it lies; what is added beside it is not."""
    monkeypatch.setattr(directories, "_PIECE", 1 << 10)
    monkeypatch.setattr(directories, "_SAMPLES", 128)  # 0.13 of 3.4 MB
    graphdef, params = split_params(model)
    other = jax.tree.map(lambda leaf: leaf, params)
    other["layers"]["mlp"]["down"]["kernel"] = other["layers"]["mlp"]["down"]["kernel"] * 1.5
    write = dream_jax.save if layout == "converted" else dream_jax.export_hf
    found = []
    for name, tree in (("a", params), ("b", other)):
        write(merge_params(graphdef, tree), tmp_path / name)
        found.append(pretrained.fingerprint(tmp_path / name))
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    assert found[0] == pretrained.fingerprint(tmp_path / "moved") != found[1]
    (tmp_path / "a" / "eval").mkdir()
    (tmp_path / "a" / "eval" / "items.jsonl").write_text("{}\n")
    (tmp_path / "a" / "README.md").write_text("words")
    (tmp_path / "a" / "summary.json").write_text("{}")
    assert pretrained.fingerprint(tmp_path / "a") == found[0]
    assert pretrained.fingerprint("nano") == "nano"
    with pytest.raises(FileNotFoundError):
        pretrained.fingerprint(tmp_path / "none")


def by_hand(model, tokens, masked):
    """Cross entropy of the masked tokens from the public logits, with the right shift."""
    noisy = np.where(masked, model.config.mask_token_id, tokens)
    logits = np.asarray(model(noisy[None])[0], np.float64)
    shifted = logits[np.maximum(np.arange(len(tokens)) - 1, 0)]
    nats = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(tokens)), tokens]
    return nats[masked].sum()


def test_the_models_cross_entropy_is_that_of_its_logits(model):
    generator = np.random.default_rng(0)
    rows = []
    for length in (5, 13, 13, 5):
        masked = generator.random(length) < 0.5
        masked[:2] = False, True
        rows.append((generator.integers(0, 256, length).astype(np.int32), masked))
    expected = [by_hand(model, tokens, masked) for tokens, masked in rows]
    np.testing.assert_allclose(model_nll(model, ByteTokenizer(), 3)(rows), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="the model takes"):
        model_nll(model, ByteTokenizer(), 1)([(np.zeros(5000, np.int32), np.ones(5000, bool))])


@pytest.mark.slow
def test_choices_and_likelihoods(tmp_path):
    choices, texts = tmp_path / "choices.jsonl", tmp_path / "texts.jsonl"
    choices.write_text(json.dumps({"question": "2 + 2?", "choices": ["3", "four"], "answer": 1}) + "\n")
    rows = [{"text": "abcd"}, {"text": "ef", "before": "x", "after": "y"}]
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"samples": 32, "batch_size": 16, "seeds": 2}
    chosen = quiet(task="choice", file=choices, out=tmp_path / "c", **options)
    for row in rows_of(tmp_path / "c"):
        assert row["chosen"] == int(np.argmin(row["nats"])) and row["correct"] == (row["chosen"] == 1)
        # Text of random weights: about ln 261 nats a byte, so that the shorter choice is the likelier.
        assert row["nats"] == pytest.approx([2 * np.log(261), 5 * np.log(261)], rel=0.1)
        assert row["correct_by_byte"] == (row["nats"][1] / 4 < row["nats"][0])
    assert chosen.numbers["accuracy"].value == 0 and chosen.numbers["accuracy_by_byte"].value == 1

    found = quiet(task="likelihood", file=texts, out=tmp_path / "l", **options).numbers
    assert (found["texts"], found["tokens"], found["bytes"], found["seeds"]) == (2, 6, 6, 2)
    bits = found["bits_per_byte"]
    assert bits.low < bits.value < bits.high
    assert bits.value == pytest.approx(found["nats_per_token"].value / np.log(2))
    seeds = {seed: [row["nats"] for row in rows_of(tmp_path / "l") if row["seed"] == seed] for seed in (0, 1)}
    assert seeds[0] != seeds[1]
    # On a mesh the same numbers.
    mesh = quiet(task="likelihood", file=texts, out=tmp_path / "m", mesh="4x2", **options).numbers
    assert mesh["bits_per_byte"].value == pytest.approx(bits.value, rel=1e-5)


@pytest.mark.slow
def test_sampling_on_a_mesh(tmp_path):
    options = {"limit": 8, "max_new_tokens": 4, "batch_size": 8}
    one, many = quiet(out=tmp_path / "one", **options), quiet(out=tmp_path / "many", mesh="4x2", **options)
    assert one.numbers["accuracy"] == many.numbers["accuracy"] and many.numbers["problems"] == 8
    with pytest.raises(ValueError, match="multiple of 8, the number of devices"):
        quiet(out=tmp_path / "odd", mesh="8x1", batch_size=12)


def test_a_finished_run_loads_no_weights(tmp_path, monkeypatch):
    options = {"limit": 2, "max_new_tokens": 2, "out": tmp_path / "run"}
    first = quiet(**options)
    monkeypatch.setattr("dream_jax.pretrained.load", lambda *_, **__: pytest.fail("weights were read"))
    assert quiet(**options).numbers == first.numbers
    with pytest.raises(ValueError, match="holds a run with other settings"):
        quiet(**options | {"max_new_tokens": 3})
    for wrong in ({"shots": 3, "task": "chat"}, {"task": "gsm8k"}):
        path = tmp_path / "bad.jsonl"
        path.write_text('{"question": "x", "contains": "y"}\n{"question": 3}\n')
        with pytest.raises(ValueError, match=r"bad\.jsonl:[12]|no field"):
            quiet(out=tmp_path / "other", file=path, **wrong)
    assert not (tmp_path / "other").exists()


def test_more_answers_than_can_be_planned(tmp_path):
    with pytest.raises(ValueError, match="seeds=65536 for each of 65 prompts makes 4,259,840 answers"):
        evaluate(EvaluateSettings(model="nano", seeds=65536, limit=65, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_overwrite_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    recipe, plan = {"task": "sudoku", "model": "nano"}, [WorkUnit(seed=0, problems=(0,), names=((0, 1),))]
    Ledger(tmp_path, recipe, plan).append([{"seed": 0, "number": 1}], {"rows": 1})
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ledger, "write_json", interrupted)
        Ledger(tmp_path, recipe | {"task": "chat"}, plan, overwrite=True)
    assert (tmp_path / "settings.json").is_file() and not Ledger(tmp_path, recipe, plan).rows


def test_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    quiet(limit=2, max_new_tokens=2, out=tmp_path / "run", figure=True)
    assert (tmp_path / "run" / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_progress_says_when_it_will_be_done(capsys):
    with watch(Console(force_terminal=False), total=4, done=1) as advance:
        advance(1, [{"correct": True}, {"correct": False}])  # too soon for a line
        advance(2, [{"correct": True}, {"correct": False}])
    assert capsys.readouterr().out == "4/4 rows  accuracy 0.500  ETA 0:00\n"
    with watch(Console(force_terminal=True), total=2, done=0) as advance:
        advance(2, [{"nats": 1.0}])
    assert "2/2" in capsys.readouterr().out
    assert [clock(value) for value in (4.6, 750, 3723)] == ["0:05", "12:30", "1:02:03"]


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"input": "86,28,13,31,96", "output": "86+28=114,31-13=18,114-18=96"}\n{"input": "86,28')
    command = ["--model", "nano", "--task", "countdown", "--file", path, "--shots", 0, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, command)])
    assert runpy.run_path(str(ROOT / "evaluate.py"), run_name="evaluate")["main"]() == 1
    assert "rows.jsonl:2: not JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_is_evaluated_as_the_model_it_makes(model, tmp_path):
    ByteTokenizer().save(tmp_path / "tokenizer")
    dream_jax.save(model, tmp_path / "model", tokenizer_dir=tmp_path / "tokenizer")
    adapted = lora.attach(dream_jax.load(tmp_path / "model"), lora.LoraConfig(rank=2, alpha=4.0), jax.random.key(0))
    for linear in lora.projections(adapted).values():
        linear.lora_b[...] = jax.random.normal(jax.random.key(1), linear.lora_b.shape) * 0.3
    save_adapter(adapted, tmp_path / "adapter")
    dream_jax.save(dream_jax.merge_adapter(adapted), tmp_path / "merged", tokenizer_dir=tmp_path / "tokenizer")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "abcd"}\n')

    def nats(name, model, **options):
        options |= {"task": "likelihood", "file": texts, "samples": 16, "batch_size": 16, "out": tmp_path / name}
        quiet(model=str(tmp_path / model), **options)
        return rows_of(tmp_path / name)[0]["nats"]

    plain, found = nats("a", "model"), nats("b", "model", adapter=str(tmp_path / "adapter"))
    assert found == pytest.approx(nats("c", "merged"), rel=1e-5)
    assert abs(found - plain) > 1e-3
    with pytest.raises(FileNotFoundError, match=r"adapter\.json"):
        nats("d", "model", adapter=str(tmp_path / "tokenizer"))
