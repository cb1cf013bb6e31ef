"""One evaluation from settings to results: read everything, plan the batches, compute, report.

The work of a task is a `Work`: which problems are computed together, and how. Whatever can be wrong with files shows before
the weights are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console

from dream_jax import pretrained
from dream_jax.evaluation import answering, likelihood, report
from dream_jax.evaluation.ledger import Ledger, Row, Unit, write_whole
from dream_jax.evaluation.problems import identify
from dream_jax.evaluation.progress import watch
from dream_jax.evaluation.scored_texts import likeliest, read_choices, read_texts
from dream_jax.evaluation.settings import PUBLISHED, EvaluateSettings
from dream_jax.evaluation.tasks import TASKS, Task, read_problems, split_examples
from dream_jax.model import Dream
from dream_jax.sampler import bucket_length
from dream_jax.sharding import make_mesh
from dream_jax.tokenizer import ByteTokenizer, Template, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a task is to this room.

    Attributes:
      numbers: the number of each problem, which names its rows.
      batches: places of problems that are computed together.
      shapes: of each batch; batches of one shape share a compiled program.
      compute: a row for each problem of a unit.
      recipe: what the rows depend on, beside the model and the file.
      note: said at the start.
    """

    numbers: Sequence[int]
    batches: Sequence[tuple[int, ...]]
    shapes: Sequence[int]
    compute: Callable[[Dream, Unit], list[Row]]
    recipe: Mapping[str, Any]
    note: str


def evaluate(settings: EvaluateSettings, console: Console | None = None) -> report.Summary:
    """Evaluates, or goes on evaluating; returns the summary that is written beside the rows.

    Raises: ValueError for settings, files or folders that are wrong; OSError.
    """
    console = Console(highlight=False, soft_wrap=True) if console is None else console
    mesh = make_mesh(settings.mesh)
    fsdp = mesh.shape["fsdp"]
    if settings.batch_size % fsdp:
        raise ValueError(
            f"batch_size={settings.batch_size} must be a multiple of the {fsdp} devices that share a batch"
        )
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    abstract = pretrained.describe(settings.model)
    if settings.adapter is not None:
        pretrained.describe_adapter(settings.adapter).check_fits(abstract)
    if settings.mask is not None:
        abstract.trained_mask = settings.mask
    tokenizer = pretrained.find_tokenizer(settings.tokenizer, settings.model, abstract)
    template = find_template(settings, abstract, tokenizer)
    work = plan_work(settings, template, abstract, tokenizer)
    plan = [
        Unit(seed=seed, problems=part, names=tuple((seed, work.numbers[place]) for place in part))
        for seed in range(settings.seeds)
        for part in work.batches
    ]
    recipe = {
        "model": settings.model,
        "weights": pretrained.fingerprint(settings.model),
        "adapter": settings.adapter,
        "adapter_weights": None if settings.adapter is None else pretrained.fingerprint(settings.adapter),
        "base": settings.base,
        "dtype": dtype,
        "task": settings.task,
        "file": None if settings.file is None else _digest(settings.file),
        "limit": settings.limit,
        "tokenizer": None if settings.tokenizer in (None, "bytes") else pretrained.fingerprint(settings.tokenizer),
        "template": template,
        "mask": settings.mask,
        "batch_size": settings.batch_size,
        **work.recipe,
    }
    ledger = Ledger(settings.folder, recipe, plan, overwrite=settings.overwrite)
    console.print(
        f"{settings.task}: {len(work.numbers)} problems x {settings.seeds} seed(s), {work.note}", markup=False
    )
    if ledger.done:
        console.print(f"{len(ledger.rows)} of {len(work.numbers) * settings.seeds} rows are there already")
    if ledger.done < len(plan):
        base = None if settings.base == "auto" else settings.base
        model = pretrained.load(
            settings.model,
            dtype=dtype,
            mesh=mesh,
            attention_backend=settings.attention,
            base=base,
            adapter=settings.adapter,
            any_base=settings.any_base,
        )
        # As one matrix it is faster; codes cannot hold the sum.
        if base is None:
            model = pretrained.merge_adapter(model)
        if settings.mask is not None:
            model.trained_mask = settings.mask
        _compute(work, plan, ledger, model, console)
    summary = report.summarize(settings.task, ledger.rows, ledger.seconds)
    write_whole(settings.folder / report.SUMMARY, summary.to_json())
    write_whole(settings.folder / report.TABLE, summary.to_markdown(settings.model))
    if settings.figure:
        report.draw(settings.folder)
    console.print(summary.to_markdown(settings.model), markup=False)
    console.print(f"wrote {settings.folder}: items.jsonl, {report.SUMMARY}, {report.TABLE}", markup=False)
    return summary


def _compute(work: Work, plan: Sequence[Unit], ledger: Ledger, model: Dream, console: Console) -> None:
    seen: set[int] = set()
    with watch(console, total=sum(len(unit.names) for unit in plan), done=len(ledger.rows)) as advance:
        for index in range(ledger.done, len(plan)):
            shape = work.shapes[index % len(work.batches)]
            begun = time.monotonic()
            rows = work.compute(model, plan[index])
            seconds = time.monotonic() - begun
            # The first batch of a shape compiles its program: its time says little about speed.
            timed = {"rows": len(rows), "seconds": round(seconds, 4), "compiled": shape not in seen}
            seen.add(shape)
            ledger.append(rows, timed)
            advance(len(rows), ledger.rows)


def plan_work(settings: EvaluateSettings, template: Template, model: Dream, tokenizer: Tokenizer) -> Work:
    """The work of the settings' task, its files read and checked; `model` needs no weights."""
    if settings.task == "choice":
        return _choices(settings, template, model, tokenizer)
    if settings.task == "likelihood":
        return _likelihood(settings, model, tokenizer)
    return _sampled(settings, TASKS[settings.task], template, model, tokenizer)


