"""Rewards of answers, advantages over the group, and the file with sampled answers."""

import dataclasses
import importlib
import json
import math
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ROOT
from test_flags import parser_of

from dream_jax.data import BatchOptions, Row, RowList, TokenizedRows
from dream_jax.data.sudoku import SudokuSource
from dream_jax.posttraining import BatchSizes
from dream_jax.posttraining.advantages import advantages, shuffled
from dream_jax.posttraining.prompts import PromptBatches
from dream_jax.posttraining.reward_settings import RewardSettings
from dream_jax.posttraining.rewards import RewardError, Rewards, SampledAnswer, make_reward, question_of
from dream_jax.posttraining.rollout_file import RolloutFile, read_rollouts
from dream_jax.tokenizer import ByteTokenizer

PUZZLE, GRID = "4301\n2043\n0200\n1000", "4321\n2143\n3214\n1432"


def answered(text: str, prompt: Any = PUZZLE + "\n", response: str = GRID, **values: Any) -> SampledAnswer:
    row = Row(prompt=prompt, response=response)
    facts = {"length": len(text), "limit": 40, "ended": True, "where": "rows.jsonl:3"} | values
    return SampledAnswer(question=question_of(row), text=text, reference=response, row=row, **facts)


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("sudoku", answered(GRID), 1),
        ("sudoku", answered(GRID.replace("2", "3")), 0),
        ("countdown", answered("3+4=7,7*2=14", "3,4,2,14\n", "x"), 1),
        ("countdown", answered("3+4=7,7*2=15", "3,4,2,14\n", "x"), 0),
        ("gsm8k", answered("so 5+4 = 9.\n#### 9", ({"role": "user", "content": "?"},), "5+4=9\n#### 9"), 1),
        ("gsm8k", answered("#### 8", ({"role": "user", "content": "?"},), "5+4=9\n#### 9"), 0),
        ("exact", answered(f" {GRID}\n"), 1),
        ("exact", answered("1"), 0),
        ("length", answered("", length=10), -0.25),
        ("length", answered("", length=40, ended=False), -1),
        ("format", answered("a\n#### 12"), 1),
        ("format", answered("a\n#### 12 apples"), 0),
    ],
)
def test_rewards_are_those_of_the_judges(name: str, answer: SampledAnswer, expected: float) -> None:
    assert make_reward(name, r".*#### \d+" if name == "format" else None)(answer) == expected


def test_several_rewards_are_weighted_and_a_function_of_the_user_may_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vowel_rewards.py").write_text(
        "def vowels(answer):\n    return sum(one in 'aeiou' for one in answer.text)\n"
    )
    monkeypatch.chdir(tmp_path)
    rewards = RewardSettings(reward=("exact", "vowel_rewards:vowels"), reward_weights=(2.0, -0.5)).make_rewards()
    values = rewards(answered("banana", response="banana"))
    assert values == (1.0, 3.0)
    assert rewards.total(values) == 0.5


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sudokus", "is not one of sudoku, countdown"),
        ("no_such_module:f", "No module named"),
        ("math:no_such_function", "has no function"),
        ("format", "needs a regular expression"),
    ],
)
def test_a_reward_that_is_not_there_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_reward(name)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", "raised ZeroDivisionError"),
        ("float('nan')", "returned nan"),
        ("'much'", "returned 'much', which is not a number"),
        ("None", "which is not a number"),
        ("'1.5'", "returned '1.5', which is not a number"),
        ("10**400", r"returned a value of type int that is not a number \(int too large"),
        ("-1e39", r"returned -1e\+39, which is larger than 1e\+30"),
    ],
)
def test_a_reward_that_fails_stops_with_the_answer_that_did_it(
    body: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"failing_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def reward(answer):\n    return {body}\n")
    monkeypatch.chdir(tmp_path)
    rewards = Rewards([make_reward(f"{name}:reward")])
    with pytest.raises(RewardError, match=message) as caught:
        rewards(answered("the answer is 42"))
    assert "rows.jsonl:3" in str(caught.value)
    assert "the answer is 42" in str(caught.value)


