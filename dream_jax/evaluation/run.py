"""Runs one evaluation: reads all files, plans the batches, computes the rows of each batch and writes the results.

`Work` describes which problems of a task are computed together, and how. Reading the weights takes long, so all files
are checked before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from dream_jax import pretrained
from dream_jax.bounds import check_answers
from dream_jax.evaluation import likelihood, report
from dream_jax.evaluation.ledger import ITEMS, SECONDS, SETTINGS, Ledger, WorkUnit
from dream_jax.evaluation.progress import watch
from dream_jax.evaluation.scored_texts import Choice, ScoredText, read_choices, read_texts
from dream_jax.evaluation.settings import PUBLISHED, EvaluateSettings
from dream_jax.evaluation.tasks import TASKS, TaskFormat, read_problems, split_examples
from dream_jax.files import write_file
from dream_jax.inference import PreparedModel, answer, batches, check_length, encode_prompt, prepare, sampler_recipe
from dream_jax.model import Dream
from dream_jax.paths import check_apart, check_replaceable, claimed, is_json_object
from dream_jax.row_file import JsonRow
from dream_jax.sampler import bucket_length
from dream_jax.sampler.loop import num_programs
from dream_jax.tokenizer import ByteTokenizer, Template, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The problems of a task, divided into batches, and the function that computes them.

    Attributes:
      numbers: the number of each problem (`Problem.number`); its rows have this number.
      batches: for each batch, the indices of its problems, which are computed together.
      shapes: for each batch, its length in tokens, padding included; batches of one length use the same
        compiled program.
      compute: function from a model and a unit to one row for each problem of the unit.
      recipe: the settings that the rows depend on, except those of the model and of the file.
      note: text that is printed when the evaluation starts.
    """

    numbers: Sequence[int]
    batches: Sequence[tuple[int, ...]]
    shapes: Sequence[int]
    compute: Callable[[Dream, WorkUnit], list[JsonRow]]
    recipe: Mapping[str, Any]
    note: str


def evaluate(settings: EvaluateSettings, console: Console | None = None) -> report.Summary:
    """Runs an evaluation or resumes one, writes its results into `settings.folder`, and returns their summary.

    Progress is printed to `console`, by default the terminal.

    Raises: ValueError if settings or files are wrong, or if the folder has results of other settings; FileExistsError
      if the folder has files of other programs with the names of the results; BlockingIOError if another process writes
      into it; OSError if a file cannot be read or written.
    """
    console = console or Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    prepared = _prepare(settings)
    if settings.instruction is None and prepared.instruction:
        settings = _with_instruction(settings, prepared.instruction)
    fsdp = prepared.mesh.shape["fsdp"]
    if settings.batch_size % fsdp:
        raise ValueError(
            f"batch_size={settings.batch_size} must be a multiple of {fsdp}, the number of devices that share a batch"
        )
    work = plan_work(settings, prepared.template, prepared.model, prepared.tokenizer)
    check_answers("seeds", settings.seeds, len(work.numbers))
    plan = [
        WorkUnit(seed=seed, problems=batch, names=tuple((seed, work.numbers[index]) for index in batch))
        for seed in range(settings.seeds)
        for batch in work.batches
    ]
    recipe = {
        "model": settings.model,
        "weights": pretrained.fingerprint(settings.model),
        "adapter": settings.adapter,
        "adapter_weights": None if settings.adapter is None else pretrained.fingerprint(settings.adapter),
        "base": settings.base,
        "dtype": prepared.dtype,
        "task": settings.task,
        "file": None if settings.file is None else _digest(settings.file),
        "limit": settings.limit,
        "tokenizer": None if settings.tokenizer in (None, "bytes") else pretrained.fingerprint(settings.tokenizer),
        "template": prepared.template,
        "mask": settings.mask,
        "batch_size": settings.batch_size,
        **work.recipe,
    }
    if settings.ignore_field:
        recipe["ignore_field"] = sorted(settings.ignore_field)
    _check_folder(settings)
    settings.folder.mkdir(parents=True, exist_ok=True)
    with claimed(settings.folder):
        ledger = Ledger(settings.folder, recipe, plan, overwrite=settings.overwrite)
        report.check_rows(settings.folder, settings.task, ledger.rows, ledger.seconds)
        if prepared.note is not None:
            console.print(prepared.note, markup=False)
        return _evaluate(settings, prepared, work, plan, ledger, console)


