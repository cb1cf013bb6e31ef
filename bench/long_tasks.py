"""Compares settings of the sampler on problems with long answers: accuracy against exact sampling, and work.

    python bench/long_tasks.py [--out runs/long-tasks] [--seeds 3] [--problems 512]
    python bench/long_tasks.py --quick --out runs/long-tasks-quick --results runs/long-tasks-quick.json

For each task of docs/long_tasks.md and each seed a model is trained: first on the short problems, then on the long ones.
Then every setting of the sampler answers the same held-out problems. An answer counts only if all of it is right. The
difference of each setting from exact sampling is paired by problem, with its 95 % interval.

The work is that of Dream-7B with 512 + 512 tokens at batch 1 and 16, by the formula `dream_jax.flops.pass_work`: the passes
of each kind are counted while the small models answer, and multiplied as if an answer had 512 tokens. The least time is
that of an H200: for each pass the larger one of its operations and its bytes at the rates of the data sheet.

The problems have two halves. For each preset, the setting with the least work within the limits is chosen on the first
half, and its numbers are those of the second half.

Models and answers are kept in OUT, and the same command goes on where it was stopped; more problems are added to those that
are answered. The results are written to --results after each task of each seed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import long_task_work as work
import msgspec
import numpy as np
import report
import rewards
import tyro
from long_task_settings import EXACT, TODAY, sampler_settings
from long_task_work import BATCH

from dream_jax import pretrained
from dream_jax.bounds import POSITIVE, IntegerRange, check_numbers
from dream_jax.data.long_tasks import LONG_TASKS
from dream_jax.evaluation.statistics import paired
from dream_jax.files import read_json, typed, write_json
from dream_jax.inference import read_answer
from dream_jax.judges.long_tasks import judge_chain, judge_route
from dream_jax.judges.verdict import Verdict
from dream_jax.model import Dream
from dream_jax.sampler import Sample, SamplerConfig, bucket_length, generate
from dream_jax.tokenizer import ByteTokenizer
from dream_jax.trainer import TrainSettings, train

TaskName = Literal["chain", "route"]
JUDGES: Mapping[str, Callable[[str, str], Verdict]] = {"chain": judge_chain, "route": judge_route}
GROUP = 2 * BATCH  # a batch of the first half of the problems, and one of the second
HALVES = ("choosing", "reporting")
SOLVED = 0.9
"""The share of problems that exact sampling must solve, so that a setting can lose something."""

LIMITS: Mapping[str, tuple[float, float | None]] = {"balanced": (0.5, 1.0), "fast": (2.0, None)}
"""How many points a preset may be below exact sampling, and its interval on the half where it is chosen; None: any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongTaskSettings:
    """The models, the problems and the folders of the comparison."""

    out: pathlib.Path = pathlib.Path("runs/long-tasks")
    """folder of the models and answers; what is in it is not made again"""
    results: pathlib.Path = report.RESULTS / "long_tasks.json"
    """file of the results"""
    tasks: tuple[TaskName, ...] = ("chain", "route")
    """the tasks"""
    seeds: int = 3
    """number of models of each task"""
    problems: int = 512
    """number of problems that every setting answers, a multiple of 32"""
    samplers: tuple[str, ...] = ()
    """names of the settings of the sampler to compare with exact sampling; by default all (--list prints them)"""
    model: str = "nano"
    """the model: a preset, or a directory with random weights of another size"""
    short_steps: int = 3000
    """number of steps on the short problems, with 64 of them in each"""
    steps: int = 2000
    """number of steps on the long problems, with 16 of them in each"""
    short_rate: float = 2e-3
    """peak learning rate on the short problems"""
    rate: float = 1e-3
    """peak learning rate on the long problems"""
    only_train: bool = False
    """train the models, and answer nothing"""
    list: bool = False
    """print the settings of the sampler, and do nothing else"""
    quick: bool = False
    """for a test of the command: two steps on the short problems, which are also asked, 32 of them, one seed, and only the
    presets of 0.2"""

    def __post_init__(self) -> None:
        several = IntegerRange(1)
        check_numbers(
            self,
            seeds=several,
            problems=several,
            short_steps=several,
            steps=several,
            short_rate=POSITIVE,
            rate=POSITIVE,
        )
        if self.problems % GROUP:
            raise ValueError(
                f"{self.problems=} must be a multiple of {GROUP}: each half is answered in batches of {BATCH}"
            )
        for task in self.tasks:
            if task not in get_args(TaskName):
                raise ValueError(f"task {task!r} is not one of {get_args(TaskName)}")
        known = list(sampler_settings(BATCH * 2))
        for name in self.samplers:
            if name not in known:
                raise ValueError(f"{name!r} of --samplers is not one of: {'; '.join(known)}")

    def resolved(self) -> LongTaskSettings:
        """Returns the settings that a quick run stands for."""
        if not self.quick:
            return self
        few: dict[str, Any] = {"seeds": 1, "problems": GROUP, "short_steps": 2, "steps": 2}
        return dataclasses.replace(self, **few, samplers=self.samplers or tuple(TODAY.values()))

    def asked_of(self, task: str) -> str:
        """Returns the name of the problems of a task in `LONG_TASKS` that the settings are compared on."""
        return f"{task}-short" if self.quick else task

    @property
    def training(self) -> dict[str, Any]:
        """What the models depend on; a folder has models of the same values only."""
        names = ("model", "short_steps", "steps", "short_rate", "rate", "quick")
        return {name: getattr(self, name) for name in names}


