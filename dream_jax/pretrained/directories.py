"""Finds the directories of models, identifies them by a fingerprint, and writes the files beside the weights."""

from __future__ import annotations

import hashlib
import os
import pathlib
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dream_jax import checkpoint, distributed, files, hf, hub
from dream_jax.config import PRESETS, DreamConfig
from dream_jax.files import read_json, write_json
from dream_jax.paths import AnyPath, check_companion, copy_companion, local_path
from dream_jax.tokenizer import PROMPT_FORMAT_FILE, TOKENIZER_FILES

DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")

# Size in bytes and number of the pieces of a large file from which its fingerprint is computed: few enough that 15 GB take
# a second, and enough that every layer of a model has some of them.
_PIECE, _SAMPLES = 1 << 16, 512
# Files that describe a model, besides weights and tokenizer. Other JSON files in the directory may be results.
_DESCRIBING = ("config.json", checkpoint.DESCRIPTION, "adapter.json", hf.PEFT_CONFIG, PROMPT_FORMAT_FILE)

# Names of Python files that published checkpoints have; write_companions copies all Python files of the source.
_PUBLISHED_CODE = re.compile(r"(configuration|generation|modeling|tokenization)_\w+\.py")
_GENERATION = "generation_config.json"
_CARD = "README.md"
# Files that are downloaded from the hub. There are no *.py among them, only numbers and text, so that no downloaded file
# can be executed.
_HUB_TEXT = ("*.json", "*.txt", "*.jinja")
_HUB_WEIGHTS = "*.safetensors"

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


def find_directory(path: AnyPath, otherwise: str = "not a directory", *, weights: bool = True) -> pathlib.Path:
    """Returns the directory at a path, or the directory to which a hub id is downloaded.

    Args:
      path: a directory with a config.json, or a hub id, organisation/name or organisation/name@revision. A hub id is
        downloaded only if it cannot be a path of this machine: there must be no folder with the name of the organisation.
      otherwise: end of the error message "PATH is ..." for a path that is neither.
      weights: whether to download the weights too, or only the small files.

    Raises:
      FileNotFoundError: there is no directory at the path, or it has no config.json.
      ConnectionError: the hub id cannot be downloaded.
      ValueError: the path is an address.
    """
    directory = local_path(path)
    if directory.is_dir():
        if (directory / "config.json").is_file():
            return directory.resolve()
        raise FileNotFoundError(
            f"{directory} holds no config.json: it is neither a Hugging Face nor a converted directory"
        )
    if (hub_id := hub.hub_id_of(path)) is not None:
        return hub.download(hub_id, [*_HUB_TEXT, *([_HUB_WEIGHTS] if weights else [])])
    if directory.exists():
        raise FileNotFoundError(f"{path} is a file; give the directory of a checkpoint")
    raise FileNotFoundError(f"{path} is {otherwise}{hub.why_not_asked(path)}")


def fingerprint(path: AnyPath) -> str:
    """Returns a string that changes when the model at a path changes, so that results are not resumed with another model.

    For a directory it is a hexadecimal digest of weights, configuration and tokenizer; of a large file, `_SAMPLES` evenly
    spaced pieces are read. For a hub id it is the name of the snapshot, for a preset the name of the preset.

    Raises:
      FileNotFoundError, ConnectionError: there is no model at the path, as for `find_directory`.
    """
    directory = local_path(path)
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


def companions(source: AnyPath | None) -> list[pathlib.Path]:
    """Returns the tokenizer files, generation_config.json and Python files in a directory; no files for None.

    Raises:
      FileNotFoundError: there is no such directory.
      ValueError: one of the files is a link that leads out of the directory, so it must not be copied; config.json in the
        directory is damaged; or the path is an address.
    """
    if source is None:
        return []
    directory = local_path(source, "tokenizer_dir")
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}, the directory of the tokenizer, does not exist; give one with tokenizer files (tokenizer_dir)"
        )
    names = {_GENERATION, *TOKENIZER_FILES, *(path.name for path in directory.glob("*.py"))}
    found = [directory / name for name in sorted(names) if (directory / name).is_file()]
    for file in found:
        check_companion(file)
    published_config(directory)  # raises its errors
    return found


