"""The iterative denoising sampler: the published algorithm, and faster ones, in one compiled loop.

The canvas (prompt and mask tokens) is denoised by a `lax.while_loop` that runs entirely on the device. Each step is a
forward pass, a token and a confidence for every masked position, and the writing of the most confident ones.

| module | responsible for |
|---|---|
| `config` | `SamplerConfig` and the cache settings |
| `rules` | how many positions a step writes |
| `callbacks` | functions of the caller: hooks and listeners |
| `generate` | prompts, padding, length buckets, random keys |
| `stream` | many prompts through one batch, replacing each row when it is done |
| `state`, `loop` | the loop's carry; the step and the compiled drivers |
| `passes` | forward passes over all tokens, or over a window with a KV cache |
| `propose` | hidden states to token and confidence, a few rows of logits at a time |
"""

from dream_jax.sampler.callbacks import LogitsHook, Moment, TokenHook
from dream_jax.sampler.config import FastDLLMCache, NoCache, Preset, SamplerConfig, WindowCache
from dream_jax.sampler.generate import Sample, bucket_length, generate
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
