"""The model card (README.md) of an exported checkpoint: facts from the files of the run, and what was not checked."""

from __future__ import annotations

import json
import pathlib

from dream_jax.reports.record import Record, read_record, table

# The settings in the card. Others do not change the trained weights, or are described in the text.
_SETTINGS = (
    "recipe",
    "steps",
    "batch_size",
    "max_length",
    "length_policy",
    "learned_turns",
    "answer_format",
    "learning_rate",
    "warmup_share",
    "weight_decay",
    "optimizer",
    "moments",
    "b1",
    "b2",
    "clip_norm",
    "weight",
    "cart_p",
    "focal",
    "block_diffusion",
    "complementary",
    "mask",
    "anneal_steps",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_targets",
    "base",
    "seed",
)


def find_run(*directories: pathlib.Path | None) -> pathlib.Path | None:
    """Returns the folder of the run whose `model` or `adapter` one of these directories is; None if there is none."""
    for path in directories:
        if path is not None and (path.parent / "settings.json").is_file() and path.name in ("model", "adapter"):
            return path.parent
    return None


def model_card(run: pathlib.Path | None, *, name: str, dtype: str, adapter: bool) -> str:
    """Returns the model card as Markdown.

    Args:
      run: folder of the run that made the weights; None if it is not known.
      name: name of the model, for the title.
      dtype: name of the dtype of the exported weights.
      adapter: whether the weights are a base with an adapter added to it.

    Raises:
      FileNotFoundError, ValueError: as `read_record`.
    """
    record = None if run is None else read_record(run)
    begun = None if record is None else str(record.settings["model"])
    base = [] if begun is None or not _on_hub(begun, record) else [f"base_model: {json.dumps(begun)}"]
    front = ["---", "library_name: transformers", "tags:", "- diffusion-language-model", "- dream", *base, "---"]
    made = "a base with a low-rank adapter added to it" if adapter else "weights"
    lines = [
        *front,
        "",
        f"# {name}",
        "",
        f"A masked-diffusion language model of the Dream architecture: {made}, exported by dream_jax in the published "
        f"layout, stored in {dtype}. The published PyTorch code loads it, and `diffusion_generate` samples from it. "
        "Code for causal Qwen2 models can load it too, but gives wrong results.",
        "",
    ]
    sections = {"Data": _data(record), "Settings": _settings(record), "Evaluation": _evaluation(record)}
    for title, content in sections.items():
        lines += [f"## {title}", "", *content, ""]
    return "\n".join([*lines, "## What was not checked", "", *(f"- {line}" for line in _unchecked(record, dtype)), ""])


def _on_hub(name: str, record: Record | None) -> bool:
    """Returns whether the run read this model or data set from the hub; only then the card shows its full name."""
    return record is not None and record.data.get("sources", {}).get(name) == "hub"


def _named(name: str, record: Record) -> str:
    """Returns the name in backticks; of a local path only the last part, because the rest means nothing elsewhere."""
    return f"`{name}`" if _on_hub(name, record) else f"`{pathlib.Path(name).name}`"


_SOURCES = {
    "hub": " of the Hugging Face hub",
    "local": ", a directory of the machine that the run was made on: its contents are not recorded here",
    "built in": ", a preset of dream_jax: random weights",
}

_UNKNOWN = ["Not known: the export was made without the folder of a run (`--run DIR`)."]


def _data(record: Record | None) -> list[str]:
    if record is None:
        return _UNKNOWN
    names = ", ".join(_named(str(name), record) for name in (record.settings["data"], *record.settings.get("mix", ())))
    if not record.data:
        return [f"{names}; the run has no data.json."]
    rows, batches = record.data["rows"], record.data["batches"]
    return [
        f"{names}: {rows['kept']} rows were trained on and {rows['dropped']} dropped, {batches['epochs']:.2f} epochs. "
        f"{rows['whole']} of the answers were whole, with their end token; {rows['cut']} rows were shortened. "
        f"End-of-text was {batches['eos_share']:.1%} of the supervised tokens. Digest of the tokens: `{rows['digest']}`.",
    ]


def _settings(record: Record | None) -> list[str]:
    if record is None:
        return _UNKNOWN
    # Values that the run chose itself, for settings without a given value.
    taken = {"learning_rate": record.summary.get("learning_rate")}
    taken["max_length"] = record.data["rows"]["max_length"] if record.data else None
    values = {name: record.settings.get(name) for name in _SETTINGS}
    values = {name: taken.get(name) if value is None else value for name, value in values.items()}
    known = [(f"`{name}`", value) for name, value in values.items() if value is not None]
    step = f" These are the weights after step {record.summary.get('step')}."
    state = step if record.finished else " The run was not finished."
    begun = str(record.settings["model"])
    where = _SOURCES.get(record.data.get("sources", {}).get(begun), ", whose source is not recorded")
    return [f"Trained from {_named(begun, record)}{where}.{state}", "", *table(("setting", "value"), known)]


def _evaluation(record: Record | None) -> list[str]:
    if record is None:
        return _UNKNOWN
    found = record.summary.get("eval")
    if not found:
        return ["None was made."]
    rows = [(name.replace("_", " "), value) for name, value in found.items()]
    return [
        "On held-out rows of the same data (answers sampled at temperature 0; nll in nats per masked token):",
        "",
        *table(("what", "value"), rows),
    ]


def _unchecked(record: Record | None, dtype: str) -> list[str]:
    lines = [
        "The exported weights: the export runs no benchmark; the numbers above were measured before it.",
        "Whether any evaluation data, here or elsewhere, was in the training data of this model or of its base.",
        "Safety, bias, truthfulness, languages and domains other than those of the data.",
        "The licenses of the base and of the data, which also apply to this model.",
    ]
    if record is None:
        return ["How these weights were trained, on which data, and how good they are.", *lines]
    if dtype != "float32":
        lines.append(f"The effect of rounding the trained weights to {dtype}.")
    evaluated = record.summary.get("eval") or {}
    lines.append("The variation between seeds: this is one run with one seed.")
    if not evaluated.get("rows"):
        lines.append("Answers: no held-out row was answered by sampling.")
    elif evaluated["rows"] < 200:
        lines.append(
            f"Only {evaluated['rows']} held-out rows were answered: the accuracy is uncertain by several points."
        )
    return [*lines, "The base on the same rows: it was not evaluated, so no gain over it is claimed."]
