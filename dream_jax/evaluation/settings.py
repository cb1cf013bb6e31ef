"""What to evaluate and how: the settings of `evaluate.py`, and what the published evaluations used."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from dream_jax import masks
from dream_jax.attention import Backend
from dream_jax.decoding import Alg
from dream_jax.evaluation.likelihood import check_samples
from dream_jax.evaluation.tasks import SampledTask
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
class EvaluateSettings:
    """What to evaluate and how."""

    model: str = "runs/demo/model"
    """a converted or Hugging Face directory, a hub id, or a preset (random weights)"""
    task: TaskName = "sudoku"
    """sudoku, countdown, gsm8k and chat are sampled; choice takes the likeliest; likelihood is bits per byte"""
    file: pathlib.Path | None = None
    """.jsonl file of the task; without one, sudoku is generated"""
    out: pathlib.Path | None = None
    """folder of the results; by default runs/eval-TASK. The same command goes on where it stopped"""
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
    template: Literal["auto", "chat", "raw"] = "auto"
    """chat template or bare text; auto: as --published says, or as the model was trained"""
    published: Published | None = None
    """Dream's own settings of template and sampler, where they are not given"""
    sampler: Preset = "exact"
    """exact: the published sampler; balanced and fast: cached blocks, as many tokens a pass as are sure enough"""
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
    mask: str | None = None
    """who may attend to whom, as in sample.py; by default as the model was trained, which any other mask contradicts"""
    samples: int = 128
    """Monte Carlo samples of each likelihood, even"""
    batch_size: int = 8
    """rows that are computed together"""
    tokenizer: str | None = None
    """directory with tokenizer files, or "bytes"; by default the model's own"""
    mesh: str = "1x1"
    """devices, fsdp x tensor"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the weights; auto: float32 on a CPU, bfloat16 elsewhere"""
    adapter: str | None = None
    """directory of an adapter to evaluate; added to the weights, or kept beside them under --base int8 and nf4"""
    any_base: bool = False
    """use the adapter on other weights than those it was trained on"""
    base: Literal["auto", "int8", "nf4"] = "auto"
    """how the matrices of the layers are stored; auto: as --dtype says, and codes of 8 or 4 bits to save memory"""
    attention: Backend = "auto"
    """auto: the fastest that can serve; xla runs everywhere"""
    figure: bool = False
    """also draw figure.png (needs matplotlib)"""

    def __post_init__(self) -> None:
        for name in ("seeds", "batch_size", "limit", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.shots is not None and self.shots < 0:
            raise ValueError(f"shots={self.shots} must not be negative")
        if self.any_base and self.adapter is None:
            raise ValueError("--any-base speaks of an adapter: give --adapter as well")
        if self.mask is not None:
            masks.parse(self.mask)
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
        return make_sampler(self.sampler, self.published, given, tokenizer, max_new_tokens)


def make_sampler(
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
    if preset != "exact" and "steps" in given:
        raise ValueError(f"steps={given['steps']} means nothing under the sampler {preset}, which goes by confidence")
    said = dict(PUBLISHED[published][1]) if published is not None else {}
    if preset != "exact":
        said.pop("alg", None)  # theirs belongs to the rule by which they write
    return SamplerConfig.preset(
        preset,
        max_new_tokens=max_new_tokens,
        vocab_limit=tokenizer.vocab_limit,
        forbidden_tokens=(tokenizer.mask_id,),
        **{**asked, **said, **given},
    )
