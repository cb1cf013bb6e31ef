"""Loads a model with its tokenizer, template and mask from a path, and turns prompts into answers.

The answer to a prompt depends only on the model, the sampler, the prompt and its key, not on the other prompts of its
batch. This module is used by `sample.py`, by `evaluate.py`, by the interface to lm-evaluation-harness, and for the samples
that a training run prints.

Training notes the template and the instruction of its prompts in `prompt_format.json`, beside the model or the adapter.
Here "a note" means this file.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dream_jax import hub, layer_forms, layouts, lora, masks, pretrained, sharding
from dream_jax.attention import Backend
from dream_jax.bounds import check_numbers
from dream_jax.layer_forms import LayersChoice, form_of
from dream_jax.model import Dream
from dream_jax.paths import check_local
from dream_jax.sampler import BlockCache, Preset, SamplerConfig, bucket_length, generate
from dream_jax.tokenizer import (
    ByteTokenizer,
    Message,
    Template,
    Tokenizer,
    Tools,
    load_tokenizer,
    read_instruction,
    read_template,
)

DtypeFlag = Literal["auto", "float32", "bfloat16"]
BaseFlag = Literal["auto", "int8", "nf4"]

MASK_SIGN = "░"
"""The character that stands for a mask token in a text."""

RowName = tuple[int, ...]
"""What determines the random key of an answer: (seed, number of the prompt), or (seed, number of the prompt, number of
the sample) if a prompt may have several samples. Samples are numbered from 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model that answers, and how it is loaded: settings that are shared by all programs which answer prompts.

    Raises:
      ValueError: `any_base` is set without an adapter, `revision` is given although `model` is not a hub id, `mask` is
        not the name of a mask, `mesh` is not the shape of a mesh, a path is an address (see `paths.local_path`), or a
        number in a field of a subclass is not usable (see `bounds.check_numbers`).
    """

    model: str = "runs/demo/model"
    """a converted or Hugging Face directory, a hub id, or a preset (random weights)"""
    revision: str | None = None
    """branch, tag or commit of --model if it is a hub id; by default the newest commit of the main branch"""
    adapter: str | None = None
    """directory of an adapter; it is added to the weights, but stays separate with --base int8 or nf4"""
    any_base: bool = False
    """allow an adapter that was trained on weights other than those of the model"""
    base: BaseFlag = "auto"
    """how the matrices of the layers are stored; auto: in the type of --dtype; int8, nf4: codes of 8 or 4 bits, which
    save memory; with int8 the cached presets read half of the bytes on a GPU"""
    dtype: DtypeFlag = "auto"
    """type of the weights; auto: float32 on a CPU, bfloat16 elsewhere"""
    mesh: str = "1x1"
    """numbers of devices along the mesh axes fsdp and tensor, such as 1x1 or 4x2"""
    layers: LayersChoice = "auto"
    """how the layers are held: stacked, so that they compile fast, or apart, with joined projections, so that GPUs answer
    faster; auto: apart on GPUs. Answers are equal up to rounding"""
    attention: Backend = "auto"
    """attention backend; auto: the fastest one that supports the model and the devices; xla runs everywhere"""
    mask: str | None = None
    """attention mask: bidirectional, causal, prefix, block-causal:SIZE, block-diffusion:SIZE, window:REACH or
    window:LEFT:RIGHT; by default the mask that the model was trained under; the model has not learned to work under
    another one"""
    tokenizer: str | None = None
    """directory with tokenizer files, or "bytes"; by default the tokenizer of the model"""
    template: Literal["auto", "chat", "raw"] = "auto"
    """chat template or raw text, for prompts that are not lists of messages; auto: the template of the training, if
    prompt_format.json beside the adapter or model names it; otherwise raw for byte-level models and chat for others"""

    def __post_init__(self) -> None:
        check_numbers(self)
        sharding.parse_mesh_shape(self.mesh)
        check_local(self, "model", "adapter", "tokenizer")
        object.__setattr__(self, "model", hub.pinned(self.model, self.revision))
        if self.any_base and self.adapter is None:
            raise ValueError("--any-base needs an adapter: pass --adapter DIRECTORY too")
        if self.mask is not None:
            masks.parse(self.mask)

    def short_name(self) -> str:
        """Returns a short name of the model: the last part of its path, and the same for the adapter after a "+".

        If the last part is "model" or "adapter", as in the folder of a run, it is the part before: "demo" for
        runs/demo/model.
        """
        named = [pathlib.PurePath(path) for path in (self.model, self.adapter) if path is not None]
        # Runs keep their model in OUT/model and their adapter in OUT/adapter.
        names = [
            path.parent.name if path.name in ("model", "adapter") and path.parent.name else path.name for path in named
        ]
        return "+".join(name or "model" for name in names)


def memory_remedies(settings: ModelSettings, flag: str, rows: int) -> list[str]:
    """Returns two changes of the settings, as text, with which a program needs less memory; the better one comes first.

    Args:
      settings: the settings of the program.
      flag: name of the flag for the number of rows that are computed together.
      rows: the present value of this flag.
    """
    found = []
    fsdp, tensor, sequence = sharding.parse_mesh_shape(settings.mesh)
    if settings.dtype == "float32":
        found.append("--dtype bfloat16")
    if fewer := rows // 2 // fsdp * fsdp:  # fsdp must divide the number of rows
        found.append(f"{flag} {fewer}")
    if settings.base == "auto":
        found.append("--base int8")
    if settings.base != "nf4":
        found.append("--base nf4")
    if fsdp * tensor * sequence == 1:
        found.append("--mesh 2x1 on two devices")
    return [*found, "fewer new tokens", "more devices in --mesh"][:2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model whose files have been checked, but whose weights have not been read yet.

    Attributes:
      settings: the settings from which `prepare` made this object.
      mesh: the mesh of devices on which `load` puts the parameters.
      dtype: name of the type of the weights, "float32" or "bfloat16".
      model: an abstract model: shapes in place of weights. Its `trained_mask` is the mask under which it will answer.
      tokenizer: the tokenizer that the settings name, or that of the model.
      template: how prompts become tokens.
      instruction: the text that comes before each question, because the model was trained with it; "" for none.
      note: a warning or hint about the adapter for the user, in one line; None if there is none.
    """

    settings: ModelSettings
    mesh: Mesh
    dtype: str
    model: Dream
    tokenizer: Tokenizer
    template: Template
    instruction: str = ""
    note: str | None = None

    def load(self) -> Dream:
        """Returns the model with its weights.

        An adapter is added to float weights, because one matrix product is faster than two. With int8 or nf4 codes it
        stays a separate adapter, because codes cannot represent the sum. On a GPU the scales of int8 codes are rounded to
        bfloat16, see `lora.round_scales`.

        Raises:
          ValueError, OSError: as `pretrained.load` raises.
        """
        settings, form = self.settings, form_of(self.settings.layers, self.mesh)
        base = None if settings.base == "auto" else settings.base
        model = pretrained.load(
            settings.model,
            dtype=self.dtype,
            mesh=self.mesh,
            attention_backend=settings.attention,
            base=base,
            adapter=settings.adapter,
            any_base=settings.any_base,
            layers=form,
        )
        if base is None:
            lora.merge_inside(model)
        if form == "apart":
            layer_forms.join(model)
        if base == "int8" and self.dtype == "bfloat16" and sharding.platform_of(self.mesh) == "gpu":
            lora.round_scales(model)
        layouts.lay_out(model)
        if settings.mask is not None:
            model.trained_mask = settings.mask
        return model


