"""Measures what training on rewards gains: a nano model, sudoku with few givens, every policy, and a control.

    python bench/rewards.py [--out runs/bench-rewards] [--seeds 3] [--steps 60]

For each seed a nano model is trained on generated puzzles (or --model is taken). It then solves puzzles with four to six
givens in a few denoising steps: the number of steps is the one whose accuracy at the temperature of the rollouts is nearest
to 50 %. From this model each arm is trained with `train.py --objective grpo`: the policies trajectory, coupled and
mean-field, and a control whose rewards are dealt to the answers of a group at random. All are evaluated on the same 200
held-out puzzles, whose solved grids occur in training, and on 200 puzzles of other grids. The arms see none of the held-out
puzzles; the training before them draws from a million generated puzzles, among which some of these are.

Each run has a folder in OUT, and the same command goes on where it was stopped. The results are written to --results after
each run: the accuracy before and after of sampled answers (at that temperature, which is what the rewards train) and of
greedy ones, the curves, and for each arm the mean gain with a 95 % interval over the seeds.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import report
import tyro
from scipy import stats

from dream_jax import pretrained
from dream_jax.bounds import POSITIVE, IntegerRange, check_numbers
from dream_jax.data import Row, open_source
from dream_jax.data.sudoku import SudokuSource
from dream_jax.files import read_json, write_file, write_json
from dream_jax.inference import answer
from dream_jax.posttraining import RewardSettings
from dream_jax.posttraining.rollouts import sampled_answers
from dream_jax.reports.record import read_record
from dream_jax.reports.run_report import write_report
from dream_jax.tokenizer import ByteTokenizer
from dream_jax.trainer import TrainSettings, train

ArmName = Literal["trajectory", "coupled", "mean-field", "control"]
TOKENS = 20
HELD_OUT = 200
SAMPLES = 4
NEW_GRIDS = "-new-grids"
KINDS = ("sampled", "greedy", "sampled, new grids")
STEPS_TO_TRY = (2, 3, 4, 5, 6, 8)
WANTED = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardBenchSettings:
    """The size of the comparison, and its folders."""

    out: pathlib.Path = pathlib.Path("runs/bench-rewards")
    """folder of the runs; finished runs in it are not repeated"""
    results: pathlib.Path = report.REPOSITORY / "bench" / "results" / "rewards.json"
    """file of the results"""
    model: pathlib.Path | None = None
    """directory of a nano model to begin with; by default one is trained for each seed"""
    arms: tuple[ArmName, ...] = ("trajectory", "coupled", "mean-field", "control")
    """what is compared"""
    seeds: int = 3
    """number of seeds"""
    base_steps: int = 1500
    """number of steps of the model to begin with"""
    steps: int = 60
    """number of rollouts of each arm"""
    prompts: int = 16
    """number of puzzles of a rollout"""
    group_size: int = 8
    """number of answers to each puzzle"""
    temperature: float = 2.0
    """temperature of sampled answers; above 1, because the model is so sure that most groups would have no signal"""
    learning_rate: float = 2e-4
    """peak learning rate of each arm"""

    def __post_init__(self) -> None:
        several = IntegerRange(1)
        ranges = dict.fromkeys(("seeds", "base_steps", "steps", "prompts", "group_size"), several)
        check_numbers(self, temperature=POSITIVE, learning_rate=POSITIVE, **ranges)


def write_puzzles(folder: pathlib.Path) -> None:
    """Writes the puzzles with four to six givens, unless they are there already.

    FOLDER/train.jsonl has 4,000 puzzles to train on. FOLDER/test.jsonl has held-out ones: none is in train.jsonl, but their
    solved grids are among the 230 of the training split. FOLDER-new-grids/test.jsonl has puzzles of the other 58 grids.
    """
    size = {"min_givens": 4, "max_givens": 6}
    training = [_record(row) for row in _rows(SudokuSource("train", size=4000, **size))]
    seen = {one["input"] for one in training}
    fresh = [_record(row) for row in _rows(SudokuSource("train", seed=1, size=2 * HELD_OUT, **size))]
    held_out = [one for one in fresh if one["input"] not in seen][:HELD_OUT]
    new = [_record(row) for row in _rows(SudokuSource("test", size=HELD_OUT, **size))]
    new_folder = folder.with_name(f"{folder.name}{NEW_GRIDS}")
    for path, records in (
        (folder / "train.jsonl", training),
        (folder / "test.jsonl", held_out),
        (new_folder / "train.jsonl", training),
        (new_folder / "test.jsonl", new),
    ):
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, "".join(json.dumps(one) + "\n" for one in records))


def check_settings(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings to a file, or compares them with those that are there.

    Raises:
      ValueError: the folder has results of other settings, which would be taken for those of these settings.
    """
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in settings.items()}
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, plain)
    elif (before := read_json(path)) != plain:
        changed = [
            f"{name} was {before.get(name)!r}, now {plain.get(name)!r}"
            for name in sorted({*before, *plain})
            if before.get(name) != plain.get(name)
        ]
        raise ValueError(f"{path.parent} has results of other settings ({'; '.join(changed)}): give another --out")