def trained_model(settings: LongTaskSettings, task: str, seed: int) -> pathlib.Path:
    """Returns the directory of the model of a task and a seed; trains it if it is not there."""
    folder = settings.out / "models" / f"{task}-{seed}"
    found = settings.model
    stages = [(f"{task}-short", 64, settings.short_steps, settings.short_rate)]
    if not settings.quick:
        stages.append((task, BATCH, settings.steps, settings.rate))
    for data, rows, steps, rate in stages:
        out = folder / data
        if not (out / "summary.json").is_file():
            size = LONG_TASKS[data]
            # The end tokens behind an answer are learned too, because the sampler has masks there.
            prompt = len(ByteTokenizer().encode(str(size.source("train")[0].prompt)))
            train(
                TrainSettings.flat(
                    model=found,
                    tokenizer="bytes",
                    data=data,
                    max_length=prompt + size.new_tokens,
                    batch_size=rows,
                    steps=steps,
                    learning_rate=rate,
                    seed=seed,
                    out=out,
                    samples=0,
                    eval_rows=GROUP,
                    eval_tokens=0,  # `long_tasks.py` measures the accuracy
                )
            )
        found = str(out / "model")
    return pathlib.Path(found)


class AskedProblems(NamedTuple):
    """The problems of a task, which are the same for every model and every setting.

    Attributes:
      judge: judges the text of an answer to the text of a problem.
      prompts: int32 [problems, P], the tokens of the prompts.
      problems: the text of each problem.
      new_tokens: number of tokens that an answer is sampled with.
    """

    judge: Callable[[str, str], Verdict]
    prompts: np.ndarray
    problems: Sequence[str]
    new_tokens: int

    @classmethod
    def of(cls, name: str, number: int) -> AskedProblems:
        """Returns the first held-out problems of this name in `LONG_TASKS`."""
        source, words = LONG_TASKS[name].source("test", size=number), ByteTokenizer()
        texts = [str(source[index].prompt) for index in range(number)]
        prompts = np.array([words.encode(text) for text in texts], np.int32)
        return cls(JUDGES[LONG_TASKS[name].make.kind], prompts, texts, LONG_TASKS[name].new_tokens)

    @property
    def canvas_prompt(self) -> int:
        """The number of tokens before the new ones, with the padding that `generate` adds."""
        return bucket_length(self.prompts.shape[1])


def right_answers(asked: AskedProblems, begin: int, sample: Sample) -> list[bool]:
    """Returns whether each answer of a batch is right; `begin` is the number of its first problem."""
    tokens, steps, words = np.asarray(sample.tokens), np.asarray(sample.commit_step), ByteTokenizer()
    found = []
    for row, problem in enumerate(asked.problems[begin : begin + len(tokens)]):
        text = read_answer(words, asked.prompts[begin + row], tokens[row], steps[row], 0).text
        found.append(asked.judge(problem, text).correct)
    return found


