"""Turns rows of text into rows of tokens, cuts them by a length policy, and lays them out as a batch.

The order within a row is prompt, response, end token, padding. The objective draws later which tokens are masked.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from dream_jax.batch import Batch
from dream_jax.data.options import EncodeOptions, LengthPolicy
from dream_jax.data.rows import Piece, Row
from dream_jax.tokenizer import ChatToEncode, TextToEncode, Tokenizer, turn_text

# The reasons why a length policy drops a row.
TOO_LONG = "longer than max_length"
NO_ROOM = "prompt, answer and end token longer than max_length"
ALL_PROMPT = "prompt alone fills max_length"
_TURNS_CHANGE = 'the chat template changes earlier turns when a turn is added; use learned_turns="last" with it'


Kind = Literal["prompt", "learned", "text", "trace", "mark", "opening", "end"]


class TokenPiece(NamedTuple):
    """Describes consecutive tokens of a row that have one kind.

    kind: "prompt" is given and never masked; "learned" is an earlier assistant turn that is learned; "end" is the end
    token; for the other kinds see `Piece`.
    length: number of tokens, 0 or more.
    """

    kind: Kind
    length: int


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """The tokens of one row, without padding.

    tokens: int32 [n], token ids of the prompt, the response and the end token.
    pieces: the kinds of the tokens, in the order of the tokens; the lengths sum to n. The last piece is always the end
    token; its length is 1, or 0 if the end token was cut off.
    """

    tokens: np.ndarray
    pieces: tuple[TokenPiece, ...]

    @property
    def length(self) -> int:
        """Number of tokens of the row, including the end token."""
        return len(self.tokens)

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the response, including those of earlier turns."""
        return sum(piece.length for piece in self.pieces if piece.kind in ("prompt", "learned"))

    @property
    def text_length(self) -> int:
        """Number of tokens of the response without its end token."""
        return self.length - self.prompt_length - self.whole

    @property
    def whole(self) -> bool:
        """Whether the row has its end token, and therefore its complete answer."""
        return self.pieces[-1].length > 0

    @property
    def maskable(self) -> np.ndarray:
        """Bool [n]: true for tokens that may be masked and are learned, false for tokens that are given."""
        return np.repeat([piece.kind != "prompt" for piece in self.pieces], [piece.length for piece in self.pieces])

    @property
    def is_document(self) -> bool:
        """Whether the row is a document: nothing is given but its first token, `<|beginoftext|>`."""
        return self.prompt_length == 1

    def part(self, start: int, size: int) -> "TokenRow":
        """Returns the tokens from the index `start` on, at most `size` of them, of which the first one is given."""
        stop = min(start + size, self.length)
        pieces, position = list[TokenPiece](), 0
        for kind, length in self.pieces:
            begin, end = max(position, start), min(position + length, stop)
            position += length
            if start and begin == start < end:  # the first token of a part within the document
                pieces.append(TokenPiece("prompt", 1))
                begin += 1
            pieces.append(TokenPiece(kind, max(end - begin, 0)))
        return TokenRow(tokens=self.tokens[start:stop], pieces=tuple(pieces))

    def fit(self, max_length: int, policy: LengthPolicy) -> "TokenRow | str":
        """Returns the row, cut by the policy to at most `max_length` tokens, or the reason why the policy drops it.

        With the policy "split" this is the first part of a document.
        """
        surplus = self.length - max_length
        if surplus <= 0:
            return self
        if policy == "answer_only":
            return NO_ROOM
        if policy == "split":
            return self.part(0, max_length) if self.is_document else TOO_LONG
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
    """Returns all tokens of a row. Only the policy "answer_only" leaves tokens out here, those of the trace.

    The prompt and each piece of the response are tokenised separately, so no token contains text of two pieces. Text in
    the prompt or the answer that looks like a special token is encoded as plain text.
    Raises: ValueError if the prompt has no token. Each token is predicted from the position on its left, so position 0
    cannot be predicted and must belong to the prompt.
    """
    requests = _requests(row, options)
    ids = (tokenizer.chat(*one) if isinstance(one, ChatToEncode) else tokenizer.encode(*one) for one in requests)
    return _row_of(row, tokenizer, options, ids)


