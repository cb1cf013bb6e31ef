"""The report of a run: settings, data, results, cost and incidents, as `report.md` and `curves.png` in its folder."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

from dream_jax.files import write_file
from dream_jax.paths import check_replaceable
from dream_jax.reports.curves import draw_curves
from dream_jax.reports.record import LAST, Record, shown, table
from dream_jax.trainer.cost import run_cost
from dream_jax.trainer.setting_groups import PriceSettings

FILE = "report.md"
_LAST_SECTION = "What went wrong"
# Columns of runs on preferences (`posttraining.pair_metrics`).
_PAIRS = ("margin", "order_accuracy")
# Largest numbers in the report: rows in a table of steps, characters of a sample, incidents, answers to one prompt.
_POINTS = 12
_SHOWN_CHARACTERS = 600
_SHOWN_INCIDENTS = 40
_SHOWN_ANSWERS = 3


def write_report(record: Record) -> list[pathlib.Path]:
    """Writes `report.md` and `curves.png` into the folder of the run, and returns their paths.

    Raises:
      FileExistsError: one of these files exists and is not a report or a picture.
    """
    path, text = record.folder / FILE, render_report(record)
    check_replaceable(path, "a report of a run", lambda content: f"\n## {_LAST_SECTION}\n".encode() in content)
    drawn = draw_curves(record)
    write_file(path, text)
    return [path, drawn]


def render_report(record: Record) -> str:
    """Returns the report as Markdown; it refers to `curves.png` in the same folder."""
    settings, summary = record.settings, record.summary
    recipe = f", recipe `{settings['recipe']}`" if settings.get("recipe") else ""
    lines = [
        f"# {record.folder.name}",
        "",
        f"Model `{settings['model']}`, data `{settings['data']}`{recipe}: {settings['steps']} steps of "
        f"{settings['batch_size']} rows. {_state(record)}",
        "",
    ]
    sections = {
        "Settings": _settings(record),
        "Data": _data(record),
        "Losses": _losses(record),
        **({"Rewards": _rewards(record)} if record.steps and "reward" in record.steps[0] else {}),
        "Evaluation": _evaluation(record),
        "Samples": _samples(record),
        "Time and cost": _time(record),
        _LAST_SECTION: _incidents(record),
    }
    for title, content in sections.items():
        lines += [f"## {title}", "", *content, ""]
    if summary:
        lines += [f"jax {summary.get('jax')} on {summary.get('devices')}.", ""]
    return "\n".join(lines)


def _state(record: Record) -> str:
    if record.finished:
        return "Finished."
    return f"NOT finished: {int(record.steps[-1]['step']) if record.steps else 0} steps are done."


def _settings(record: Record) -> list[str]:
    changed = record.changed()
    rows = [(f"`{name}`", value) for name, value in changed.items()]
    others = [f"`{name}` {shown(value)}" for name, value in record.settings.items() if name not in changed]
    told = table(("setting", "value"), rows) if rows else ["All at their defaults."]
    return [*told, "", f"At their defaults: {', '.join(others)}."]


def _data(record: Record) -> list[str]:
    if not record.data:
        return ["Not known: the run ended before its first step."]
    rows, batches = record.data["rows"], record.data["batches"]
    facts = [
        ("rows kept", rows["kept"]),
        ("rows dropped", rows["dropped"]),
        *((f"dropped: {reason}", count) for reason, count in rows["reasons"].items()),
        *((f"left out by a filter: {reason}", count) for reason, count in rows["filtered"].items()),
        ("bad rows skipped", len(rows["bad"])),
        # Runs of earlier versions have no numbers of fields.
        *((f"field that is not read: {name}", count) for name, count in rows.get("unread", {}).items()),
        *((f"field that is left out on request: {name}", count) for name, count in rows.get("ignored", {}).items()),
        ("answers kept whole, with their end token", f"{rows['whole']} ({rows['whole'] / max(rows['kept'], 1):.1%})"),
        ("rows that were shortened", rows["cut"]),
        ("tokens: shortest, mean, longest", f"{rows['shortest']}, {rows['mean']:.1f}, {rows['longest']}"),
        ("tokens a row, at most", rows["max_length"]),
        ("epochs", f"{batches['epochs']:.2f}"),
        # Only rows of several texts have another number than 1; runs of earlier versions have none.
        *(
            (("texts in a row, on average", f"{batches['texts_per_row']:.2f}"),)
            if batches.get("texts_per_row", 1) != 1
            else ()
        ),
        ("end-of-text among the supervised tokens", f"{batches['eos_share']:.1%}"),
        ("padding among all positions", f"{batches['padding_share']:.1%}"),
        ("answers whole in their batch", f"{batches['whole_share']:.1%}"),
        ("rows by tokens", ", ".join(f"{name}: {count}" for name, count in rows["histogram"].items())),
        ("digest of the tokens", rows["digest"]),
    ]
    listed = [f"- {complaint}" for complaint in rows["bad"][:5]]
    return [*table(("what", "value"), facts), *(["", "Bad rows, the first:", "", *listed] if listed else [])]


def _losses(record: Record) -> list[str]:
    if not record.steps:
        return ["No step was taken."]
    wanted = ("loss", *_PAIRS, "nll", "masked_accuracy", "grad_norm", "learning_rate")
    names = [name for name in wanted if name in record.steps[0]]
    rows = [
        [int(record.steps[index]["step"]), *(record.steps[index][name] for name in names)]
        for index in _spread(len(record.steps))
    ]
    last = ", ".join(f"{name} {shown(record.last(name))}" for name in ("loss", "nll", "masked_accuracy"))
    return [
        "![curves](curves.png)",
        "",
        *table(("step", *names), rows),
        "",
        f"Mean of the last {min(LAST, len(record.steps))} steps: {last}.",
    ]


def _rewards(record: Record) -> list[str]:
    """Returns the section of a run that was trained on rewards: a table over the steps, and some sampled answers."""
    wanted = ("reward", "signal", "answer_tokens", "ended", "entropy", "clipped", "kl", "rollout_share")
    names = [name for name in wanted if name in record.steps[0]]
    rows = [
        [int(record.steps[index]["step"]), *(record.steps[index][name] for name in names)]
        for index in _spread(len(record.steps))
    ]
    last = ", ".join(f"{name} {shown(record.last(name))}" for name in names)
    lines = [*table(("step", *names), rows), "", f"Mean of the last {min(LAST, len(record.steps))} steps: {last}."]
    held_out = [one for one in record.evaluations if "reward" in one]
    if held_out:
        scores = [[int(one["step"]), one["reward"], one["reward_se"], one["answer_tokens"]] for one in held_out]
        scores = [scores[index] for index in _spread(len(scores))]
        lines += ["", "Answers to held-out prompts at temperature 0:", ""]
        lines += table(("step", "reward", "standard error", "answer tokens"), scores)
    if not record.rollouts:
        return [*lines, "", "No answers: rollouts.jsonl is missing or empty."]
    chosen = sorted({0, len(record.rollouts) // 2, len(record.rollouts) - 1})
    lines += ["", "Sampled answers with their rewards, one prompt each from the beginning, the middle and the end:"]
    for one in (record.rollouts[index] for index in chosen):
        lines += ["", f"**step {one.step}**", "", *_quoted(one.prompt)]
        for text, values in list(zip(one.answers, one.rewards, strict=True))[:_SHOWN_ANSWERS]:
            lines += ["", f"reward {', '.join(f'{value:g}' for value in values)}:", "", *_quoted(text)]
    return lines


def _spread(count: int) -> list[int]:
    """Returns at most `_POINTS` indices of `count` rows, evenly spaced, including the first and the last."""
    return sorted({round(point * (count - 1) / (_POINTS - 1)) for point in range(_POINTS)})


def _evaluation(record: Record) -> list[str]:
    lines = []
    if record.evaluations:
        wanted = ("nll", "nll_se", "masked_accuracy", "eos_accuracy", *(f"pair_{name}" for name in (*_PAIRS, "kl")))
        names = [name for name in wanted if name in record.evaluations[0]]
        # Only scores on the same rows can be compared; a run may have been resumed with other --eval-rows.
        alike = record.alike
        others = len(record.evaluations) - len(alike)
        kept = [alike[index] for index in _spread(len(alike))]
        rows = [[int(one["step"]), *(one[name] for name in names)] for one in kept]
        lines += ["During the run, on held-out rows at fixed noise levels with fixed masks:", ""]
        lines += [*table(("step", *names), rows), ""]
        if others:
            known = "on other rows" if all(record.grids) else "on rows that differ or are not recorded"
            lines += [f"{others} evaluations {known} are in eval.csv, but not listed here.", ""]
        best = record.best()
        if best is not None:
            lines += [f"The best: nll {shown(best['nll'])} after step {int(best['step'])}.", ""]
    found = record.summary.get("eval")
    if found:
        rows = [[name.replace("_", " "), value] for name, value in found.items()]
        return [*lines, "At the end:", "", *table(("what", "value"), rows)]
    reason = "has no held-out rows (`--eval-rows 0`)" if not record.settings.get("eval_rows") else "is not finished"
    return [*lines, f"At the end: none, because the run {reason}."]


def _samples(record: Record) -> list[str]:
    samples = record.samples
    if not samples:
        return [
            "None: the run has no held-out rows, samples were disabled (`--samples 0`), no prompt was short enough, or "
            "samples.json is missing."
        ]
    lines = [
        f"Held-out prompts, answered with {samples['tokens']} tokens at temperature {samples['temperature']}, seed "
        f"{samples['seed']}, before the first step and after the last.",
    ]
    nothing = [None] * len(samples["prompts"])
    answers = zip(
        samples["prompts"],
        samples["expected"],
        samples.get("before", nothing),
        samples.get("after", nothing),
        strict=True,
    )
    for prompt, expected, before, after in answers:
        told = {"prompt": prompt, "held-out answer": expected, "before": before, "after": after}
        for name, text in told.items():
            lines += ["", f"**{name}**", "", *_quoted(text)]
        lines += ["", "---"]
    return lines[:-2]


def _quoted(text: str | None) -> list[str]:
    """Returns a text as a Markdown code block, cut to `_SHOWN_CHARACTERS` characters."""
    if text is None:
        return ["not taken"]
    # The answers of an untrained model contain control characters, which can hide the text after them.
    text = "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in text)
    cut = text[:_SHOWN_CHARACTERS] + (f" ... ({len(text)} characters)" if len(text) > _SHOWN_CHARACTERS else "")
    fence = "`" * max(3, 1 + max((len(run) for run in _ticks(cut)), default=0))
    return [fence, cut, fence]


def _ticks(text: str) -> list[str]:
    """Returns all runs of backticks in a text, so that the fence of a code block can be longer than each."""
    return "".join(one if one == "`" else " " for one in text).split()


def _time(record: Record) -> list[str]:
    summary = record.summary
    facts: list[tuple[str, Any]] = []
    if record.segments:
        seconds, cut = (
            sum(segment.seconds for segment in record.segments),
            sum(not segment.ended for segment in record.segments[:-1]),
        )
        of = f" in {len(record.segments)} segments, {cut} of them killed" if len(record.segments) > 1 else ""
        if not record.finished and not record.segments[-1].ended:
            of += "; the last one is still running or was killed"
        facts.append(("seconds, everything included", f"{seconds:.0f}{of}"))
        facts.append(
            ("devices", ", then ".join(name for name, _ in itertools.groupby(one.devices for one in record.segments)))
        )
    elif summary:
        facts.append(("seconds, everything included", f"{summary['seconds']:.0f}"))
        facts.append(("devices", summary["devices"]))
    facts.append(("positions a second, median step", f"{record.tokens_per_second():,.0f}"))
    cost = summary.get("cost")
    if record.segments and not summary:
        priced = {field.name: record.settings.get(field.name) for field in dataclasses.fields(PriceSettings)}
        given = PriceSettings(**{name: value for name, value in priced.items() if value is not None})
        cost = dataclasses.asdict(run_cost(record.segments, given))
    facts += _money(cost)
    return table(("what", "value"), facts)


def _money(cost: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """Returns rows of the table with chip hours and cost; `cost` has the fields of `Cost`."""
    if not cost:
        return []
    found: list[tuple[str, Any]] = [("chip hours", f"{cost['chip_hours']:.3f} ({cost['chips']} chips)")]
    if None in (cost["usd"], cost["rmb"], cost["usd_per_chip_hour"]):
        return [*found, ("cost", "no price is known for this hardware; pass --price-per-chip-hour")]
    price = f"{cost['usd_per_chip_hour']:.2f} USD per chip and hour"
    return [*found, ("cost", f"{cost['rmb']:.2f} RMB, {cost['usd']:.2f} USD, at {price}")]


def _incidents(record: Record) -> list[str]:
    skipped = [int(row["step"]) for row in record.steps if row.get("skipped") == 1.0]
    told = (
        [f"Steps that were skipped, because their loss or gradient was not finite: {shown(skipped)}.", ""]
        if skipped
        else []
    )
    if not record.incidents:
        return told or ["Nothing: no warning, no skipped step, no interruption."]
    counts = collections.Counter(one["kind"] for one in record.incidents)
    lines = [*told, ", ".join(f"{kind}: {count}" for kind, count in counts.items()) + ".", ""]
    rows = [(one["time"], one["kind"], one["step"], one["text"]) for one in record.incidents[:_SHOWN_INCIDENTS]]
    lines += table(("time (UTC)", "kind", "step", "text"), rows)
    if len(record.incidents) > _SHOWN_INCIDENTS:
        lines += ["", f"And {len(record.incidents) - _SHOWN_INCIDENTS} more in incidents.jsonl."]
    return lines