def _check_folder(settings: EvaluateSettings) -> None:
    """Raises FileExistsError or ValueError if the folder has files of others whose names are those of the results."""
    folder, rows = settings.folder, [settings.folder / name for name in (ITEMS, SECONDS)]
    check_replaceable(folder / SETTINGS, "a file of settings of evaluate.py", is_json_object("task", "model"))
    others = [folder / name for name in (report.SUMMARY, report.TABLE, report.FIGURE)]
    if not (folder / SETTINGS).is_file():
        for path in (*rows, *others):
            check_replaceable(path, f"a result of an evaluation (there is no {SETTINGS} beside it)", lambda _: False)
    if settings.overwrite:
        for path in (folder / SETTINGS, *rows):
            reads = (settings.file, settings.examples, settings.model, settings.adapter, settings.tokenizer)
            check_apart(path, reads, "give another --out", lies_in=False)


def _evaluate(
    settings: EvaluateSettings,
    prepared: PreparedModel,
    work: Work,
    plan: Sequence[WorkUnit],
    ledger: Ledger,
    console: Console,
) -> report.Summary:
    """Computes the missing rows of a claimed folder, writes the results, and returns their summary."""
    console.print(
        f"{settings.task}: {len(work.numbers)} problems x {settings.seeds} seed(s), {work.note}", markup=False
    )
    if ledger.done:
        console.print(f"{len(ledger.rows)} of {len(work.numbers) * settings.seeds} rows are there already")
    if ledger.done < len(plan):
        _compute(work, plan, ledger, prepared.load(), console)
    summary = report.summarize(settings.task, ledger.rows, ledger.seconds)
    write_file(settings.folder / report.SUMMARY, summary.to_json())
    write_file(settings.folder / report.TABLE, summary.to_markdown(settings.model))
    if settings.figure:
        report.draw(settings.folder)
    console.print(summary.to_markdown(settings.model), markup=False)
    console.print(f"wrote {settings.folder}: items.jsonl, {report.SUMMARY}, {report.TABLE}", markup=False)
    return summary


def _with_instruction(settings: EvaluateSettings, trained: str) -> EvaluateSettings:
    """Returns the settings with the instruction for a model that was trained with the instruction `trained`.

    The task likelihood has no instructions: its settings are returned as they are.
    """
    if settings.task == "likelihood":
        return settings
    if settings.task == "choice":
        return dataclasses.replace(settings, instruction=trained)
    return dataclasses.replace(settings, instruction=TASKS[settings.task].instruction_after(trained))


def _compute(work: Work, plan: Sequence[WorkUnit], ledger: Ledger, model: Dream, console: Console) -> None:
    seen: set[int] = set()
    with watch(console, total=sum(len(unit.names) for unit in plan), done=len(ledger.rows)) as advance:
        for index in range(ledger.done, len(plan)):
            shape = work.shapes[index % len(work.batches)]
            begun, programs = time.monotonic(), num_programs()
            rows = work.compute(model, plan[index])
            seconds = time.monotonic() - begun
            # The report leaves batches in which a program was compiled out of the speed: the first one of a shape, and one
            # in which a canvas grew (`sampler.growth`) to a length that no earlier batch had.
            compiled = shape not in seen or num_programs() > programs
            timed = {"rows": len(rows), "seconds": round(seconds, 4), "compiled": compiled}
            seen.add(shape)
            ledger.append(rows, timed)
            advance(len(rows), ledger.rows)


def plan_work(settings: EvaluateSettings, template: Template, model: Dream, tokenizer: Tokenizer) -> Work:
    """Reads and checks the files of the task and returns its batches; `model` may be without weights.

    Raises: ValueError for a bad row or setting, or a prompt that is too long; FileNotFoundError for a missing file.
    """
    if settings.task == "choice" or settings.task == "likelihood":
        return _scored(settings, template, model, tokenizer)
    return _sampled(settings, TASKS[settings.task], template, model, tokenizer)


