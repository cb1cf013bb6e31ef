"""The training loop: data, steps, logs, checkpoints, stopping and going on.

A run lives in one folder: `settings.json`, `metrics.csv` (a row a step), `eval.csv` (a row an evaluation), TensorBoard
events, `checkpoints/`, `tokenizer/`, and at the end `model/` (a converted directory) and `summary.json`. The same command
on the same folder goes on where the run stopped; a finished run is never touched without being told to. A run that trains
an adapter leaves `adapter/`, and `model/` only when asked. For a person it leaves `report.md` and `curves.png`.

`settings` says what a run is and `recipes` gives settings names, `weights` says what it trains and what not, `build` makes
its step (also for devices that are absent), `folder` keeps what the run writes and `loggers` send it elsewhere, `report`
shows it to a person, `grid` scores it as it goes and `scoring` at the end, `samples` keeps answers from before and after,
`incidents` what went wrong and `parts` the time it took, also that of parts that were killed; `cost` has its price,
and `loop` puts them together. `record` reads a folder again, for `run_report`, `curves`,
`comparison` and `card`. What a step computes is `train_step`'s; what a row is, `data`'s.
"""

from dream_jax.distributed import leave
from dream_jax.trainer.loop import Diverged, Stopped, train
from dream_jax.trainer.scoring import evaluate
from dream_jax.trainer.settings import TrainSettings

__all__ = ["Diverged", "Stopped", "TrainSettings", "evaluate", "leave", "train"]