def published_config(directory: pathlib.Path) -> dict[str, Any]:
    """Returns the config.json of a directory with tokenizer files, or {} if it has none.

    Raises:
      ValueError: the file is damaged, or its auto_map is not an object.
    """
    file = directory / "config.json"
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found.get("auto_map"), dict | None):
        raise ValueError(f"{file}: auto_map={found['auto_map']!r:.80} must be an object; correct it or remove it")
    return found


def check_tokenizer_directory(tokenizer: AnyPath) -> None:
    """Raises FileNotFoundError if a directory that a user named has no tokenizer files; and the errors of `companions`."""
    if not any(file.name in TOKENIZER_FILES for file in companions(tokenizer)):
        raise FileNotFoundError(f"{tokenizer} has no tokenizer files, such as tokenizer.json; give another directory")


def known_files(directory: pathlib.Path) -> set[str]:
    """Returns names and patterns, for `files.new_directory`, of what this program writes into a model's directory."""
    known = {"config.json", _GENERATION, _CARD, *TOKENIZER_FILES, checkpoint.DESCRIPTION}
    known |= {hf.SINGLE, hf.INDEX, "model-[0-9]*-of-[0-9]*.safetensors"}
    known |= {path.name for path in directory.glob("*.py") if _PUBLISHED_CODE.fullmatch(path.name)}
    return known | listed_weights(directory / checkpoint.DESCRIPTION)


def listed_weights(description: pathlib.Path) -> set[str]:
    """Returns the names of the files of weights that a description lists; the pattern of all files if it is damaged."""
    if not description.is_file():
        return set()
    try:
        return set(files.read_json(description)["files"])
    except (ValueError, KeyError, TypeError):
        return {f"{checkpoint.WEIGHTS}/*"}


def write_sums(directory: pathlib.Path) -> None:
    """Writes the checksums of a complete directory of a model or an adapter. The file must be the last one written."""
    files.write_checksums(directory, leave_out=(".lock",))


def check_sums(directory: pathlib.Path, *, weights: bool) -> None:
    """Compares a directory of a model or an adapter with its checksums, if it has them; earlier versions wrote none.

    Args:
      directory: the directory.
      weights: whether to read the files of weights, in parts that all processes of a run share, so that all must call
        this; otherwise only the other files are read.

    Raises:
      ValueError: a file is missing or differs from what was written, or `checksums.json` is damaged.
    """
    if not (directory / files.CHECKSUMS).is_file():
        return
    share, shares = (jax.process_index(), jax.process_count()) if weights else (0, 1)

    def chosen(name: str) -> bool:
        # The model card may be edited, and a download from the hub leaves out the card and the Python files.
        left_out = name == _CARD or (name.endswith(".py") and not (directory / name).exists())
        return not left_out and _is_weights(name) == weights

    problem = files.find_damage(directory, share, shares, chosen)
    others = distributed.which_say(problem is not None) if weights else []
    if problem is None and others:
        problem = f"process {others[0]} has found damage in {directory}; its error message describes it"
    if problem is not None:
        raise ValueError(
            f"{problem}; make the directory again. If you have changed the file yourself, remove "
            f"{directory / files.CHECKSUMS}"
        )


def _is_weights(name: str) -> bool:
    return name.startswith(f"{checkpoint.WEIGHTS}/") or name.endswith(".safetensors")


def write_companions(
    directory: pathlib.Path,
    config: DreamConfig,
    dtype: np.dtype,
    source: AnyPath | None,
) -> None:
    """Copies tokenizer, generation_config.json and Python files from `source` (None: no files), and writes config.json."""
    for file in companions(source):
        copy_companion(file, directory / file.name)
    published = {} if source is None else published_config(local_path(source))
    carried = {key: published[key] for key in _CARRIED_KEYS if key in published}
    modules = {str(entry).rpartition(".")[0] for entry in (carried.get("auto_map") or {}).values()}
    if not all((directory / f"{module}.py").is_file() for module in modules):
        del carried["auto_map"]  # auto_map would refer to code that was not copied
    # The release of transformers that runs the published code reads torch_dtype; newer releases write dtype and read both.
    dtype_key = "dtype" if "dtype" in published else "torch_dtype"
    fields = config.to_dict() | carried | {dtype_key: jnp.dtype(dtype).name}
    write_json(directory / "config.json", dict(sorted(fields.items())))
