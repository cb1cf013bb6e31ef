"""Makes a Dream checkpoint, from which training can start, from an autoregressive Qwen2 checkpoint, as Dream did.

The weights stay the same: Dream is the transformer of Qwen2.5 without the causal mask, and because of the right shift each
position still predicts the next token. Two tokens, the mask token and `<|beginoftext|>`, are added. They use rows of the
padded embedding table of Qwen2.5 that no token of its tokenizer uses.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from dream_jax import hf
from dream_jax.config import DreamConfig, with_rope_theta
from dream_jax.files import check_new_directory, new_directory, read_json, read_typed, write_json
from dream_jax.paths import AnyPath, copy_companion, local_path
from dream_jax.pretrained.directories import (
    check_tokenizer_directory,
    companions,
    find_directory,
    known_files,
    write_sums,
)
from dream_jax.tokenizer import BYTE_TOKENIZER_FILE, TOKENIZER_FILES

MaskRow = Literal["keep", "mean"]
"""Initial embedding of the mask token: "keep" for the unused row as it is, "mean" for the mean of all rows before it."""

MASK, BEGIN = "<|mask|>", "<|beginoftext|>"

# Keys that only a Qwen2 configuration has, with the values for which a Dream model computes the same as the Qwen2 one.
_QWEN2_SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "architectures": (["Qwen2ForCausalLM"], None),
    "rope_scaling": (None,),
}
# Keys that `dream_config` reads itself, or that have no meaning for a Dream model.
_DROPPED = frozenset({"model_type", "architectures", "rope_parameters", "rope_theta", "layer_types"})
_DROPPED |= {"bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"}
_BLOCK_ROWS = 4096
_REMEDY = "copy the tokenizer files of the checkpoint again, or give --tokenizer"


def dream_config(
    fields: Mapping[str, Any], *, mask_token_id: int, pad_token_id: int, ignore: Iterable[str] = ()
) -> DreamConfig:
    """Returns the Dream configuration of a Qwen2 `config.json`, which is read key by key.

    Args:
      fields: the content of config.json, as transformers 4 (`rope_theta`) or 5 (`rope_parameters`) writes it.
      mask_token_id: id of the mask token, a row of the embedding table that no token uses.
      pad_token_id: id of the end-of-text token, which is also the padding.
      ignore: keys of config.json that are known not to change what the weights compute.

    Raises:
      ValueError: this is not a Qwen2 configuration; it lacks a key, has an unknown key, or has a value that is not
        implemented, such as sliding windows or a scaled rotary embedding; or a token id is outside the embedding table.
    """
    if fields.get("model_type") != "qwen2":
        raise ValueError(
            f"config.json has model_type={fields.get('model_type')!r}, but only 'qwen2' can become a Dream"
        )
    for key, known in _QWEN2_SWITCHES.items():
        if fields.get(key) not in known:
            raise ValueError(f"config.json has {key}={fields[key]!r}, but only {known[0]!r} can become a Dream")
    layers = fields.get("layer_types") or []
    if not isinstance(layers, list) or any(kind != "full_attention" for kind in layers):
        raise ValueError(
            f"config.json has layer_types={layers!r:.200}, but only full attention in every layer can become a Dream"
        )
    fields = with_rope_theta(fields)
    if fields.get("rope_theta") is None:
        raise ValueError(
            "config.json has neither rope_theta nor rope_parameters with rope_theta; add the one of its training"
        )
    rows = check_vocab_size(fields)
    given = {key: value for key, value in fields.items() if key not in _DROPPED}
    for name, number in (("mask_token_id", mask_token_id), ("pad_token_id", pad_token_id)):
        if not 0 <= number < rows:
            raise ValueError(
                f"{name}={number} is outside the embedding table of vocab_size={rows} rows; give the id of "
                f"a row that no token uses (--{name.replace('_', '-')})"
            )
    dream_fields = {
        "model_type": "Dream",
        "rope_theta": fields["rope_theta"],
        "mask_token_id": mask_token_id,
        "pad_token_id": pad_token_id,
    }
    return DreamConfig.from_dict(given | dream_fields, ignore=ignore)


def check_vocab_size(fields: Mapping[str, Any]) -> int:
    """Returns the number of rows of the embedding table. Raises ValueError if `vocab_size` is missing or no such number."""
    rows = fields.get("vocab_size")
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ValueError(
            f"config.json has vocab_size={rows!r:.80}, which must be a positive integer: the rows of the embedding table"
            if "vocab_size" in fields
            else "config.json lacks vocab_size, the number of rows of the embedding table; add it"
        )
    return rows


def adapt_qwen2(
    source: AnyPath,
    target: AnyPath,
    *,
    mask_row: MaskRow = "keep",
    mask_token_id: int = 151666,
    pad_token_id: int = 151643,
    tokenizer: AnyPath | None = None,
    overwrite: bool = False,
    ignore_config_keys: Iterable[str] = (),
    progress: Callable[[int], object] = lambda _: None,
) -> DreamConfig:
    """Writes a Dream directory (Hugging Face layout) from a Qwen2 one.

    The weights are copied. With `mask_row="mean"` the embedding of the mask token is then replaced.

    Args:
      source: directory with a Qwen2 config.json and safetensors, or a hub id.
      target: the directory to write. It must not exist, except with `overwrite`; it appears only when it is complete.
      mask_row: the initial embedding of the mask token. "keep" is the row of the published table as it is; "mean" is the
        mean of the rows before it.
      mask_token_id, pad_token_id: token ids of the Dream model; the defaults are those of the Dream tokenizer.
      tokenizer: directory of the tokenizer files to copy; by default those of the source, with the two tokens added.
      overwrite: whether to replace a checkpoint at `target`, when the new one is complete.
      ignore_config_keys: keys of config.json that are known not to change what the weights compute.
      progress: called with the number of bytes that were just copied (not a total).

    Returns:
      The configuration of the Dream model.

    Raises:
      FileNotFoundError: there is no directory at `source`, or it has no config.json or not all of its weights; or there is
        no tokenizer at `tokenizer`.
      ConnectionError: the hub id cannot be downloaded.
      FileExistsError: `target` exists and `overwrite` is false; or it is not a checkpoint, or holds a file that was not
        written by this program.
      OSError: the disk is full, or a file cannot be read or written.
      ValueError: as for `dream_config`; or the weights are damaged, do not fit the configuration or have several dtypes; or
        the two tokens cannot be added to the tokenizer with these ids; or `mask_row` is unknown; or `target` is the
        source or the tokenizer, contains or lies in one of them, or is an address; or a tokenizer file is a link that leads
        out of its directory.
    """
    if mask_row not in get_args(MaskRow):
        raise ValueError(f"{mask_row=} is not one of {', '.join(get_args(MaskRow))}")
    local_path(target, "dst")
    check_new_directory(target, overwrite=overwrite, known=known_files)
    if tokenizer is not None:
        check_tokenizer_directory(tokenizer)
    directory = find_directory(source)
    companions(directory)
    fields = read_json(directory / "config.json", "restore it from the source of the checkpoint")
    try:
        config = dream_config(fields, mask_token_id=mask_token_id, pad_token_id=pad_token_id, ignore=ignore_config_keys)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    with hf.open_source(directory) as opened:
        opened.check(config)
        files = sorted({tensor.path for tensor in opened.tensors.values()})
        needed = sum(file.stat().st_size for file in files)
        files += [file for file in (directory / hf.INDEX,) if file.is_file() and len(files) > 1]
        with new_directory(
            target,
            overwrite=overwrite,
            needed_bytes=needed,
            reads=(source, directory, tokenizer),
            known=known_files,
        ) as made:
            _write_tokenizer(local_path(tokenizer or directory), made, config, extend=tokenizer is None)
            for file in files:
                shutil.copyfile(file, made / file.name)
                progress(file.stat().st_size)
            if mask_row == "mean":
                # With tied embeddings the files may also hold a second table, which must stay equal to the first.
                tables = ("model.embed_tokens.weight", *(("lm_head.weight",) if config.tie_word_embeddings else ()))
                for name in tables:
                    if name in opened.tensors:
                        _write_mean(opened.tensors[name], made, config.mask_token_id)
            fields = config.to_dict() | {"torch_dtype": str(opened.dtype)}
            write_json(made / "config.json", dict(sorted(fields.items())))
            write_sums(made)
    return config


def _write_mean(table: hf.Tensor, directory: pathlib.Path, row: int) -> None:
    """Sets one row of a copied table to the mean of the rows before it. The rows after it belong to no token."""
    width = table.shape[1]
    total = np.zeros(width, np.float64)
    with open(directory / table.path.name, "r+b") as file:
        for start in range(0, row, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, row - start)
            file.seek(table.offset + start * width * table.dtype.itemsize)
            block = np.frombuffer(file.read(count * width * table.dtype.itemsize), table.dtype)
            total += block.astype(np.float32).reshape(count, width).sum(axis=0, dtype=np.float64)
        file.seek(table.offset + row * width * table.dtype.itemsize)
        file.write((total / max(row, 1)).astype(np.float32).astype(table.dtype).tobytes())


def _write_tokenizer(source: pathlib.Path, target: pathlib.Path, config: DreamConfig, *, extend: bool) -> None:
    """Copies the tokenizer files; with `extend`, adds the two tokens of Dream to a Qwen2 tokenizer."""
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in found:
        copy_companion(source / name, target / name)
    if not extend or not found or BYTE_TOKENIZER_FILE in found:
        return
    names = _added_tokens(target)
    if names.get(MASK) == config.mask_token_id:
        return  # this is already a Dream tokenizer
    begin = config.mask_token_id - 1
    taken = {number: name for name, number in names.items()}
    for number in (begin, config.mask_token_id):
        if MASK in names or number != max(taken, default=-1) + 1:
            raise ValueError(
                f"{source}: {MASK} cannot be token {config.mask_token_id}, because {BEGIN} and {MASK} must follow the last "
                f"added token, {max(taken, default=None)}; give --tokenizer, a directory with the tokenizer files of Dream"
            )
        taken[number] = BEGIN if number == begin else MASK
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    new = {BEGIN: begin, MASK: config.mask_token_id}
    roles = {"bos_token": BEGIN, "mask_token": MASK, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = _read(target / "tokenizer_config.json") | roles
    # transformers 5 lists the added tokens in tokenizer.json alone; each file that has a list gets the two tokens.
    if "added_tokens_decoder" in settings or not (target / "tokenizer.json").is_file():
        decoder = settings.setdefault("added_tokens_decoder", {})
        for name, number in new.items():
            decoder[str(number)] = {"content": name, **plain, "special": True}
    _write(target / "tokenizer_config.json", settings)
    if (target / "added_tokens.json").is_file():
        _write(target / "added_tokens.json", names | new)
    if (target / "special_tokens_map.json").is_file():
        _write(target / "special_tokens_map.json", _read(target / "special_tokens_map.json") | roles)
    if (target / "tokenizer.json").is_file():
        contents = _read(target / "tokenizer.json")
        for name, number in new.items():
            contents["added_tokens"].append({"id": number, "content": name, **plain, "special": True})
        _write(target / "tokenizer.json", contents)


class _AddedToken(msgspec.Struct):
    content: str
    id: int | None = None


class _TokenizerConfig(msgspec.Struct):
    added_tokens_decoder: dict[str, _AddedToken] = {}


class _TokenizerJson(msgspec.Struct):
    added_tokens: list[_AddedToken]


def _added_tokens(directory: pathlib.Path) -> dict[str, int]:
    """Returns the ids of the added tokens by their texts, from all files that list such tokens.

    Raises ValueError if a file is damaged, or if two files give a token different ids.
    """
    listed: dict[str, dict[str, int]] = {}
    for file, read in (
        ("tokenizer_config.json", _of_config),
        ("added_tokens.json", lambda path: read_typed(path, dict[str, int], _REMEDY)),
        ("tokenizer.json", tokens_of_json),
    ):
        if (directory / file).is_file():
            listed[file] = read(directory / file)
    names: dict[str, int] = {}
    for file, found in listed.items():
        for name, number in found.items():
            if names.setdefault(name, number) != number:
                raise ValueError(
                    f"{directory / file} gives the token {name} the id {number}, another file {names[name]}; {_REMEDY}"
                )
    return names


def _of_config(path: pathlib.Path) -> dict[str, int]:
    found = read_typed(path, _TokenizerConfig, _REMEDY).added_tokens_decoder
    wrong = [number for number in found if not number.isdecimal()]
    if wrong:
        raise ValueError(f"{path}: added_tokens_decoder has the key {wrong[0]!r:.80}, which is no id; {_REMEDY}")
    return {token.content: int(number) for number, token in found.items()}


def tokens_of_json(path: pathlib.Path) -> dict[str, int]:
    """Returns the ids of the added tokens in a tokenizer.json by their texts. Raises ValueError if the file is damaged."""
    found = read_typed(path, _TokenizerJson, _REMEDY).added_tokens
    if any(token.id is None for token in found):
        raise ValueError(f"{path}: a token in added_tokens has no id; {_REMEDY}")
    return {token.content: token.id for token in found if token.id is not None}


def _read(path: pathlib.Path) -> dict[str, Any]:
    return read_json(path, _REMEDY) if path.is_file() else {}


def _write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
