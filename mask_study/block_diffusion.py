"""Compares block diffusion with one stream, bidirectional attention and an autoregressive model at equal FLOPs.

    python -m mask_study.block_diffusion [--tasks sudoku countdown gsm8k] [--seeds 3] [--out runs/block-diffusion]
    python -m mask_study.block_diffusion --quick

Trains the nano model (856,192 parameters, bytes as tokens) on each task in each way of `ARMS`. A step with two streams
computes more than one with a single stream, so models with two streams get fewer steps: every model of a task has the
FLOPs of the same number of steps with one stream. Each model is measured on test rows by the bound on -log p of an
answer in nats (exact for the autoregressive model and for blocks of one token), and by the share of correct answers:
when one token is written in each pass, and when the answer is written in a quarter of these passes; with larger blocks of
two streams also when the first token of each block is written first.

Each run is a file in OUT/runs. The same command goes on where it was stopped, and several processes may share OUT: each
takes runs that no other process has locked. OUT/summary.csv has means over seeds with 95 % intervals, and differences from
the bidirectional model of the same seed. The exact floors of countdown are printed after them. `--store` copies runs
and summary to docs/study. The models are kept in OUT/models; `--measure-again` trains nothing, and measures those of
finished runs once more. gsm8k needs $DREAM_JAX_ASSETS/data/gsm8k.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import msgspec
import numpy as np
import tyro
from flax import nnx

from dream_jax import masks, sharding
from dream_jax.batch import Batch
from dream_jax.bounds import MOST_ROWS, POSITIVE, IntegerRange, check_numbers
from dream_jax.config import PRESETS
from dream_jax.data import open_source
from dream_jax.evaluation.likelihood import Passage, model_bounds
from dream_jax.files import read_json, typed, write_file
from dream_jax.flops import FlopCounter
from dream_jax.model import Dream, merge_params, split_params
from dream_jax.objective import UniformWeight
from dream_jax.optimizer import OptimizerConfig
from dream_jax.pretrained import load, save
from dream_jax.sampler import EntropyBound, SamplerConfig, generate
from dream_jax.tokenizer import Tokenizer, load_tokenizer
from dream_jax.train_step import StepConfig, init_state, make_train_step, put_batch
from mask_study.adapting import autoregressive_step
from mask_study.floors import floors
from mask_study.runs import differences, summarise, write_table
from mask_study.tasks import TASKS, CountdownTask, Example
from mask_study.training import decode, encode

STORED = pathlib.Path(__file__).resolve().parents[1] / "docs" / "study"
RESULT, SUMMARY = "block_diffusion.jsonl", "block_diffusion.csv"
_LEARNING_RATE = 2e-3  # the default of train.py for random weights
_FIRST = "a token a pass, the first of a block first"
_REMEDY = "remove the file, then the same command makes its run again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train and sample.

    Attributes:
      name: its name in the tables.
      mask: the mask of the trained model.
      size: number of tokens in a block for training with two streams; None for one stream.
      autoregressive: whether all tokens of an answer are learned in every step, from the clean tokens before them.
      block_length: the answer is sampled in blocks of this many tokens; None for one block.
    """

    name: str
    mask: str
    size: int | None = None
    autoregressive: bool = False
    block_length: int | None = None


