"""Two formats of a training row with a question, a reasoning trace and an answer: those of the projects s1 and d1.

s1 (Muennighoff et al. 2025) made the data set s1K; d1 (Zhao et al. 2025) trains diffusion models on it. The formats
follow the published code: s1's `data/tokenization.py`, and `preprocess_dataset` in d1's `SFT/sft_trainer.py`. The chat
template is that of the model that is trained. So the default system turn is that of Dream, not that of Qwen2.5 (the model
of s1), and a response ends with the end-of-text token as in Dream's own training.
"""

from collections.abc import Sequence

from dream_jax.data.options import AnswerFormat
from dream_jax.data.rows import Piece
from dream_jax.tokenizer import Message

# The instruction of d1, character for character: with the line breaks at both ends.
_D1_INSTRUCTION = """
Respond in the following format:
<reasoning>
Your reasoning here
</reasoning>
<answer>
...
</answer>
"""


def instruction_of(answer_format: AnswerFormat) -> str:
    """Returns the text that a format puts before a question, with an empty line between them; "" for none."""
    return _D1_INSTRUCTION if answer_format == "d1" else ""


def with_instruction(prompt: Sequence[Message], instruction: str) -> tuple[Message, ...]:
    """Returns the messages of a chat with an instruction and an empty line before the text of the first user turn."""
    turns = list(prompt)
    first = next((index for index, turn in enumerate(turns) if turn["role"] == "user"), None)
    if instruction and first is not None:
        turns[first] = {**turns[first], "content": f"{instruction}\n\n{turns[first]['content']}"}
    return tuple(turns)


def reasoning(traces: Sequence[str], answer: str, answer_format: AnswerFormat) -> tuple[Piece, ...]:
    """Returns the pieces of a response that consists of reasoning and an answer.

    s1: `<|im_start|>think\\n`, the traces joined by line breaks, `\\n<|im_start|>answer\\n`, the answer, where
    `<|im_start|>` is the special token. `Answer: ` comes before an answer that does not contain "Answer:". Whitespace at
    both ends of the traces and of the answer is removed.
    d1: `<reasoning>`, the first trace, `</reasoning>\\n<answer>`, the answer, `</answer>`; no whitespace is removed.

    "s1-0.1" and "d1-0.1" are the formats that version 0.1 of this project called "s1" and "d1": without "Answer: ", with
    all traces, and without whitespace at the ends. A run that began with them is resumed with them.
    """
    if answer_format == "s1" and "Answer:" not in answer:
        answer = f"Answer: {answer}"
    trace = traces[0] if answer_format == "d1" else "\n".join(traces).strip()
    if answer_format != "d1":
        answer = answer.strip()
    if answer_format in ("s1", "s1-0.1"):
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
