"""s1K rows: hard questions, each with a reasoning trace and an answer, in the two schemas that are about.

s1K has `question`, `thinking_trajectories` (a list) and `attempt`; s1K-1.1 has `question`,
`deepseek_thinking_trajectory`, `deepseek_attempt` and `deepseek_grade`. Other fields are carried along or ignored. Knows
no tokens: a trace is only told from an answer.
"""

from collections.abc import Mapping
from typing import Any

from dream_jax.data.jsonl import text_field
from dream_jax.data.options import AnswerFormat, ReadOptions
from dream_jax.data.rows import Piece, Row

FIELDS = {"question", "thinking_trajectories", "attempt"}
FIELDS_1_1 = {"question", "deepseek_thinking_trajectory", "deepseek_attempt"}


def parse_s1k(found: Mapping[str, Any], where: str, options: ReadOptions = ReadOptions()) -> Row:
    """One row: the question is a user turn, trace and answer the response.

    Raises: ValueError, opening with `where`, for a field missing or bad.
    """
    if "deepseek_attempt" in found:
        trace = text_field(found, "deepseek_thinking_trajectory", where)
        answer = text_field(found, "deepseek_attempt", where)
    else:
        trace, answer = _joined_traces(found, where), text_field(found, "attempt", where)
    question = {"role": "user", "content": text_field(found, "question", where)}
    pieces = reasoning(trace, answer, options.answer_format)
    carried = {name: found[name] for name in ("solution", "source_type", "deepseek_grade") if name in found}
    return Row(
        prompt=(question,),
        response="".join(piece.text for piece in pieces),
        pieces=pieces,
        meta={"where": where, **carried},
    )


def reasoning(trace: str, answer: str, answer_format: AnswerFormat) -> tuple[Piece, ...]:
    """A trace and an answer as one response; space around either is dropped.

    s1: `<|im_start|>think\\n`, trace, `\\n<|im_start|>answer\\n`, answer, where `<|im_start|>` is the special token.
    d1: `<reasoning>`, trace, `</reasoning>\\n<answer>`, answer, `</answer>`.
    """
    trace, answer = trace.strip(), answer.strip()
    if answer_format == "s1":
        return (
            Piece("opening", "<|im_start|>think\n"),
            Piece("trace", trace),
            Piece("opening", "\n"),
            Piece("mark", "<|im_start|>answer\n"),
            Piece("text", answer),
        )
    return (
        Piece("opening", "<reasoning>"),
        Piece("trace", trace),
        Piece("opening", "</reasoning>\n"),
        Piece("mark", "<answer>"),
        Piece("text", answer),
        Piece("mark", "</answer>"),
    )


def filtered(found: Mapping[str, Any], where: str, options: ReadOptions) -> str | None:
    """Why the options leave this row out, or None.

    Raises: ValueError, opening with `where`, for a row without the grade that they ask for.
    """
    if not options.only_correct:
        return None
    if "deepseek_grade" not in found:
        raise ValueError(
            f"{where}: no field 'deepseek_grade', which s1K-1.1 has; it has {sorted(found)}. "
            "Take s1K-1.1, or do not ask for correct answers only"
        )
    grade = text_field(found, "deepseek_grade", where).strip()
    return None if grade.casefold() == "yes" else f"deepseek_grade is {grade!r}"


def _joined_traces(found: Mapping[str, Any], where: str) -> str:
    name = "thinking_trajectories"
    if name not in found:
        raise ValueError(f"{where}: no field {name!r}; it has {sorted(found)}")
    traces = found[name]
    if not isinstance(traces, list) or not traces:
        raise ValueError(f"{where}: {name!r} must be a list with at least one text, not {traces!r:.60}")
    parts = {f"{name}[{index}]": trace for index, trace in enumerate(traces)}
    return "\n".join(text_field(parts, part, where) for part in parts)
