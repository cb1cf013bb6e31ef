"""Converts trained weights, layer by layer, into a Hugging Face directory that the published code loads.

    python convert/flax_to_hf.py runs/sft/model exported [--dtype bfloat16]
    python convert/flax_to_hf.py weights/dream-7b exported --adapter runs/lora/adapter --dtype bfloat16

SRC is a converted directory. With --adapter it is the base, a converted or a Hugging Face directory, and the adapter is
added to its weights. The model card, README.md, is written from the folder of the run that made SRC or the adapter; --run
names another folder.
"""

import dataclasses
import pathlib
from typing import Literal

import tyro
from _console import run

from dream_jax.bounds import check_numbers
from dream_jax.hf import SHARD_SIZE
from dream_jax.paths import check_local
from dream_jax.pretrained import Conversion, convert_to_hf
from dream_jax.reports.model_card import find_run, model_card


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Source, target and options of the export."""

    src: tyro.conf.Positional[str]
    """Converted directory, made by train.py, hf_to_flax.py or dream_jax.save; with --adapter also a Hugging Face one."""
    dst: tyro.conf.Positional[str]
    """The directory to write."""
    revision: str | None = None
    """Branch, tag or commit of SRC if it is a hub id; by default the newest commit of the main branch."""
    dtype: Literal["bfloat16", "float32", "float16", "keep"] = "keep"
    """The dtype of the written weights; keep uses the dtype of SRC."""
    adapter: pathlib.Path | None = None
    """Directory of an adapter to add to the weights."""
    any_base: bool = False
    """Add the adapter even to weights that it was not trained on."""
    run: pathlib.Path | None = None
    """Folder of the training run that the model card describes; by default the run that made SRC or the adapter."""
    max_shard_size: int = 5_000_000_000
    """The maximum number of bytes of weights in one file."""
    overwrite: bool = False
    """Replace an existing checkpoint at DST, when the new one is complete."""

    def __post_init__(self) -> None:
        check_numbers(self, max_shard_size=SHARD_SIZE)
        check_local(self, "src", "dst")


def main(settings: ExportSettings) -> None:
    """Converts SRC into DST and writes the model card."""

    def card(conversion: Conversion) -> str:
        found = settings.run or find_run(settings.adapter, conversion.source)
        adapted = settings.adapter is not None
        return model_card(found, name=conversion.target.name, dtype=conversion.dtype.name, adapter=adapted)

    run(
        settings,
        convert_to_hf,
        dtype=None if settings.dtype == "keep" else settings.dtype,
        adapter=settings.adapter,
        card=card,
        any_base=settings.any_base,
        max_shard_size=settings.max_shard_size,
        overwrite=settings.overwrite,
    )


if __name__ == "__main__":
    main(tyro.cli(ExportSettings, description=__doc__))