def prepare(settings: ModelSettings, *, default_template: Template | None = None) -> PreparedModel:
    """Checks a model and finds its tokenizer and template, so that errors are raised before the weights are read.

    Args:
      settings: the model and how it is loaded.
      default_template: the template if neither the settings, the adapter nor the model determine one; None for "raw"
        with byte-level tokenizers and "chat" with others.

    Raises:
      ValueError: the mesh needs more devices than there are, the checkpoint is damaged or of an unknown form, the
        adapter belongs to another model, or the tokenizer is missing or belongs to another model.
      OSError: a file is missing or cannot be read.
    """
    mesh = sharding.make_mesh(settings.mesh)
    dtype: str = settings.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model, note = pretrained.describe(settings.model, layers=form_of(settings.layers, mesh)), None
    if settings.adapter is not None:
        adapter = pretrained.describe_adapter(settings.adapter)
        adapter.check_fits(model)
        model.trained_mask, note = adapter.mask, adapter.note
    if settings.mask is not None:
        model.trained_mask = settings.mask
    tokenizer = find_tokenizer(settings.tokenizer, settings.model, model)
    if settings.template != "auto":
        template: Template = settings.template
    else:
        template = noted_template(settings.adapter, model) or default_template or by_tokenizer(tokenizer)
    return PreparedModel(
        settings=settings,
        mesh=mesh,
        dtype=dtype,
        model=model,
        tokenizer=tokenizer,
        template=template,
        # Training puts the instruction into a user turn. A raw prompt has no turns, so it gets no instruction.
        instruction=noted_instruction(settings.adapter, model) if template == "chat" else "",
        note=note,
    )


