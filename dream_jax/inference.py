"""From a path to a model with its tokenizer, template and mask, and from prompts to answers.

What a prompt becomes depends on the model, the sampler, the prompt and its key alone, not on the batch that it is in.
`sample.py`, `evaluate.py`, the adapter to lm-evaluation-harness and the samples of a training run all answer through here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dream_jax import masks, pretrained, sharding
from dream_jax.attention import Backend
from dream_jax.model import Dream
from dream_jax.sampler import Preset, SamplerConfig, bucket_length, generate
from dream_jax.tokenizer import ByteTokenizer, Message, Template, Tokenizer, load_tokenizer, read_template

DtypeFlag = Literal["auto", "float32", "bfloat16"]
BaseFlag = Literal["auto", "int8", "nf4"]

MASK_SIGN = "░"
"""Shown in place of a mask token."""

RowName = tuple[int, ...]
"""What the key of an answer follows from: (seed, number of the prompt), or (seed, number, sample)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model answers, and how it is loaded: the settings that all programs share which answer prompts.

    Raises: ValueError for --any-base without an adapter, or for a mask that is none.
    """

    model: str = "runs/demo/model"
    """a converted or Hugging Face directory, a hub id, or a preset (random weights)"""
    adapter: str | None = None
    """directory of an adapter; added to the weights, or kept beside them under --base int8 and nf4"""
    any_base: bool = False
    """use the adapter on other weights than those it was trained on"""
    base: BaseFlag = "auto"
    """how the matrices of the layers are stored; auto: as --dtype says, and codes of 8 or 4 bits to save memory"""
    dtype: DtypeFlag = "auto"
    """of the weights; auto: float32 on a CPU, bfloat16 elsewhere"""
    mesh: str = "1x1"
    """devices, fsdp x tensor"""
    attention: Backend = "auto"
    """auto: the fastest that can serve; xla runs everywhere"""
    mask: str | None = None
    """who may attend to whom: bidirectional, causal, prefix, block-causal:SIZE, window:REACH or window:LEFT:RIGHT; by
    default as the model was trained, which any other mask contradicts"""
    tokenizer: str | None = None
    """directory with tokenizer files, or "bytes"; by default the model's own"""
    template: Literal["auto", "chat", "raw"] = "auto"
    """chat template or the bare text, for prompts that are no messages; auto: as the model was trained, where it says so;
    else raw for byte-level models and chat for others"""

    def __post_init__(self) -> None:
        if self.any_base and self.adapter is None:
            raise ValueError("--any-base speaks of an adapter: give --adapter as well")
        if self.mask is not None:
            masks.parse(self.mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model whose files have been checked and whose weights have not been read yet.

    Attributes:
      settings: that it was prepared by.
      mesh: devices that it will lie on.
      dtype: of its weights, by name.
      model: with shapes in place of weights; its `trained_mask` is the mask that it will answer under.
      tokenizer: the named one or the model's own.
      template: how its prompts are written.
    """

    settings: ModelSettings
    mesh: Mesh
    dtype: str
    model: Dream
    tokenizer: Tokenizer
    template: Template

    def load(self) -> Dream:
        """Reads the weights. An adapter is added to float weights, which is faster; codes cannot hold the sum.

        Raises: as `pretrained.load`.
        """
        settings = self.settings
        base = None if settings.base == "auto" else settings.base
        model = pretrained.load(
            settings.model,
            dtype=self.dtype,
            mesh=self.mesh,
            attention_backend=settings.attention,
            base=base,
            adapter=settings.adapter,
            any_base=settings.any_base,
        )
        if base is None:
            model = pretrained.merge_adapter(model)
        if settings.mask is not None:
            model.trained_mask = settings.mask
        return model


def prepare(settings: ModelSettings, *, default_template: Template | None = None) -> PreparedModel:
    """Everything about a model that can be known, and can be wrong, before its weights are read.

    Args:
      settings: which model.
      default_template: where neither the settings nor the model say how prompts are written; by default "raw" for
        byte-level tokenizers and "chat" for others.

    Raises:
      ValueError: a mesh that does not fit, a damaged or foreign checkpoint, an adapter of another model, no tokenizer or
        one of another model.
      OSError: files that are missing or cannot be read.
    """
    mesh = sharding.make_mesh(settings.mesh)
    dtype: str = settings.dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = pretrained.describe(settings.model)
    if settings.adapter is not None:
        adapter = pretrained.describe_adapter(settings.adapter)
        adapter.check_fits(model)
        model.trained_mask = adapter.mask
    if settings.mask is not None:
        model.trained_mask = settings.mask
    tokenizer = find_tokenizer(settings.tokenizer, settings.model, model)
    if settings.template != "auto":
        template: Template = settings.template
    else:
        template = noted_template(settings.adapter, model) or default_template or by_tokenizer(tokenizer)
    return PreparedModel(settings=settings, mesh=mesh, dtype=dtype, model=model, tokenizer=tokenizer, template=template)


def find_tokenizer(named: str | None, name: str, model: Dream) -> Tokenizer:
    """The tokenizer that is named, or the model's own.

    Args:
      named: directory with tokenizer files, or "bytes"; None for the model's own.
      name: of the model, as it was asked for.
      model: may be abstract.

    Raises:
      ValueError: there is none, or it is another model's.
      OSError: its files cannot be read.
    """
    directory = named or model.tokenizer_dir or ("bytes" if name == "nano" else None)
    if directory is None:
        raise ValueError(f"{name} has no tokenizer files; pass --tokenizer with a directory of some")
    tokenizer = load_tokenizer(directory)
    if tokenizer.mask_id != model.config.mask_token_id:
        raise ValueError(
            f"the tokenizer's mask token is {tokenizer.mask_id}, the model's {model.config.mask_token_id}: "
            "they do not belong together"
        )
    return tokenizer


def noted_template(adapter: str | None, model: Dream) -> Template | None:
    """How training noted that prompts were written, in the adapter's directory or else in the model's; None without a note.

    Raises: ValueError for a note that cannot be read.
    """
    for directory in (adapter, model.tokenizer_dir):
        noted = None if directory is None else read_template(directory)
        if noted is not None:
            return noted
    return None


def by_tokenizer(tokenizer: Tokenizer) -> Template:
    """The template of a model that notes none: byte-level models are trained on bare text, others on chats."""
    return "raw" if isinstance(tokenizer, ByteTokenizer) else "chat"


def make_sampler(tokenizer: Tokenizer, max_new_tokens: int, preset: Preset = "exact", **options: Any) -> SamplerConfig:
    """A preset of the sampler that writes tokens of this tokenizer only, and no mask.

    Args:
      tokenizer: of the model.
      max_new_tokens: tokens of the answer.
      preset: see `SamplerConfig.preset`.
      **options: further fields of SamplerConfig; None leaves what the preset says.

    Raises:
      ValueError: values that cannot be, or steps where the sampler goes by confidence.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if preset != "exact" and "steps" in given:
        raise ValueError(f"steps={given['steps']} means nothing under the sampler {preset}, which goes by confidence")
    return SamplerConfig.preset(
        preset,
        max_new_tokens=max_new_tokens,
        vocab_limit=tokenizer.vocab_limit,
        forbidden_tokens=(tokenizer.mask_id,),
        **given,
    )


def encode_prompt(
    prompt: str | Sequence[Message], template: Template, tokenizer: Tokenizer, *, allow_special: bool = False
) -> list[int]:
    """Token ids of a prompt.

    Args:
      prompt: messages of a chat, or a text, which is one user turn under "chat".
      template: see `Template`; messages are always a chat.
      tokenizer: of the model.
      allow_special: whether "<|mask|>" and its like in a bare text become control tokens; else they are spelled out.

    Raises:
      ValueError: messages that are no chat.
    """
    if not isinstance(prompt, str):
        return tokenizer.chat(prompt)
    if template == "chat":
        return tokenizer.chat([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt, allow_special=allow_special)


def check_length(
    ids: Sequence[int],
    max_new_tokens: int,
    model: Dream,
    where: str,
    *,
    shortest: int = 1,
    remedy: str = "a shorter prompt",
) -> None:
    """Raises ValueError, opening with `where`, for a prompt that does not fit the model with its answer.

    Args:
      ids: of the prompt.
      max_new_tokens: tokens of the answer; 0 for a text that is only scored or filled in.
      model: may be abstract.
      where: which prompt it is.
      shortest: tokens that a prompt must have; only `generate` takes prompts of none.
      remedy: what may help, beside fewer new tokens.
    """
    total, most = len(ids) + max_new_tokens, model.config.max_position_embeddings
    if len(ids) < shortest or not 0 < total <= most:
        raise ValueError(
            f"{where}: a prompt of {len(ids)} tokens and {max_new_tokens} new ones make {total}; the model takes prompts "
            f"of at least {shortest} and 1 to {most} in all: {remedy} or a smaller --max-new-tokens may help"
        )


def batches(lengths: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Indices of prompts of these lengths in batches of at most `size`; prompts of a batch share a bucket of lengths."""
    order = sorted(range(len(lengths)), key=lambda index: (bucket_length(lengths[index]), index))
    found: list[list[int]] = []
    for index in order:
        full = not found or len(found[-1]) == size
        if full or bucket_length(lengths[found[-1][0]]) != bucket_length(lengths[index]):
            found.append([])
        found[-1].append(index)
    return [tuple(batch) for batch in found]


def left_padded(rows: Sequence[Sequence[int] | np.ndarray], size: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as one batch, as wide as their bucket of lengths.

    Args:
      rows: token ids; none empty.
      size: rows of the batch. Those beyond `rows` hold one valid token, a pad.
      pad_id: what stands before shorter rows.

    Returns:
      tokens int32 [size, P] and valid bool [size, P], true at the tokens of the rows.
    """
    width = bucket_length(max(map(len, rows)))
    tokens_BP, valid_BP = np.full((size, width), pad_id, np.int32), np.zeros((size, width), bool)
    valid_BP[len(rows) :, -1] = True
    for index, row in enumerate(rows):
        tokens_BP[index, width - len(row) :] = row
        valid_BP[index, width - len(row) :] = True
    return tokens_BP, valid_BP


def row_keys(names: Sequence[RowName]) -> jax.Array:
    """A random key for each name, all of one length: [rows].

    It is the seed's key folded with the number, and where the sample is not 0 with that as well: the first of several
    samples of a prompt is the one that is drawn alone.
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
    """What a prompt became.

    Attributes:
      text: what comes before the first end-of-text token, special tokens left out; of the answer alone, or of prompt and
        answer when the prompt itself had mask tokens to fill in.
      tokens: the answer's tokens.
      tokens_to_end: how many of them come before the first end-of-text token; None when there is none.
      num_written: tokens that the sampler wrote, those filled into the prompt included.
      num_useful: how many of them come before the first end-of-text token that it wrote.
      forwards: forward passes that it took: those of its batch, or of its row in a stream.
    """

    text: str
    tokens: tuple[int, ...]
    tokens_to_end: int | None
    num_written: int
    num_useful: int
    forwards: int


def read_answer(
    tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray, tokens: np.ndarray, commit_step: np.ndarray, forwards: int
) -> TextAnswer:
    """The answer in a row of the sampler: int [P + N], the prompt without padding first, and the steps that wrote it."""
    begin = 0 if tokenizer.mask_id in prompt else len(prompt)
    answer, written = tokens[len(prompt) :], commit_step >= 0
    is_end = answer == tokenizer.eos_id
    after_end = np.cumsum((tokens == tokenizer.eos_id) & written) > 0
    return TextAnswer(
        text=canvas_text(tokens[begin:], tokenizer),
        tokens=tuple(answer.tolist()),
        tokens_to_end=int(np.argmax(is_end)) if is_end.any() else None,
        num_written=int(np.sum(written)),
        num_useful=int(np.sum(written & ~after_end)),
        forwards=forwards,
    )


def answer(
    model: Dream,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int] | np.ndarray],
    names: Sequence[RowName],
    config: SamplerConfig,
    size: int,
) -> list[TextAnswer]:
    """Answers prompts that fit one batch.

    Args:
      model, config: see `sampler.generate`.
      tokenizer: of the model.
      prompts: token ids, none empty.
      names: of each prompt; its key follows from it (`row_keys`).
      size: rows that are computed, whatever is given; no smaller than the number of prompts.
    """
    tokens_BP, valid_BP = left_padded(prompts, size, tokenizer.pad_id)
    keys = row_keys([*names, *[names[-1]] * (size - len(names))])
    out = generate(model, tokens_BP, config, keys, prompt_mask=valid_BP)
    tokens_BT, commit_step_BT, forwards = np.asarray(out.tokens), np.asarray(out.commit_step), int(out.forwards)
    begins = [tokens_BP.shape[1] - len(ids) for ids in prompts]
    return [
        read_answer(tokenizer, ids, tokens_BT[index, begin:], commit_step_BT[index, begin:], forwards)
        for index, (ids, begin) in enumerate(zip(prompts, begins, strict=True))
    ]


def canvas_text(tokens: np.ndarray, tokenizer: Tokenizer) -> str:
    """Text of a canvas int [T]: a sign for each mask, and nothing from the first settled end-of-text token on."""
    text, settled = "", []
    for token in tokens.tolist():
        if token not in (tokenizer.mask_id, tokenizer.eos_id):
            settled.append(token)
            continue
        text += tokenizer.decode(settled, skip_special=True)
        settled = []
        if token == tokenizer.eos_id:
            return text
        text += MASK_SIGN
    return text + tokenizer.decode(settled, skip_special=True)
