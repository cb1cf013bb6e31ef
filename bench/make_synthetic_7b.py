"""Writes a checkpoint of random weights in the published layout, for tests of the conversion without a download.

    python bench/make_synthetic_7b.py --config DIR --out OUT

DIR holds a published `config.json` and optionally the tokenizer files and `model.safetensors.index.json`. OUT has the
names, shapes and dtype of the published checkpoint (Dream-7B: 339 tensors, 15.2 GB of bfloat16), in the files that the
index lists; the other files are copied. The script uses numpy only: it writes the safetensors header itself and derives the
tensors from `config.json`, so that the tested converter has no influence on the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
INDEX = "model.safetensors.index.json"
BYTES_PER_WEIGHT = 2
SHARDS = 4  # number of files if there is no index
CHUNK_BYTES = 32 * 2**20
SPARE_BYTES = 2**30  # free space that must remain on the disk

# A bfloat16 has a sign (1 bit), an exponent (8 bits) and a mantissa (7 bits). The sign, two bits of the exponent and the
# mantissa are kept from 16 random bits, and 118 is added to the exponent. All results are finite, with magnitudes in
# [2^-9, 2^-5). Each 64-bit word holds four of them; the sum never carries out of the 15 lower bits.
_KEPT_BITS = np.uint64(0x81FF_81FF_81FF_81FF)
_LOWEST_EXPONENT = np.uint64(0x3B00_3B00_3B00_3B00)

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticCheckpointSettings:
    """The configuration, the directory to make and the number of layers."""

    config: pathlib.Path
    """Directory with a published config.json, and optionally with tokenizer files and the safetensors index."""
    out: pathlib.Path
    """Directory to make; it must not exist, and must be outside the repository."""
    layers: int | None = None
    """Number of transformer layers; by default that of the configuration."""
    seed: int = 0
    """seed of the weights; the same seed makes the same bytes"""


def tensor_shapes(fields: Mapping[str, Any]) -> dict[str, Shape]:
    """Returns name -> shape of every tensor of a published checkpoint, in the order of the model definition."""
    width, mlp, vocab = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    key_value = width // fields["num_attention_heads"] * fields["num_key_value_heads"]
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (vocab, width)}
    for layer in range(fields["num_hidden_layers"]):
        for name, shape in (
            ("self_attn.q_proj.weight", (width, width)),
            ("self_attn.q_proj.bias", (width,)),
            ("self_attn.k_proj.weight", (key_value, width)),
            ("self_attn.k_proj.bias", (key_value,)),
            ("self_attn.v_proj.weight", (key_value, width)),
            ("self_attn.v_proj.bias", (key_value,)),
            ("self_attn.o_proj.weight", (width, width)),
            ("mlp.gate_proj.weight", (mlp, width)),
            ("mlp.up_proj.weight", (mlp, width)),
            ("mlp.down_proj.weight", (width, mlp)),
            ("input_layernorm.weight", (width,)),
            ("post_attention_layernorm.weight", (width,)),
        ):
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (width,)
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    return shapes


def _num_bytes(shape: Shape) -> int:
    return BYTES_PER_WEIGHT * int(np.prod(shape, dtype=np.int64))


def assign_files(shapes: Mapping[str, Shape], index: Mapping[str, str] | None) -> dict[str, str]:
    """Returns tensor name -> file name: as in the index if it lists exactly these tensors, else `SHARDS` files by size."""
    if index is not None and index.keys() == shapes.keys():
        return {name: index[name] for name in shapes}
    total = sum(map(_num_bytes, shapes.values()))
    files, written = {}, 0
    for name, shape in shapes.items():
        # The middle of a tensor decides its shard, so that a large tensor at a boundary leaves no shard empty.
        shard = min(int((written + _num_bytes(shape) / 2) * SHARDS / total), SHARDS - 1)
        files[name] = f"{shard}"
        written += _num_bytes(shape)
    used = sorted(set(files.values()), key=int)
    names = {shard: f"model-{i:05d}-of-{len(used):05d}.safetensors" for i, shard in enumerate(used, start=1)}
    return {name: names[shard] for name, shard in files.items()}


def safetensors_header(shapes: Mapping[str, Shape], dtype: str = "BF16") -> bytes:
    """Returns the header of a safetensors file: length (8 bytes, little-endian) and JSON, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + _num_bytes(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def random_chunks(name: str, shape: Shape, seed: int) -> Iterator[memoryview]:
    """Yields the bytes of a tensor in pieces: random bfloat16 numbers with magnitudes in [2^-9, 2^-5).

    Every name has its own random stream, so that a tensor does not depend on the others or on the number of layers.
    """
    stream = np.random.SFC64(np.random.SeedSequence([seed, zlib.crc32(name.encode())]))
    left = _num_bytes(shape)
    while left > 0:
        size = min(left, CHUNK_BYTES)
        words = stream.random_raw(-(-size // 8))
        words &= _KEPT_BITS
        words += _LOWEST_EXPONENT
        yield words.view(np.uint8).data[:size]
        left -= size


def _check_target(out: pathlib.Path, num_bytes: int) -> None:
    """Raises the errors of `make_checkpoint` if `out` cannot be made with `num_bytes` of weights."""
    if out.is_relative_to(REPOSITORY):
        raise ValueError(f"{out} is inside the repository {REPOSITORY}; give a directory outside it")
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or give another directory")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is not a directory; make it first")
    free = shutil.disk_usage(out.parent).free
    if free < num_bytes + SPARE_BYTES:
        raise OSError(
            f"{out.parent} has {free / 1e9:.1f} GB free of {(num_bytes + SPARE_BYTES) / 1e9:.1f} GB needed; "
            f"give another directory or fewer --layers"
        )


def _write_shards(
    directory: pathlib.Path, shards: Mapping[str, Mapping[str, Shape]], seed: int, console: Console
) -> None:
    """Writes the files of weights; `shards` maps a file name to the names and shapes of its tensors."""
    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    total = sum(_num_bytes(shape) for shapes in shards.values() for shape in shapes.values())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        for file_name, shapes in shards.items():
            progress.update(task, description=file_name)
            with open(directory / file_name, "wb") as file:
                file.write(safetensors_header(shapes))
                for name, shape in shapes.items():
                    for chunk in random_chunks(name, shape, seed):
                        progress.advance(task, file.write(chunk))


def make_checkpoint(
    config: pathlib.Path,
    out: pathlib.Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    console: Console | None = None,
) -> pathlib.Path:
    """Makes the directory `out`, which appears only when it is complete.

    Args:
      config: directory with `config.json`, and with other files to copy.
      out: the directory to make; it must not exist, and must be outside the repository.
      layers: number of layers; None for that of the configuration.
      seed: seed of the weights; the same seed makes the same bytes.
      console: where the progress bar is shown; None for no progress bar.

    Returns:
      The absolute path of `out`.

    Raises:
      ValueError: `out` lies inside the repository, or `layers` is below 1.
      FileExistsError: `out` exists.
      FileNotFoundError: the parent directory of `out` does not exist.
      OSError: the disk has too little free space.
    """
    if layers is not None and layers < 1:
        raise ValueError(f"{layers=} must be at least 1")
    config, out = config.resolve(), out.resolve()
    fields = json.loads((config / "config.json").read_text())
    if layers is not None:
        fields["num_hidden_layers"] = layers
    shapes = tensor_shapes(fields)
    total = sum(map(_num_bytes, shapes.values()))
    _check_target(out, total)
    published = config / INDEX
    files = assign_files(shapes, json.loads(published.read_text())["weight_map"] if published.exists() else None)
    shards: dict[str, dict[str, Shape]] = {name: {} for name in sorted(set(files.values()))}
    for name, file_name in files.items():
        shards[file_name][name] = shapes[name]

    unfinished = pathlib.Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        for path in config.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", INDEX):
                shutil.copyfile(path, unfinished / path.name)
        (unfinished / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
        weight_map = {name: files[name] for name in sorted(files)}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (unfinished / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _write_shards(unfinished, shards, seed, console or Console(quiet=True))
        unfinished.chmod(0o755)  # mkdtemp makes directories that only their owner can read
        os.rename(unfinished, out)
    except BaseException:  # also on Ctrl-C: an incomplete checkpoint must be removed
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return out


def main(settings: SyntheticCheckpointSettings) -> None:
    """Makes the checkpoint and prints its number of files and its size."""
    console = Console()
    console.print(settings)
    out = make_checkpoint(settings.config, settings.out, layers=settings.layers, seed=settings.seed, console=console)
    paths = sorted(out.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in paths)
    console.print(f"made {out}: {len(paths)} shards, {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main(tyro.cli(SyntheticCheckpointSettings, description=__doc__))
