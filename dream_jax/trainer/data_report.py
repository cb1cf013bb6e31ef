"""Reports how the data of a run fits into its rows and batches, without training: `train.py --data-report FILE`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

from dream_jax.data import longest_row
from dream_jax.files import write_json
from dream_jax.paths import check_replaceable, is_json_object
from dream_jax.posttraining import BatchSizes
from dream_jax.trainer import weights
from dream_jax.trainer.build import open_tokenizer
from dream_jax.trainer.settings import TrainSettings


def write_data_report(settings: TrainSettings, path: pathlib.Path, say: Callable[[str], None] = print) -> None:
    """Prints the lines about the data that a run prints before its first step, and writes their numbers to a file.

    The data is tokenised and kept in the cache as for a run, so the run itself then finds it there. No weights are read.

    Args:
      settings: the settings of the run.
      path: the file, JSON with the entries `rows` and `batches` of a run's `data.json`, and `max_length`.
      say: prints a line.

    Raises:
      ValueError, OSError: settings, data or files are wrong, or the file exists and is something else.
    """
    check_replaceable(path, "a data report", is_json_object("rows", "batches", "max_length"))
    model = weights.describe(settings, "float32")  # only for the tokenizer; the dtype does not matter
    objective, tokenizer = settings.objective(), open_tokenizer(settings, model)
    source = settings.tokens("train", settings.token_cache(tokenizer, say)).source
    objective.check_rows(source)
    rows = objective.tokenize(source, tokenizer, settings.rows.encode_options())
    max_length = settings.rows.max_length or longest_row(rows)
    sizes = BatchSizes(
        batch_size=settings.batches.batch_size,
        max_length=max_length,
        seed=settings.run.seed,
        process_index=0,
        process_count=1,
        options=settings.batches.options(),
    )
    with objective.batches(rows, sizes) as batches:
        report, outlook = batches.report, batches.outlook(settings.run.steps)
    for line in (*report.lines(), *outlook.lines()):
        say(f"data: {line}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"rows": report.plain(), "batches": dataclasses.asdict(outlook), "max_length": max_length})
    say(f"wrote {path}")
