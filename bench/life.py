"""A whole life of a nano model on a laptop: documents, fine-tuning, preferences, rewards, and what each stage changed.

    python bench/life.py [--out runs/life]        (make life)

The stages, each a command that is printed before it runs, and each from the weights of the stage before it:

1. documents: solved 4x4 sudokus as plain texts, from random weights;
2. fine-tuning: the solution after a puzzle;
3. preferences: sampled answers to other puzzles become pairs of a right and a wrong one, and VRPO prefers the right ones;
4. rewards: GRPO on the trajectory of the sampler, with the judge of sudoku as reward.

After each stage the model solves 200 held-out puzzles with four to six givens, in 20 denoising steps and in 3.
OUT/report.md has the table. The same command goes on where it was stopped; finished stages are not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shlex
import subprocess
import sys
import time

import report
import rewards
import tyro

from dream_jax.bounds import IntegerRange, check_numbers
from dream_jax.data.sudoku import SudokuSource
from dream_jax.files import read_json, write_file, write_json

STEPS = (20, 3)
SAMPLED = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class LifeSettings:
    """The folder, and the number of steps of each stage."""

    out: pathlib.Path = pathlib.Path("runs/life")
    """folder of the stages and of the report"""
    document_steps: int = 500
    """number of steps on documents"""
    tuning_steps: int = 1000
    """number of steps of fine-tuning"""
    preference_steps: int = 100
    """number of steps on pairs"""
    reward_steps: int = 60
    """number of rollouts"""

    def __post_init__(self) -> None:
        several = IntegerRange(1)
        check_numbers(
            self, document_steps=several, tuning_steps=several, preference_steps=several, reward_steps=several
        )


def held_out_puzzles(folder: pathlib.Path) -> set[str]:
    """Returns the puzzles in FOLDER/test.jsonl, on which all stages are measured."""
    return {json.loads(line)["input"] + "\n" for line in (folder / "test.jsonl").read_text().splitlines()}


def write_documents(path: pathlib.Path, without: set[str]) -> None:
    """Writes about 4,000 solved sudokus as documents, each a puzzle that is not in `without` and its solution."""
    if path.is_file():
        return
    source = SudokuSource("train", seed=1, size=4000)
    rows = [source[index] for index in range(len(source))]
    texts = (f"{row.prompt}{row.response}" for row in rows if row.prompt not in without)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_problems(path: pathlib.Path, without: set[str]) -> None:
    """Writes the puzzles whose sampled answers become pairs, drawn with a seed of their own; none is in `without`."""
    if path.is_file():
        return
    source = SudokuSource("train", seed=2, min_givens=4, max_givens=6, size=SAMPLED)
    rows = [source[index] for index in range(len(source))]
    rows = [row for row in rows if row.prompt not in without]
    lines = [{"input": str(row.prompt).removesuffix("\n"), "output": row.response} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(line) + "\n" for line in lines))


def run(command: str) -> None:
    """Prints and runs a command of this repository; `command` begins with the script.

    Raises:
      RuntimeError: the command failed; its own output says why.
    """
    print(f"$ python {command}", flush=True)
    if subprocess.run([sys.executable, *shlex.split(command)], cwd=report.REPOSITORY, check=False).returncode:
        raise RuntimeError(f"this command failed: python {command}")


def commands(settings: LifeSettings) -> dict[str, list[str]]:
    """Returns the commands of each stage. The last one of a stage writes the folder OUT/STAGE."""
    out = settings.out.resolve()
    few = "--eval-every 1000 --eval-rows 50 --samples 2 --sample-tokens 20 --log-to tensorboard"
    tuned, grids = out / "tuning" / "model", out / "data" / "documents.jsonl"
    problems, sampled, pairs = out / "data" / "problems.jsonl", out / "sampled", out / "data" / "pairs.jsonl"
    return {
        "documents": [
            f"train.py --model nano --data {grids} --steps {settings.document_steps} --out {out}/documents {few}"
        ],
        "tuning": [
            f"train.py --model {out}/documents/model --tokenizer bytes --data sudoku --learning-rate 2e-3 "
            f"--steps {settings.tuning_steps} --out {out}/tuning {few}"
        ],
        "preferences": [
            f"evaluate.py --model {tuned} --task sudoku --file {problems} --shots 0 --seeds 8 --temperature 1 "
            f"--steps 3 --max-new-tokens 20 --out {sampled}",
            f"convert/pairs.py {sampled} {pairs} --file {problems}",
            f"train.py --objective vrpo --model {tuned} --tokenizer bytes --data {pairs} --learning-rate 3e-5 "
            f"--batch-size 16 --steps {settings.preference_steps} --out {out}/preferences {few}",
        ],
        "rewards": [
            f"train.py --objective grpo --model {out}/preferences/model --tokenizer bytes --data {out}/data/puzzles "
            "--reward sudoku --rollout-tokens 20 --rollout-steps 3 --rollout-temperature 1.5 --batch-size 16 "
            f"--learning-rate 2e-4 --steps {settings.reward_steps} --out {out}/rewards {few}"
        ],
    }


def measured(settings: LifeSettings, stage: str) -> dict[str, float]:
    """Returns the accuracy after a stage for each number of denoising steps, and the seconds of its training."""
    path = settings.out / f"after-{stage}.json"
    if path.is_file():
        return read_json(path)
    model, data = settings.out / stage / "model", settings.out / "data" / "puzzles"
    found = {f"accuracy in {steps} steps": rewards.accuracy(model, data, steps, 0.0) for steps in STEPS}
    found["seconds of training"] = read_json(settings.out / stage / "summary.json")["seconds"]
    write_json(path, found)
    return found


def main() -> int:
    settings = tyro.cli(LifeSettings, description=__doc__)
    begun = time.monotonic()
    given = {name: value for name, value in dataclasses.asdict(settings).items() if name != "out"}
    rewards.check_settings(settings.out / "settings.json", given)
    rewards.write_puzzles(settings.out / "data" / "puzzles")
    held_out = held_out_puzzles(settings.out / "data" / "puzzles")
    write_documents(settings.out / "data" / "documents.jsonl", held_out)
    write_problems(settings.out / "data" / "problems.jsonl", held_out)
    found: dict[str, dict[str, float]] = {}
    for stage, needed in commands(settings).items():
        for command in needed:
            pairs = settings.out / "data" / "pairs.jsonl"
            done = (settings.out / stage / "summary.json").is_file() or ("pairs.py" in command and pairs.is_file())
            if not done:
                run(command)
        found[stage] = measured(settings, stage)
        print(f"after {stage}: " + ", ".join(f"{name} {value:.3g}" for name, value in found[stage].items()), flush=True)
    names = list(next(iter(found.values())))
    lines = [
        "# A whole life of a nano model",
        "",
        f"Share of {rewards.HELD_OUT} held-out sudokus with four to six givens that the model solves at temperature 0. "
        "Their solved grids occur in training. The puzzles are not in the documents, nor in the data of preferences and "
        "rewards; fine-tuning draws from a million generated puzzles, among which some of them are.",
        "",
        f"| after | {' | '.join(names)} |",
        "| --- |" + " --- |" * len(names),
        *(f"| {stage} | {' | '.join(f'{values[name]:.3g}' for name in names)} |" for stage, values in found.items()),
        "",
        "Each stage has a report of its own: " + ", ".join(f"[{stage}]({stage}/report.md)" for stage in found) + ".",
        "",
    ]
    write_file(settings.out / "report.md", "\n".join(lines))
    print("\n".join(lines))
    print(f"wrote {settings.out}/report.md in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
