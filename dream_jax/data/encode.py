"""Rows of text become rows of tokens, are cut by a length policy, and are laid out as a batch.

The order within a row is prompt, response, end token, padding. Which tokens are masked is drawn later, by the objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from dream_jax.batch import Batch
from dream_jax.data.options import EncodeOptions, LengthPolicy
from dream_jax.data.rows import Piece, Row
from dream_jax.tokenizer import Tokenizer, turn_text

TOO_LONG = "longer than max_length"
NO_ROOM = "prompt, answer and end token longer than max_length"
ALL_PROMPT = "prompt alone fills max_length"


Kind = Literal["prompt", "learned", "text", "trace", "mark", "opening", "end"]


class TokenPiece(NamedTuple):
    """Consecutive tokens of one kind, and their number.

    kind: "prompt" is given and never masked; "learned" is an earlier assistant turn that is learned; "end" is the end
    token; the others are those of `Piece`.
    """

    kind: Kind
    length: int


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A row as tokens, without padding.

    tokens: int32 [n], the prompt, the response and the end token.
    pieces: what the tokens are, in their order. The last is always the end; its length is 0 where it was cut off.
    """

    tokens: np.ndarray
    pieces: tuple[TokenPiece, ...]

    @property
    def length(self) -> int:
        """Number of tokens, end token included."""
        return len(self.tokens)

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the response, those of earlier turns included."""
        return sum(piece.length for piece in self.pieces if piece.kind in ("prompt", "learned"))

    @property
    def text_length(self) -> int:
        """Number of tokens of the response without its end token."""
        return self.length - self.prompt_length - self.whole

    @property
    def whole(self) -> bool:
        """Whether the end token, and so all of the answer, is there."""
        return self.pieces[-1].length > 0

    @property
    def learned(self) -> np.ndarray:
        """Which tokens may be masked and are learned: bool [n], false on what is given."""
        return np.repeat([piece.kind != "prompt" for piece in self.pieces], [piece.length for piece in self.pieces])

    def fit(self, max_length: int, policy: LengthPolicy) -> "TokenRow | str":
        """The row cut to at most `max_length` tokens as the policy says, or the reason why the policy drops it."""
        surplus = self.length - max_length
        if surplus <= 0:
            return self
        if policy == "answer_only":
            return NO_ROOM
        if policy == "right" and self.prompt_length >= max_length:
            return ALL_PROMPT
        cuttable = {piece.kind for piece in self.pieces if policy == "right" or piece.kind == "trace"}
        if policy == "filter" or not cuttable:
            return TOO_LONG
        kept = list(self.pieces)
        for index in reversed(range(len(kept))):
            kind, count = kept[index]
            removed = min(count, surplus) if kind in cuttable else 0
            kept[index], surplus = TokenPiece(kind, count - removed), surplus - removed
        if surplus:
            return NO_ROOM
        ends = np.cumsum([piece.length for piece in self.pieces])
        starts = ends - [piece.length for piece in self.pieces]
        tokens = [self.tokens[start : start + piece.length] for start, piece in zip(starts, kept, strict=True)]
        return TokenRow(tokens=np.concatenate(tokens), pieces=tuple(kept))


def token_row(row: Row, tokenizer: Tokenizer, options: EncodeOptions = EncodeOptions()) -> TokenRow:
    """All tokens of a row, without those that the policy "answer_only" leaves out.

    The prompt and each piece of the response are tokenised apart, so that no token straddles them; text in either never
    becomes a special token.
    Raises: ValueError for a prompt without a token: position 0 has no left neighbour to be predicted from, so it must
    be of the prompt.
    """
    pieces = _prompt_pieces(row, tokenizer, options)
    if not any(ids for _, ids in pieces):
        raise ValueError(
            f"a row with an empty prompt (response {row.response!r:.60}, {dict(row.meta)}): give it at least one token"
        )
    for kind, text in row.pieces or (Piece("text", row.response),):
        if options.length_policy == "answer_only" and kind in ("trace", "opening"):
            continue
        pieces.append((kind, tokenizer.encode(text, kind in ("mark", "opening"))))
    pieces.append(("end", [tokenizer.eos_id]))
    return TokenRow(
        tokens=np.array([token for _, ids in pieces for token in ids], dtype=np.int32),
        pieces=tuple(TokenPiece(kind, len(ids)) for kind, ids in pieces),
    )


def encode_row(
    row: Row, tokenizer: Tokenizer, max_length: int, options: EncodeOptions = EncodeOptions()
) -> TokenRow | None:
    """At most `max_length` tokens of a row, or None if the length policy drops it. Raises as `token_row` does."""
    found = token_row(row, tokenizer, options).fit(max_length, options.length_policy)
    return None if isinstance(found, str) else found


def lay_out(
    rows: Sequence[TokenRow],
    regions: Sequence[int] | np.ndarray,
    width: int,
    pad_id: int,
    *,
    row_B: np.ndarray | None = None,
    hides: bool = True,
) -> Batch[np.ndarray]:
    """The rows as a batch of `width` tokens each.

    The response of row i takes `regions[i]` positions at the end of its row: a longer one is cut, a shorter one is padded,
    and padding is attended to, maskable and learned: that is how the model learns to stop. What the width leaves over
    lies before the prompt and is not valid: behind the row, the weights of the loss would count it as context.

    row_B: numbers of the rows within the global batch; by default 0, 1, 2, ...
    hides: whether the batch says which positions are valid. Without it `valid_BT` is None, and rows must fill the width.
    """
    shape = (len(rows), width)
    tokens_BT = np.full(shape, pad_id, dtype=np.int32)
    maskable_BT, valid_BT = np.ones(shape, dtype=np.bool_), np.ones(shape, dtype=np.bool_)
    for index, (row, region) in enumerate(zip(rows, regions, strict=True)):
        prompt_length = row.prompt_length
        start, count = width - region - prompt_length, min(row.length, prompt_length + region)
        tokens_BT[index, start : start + count] = row.tokens[:count]
        maskable_BT[index, :start] = valid_BT[index, :start] = False
        maskable_BT[index, start : start + count] = row.learned[:count]
    return Batch(
        tokens_BT=tokens_BT,
        maskable_BT=maskable_BT,
        row_B=np.arange(len(rows), dtype=np.int32) if row_B is None else row_B,
        valid_BT=valid_BT if hides else None,
    )


def _prompt_pieces(row: Row, tokenizer: Tokenizer, options: EncodeOptions) -> list[tuple[Kind, list[int]]]:
    """Kinds and token ids of what comes before the response."""
    if row.document:
        return [("prompt", [tokenizer.bos_id])]
    if isinstance(row.prompt, str):
        return [("prompt", tokenizer.encode(row.prompt))]
    try:
        whole = tokenizer.chat(row.prompt, tools=row.tools)
        if options.learned_turns == "last":
            return [("prompt", whole)]
        pieces, done = list[tuple[Kind, list[int]]](), list[int]()
        for index, turn in enumerate(row.prompt):
            if turn["role"] != "assistant" or index == 0:
                continue
            head = tokenizer.chat(row.prompt[:index], tools=row.tools)
            closed = tokenizer.chat(row.prompt[: index + 1], add_generation_prompt=False, tools=row.tools)
            if head[: len(done)] != done or closed[: len(done)] != done:
                raise ValueError("the chat template rewrites earlier turns: learn the last turn only")
            pieces.append(("prompt", head[len(done) :]))
            # The turn is tokenised apart, like the last response, so that no token straddles what is given and what is
            # learned. The tokens that close the turn are given: the model ends its own answers with end-of-text.
            pieces.append(("learned", tokenizer.encode(turn_text(turn))))
            last = len(closed) - 1 - closed[::-1].index(tokenizer.im_end_id)
            pieces.append(("prompt", closed[last:]))
            done = closed
        if whole[: len(done)] != done:
            raise ValueError("the chat template rewrites earlier turns: learn the last turn only")
        return [*pieces, ("prompt", whole[len(done) :])]
    except ValueError as error:
        raise ValueError(f"{row.meta.get('where', 'a row')}: {error}") from error