def _rows(source: SudokuSource) -> list[Row]:
    return [source[index] for index in range(len(source))]


def _record(row: Row) -> dict[str, str]:
    return {"input": str(row.prompt).removesuffix("\n"), "output": row.response}


def base_model(settings: RewardBenchSettings, seed: int) -> pathlib.Path:
    """Returns the directory of the model that the arms of a seed begin with; trains it if it is not there."""
    if settings.model is not None:
        return settings.model
    out = settings.out / f"base-{seed}"
    if not (out / "summary.json").is_file():
        train(TrainSettings.flat(model="nano", data="sudoku", steps=settings.base_steps, seed=seed, out=out, samples=0))
    return out / "model"


def accuracy(model_dir: pathlib.Path, data: pathlib.Path, steps: int, temperature: float) -> float:
    """Returns the share of right answers to the held-out puzzles, written in `steps` denoising steps.

    At temperature 0 each puzzle has one answer, at others `SAMPLES` of them.
    """
    model, tokenizer = pretrained.load(str(model_dir)), ByteTokenizer()
    source = open_source(str(data), "test")
    rows = [source[index] for index in range(len(source))]
    prompts = [tokenizer.encode(str(row.prompt)) for row in rows]
    wanted = RewardSettings(
        reward=("sudoku",), rollout_tokens=TOKENS, rollout_steps=steps, rollout_temperature=temperature or 1.0
    )
    sampler = wanted.make_sampler(tokenizer, model.trained_mask, greedy=not temperature)
    rewards, right = wanted.make_rewards(), []
    for sample in range(SAMPLES if temperature else 1):
        names = [(1, index, sample) for index in range(len(rows))]
        answers = answer(model, tokenizer, prompts, names, sampler, len(rows))
        seen = sampled_answers(answers, rows, [f"row {index + 1}" for index in range(len(rows))], TOKENS)
        right += [rewards(one)[0] for one in seen]
    return float(np.mean(right))


def measured(model_dir: pathlib.Path, data: pathlib.Path, steps: int, temperature: float) -> dict[str, float]:
    """Returns the accuracies of `KINDS`: of sampled and of greedy answers, and of sampled ones on puzzles of new grids."""
    new = data.with_name(f"{data.name}{NEW_GRIDS}")
    wanted = ((data, temperature), (data, 0.0), (new, temperature))
    return {
        name: accuracy(model_dir, puzzles, steps, kind) for name, (puzzles, kind) in zip(KINDS, wanted, strict=True)
    }


def calibrated(settings: RewardBenchSettings, seed: int, model_dir: pathlib.Path, data: pathlib.Path) -> dict[str, Any]:
    """Returns the number of denoising steps, both accuracies before training, and the accuracies of all numbers tried."""
    path = settings.out / f"before-{seed}.json"
    if path.is_file():
        return read_json(path)
    found = {}
    for steps in STEPS_TO_TRY:
        found[steps] = accuracy(model_dir, data, steps, settings.temperature)
        if found[steps] > 0.8:
            break
    chosen = min(found, key=lambda steps: abs(found[steps] - WANTED))
    before = {
        "steps": chosen,
        **measured(model_dir, data, chosen, settings.temperature),
        "tried": {str(steps): value for steps, value in found.items()},
    }
    write_json(path, before)
    return before


