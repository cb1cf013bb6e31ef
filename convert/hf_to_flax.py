"""Converts a Hugging Face checkpoint into a converted directory (Orbax), with a few hundred megabytes in memory at a time.

    python convert/hf_to_flax.py SRC DST [--dtype bfloat16] [--mesh 8x1]

SRC is a directory, or a hub id to download. `dream_jax.load(DST)` loads the result, on any mesh and in any dtype.
"""

import dataclasses
from typing import Literal

import tyro
from _console import run

from dream_jax.bounds import check_numbers
from dream_jax.paths import check_local
from dream_jax.pretrained import convert_from_hf
from dream_jax.sharding import parse_mesh_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """Source, target and options of the conversion."""

    src: tyro.conf.Positional[str]
    """Directory with config.json and safetensors, or a hub id such as Dream-org/Dream-v0-Instruct-7B."""
    dst: tyro.conf.Positional[str]
    """The directory to write."""
    revision: str | None = None
    """Branch, tag or commit of SRC if it is a hub id; by default the newest commit of the main branch."""
    dtype: Literal["bfloat16", "float32", "float16", "keep"] = "keep"
    """The dtype of the written weights; keep uses the dtype of SRC."""
    mesh: str | None = None
    """Mesh, such as 8x1 (fsdp x tensor): each shard is written as one file. Any other mesh can load them too."""
    overwrite: bool = False
    """Replace an existing checkpoint at DST, when the new one is complete."""
    ignore_config_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Unknown key of config.json that does not change what the weights compute; give the flag again for another key."""

    def __post_init__(self) -> None:
        check_numbers(self)
        check_local(self, "src", "dst")
        if self.mesh is not None:
            parse_mesh_shape(self.mesh)


def main(settings: ImportSettings) -> None:
    """Converts the checkpoint SRC into the directory DST."""
    run(
        settings,
        convert_from_hf,
        dtype=None if settings.dtype == "keep" else settings.dtype,
        mesh=settings.mesh,
        overwrite=settings.overwrite,
        ignore_config_keys=settings.ignore_config_key,
    )


if __name__ == "__main__":
    main(tyro.cli(ImportSettings, description=__doc__))
