"""Measures how good a model is: judged answers, likelihoods, confidence intervals, and comparisons of two runs.

| module | content |
|---|---|
| `problems` | the type Problem; the judges of puzzles and of numbers are in `dream_jax.judges` |
| `probe` | the judge of expected texts |
| `tasks` | tasks with sampled answers: their files and prompts |
| `scored_texts` | tasks that are scored by likelihood: multiple choice and texts |
| `likelihood` | the Monte Carlo bound on log p(text) |
| `statistics` | confidence intervals and paired tests |
| `ledger` | the folder of a run, which can resume after a kill |
| `settings`, `run`, `progress`, `report` | one evaluation, from settings to tables |
| `harness` | the adapter to lm-evaluation-harness |
"""

from dream_jax.evaluation.report import compare
from dream_jax.evaluation.run import evaluate
from dream_jax.evaluation.settings import EvaluateSettings

__all__ = ["EvaluateSettings", "compare", "evaluate"]
