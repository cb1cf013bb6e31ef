"""Runs of train.py with rewards: files, resuming bit for bit, meshes, several updates, and rewards that fail."""

import csv
import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import run_script, start_script
from flax import nnx

import dream_jax
from dream_jax import masks
from dream_jax.config import PRESETS
from dream_jax.model import Dream
from dream_jax.plan import PlanSettings, make_plan, render
from dream_jax.posttraining import grpo
from dream_jax.posttraining.rewards import RewardError, Rewards, SampledAnswer, make_reward
from dream_jax.posttraining.rollout_file import read_rollouts
from dream_jax.reports.record import read_record
from dream_jax.reports.run_report import render_report
from dream_jax.trainer import TrainSettings, train
from dream_jax.trainer import weights as weights_of

# With random weights no answer is right, so this reward tells apart answers by their characters.
REWARD = """
import os
def characters(answer):
    return sum(map(ord, answer.text)) % 7
def failing(answer):
    return 1 / 0
def killing(answer):
    path = os.environ["CALLS"]
    with open(path, "a") as file:
        file.write("x")
    if os.path.getsize(path) == 10:
        os.kill(os.getpid(), 9)
    return characters(answer)
"""
OPTIONS: dict[str, Any] = {
    "objective": "grpo", "tokenizer": "bytes", "reward": ("my_rewards:characters",), "batch_size": 2, "group_size": 4,
    "rollout_tokens": 6, "rollout_steps": 3, "steps": 3, "save_every": 1, "eval_rows": 0, "samples": 0, "log_to": (),
    "learning_rate": 3e-3, "updates": 2, "rollout_samples": 2, "kl_weight": 0.1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny model."""
    config = dataclasses.replace(PRESETS["nano"], num_hidden_layers=1, hidden_size=32, intermediate_size=32,
                                 num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)  # fmt: skip
    path = tmp_path_factory.mktemp("tiny") / "model"
    dream_jax.save(Dream(config, rngs=nnx.Rngs(0)), path)
    return path


@pytest.fixture(autouse=True)
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with rewards in the current folder."""
    (tmp_path / "my_rewards.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def table(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def without_times(rows: list[dict[str, float]]) -> list[dict[str, str]]:
    timed = {"tokens_per_second", "rollout_share"}
    return [{name: repr(value) for name, value in row.items() if name not in timed} for row in rows]


def weights(folder: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(dream_jax.load(folder / "model")))]


def test_a_run_samples_rewards_and_updates(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainSettings.flat(**OPTIONS | {"model": str(model), "out": tmp_path / "run"})
    plain, errors, gains, places = grpo.UpdateStep.__call__, [], [], []

    def watched(self: Any, state: Any, batch: Any, frozen: Any = None) -> Any:
        after, metrics = plain(self, state, batch, frozen)
        places.append((batch.old_BM.sharding, batch.reference_BM.sharding))
        # Before the first update the weights are those of the reference, which a program of its own has scored.
        ratio_BM = np.exp(np.asarray(metrics[grpo.LOGPROBS]) - np.asarray(batch.reference_BM))
        weight_BM = np.asarray(batch.weight_BM)
        errors.append(np.abs(ratio_BM - 1)[weight_BM > 0].max())
        change_BM = np.asarray(metrics[grpo.LOGPROBS]) - np.asarray(batch.old_BM)
        gains.append(np.sum(weight_BM * np.asarray(batch.advantage_B)[..., None] * change_BM))
        return after, metrics

    monkeypatch.setattr(grpo.UpdateStep, "__call__", watched)
    train(settings)
    # With another sharding in the second update, the program would be compiled once more.
    assert all(place.is_fully_replicated for both in places for place in both)
    assert errors[0] < 1e-6 < 1e-4 < errors[1]
    # The first update of each rollout has made better answers more probable than worse ones.
    assert min(gains[1::2]) > 0
    rows = table(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert row["ratio_error"] == 0.0
        assert row["signal"] == 1.0
        assert 0 < row["entropy"] < math.log(300)
        assert row["kl"] > 0
        assert row["views"] == 2 * 4 * 3
        assert row["num_masked"] == 2 * 4 * 6
        assert 0 < row["rollout_share"] < 1
    # The schedule of the learning rate counts updates, of which a step has two.
    assert rows[-1]["learning_rate"] < 0.2 * OPTIONS["learning_rate"]
    report = render_report(read_record(tmp_path / "run"))
    assert "## Rewards" in report
    assert "**step 3**" in report
    found = read_rollouts(tmp_path / "run")
    assert [one.step for one in found] == [1, 1, 3, 3]
    assert all(len(one.answers) == len(one.rewards) == 4 for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["rollout", "update"])
def test_a_run_that_ends_in_the_middle_of_a_step_goes_on_bit_for_bit(
    where: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class _Killed(BaseException):
        pass

    def settings(name: str) -> TrainSettings:
        return TrainSettings.flat(**OPTIONS | {"model": str(model), "out": tmp_path / name})

    train(settings("whole"))
    calls = 0
    of, name, last = (grpo.RolloutDriver, "_judge", 3) if where == "rollout" else (grpo.UpdateStep, "__call__", 6)
    plain = getattr(of, name)

    def counted(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise _Killed
        return plain(self, *arguments)

    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(of, name, counted)
        train(settings("killed"))
    assert len(table(tmp_path / "killed")) == 2
    train(settings("killed"))
    assert without_times(table(tmp_path / "killed")) == without_times(table(tmp_path / "whole"))
    assert read_rollouts(tmp_path / "killed") == read_rollouts(tmp_path / "whole")
    for one, other in zip(weights(tmp_path / "killed"), weights(tmp_path / "whole"), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.slow
def test_a_process_that_is_killed_in_a_rollout_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    options = OPTIONS | {
        "model": model,
        "out": tmp_path / "killed",
        "reward": "my_rewards:killing",
        "log_to": "tensorboard",
    }
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    killed = start_script("train.py", *flags)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert len(table(tmp_path / "killed")) == 1
    finished = run_script("train.py", *flags)
    assert finished.returncode == 0, finished.stderr
    assert len(table(tmp_path / "killed")) == 3


@pytest.mark.slow
def test_losses_are_the_same_on_every_mesh(model: Path, tmp_path: Path) -> None:
    for mesh in ("1x1", "4x2"):
        changes = {"model": str(model), "out": tmp_path / mesh, "mesh": mesh, "eval_rows": 4, "eval_every": 3}
        train(TrainSettings.flat(**OPTIONS | changes))
    one, other = table(tmp_path / "1x1"), table(tmp_path / "4x2")
    for name in ("loss", "nll", "reward", "entropy", "kl"):
        np.testing.assert_allclose([row[name] for row in one], [row[name] for row in other], atol=1e-5, rtol=1e-5)
    with (tmp_path / "4x2" / "eval.csv").open() as file:
        assert float(next(csv.DictReader(file))["reward"]) > 0


def test_a_reward_that_fails_ends_the_command_with_one_line_and_the_answer(model: Path, tmp_path: Path) -> None:
    options = OPTIONS | {
        "model": model,
        "out": tmp_path / "run",
        "reward": "my_rewards:failing",
        "log_to": "tensorboard",
    }
    flags = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    found = run_script("train.py", *flags)
    assert found.returncode == 1
    assert "raised ZeroDivisionError" in found.stderr
    assert "for this answer to row " in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("objective", ["grpo", "vrpo"])
def test_a_model_of_block_diffusion_is_refused(objective: str, model: Path, tmp_path: Path) -> None:
    blocks = dream_jax.load(model)
    blocks.trained_mask = masks.name_of(masks.BlockDiffusion(4))
    dream_jax.save(blocks, tmp_path / "blocks")
    options = OPTIONS if objective == "grpo" else {"objective": objective}
    with pytest.raises(ValueError, match=f"cannot be trained with --objective {objective} under it"):
        weights_of.describe(TrainSettings.flat(**options | {"model": str(tmp_path / "blocks")}), "float32")


def test_a_plan_has_the_rollouts() -> None:
    settings = TrainSettings.flat(**OPTIONS | {"model": "dream-7b", "lora_rank": 8, "max_length": 64, "mesh": "8x1"})
    plan = make_plan(settings, PlanSettings(plan=True, topology="v6e:2x4", compile=False))
    rollout = plan.rollout
    assert rollout is not None
    assert (rollout.answers, rollout.passes) == (8, 3)
    # Twice the weights of the layers for each token and pass, and attention and the head besides.
    tokens = 8 * 3 * 64
    assert 2 * 6.5e9 * tokens < rollout.flops < 2.2 * 7.7e9 * tokens
    seconds = [2 * plan.time.fast + rollout.fast, 2 * plan.time.slow + rollout.slow]
    np.testing.assert_allclose(plan.price.hours, [3 * one / 3600 for one in seconds])
    np.testing.assert_allclose(rollout.share, [rollout.fast / seconds[0], rollout.slow / seconds[1]])
    assert plan.fits
    assert "share of the time in rollouts" in render(plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "sft", "updates": 1, "kl_weight": 0.0}, "has no effect with --objective sft"),
        ({"reward": ()}, "needs at least one reward"),
        ({"reward": ("gsm8k",)}, "the answer does not end with"),
        ({"accumulation": 3}, "must be a positive multiple"),
        ({"anneal_steps": 2}, "--anneal-steps is for --objective sft, not for grpo"),
        ({"mesh": "8x1", "accumulation": 2}, "fsdp=8 does not divide"),
        ({"eos_tail": 3}, "lay out responses"),
        ({"weight": "uniform"}, "--weight has no effect with --objective grpo"),
        ({"learned_turns": "all"}, "--learned-turns all has no effect with --objective grpo"),
        ({"final": "best", "eval_rows": 2}, "--final best takes"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    changes: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(TrainSettings.flat(**OPTIONS | {"model": str(model), "out": tmp_path / "run"} | changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("process", [0, 1])
def test_only_process_0_judges_and_all_processes_end_if_a_reward_fails(
    process: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes are simulated: what process 0 would send is what `sent` has."""
    asked: list[str] = []

    class Judge(Rewards):
        def __call__(self, answer: SampledAnswer) -> tuple[float, ...]:
            asked.append(answer.text)
            if answer.text == "bad":
                raise RewardError("the reward failed")
            if answer.text == "exit":
                raise SystemExit("the reward ended the program")
            return (len(answer.text), 0.5)

    def answer(text: str) -> SampledAnswer:
        return SampledAnswer(question="", text=text, reference="", length=1, ended=True, row={}, where="row 1", limit=1)

    sent: list[Any] = []

    def broadcast(value: Any) -> Any:
        if process == 0:
            sent[:] = [value]
        return sent[0]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(grpo.multihost_utils, "broadcast_one_to_all", broadcast)
    driver = object.__new__(grpo.RolloutDriver)
    driver._rewards = Judge([make_reward("length"), make_reward("exact")])
    sent[:] = [(np.array([[1.0, 0.5], [3.0, 0.5]], np.float32), np.bool_(False))]
    np.testing.assert_array_equal(driver._values([answer("a"), answer("abc")]), [[1.0, 0.5], [3.0, 0.5]])
    assert asked == (["a", "abc"] if process == 0 else [])
    failing = [] if process == 0 else [(np.zeros((1, 2), np.float32), np.bool_(True))]
    sent[:] = failing
    with pytest.raises(RewardError, match="the reward failed" if process == 0 else "judging failed in process 0"):
        driver._values([answer("bad")])
    assert sent[0][1]  # process 0 told the others before it raised
    sent[:] = failing
    with pytest.raises(SystemExit if process == 0 else RewardError):
        driver._values([answer("exit")])
    assert sent[0][1]