def _sampled(settings: EvaluateSettings, task: Task, template: Template, model: Dream, tokenizer: Tokenizer) -> Work:
    shots = settings.shots
    if shots is None:
        # Byte-level models are trained on bare rows, and a byte a token leaves little room.
        shots = 0 if isinstance(tokenizer, ByteTokenizer) else task.shots[template]
    examples, problems = split_examples(
        task, read_problems(task, settings.file), settings.file, settings.examples, shots
    )
    problems = problems[: settings.limit]
    config = settings.sampler_config(tokenizer, settings.max_new_tokens or task.max_new_tokens)
    prompts = []
    for problem in problems:
        prompt = task.prompt(problem, examples, template, settings.instruction)
        ids = answering.encode_prompt(prompt, template, tokenizer)
        answering.check_length(ids, config.max_new_tokens, model, problem.where)
        prompts.append(ids)

    def compute(model: Dream, unit: Unit) -> list[Row]:
        answered = answering.answer(
            model, tokenizer, [prompts[place] for place in unit.problems], unit.names, config, settings.batch_size
        )
        rows = []
        for place, one in zip(unit.problems, answered, strict=True):
            problem = problems[place]
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

    parts = answering.batches([len(ids) for ids in prompts], settings.batch_size)
    note = f"{shots} example(s), {template} prompts of {min(map(len, prompts))}..{max(map(len, prompts))} tokens"
    if settings.seeds > 1 and not config.is_random:
        note += "; the sampler draws nothing, so seeds only measure whether the machine repeats itself"
    return Work(
        numbers=[problem.number for problem in problems],
        batches=parts,
        shapes=[bucket_length(max(len(prompts[place]) for place in part)) for part in parts],
        compute=compute,
        recipe={
            "shots": shots,
            "examples": [one.identity for one in examples],
            "instruction": settings.instruction,
            # With the types of what is kept and of the rule, which `asdict` leaves out.
            "sampler": dataclasses.asdict(config) | {"cache": repr(config.cache), "commit": repr(config.commit)},
        },
        note=note,
    )


def _choices(settings: EvaluateSettings, template: Template, model: Dream, tokenizer: Tokenizer) -> Work:
    assert settings.file is not None
    likelihood.check_mask(model)
    choices = read_choices(settings.file)[: settings.limit]
    for one in choices:
        for passage in one.passages(tokenizer, template):
            answering.check_length(passage.tokens.tolist(), 0, model, one.where)

    def compute(model: Dream, unit: Unit) -> list[Row]:
        (place,) = unit.problems
        one = choices[place]
        passages = one.passages(tokenizer, template)
        nll = likelihood.model_nll(model, tokenizer, settings.batch_size)
        seeds = [(unit.seed, one.number, index) for index in range(len(passages))]
        found = likelihood.bounds(passages, settings.samples, nll, seeds)
        nats = [bound.nats for bound in found]
        chosen, chosen_by_byte = likeliest(nats, one.choices)
        return [
            {
                "seed": unit.seed,
                "number": one.number,
                "identity": identify(one.question, one.choices, one.answer),
                "correct": chosen == one.answer,
                "correct_by_byte": chosen_by_byte == one.answer,
                "chosen": chosen,
                "nats": [round(value, 6) for value in nats],
                "standard_errors": [round(bound.variance**0.5, 6) for bound in found],
            }
        ]

    return Work(
        numbers=[one.number for one in choices],
        batches=[(place,) for place in range(len(choices))],
        shapes=[max(bucket_length(len(p.tokens)) for p in one.passages(tokenizer, template)) for one in choices],
        compute=compute,
        recipe={"samples": settings.samples},
        note=f"{settings.samples} samples a choice",
    )


def _likelihood(settings: EvaluateSettings, model: Dream, tokenizer: Tokenizer) -> Work:
    assert settings.file is not None
    likelihood.check_mask(model)
    texts = read_texts(settings.file)[: settings.limit]
    for one in texts:
        answering.check_length(one.passage(tokenizer).tokens.tolist(), 0, model, one.where)

    def compute(model: Dream, unit: Unit) -> list[Row]:
        (place,) = unit.problems
        one = texts[place]
        passage = one.passage(tokenizer)
        nll = likelihood.model_nll(model, tokenizer, settings.batch_size)
        (bound,) = likelihood.bounds([passage], settings.samples, nll, [(unit.seed, one.number)])
        return [
            {
                "seed": unit.seed,
                "number": one.number,
                "identity": identify(one.text, one.before, one.after),
                **dataclasses.asdict(bound),
                "tokens": passage.num_scored,
                "bytes": one.num_bytes,
            }
        ]

    return Work(
        numbers=[one.number for one in texts],
        batches=[(place,) for place in range(len(texts))],
        shapes=[bucket_length(len(one.passage(tokenizer).tokens)) for one in texts],
        compute=compute,
        recipe={"samples": settings.samples},
        note=f"{settings.samples} samples a text",
    )


def find_template(settings: EvaluateSettings, model: Dream, tokenizer: Tokenizer) -> Template:
    """How prompts are written: as said, as published, as the model was trained, or by the kind of tokenizer."""
    if settings.template != "auto":
        return settings.template
    if settings.published is not None:
        return PUBLISHED[settings.published][0]
    # Planning is published without a chat template, for base and instruct models alike.
    default = "raw" if settings.task in ("sudoku", "countdown") else pretrained.default_template(tokenizer)
    return pretrained.noted_template(settings.adapter, model) or default


def _digest(path: pathlib.Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