def find_tokenizer(named: str | None, name: str, model: Dream) -> Tokenizer:
    """Returns the tokenizer that `named` names, or else the tokenizer of the model.

    Args:
      named: directory with tokenizer files, or "bytes"; None for the tokenizer of the model.
      name: path or preset name of the model.
      model: the model, which may be abstract.

    Raises:
      ValueError: there is no tokenizer, or it belongs to another model.
      OSError: a tokenizer file cannot be read.
    """
    directory = named or model.tokenizer_dir or ("bytes" if name == "nano" else None)
    if directory is None:
        raise ValueError(
            f"{name} has no tokenizer files; pass --tokenizer DIRECTORY (tokenizer=DIRECTORY), a directory that has them"
        )
    tokenizer = load_tokenizer(directory)
    if tokenizer.mask_id != model.config.mask_token_id:
        raise ValueError(
            f"the mask token is {tokenizer.mask_id} in the tokenizer, but {model.config.mask_token_id} in the model; "
            "pass --tokenizer DIRECTORY (tokenizer=DIRECTORY) with the tokenizer of this model"
        )
    return tokenizer


def noted_template(adapter: str | None, model: Dream) -> Template | None:
    """Returns the template in the note beside the adapter, or else beside the model; None if neither has a note.

    Raises:
      ValueError: a note cannot be read.
    """
    directory = _noting_directory(adapter, model)
    return None if directory is None else read_template(directory)


def noted_instruction(adapter: str | None, model: Dream) -> str:
    """Returns the instruction that training put before each question, from the note that `noted_template` reads.

    The instruction is "" if there is no note or no instruction in it.

    Raises:
      ValueError: a note cannot be read.
    """
    directory = _noting_directory(adapter, model)
    return "" if directory is None else read_instruction(directory)


def _noting_directory(adapter: str | None, model: Dream) -> str | None:
    """Returns the directory with the note: that of the adapter, or else that of the model; None if neither has one."""
    for directory in (adapter, model.tokenizer_dir):
        if directory is not None and read_template(directory) is not None:
            return directory
    return None


def with_instruction(question: str, instruction: str) -> str:
    """Returns the instruction, an empty line and the question; the question alone if the instruction is ""."""
    return f"{instruction}\n\n{question}" if instruction else question


def by_tokenizer(tokenizer: Tokenizer) -> Template:
    """Returns the template for a model without a note: "raw" for byte-level tokenizers, "chat" for others."""
    return "raw" if isinstance(tokenizer, ByteTokenizer) else "chat"


