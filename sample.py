"""Answers a prompt, a file of prompts or a chat: `python sample.py --model runs/demo/model --prompt TEXT`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from dream_jax.bounds import MOST_ROWS, SEED, IntegerRange, check_answers, check_numbers
from dream_jax.data import numbered_records, parse_messages, read_question, record_number, with_instruction
from dream_jax.decoding import Alg
from dream_jax.device_memory import explained, take_memory
from dream_jax.inference import PreparedModel, canvas_text
from dream_jax.paths import check_apart, check_file, check_local, check_replaceable, claimed, is_json_object
from dream_jax.player import pages
from dream_jax.player.record import Probable, answer_record
from dream_jax.row_file import RowFile, agree_on_settings
from dream_jax.sampler import Preset, Stream
from dream_jax.sampler.state import NUM_TOP, Record
from dream_jax.tokenizer import ByteTokenizer, Message, Template, Tokenizer, check_texts

SAMPLER_FIELDS = (
    *("steps", "alg", "temperature", "top_p", "top_k", "alg_temp", "eps", "end_penalty", "guidance"),
    "first_token_first",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings(inference.ModelSettings):
    """The settings of `sample.py`. Exactly one of --prompt, --prompts and --chat must be given."""

    prompt: str | None = None
    """one prompt; with --template raw, each <|mask|> in it is a position to fill in"""
    prompts: pathlib.Path | None = None
    """.jsonl, .json or .parquet file of prompts; each row has a `prompt` string, a `messages` list, or the other fields of
    a prompt that train.py reads, with `tools` if there are any"""
    ignore_field: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """leave out this field of each row of --prompts, as if the rows did not have it; the flag may be repeated"""
    out: pathlib.Path | None = None
    """.jsonl file for the answers to --prompts; answers that it already has are not computed again"""
    chat: bool = False
    """chat with the model, turn by turn; an empty line or the end of the input ends the chat. After an answer that calls
    a tool, the next line is the result of the tool"""
    system: str | None = None
    """text of the system turn before --prompt or --chat; by default that of the chat template"""
    tools: pathlib.Path | None = None
    """JSON file with the list of functions that the model may call in --prompt or --chat, as JSON schemas"""
    max_new_tokens: int = 128
    """number of mask tokens after the prompt"""
    preset: Preset = "exact"
    """exact: the published sampler; balanced, fast: blocks with a KV cache, where each pass writes all tokens whose
    probability is high enough"""
    steps: int | None = None
    """number of denoising steps with --preset exact; by default one per mask: those in the prompt and the new ones"""
    alg: Alg | None = None
    """order in which positions are written; by default that of the preset (exact: entropy)"""
    temperature: float = 0.0
    """temperature of the token distribution; 0 takes the most probable token"""
    top_p: float | None = None
    """probability mass of the nucleus that is sampled from, in (0, 1]; by default all tokens"""
    top_k: int | None = None
    """number of most probable tokens to sample from; by default all tokens"""
    alg_temp: float | None = None
    """temperature of the order: positions are drawn at random, and with a higher temperature confidence matters less"""
    eps: float = 1e-3
    """noise level at the end of the schedule, in (0, 1)"""
    end_penalty: float = 0.0
    """number that is subtracted from the logit of the end-of-text token"""
    guidance: float = 0.0
    """classifier-free guidance g: logits become u + (1 + g) (c - u), with c from the canvas and u from the canvas
    without the prompt; 0 switches it off"""
    first_token_first: bool = False
    """for a model of block diffusion: the first pass over a block writes its first token, whatever its confidence"""
    seed: int = 0
    """seed of all random numbers, 0 to 2**31 - 1; the prompt in line i of a file uses the key (seed, i)"""
    samples: int = 1
    """number of answers to each prompt of a file"""
    batch_size: int = 8
    """number of prompts of a file that are denoised together; a prompt that is done is replaced by the next one"""
    watch: bool = False
    """show the canvas while it is denoised (live on a terminal; otherwise some canvases after the end)"""
    replay: pathlib.Path | None = None
    """new .html file that plays the answer to --prompt in a browser, step by step, without a network"""
    runner_ups: int = 0
    """number of the most probable other tokens of each position that the file of --replay has, up to 19"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(self)
        if (self.prompt is not None) + (self.prompts is not None) + self.chat != 1:
            raise ValueError("give exactly one of --prompt TEXT, --prompts FILE and --chat")
        if (self.prompts is None) != (self.out is None):
            raise ValueError("--prompts FILE and --out FILE need each other: give both or neither")
        check_numbers(self, seed=SEED, samples=IntegerRange(1, MOST_ROWS), batch_size=IntegerRange(1, MOST_ROWS))
        if self.system is not None and not self.system.strip():
            raise ValueError(
                "--system is blank; leave it out for that of the chat template. Only a row of --prompts can have an empty "
                "system turn, as a message"
            )
        if self.prompts is not None and (self.system is not None or self.tools is not None):
            raise ValueError("--system and --tools are for --prompt and --chat; the rows of --prompts have their own")
        if self.ignore_field and self.prompts is None:
            raise ValueError("--ignore-field is for --prompts FILE; leave it out, or give a file")
        if self.samples > 1 and self.prompts is None:
            raise ValueError(f"samples={self.samples} is for --prompts FILE; leave it out, or give a file")
        if self.replay is not None and self.prompt is None:
            raise ValueError(
                f"--replay {self.replay} is for the answer to --prompt TEXT; leave it out, or give a prompt"
            )
        if not 0 <= self.runner_ups < NUM_TOP or (self.runner_ups and self.replay is None):
            raise ValueError(f"runner_ups={self.runner_ups} must be 0 to {NUM_TOP - 1}, and needs --replay FILE.html")
        # Raises ValueError if a setting of the sampler is outside its range. The mask of the model is not known yet.
        self.sampler(ByteTokenizer(), "block-diffusion:1" if self.first_token_first else "bidirectional")

    def sampler(self, tokenizer: Tokenizer, trained_mask: str = "bidirectional") -> dream_jax.SamplerConfig:
        """Returns the configuration of the sampler that these settings describe, for a model with this trained mask."""
        options = {name: getattr(self, name) for name in SAMPLER_FIELDS}
        return inference.make_sampler(tokenizer, self.max_new_tokens, self.preset, trained_mask=trained_mask, **options)

    def of_the_answer(self) -> dict[str, Any]:
        """Returns the settings that decide the answer, without those that are switched off. Paths are not among them."""
        names = ("max_new_tokens", "preset", *SAMPLER_FIELDS, "seed", "mask")
        return {name: value for name in names if (value := getattr(self, name)) is not None and value is not False}


