"""Directories of whole models: how they are found and told apart, and the files that accompany the weights."""

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

# Size and number of the pieces for the fingerprint of a large file: few enough that 15 GB take a second, and enough that
# every layer of a model has some of them.
_PIECE, _SAMPLES = 1 << 16, 512
# The files besides weights and tokenizer. Not every JSON file: the directory of a model may also hold results.
_DESCRIBING = ("config.json", checkpoint.DESCRIPTION, "adapter.json", PROMPT_FORMAT_FILE)

# Keys of a published config.json that do not affect what the weights compute, and are copied with them.
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
    """The dtype as numpy knows it. Raises ValueError for one that models are not stored in."""
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
            f"the weights were trained under the mask {name!r}, but the published code is bidirectional and would compute "
            'something else with them. If you want that, set model.trained_mask = "bidirectional" first'
        )


def find_directory(
    path: str | os.PathLike[str], otherwise: str = "no directory", *, weights: bool = True
) -> pathlib.Path:
    """The directory at a path, or the download of a hub id.

    Args:
      path: a directory with a config.json, or a hub id, organisation/name.
      otherwise: how the error message describes a path that is neither.
      weights: whether to download the weights too, or only the small files.

    Raises:
      FileNotFoundError, ConnectionError: there is no such directory.
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
    """A text that changes when the model at a path changes, so that results are not continued with another model.

    For a directory it is a digest of weights, configuration and tokenizer (of `_SAMPLES` evenly spread pieces of large
    files); other files do not count. For a hub id it is the snapshot, for a preset its name.

    Raises:
      FileNotFoundError, ConnectionError: there is no model at the path.
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
    """Copies the files that accompany the weights, and writes config.json."""
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
        del carried["auto_map"]  # it would refer to code that was not copied
    # The release of transformers for the published code reads torch_dtype; newer ones write dtype and read both.
    dtype_key = "dtype" if "dtype" in published else "torch_dtype"
    fields = config.to_dict() | carried | {dtype_key: jnp.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
