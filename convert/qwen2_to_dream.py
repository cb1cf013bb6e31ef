"""Makes from an autoregressive Qwen2 checkpoint the one that Dream training starts from, as Dream did with Qwen2.5-7B.

    python convert/qwen2_to_dream.py Qwen/Qwen2.5-7B weights/qwen2.5-7b-as-dream

The weights are copied as they are; the mask token uses an unused row of Qwen2.5's embedding table. The result
is not a diffusion model before it is trained: python train.py --recipe ar-start --model DST --data documents.jsonl
"""

import dataclasses
import pathlib

import tyro
from _console import errors_end_the_command

from dream_jax.pretrained import MaskRow, adapt_qwen2


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptSettings:
    """Source, target and the initial embedding of the mask token."""

    src: tyro.conf.Positional[str]
    """Directory with a Qwen2 config.json and safetensors, or a hub id such as Qwen/Qwen2.5-7B."""
    dst: tyro.conf.Positional[pathlib.Path]
    """The directory to write."""
    mask_row: MaskRow = "keep"
    """Initial embedding of the mask token: the unused row as it is, or the mean of the rows of all tokens."""
    mask_token_id: int = 151666
    """A row of the table that no token uses; Dream's by default. <|beginoftext|> takes the row before it."""
    pad_token_id: int = 151643
    """<|endoftext|>, which ends and pads a response."""
    tokenizer: pathlib.Path | None = None
    """Directory of tokenizer files for the result; by default SRC's, with the two tokens added."""
    overwrite: bool = False
    """Replace DST when the new one is complete."""
    ignore_config_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Unknown key of config.json that does not change what the weights compute; may be given again."""


def main(settings: AdaptSettings) -> None:
    config = adapt_qwen2(
        settings.src,
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
        "train it before it is asked anything"
    )


if __name__ == "__main__":
    with errors_end_the_command():
        main(tyro.cli(AdaptSettings, description=__doc__))