def token_rows(rows: Sequence[Row], tokenizer: Tokenizer, options: EncodeOptions = EncodeOptions()) -> list[TokenRow]:
    """Returns the tokens of several rows, the same as `token_row` returns, in less time. Raises like `token_row`."""
    requests = [_requests(row, options) for row in rows]
    try:
        found = iter(tokenizer.encode_all([one for of_row in requests for one in of_row]))
    except ValueError:
        return [token_row(row, tokenizer, options) for row in rows]  # raises the error of the first such row
    ids = [list(itertools.islice(found, len(of_row))) for of_row in requests]
    return [_row_of(row, tokenizer, options, iter(of_row)) for row, of_row in zip(rows, ids, strict=True)]


def _requests(row: Row, options: EncodeOptions) -> list[ChatToEncode | TextToEncode]:
    """Returns what must be encoded for a row, in the order in which `_row_of` needs it."""
    found: list[ChatToEncode | TextToEncode] = []
    prompt = "" if row.document else row.prompt
    if isinstance(prompt, str):
        found += [] if row.document else [TextToEncode(prompt)]
    else:
        found.append(ChatToEncode(prompt, True, row.tools))
        for index in _learned_turns(row, options):
            found += [
                ChatToEncode(prompt[:index], True, row.tools),
                ChatToEncode(prompt[: index + 1], False, row.tools),
                TextToEncode(turn_text(prompt[index])),
            ]
    return found + [TextToEncode(text, kind in ("mark", "opening")) for kind, text in _response(row, options)]


def _response(row: Row, options: EncodeOptions) -> tuple[Piece, ...]:
    """Returns the pieces of the response that are tokenised."""
    pieces = row.pieces or (Piece("text", row.response),)
    if options.length_policy != "answer_only":
        return pieces
    return tuple(piece for piece in pieces if piece.kind not in ("trace", "opening"))


def _row_of(row: Row, tokenizer: Tokenizer, options: EncodeOptions, ids: Iterator[list[int]]) -> TokenRow:
    """Returns the tokens of a row, given the ids of its `_requests`. Raises like `token_row`."""
    pieces = _prompt_pieces(row, tokenizer, options, ids)
    if not any(tokens for _, tokens in pieces):
        raise ValueError(
            f"a row has an empty prompt (response {row.response!r:.60}, {dict(row.meta)}): give it at least one token"
        )
    pieces += [(kind, next(ids)) for kind, _ in _response(row, options)]
    pieces.append(("end", [tokenizer.eos_id]))
    return TokenRow(
        tokens=np.array(list(itertools.chain.from_iterable(tokens for _, tokens in pieces)), dtype=np.int32),
        pieces=tuple(TokenPiece(kind, len(tokens)) for kind, tokens in pieces),
    )


def encode_row(
    row: Row, tokenizer: Tokenizer, max_length: int, options: EncodeOptions = EncodeOptions()
) -> TokenRow | None:
    """Returns at most `max_length` tokens of a row, or None if the length policy drops it. Raises like `token_row`."""
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
    """Returns the rows as a batch of `width` tokens each.

    The response of row i takes the last `regions[i]` positions of its row. A longer response is cut; a shorter one is
    padded with `pad_id`. The padding is attended to, maskable and learned, because it teaches the model to stop.
    Positions that neither prompt nor response needs are on the left of the prompt and are not valid; on the right of
    the response the loss weights would count them as context.

    row_B: int32 [B], indices of the rows in the global batch; by default 0, 1, 2, ...
    hides: whether the batch says which positions are valid. If false, `valid_BT` is None, and rows must fill the width.
    """
    shape = (len(rows), width)
    tokens_BT = np.full(shape, pad_id, dtype=np.int32)
    maskable_BT, valid_BT = np.ones(shape, dtype=np.bool_), np.ones(shape, dtype=np.bool_)
    for index, (row, region) in enumerate(zip(rows, regions, strict=True)):
        prompt_length = row.prompt_length
        start, count = width - region - prompt_length, min(row.length, prompt_length + region)
        tokens_BT[index, start : start + count] = row.tokens[:count]
        maskable_BT[index, :start] = valid_BT[index, :start] = False
        maskable_BT[index, start : start + count] = row.maskable[:count]
    return Batch(
        tokens_BT=tokens_BT,
        maskable_BT=maskable_BT,
        row_B=np.arange(len(rows), dtype=np.int32) if row_B is None else row_B,
        valid_BT=valid_BT if hides else None,
    )


