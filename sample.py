"""Samples from a Dream model: `python sample.py --model runs/demo/model --prompt TEXT`, a file of prompts, or a chat."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import Progress
from rich.text import Text

import dream_jax
from dream_jax import masks, pretrained, sharding
from dream_jax.attention import Backend
from dream_jax.data.jsonl import read_json_lines, text_field
from dream_jax.decoding import Alg
from dream_jax.sampler import Preset, Stream
from dream_jax.tokenizer import Template, Tokenizer

MASK_SIGN = "░"
ANSWER_START = b'{"line": '


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to sample and how. One of --prompt, --prompts and --chat."""

    model: str = "runs/demo/model"
    """a converted or Hugging Face directory, a hub id, or a preset (random weights)"""
    prompt: str | None = None
    """one prompt; <|mask|> in it, under --template raw, is a position to fill in"""
    prompts: pathlib.Path | None = None
    """a .jsonl file with a `prompt` string or a `messages` list a line"""
    out: pathlib.Path | None = None
    """.jsonl file for the answers to --prompts; answers that are in it already are not computed again"""
    chat: bool = False
    """ask and be answered, turn by turn; an empty line or end of input ends it"""
    template: Literal["auto", "chat", "raw"] = "auto"
    """chat template or the bare text, for prompts that are no messages; auto: as the model was trained, where it says so;
    else raw for byte-level models and chat for others"""
    tokenizer: str | None = None
    """directory with tokenizer files, or "bytes"; by default the model's own"""
    max_new_tokens: int = 128
    """mask tokens after the prompt"""
    preset: Preset = "exact"
    """exact: the published sampler; balanced and fast: cached blocks, as many tokens a pass as are sure enough"""
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
    """noise level at the end of the clock"""
    end_penalty: float = 0.0
    """subtracted from the logit of the end-of-text token"""
    guidance: float = 0.0
    """classifier-free guidance: how far to go from the model without the prompt to the one with it, and past it"""
    mask: str | None = None
    """who may attend to whom: bidirectional, causal, prefix, block-causal:SIZE, window:REACH or window:LEFT:RIGHT; by
    default as the model was trained, which any other mask contradicts"""
    seed: int = 0
    """of everything random; line i of a file uses the key (seed, i)"""
    samples: int = 1
    """answers to each prompt of a file"""
    batch_size: int = 8
    """prompts of a file that are denoised together; one that is done makes room for the next"""
    mesh: str = "1x1"
    """devices, fsdp x tensor"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the weights; auto: float32 on a CPU, bfloat16 elsewhere"""
    adapter: str | None = None
    """directory of an adapter to sample with; added to the weights, or kept beside them under --base int8 and nf4"""
    any_base: bool = False
    """use the adapter on other weights than those it was trained on"""
    base: Literal["auto", "int8", "nf4"] = "auto"
    """how the matrices of the layers are stored; auto: as --dtype says, and codes of 8 or 4 bits to save memory"""
    attention: Backend = "auto"
    """auto: the fastest that can serve; xla runs everywhere"""
    watch: bool = False
    """show the canvas while it is denoised (live on a terminal, some frames elsewhere)"""

    def __post_init__(self) -> None:
        if (self.prompt is not None) + (self.prompts is not None) + self.chat != 1:
            raise ValueError("give either --prompt TEXT or --prompts FILE or --chat")
        if (self.prompts is None) != (self.out is None):
            raise ValueError("--prompts FILE and --out FILE belong together")
        if self.any_base and self.adapter is None:
            raise ValueError("--any-base speaks of an adapter: give --adapter as well")
        if self.mask is not None:
            masks.parse(self.mask)
        if self.batch_size < 1 or self.samples < 1:
            raise ValueError(f"batch_size={self.batch_size} and samples={self.samples} must be at least 1")
        if self.samples > 1 and self.prompts is None:
            raise ValueError(f"samples={self.samples} is for --prompts FILE")
        if self.steps is not None and self.preset != "exact":
            raise ValueError(f"steps={self.steps} means nothing under --preset {self.preset}, which goes by confidence")

    def sampler(self, tokenizer: Tokenizer) -> dream_jax.SamplerConfig:
        chosen = {"steps": self.steps, "alg": self.alg}
        return dream_jax.SamplerConfig.preset(
            self.preset,
            max_new_tokens=self.max_new_tokens,
            **{name: value for name, value in chosen.items() if value is not None},
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            alg_temp=self.alg_temp,
            eps=self.eps,
            end_penalty=self.end_penalty,
            guidance=self.guidance,
            mask=None if self.mask is None else masks.parse(self.mask),
            vocab_limit=tokenizer.vocab_limit,
            forbidden_tokens=(tokenizer.mask_id,),
        )


