"""The file `dream_jax.json` of a converted directory: what the weights are, and which files hold them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax import masks
from dream_jax.checkpoint.weights import WEIGHTS
from dream_jax.config import DreamConfig
from dream_jax.files import read_json, write_json

DESCRIPTION = "dream_jax.json"
FORMAT = 1


def write_description(
    directory: pathlib.Path, config: DreamConfig, dtype: jax.typing.DTypeLike, mask: str = "bidirectional"
) -> None:
    """Writes `dream_jax.json`, the last file of a converted directory, without which the directory does not load.

    `mask` is the name of the attention mask that the weights were trained with.
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
    """The size of every file of weights in a directory, by relative path; for `check_files`."""
    files = (path for path in (directory / WEIGHTS).rglob("*") if path.is_file())
    return dict(sorted((path.relative_to(directory).as_posix(), path.stat().st_size) for path in files))


def check_files(directory: pathlib.Path, files: Mapping[str, int], remedy: str) -> None:
    """Raises FileNotFoundError for a missing file, and ValueError for one whose size is not the size that was written."""
    for name, size in files.items():
        file = directory / name
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {remedy}")
        if file.stat().st_size != size:
            raise ValueError(f"{file} has {file.stat().st_size} bytes, but {size} were written; {remedy}")


def is_converted(directory: pathlib.Path) -> bool:
    """Whether a directory is a converted directory."""
    return (directory / DESCRIPTION).is_file()


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsDescription:
    """The contents of `dream_jax.json`: dtype and number of the weights, and the files with their sizes."""

    dtype: np.dtype
    parameters: int
    files: Mapping[str, int]


def read_description(directory: pathlib.Path, config: DreamConfig) -> WeightsDescription:
    """Reads `dream_jax.json` and compares it with the configuration and with the files in the directory.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: the format or the number of parameters is another one, or a file has another size than was written.
    """
    path, fields = directory / DESCRIPTION, _description_fields(directory)
    missing = [key for key in ("dtype", "parameters", "files") if key not in fields]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; convert the source again")
    description = WeightsDescription(
        dtype=jnp.dtype(fields["dtype"]), parameters=fields["parameters"], files=fields["files"]
    )
    expected = config.num_parameters
    if description.parameters != expected:
        raise ValueError(f"{path} describes {description.parameters} parameters, but config.json makes {expected}")
    check_files(directory, description.files, "convert the source again")
    return description


def _description_fields(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / DESCRIPTION
    fields = read_json(path, "convert the source again")
    if fields.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {fields.get('format')!r}, but this version reads format {FORMAT}; convert the source again"
        )
    return fields


def read_mask(directory: pathlib.Path) -> str:
    """The name of the mask that the weights were trained with; "bidirectional" if the directory does not name one.

    Raises:
      ValueError: the format is another one, or the name is not that of a mask.
    """
    name = str(_description_fields(directory).get("mask", "bidirectional"))
    try:
        masks.parse(name)
    except ValueError as error:
        raise ValueError(f"{directory / DESCRIPTION}: {error}") from error
    return name
