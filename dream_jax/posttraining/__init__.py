"""The objectives of a training run: what is learned from the rows of the data, and what one step computes.

`train.py --objective NAME` chooses one. Everything else of a run is the same for all objectives and is in
`dream_jax.trainer`: the loop, the folder, resuming, reports and loggers. The trainer imports this package and not the other
way round, so an objective receives what it needs as arguments and knows neither `TrainSettings` nor the folder's files.

An objective is a subclass of `Objective` with an entry in `registry.OBJECTIVES` and its name in `registry.ObjectiveName`.
It supplies:

1. How its data is read: `Objective.check_options` and `Objective.check_rows` refuse options and rows that it cannot use,
   `Objective.tokenize` makes tokens of the rows, and `Objective.batches` makes the endless,
   resumable iterator over batches (as `dream_jax.data.make_batches` does for `sft`). A batch is a `Batch` or a subclass of
   it that is registered as a pytree, with one row or several rows for each row of the settings' batch size.
2. Its step: `Objective.step` makes the compiled function (state, batch, frozen parameters) -> (state, metrics) from
   `StepMaterials`, without data and without devices, so that a plan can compile it too. `train_step.summed_gradients`,
   `train_step.updated_state` and `train_step.CompiledStep` are the shared halves of such a step. `Objective.batch_shapes`
   gives the shapes of its batches, and `Objective.computed_rows` and `Objective.forward_rows` say how much it computes.
3. What surrounds the step: `Objective.driver` makes the `Driver` of a run, which is called once for each step of the loop
   with a batch of numpy arrays. The default only sends the batch to the devices and calls the step. A driver may sample
   answers first, keep a state of its own in the checkpoints (`Driver.get_state`), and score held-out rows
   (`Driver.evaluate`). It receives the tokenizer, the rows and the mesh as `RunMaterials`.

The metrics of a step must contain those of `trainer.folder.METRICS` (NaN for what has no meaning) and those that
`Objective.metrics` names, which become further columns of `metrics.csv`; `Objective.evaluated` names further columns of
`eval.csv`, which `Driver.evaluate` returns.

Settings: each family of objectives has one frozen dataclass with all its flags, `PreferenceSettings` in
`preference_settings` and `RewardSettings` in `reward_settings`. They are groups of `TrainSettings`. A value that is not a
default, under an objective that does not read the group, is refused by `registry.check_groups`.

| module | what it is responsible for |
| --- | --- |
| `base` | the classes `Objective` and `Driver`, and what they receive |
| `registry` | the names of the objectives, and which group of settings each reads |
| `supervised` | the objective `sft`: the loss of masked diffusion, or of block diffusion, on the responses |
| `grpo` | the objective `grpo`: rollouts, rewards and updates on the answers |
| `prompts`, `rollouts`, `rollout_file` | prompts in random order; answers sampled during a run; a file with some of them |
| `rewards`, `advantages` | how good an answer is, and how much better than the others of its group |
| `policies`, `token_logprobs` | which forward passes score the tokens of an answer, and their log-probabilities |
| `preferences`, `answer_bounds` | the objectives `vrpo` and `simpo`; the likelihood bounds of answers and their noise |
| `pair_driver`, `pair_metrics` | bounds of the reference, and scores of held-out pairs; what is measured of pairs |
| `preference_settings`, `reward_settings` | the settings of preferences, and those of rewards |
"""

from dream_jax.posttraining.base import BatchSizes, Driver, Objective, RunMaterials, StepMaterials
from dream_jax.posttraining.preference_settings import PreferenceSettings, Reference
from dream_jax.posttraining.registry import OBJECTIVES, ObjectiveName, check_groups, make_objective
from dream_jax.posttraining.reward_settings import RewardSettings
from dream_jax.posttraining.rewards import SampledAnswer

__all__ = [
    "OBJECTIVES",
    "BatchSizes",
    "Driver",
    "Objective",
    "ObjectiveName",
    "PreferenceSettings",
    "Reference",
    "RewardSettings",
    "RunMaterials",
    "SampledAnswer",
    "StepMaterials",
    "check_groups",
    "make_objective",
]
