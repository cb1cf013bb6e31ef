"""The comparison of block diffusion with other ways to train: it runs, resumes run by run, and spends equal FLOPs."""

import json
import math
import shutil

import pytest
from commands import run_script

from dream_jax.pretrained import load
from dream_jax.tokenizer import load_tokenizer
from mask_study import block_diffusion


def test_arms_have_equal_flops():
    rows = [([65] * 8, [66] * 16)] * 64  # as wide as countdown's
    problems = block_diffusion.Problems(name="countdown", train=rows, test=(), width=24, batch=64, steps=600)
    steps = {name: block_diffusion.steps_of(arm, problems) for name, arm in block_diffusion.ARMS.items()}
    assert steps["bidirectional"] == steps["one stream, block-causal:4"] == 600
    assert 0.9 * 600 < steps["autoregressive"] <= 600  # all tokens of the answer are learned, not half of them
    assert all(600 / 2.1 < steps[f"two streams, blocks of {size}"] < 600 / 1.5 for size in (1, 4, 16))
    batch = block_diffusion._batch(problems, 0)
    assert batch.valid_BT is None and (batch.maskable_BT[:, 8:]).all() and not batch.maskable_BT[:, :8].any()


@pytest.mark.usefixtures("assets")  # which skips where DREAM_JAX_ASSETS is not set
def test_gsm8k_rows_are_question_and_solution():
    problems = block_diffusion._gsm8k_problems("gsm8k", 0, block_diffusion.BlockDiffusionSettings(test_rows=8))
    words = load_tokenizer("bytes")
    for prompt, answer in [*problems.train[:20], *problems.test]:
        assert (
            words.decode(prompt)[0].isalnum()
            and words.decode(prompt).endswith("\n")
            and "role" not in words.decode(prompt)
        )
        assert "#### " in words.decode(answer[:-1]) and answer[-1] == words.eos_id
        assert len(prompt) + len(answer) <= problems.width


def test_summary_has_intervals_and_differences():
    def record(arm, seed, nats):
        measured = {"nats an answer": nats, "a token a pass": 0.5}
        return {"task": "countdown", "arm": arm, "seed": seed, "steps": 7, "test_rows": 16, "measured": measured}

    records = [record("bidirectional", seed, 2.0 + seed) for seed in range(3)]
    records += [record("autoregressive", seed, 1.0 + seed) for seed in range(3)]
    rows = {(row["arm"], row["measure"], row["minus"]): row for row in block_diffusion.summary(records)}
    mean = rows["autoregressive", "nats an answer", ""]
    assert (mean["mean"], mean["steps"], mean["seeds"]) == (2.0, 7, 3) and mean["high"] - mean["mean"] > 2
    apart = rows["autoregressive", "nats an answer", "bidirectional"]
    assert apart["mean"] == apart["low"] == apart["high"] == -1.0
    assert rows["autoregressive", "a token a pass", ""]["low"] > 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ("chess",)}, "task 'chess' is not one of: sudoku; countdown; gsm8k"),
        ({"arms": ("two",)}, "arm 'two' is not one of: autoregressive"),
        ({"test_rows": 0}, "test_rows=0"),
        ({"store": True, "measure_again": True}, "measure first, then store"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        block_diffusion.BlockDiffusionSettings(**options)


def test_only_the_runs_of_the_tasks_are_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(block_diffusion, "STORED", tmp_path / "stored")
    (tmp_path / "stored").mkdir()
    (tmp_path / "runs").mkdir()
    for task in ("sudoku", "gsm8k"):
        facts = {"steps": 7, "test_rows": 16, "length": 1.0, "samples": 32, "measured": {"nats an answer": 2.0}}
        record = {"task": task, "arm": "bidirectional", "seed": 0, **facts}
        (tmp_path / "runs" / f"{task}.json").write_text(json.dumps(record))
    asked = {"out": tmp_path, "store": True}
    block_diffusion.main(block_diffusion.BlockDiffusionSettings(**asked, tasks=("sudoku",)))
    stored = (tmp_path / "stored" / block_diffusion.RESULT).read_text().splitlines()
    assert [json.loads(line)["task"] for line in stored] == ["sudoku"]
    assert (
        "sudoku" in (tmp_path / "stored" / block_diffusion.SUMMARY).read_text()
        and "gsm8k" not in capsys.readouterr().out
    )
    block_diffusion.main(block_diffusion.BlockDiffusionSettings(**asked, tasks=("gsm8k",)))
    stored = (tmp_path / "stored" / block_diffusion.RESULT).read_text().splitlines()
    assert [json.loads(line)["task"] for line in stored] == ["gsm8k", "sudoku"]  # what was stored before stays
    with pytest.raises(ValueError, match="has no finished run of countdown; start the command without --store first"):
        block_diffusion.main(block_diffusion.BlockDiffusionSettings(**asked, tasks=("countdown",)))
    (tmp_path / "runs" / "other.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"other.json is not the file of a finished run, because it has no arm, length"
    ):
        block_diffusion.finished(tmp_path)
    whole = json.loads(stored[0]) | {"measured": {"nats an answer": "1.5"}}
    (tmp_path / "runs" / "other.json").write_text(json.dumps(whole))
    with pytest.raises(
        ValueError, match=r"other.json: measured\[\.\.\.\]: Expected `float`, got `str`; remove the file"
    ):
        block_diffusion.finished(tmp_path)


@pytest.mark.slow
def test_a_quick_comparison_resumes(tmp_path):
    command = ("mask_study/block_diffusion.py", "--quick", "--out", tmp_path, "--arms", "two streams, blocks of 4")
    first = run_script(*command)
    assert first.returncode == 0, first.stderr
    (path,) = (tmp_path / "runs").glob("*.json")
    found = json.loads(path.read_text())
    assert (found["task"], found["seed"], found["test_rows"]) == ("countdown", 0, 16)
    assert found["steps"] < 18 and 0 < found["measured"]["nats a token"] < math.log(256)
    assert "floor of two streams, blocks of 4, first token first" in first.stdout
    before = path.stat().st_mtime_ns
    again = run_script(*command)
    assert again.returncode == 0 and path.stat().st_mtime_ns == before and "measured in" not in again.stdout
    (model,) = (tmp_path / "models").iterdir()
    assert model.name == path.stem and load(model).trained_mask == "block-diffusion:4"
    path.write_text(json.dumps(found | {"measured": {"nats a token": 0.0}}))
    again = run_script(*command, "--measure-again")
    assert again.returncode == 0, again.stderr
    # All numbers come back from the kept model; only the time differs.
    assert json.loads(path.read_text()) | {"measure_seconds": 0} == found | {"measure_seconds": 0}
    shutil.rmtree(model)
    none = run_script(*command, "--measure-again")
    assert none.returncode == 1 and "has no kept model" in none.stderr
    other = run_script(*command, "--length", "2")
    assert other.returncode == 1 and "give another --out" in other.stderr
