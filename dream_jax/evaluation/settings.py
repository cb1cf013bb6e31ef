"""What to evaluate and how: the settings of `evaluate.py`, and what the published evaluations used."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from dream_jax.decoding import Alg
from dream_jax.evaluation.likelihood import check_samples
from dream_jax.evaluation.tasks import SampledTask
from dream_jax.inference import ModelSettings, make_sampler
from dream_jax.sampler import Preset, SamplerConfig
from dream_jax.tokenizer import Template, Tokenizer

TaskName = SampledTask | Literal["choice", "likelihood"]
Published = Literal["base", "instruct", "planning"]

PUBLISHED: Mapping[Published, tuple[Template, Mapping[str, Any]]] = {
    "base": ("raw", {"alg": "entropy", "temperature": 0.0, "top_p": 0.95}),
    "instruct": ("chat", {"alg": "entropy", "temperature": 0.1, "top_p": 0.9}),
    "planning": ("raw", {"alg": "entropy", "temperature": 0.0}),
}
"""Dream's evaluation settings: how prompts are written, and the sampler. All take a step a token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings(ModelSettings):
    """What to evaluate and how."""

    task: TaskName = "sudoku"
    """sudoku, countdown, gsm8k and chat are sampled; choice takes the likeliest; likelihood is bits per byte"""
    file: pathlib.Path | None = None
    """.jsonl file of the task; without one, sudoku is generated"""
    out: pathlib.Path | None = None
    """folder of the results; by default runs/eval-TASK. The same command resumes where it stopped"""
    overwrite: bool = False
    """start anew whatever --out holds"""
    compare: tuple[pathlib.Path, pathlib.Path] | None = None
    """two folders of results on the same problems: compares them, evaluates nothing"""
    seeds: int = 1
    """runs with the seeds 0, 1, ...: of sampling, or of the masks of a likelihood"""
    limit: int | None = None
    """the first so many problems"""
    shots: int | None = None
    """worked examples in the prompt; by default the task's own number, and 0 for byte-level models"""
    examples: pathlib.Path | None = None
    """file of worked examples; by default the first rows of --file, which are then not asked"""
    instruction: str | None = None
    """what the prompt begins with; by default the task's own"""
    published: Published | None = None
    """Dream's own settings of template and sampler, where they are not given"""
    sampler: Preset = "exact"
    """exact: the published sampler; balanced and fast: cached blocks, as many tokens a pass as are probable enough"""
    max_new_tokens: int | None = None
    """room for an answer; by default the task's own"""
    steps: int | None = None
    """denoising steps of --sampler exact; by default one a new token"""
    alg: Alg | None = None
    """order in which positions are written; by default the sampler's (exact: entropy)"""
    temperature: float | None = None
    """0, the default, takes the most probable token"""
    top_p: float | None = None
    """nucleus, in (0, 1]"""
    top_k: int | None = None
    """number of tokens kept"""
    alg_temp: float | None = None
    """softens the order"""
    samples: int = 128
    """Monte Carlo samples of each likelihood, even"""
    batch_size: int = 8
    """rows that are computed together"""
    figure: bool = False
    """also draw figure.png"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("seeds", "batch_size", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"shots={self.shots} must not be negative")
        check_samples(self.samples)
        if self.task in ("countdown", "gsm8k", "chat", "choice", "likelihood") and not (self.file or self.compare):
            raise ValueError(f"task {self.task} needs --file, a .jsonl file")

    @property
    def folder(self) -> pathlib.Path:
        """Where the results lie."""
        return pathlib.Path("runs") / f"eval-{self.task}" if self.out is None else self.out

    def sampler_config(self, tokenizer: Tokenizer, max_new_tokens: int) -> SamplerConfig:
        """The sampler: what is given, else what `published` says, else the preset's own at temperature 0."""
        given = {name: getattr(self, name) for name in ("steps", "alg", "temperature", "top_p", "top_k", "alg_temp")}
        given = {name: value for name, value in given.items() if value is not None}
        return published_sampler(self.sampler, self.published, given, tokenizer, max_new_tokens)


def published_sampler(
    preset: Preset,
    published: Published | None,
    given: Mapping[str, Any],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    asked: Mapping[str, Any] = MappingProxyType({}),
) -> SamplerConfig:
    """A preset of the sampler with, in this order, what is `given`, what is `published`, and what a task has `asked`.

    Raises: ValueError for values that cannot be, and for steps where the sampler goes by confidence.
    """
    said = dict(PUBLISHED[published][1]) if published is not None else {}
    if preset != "exact":
        said.pop("alg", None)  # these presets bring the order that belongs to their commit rule
    return make_sampler(tokenizer, max_new_tokens, preset, **{**asked, **said, **given})