def run_arm(
    settings: RewardBenchSettings, arm: ArmName, seed: int, model_dir: pathlib.Path, data: pathlib.Path, steps: int
) -> dict[str, Any]:
    """Trains one arm unless it is finished, and returns its curve, its last accuracy and its time."""
    out = settings.out / f"{arm}-{seed}"
    if not (out / "summary.json").is_file():
        train(
            TrainSettings.flat(
                objective="grpo",
                model=str(model_dir),
                tokenizer="bytes",
                data=str(data),
                reward=("sudoku",),
                policy="trajectory" if arm == "control" else arm,
                shuffle_rewards=arm == "control",
                group_size=settings.group_size,
                batch_size=settings.prompts,
                rollout_tokens=TOKENS,
                rollout_steps=steps,
                rollout_temperature=settings.temperature,
                steps=settings.steps,
                learning_rate=settings.learning_rate,
                seed=seed,
                eval_rows=HELD_OUT,
                eval_every=max(settings.steps // 5, 1),
                samples=0,
                out=out,
            )
        )
        write_report(read_record(out))
    record = read_record(out)
    path = settings.out / f"after-{arm}-{seed}.json"
    if not path.is_file():
        write_json(path, measured(out / "model", data, steps, settings.temperature))
    return {
        "greedy_curve": [[int(row["step"]), row["reward"]] for row in record.evaluations],
        "reward_curve": [row["reward"] for row in record.steps],
        "after": read_json(path),
        "seconds": record.summary["seconds"],
        "rollout_share": record.last("rollout_share"),
    }


def interval(gains: Sequence[float]) -> dict[str, float | None]:
    """Returns the mean of the gains, and the half width of its 95 % interval by Student's t; None for a single gain."""
    if len(gains) < 2:
        return {"mean": float(np.mean(gains)), "half_width": None}
    error = float(np.std(gains, ddof=1)) / len(gains) ** 0.5
    return {"mean": float(np.mean(gains)), "half_width": float(stats.t.ppf(0.975, len(gains) - 1)) * error}


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns for each arm and kind of answers the gains of its seeds, in points of accuracy, with `interval`."""
    arms: dict[str, list[float]] = {}
    for kind in KINDS:
        for one in found.values():
            gain = 100 * (one["after"][kind] - one["before"][kind])
            arms.setdefault(f"{one['arm']}, {kind}", []).append(gain)
    return {arm: {"gains": gains, **interval(gains)} for arm, gains in arms.items()}


def main() -> int:
    settings = tyro.cli(RewardBenchSettings, description=__doc__)
    data = settings.out / "data"
    free = ("out", "results", "arms", "seeds")  # more arms and seeds can be added to a folder
    given = {name: value for name, value in dataclasses.asdict(settings).items() if name not in free}
    check_settings(settings.out / "settings.json", given)
    write_puzzles(data)
    found: dict[str, dict[str, Any]] = {}
    for seed in range(settings.seeds):
        model_dir = base_model(settings, seed)
        before = calibrated(settings, seed, model_dir, data)
        for arm in settings.arms:
            result = run_arm(settings, arm, seed, model_dir, data, before["steps"])
            found[f"{arm}-{seed}"] = {
                "arm": arm,
                "seed": seed,
                "steps": before["steps"],
                "before": before,
                **result,
            }
            plain = {name: str(value) if isinstance(value, pathlib.Path) else value
                     for name, value in dataclasses.asdict(settings).items() if name not in ("out", "results")}  # fmt: skip
            write_json(
                settings.results,
                {
                    "date": report.now(),
                    "hardware": report.hardware(),
                    "versions": report.versions(("jax", "jaxlib", "numpy")),
                    "settings": plain,
                    "runs": found,
                    "arms": summary(found),
                },
            )
            after = result["after"]
            print(
                f"{arm}, seed {seed}: sampled {before['sampled']:.3f} -> {after['sampled']:.3f}, "
                f"greedy {before['greedy']:.3f} -> {after['greedy']:.3f}",
                flush=True,
            )
    for name, gain in summary(found).items():
        half = "" if gain["half_width"] is None else f" +- {gain['half_width']:.1f}"
        print(f"{name}: {gain['mean']:+.1f}{half} points over {len(gain['gains'])} seeds")
    print(f"wrote {settings.results}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
