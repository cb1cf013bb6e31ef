"""The iterative denoising sampler: the published algorithm, and faster ones, in one compiled loop.

The canvas (prompt and mask tokens) is denoised by a `lax.while_loop` that runs entirely on the device. Each step makes
a forward pass, proposes a token and a confidence for every masked position, and writes the most confident tokens.

| module | responsible for |
|---|---|
| `config` | `SamplerConfig` and the cache settings |
| `rules` | the number of positions that a step writes |
| `callbacks` | functions that the caller passes in: hooks and listeners |
| `generate` | prompts, padding, length buckets, random keys |
| `stream` | many prompts in one batch, where each row that is done is replaced by the next prompt |
| `state`, `loop` | the carry of the loop; its step and the compiled functions that run it |
| `passes` | what forward passes share: a pass over all tokens, the KV cache, groups of rows |
| `window_passes` | forward passes over all tokens or a window, with a KV cache that is an approximation |
| `block_passes` | forward passes with the exact KV cache of block diffusion |
| `pass_counts` | counts of forward passes by their kind, from which the work of an answer can be computed |
| `growth` | a canvas that is made longer while its texts go on |
| `propose` | from hidden states to tokens and confidences, with the logits of a few positions at a time |
"""

from dream_jax.sampler.callbacks import LogitsHook, Moment, TokenHook
from dream_jax.sampler.config import BlockCache, FastDLLMCache, NoCache, Preset, SamplerConfig, WindowCache
from dream_jax.sampler.generate import Sample, bucket_length, generate
from dream_jax.sampler.pass_counts import PassCounts, PassKind
from dream_jax.sampler.rules import Count, EntropyBound, Factor, Threshold
from dream_jax.sampler.stream import Answer, Stream

__all__ = [
    "Answer",
    "BlockCache",
    "Count",
    "EntropyBound",
    "Factor",
    "FastDLLMCache",
    "LogitsHook",
    "Moment",
    "NoCache",
    "PassCounts",
    "PassKind",
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