def _sampled(
    settings: EvaluateSettings, task: TaskFormat, template: Template, model: Dream, tokenizer: Tokenizer
) -> Work:
    shots = settings.shots
    if shots is None:
        # Byte-level models are trained without examples, and examples with a token for each byte fill their context.
        shots = 0 if isinstance(tokenizer, ByteTokenizer) else task.shots[template]
    problems = read_problems(task, settings.file, settings.ignore_field)
    examples, problems = split_examples(task, problems, settings.file, settings.examples, shots, settings.ignore_field)
    problems = problems[: settings.limit]
    bare = template == "raw" and not examples and task.bare is not None
    if bare and settings.instruction and any(isinstance(problem.question, str) for problem in problems):
        raise ValueError(
            f"--instruction has no place in raw prompts of the task {task.name} without examples, which are the question "
            "alone; leave it out, or ask with --template chat"
        )
    config = settings.sampler_config(tokenizer, settings.max_new_tokens or task.max_new_tokens, model.trained_mask)
    prompts = []
    for problem in problems:
        prompt = task.prompt(problem, examples, template, settings.instruction)
        try:
            ids = encode_prompt(prompt, template, tokenizer, tools=problem.tools)
        except ValueError as error:
            raise ValueError(f"{problem.where}: {error}") from error
        check_length(ids, config.max_new_tokens, model, problem.where, remedy="fewer --shots")
        prompts.append(ids)

    def compute(model: Dream, unit: WorkUnit) -> list[JsonRow]:
        asked = [prompts[index] for index in unit.problems]
        rows = []
        for index, one in zip(
            unit.problems, answer(model, tokenizer, asked, unit.names, config, settings.batch_size), strict=True
        ):
            problem = problems[index]
            verdict = problem.judge(task.cut(one.text, template))
            rows.append(
                {"seed": unit.seed, "number": problem.number, "identity": problem.identity}
                | dataclasses.asdict(verdict)
                | {
                    "answer": one.text,
                    "tokens_to_end": one.tokens_to_end,
                    "room": len(one.tokens),
                    "forwards": one.forwards,
                }
            )
        return rows

    found = batches([len(ids) for ids in prompts], settings.batch_size)
    note = f"{shots} example(s), {template} prompts of {min(map(len, prompts))}..{max(map(len, prompts))} tokens"
    if settings.seeds > 1 and not config.is_random:
        note += "; the sampler is deterministic, so more seeds only test whether the device repeats its results"
    return Work(
        numbers=[problem.number for problem in problems],
        batches=found,
        shapes=[bucket_length(max(len(prompts[index]) for index in batch)) for batch in found],
        compute=compute,
        recipe={
            "shots": shots,
            "examples": [one.identity for one in examples],
            "instruction": settings.instruction,
            "sampler": sampler_recipe(config, prompts, tokenizer),
        },
        note=note,
    )


def _scored(settings: EvaluateSettings, template: Template, model: Dream, tokenizer: Tokenizer) -> Work:
    assert settings.file is not None
    likelihood.check_mask(model)
    problems: list[Choice | ScoredText] = []
    read = read_choices if settings.task == "choice" else read_texts
    problems += read(settings.file, settings.ignore_field)
    problems = problems[: settings.limit]
    passages = [one.passages(tokenizer, template, settings.instruction or "") for one in problems]
    for one, found in zip(problems, passages, strict=True):
        for passage in found:
            check_length(passage.tokens.tolist(), 0, model, one.where)

    def compute(model: Dream, unit: WorkUnit) -> list[JsonRow]:
        (index,) = unit.problems
        one, found = problems[index], passages[index]
        bounds_of = likelihood.model_bounds(model, tokenizer, settings.batch_size)
        bounds = bounds_of(found, settings.samples, one.seeds(unit.seed))
        return [{"seed": unit.seed, "number": one.number, **one.row(found, bounds)}]

    return Work(
        numbers=[one.number for one in problems],
        batches=[(index,) for index in range(len(problems))],
        shapes=[max(bucket_length(len(passage.tokens)) for passage in found) for found in passages],
        compute=compute,
        recipe={"samples": settings.samples} | ({"instruction": settings.instruction} if settings.instruction else {}),
        note=f"{settings.samples} samples a {'choice' if settings.task == 'choice' else 'text'}",
    )


def _prepare(settings: EvaluateSettings) -> PreparedModel:
    if settings.template == "auto" and settings.published is not None:
        settings = dataclasses.replace(settings, template=PUBLISHED[settings.published][0])
    # The published evaluations of planning use no chat template, neither for base nor for instruct models.
    return prepare(settings, default_template="raw" if settings.task in ("sudoku", "countdown") else None)


def _digest(path: pathlib.Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
