"""Measures how many answers stay right when a key/value cache is refreshed every 1, 2 or 4 blocks, or never.

    python -m mask_study.refreshing [--tasks sudoku countdown] [--seeds 3] [--out runs/refreshing]
    python -m mask_study.refreshing --quick
    python -m mask_study.refreshing --store

Trains the models of the study on tasks whose answers have several blocks, and answers the test rows in
blocks of four tokens, most confident token first. Without a cache every pass computes all tokens. With a cache, a pass
computes the block and the block before it, whose tokens have just become final, and a full pass is made at the start of
every block, of every second or fourth block, or of the first block only. Where the cache is exact (`mask_study.caching`)
all columns are the same.

Each model is a file in OUT/runs. The same command goes on where it was stopped, and several processes may share OUT.
OUT/refreshing.csv has means over seeds with 95 % intervals; --store writes it to docs/study, with one line per model.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import pathlib
import sys
from typing import Any

import msgspec
import numpy as np
import tyro

from dream_jax.bounds import POSITIVE, IntegerRange, check_numbers
from dream_jax.files import read_json, typed, write_file
from dream_jax.model import Dream
from dream_jax.sampler import EntropyBound, NoCache, SamplerConfig, WindowCache, generate
from mask_study.caching import BLOCK
from mask_study.runs import StudyRun, summarise, write_table
from mask_study.tasks import TASKS, Example, StudyTask
from mask_study.training import decode, rows_of, tokenizer, train
from mask_study.variants import MASKS, VARIANTS

STORED = pathlib.Path(__file__).resolve().parents[1] / "docs" / "study"
RESULT, SUMMARY = "refreshing.jsonl", "refreshing.csv"
_REMEDY = "remove the file, then the same command makes its run again"

REFRESHES: dict[str, NoCache | WindowCache] = {
    "no cache": NoCache(),
    **{
        name: WindowCache(left=BLOCK, refresh_blocks=blocks)
        for name, blocks in (("every block", 1), ("every 2 blocks", 2), ("every 4 blocks", 4), ("never", None))
    },
}
"""How often a full pass is made, by the name of the column in the tables."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshSettings:
    """Which models are trained, and how many rows they answer."""

    tasks: tuple[str, ...] = ("sudoku", "countdown")
    """names of tasks whose answers have several blocks of four tokens (all tasks of the study but addition)"""
    masks: tuple[str, ...] = MASKS
    """names of masks of the study"""
    seeds: int = 3
    """number of models for each task and mask"""
    length: float = 1.0
    """factor on the number of training steps, above 0"""
    test_rows: int = 256
    """number of test rows, 1 to 1024"""
    out: pathlib.Path = pathlib.Path("runs/refreshing")
    """folder of the runs; those that are in it are not made again"""
    quick: bool = False
    """sudoku alone, the masks bidirectional and causal, one seed, 2 % of the steps, 16 rows"""
    store: bool = False
    """make nothing; write the finished runs, which must have these settings, and their summary to docs/study"""

    def __post_init__(self) -> None:
        check_numbers(self, seeds=IntegerRange(1, 1000), length=POSITIVE, test_rows=IntegerRange(1, 1024))
        several = [name for name, task in TASKS.items() if task.answer_width > BLOCK]
        for kind, asked, known in (("task", self.tasks, several), ("mask", self.masks, list(MASKS))):
            for name in asked:
                if name not in known:
                    raise ValueError(f"{kind} {name!r} is not one of: {'; '.join(known)}")

    def resolved(self) -> RefreshSettings:
        """Returns the settings that a quick run stands for."""
        if not self.quick:
            return self
        few: dict[str, Any] = {"tasks": ("sudoku",), "masks": ("bidirectional", "causal"), "seeds": 1}
        return dataclasses.replace(self, **few, length=0.02 * self.length, test_rows=16)


def accuracies(model: Dream, task: StudyTask, examples: list[Example]) -> dict[str, float]:
    """Returns the share of right answers, in [0, 1], for each entry of `REFRESHES`."""
    words = tokenizer()
    prompts = rows_of([Example(example.prompt, "") for example in examples], words)
    found = {}
    for name, cache in REFRESHES.items():
        config = SamplerConfig(
            max_new_tokens=task.answer_width,
            alg="entropy",
            commit=EntropyBound(0.0),  # one token in each pass
            block_length=BLOCK,
            cache=cache,
            vocab_limit=words.vocab_limit,
            forbidden_tokens=(words.mask_id,),
        )
        tokens_BT = np.asarray(generate(model, prompts, config).tokens)
        answers = [decode(row, words) for row in tokens_BT[:, task.prompt_width :]]
        found[name] = float(np.mean([task.is_right(*pair) for pair in zip(examples, answers, strict=True)]))
    return found


