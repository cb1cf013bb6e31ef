"""Samples from a Dream model: `python sample.py --model runs/demo/model --prompt TEXT`, a file of prompts, or a chat."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import Progress
from rich.text import Text

import dream_jax
from dream_jax import inference, pretrained
from dream_jax.data import read_json_lines, text_field
from dream_jax.decoding import Alg
from dream_jax.inference import PreparedModel, canvas_text
from dream_jax.row_file import RowFile, agree_on_settings
from dream_jax.sampler import Preset, Stream
from dream_jax.tokenizer import ByteTokenizer, Message, Template, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings(inference.ModelSettings):
    """What to sample and how. One of --prompt, --prompts and --chat."""

    prompt: str | None = None
    """one prompt; <|mask|> in it, under --template raw, is a position to fill in"""
    prompts: pathlib.Path | None = None
    """a .jsonl file with a `prompt` string or a `messages` list a line"""
    out: pathlib.Path | None = None
    """.jsonl file for the answers to --prompts; answers that are in it already are not computed again"""
    chat: bool = False
    """ask and be answered, turn by turn; an empty line or end of input ends it"""
    max_new_tokens: int = 128
    """mask tokens after the prompt"""
    preset: Preset = "exact"
    """exact: the published sampler; balanced and fast: cached blocks, as many tokens a pass as are probable enough"""
    steps: int | None = None
    """denoising steps of --preset exact; by default one a new token"""
    alg: Alg | None = None
    """order in which positions are written; by default the preset's (exact: entropy)"""
    temperature: float = 0.0
    """0 takes the most probable token"""
    top_p: float | None = None
    """nucleus, in (0, 1]"""
    top_k: int | None = None
    """number of tokens kept"""
    alg_temp: float | None = None
    """softens the order"""
    eps: float = 1e-3
    """noise level at the end of the schedule"""
    end_penalty: float = 0.0
    """subtracted from the logit of the end-of-text token"""
    guidance: float = 0.0
    """classifier-free guidance: how far to go from the model without the prompt to the one with it, and past it"""
    seed: int = 0
    """of everything random; line i of a file uses the key (seed, i)"""
    samples: int = 1
    """answers to each prompt of a file"""
    batch_size: int = 8
    """prompts of a file that are denoised together; one that is done is replaced by the next"""
    watch: bool = False
    """show the canvas while it is denoised (live on a terminal, some frames elsewhere)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompt is not None) + (self.prompts is not None) + self.chat != 1:
            raise ValueError("give either --prompt TEXT or --prompts FILE or --chat")
        if (self.prompts is None) != (self.out is None):
            raise ValueError("--prompts FILE and --out FILE belong together")
        if self.batch_size < 1 or self.samples < 1:
            raise ValueError(f"batch_size={self.batch_size} and samples={self.samples} must be at least 1")
        if self.samples > 1 and self.prompts is None:
            raise ValueError(f"samples={self.samples} is for --prompts FILE")
        self.sampler(ByteTokenizer())  # raises for values that cannot be

    def sampler(self, tokenizer: Tokenizer) -> dream_jax.SamplerConfig:
        """The sampler that the settings ask for."""
        names = ("steps", "alg", "temperature", "top_p", "top_k", "alg_temp", "eps", "end_penalty", "guidance")
        options = {name: getattr(self, name) for name in names}
        return inference.make_sampler(tokenizer, self.max_new_tokens, self.preset, **options)


def main() -> int:
    try:
        return run(tyro.cli(SampleSettings, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command with --out resumes", file=sys.stderr)
        return 130


def run(settings: SampleSettings) -> int:
    console = Console(highlight=False, soft_wrap=True)
    for field in dataclasses.fields(settings):
        if (value := getattr(settings, field.name)) != field.default:
            console.print(f"{field.name}: {value!r}", markup=False)
    prepared = inference.prepare(settings)
    sampler = settings.sampler(prepared.tokenizer)
    if settings.chat:
        converse(settings, prepared, sampler, console)
    elif settings.prompts is None:
        answer_one(settings, prepared, sampler, console)
    else:
        answer_file(settings, prepared, sampler, console)
    return 0


def check_length(ids: list[int], sampler: dream_jax.SamplerConfig, model: dream_jax.Dream, what: str) -> None:
    inference.check_length(ids, sampler.max_new_tokens, model, what, shortest=0)


def answer_one(
    settings: SampleSettings, prepared: PreparedModel, sampler: dream_jax.SamplerConfig, console: Console
) -> None:
    tokenizer = prepared.tokenizer
    ids = inference.encode_prompt(settings.prompt or "", prepared.template, tokenizer, allow_special=True)
    check_length(ids, sampler, prepared.model, "--prompt")
    model = prepared.load()
    # Where the prompt itself has positions to fill in, it is shown with the answer.
    begin = 0 if tokenizer.mask_id in ids else len(ids)
    begun = time.monotonic()
    with watching(settings.watch, tokenizer, begin, console) as on_step:
        out = dream_jax.generate(model, as_row(ids), sampler, jax.random.key(settings.seed), on_step=on_step)
        forwards = int(out.forwards)
    seconds = time.monotonic() - begun
    if settings.watch and not console.is_terminal:
        frames = np.unique(np.linspace(-1, int(np.max(out.commit_step)), 6).astype(int)).tolist()
        for step in frames[:-1]:
            console.print(f"--- canvas {'before the first step' if step < 0 else f'after step {step + 1}'}")
            console.print(canvas_text(np.asarray(out.canvas_at(step))[0, begin:], tokenizer), markup=False)
    console.print("--- answer")
    console.print(canvas_text(np.asarray(out.tokens)[0, begin:], tokenizer), markup=False)
    console.print(f"--- {forwards} forward passes, {seconds:.1f} s with compilation")


def as_row(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32).reshape(1, -1)


@contextlib.contextmanager
def watching(
    watch: bool, tokenizer: Tokenizer, begin: int, console: Console
) -> Iterator[Callable[[int, np.ndarray], None] | None]:
    """What shows each canvas on a terminal while it is denoised; None elsewhere."""
    if not (watch and console.is_terminal):
        yield None
        return
    with Live(Panel(Text("compiling")), console=console, transient=True, auto_refresh=False) as live:

        def on_step(step: int, canvas: np.ndarray) -> None:
            text = Text(canvas_text(canvas[0, begin:], tokenizer))
            live.update(Panel(text, title=f"step {step + 1}"), refresh=True)

        yield on_step


def converse(
    settings: SampleSettings, prepared: PreparedModel, sampler: dream_jax.SamplerConfig, console: Console
) -> None:
    model, tokenizer = prepared.load(), prepared.tokenizer
    messages: list[dict[str, str]] = []
    for turn in itertools.count():
        console.print("you: ", end="")
        asked = sys.stdin.readline().strip()
        if not asked:
            break
        messages.append({"role": "user", "content": asked})
        ids = tokenizer.chat(messages)
        check_length(ids, sampler, model, "the conversation")
        key = jax.random.fold_in(jax.random.key(settings.seed), turn)
        with watching(True, tokenizer, len(ids), console) as on_step:
            out = dream_jax.generate(model, as_row(ids), sampler, key, on_step=on_step)
        answer = canvas_text(np.asarray(out.tokens)[0, len(ids) :], tokenizer).strip()
        console.print(f"model: {answer}", markup=False)
        messages.append({"role": "assistant", "content": answer})


def answer_file(
    settings: SampleSettings, prepared: PreparedModel, sampler: dream_jax.SamplerConfig, console: Console
) -> None:
    assert settings.prompts is not None
    tokenizer = prepared.tokenizer
    questions = read_questions(settings.prompts, prepared.template, tokenizer)
    for line, question in questions.items():
        check_length(question.ids, sampler, prepared.model, f"{settings.prompts}:{line}")
    answers = open_answers(settings, prepared, sampler, questions)
    done = {(row["line"], row.get("sample", 0)) for row in answers.rows}
    asked = [(line, sample) for line in questions for sample in range(settings.samples)]
    todo = [one for one in asked if one not in done]
    model = prepared.load()
    console.print(f"{len(asked)} prompts, {len(done)} answered already")
    begun, useful, canvas, passes = time.monotonic(), 0, 0, 0
    # A key for each line and sample: no answer depends on what it is batched with, nor on where a run was stopped.
    keys = inference.row_keys([(settings.seed, line, sample) for line, sample in todo])
    prompts = [questions[line].ids for line, _ in todo]
    stream = Stream(model, prompts, sampler, keys, batch_size=settings.batch_size)
    with Progress(console=console) as progress:
        task = progress.add_task("prompts", total=len(todo))
        for found in stream:
            line, sample = todo[found.prompt]
            answer = inference.read_answer(
                tokenizer, questions[line].ids, found.tokens, found.commit_step, found.passes
            )
            row: dict[str, Any] = {"line": line, "prompt": questions[line].prompt, "answer": answer.text}
            answers.append([row | {"sample": sample} if settings.samples > 1 else row])
            canvas, useful, passes = canvas + answer.num_written, useful + answer.num_useful, passes + answer.forwards
            progress.update(task, advance=1)
    seconds = max(time.monotonic() - begun, 1e-9)
    console.print(
        f"wrote {settings.out}: {len(todo)} new answers in {seconds:.1f} s with compilation: {useful} tokens before the "
        f"end token ({useful / seconds:.1f} a second), {canvas} on the canvas ({canvas / seconds:.1f} a second); "
        f"{stream.forwards} forward passes, {passes / max(useful, 1):.2f} a row and useful token"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """What a line of the file of prompts asks, and that as tokens."""

    prompt: str | list[Message]
    ids: list[int]


def read_questions(path: pathlib.Path, template: Template, tokenizer: Tokenizer) -> dict[int, Question]:
    """The questions of a file by their lines, counted from 1. Raises: ValueError naming file and line."""
    questions = {}
    for where, row in read_json_lines(path):
        prompt: Any = row.get("messages")
        if not isinstance(prompt, list):
            if "prompt" not in row:
                raise ValueError(f"{where}: expected an object with a `prompt` string or a `messages` list")
            prompt = text_field(row, "prompt", where)
        elif not all(isinstance(message, dict) for message in prompt):
            raise ValueError(f"{where}: each of `messages` must be an object with role and content")
        try:
            ids = inference.encode_prompt(prompt, template, tokenizer, allow_special=True)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        questions[int(where.rpartition(":")[2])] = Question(prompt=prompt, ids=ids)
    return questions


def open_answers(
    settings: SampleSettings,
    prepared: PreparedModel,
    sampler: dream_jax.SamplerConfig,
    questions: dict[int, Question],
) -> RowFile:
    """The file of answers with those that are in it already. The file beside it says what they follow from.

    Raises: ValueError for a file of other answers, or of answers that were made in another way.
    """
    assert settings.out is not None and settings.prompts is not None
    path = settings.out
    if path.resolve() == settings.prompts.resolve():
        raise ValueError(f"--out {path} is the file of prompts; give another")
    recipe = {
        "model": settings.model,
        "weights": pretrained.fingerprint(settings.model),
        "template": prepared.template,
        "dtype": prepared.dtype,
        "seed": settings.seed,
        "samples": settings.samples,
        **dataclasses.asdict(sampler),
        # `asdict` leaves out the types of the cache and of the commit rule.
        "cache": repr(sampler.cache),
        "commit": repr(sampler.commit),
        "mask": settings.mask,
    }
    if settings.tokenizer not in (None, "bytes"):
        recipe["tokenizer"] = pretrained.fingerprint(settings.tokenizer)
    if settings.adapter is not None:
        recipe["adapter"] = [settings.adapter, pretrained.fingerprint(settings.adapter)]
    if settings.base != "auto":
        recipe["base"] = settings.base
    beside = path.with_name(path.name + ".settings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or not path.stat().st_size:
        beside.unlink(missing_ok=True)
        path.touch()  # a folder that cannot be written shows now
    agree_on_settings(beside, path, recipe, "or give another --out")
    answers = RowFile(path)
    for number, row in enumerate(answers.rows, 1):
        question = questions.get(row["line"]) if isinstance(row.get("line"), int) else None
        if question is None or question.prompt != row.get("prompt"):
            raise ValueError(f"{path}, line {number}: not an answer to this file of prompts; give another --out")
    answers.keep(len(answers.rows))
    return answers


if __name__ == "__main__":
    sys.exit(main())
