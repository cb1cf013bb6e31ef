"""Writes an adapter of this project in the layout of PEFT, which PEFT and other programs load.

    python convert/adapter_to_peft.py runs/lora/adapter exported-adapter --base-model Dream-org/Dream-v0-Instruct-7B

The other direction needs no conversion: sample.py --adapter, and all other flags of this name, take the directory of a
PEFT adapter too.
"""

import dataclasses
import pathlib

import jax
import tyro
from _console import errors_end_the_command

from dream_jax.pretrained import export_peft


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftExportSettings:
    """Source, target and options of the export."""

    src: tyro.conf.Positional[pathlib.Path]
    """Directory of an adapter, made by train.py or dream_jax.save_adapter."""
    dst: tyro.conf.Positional[pathlib.Path]
    """The directory to write."""
    base_model: str | None = None
    """Name or path of the model that the adapter belongs to, which PEFT notes as base_model_name_or_path."""
    overwrite: bool = False
    """Replace an existing PEFT directory at DST, when the new one is complete."""


def main(settings: PeftExportSettings) -> None:
    """Writes the PEFT directory and says what is in it."""
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    made = export_peft(settings.src, settings.dst, base_model=settings.base_model, overwrite=settings.overwrite)
    print(f"wrote {settings.dst}: {made.note}")


if __name__ == "__main__":
    with errors_end_the_command():
        main(tyro.cli(PeftExportSettings, description=__doc__))