def main() -> int:
    try:
        check_texts(sys.argv[1:])
        settings = tyro.cli(SampleSettings, description=__doc__)
        take_memory()
        return run(settings)
    except jax.errors.JaxRuntimeError as error:
        rows = 1 if settings.prompts is None else settings.batch_size
        remedies = functools.partial(inference.memory_remedies, settings, "--batch-size", rows)
        print(f"error: {explained(error, remedies)}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command with --out resumes", file=sys.stderr)
        return 130


def run(settings: SampleSettings) -> int:
    """Prints the settings that are not defaults, answers, and returns the exit code 0."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for field in dataclasses.fields(settings):
        if (value := getattr(settings, field.name)) != field.default:
            console.print(f"{field.name}: {value!r}", markup=False)
    prepared = inference.prepare(settings)
    if prepared.note is not None:
        console.print(prepared.note, markup=False)
    sampler = settings.sampler(prepared.tokenizer, prepared.model.trained_mask)
    if settings.chat:
        converse(settings, prepared, sampler, console)
    elif settings.prompts is None:
        answer_one(settings, prepared, sampler, console)
    else:
        answer_file(settings, prepared, sampler, console)
    return 0


def check_length(ids: list[int], sampler: dream_jax.SamplerConfig, model: dream_jax.Dream, where: str) -> None:
    inference.check_length(ids, sampler.max_new_tokens, model, where, shortest=0)


def answer_one(
    settings: SampleSettings, prepared: PreparedModel, sampler: dream_jax.SamplerConfig, console: Console
) -> None:
    """Prints the answer to --prompt, the number of forward passes, and the time that it took."""
    tokenizer = prepared.tokenizer
    row = {**around_question(settings), "prompt": settings.prompt or ""}
    if prepared.template == "raw" and not row["prompt"].strip() and len(row) == 1:
        ids = tokenizer.encode(row["prompt"])  # No row of a file has a blank prompt, but a base model can continue it.
    else:
        ids = read_question_of(row, "--prompt", prepared.template, tokenizer, prepared.instruction).ids
    check_length(ids, sampler, prepared.model, "--prompt")
    if settings.replay is not None:
        pages.check_replay_file(settings.replay)  # before the weights are read
    model = prepared.load()
    # If the prompt itself has positions to fill in, it is printed together with the answer.
    show = functools.partial(show_canvas, tokenizer, ids)
    begun = time.monotonic()
    with watching(settings.watch, show, console) as on_step:
        key = jax.random.key(settings.seed)
        record: Record = "nothing" if settings.replay is None else "logprobs" if settings.runner_ups else "confidences"
        out = dream_jax.generate(model, as_row(ids), sampler, key, on_step=on_step, record=record)
        forwards = int(out.forwards)
    seconds = time.monotonic() - begun
    if settings.watch and not console.is_terminal:
        frames = np.unique(np.linspace(-1, int(np.max(out.commit_step)), 6).astype(int)).tolist()
        for step in frames[:-1]:
            console.print(f"--- canvas {'before the first step' if step < 0 else f'after step {step + 1}'}")
            console.print(show(np.asarray(out.canvas_at(step))[0]), markup=False)
    text = show(np.asarray(out.tokens)[0])
    console.print("--- answer")
    print(text)  # the console would replace tabs
    console.print(f"--- {forwards} forward passes, {seconds:.1f} s with compilation")
    if settings.replay is not None:
        write_replay(settings, settings.replay, tokenizer, ids, out, text)
        console.print(f"wrote {settings.replay}: open it in a browser")


def write_replay(
    settings: SampleSettings, path: pathlib.Path, tokenizer: Tokenizer, ids: list[int], out: dream_jax.Sample, text: str
) -> None:
    """Writes the page that plays the answer to --prompt, whose text at the end is `text`."""
    confidence, probable = None, None
    if out.recorded is not None:  # nothing is recorded if there is nothing to write
        confidence = np.asarray(out.recorded.confidence_BT)[0]
        if out.recorded.logprobs is not None:
            logprob, tokens, logprobs = (np.asarray(array)[0] for array in out.recorded.logprobs)
            probable = Probable(settings.runner_ups, logprob, tokens, logprobs)
    record = answer_record(
        tokenizer,
        ids,
        np.asarray(out.tokens)[0],
        np.asarray(out.commit_step)[0],
        model=settings.short_name(),
        prompt_text=settings.prompt or "",
        text=text,
        forwards=int(out.forwards),
        settings=settings.of_the_answer(),
        confidence=confidence,
        probable=probable,
    )
    pages.write_replay(path, record)


def as_row(ids: list[int]) -> np.ndarray:
    return np.array(ids, np.int32).reshape(1, -1)


def show_canvas(tokenizer: Tokenizer, prompt: list[int], canvas: np.ndarray) -> str:
    """Returns the text of a canvas [P + N] that is shown as the answer to a prompt of P tokens."""
    begin, first_end = inference.shown_from(prompt, tokenizer)
    return canvas_text(canvas[begin:], tokenizer, first_end - begin)


@contextlib.contextmanager
def watching(
    watch: bool, show: Callable[[np.ndarray], str], console: Console
) -> Iterator[Callable[[int, np.ndarray], None] | None]:
    """Yields a function for `generate(on_step=...)` that shows each canvas on a terminal; None without a terminal."""
    if not (watch and console.is_terminal):
        yield None
        return
    with Live(Panel(Text("compiling")), console=console, transient=True, auto_refresh=False) as live:

        def on_step(step: int, canvas: np.ndarray) -> None:
            live.update(Panel(Text(show(canvas[0])), title=f"step {step + 1}"), refresh=True)

        yield on_step


def converse(
    settings: SampleSettings, prepared: PreparedModel, sampler: dream_jax.SamplerConfig, console: Console
) -> None:
    """Reads the turns of the user from stdin and prints the answers, until a line is empty or the input ends.

    After an answer that calls a tool, a line is the result of the tool.
    """
    around = around_question(settings)
    tokenizer = prepared.tokenizer
    # This raises ValueError for bad tools, or a template without tools, before the weights are read.
    read_question_of({**around, "prompt": "a question"}, "--chat", "chat", tokenizer)
    model = prepared.load()
    messages: list[Message] = []
    for turn in itertools.count():
        called = "tools" in around and bool(messages) and "<tool_call>" in messages[-1]["content"]
        console.print("tool: " if called else "you: ", end="")
        asked = sys.stdin.readline().strip()
        if not asked:
            break
        # Training puts an instruction before the first question only.
        content = asked if messages else inference.with_instruction(asked, prepared.instruction)
        messages.append({"role": "tool" if called else "user", "content": content})
        ids = read_question_of({**around, "messages": messages}, "--chat", "chat", tokenizer).ids
        check_length(ids, sampler, model, "the conversation")
        key = jax.random.fold_in(jax.random.key(settings.seed), turn)
        show = functools.partial(show_canvas, tokenizer, ids)
        with watching(True, show, console) as on_step:
            out = dream_jax.generate(model, as_row(ids), sampler, key, on_step=on_step)
        answer = show(np.asarray(out.tokens)[0]).strip()
        print(f"model: {answer}")
        if answer:  # An empty turn is nothing that a model is trained on, so the conversation goes on without it.
            messages.append({"role": "assistant", "content": answer})


def answer_file(
    settings: SampleSettings, prepared: PreparedModel, sampler: dream_jax.SamplerConfig, console: Console
) -> None:
    """Appends the answers to the prompts of a file that have no answer yet to --out, and prints a summary."""
    assert settings.prompts is not None
    questions = read_questions(
        settings.prompts, prepared.template, prepared.tokenizer, settings.ignore_field, prepared.instruction
    )
    check_answers("samples", settings.samples, len(questions))
    unread = Counter(name for question in questions.values() for name in question.unread)
    if unread:
        counted = ", ".join(f"{name!r} in {count}" for name, count in unread.items())
        console.print(
            f"fields that are no part of a prompt, and were not read: {counted} of {len(questions)} rows", markup=False
        )
    for line, question in questions.items():
        check_length(question.ids, sampler, prepared.model, f"{settings.prompts}:{line}")
    with contextlib.ExitStack() as stack:
        answers = open_answers(settings, prepared, sampler, questions, stack)
        _answer_missing(settings, prepared, sampler, questions, answers, console)


def _answer_missing(
    settings: SampleSettings,
    prepared: PreparedModel,
    sampler: dream_jax.SamplerConfig,
    questions: dict[int, Question],
    answers: RowFile,
    console: Console,
) -> None:
    """Appends the missing answers to the file of answers, and prints a summary."""
    tokenizer = prepared.tokenizer
    done = {(row["line"], row.get("sample", 0)) for row in answers.rows}
    asked = [(line, sample) for line in questions for sample in range(settings.samples)]
    todo = [one for one in asked if one not in done]
    model = prepared.load()
    console.print(f"{len(asked)} prompts, {len(done)} answered already")
    begun, useful, canvas, passes = time.monotonic(), 0, 0, 0
    # Each line and sample has its own key, so that an answer does not depend on its batch or on interruptions.
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
            if questions[line].tools:
                row["tools"] = questions[line].tools
            answers.append([row | {"sample": sample} if settings.samples > 1 else row])
            canvas, useful, passes = canvas + answer.num_written, useful + answer.num_useful, passes + answer.forwards
            progress.update(task, advance=1)
    seconds = max(time.monotonic() - begun, 1e-9)
    console.print(
        f"wrote {settings.out}: {len(todo)} new answers in {seconds:.1f} s with compilation: {useful} tokens before the "
        f"end token ({useful / seconds:.1f} a second), {canvas} on the canvas ({canvas / seconds:.1f} a second); "
        f"{stream.forwards} forward passes; each row took part in {passes / max(useful, 1):.2f} per token before the end"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One row of the file of prompts.

    Attributes:
      prompt: the text or the messages, as they are in the file; if other fields belong to the prompt, the messages that
        all of them make.
      tools: functions that the prompt announces, as JSON schemas.
      ids: token ids of the prompt.
      unread: names of the fields of the row that nobody has read.
    """

    prompt: str | list[Message]
    tools: list[Mapping[str, Any]]
    ids: list[int]
    unread: tuple[str, ...]


