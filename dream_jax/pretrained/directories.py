"""Finds the directories of models, identifies them by a fingerprint, and writes the files beside the weights."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax import checkpoint, hf
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.files import read_json
from dream_jax.tokenizer import PROMPT_FORMAT_FILE, TOKENIZER_FILES

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")

# Size in bytes and number of the pieces of a large file from which its fingerprint is computed: few enough that 15 GB take
# a second, and enough that every layer of a model has some of them.
_PIECE, _SAMPLES = 1 << 16, 512
# Files that describe a model, besides weights and tokenizer. Other JSON files in the directory may be results.
_DESCRIBING = ("config.json", checkpoint.DESCRIPTION, "adapter.json", hf.PEFT_CONFIG, PROMPT_FORMAT_FILE)

# Keys of a published config.json that do not affect what the weights compute; they are copied as they are.
_CARRIED_KEYS = (
    "_name_or_path",
    "auto_map",
    "bos_token_id",
    "eos_token_id",
    "max_window_layers",
    "sliding_window",
    "transformers_version",
    "use_cache",
)


def as_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """Returns the numpy dtype. Raises ValueError unless it is float32, bfloat16 or float16."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ValueError(f"{dtype=} is not one of {', '.join(DTYPES)}")
    return found


def check_published_mask(name: str) -> None:
    """Raises ValueError unless the mask is bidirectional, the only one that the published code has."""
    if name != "bidirectional":
        raise ValueError(
            f"the weights were trained under the mask {name!r}, but the published code uses bidirectional attention and "
            'would compute other logits. To export them nevertheless, first set model.trained_mask = "bidirectional"'
        )


def find_directory(
    path: str | os.PathLike[str], otherwise: str = "not a directory", *, weights: bool = True
) -> pathlib.Path:
    """Returns the directory at a path, or the directory to which a hub id is downloaded.

    Args:
      path: a directory with a config.json, or a hub id, organisation/name.
      otherwise: end of the error message "PATH is ..." for a path that is neither.
      weights: whether to download the weights too, or only the small files.

    Raises:
      FileNotFoundError: there is no directory at the path, or it has no config.json.
      ConnectionError: the hub id cannot be downloaded.
    """
    directory = pathlib.Path(path).expanduser()
    if directory.is_dir():
        if (directory / "config.json").is_file():
            return directory.resolve()
        raise FileNotFoundError(
            f"{directory} holds no config.json: it is neither a Hugging Face nor a converted directory"
        )
    if not directory.exists() and hf.is_hub_id(str(path)):
        return hf.fetch(str(path), weights=weights)
    if directory.exists():
        raise FileNotFoundError(f"{path} is a file; give the directory of a checkpoint")
    raise FileNotFoundError(f"{path} is {otherwise}")


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Returns a string that changes when the model at a path changes, so that results are not resumed with another model.

    For a directory it is a hexadecimal digest of weights, configuration and tokenizer; of a large file, `_SAMPLES` evenly
    spaced pieces are read. For a hub id it is the name of the snapshot, for a preset the name of the preset.

    Raises:
      FileNotFoundError, ConnectionError: there is no model at the path, as for `find_directory`.
    """
    directory = pathlib.Path(path).expanduser()
    if not directory.is_dir():
        if str(path) in PRESETS:
            return str(path)
        return find_directory(path, "neither a directory nor a preset", weights=False).name
    named = (*_DESCRIBING, *TOKENIZER_FILES)
    beside = (one for one in directory.iterdir() if one.suffix == ".safetensors" or one.name in named)
    inside = (directory / checkpoint.WEIGHTS).rglob("*")
    found = hashlib.blake2b(digest_size=16)
    for one in sorted(one for one in (*beside, *inside) if one.is_file() and not one.name.startswith(".")):
        with one.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            found.update(f"{one.relative_to(directory)} {size} ".encode())
            pieces = -(-size // _PIECE)
            for piece in sorted({round(sample * (pieces - 1) / (_SAMPLES - 1)) for sample in range(_SAMPLES)}):
                file.seek(max(0, piece) * _PIECE)
                found.update(file.read(_PIECE))
    return found.hexdigest()


def write_companions(
    directory: pathlib.Path,
    config: DreamConfig,
    dtype: np.dtype,
    source: str | os.PathLike[str] | None,
) -> None:
    """Copies tokenizer, generation_config.json and Python files from `source` (None: no files), and writes config.json."""
    published: dict[str, Any] = {}
    if source is not None:
        source = pathlib.Path(source)
        names = {"generation_config.json", *TOKENIZER_FILES, *(path.name for path in source.glob("*.py"))}
        for name in sorted(names):
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        if (source / "config.json").is_file():
            published = read_json(source / "config.json")
    carried = {key: published[key] for key in _CARRIED_KEYS if key in published}
    modules = {str(entry).rpartition(".")[0] for entry in (carried.get("auto_map") or {}).values()}
    if not all((directory / f"{module}.py").is_file() for module in modules):
        del carried["auto_map"]  # auto_map would refer to code that was not copied
    # The release of transformers that runs the published code reads torch_dtype; newer releases write dtype and read both.
    dtype_key = "dtype" if "dtype" in published else "torch_dtype"
    fields = config.to_dict() | carried | {dtype_key: jnp.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
