"""The training loop as a user meets it: one folder a run, stopping, going on, refusals, several processes."""

import csv
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import dream_jax
from dream_jax import pretrained
from dream_jax.tokenizer import ByteTokenizer
from dream_jax.trainer import TrainSettings, answer_text, train

ROOT = pathlib.Path(__file__).parent.parent


def settings(out, **changes):
    base = {"mesh": "8x1", "steps": 12, "batch_size": 16, "save_every": 5, "eval_rows": 4, "out": out}
    return TrainSettings(**(base | changes))


def losses(out):
    with (out / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from start to end, shared by the tests that only read it."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, train(settings(out))


def test_a_run_leaves_what_it_promises(finished):
    out, summary = finished
    assert [step for step, _ in losses(out)] == [*range(1, 13)]
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["settings"]["steps"] == 12
    assert summary["last_losses"] == [loss for _, loss in losses(out)][-10:]
    assert 0.0 <= summary["eval"]["exact_accuracy"] <= 1.0
    assert summary["eval"]["rows"] == 4
    assert summary["seconds"] > 0
    # Divided over the eight devices: each holds far less than a whole copy of parameters and moments.
    sizes = summary["bytes_per_device"].values()
    assert len(sizes) == 8 and max(sizes) < 3 * 4 * summary["parameters"] / 6
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
        train(settings(tmp_path, overwrite=True))
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


def test_going_on_repeats_the_uninterrupted_run(finished, tmp_path):
    """Stopped between two steps by SIGINT, then the same command: the same losses, bit for bit."""
    out = tmp_path / "stopped"
    command = [sys.executable, "train.py", "--mesh", "8x1", "--steps", "12", "--batch-size", "16", "--save-every", "5"]
    command += ["--eval-rows", "4", "--out", str(out), "--log-every", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 1/"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
    assert process.returncode == 130, rest
    assert "the same command goes on from there" in rest
    assert not (out / "summary.json").exists()
    done = len(losses(out))
    assert 1 <= done < 12
    with pytest.raises(FileExistsError, match="seed was 0, now 1"):
        train(settings(out, seed=1))
    train(settings(out))
    assert losses(out) == losses(finished[0])


def test_two_processes_give_the_losses_of_one(finished, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "two"
    command = [sys.executable, "train.py", "--mesh", "8x1", "--steps", "12", "--batch-size", "16", "--save-every", "5"]
    command += ["--eval-rows", "4", "--out", str(out), "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    started = [
        subprocess.Popen(
            [*command, "--process-id", str(number)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    deadline = time.monotonic() + 300
    try:
        said = [process.communicate(timeout=max(1.0, deadline - time.monotonic()))[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    np.testing.assert_allclose([loss for _, loss in losses(out)], [loss for _, loss in losses(finished[0])], rtol=1e-5)
    one, two = finished[1]["eval"], json.loads((out / "summary.json").read_text())["eval"]
    assert one["exact_accuracy"] == two["exact_accuracy"]
    np.testing.assert_allclose(one["nll"], two["nll"], rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": "8"}, "not of the form FSDPxTENSOR"),
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"weight": "cart", "cart_p": 1.5}, "outside"),
        ({"learning_rate": -1.0}, "must be positive"),
        ({"max_length": 1}, "leaves no room"),
        ({"num_processes": 2}, "needs --coordinator"),
    ],
)
def test_settings_that_cannot_be(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path / "x", **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "dream-7b"}, "has no tokenizer of its own"),
        ({"data": "s1k"}, "not built yet"),
        ({"batch_size": 12}, "does not divide"),
        ({"max_length": 20}, "max_length"),
        ({"model": "no/such/place/here"}, "no/such/place/here"),
    ],
)
def test_refusals_leave_no_folder_and_read_no_weights(tmp_path, monkeypatch, change, message):
    monkeypatch.setattr(pretrained, "load", lambda *_, **__: pytest.fail("weights were read before the refusal"))
    with pytest.raises((ValueError, OSError), match=message):
        train(settings(tmp_path / "x", **change))
    assert not (tmp_path / "x").exists()


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


def test_unwise_settings_are_named():
    assert any("1/t^2" in line for line in TrainSettings(weight="inverse-time").warnings())
    assert any("published recipe" in line for line in TrainSettings(model="weights", learning_rate=1e-3).warnings())
    assert TrainSettings().warnings() == []


def test_an_answer_ends_at_the_first_end_token():
    tokenizer = ByteTokenizer()
    ids = [*tokenizer.encode("42"), tokenizer.eos_id, *tokenizer.encode("7")]
    assert answer_text(tokenizer, np.array(ids)) == "42"
    assert answer_text(tokenizer, np.array(ids[:2])) == "42"


def test_losses_fall_in_a_few_steps(finished):
    values = [loss for _, loss in losses(finished[0])]
    assert values[-1] < 0.8 * values[0]
    assert all(np.isfinite(values))
    assert jax.device_count() == 8
