"""How good a model is: tasks with answers that are judged, likelihoods, intervals, and comparisons of two runs.

| module | what it is about |
|---|---|
| `problems` | what a problem, a judge and a verdict are |
| `puzzles`, `gsm8k`, `probe` | judges: sudoku and countdown; numbers in words; expected texts |
| `tasks` | the sampled tasks: their files and prompts |
| `scored_texts` | the tasks that are scored by likelihood: choices and texts |
| `likelihood` | the Monte Carlo bound on log p(text) |
| `statistics` | intervals and paired tests |
| `ledger` | the folder of a run, which resumes after a kill |
| `settings`, `run`, `progress`, `report` | one evaluation from settings to tables |
| `harness` | the adapter to lm-evaluation-harness |
"""

from dream_jax.evaluation.report import compare
from dream_jax.evaluation.run import evaluate
from dream_jax.evaluation.settings import EvaluateSettings

__all__ = ["EvaluateSettings", "compare", "evaluate"]