def around_question(settings: SampleSettings) -> dict[str, Any]:
    """Returns the fields of a row that --system and --tools give. Raises ValueError or OSError for a bad file."""
    found: dict[str, Any] = {}
    if settings.system is not None:
        found["system"] = settings.system
    if settings.tools is not None:
        try:
            text = settings.tools.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"--tools {settings.tools} is not UTF-8 text ({error}); save it as UTF-8") from error
        found["tools"] = list(read_question({"prompt": "a question", "tools": text}, f"--tools {settings.tools}").tools)
        if not found["tools"]:
            raise ValueError(
                f"--tools {settings.tools} has no functions; give a JSON list of them, or leave the flag out"
            )
    return found


def read_question_of(
    found: Mapping[str, Any], where: str, template: Template, tokenizer: Tokenizer, instruction: str = ""
) -> Question:
    """Returns the question of one row, with the prompt that training makes of the same row.

    `instruction` is the text before the first user turn of a chat that is not a list of messages, as
    `inference.PreparedModel.instruction`.

    Raises:
      ValueError: the row is not a question, or the tokenizer cannot encode it; the message begins with `where`.
    """
    chat = read_question(found, where)
    # Rows of prompts have text and messages as they are in the file, so that answers of earlier files are resumed.
    own = found.get("messages")
    whole = own if isinstance(own, list) and tuple(parse_messages(own, where)) == chat.messages else list(chat.messages)
    prompt = whole if chat.text is None else chat.text
    asked: str | Sequence[Message] = chat.messages if chat.text is None else chat.text
    if chat.columns and not isinstance(asked, str):
        asked = with_instruction(asked, instruction)
    try:
        ids = inference.encode_prompt(
            asked, template, tokenizer, tools=chat.tools, instruction=instruction, allow_special=True
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Question(prompt=prompt, tools=list(chat.tools), ids=ids, unread=chat.unread)


def read_questions(
    path: pathlib.Path,
    template: Template,
    tokenizer: Tokenizer,
    ignored: Collection[str] = (),
    instruction: str = "",
) -> dict[int, Question]:
    """Returns the questions of a file by their numbers: those of the lines, counted from 1, or of the rows.

    Fields of the rows whose names are in `ignored` are left out. `instruction` is as for `read_question_of`.

    Raises:
      ValueError: a row is not a question; the message names file and line.
      OSError: the file cannot be read.
    """
    return {
        record_number(where): read_question_of(found, where, template, tokenizer, instruction)
        for where, found in numbered_records(path, ignored)
    }


def open_answers(
    settings: SampleSettings,
    prepared: PreparedModel,
    sampler: dream_jax.SamplerConfig,
    questions: dict[int, Question],
    stack: contextlib.ExitStack,
) -> RowFile:
    """Returns the file of answers with the answers that it has already. It is claimed until `stack` is closed.

    A file beside it (FILE.settings.json) holds the settings with which they were made.

    Raises:
      ValueError: the file holds answers to other prompts, two answers to one prompt, or answers that were made with other
        settings.
      BlockingIOError: another process is writing the file.
      OSError: a file cannot be read or written.
    """
    assert settings.out is not None and settings.prompts is not None
    path = check_file(settings.out, regular=True)
    beside = path.with_name(path.name + ".settings.json")
    check_replaceable(beside, "a file of settings of sample.py", is_json_object("model", "weights", "template"))
    for file in (path, beside):
        reads = (settings.prompts, settings.model, settings.adapter, settings.tokenizer)
        check_apart(file, reads, "give another --out", lies_in=False)
    asked = [question.ids for question in questions.values()]
    recipe = {
        "model": settings.model,
        "weights": pretrained.fingerprint(settings.model),
        "template": prepared.template,
        "dtype": prepared.dtype,
        "seed": settings.seed,
        "samples": settings.samples,
        **inference.sampler_recipe(sampler, asked, prepared.tokenizer),
        "mask": settings.mask,
    }
    if settings.ignore_field:
        recipe["ignore_field"] = sorted(settings.ignore_field)
    if settings.tokenizer not in (None, "bytes"):
        recipe["tokenizer"] = pretrained.fingerprint(settings.tokenizer)
    if settings.adapter is not None:
        recipe["adapter"] = [settings.adapter, pretrained.fingerprint(settings.adapter)]
    if prepared.instruction:
        recipe["instruction"] = prepared.instruction
    if settings.base != "auto":
        recipe["base"] = settings.base
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # raises now, before the weights are read, if the folder cannot be written
    stack.enter_context(claimed(path))
    if not path.stat().st_size:
        beside.unlink(missing_ok=True)
    agree_on_settings(beside, path, recipe, "give another --out")
    answers = RowFile(path, start=b'{"line": ', name=lambda row: (row.get("line"), row.get("sample", 0)))
    for number, row in enumerate(answers.rows, 1):
        line: Any = row.get("line")
        sample = row.get("sample", 0)
        expected = type(line) is int and type(sample) is int and 0 <= sample < settings.samples
        question = questions.get(line) if expected and isinstance(row.get("answer"), str) else None
        if question is None or (question.prompt, question.tools) != (row.get("prompt"), row.get("tools", [])):
            raise ValueError(f"{path}:{number}: not an answer to a prompt of {settings.prompts}; give another --out")
    answers.keep(len(answers.rows))
    return answers


if __name__ == "__main__":
    sys.exit(main())