def main() -> int:
    try:
        return run(tyro.cli(Settings, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command with --out goes on", file=sys.stderr)
        return 130


def run(settings: Settings) -> int:
    console = Console(highlight=False, soft_wrap=True)
    for field in dataclasses.fields(settings):
        if (value := getattr(settings, field.name)) != field.default:
            console.print(f"{field.name}: {value!r}", markup=False)
    mesh = sharding.make_mesh(settings.mesh)
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    # Whatever may be wrong with these shows before minutes of reading weights.
    abstract = pretrained.describe(settings.model)
    if settings.adapter is not None:
        pretrained.describe_adapter(settings.adapter).check_fits(abstract)
    tokenizer = pretrained.find_tokenizer(settings.tokenizer, settings.model, abstract)
    template = find_template(settings, abstract, tokenizer)
    sampler = settings.sampler(tokenizer)
    if settings.chat:
        model = load(settings, dtype, mesh)
        converse(settings, model, sampler, tokenizer, console)
        return 0
    if settings.prompts is None:
        prompt = encode(settings.prompt or "", template, tokenizer)
        check_length(prompt, sampler, abstract, "the prompt")
        model = load(settings, dtype, mesh)
        answer_one(settings, model, prompt, sampler, tokenizer, console)
        return 0
    questions = {one.line: one for one in read_questions(settings.prompts, template, tokenizer)}
    for one in questions.values():
        check_length(one.ids, sampler, abstract, f"{settings.prompts}:{one.line}: the prompt")
    # What the answers depend on, beside the questions.
    recipe = {"model": settings.model, "weights": pretrained.fingerprint(settings.model), "template": template}
    recipe |= {"dtype": dtype, "seed": settings.seed}
    recipe |= {"samples": settings.samples} | dataclasses.asdict(sampler)
    # With the types of what is kept and of the rule, which `asdict` leaves out.
    recipe |= {"cache": repr(sampler.cache), "commit": repr(sampler.commit), "mask": settings.mask}
    if settings.tokenizer not in (None, "bytes"):
        recipe["tokenizer"] = pretrained.fingerprint(settings.tokenizer)
    if settings.adapter is not None:
        recipe["adapter"] = [settings.adapter, pretrained.fingerprint(settings.adapter)]
    if settings.base != "auto":
        recipe["base"] = settings.base
    done = read_done(settings, questions, recipe)
    model = load(settings, dtype, mesh)
    answer_file(settings, questions, done, model, sampler, tokenizer, console)
    return 0


def load(settings: Settings, dtype: str, mesh: jax.sharding.Mesh) -> dream_jax.Dream:
    base = None if settings.base == "auto" else settings.base
    model = dream_jax.load(
        settings.model,
        dtype=dtype,
        mesh=mesh,
        attention_backend=settings.attention,
        base=base,
        adapter=settings.adapter,
        any_base=settings.any_base,
    )
    # As one matrix it is faster; codes cannot hold the sum.
    return dream_jax.merge_adapter(model) if base is None else model


def find_template(settings: Settings, model: dream_jax.Dream, tokenizer: Tokenizer) -> Template:
    if settings.template != "auto":
        return settings.template
    return pretrained.find_template(settings.adapter, model, tokenizer)


def encode(prompt: str | list[dict[str, str]], template: Template, tokenizer: Tokenizer) -> list[int]:
    if isinstance(prompt, list):
        return tokenizer.chat(prompt)
    if template == "chat":
        return tokenizer.chat([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt, allow_special=True)


def check_length(ids: list[int], sampler: dream_jax.SamplerConfig, model: dream_jax.Dream, what: str) -> None:
    total, most = len(ids) + sampler.max_new_tokens, model.config.max_position_embeddings
    if not 0 < total <= most:
        raise ValueError(
            f"{what} has {len(ids)} tokens, with --max-new-tokens {sampler.max_new_tokens} that makes {total}; "
            f"the model takes 1 to {most}"
        )


def show(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """Text of a canvas: masks as a sign, everything from the first settled end-of-text token on left out."""
    text, run_of_tokens = "", []
    for token in [int(token) for token in tokens]:
        if token in (tokenizer.mask_id, tokenizer.eos_id):
            text += tokenizer.decode(run_of_tokens, skip_special=True)
            run_of_tokens = []
            if token == tokenizer.eos_id:
                return text
            text += MASK_SIGN
        else:
            run_of_tokens.append(token)
    return text + tokenizer.decode(run_of_tokens, skip_special=True)


def answer_one(
    settings: Settings,
    model: dream_jax.Dream,
    ids: list[int],
    sampler: dream_jax.SamplerConfig,
    tokenizer: Tokenizer,
    console: Console,
) -> None:
    prompt = np.array(ids, np.int32).reshape(1, -1)
    # Where the prompt itself has positions to fill in, it is part of what is shown.
    begin = 0 if (prompt == tokenizer.mask_id).any() else prompt.shape[1]
    begun = time.monotonic()
    with watching(settings, tokenizer, begin, console) as on_step:
        out = dream_jax.generate(model, prompt, sampler, jax.random.key(settings.seed), on_step=on_step)
        forwards = int(out.forwards)
    seconds = time.monotonic() - begun
    if settings.watch and not console.is_terminal:
        frames = np.unique(np.linspace(-1, int(np.max(out.commit_step)), 6).astype(int))
        for step in frames[:-1]:
            console.print(f"--- canvas {'before the first step' if step < 0 else f'after step {step + 1}'}")
            console.print(show(np.asarray(out.canvas_at(step))[0, begin:], tokenizer), markup=False)
    console.print("--- answer")
    console.print(show(np.asarray(out.tokens)[0, begin:], tokenizer), markup=False)
    console.print(f"--- {forwards} forward passes, {seconds:.1f} s with compilation")


@contextlib.contextmanager
def watching(
    settings: Settings, tokenizer: Tokenizer, begin: int, console: Console
) -> Iterator[Callable[[int, np.ndarray], None] | None]:
    if not (settings.watch and console.is_terminal):
        yield None
        return
    with Live(Panel(Text("compiling")), console=console, transient=True, auto_refresh=False) as live:

        def on_step(step: int, canvas: np.ndarray) -> None:
            text = Text(show(canvas[0, begin:], tokenizer))
            live.update(Panel(text, title=f"step {step + 1}"), refresh=True)

        yield on_step


def converse(
    settings: Settings,
    model: dream_jax.Dream,
    sampler: dream_jax.SamplerConfig,
    tokenizer: Tokenizer,
    console: Console,
) -> None:
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
        prompt = np.array(ids, np.int32).reshape(1, -1)
        with watching(dataclasses.replace(settings, watch=True), tokenizer, len(ids), console) as on_step:
            out = dream_jax.generate(model, prompt, sampler, key, on_step=on_step)
        answer = show(np.asarray(out.tokens)[0, len(ids) :], tokenizer).strip()
        console.print(f"model: {answer}", markup=False)
        messages.append({"role": "assistant", "content": answer})


def answer_file(
    settings: Settings,
    questions: dict[int, Question],
    done: set[tuple[int, int]],
    model: dream_jax.Dream,
    config: dream_jax.SamplerConfig,
    tokenizer: Tokenizer,
    console: Console,
) -> None:
    assert settings.out is not None
    asked = [(line, sample) for line in questions for sample in range(settings.samples)]
    open_ = [one for one in asked if one not in done]
    console.print(f"{len(asked)} prompts, {len(done)} answered already")
    # A key a line of the file, and for further samples one that follows from it: no answer depends on what it is
    # batched with, nor on where a run was stopped.
    key = jax.random.key(settings.seed)
    keys = [jax.random.fold_in(key, line) for line, _ in open_]
    keys = [
        one if not sample else jax.random.fold_in(one, sample) for one, (_, sample) in zip(keys, open_, strict=True)
    ]
    begun, useful, canvas, passes = time.monotonic(), 0, 0, 0
    stream = Stream(
        model,
        [questions[line].ids for line, _ in open_],
        config,
        jnp.stack(keys) if keys else jax.random.split(key, 0),
        batch_size=settings.batch_size,
    )
    with settings.out.open("a", encoding="utf-8") as file, Progress(console=console) as progress:
        task = progress.add_task("prompts", total=len(open_))
        for answer in stream:
            line, sample = open_[answer.prompt]
            ids = questions[line].ids
            begin = 0 if tokenizer.mask_id in ids else len(ids)
            row = {"line": line, "prompt": questions[line].prompt, "answer": show(answer.tokens[begin:], tokenizer)}
            if settings.samples > 1:
                row["sample"] = sample
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            written = answer.commit_step >= 0
            canvas += int(np.sum(written))
            ended = np.cumsum((answer.tokens == tokenizer.eos_id) & written) > 0
            useful += int(np.sum(written & ~ended))
            passes += answer.passes
            progress.update(task, advance=1)
    seconds = max(time.monotonic() - begun, 1e-9)
    console.print(
        f"wrote {settings.out}: {len(open_)} new answers in {seconds:.1f} s with compilation: {useful} tokens before the "
        f"end token ({useful / seconds:.1f} a second), {canvas} on the canvas ({canvas / seconds:.1f} a second); "
        f"{stream.forwards} forward passes, {passes / max(useful, 1):.2f} a row and useful token"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A line of the file of prompts: its number from 1, what it asks, and that as tokens."""

    line: int
    prompt: str | list[dict[str, str]]
    ids: list[int]


def read_questions(path: pathlib.Path, template: Template, tokenizer: Tokenizer) -> Iterator[Question]:
    for where, row in read_json_lines(path):
        if isinstance(row.get("messages"), list):
            prompt: Any = row["messages"]
            if not all(isinstance(message, dict) for message in prompt):
                raise ValueError(f"{where}: each of `messages` must be an object with role and content")
        elif "prompt" in row:
            prompt = text_field(row, "prompt", where)
        else:
            raise ValueError(f"{where}: expected an object with a `prompt` string or a `messages` list")
        try:
            ids = encode(prompt, template, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        yield Question(line=int(where.rpartition(":")[2]), prompt=prompt, ids=ids)


def read_done(settings: Settings, asked: dict[int, Question], recipe: dict[str, Any]) -> set[tuple[int, int]]:
    """Lines and samples that are answered in `out` already. A last line that was cut short is removed from it.

    The file beside it says how its answers are made: a file never holds answers made in two ways.
    """
    assert settings.prompts is not None and settings.out is not None
    path = settings.out
    if path.resolve() == settings.prompts.resolve():
        raise ValueError(f"--out {path} is the file of prompts; give another")
    beside = path.with_name(path.name + ".settings.json")
    recipe = json.loads(json.dumps(recipe))
    if not path.exists() or not path.stat().st_size:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # a folder that cannot be written shows now
        beside.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
        return set()
    before = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
    if before != recipe:
        changed = [
            f"{name} was {before.get(name)!r}, now {value!r}"
            for name, value in recipe.items()
            if before is not None and before.get(name) != value
        ]
        raise ValueError(
            f"{path} holds answers that were made with other settings ({'; '.join(changed) or f'no {beside}'}); "
            "repeat them, or give another --out"
        )
    done: set[tuple[int, int]] = set()
    whole = 0
    content = path.read_bytes()
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not line.endswith(b"\n") and line.startswith(ANSWER_START[: len(line)]):
            break  # cut short while it was written
        known = isinstance(row, dict) and isinstance(row.get("line"), int) and row["line"] in asked
        if not known or asked[row["line"]].prompt != row.get("prompt"):
            raise ValueError(f"{path}, line {number}: not an answer to this file of prompts; give another --out")
        done.add((row["line"], row.get("sample", 0)))
        whole += len(line)
    if whole < len(content):
        os.truncate(path, whole)
    return done


if __name__ == "__main__":
    sys.exit(main())
