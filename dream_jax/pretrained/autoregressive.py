"""Makes from an autoregressive Qwen2 checkpoint the Dream checkpoint that training starts from, as Dream did.

The weights stay the same: Dream is the transformer of Qwen2.5 without its causal mask, and because of the right shift each
position still predicts the next token. A mask token and `<|beginoftext|>` are added; they use rows of Qwen2.5's padded
embedding table that no token of its tokenizer uses.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from dream_jax import hf
from dream_jax.config import DreamConfig
from dream_jax.files import new_directory
from dream_jax.pretrained.directories import find_directory
from dream_jax.tokenizer import BYTE_TOKENIZER_FILE, TOKENIZER_FILES

MaskRow = Literal["keep", "mean"]
"""The initial embedding of the mask token: the unused row as it is, or the mean of the rows of all tokens."""

MASK, BEGIN = "<|mask|>", "<|beginoftext|>"

# Keys that only a Qwen2 configuration has, with the values for which both models compute the same.
_QWEN2_SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "architectures": (["Qwen2ForCausalLM"], None),
    "rope_scaling": (None,),
}
# Keys that are handled in `dream_config`, or have no meaning for a Dream model.
_DROPPED = frozenset({"model_type", "architectures", "rope_parameters", "rope_theta", "layer_types"})
_DROPPED |= {"bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id"}
_BLOCK_ROWS = 4096


def dream_config(
    fields: Mapping[str, Any], *, mask_token_id: int, pad_token_id: int, ignore: Iterable[str] = ()
) -> DreamConfig:
    """The Dream configuration of a Qwen2 `config.json`, read key by key.

    Args:
      fields: its dictionary, as transformers 4 (`rope_theta`) or 5 (`rope_parameters`) writes it.
      mask_token_id: an unused row of the embedding table.
      pad_token_id: end-of-text, which is also the padding.
      ignore: as in `DreamConfig.from_dict`.

    Raises:
      ValueError: this is not a Qwen2 configuration, it uses sliding windows or a scaled rotary embedding, or a token id is
        outside the table.
    """
    if fields.get("model_type") != "qwen2":
        raise ValueError(
            f"config.json has model_type={fields.get('model_type')!r}, but only 'qwen2' can become a Dream"
        )
    for key, known in _QWEN2_SWITCHES.items():
        if fields.get(key) not in known:
            raise ValueError(f"config.json has {key}={fields[key]!r}, but only {known[0]!r} can become a Dream")
    kinds = set(fields.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"config.json has layers of {sorted(kinds)}, but only full attention can become a Dream")
    rope = dict(fields.get("rope_parameters") or {})
    kind = rope.pop("rope_type", "default")
    theta = rope.pop("rope_theta", fields.get("rope_theta"))
    if theta is None:
        raise ValueError("config.json has neither rope_theta nor rope_parameters with one; it is never guessed")
    if kind != "default" or rope:
        raise ValueError(
            f"config.json has rope_parameters={fields['rope_parameters']!r}, but only the default kind is known"
        )
    given = {key: value for key, value in fields.items() if key not in _DROPPED}
    for name, number in (("mask_token_id", mask_token_id), ("pad_token_id", pad_token_id)):
        if not 0 <= number < fields["vocab_size"]:
            raise ValueError(
                f"{name}={number} is outside the table of vocab_size={fields['vocab_size']} rows; name one that no token "
                f"uses (--{name.replace('_', '-')})"
            )
    told = {"model_type": "Dream", "rope_theta": theta, "mask_token_id": mask_token_id, "pad_token_id": pad_token_id}
    return DreamConfig.from_dict(given | told, ignore=ignore)


def adapt_qwen2(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    mask_row: MaskRow = "keep",
    mask_token_id: int = 151666,
    pad_token_id: int = 151643,
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    ignore_config_keys: Iterable[str] = (),
    progress: Callable[[int], object] = lambda _: None,
) -> DreamConfig:
    """Writes a Dream directory (Hugging Face layout) from a Qwen2 one: copies all but the configuration and one row.

    Args:
      source: directory with a Qwen2 config.json and safetensors, or a hub id.
      target: must not exist, except with `overwrite`; it appears only when it is complete.
      mask_row: the initial embedding of the mask token. "keep" is the row of the published table as it is; "mean" is the
        mean of the rows before it.
      mask_token_id, pad_token_id: of the Dream model; by default those of Dream's tokenizer.
      tokenizer: directory whose tokenizer files the result gets; by default the source's, with the two tokens added.
      overwrite: whether a checkpoint at `target` may be replaced.
      ignore_config_keys: keys of config.json that are known not to change what the weights compute.
      progress: called with a number of bytes copied.

    Raises:
      FileNotFoundError, ConnectionError: as `hf.open_source` and `hf.fetch`.
      FileExistsError, OSError: as `new_directory`.
      ValueError: as `dream_config`; weights that are not those of the configuration; a tokenizer to which the two tokens
        cannot be added under these ids.
    """
    if mask_row not in get_args(MaskRow):
        raise ValueError(f"{mask_row=} is not one of {', '.join(get_args(MaskRow))}")
    directory = find_directory(source)
    try:
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config = dream_config(fields, mask_token_id=mask_token_id, pad_token_id=pad_token_id, ignore=ignore_config_keys)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from error
    with hf.open_source(directory) as opened:
        opened.check(config)
        files = sorted({tensor.path for tensor in opened.tensors.values()})
        needed = sum(file.stat().st_size for file in files)
        files += [file for file in (directory / hf.INDEX,) if file.is_file() and len(files) > 1]
        with new_directory(target, overwrite=overwrite, needed_bytes=needed, reads=directory) as made:
            _write_tokenizer(pathlib.Path(tokenizer or directory), made, config, extend=tokenizer is None)
            for file in files:
                shutil.copyfile(file, made / file.name)
                progress(file.stat().st_size)
            if mask_row == "mean":
                # With tied embeddings there may be a second table, which must stay equal to the first.
                tables = ("model.embed_tokens.weight", *(("lm_head.weight",) if config.tie_word_embeddings else ()))
                for name in tables:
                    if name in opened.tensors:
                        _write_mean(opened.tensors[name], made, config.mask_token_id)
            text = json.dumps(config.to_dict() | {"torch_dtype": str(opened.dtype)}, indent=2, sort_keys=True)
            (made / "config.json").write_text(text + "\n", encoding="utf-8")
    return config


def _write_mean(table: hf.Tensor, directory: pathlib.Path, row: int) -> None:
    """Sets one row of a copied table to the mean of the rows before it; the rows after it are unused too."""
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
    """Copies tokenizer files; a Qwen2 tokenizer gets the two tokens that Dream added to it."""
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    if not extend or not found or BYTE_TOKENIZER_FILE in found:
        return
    settings = _read(target / "tokenizer_config.json")
    decoder = settings.setdefault("added_tokens_decoder", {})
    names = {entry["content"]: int(number) for number, entry in decoder.items()}
    names |= _read(target / "added_tokens.json")
    if names.get(MASK) == config.mask_token_id:
        return  # it is a Dream tokenizer already
    begin = config.mask_token_id - 1
    taken = {number: name for name, number in names.items()}
    for number in (begin, config.mask_token_id):
        if MASK in names or number != max(taken, default=-1) + 1:
            raise ValueError(
                f"{source}: {MASK} cannot be token {config.mask_token_id} with {BEGIN} before it, for the tokenizer's "
                f"added tokens go up to {max(taken, default=None)}; give --tokenizer, a directory with Dream's files"
            )
        taken[number] = BEGIN if number == begin else MASK
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    for name, number in ((BEGIN, begin), (MASK, config.mask_token_id)):
        decoder[str(number)] = {"content": name, **plain, "special": True}
        names[name] = number
    settings |= {"bos_token": BEGIN, "mask_token": MASK, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    _write(target / "tokenizer_config.json", settings)
    if (target / "added_tokens.json").is_file():
        _write(target / "added_tokens.json", names)
    if (target / "special_tokens_map.json").is_file():
        roles = {"bos_token": BEGIN, "mask_token": MASK, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        _write(target / "special_tokens_map.json", _read(target / "special_tokens_map.json") | roles)
    if (target / "tokenizer.json").is_file():
        whole = _read(target / "tokenizer.json")
        for name, number in ((BEGIN, begin), (MASK, config.mask_token_id)):
            whole["added_tokens"].append({"id": number, "content": name, **plain, "special": True})
        _write(target / "tokenizer.json", whole)


def _read(path: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def _write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