def test_rows_that_no_reward_can_judge_are_refused_with_their_origin() -> None:
    for name, row in (("sudoku", Row(prompt="12", response="x")), ("gsm8k", Row(prompt="?", response="no number"))):
        with pytest.raises(ValueError, match="^rows:7"):
            make_reward(name).check(row, "rows:7")


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("mean", [0.75, -0.25, -0.25, -0.25]),
        ("deviation", [math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)]),
        ("leave-one-out", [1, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_advantages_compare_an_answer_with_its_group(baseline: Any, expected: list[float]) -> None:
    found = advantages(np.array([[1.0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1]]), baseline)
    np.testing.assert_allclose(found.advantage_PG[0], expected, rtol=1e-3)
    assert found.advantage_PG[1].tolist() == [0, 0, 0, 0]
    assert found.signal_P.tolist() == [True, False]


def test_a_group_needs_two_answers_and_shuffling_keeps_the_rewards_of_a_group() -> None:
    with pytest.raises(ValueError, match="at least two answers"):
        advantages(np.zeros((3, 1)), "mean")
    reward_PG = np.arange(20.0).reshape(2, 10)
    found_PG = shuffled(reward_PG, np.random.default_rng(0))
    assert np.array_equal(np.sort(found_PG, axis=1), reward_PG)
    assert not np.array_equal(found_PG, reward_PG)


def test_the_file_of_answers_forgets_later_steps_and_a_line_that_was_cut_short(tmp_path: Path) -> None:
    file = RolloutFile(tmp_path)
    file.cut(0)
    for step in (1, 2, 3):
        file.add(step, [answered(f"text {number}") for number in range(6)], np.arange(6.0)[:, None], 2)
    assert [(one.step, one.answers) for one in read_rollouts(tmp_path)][:2] == [
        (1, ["text 0", "text 1"]),
        (1, ["text 2", "text 3"]),
    ]
    with (tmp_path / "rollouts.jsonl").open("a") as opened:
        opened.write('{"step": 3, "prom')
    file.cut(2)
    assert {one.step for one in read_rollouts(tmp_path)} == {1, 2}
    (tmp_path / "rollouts.jsonl").write_text('{"step": "x"}\n')
    with pytest.raises(ValueError, match=r"rollouts.jsonl:1: "):
        read_rollouts(tmp_path)


def test_prompts_come_once_in_each_epoch_and_the_stream_resumes() -> None:
    rows = TokenizedRows(
        RowList([Row(prompt=f"{number}?" * number, response="x") for number in range(1, 6)]), ByteTokenizer()
    )
    sizes = BatchSizes(batch_size=2, max_length=40, seed=3, process_index=0, process_count=1, options=BatchOptions())
    batches = PromptBatches(rows, sizes)
    first = [next(batches) for _ in range(5)]
    numbers = np.concatenate([batch.source_B for batch in first])
    assert sorted(numbers[:5].tolist()) == sorted(numbers[5:].tolist()) == [0, 1, 2, 3, 4]
    for batch in first:
        for number, tokens_P, valid_P in zip(batch.source_B, batch.tokens_BT, batch.valid_BT, strict=True):
            assert ByteTokenizer().decode(tokens_P[valid_P].tolist()) == rows.source[int(number)].prompt
    again = PromptBatches(rows, sizes)
    state = batches.get_state()
    again.set_state(state)
    assert np.array_equal(next(again).source_B, next(batches).source_B)
    with pytest.raises(ValueError, match="another stream of prompts"):
        PromptBatches(rows, dataclasses.replace(sizes, seed=4)).set_state(state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"reward": ("exact",), "reward_weights": (1.0, 2.0)}, "must have a number for each"),
        ({"reward": ("exact",), "reward_pattern": "x"}, "no effect without --reward format"),
        ({"reward": ("format",), "reward_pattern": "("}, "is not a regular expression"),
        ({"group_size": 1}, "compared with the others"),
        ({"advantage": "best"}, "is not one of"),
        ({"average": "rows"}, "is not one of"),
        ({"policy": "coupled", "policy_passes": 2}, "is for the policy trajectory"),
        ({"rollout_temperature": 0.0}, "tokens are drawn at random"),
        ({"rollout_preset": "fast", "rollout_steps": 3}, "has no effect with --rollout-preset fast"),
    ],
)
def test_settings_of_rewards_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSettings(**values)


def test_the_sampler_of_rollouts_follows_the_settings() -> None:
    settings = RewardSettings(rollout_tokens=12, rollout_steps=4, rollout_temperature=0.7, rollout_top_p=0.9,
                              rollout_alg="topk_margin")  # fmt: skip
    config = settings.make_sampler(ByteTokenizer(), "bidirectional")
    assert (config.max_new_tokens, config.steps, config.temperature, config.top_p) == (12, 4, 0.7, 0.9)
    assert settings.make_sampler(ByteTokenizer(), "bidirectional", greedy=True).temperature == 0
    assert settings.most_steps == 4
    with pytest.raises(ValueError, match="at least one reward"):
        settings.make_rewards()


def test_the_commands_of_a_whole_life_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    life = importlib.import_module("life")
    commands = life.commands(life.LifeSettings())
    assert list(commands) == ["documents", "tuning", "preferences", "rewards"]
    for command in (one for several in commands.values() for one in several):
        script, *arguments = shlex.split(command)
        parser_of(script).parse_args(arguments)


def test_the_measured_puzzles_of_a_life_are_in_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    life = importlib.import_module("life")
    held_out = {str(row.prompt) for row in (SudokuSource("train", seed=1, size=40)[index] for index in range(40))}
    held_out |= {str(SudokuSource("train", seed=2, min_givens=4, max_givens=6, size=4)[3].prompt)}
    life.write_documents(tmp_path / "documents.jsonl", held_out)
    life.write_problems(tmp_path / "problems.jsonl", held_out)
    texts = [json.loads(line)["text"] for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    problems = [json.loads(line)["input"] for line in (tmp_path / "problems.jsonl").read_text().splitlines()]
    puzzles = ["".join(f"{line}\n" for line in text.splitlines()[:4]) for text in texts]
    assert 3900 < len(texts) <= 3960 and not set(puzzles) & held_out
    assert len(problems) <= 399 and not any(f"{problem}\n" in held_out for problem in problems)
    # Results of other settings are not taken for those of these.
    life.rewards.check_settings(tmp_path / "settings.json", {"steps": 1})
    life.rewards.check_settings(tmp_path / "settings.json", {"steps": 1})
    with pytest.raises(ValueError, match="steps was 1, now 2"):
        life.rewards.check_settings(tmp_path / "settings.json", {"steps": 2})


def test_gains_have_an_interval_over_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    bench = importlib.import_module("rewards")
    before = dict.fromkeys(bench.KINDS, 0.5)
    runs = {
        f"a-{seed}": {"arm": "a", "before": before, "after": dict.fromkeys(bench.KINDS, 0.6 + 0.1 * seed)}
        for seed in range(3)
    }
    found = bench.summary(runs)["a, sampled"]
    np.testing.assert_allclose(found["gains"], [10, 20, 30])
    np.testing.assert_allclose([found["mean"], found["half_width"]], [20, 4.302653 * 10 / math.sqrt(3)], rtol=1e-5)