def make_sampler(
    tokenizer: Tokenizer,
    max_new_tokens: int,
    preset: Preset = "exact",
    *,
    trained_mask: str = "bidirectional",
    **options: Any,
) -> SamplerConfig:
    """Returns a preset of the sampler that writes only tokens of this tokenizer, and never the mask token.

    Args:
      tokenizer: the tokenizer of the model.
      max_new_tokens: number of tokens of an answer.
      preset: name of the preset, see `SamplerConfig.preset`.
      trained_mask: `Dream.trained_mask`; a model of block diffusion is sampled in its own blocks.
      **options: further fields of SamplerConfig; a value of None leaves the value of the preset.

    Raises:
      ValueError: SamplerConfig refuses the values, or `steps` is given with a preset that has no number of steps.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if preset != "exact" and "steps" in given:
        raise ValueError(
            f"steps={given['steps']} has no effect with the preset {preset!r}, which writes by confidence; leave it "
            "out, or use the preset 'exact'"
        )
    return SamplerConfig.preset(
        preset,
        max_new_tokens=max_new_tokens,
        trained_mask=trained_mask,
        vocab_limit=tokenizer.vocab_limit,
        forbidden_tokens=(tokenizer.mask_id,),
        **given,
    )


def encode_prompt(
    prompt: str | Sequence[Message],
    template: Template,
    tokenizer: Tokenizer,
    *,
    instruction: str = "",
    tools: Tools = (),
    allow_special: bool = False,
) -> list[int]:
    """Returns the token ids of a prompt.

    Args:
      prompt: the messages of a chat, or a text.
      template: "chat" makes a text one user turn, "raw" encodes it without a template. Messages are always a chat, and
        so is a text with tools.
      tokenizer: the tokenizer of the model.
      instruction: a text to put before the question, see `PreparedModel.instruction`. It is used only if the prompt is
        a text that becomes a user turn, not for messages and not for raw text.
      tools: functions that the chat template announces, as JSON schemas.
      allow_special: whether "<|mask|>" and other special tokens that are written in a raw text become these tokens;
        otherwise their characters are encoded as ordinary text.

    Raises:
      ValueError: the messages are not a valid chat.
    """
    if not isinstance(prompt, str):
        return tokenizer.chat(prompt, tools=tools)
    if template == "chat" or tools:
        return tokenizer.chat([{"role": "user", "content": with_instruction(prompt, instruction)}], tools=tools)
    return tokenizer.encode(prompt, allow_special=allow_special)


def sampler_recipe(config: SamplerConfig, prompts: Iterable[Sequence[int]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the settings of the sampler on which the answers to these prompts depend, as a dict that JSON can hold.

    `steps=None` means one step for each mask token of the canvas. If no prompt has mask tokens to fill in, this is the
    number of new tokens, and the dict has this number instead of None. So both settings give equal dicts. The dict has
    no `first_token_first` if it is off, as those of earlier versions.
    """
    steps = config.steps
    if steps is None and not any(tokenizer.mask_id in ids for ids in prompts):
        steps = max(1, config.max_new_tokens)
    # `asdict` gives only the fields of the cache and of the commit rule, not their types, so their `repr` is added.
    described = {"steps": steps, "cache": repr(config.cache), "commit": repr(config.commit)}
    found = dataclasses.asdict(config) | described
    return found if config.first_token_first else {name: found[name] for name in found if name != "first_token_first"}


def check_length(
    ids: Sequence[int],
    max_new_tokens: int,
    model: Dream,
    where: str,
    *,
    shortest: int = 1,
    remedy: str = "a shorter prompt",
) -> None:
    """Raises ValueError if a prompt and its answer do not fit the model; the message begins with `where`.

    Args:
      ids: token ids of the prompt.
      max_new_tokens: number of tokens of the answer; 0 for a text that is only scored or filled in.
      model: the model, which may be abstract.
      where: the origin of the prompt, such as "FILE:LINE".
      shortest: minimum number of tokens of a prompt; only `generate` accepts empty prompts.
      remedy: what the user can try besides a smaller --max-new-tokens.
    """
    total, longest = len(ids) + max_new_tokens, model.config.max_position_embeddings
    if len(ids) < shortest or not 0 < total <= longest:
        raise ValueError(
            f"{where}: a prompt of {len(ids)} tokens and {max_new_tokens} new tokens make {total}. A prompt must have at "
            f"least {shortest} tokens, and together they must be 1 to {longest} tokens; try {remedy} or a smaller "
            "--max-new-tokens"
        )


