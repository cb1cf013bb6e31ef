"""Turns a converted directory back into a Hugging Face one that the published code loads, layer by layer.

python convert/flax_to_hf.py SRC DST [--dtype bfloat16]
"""

import dataclasses
from typing import Literal

import tyro
from _console import run

from dream_jax.pretrained import convert_to_hf


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """From where to where, and how."""

    src: tyro.conf.Positional[str]
    """Converted directory, as made by hf_to_flax.py or dream_jax.save."""
    dst: tyro.conf.Positional[str]
    """Directory to make."""
    dtype: Literal["bfloat16", "float32", "float16", "keep"] = "keep"
    """What to store the weights in; keep: as they are in SRC."""
    max_shard_size: int = 5_000_000_000
    """Bytes of weights in one file."""
    overwrite: bool = False
    """Replace DST when the new one is complete."""


def main(settings: Settings) -> None:
    run(
        settings,
        convert_to_hf,
        dtype=None if settings.dtype == "keep" else settings.dtype,
        max_shard_size=settings.max_shard_size,
        overwrite=settings.overwrite,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
