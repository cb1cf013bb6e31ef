"""Makes the Dream checkpoint that training begins with of an autoregressive Qwen2 one, as Dream began with Qwen2.5-7B.

    python convert/qwen2_to_dream.py Qwen/Qwen2.5-7B weights/qwen2.5-7b-as-dream

The weights are copied as they are; the mask token takes a row of the embedding table that Qwen2.5 holds in reserve. The
result is no diffusion model before it is trained: python train.py --recipe ar-start --model DST --data documents.jsonl
"""

import dataclasses
import pathlib
import sys

import tyro

from dream_jax.pretrained import MaskRow, adapt_qwen2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """From where to where, and what the mask token begins as."""

    src: tyro.conf.Positional[str]
    """Directory with a Qwen2 config.json and safetensors, or a hub id such as Qwen/Qwen2.5-7B."""
    dst: tyro.conf.Positional[pathlib.Path]
    """Directory to make."""
    mask_row: MaskRow = "keep"
    """Embedding of the mask token: the reserve row as it lies, or the mean of all tokens' rows."""
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


def main(settings: Settings) -> None:
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
        f"({'as it lay in the table' if settings.mask_row == 'keep' else 'the mean of the rows before it'}); "
        "train it before it is asked anything"
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