def batches(lengths: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Divides prompts into batches, so that all prompts of a batch have the same `bucket_length`.

    Args:
      lengths: number of tokens of each prompt.
      size: the largest number of prompts in a batch.

    Returns:
      The indices (into `lengths`) of the prompts of each batch, shortest prompts first.
    """
    order = sorted(range(len(lengths)), key=lambda index: (bucket_length(lengths[index]), index))
    filled: list[list[int]] = []
    for index in order:
        full = not filled or len(filled[-1]) == size
        if full or bucket_length(lengths[filled[-1][0]]) != bucket_length(lengths[index]):
            filled.append([])
        filled[-1].append(index)
    return [tuple(batch) for batch in filled]


def left_padded(rows: Sequence[Sequence[int] | np.ndarray], size: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of different lengths as one batch, whose width P is the `bucket_length` of the longest row.

    Args:
      rows: token ids of each row, at least one id per row.
      size: number of rows of the batch. Rows that are missing in `rows` get one valid token, `pad_id`.
      pad_id: token that fills the positions before shorter rows.

    Returns:
      Tokens int32 [size, P], and bool [size, P], which is true at valid tokens.
    """
    width = bucket_length(max(map(len, rows)))
    tokens_BP, valid_BP = np.full((size, width), pad_id, np.int32), np.zeros((size, width), bool)
    valid_BP[len(rows) :, -1] = True
    for index, row in enumerate(rows):
        tokens_BP[index, width - len(row) :] = row
        valid_BP[index, width - len(row) :] = True
    return tokens_BP, valid_BP


def row_keys(names: Sequence[RowName]) -> jax.Array:
    """Returns a random key for each name, as an array [rows]. The names must be all pairs or all triples.

    The key is made from the seed, and the number of the prompt is folded in. The number of the sample is folded in only
    if it is not 0. So sample 0 of a prompt is the same whether one sample or several are drawn.
    """
    if not names:
        return jax.random.split(jax.random.key(0), 0)
    seeds, numbers, *samples = np.array(names).T
    keys = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(seeds, numbers)
    for sample in samples:
        keys = jnp.where(sample == 0, keys, jax.vmap(jax.random.fold_in)(keys, sample))
    return keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextAnswer:
    """The answer to a prompt.

    Attributes:
      text: the text of the answer before its end, or of the prompt and the answer if the prompt itself had mask tokens
        to fill in. An answer ends at its first end-of-text token or `<|im_end|>` (`end_ids`). Other special tokens
        appear by name, such as `<|im_start|>`.
      canvas: like `text`, but with the end and what the sampler wrote after it, where all special tokens appear by name.
      tokens: token ids of the answer.
      tokens_to_end: number of tokens of the answer before its end; None if it does not end.
      num_written: number of tokens that the sampler wrote, in the answer and at mask tokens of the prompt.
      num_useful: number of written tokens before the end of the answer.
      forwards: number of forward passes of the batch; in a `sampler.Stream`, of the passes in which the row took part.
    """

    text: str
    canvas: str
    tokens: tuple[int, ...]
    tokens_to_end: int | None
    num_written: int
    num_useful: int
    forwards: int

    def until(self, stops: Sequence[str]) -> str:
        """Returns the text of the answer up to the first occurrence of one of `stops`; empty stops are ignored.

        The stops are searched in `canvas`. So a stop may be the name of a special token, such as "<|im_end|>", and it may
        begin before the end of the answer and go on after it.
        """
        found = [self.canvas.find(stop) for stop in stops if stop]
        return self.text[: min((at for at in found if at >= 0), default=None)]


def read_answer(
    tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray, tokens: np.ndarray, commit_step: np.ndarray, forwards: int
) -> TextAnswer:
    """Returns the answer in one row of the sampler's result.

    Args:
      tokenizer: the tokenizer of the model.
      prompt: token ids [P], mask tokens included, without padding.
      tokens: integers [P + N], the prompt and the answer.
      commit_step: integers [P + N], as in `Sample`.
      forwards: number of forward passes.
    """
    begin, first_end = shown_from(prompt, tokenizer)
    answer, written = tokens[len(prompt) :], commit_step >= 0
    is_end = np.isin(answer, end_ids(tokenizer))
    end = canvas_end(tokens, tokenizer, first_end)
    return TextAnswer(
        text=canvas_text(tokens[begin:end], tokenizer, len(tokens)),
        canvas=canvas_text(tokens[begin:], tokenizer, len(tokens)),
        tokens=tuple(answer.tolist()),
        tokens_to_end=int(np.argmax(is_end)) if is_end.any() else None,
        num_written=int(np.sum(written)),
        num_useful=int(np.sum(written[:end])),
        forwards=forwards,
    )


def shown_from(prompt: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> tuple[int, int]:
    """Returns (begin, first_end), two indices of tokens of the canvas.

    `begin` is where the shown text begins. `first_end` is the first index at which an end token ends the text. Both are
    the length of the prompt. But if the prompt has mask tokens to fill in, the shown text begins with the prompt (index
    0), and only an end token after the last given token of the prompt ends it.
    """
    given = np.flatnonzero(np.asarray(prompt) != tokenizer.mask_id)
    if len(given) == len(prompt):
        return len(prompt), len(prompt)
    return 0, int(given[-1]) + 1 if len(given) else 0


def end_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """Returns the ids of the tokens that end an answer: end-of-text, and `<|im_end|>`, which ends a message."""
    return tokenizer.eos_id, tokenizer.im_end_id


def canvas_end(tokens: np.ndarray, tokenizer: Tokenizer, first_end: int = 0) -> int:
    """Returns the index of the first end token of a canvas [T] at `first_end` or after it; T if there is none."""
    is_end = np.isin(tokens[first_end:], end_ids(tokenizer))
    return first_end + int(np.argmax(is_end)) if is_end.any() else len(tokens)


def answer(
    model: Dream,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int] | np.ndarray],
    names: Sequence[RowName],
    config: SamplerConfig,
    size: int,
) -> list[TextAnswer]:
    """Returns the answers to prompts that fit into one batch, in the order of the prompts.

    Args:
      model, config: as for `sampler.generate`.
      tokenizer: the tokenizer of the model.
      prompts: token ids of each prompt, at least one id per prompt.
      names: a name for each prompt, from which its key follows (`row_keys`).
      size: number of rows of the batch, at least the number of prompts; missing rows are filled up.
    """
    # A canvas that grows (`BlockCache`) grows until the text of every row has ended. So rows that fill up the batch repeat
    # the last one there, with its key, and end when it ends.
    filling = [prompts[-1]] * (size - len(prompts)) if isinstance(config.cache, BlockCache) else []
    tokens_BP, valid_BP = left_padded([*prompts, *filling], size, tokenizer.pad_id)
    keys = row_keys([*names, *[names[-1]] * (size - len(names))])
    out = generate(model, tokens_BP, config, keys, prompt_mask=valid_BP)
    tokens_BT, commit_step_BT, forwards = np.asarray(out.tokens), np.asarray(out.commit_step), int(out.forwards)
    begins = [tokens_BP.shape[1] - len(ids) for ids in prompts]
    return [
        read_answer(tokenizer, ids, tokens_BT[index, begin:], commit_step_BT[index, begin:], forwards)
        for index, (ids, begin) in enumerate(zip(prompts, begins, strict=True))
    ]


def canvas_text(tokens: np.ndarray, tokenizer: Tokenizer, first_end: int = 0) -> str:
    """Returns the text of a canvas [T], with `MASK_SIGN` for each mask token.

    The text ends before the first end token at `first_end` or after it (see `canvas_end`). Other special tokens
    appear by name, such as `<|im_start|>`.
    """
    text, written = "", list[int]()
    for token in tokens[: canvas_end(tokens, tokenizer, first_end)].tolist():
        if token != tokenizer.mask_id:
            written.append(token)
            continue
        text += tokenizer.decode(written) + MASK_SIGN
        written = []
    return text + tokenizer.decode(written)
