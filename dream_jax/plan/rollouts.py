"""Plans the rollouts of a run with rewards: the memory and the time of sampling, beside those of the updates."""

from __future__ import annotations

import dataclasses

import jax

from dream_jax.plan import cost
from dream_jax.plan.arithmetic import model_flops
from dream_jax.plan.hardware import Hardware
from dream_jax.plan.hlo import Collective
from dream_jax.plan.settings import RolloutPlan, StepTime
from dream_jax.posttraining import RewardSettings
from dream_jax.step_memory import AbstractStep, DeviceBytes, StepShape, matrix_count

_FLOAT32 = 4
# Largest number of logits that the sampler computes together (`sampler.propose`), and the number of float32 arrays of this
# size that are in memory with them: logits, masses, and what the choice of tokens computes from them.
_LOGITS, _COPIES = 1 << 26, 4


def plan_rollout(
    settings: RewardSettings,
    step: AbstractStep,
    shape: StepShape,
    state: DeviceBytes,
    update: StepTime,
    hardware: Hardware,
    utilization: tuple[float, float],
    prompts: int,
) -> RolloutPlan:
    """Returns the predicted memory and time of a rollout, by arithmetic.

    Args:
      settings: the settings of the rollouts.
      step, shape: one update; `shape.length` is the number of tokens of prompt and answer.
      state: the memory of the update, whose parameters and optimizer stay in memory during a rollout.
      update: the time of one update.
      hardware, utilization: as for `cost.step_time`.
      prompts: number of prompts of a step.
    """
    config, tensor, fsdp = step.model.config, shape.mesh["tensor"], shape.mesh["fsdp"]
    width = jax.numpy.dtype(step.model.compute_dtype).itemsize
    answers = prompts * settings.group_size
    rows = min(answers, settings.rollout_rows or answers)
    passes = settings.most_steps
    # A training step counts 4 operations for a frozen weight and token (6 for one that is trained), a forward pass 2. The
    # head is computed for the masked tokens, on average half of the answer.
    one = dataclasses.replace(
        shape, batch=answers, accumulation=1, masked_share=settings.rollout_tokens / (2 * shape.length)
    )
    flops = passes * model_flops(step, one) / (2.0 if step.frozen else 3.0)
    # Each pass of a batch reads the weights once; if they are sharded, they are gathered for it.
    batches = -(-answers // rows)
    weights = (matrix_count(config) + config.hidden_size * config.vocab_size) / tensor * width
    gathered: tuple[Collective, ...] = ()
    if shape.groups > 1:
        share = (shape.groups - 1) / shape.groups
        count = passes * batches * (config.num_hidden_layers * 7 + 1)
        gathered = (Collective(kind="all-gather", count=count, sent=passes * batches * share * weights),)
    time = cost.step_time(
        hardware,
        utilization,
        model_flops=flops,
        remat_flops=0.0,
        traffic=passes * batches * weights,
        collectives=gathered,
    )
    tokens = rows / fsdp * shape.length
    layer = tokens * width * (2 * config.intermediate_size + 6 * config.hidden_size) / tensor
    logits = min(_LOGITS, tokens * config.vocab_size) * _COPIES * _FLOAT32 / tensor
    cache = 0.0
    if settings.rollout_preset != "exact":
        heads = config.num_key_value_heads * config.head_dim / tensor
        cache = 2 * config.num_hidden_layers * heads * tokens * width
    working = int(layer + logits + cache)
    totals = [
        settings.updates * seconds + sampling
        for seconds, sampling in ((update.fast, time.fast), (update.slow, time.slow))
    ]
    return RolloutPlan(
        answers=answers,
        passes=passes,
        flops=flops,
        fast=time.fast,
        slow=time.slow,
        share=(time.fast / totals[0], time.slow / totals[1]),
        working=working,
        peak=state.parameters + state.optimizer + working,
    )
