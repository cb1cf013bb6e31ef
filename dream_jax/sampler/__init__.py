"""The iterative denoising sampler: the published algorithm, and faster ones, in one compiled loop.

A canvas of prompt and mask tokens is denoised by a `lax.while_loop` that never leaves the device: forward pass ->
hidden states of the masked positions -> token and confidence -> the surest ones are written.

| module | what it knows |
|---|---|
| `config`, `caches`, `rules` | settings; what is kept between passes; how many positions a pass writes |
| `hooks` | functions of the caller that are traced into the loop |
| `generate` | prompts, padding, length buckets, keys |
| `stream` | many prompts through one batch: rows that come and go |
| `state`, `loop`, `watching` | the carry; the step and the compiled drivers; who is shown the canvas |
| `passes` | full and windowed forward passes |
| `propose` | hidden states -> token and confidence, a few rows of logits at a time |

Knows the model, the clock and the decision rules. Knows nothing of text.
"""

from dream_jax.sampler.caches import FastDLLMCache, NoCache, WindowCache
from dream_jax.sampler.config import Preset, SamplerConfig
from dream_jax.sampler.generate import Sample, bucket_length, generate
from dream_jax.sampler.hooks import LogitsHook, Moment, TokenHook
from dream_jax.sampler.rules import Count, EntropyBound, Factor, Threshold
from dream_jax.sampler.stream import Answer, Stream

__all__ = [
    "Answer",
    "Count",
    "EntropyBound",
    "Factor",
    "FastDLLMCache",
    "LogitsHook",
    "Moment",
    "NoCache",
    "Preset",
    "Sample",
    "SamplerConfig",
    "Stream",
    "Threshold",
    "TokenHook",
    "WindowCache",
    "bucket_length",
    "generate",
]