class _StoredBatch(msgspec.Struct):
    """The entries of a batch, as `CountedPasses.plain` returns them."""

    answers: int
    predicted: int
    kinds: list[tuple[str, int, int, int, int, int]]


class _Stored(msgspec.Struct):
    """The entries of a file of answers, with their types."""

    settings: str
    right: list[bool]
    batches: list[_StoredBatch]


_REMEDY = "remove the file, then the same command answers its problems again"


def answers_of(path: pathlib.Path, model: Dream, asked: AskedProblems, config: SamplerConfig) -> dict[str, Any]:
    """Returns which answers of a model are right under some settings, and the passes of each batch.

    The file at `path` is written after each batch, and answers in it are not made again.

    Raises:
      ValueError: the file is damaged, or has answers of other settings.
    """
    shown = work.short_repr(config)
    found: dict[str, Any] = {"settings": shown, "right": [], "batches": []}
    if path.is_file():
        found = read_json(path, _REMEDY)
        typed(found, _Stored, path, _REMEDY)
        if len(found["right"]) != BATCH * len(found["batches"]):
            raise ValueError(f"{path} has {len(found['right'])} answers and {len(found['batches'])} batches; {_REMEDY}")
    if found["settings"] != shown:
        raise ValueError(
            f"{path} has answers of other settings ({found['settings']}; now {shown}): remove it, or give another --out"
        )
    for begin in range(len(found["right"]), len(asked.problems), BATCH):
        sample = generate(model, asked.prompts[begin : begin + BATCH], config)
        found["right"] += right_answers(asked, begin, sample)
        found["batches"].append(work.CountedPasses.of(sample).plain())
        write_json(path, found)
    number = len(asked.problems)
    return found | {"right": found["right"][:number], "batches": found["batches"][: number // BATCH]}


def half_of(scores: np.ndarray, half: str) -> np.ndarray:
    """Returns the scores [problems, seeds] of one of `HALVES`: those of every second batch."""
    number = np.arange(len(scores)) // BATCH % 2
    return scores[number == HALVES.index(half)]


def compared(exact: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Returns the accuracy of scores [problems, seeds], and the paired difference from exact sampling in points."""
    found = paired(exact, scores)
    points = lambda value: round(100 * value, 3)
    return {
        "accuracy": round(float(scores.mean()), 4),
        "difference": points(found.difference),
        "interval": [points(end) for end in found.interval],
        "gained": found.gained,
        "lost": found.lost,
        "problems": len(scores),
    }


def summary(
    settings: LongTaskSettings, found: Mapping[tuple[str, int], Mapping[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Returns the results of all finished tasks and seeds.

    `found` has, for each task and seed, the answers of each setting, as `answers_of` returns them.
    """
    tasks = list(dict.fromkeys(task for task, _ in found))
    names = list(next(iter(found.values())))
    scores = {
        (task, name): np.array([one[name]["right"] for key, one in found.items() if key[0] == task], float).T
        for task in tasks
        for name in names
    }
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name, "settings": next(iter(found.values()))[name]["settings"]}
        for task in tasks:
            row[task] = compared(scores[task, EXACT], scores[task, name])
        if len({scores[task, name].shape[1] for task in tasks}) == 1:
            for half in HALVES:
                both = [np.concatenate([half_of(scores[task, one], half) for task in tasks]) for one in (EXACT, name)]
                row[half] = compared(*both)
        row |= measured_work(settings, found, name)
        rows.append(row)
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        for today in set(TODAY.values()) & by_name.keys():
            row[f"share of {today}"] = {batch: round(share, 4) for batch, share in shares(row, by_name[today]).items()}
    return {
        "about": "accuracy of settings of the sampler on problems with long answers, and their work for Dream-7B",
        "date": report.now(),
        "hardware": report.hardware(),
        "versions": report.versions(("jax", "jaxlib", "flax")),
        "training": settings.training,
        "models": [f"{task}, seed {seed}" for task, seed in found],
        "solved by exact sampling": {task: round(float(scores[task, EXACT].mean()), 4) for task in tasks},
        "settings": rows,
        "presets": {name: chosen(name, rows) for name in LIMITS if all(half in row for half in HALVES for row in rows)},
    }


def measured_work(
    settings: LongTaskSettings, found: Mapping[tuple[str, int], Mapping[str, dict[str, Any]]], name: str
) -> dict[str, Any]:
    """Returns the passes and computed tokens of an answer, and its work for Dream-7B; means over tasks and seeds."""
    rows = []
    for (task, _), answers in found.items():
        asked, passes = AskedProblems.of(settings.asked_of(task), 1), work.total_of(answers[name]["batches"])
        config, prompt = sampler_settings(asked.new_tokens)[name], asked.canvas_prompt
        at = {f"B={batch}": work.work_7b(config, passes, prompt, batch=batch) for batch in (1, BATCH)}
        rows.append((passes.passes, passes.computed_tokens, at))
    mean = lambda values: float(np.mean(list(values)))
    return {
        "passes": round(mean(row[0] for row in rows), 2),
        "computed_tokens": round(mean(row[1] for row in rows), 1),
        "dream_7b": {
            batch: {kind: float(f"{mean(row[2][batch][kind] for row in rows):.5g}") for kind in rows[0][2][batch]}
            for batch in rows[0][2]
        },
    }


def shares(row: Mapping[str, Any], today: Mapping[str, Any]) -> dict[str, float]:
    """Returns the least time of a setting as a share of that of another one, at each batch."""
    return {batch: one["seconds"] / today["dream_7b"][batch]["seconds"] for batch, one in row["dream_7b"].items()}


def chosen(preset: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns the setting with the least work within the limits of a preset, and its numbers on the other half.

    The work is the geometric mean of the least times at both batches. The result is None if no setting is within them.
    """
    points, widest = LIMITS[preset]
    within = [
        row
        for row in rows
        if row["name"] != EXACT
        and row["choosing"]["difference"] >= -points
        and (widest is None or row["choosing"]["interval"][0] >= -widest)
    ]
    if not within:
        return None
    best = min(within, key=lambda row: np.prod([one["seconds"] for one in row["dream_7b"].values()]))
    return {"name": best["name"], **best["reporting"], "share": best.get(f"share of {TODAY[preset]}")}


def print_table(results: Mapping[str, Any]) -> None:
    """Prints a line for each setting."""
    for row in results["settings"]:
        half = row.get("reporting")
        low, high = (0.0, 0.0) if half is None else half["interval"]
        difference = "" if half is None else f"{half['difference']:+7.2f} [{low:+.2f}, {high:+.2f}]"
        times = "  ".join(f"{batch} {one['seconds']:8.3f} s" for batch, one in row["dream_7b"].items())
        print(f"{row['name']:52} {difference:24} {row['passes']:7.1f} passes  {times}")
    for name, one in results["presets"].items():
        print(f"{name}: {'no setting is within the limits' if one is None else one}")
    for task, share in results["solved by exact sampling"].items():
        if share < SOLVED:
            print(f"warning: exact sampling solves {share:.1%} of {task}, less than {SOLVED:.0%}: train longer")


def main() -> int:
    """Makes what is missing, and writes the results after each task of each seed."""
    settings = tyro.cli(LongTaskSettings, description=__doc__).resolved()
    words = ByteTokenizer()
    options = {"vocab_limit": words.vocab_limit, "forbidden_tokens": (words.mask_id,)}
    if settings.list:
        for name, config in sampler_settings(256).items():
            print(f"{name}: {work.short_repr(config)}")
        return 0
    rewards.check_settings(settings.out / "settings.json", settings.training)
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for seed in range(settings.seeds):
        for task in settings.tasks:
            model_dir = trained_model(settings, task, seed)
            if settings.only_train:
                continue
            asked = AskedProblems.of(settings.asked_of(task), settings.problems)
            model = pretrained.load(str(model_dir))
            folder = settings.out / "answers" / f"{task}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            answers = {}
            for name, config in sampler_settings(asked.new_tokens, **options).items():
                if settings.samplers and name not in (EXACT, *settings.samplers):
                    continue
                answers[name] = answers_of(folder / f"{name}.json", model, asked, config)
                right = np.mean(answers[name]["right"])
                print(f"{task}, seed {seed}, {name}: {right:.1%} of {len(asked.problems)} are right", flush=True)
            found[task, seed] = answers
            results = summary(settings, found)
            report.write_json(settings.results, results)
    if found:
        print_table(results)
        print(f"wrote {settings.results}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