def _make(run: StudyRun, settings: RefreshSettings) -> dict[str, Any]:
    task = TASKS[run.task]
    steps = max(1, round(settings.length * task.steps))
    trained = train(task, VARIANTS[run.variant], run.seed, steps)
    examples = task.examples("test", 0, settings.test_rows)
    numbers = {"steps": steps, "test_rows": settings.test_rows, "seconds": round(trained.seconds, 1)}
    return dataclasses.asdict(run) | numbers | {"accuracy": accuracies(trained.model, task, examples)}


class _Record(msgspec.Struct):
    """The entries of the file of a run, with their types."""

    task: str
    variant: str
    seed: int
    steps: int
    test_rows: int
    accuracy: dict[str, float]


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Returns the results of a run. Raises ValueError if the file has another form."""
    found: dict[str, Any] = read_json(path, _REMEDY)
    typed(found, _Record, path, _REMEDY)
    if found["task"] not in TASKS or found["variant"] not in MASKS:
        raise ValueError(
            f"{path} is about {found['task']!r} and {found['variant']!r}, which are not of the study; {_REMEDY}"
        )
    return found


def _check(found: dict[str, Any], path: pathlib.Path, settings: RefreshSettings) -> None:
    """Raises FileExistsError if a run was made with other steps or test rows than those of the settings."""
    wanted = max(1, round(settings.length * TASKS[found["task"]].steps)), settings.test_rows
    if (found["steps"], found["test_rows"]) != wanted:
        raise FileExistsError(
            f"{path} has {found['steps']} steps and {found['test_rows']} test rows, not {wanted[0]} and {wanted[1]}; give "
            "another --out, or the settings of that run"
        )


def _finished(settings: RefreshSettings) -> list[dict[str, Any]]:
    """Returns all finished runs of the folder, which must have the steps and test rows of the settings."""
    found = []
    for path in sorted((settings.out / "runs").glob("*.json")):
        found.append(_read(path))
        _check(found[-1], path, settings)
    order = list(MASKS)
    return sorted(found, key=lambda one: (list(TASKS).index(one["task"]), order.index(one["variant"]), one["seed"]))


def _write_summary(records: list[dict[str, Any]], path: pathlib.Path) -> None:
    rows = [
        {"task": one["task"], "variant": one["variant"], "seed": one["seed"], "measure": "accuracy", "of": name,
         "passes": 0.0, "value": value, "test_rows": one["test_rows"]}
        for one in records
        for name, value in one["accuracy"].items()
    ]  # fmt: skip
    found = summarise(rows)
    write_table(path, found)
    for row in found:
        print(f"{row['task']:10} {row['variant']:16} {row['of']:16} {100 * row['mean']:5.1f} %")
    print("wrote", path)


def main(settings: RefreshSettings) -> None:
    """Makes the missing runs, or stores those that are finished, and writes the summary."""
    settings = settings.resolved()
    if settings.store:
        records = _finished(settings)
        if not records:
            raise ValueError(f"{settings.out} has no finished run; start the command without --store first")
        write_file(STORED / RESULT, "".join(json.dumps(one) + "\n" for one in records))
        _write_summary(records, STORED / SUMMARY)
        return
    (settings.out / "runs").mkdir(parents=True, exist_ok=True)
    runs = [
        StudyRun(task, mask, seed)
        for seed in range(settings.seeds)
        for task in settings.tasks
        for mask in settings.masks
    ]
    for run in runs:
        path = settings.out / "runs" / run.file
        with open(path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # Another process makes this run.
            if path.is_file():
                _check(_read(path), path, settings)
            else:
                record = _make(run, settings)
                write_file(path, json.dumps(record) + "\n")
                print(f"{run.task}, {run.variant}, seed {run.seed}: {record['accuracy']}", flush=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
    _write_summary(_finished(settings), settings.out / SUMMARY)


if __name__ == "__main__":
    try:
        main(tyro.cli(RefreshSettings, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
