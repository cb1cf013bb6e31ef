"""The settings of the sampler that `long_tasks.py` compares, by name: the published ones, today's presets, and others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from dream_jax.sampler import NoCache, SamplerConfig, Threshold, WindowCache
from dream_jax.sampler.config import FastDLLMVariant

BLOCK = 32
EXACT = "exact"
TODAY = {"balanced": "balanced of 0.2", "fast": "fast of 0.2"}
"""The presets of version 0.2, with which the work of the others is compared: the name of a preset -> the name here."""

RULES: Mapping[str, Threshold] = {"0.998": Threshold(0.998), "0.9": Threshold(0.9)}
"""From which probability on a token is written, by name. Each rule is combined with each cache."""

FALLING = Threshold(0.9, fall=0.3)
"""The rule of Streaming-dLLM, whose threshold falls as a block is filled. It is combined with some caches."""

CACHES: Mapping[str, NoCache | WindowCache] = {
    "no cache": NoCache(),
    "windows of 32 to both sides, every 4th pass full": WindowCache(left=32, right=32, refresh_passes=4),
    "windows": WindowCache(),
    # dKV-Cache computes all masked tokens in each pass, and everything in each n-th pass.
    "interval 4": WindowCache(right=None, refresh_blocks=None, refresh_passes=4),
    "interval 8": WindowCache(right=None, refresh_blocks=None, refresh_passes=8),
    # Streaming-dLLM and DPad show a block the next masks only.
    "suffix 32": WindowCache(suffix=32),
    "suffix 96": WindowCache(suffix=96),
    "full every 2 blocks": WindowCache(refresh_blocks=2),
    "full every 4 blocks": WindowCache(refresh_blocks=4),
    "full once": WindowCache(refresh_blocks=None),
    "renewing 32, full every 4 blocks": WindowCache(refresh_blocks=4, renew_left=32),
    "renewing 32, full once": WindowCache(refresh_blocks=None, renew_left=32),
    "renewing 96, full once": WindowCache(refresh_blocks=None, renew_left=96),
    "drift 0.1": WindowCache(refresh_drift=0.1),
    "drift 1": WindowCache(refresh_drift=1.0),
    "renewing 32, drift 0.1": WindowCache(renew_left=32, refresh_drift=0.1),
    "renewing 32, drift 1": WindowCache(renew_left=32, refresh_drift=1.0),
    "renewing 32, drift 0.1, suffix 96": WindowCache(renew_left=32, refresh_drift=0.1, suffix=96),
    "renewing 32, full every 4 blocks, suffix 32": WindowCache(refresh_blocks=4, renew_left=32, suffix=32),
    "renewing 32, full every 4 blocks, suffix 96": WindowCache(refresh_blocks=4, renew_left=32, suffix=96),
    "renewing 32, full once, suffix 96": WindowCache(refresh_blocks=None, renew_left=32, suffix=96),
}
"""The caches, by name."""

WITH_FALLING = ("windows", "suffix 96", "renewing 32, full every 4 blocks, suffix 96")
"""The caches that are combined with `FALLING`."""


def sampler_settings(new_tokens: int, **options: Any) -> dict[str, SamplerConfig]:
    """Returns all settings by name, `EXACT` first; `new_tokens` must be a multiple of `BLOCK`.

    Args:
      new_tokens: number of new tokens.
      **options: fields of SamplerConfig that all settings have, such as the tokens that are never written.
    """
    found = {EXACT: SamplerConfig.preset("exact", max_new_tokens=new_tokens, **options)}
    of_today = {
        TODAY["balanced"]: (CACHES["windows of 32 to both sides, every 4th pass full"], RULES["0.998"]),
        TODAY["fast"]: (CACHES["windows"], RULES["0.9"]),
    }
    combined = {
        f"{name}, {rule}": (cache, RULES[rule])
        for name, cache in CACHES.items()
        for rule in RULES
        if (cache, RULES[rule]) not in of_today.values()
    }
    falling = {f"{name}, 0.9 falling": (CACHES[name], FALLING) for name in WITH_FALLING}
    for name, (cache, rule) in (of_today | combined | falling).items():
        found[name] = SamplerConfig(
            max_new_tokens=new_tokens,
            alg="maskgit_plus",
            block_length=BLOCK,
            commit=rule,
            cache=cache,
            stop_at_end=True,
            **options,
        )
    # The published settings of Fast-dLLM, whose threshold is 0.9; `steps` has no effect with a threshold.
    for variant in get_args(FastDLLMVariant):
        found[f"Fast-dLLM {variant}"] = SamplerConfig.fast_dllm(
            cache=variant,
            block_length=BLOCK,
            max_new_tokens=new_tokens,
            steps=new_tokens,
            alg="maskgit_plus",
            commit=Threshold(0.9),
            **options,
        )
    return found
