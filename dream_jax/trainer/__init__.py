"""The training loop: data, steps, logs, checkpoints, stopping and resuming.

A run lives in one folder: `settings.json`, `metrics.csv` (a row a step), `eval.csv` (a row an evaluation), TensorBoard
events, `checkpoints/`, `tokenizer/`, and at the end `model/` (a converted directory) and `summary.json`. The same command
on the same folder resumes a run that was stopped or killed; a finished run is only replaced with `--overwrite`. A run that
trains an adapter leaves `adapter/`, and `model/` only when asked. `dream_jax.reports` makes `report.md` of it.

| module | what it is responsible for |
| --- | --- |
| `setting_groups`, `settings`, `recipes` | what a run is, and names for whole sets of settings |
| `weights` | which weights are trained, which are frozen, where they come from and go |
| `build` | the compiled step, also for devices that are absent |
| `prepared` | everything that is checked before a file is written |
| `loop`, `steps`, `stop_signal` | the order of a run, its steps, and stopping on request |
| `heldout`, `scoring`, `samples` | likelihood during the run, answers at its end, and answers for people to read |
| `folder`, `loggers`, `console`, `incidents` | files, other loggers, the terminal, and what went wrong |
| `segments`, `cost`, `summary` | the time over all restarts, its price, and `summary.json` |
"""

from dream_jax.distributed import leave
from dream_jax.trainer.loop import Diverged, Stopped, train
from dream_jax.trainer.scoring import evaluate
from dream_jax.trainer.settings import TrainSettings

__all__ = ["Diverged", "Stopped", "TrainSettings", "evaluate", "leave", "train"]