def lay_out_packed(
    rows: Sequence[Sequence[TokenRow]],
    regions: Sequence[np.ndarray],
    width: int,
    pad_id: int,
    *,
    most: int,
    first_B: np.ndarray,
    row_B: np.ndarray,
) -> Batch[np.ndarray]:
    """Returns a batch whose rows hold several texts each, one after the other from the start of the row.

    rows: for each row the texts that it holds. regions: for each row int64 [texts], the number of positions of each
    response; as in `lay_out`, a longer response is cut, and a shorter one is padded with `pad_id`, which is maskable.
    The positions after the last text are not maskable and belong to no text. most: M, the number of entries for texts
    that each row gets in `length_BM` and `text_BM`, at least the number of its texts. first_B: int [B], the index of the
    first text of each row in the global batch; the others follow it. row_B: as in `lay_out`.
    """
    shape = (len(rows), width)
    tokens_BT, maskable_BT = np.full(shape, pad_id, dtype=np.int32), np.zeros(shape, dtype=np.bool_)
    length_BM, text_BM = np.zeros((len(rows), most), np.int32), np.full((len(rows), most), -1, np.int32)
    for index, (texts, sizes) in enumerate(zip(rows, regions, strict=True)):
        start = 0
        for number, (text, region) in enumerate(zip(texts, sizes.tolist(), strict=True)):
            length = text.prompt_length + region
            count = min(text.length, length)
            tokens_BT[index, start : start + count] = text.tokens[:count]
            maskable_BT[index, start : start + length] = True
            maskable_BT[index, start : start + count] = text.maskable[:count]
            length_BM[index, number], text_BM[index, number] = length, first_B[index] + number
            start += length
    return Batch(tokens_BT=tokens_BT, maskable_BT=maskable_BT, row_B=row_B, length_BM=length_BM, text_BM=text_BM)


def _learned_turns(row: Row, options: EncodeOptions) -> Iterator[int]:
    """Yields the indices in the prompt, a chat, of the turns that are learned."""
    for index, turn in enumerate(row.prompt if options.learned_turns == "all" else ()):
        if isinstance(turn, Mapping) and turn["role"] == "assistant" and index > 0 and index not in row.given_turns:
            yield index


def _prompt_pieces(
    row: Row, tokenizer: Tokenizer, options: EncodeOptions, ids: Iterator[list[int]]
) -> list[tuple[Kind, list[int]]]:
    """Returns the kind and the token ids of each piece before the response."""
    if row.document:
        return [("prompt", [tokenizer.bos_id])]
    if isinstance(row.prompt, str):
        return [("prompt", next(ids))]
    try:
        whole = next(ids)
        pieces, done = list[tuple[Kind, list[int]]](), list[int]()
        for _ in _learned_turns(row, options):
            head, closed = next(ids), next(ids)
            if head[: len(done)] != done or closed[: len(done)] != done:
                raise ValueError(_TURNS_CHANGE)
            pieces.append(("prompt", head[len(done) :]))
            # The turn is tokenised separately, like the last response, so that no token is partly given and partly
            # learned. The tokens that close the turn are given, because the model ends its answers with end-of-text.
            pieces.append(("learned", next(ids)))
            last = len(closed) - 1 - closed[::-1].index(tokenizer.im_end_id)
            pieces.append(("prompt", closed[last:]))
            done = closed
        if whole[: len(done)] != done:
            raise ValueError(_TURNS_CHANGE)
        return [*pieces, ("prompt", whole[len(done) :])]
    except ValueError as error:
        raise ValueError(f"{row.meta.get('where', 'a row')}: {error}") from error
