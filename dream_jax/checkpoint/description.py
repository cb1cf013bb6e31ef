"""Reads and writes `dream_jax.json`, which describes the weights of a converted directory and lists their files."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

from dream_jax import masks
from dream_jax.checkpoint.weights import WEIGHTS
from dream_jax.config import DreamConfig
from dream_jax.files import read_json, typed, write_json

DESCRIPTION = "dream_jax.json"
FORMAT = 1
_REMEDY = "convert the source again"


def write_description(
    directory: pathlib.Path, config: DreamConfig, dtype: jax.typing.DTypeLike, mask: str = "bidirectional"
) -> None:
    """Writes `dream_jax.json`. It must be the last file that is written: a directory without it does not load.

    Args:
      directory: the directory; its folder `weights/` is complete.
      config: the configuration of the model.
      dtype: the dtype of the stored weights.
      mask: the name of the attention mask that the weights were trained with, as `masks.parse` reads it.
    """
    description = {
        "format": FORMAT,
        "dtype": jnp.dtype(dtype).name,
        "parameters": config.num_parameters,
        "mask": mask,
        "files": written_files(directory),
    }
    write_json(directory / DESCRIPTION, description, indent=1)


def written_files(directory: pathlib.Path) -> dict[str, int]:
    """Returns the sizes in bytes of all files in `weights/`, by path relative to `directory`; for `check_files`."""
    files = (path for path in (directory / WEIGHTS).rglob("*") if path.is_file())
    return dict(sorted((path.relative_to(directory).as_posix(), path.stat().st_size) for path in files))


def check_files(directory: pathlib.Path, files: Mapping[str, int], remedy: str) -> None:
    """Compares the sizes of files with `files`, as `written_files` returned them. `remedy` ends the error messages.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file has another size than in `files`.
    """
    for name, size in files.items():
        file = directory / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {remedy}")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, but {size} were written; {remedy}")


def is_converted(directory: pathlib.Path) -> bool:
    """Returns whether a directory is a complete converted directory, which has a `dream_jax.json`."""
    return (directory / DESCRIPTION).is_file()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsDescription:
    """The description of the weights in `dream_jax.json`.

    Attributes:
      dtype: the dtype of the stored weights.
      parameters: the number of weights.
      files: relative path -> size in bytes of each file of weights.
    """

    dtype: np.dtype
    parameters: int
    files: Mapping[str, int]


class _DescriptionFile(msgspec.Struct):
    """The entries of `dream_jax.json` that `read_description` reads, with their types."""

    dtype: str
    parameters: int
    files: dict[str, int]


def read_description(directory: pathlib.Path, config: DreamConfig) -> WeightsDescription:
    """Reads `dream_jax.json` and compares it with the configuration and with the files in the directory.

    Raises:
      FileNotFoundError: `dream_jax.json` or a file of weights is missing.
      ValueError: `dream_jax.json` is damaged, has another format, or lacks an entry; or the number of parameters does not
        fit the configuration; or the size of a file is not the size that was written.
    """
    path, fields = directory / DESCRIPTION, _description_fields(directory)
    missing = [key for key in ("dtype", "parameters", "files") if key not in fields]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; {_REMEDY}")
    found = typed(fields, _DescriptionFile, path, _REMEDY)
    try:
        dtype = jnp.dtype(found.dtype)
    except TypeError as error:
        raise ValueError(f"{path} has dtype {found.dtype!r:.80}, which is no dtype; {_REMEDY}") from error
    description = WeightsDescription(dtype=dtype, parameters=found.parameters, files=found.files)
    expected = config.num_parameters
    if description.parameters != expected:
        raise ValueError(
            f"{path} describes {description.parameters} parameters, but a model of config.json has {expected}; {_REMEDY}"
        )
    check_files(directory, description.files, f"{DESCRIPTION} lists the sizes; {_REMEDY}")
    return description


def _description_fields(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / DESCRIPTION
    fields = read_json(path, _REMEDY)
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {fields.get('format')!r:.80}, but this version reads format {FORMAT}; {_REMEDY}"
        )
    return fields


def read_mask(directory: pathlib.Path) -> str:
    """Returns the name of the mask that the weights were trained with; "bidirectional" if `dream_jax.json` names none.

    Raises:
      FileNotFoundError: there is no `dream_jax.json`.
      ValueError: `dream_jax.json` is damaged or has another format, or there is no mask of that name.
    """
    name = str(_description_fields(directory).get("mask", "bidirectional"))
    try:
        masks.parse(name)
    except ValueError as error:
        raise ValueError(f"{directory / DESCRIPTION}: {error}") from error
    return name
