"""Makes a checkpoint to start Dream training from, out of an autoregressive Qwen2 one, as Dream did with Qwen2.5-7B.

    python convert/qwen2_to_dream.py Qwen/Qwen2.5-7B weights/qwen2.5-7b-as-dream

The weights are copied as they are; the mask token uses an unused row of the embedding table of Qwen2.5. The result
must be trained before it works as a diffusion model:

    python train.py --recipe ar-start --model DST --data documents.jsonl
"""

import dataclasses
import pathlib

import tyro
from _console import errors_end_the_command

from dream_jax import hub
from dream_jax.bounds import IntegerRange, check_numbers
from dream_jax.paths import check_local
from dream_jax.pretrained import MaskRow, adapt_qwen2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """Source, target and the initial embedding of the mask token."""

    src: tyro.conf.Positional[str]
    """Directory with a Qwen2 config.json and safetensors, or a hub id such as Qwen/Qwen2.5-7B."""
    dst: tyro.conf.Positional[pathlib.Path]
    """The directory to write."""
    revision: str | None = None
    """Branch, tag or commit of SRC if it is a hub id; by default the newest commit of the main branch."""
    mask_row: MaskRow = "keep"
    """Initial embedding of the mask token: keep uses the unused row as it is, mean the mean of all rows before it."""
    mask_token_id: int = 151666
    """Id of the mask token, a row of the table that no token uses (default: as in Dream). <|beginoftext|> is one less."""
    pad_token_id: int = 151643
    """Id of <|endoftext|>, which ends and pads a response."""
    tokenizer: pathlib.Path | None = None
    """Directory of the tokenizer files to copy; by default SRC, and the two tokens are added."""
    overwrite: bool = False
    """Replace an existing checkpoint at DST, when the new one is complete."""
    ignore_config_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Unknown key of config.json that does not change what the weights compute; give the flag again for another key."""

    def __post_init__(self) -> None:
        check_numbers(self, mask_token_id=IntegerRange(0), pad_token_id=IntegerRange(0))
        check_local(self, "src")


def main(settings: AdaptSettings) -> None:
    """Writes the Dream checkpoint DST and prints its size and its mask token."""
    config = adapt_qwen2(
        hub.pinned(settings.src, settings.revision),
        settings.dst,
        mask_row=settings.mask_row,
        mask_token_id=settings.mask_token_id,
        pad_token_id=settings.pad_token_id,
        tokenizer=settings.tokenizer,
        overwrite=settings.overwrite,
        ignore_config_keys=settings.ignore_config_key,
    )
    print(
        f"made {settings.dst}: {config.num_parameters:,} parameters, mask token {config.mask_token_id} "
        f"({'as it is in the table' if settings.mask_row == 'keep' else 'the mean of the rows before it'}); "
        "train it before you use it"
    )


if __name__ == "__main__":
    with errors_end_the_command():
        main(tyro.cli(AdaptSettings, description=__doc__))
