"""The training loop: data, steps, logs, checkpoints, stopping and resuming.

All files of a run are in one folder: `settings.json`, `metrics.csv` (one row per step), `eval.csv` (one row per
evaluation), TensorBoard events, `checkpoints/`, `tokenizer/`, and at the end `model/` (a converted directory) and
`summary.json`. The same command on the same folder resumes a run that was stopped or killed; a finished run is only
replaced with `--overwrite`. A run that trains an adapter writes `adapter/`, and `model/` only with `--merge`.
`dream_jax.reports` writes `report.md`.

| module | what it is responsible for |
| --- | --- |
| `setting_groups`, `settings`, `recipes` | the settings of a run, and recipes: files with settings of whole runs |
| `weights` | which weights are trained and which are frozen; reading and writing them |
| `build` | the training step, which can be compiled without its devices |
| `remat_choice` | what the backward pass keeps with `--remat auto` |
| `prepared` | everything that is made and checked before a file is written |
| `loop`, `steps`, `stop_signal` | the order of the work in a run, its steps, and stopping on SIGINT and SIGTERM |
| `heldout`, `scoring`, `samples` | likelihood during the run, evaluation at its end, and answers for people to read |
| `folder`, `space`, `loggers`, `console`, `incidents` | files of a run, space on the disk, loggers, terminal, problems |
| `segments`, `cost`, `summary` | the time over all restarts, its price, `data.json` and `summary.json` |
"""

from dream_jax.distributed import leave
from dream_jax.trainer.loop import Diverged, Stopped, train
from dream_jax.trainer.scoring import evaluate
from dream_jax.trainer.settings import TrainSettings

__all__ = ["Diverged", "Stopped", "TrainSettings", "evaluate", "leave", "train"]
