"""Directories of whole models: how they are found, in which dtypes they are read, and what goes with the weights.

Knows both kinds, and the hub. Knows nothing of weights.
"""

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
from dream_jax.tokenizer import PROMPT_FORMAT_FILE, TOKENIZER_FILES

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")

# Of files by which a directory is told from another: so small that 15 GB are looked at in a second, so many that any layer
# of a trained model lies under some of them.
_PIECE, _SAMPLES = 1 << 16, 512
# Beside the weights and the tokenizer. Not all JSON: results may be kept in a directory of a model.
_DESCRIBING = ("config.json", checkpoint.DESCRIPTION, "adapter.json", PROMPT_FORMAT_FILE)

# Keys of a published config.json that say nothing about the weights, and go where the weights go.
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
    """The dtype. Raises ValueError for one that models are not kept in."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ValueError(f"{dtype=} is not one of {', '.join(DTYPES)}")
    return found


def check_published_mask(name: str) -> None:
    """Raises ValueError for weights that the published code, whose attention is bidirectional, would run as others."""
    if name != "bidirectional":
        raise ValueError(
            f"the weights were trained under the mask {name!r}, and the published code attends in both directions: what it "
            'computed with them would be something else. If you want that, set model.trained_mask = "bidirectional" first'
        )


def find_directory(
    path: str | os.PathLike[str], otherwise: str = "no directory", *, weights: bool = True
) -> pathlib.Path:
    """The directory at a path, or what a hub id names, downloaded.

    Args:
      path: to a directory with a config.json, or organisation/name.
      otherwise: what a path is said to be that is neither.
      weights: whether the weights are wanted too, or only what is read before them.

    Raises:
      FileNotFoundError, ConnectionError: there is none.
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
    """Tells what lies at a path from what lay there before: of results that are gone on with later.

    Of a directory: a digest of the weights, the configuration and the tokenizer in it, of large files by `_SAMPLES` pieces
    that are spread evenly; whatever else lies there does not count. Of a hub id: the snapshot. Of a preset: its name.

    Raises:
      FileNotFoundError, ConnectionError: there is nothing.
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
            for piece in sorted({round(place * (pieces - 1) / (_SAMPLES - 1)) for place in range(_SAMPLES)}):
                file.seek(max(0, piece) * _PIECE)
                found.update(file.read(_PIECE))
    return found.hexdigest()


def write_companions(
    directory: pathlib.Path,
    config: DreamConfig,
    dtype: np.dtype,
    source: str | os.PathLike[str] | None,
) -> None:
    """Copies the files that go with the weights, and writes config.json."""
    published: dict[str, Any] = {}
    if source is not None:
        source = pathlib.Path(source)
        names = {"generation_config.json", *TOKENIZER_FILES, *(path.name for path in source.glob("*.py"))}
        for name in sorted(names):
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        if (source / "config.json").is_file():
            published = json.loads((source / "config.json").read_text(encoding="utf-8"))
    carried = {key: published[key] for key in _CARRIED_KEYS if key in published}
    modules = {str(entry).rpartition(".")[0] for entry in carried.get("auto_map", {}).values()}
    if not all((directory / f"{module}.py").is_file() for module in modules):
        del carried["auto_map"]  # it would name code that did not come along
    # The published code's release of transformers reads torch_dtype, newer ones write dtype and read both.
    dtype_key = "dtype" if "dtype" in published else "torch_dtype"
    fields = config.to_dict() | carried | {dtype_key: jnp.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