ARMS = {
    arm.name: arm
    for arm in (
        Arm(name="autoregressive", mask="block-diffusion:1", autoregressive=True, block_length=1),
        Arm(name="bidirectional", mask="bidirectional"),
        *(
            Arm(name=f"two streams, blocks of {size}", mask=f"block-diffusion:{size}", size=size, block_length=size)
            for size in (1, 4, 16)
        ),
        *(
            Arm(name=f"one stream, block-causal:{size}", mask=f"block-causal:{size}", block_length=size)
            for size in (4, 16)
        ),
        Arm(name="one stream, causal", mask="causal", block_length=1),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problems:
    """The rows of a task and the budget of each run.

    Attributes:
      name: the name of the task.
      train, test: prompt and answer of each row as token ids; a run takes the training rows in this order, and begins
        again with the first one after the last one.
      width: number of tokens of a training row, padding on the left included.
      batch: number of rows of a step.
      steps: number of steps with one stream.
      examples: the test rows as text, for the judge of `name`; () if answers are not judged.
    """

    name: str
    train: Sequence[tuple[list[int], list[int]]]
    test: Sequence[tuple[list[int], list[int]]]
    width: int
    batch: int
    steps: int
    examples: Sequence[Example] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockDiffusionSettings:
    """Which models are trained, and how they are measured."""

    tasks: tuple[str, ...] = ("sudoku", "countdown", "gsm8k")
    """sudoku, countdown, gsm8k"""
    arms: tuple[str, ...] = ()
    """names of arms; all by default"""
    seeds: int = 3
    """number of models for each task and arm"""
    length: float = 1.0
    """factor on the number of steps: 600 for sudoku and countdown, 300 for gsm8k"""
    test_rows: int = 256
    """number of test rows, 1 to 1024; a quarter of it for gsm8k"""
    samples: int = 32
    """number of Monte Carlo samples of each bound; an even number, at least 10"""
    out: pathlib.Path = pathlib.Path("runs/block-diffusion")
    """folder of the runs; those that are in it are not made again"""
    quick: bool = False
    """countdown alone, one seed, 3 % of the steps, 16 test rows, and three arms unless others are given"""
    store: bool = False
    """make nothing; copy the finished runs of the tasks, and their summary, to docs/study; other tasks stay there"""
    measure_again: bool = False
    """train nothing; measure the kept models of finished runs again, and replace the measures in the files of the runs"""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            seeds=IntegerRange(1, 1000),
            length=POSITIVE,
            test_rows=IntegerRange(1, 1024),
            samples=IntegerRange(10, MOST_ROWS),
        )
        for kind, asked, known in (("task", self.tasks, _TASKS), ("arm", self.arms, ARMS)):
            for name in asked:
                if name not in known:
                    raise ValueError(f"{kind} {name!r} is not one of: {'; '.join(known)}")
        if self.store and self.measure_again:
            raise ValueError("--store and --measure-again exclude each other; measure first, then store")

    def resolved(self) -> BlockDiffusionSettings:
        """Returns the settings that a quick run stands for."""
        if not self.quick:
            return self
        arms = self.arms or ("autoregressive", "bidirectional", "two streams, blocks of 4")
        changes: dict[str, Any] = {"tasks": ("countdown",), "arms": arms, "seeds": 1, "length": 0.03 * self.length}
        return dataclasses.replace(self, **changes, test_rows=16, samples=10)


def _study_problems(name: str, seed: int, settings: BlockDiffusionSettings) -> Problems:
    task, words = TASKS[name], load_tokenizer("bytes")
    steps, batch = max(1, round(task.steps * settings.length)), 64
    pair = lambda example: (encode(example.prompt, words), encode(example.answer, words))
    examples = task.examples("test", 0, settings.test_rows)
    return Problems(
        name=name,
        train=[pair(one) for one in task.examples("train", seed, steps * batch)],
        test=[pair(one) for one in examples],
        width=task.prompt_width + task.answer_width,
        batch=batch,
        steps=steps,
        examples=examples,
    )


def _gsm8k_problems(name: str, seed: int, settings: BlockDiffusionSettings) -> Problems:
    words, width = load_tokenizer("bytes"), 384

    def rows(split: str) -> Iterator[tuple[list[int], list[int]]]:
        source = open_source("gsm8k", split)
        for index in range(len(source)):
            row = source[index]
            assert not isinstance(row.prompt, str)  # Its rows are chats of one question.
            pair = words.encode(f"{row.prompt[0]['content']}\n"), [*words.encode(row.response), words.eos_id]
            if sum(map(len, pair)) <= width:
                yield pair

    train = list(rows("train"))
    order = np.random.default_rng([seed]).permutation(len(train))
    return Problems(
        name=name,
        train=[train[index] for index in order],
        test=list(rows("test"))[: max(1, settings.test_rows // 4)],
        width=width,
        batch=16,
        steps=max(1, round(300 * settings.length)),
    )


_TASKS = {"sudoku": _study_problems, "countdown": _study_problems, "gsm8k": _gsm8k_problems}


def steps_of(arm: Arm, problems: Problems) -> int:
    """Returns the number of steps that has the FLOPs of `problems.steps` steps with one stream."""
    model = jax.eval_shape(lambda: Dream(PRESETS["nano"], rngs=nnx.Rngs(0)))
    tokens = problems.width * problems.batch
    masked = sum(len(answer) for _, answer in problems.train[: problems.batch]) / 2
    one = FlopCounter(model, problems.width).step(tokens, masked)
    # An autoregressive step learns all tokens of the answers, a step of diffusion half of them on average.
    learned = 2 * masked if arm.autoregressive else masked
    return max(1, round(problems.steps * one / FlopCounter(model, problems.width, arm.size).step(tokens, learned)))


def _batch(problems: Problems, step: int) -> Batch[np.ndarray]:
    rows = [problems.train[(step * problems.batch + row) % len(problems.train)] for row in range(problems.batch)]
    shape = (problems.batch, problems.width)
    tokens_BT, valid_BT, maskable_BT = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (prompt, answer) in enumerate(rows):
        tokens_BT[row, -len(prompt) - len(answer) :] = [*prompt, *answer]
        valid_BT[row, -len(prompt) - len(answer) :] = True
        maskable_BT[row, -len(answer) :] = True
    return Batch(
        tokens_BT=tokens_BT,
        maskable_BT=maskable_BT,
        row_B=np.arange(problems.batch, dtype=np.int32),
        valid_BT=None if valid_BT.all() else valid_BT,
    )


def train(arm: Arm, problems: Problems, seed: int, steps: int) -> tuple[Dream, list[float], float]:
    """Trains a model with random weights.

    Returns:
      The model, the mean nats of a learned token in each twentieth of the training, and the seconds that the training
      took, without its first step, which compiles the program.

    Raises:
      FloatingPointError: a loss is NaN or infinite.
    """
    mesh = sharding.make_mesh("1x1")
    graphdef, params = split_params(jax.jit(lambda: Dream(PRESETS["nano"], rngs=nnx.Rngs(seed)))())
    settings = OptimizerConfig(learning_rate=_LEARNING_RATE, total_steps=steps)
    optimizer = settings.make()
    state = init_state(params, optimizer, mesh)
    if not arm.autoregressive:
        config = StepConfig(
            global_batch=problems.batch,
            weight=UniformWeight(),  # so that every arm minimises the mean nats of a learned token
            seed=seed,
            mask=masks.Bidirectional() if arm.size is not None else masks.parse(arm.mask),
            block_sizes=() if arm.size is None else (arm.size,),
        )
        step = make_train_step(graphdef, optimizer, settings.schedule(), config, mesh)
    nats: list[jax.Array] = []
    begun = 0.0
    for number in range(steps):
        batch = put_batch(_batch(problems, number), mesh)
        if arm.autoregressive:
            state, value = autoregressive_step(graphdef, optimizer, state, batch)
        else:
            state, metrics = step(state, batch)
            value = metrics["nll"]
        nats.append(value)
        if number == 0:
            jax.block_until_ready(nats)
            begun = time.perf_counter()
    found = np.array(jax.device_get(nats))
    seconds = time.perf_counter() - begun
    if not np.isfinite(found).all():
        raise FloatingPointError(f"{problems.name}, {arm.name}, seed {seed}: a loss is not finite")
    model = merge_params(graphdef, state.params)
    model.trained_mask = arm.mask
    return model, [round(float(part.mean()), 5) for part in np.array_split(found, min(20, steps))], seconds


def measure(model: Dream, arm: Arm, problems: Problems, samples: int, seed: int) -> dict[str, float]:
    """Returns the measures of a model by name: mean bounds, and shares of correct answers.

    The bounds are in nats an answer and nats a token, the shares in [0, 1]. A task without a judge has no shares, and
    a model with blocks of one token has no share with fewer passes. Models of two streams with larger blocks have a
    further share, for which the first token of each block is written first: it is predicted from the tokens before its
    block alone.
    """
    words = load_tokenizer("bytes")
    passages = [
        Passage(tokens=np.array([*prompt, *answer]), scored=np.arange(len(prompt) + len(answer)) >= len(prompt))
        for prompt, answer in problems.test
    ]
    seeds = [(seed, number) for number in range(len(passages))]
    nats = [bound.nats for bound in model_bounds(model, words, 64)(passages, samples, seeds)]
    found = {
        "nats an answer": float(np.mean(nats)),
        "nats a token": float(np.sum(nats) / sum(one.num_scored for one in passages)),
    }
    if problems.examples:
        width = len(problems.test[0][1])
        found["a token a pass"] = _accuracy(model, arm, problems, words, commit=EntropyBound(0.0))
        if arm.block_length is None or arm.block_length >= 4:
            found["a quarter of the passes"] = _accuracy(model, arm, problems, words, steps=width // 4)
        if arm.size is not None and arm.size > 1:
            found[_FIRST] = _accuracy(model, arm, problems, words, commit=EntropyBound(0.0), first_token_first=True)
    return found


def _accuracy(model: Dream, arm: Arm, problems: Problems, words: Tokenizer, **options: Any) -> float:
    config = SamplerConfig(
        max_new_tokens=len(problems.test[0][1]),
        alg="entropy",
        block_length=arm.block_length,
        vocab_limit=words.vocab_limit,
        forbidden_tokens=(words.mask_id,),
        **options,
    )
    prompts_BP = np.array([prompt for prompt, _ in problems.test], np.int32)
    tokens_BT = np.asarray(generate(model, prompts_BP, config).tokens)
    answers = [decode(row, words) for row in tokens_BT[:, prompts_BP.shape[1] :]]
    task = TASKS[problems.name]
    return float(np.mean([task.is_right(*pair) for pair in zip(problems.examples, answers, strict=True)]))


def runs(settings: BlockDiffusionSettings) -> list[tuple[str, Arm, int]]:
    """Returns task, arm and seed of each run; all runs of seed 0 come first."""
    arms = [ARMS[name] for name in settings.arms or ARMS]
    return [(task, arm, seed) for seed in range(settings.seeds) for task in settings.tasks for arm in arms]


def file_of(task: str, arm: Arm, seed: int) -> str:
    """Returns the name of the file of a run."""
    return "".join(one if one.isalnum() else "-" for one in f"{task} {arm.name} seed {seed}") + ".json"


def model_of(out: pathlib.Path, task: str, arm: Arm, seed: int) -> pathlib.Path:
    """Returns the directory in which the model of a run is kept."""
    return out / "models" / file_of(task, arm, seed).removesuffix(".json")


def make(task: str, arm: Arm, seed: int, settings: BlockDiffusionSettings) -> dict[str, Any]:
    """Trains and measures one model, and returns its record."""
    problems = _TASKS[task](task, seed, settings)
    steps = steps_of(arm, problems)
    model, nats, seconds = train(arm, problems, seed, steps)
    save(model, model_of(settings.out, task, arm, seed), overwrite=True)
    measured = _measured(model, arm, problems, settings.samples, seed)
    return {
        "task": task,
        "arm": arm.name,
        "seed": seed,
        "steps": steps,
        "batch": problems.batch,
        "test_rows": len(problems.test),
        "length": settings.length,
        "samples": settings.samples,
        "train_seconds": round(seconds, 1),
        "training_nats": nats,
        **measured,
    }


def _measured(model: Dream, arm: Arm, problems: Problems, samples: int, seed: int) -> dict[str, Any]:
    """Returns the measures of a model and the time that they took, as fields of a record."""
    begun = time.perf_counter()
    measured = measure(model, arm, problems, samples, seed)
    return {
        "measure_seconds": round(time.perf_counter() - begun, 1),
        "measured": {name: round(value, 6) for name, value in measured.items()},
    }


def measure_again(path: pathlib.Path, task: str, arm: Arm, seed: int, settings: BlockDiffusionSettings) -> None:
    """Measures the kept model of a finished run again, and replaces the measures in its file `path`.

    Raises:
      FileNotFoundError: the model of the run was not kept.
    """
    directory = model_of(settings.out, task, arm, seed)
    if not directory.is_dir():
        raise FileNotFoundError(f"{path} has no kept model in {directory}; {_REMEDY}")
    problems = _TASKS[task](task, seed, settings)
    record = _read_run(path)
    record |= _measured(load(directory), arm, problems, settings.samples, seed)
    write_file(path, json.dumps(record) + "\n")
    print(f"{task}, {arm.name}, seed {seed}: {record['measured']}", flush=True)


def _check_same(path: pathlib.Path, settings: BlockDiffusionSettings) -> None:
    """Raises FileExistsError if a finished run had other steps, test rows or samples than these settings say."""
    found = _read_run(path)
    rows = settings.test_rows if found["task"] != "gsm8k" else max(1, settings.test_rows // 4)
    if (found["length"], found["test_rows"], found["samples"]) != (settings.length, rows, settings.samples):
        raise FileExistsError(
            f"{path} has a run with the length {found['length']}, {found['test_rows']} test rows and {found['samples']} "
            "samples; give another --out, or the settings of that run"
        )


def summary(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the summary: means, differences from the bidirectional model, and the floors of countdown."""
    rows = [
        {"task": one["task"], "variant": one["arm"], "seed": one["seed"], "measure": _kind(name), "of": name, "passes": 0.0,
         "value": value, "test_rows": one["test_rows"]}
        for one in records
        for name, value in one["measured"].items()
    ]  # fmt: skip
    steps = {(one["task"], one["arm"]): one["steps"] for one in records}
    names = ("seeds", "mean", "low", "high", "interval", "least", "most")
    found = []
    for row in summarise(rows):
        line = {"task": row["task"], "arm": row["variant"], "measure": row["of"], "minus": ""}
        numbers = {name: row[name] for name in names}
        found.append(line | {"steps": steps[row["task"], row["variant"]]} | numbers)
    for row in differences(rows):
        if row["minus"] == "bidirectional":
            line = {"task": row["task"], "arm": row["variant"], "measure": row["of"], "minus": row["minus"]}
            numbers = {name: row[name] for name in names}
            found.append(line | {"steps": steps[row["task"], row["variant"]]} | numbers)
    return found


def _kind(measure: str) -> str:
    return "nll" if measure.startswith("nats") else "accuracy"


def finished(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of all runs in the folder, sorted by task, arm and seed."""
    return _sorted([_read_run(path) for path in sorted((folder / "runs").glob("*.json"))])


class _Record(msgspec.Struct):
    """The entries of the file of a run that are read, with their types."""

    task: str
    arm: str
    seed: int
    steps: int
    test_rows: int
    length: float
    samples: int
    measured: dict[str, float]


def _read_run(path: pathlib.Path) -> dict[str, Any]:
    """Returns the record of a finished run. Raises ValueError if the file is damaged, or is not that of a run."""
    found = read_json(path, _REMEDY)
    needed = {"task", "arm", "seed", "steps", "test_rows", "length", "samples", "measured"}
    if missing := sorted(needed - found.keys()):
        raise ValueError(f"{path} is not the file of a finished run, because it has no {', '.join(missing)}; {_REMEDY}")
    typed(found, _Record, path, _REMEDY)
    if found["task"] not in _TASKS or found["arm"] not in ARMS:
        raise ValueError(
            f"{path} has a run of {found['task']!r:.40}, {found['arm']!r:.80}, which is not known; {_REMEDY}"
        )
    return found


def _sorted(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns records by task, arm and seed."""
    arms = list(ARMS)
    return sorted(records, key=lambda one: (one["task"], arms.index(one["arm"]), one["seed"]))


def write_summary(records: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Writes and prints the summary of the records, which must all have the same settings of their task."""
    rows = summary(records)
    write_table(path, rows)
    for row in rows:
        if not row["minus"]:
            interval = "" if row["low"] != row["low"] else f" [{row['low']:.3f}, {row['high']:.3f}]"
            print(f"{row['task']:10} {row['arm']:30} {row['measure']:24} {row['mean']:8.3f}{interval}")
    if any(row["task"] == "countdown" for row in rows):
        task = TASKS["countdown"]
        assert isinstance(task, CountdownTask)
        number = next(one["test_rows"] for one in records if one["task"] == "countdown")
        for floor in floors(task, number):
            print(f"countdown  floor of {floor['model']:46} {floor['nats_an_answer']:8.3f}")


def main(settings: BlockDiffusionSettings) -> None:
    """Makes the missing runs, or stores or measures again those that are finished, and writes the summary."""
    settings = settings.resolved()
    folder = settings.out / "runs"
    if settings.store:
        records = [one for one in finished(settings.out) if one["task"] in settings.tasks]
        if not records:
            asked = ", ".join(settings.tasks)
            raise ValueError(f"{settings.out} has no finished run of {asked}; start the command without --store first")
        stored = STORED / RESULT
        before = (
            [json.loads(line) for line in stored.read_text(encoding="utf-8").splitlines()] if stored.is_file() else []
        )
        records = _sorted([*records, *(one for one in before if one["task"] not in settings.tasks)])
        write_file(stored, "".join(json.dumps(one) + "\n" for one in records))
        write_summary(records, STORED / SUMMARY)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for task, arm, seed in runs(settings):
        path = folder / file_of(task, arm, seed)
        with open(path.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # Another process makes this run.
            if path.is_file():
                _check_same(path, settings)
                if settings.measure_again:
                    measure_again(path, task, arm, seed, settings)
            elif not settings.measure_again:
                record = make(task, arm, seed, settings)
                write_file(path, json.dumps(record) + "\n")
                print(f"{task}, {arm.name}, seed {seed}: {record['steps']} steps in {record['train_seconds']:.0f} s, "
                      f"measured in {record['measure_seconds']:.0f} s: {record['measured']}", flush=True)  # fmt: skip
            path.with_suffix(".lock").unlink(missing_ok=True)
    write_summary(finished(settings.out), settings.out / "summary.csv")


if __name__ == "__main__":
    try:
        main(tyro.cli(BlockDiffusionSettings, description=__doc__))
    except (FloatingPointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
