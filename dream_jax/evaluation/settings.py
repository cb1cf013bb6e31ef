"""The settings of `evaluate.py`, and the templates and sampler settings of Dream's published evaluations."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import tyro

from dream_jax.bounds import MOST_ROWS, MOST_TOKENS, IntegerRange, check_numbers
from dream_jax.decoding import Alg
from dream_jax.evaluation.likelihood import check_samples
from dream_jax.evaluation.tasks import SampledTask
from dream_jax.inference import ModelSettings, make_sampler
from dream_jax.paths import check_local
from dream_jax.sampler import Preset, SamplerConfig
from dream_jax.tokenizer import ByteTokenizer, Template, Tokenizer

TaskName = SampledTask | Literal["choice", "likelihood"]
Published = Literal["base", "instruct", "planning"]

PUBLISHED: Mapping[Published, tuple[Template, Mapping[str, Any]]] = {
    "base": ("raw", {"alg": "entropy", "temperature": 0.0, "top_p": 0.95}),
    "instruct": ("chat", {"alg": "entropy", "temperature": 0.1, "top_p": 0.9}),
    "planning": ("raw", {"alg": "entropy", "temperature": 0.0}),
}
"""The template and the sampler settings of each of Dream's published evaluations. All use one step for each new token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(ModelSettings):
    """The task, the model, the sampler and the output folder of one evaluation.

    Raises: ValueError for a value outside its range, or for a task that needs `file` and has none.
    """

    task: TaskName = "sudoku"
    """sudoku, countdown, gsm8k, chat: sampled answers; choice: the most likely choice; likelihood: bits per byte"""
    file: pathlib.Path | None = None
    """.jsonl, .json or .parquet file with the problems of the task; only sudoku works without one: its puzzles are then
    generated"""
    ignore_field: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """leave out this field of each row, as if the rows did not have it; the flag may be repeated"""
    out: pathlib.Path | None = None
    """folder of the results; by default runs/eval-TASK. The same command resumes an evaluation that was stopped"""
    overwrite: bool = False
    """delete the results that --out already holds, and start from the first problem"""
    compare: tuple[pathlib.Path, pathlib.Path] | None = None
    """two folders of results on the same problems: compare them and evaluate nothing"""
    seeds: int = 1
    """number of passes over all problems, with the seeds 0, 1, ... for sampling or for the masks of a likelihood"""
    limit: int | None = None
    """evaluate only this many problems, from the beginning of the file"""
    shots: int | None = None
    """number of worked examples in each prompt; by default the usual number of the task, and 0 for byte-level models"""
    examples: pathlib.Path | None = None
    """file of worked examples; by default the first rows of --file are the examples, and are not evaluated"""
    instruction: str | None = None
    """text at the beginning of each prompt; by default that of the training, if the model or the adapter notes one, or
    else the instruction of the task"""
    published: Published | None = None
    """use the template and sampler settings of this published evaluation of Dream, except where flags set others"""
    sampler: Preset = "exact"
    """exact: the published sampler; balanced, fast: KV cache, and a pass writes all tokens that are probable enough"""
    max_new_tokens: int | None = None
    """maximum number of tokens of an answer; by default the number of the task"""
    steps: int | None = None
    """number of denoising steps of --sampler exact; by default one for each mask on the canvas"""
    alg: Alg | None = None
    """measure of confidence that orders the positions to write; by default that of the sampler (exact: entropy)"""
    temperature: float | None = None
    """temperature of the token probabilities, at least 0; 0, the default, takes the most probable token"""
    top_p: float | None = None
    """sample from the smallest set of tokens whose probabilities sum to at least this number, in (0, 1]"""
    top_k: int | None = None
    """sample from this many most probable tokens"""
    alg_temp: float | None = None
    """draw the positions to write from softmax(confidence / alg_temp); 0 or not given: the most confident first"""
    first_token_first: bool = False
    """for a model of block diffusion: the first pass over a block writes its first token, whatever its confidence"""
    samples: int = 128
    """number of Monte Carlo samples for each likelihood; an even number, at least 10"""
    batch_size: int = 8
    """number of rows that are computed together; a multiple of the number of devices that share a batch"""
    figure: bool = False
    """also draw the results as figure.png in --out"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_local(self)
        check_numbers(
            self,
            seeds=IntegerRange(1, MOST_ROWS),
            limit=IntegerRange(1),
            shots=IntegerRange(0, MOST_ROWS),
            max_new_tokens=IntegerRange(1, MOST_TOKENS),
            batch_size=IntegerRange(1, MOST_ROWS),
        )
        # Raises ValueError for the settings of the sampler. The mask of the model is not known yet.
        mask = "block-diffusion:1" if self.first_token_first else "bidirectional"
        self.sampler_config(ByteTokenizer(), self.max_new_tokens or 1, mask)
        check_samples(self.samples)
        if self.ignore_field and self.file is None:
            raise ValueError("--ignore-field is for the rows of --file; leave it out, or give a file")
        if self.task in ("countdown", "gsm8k", "chat", "choice", "likelihood") and not (self.file or self.compare):
            raise ValueError(f"task {self.task} needs --file, a .jsonl, .json or .parquet file")

    @property
    def folder(self) -> pathlib.Path:
        """The folder of the results: `out`, or runs/eval-TASK if `out` is None."""
        return pathlib.Path("runs") / f"eval-{self.task}" if self.out is None else self.out

    def sampler_config(
        self, tokenizer: Tokenizer, max_new_tokens: int, trained_mask: str = "bidirectional"
    ) -> SamplerConfig:
        """Returns the sampler for answers of `max_new_tokens` tokens; see `published_sampler` for which value wins."""
        names = ("steps", "alg", "temperature", "top_p", "top_k", "alg_temp", "first_token_first")
        given = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in given.items() if value is not None}
        return published_sampler(
            self.sampler, self.published, given, tokenizer, max_new_tokens, trained_mask=trained_mask
        )


def published_sampler(
    preset: Preset,
    published: Published | None,
    given: Mapping[str, Any],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    asked: Mapping[str, Any] = MappingProxyType({}),
    *,
    trained_mask: str = "bidirectional",
) -> SamplerConfig:
    """Returns the sampler of `preset`, at temperature 0, changed by other settings.

    For each field of `SamplerConfig` the first of these that sets the field counts: `given` (values of the user), the
    settings of the evaluation `published`, `asked` (values of the task), and the preset. The preset depends on
    `trained_mask`, see `SamplerConfig.preset`.

    Raises: ValueError for a value outside its range, and for `steps` with a preset that commits by confidence.
    """
    said = dict(PUBLISHED[published][1]) if published is not None else {}
    if preset != "exact":
        said.pop("alg", None)  # The commit rules of these presets need the `alg` that the preset sets.
    return make_sampler(tokenizer, max_new_tokens, preset, trained_mask=trained_mask, **{**asked, **said, **given})
