"""Divides documents among the rows of packed batches, so that no token of a long document is lost.

A document that does not fit into a row goes on in further rows. Each part of a document is a text of its own: it attends
only to itself, and its positions count from its first token. The first token of a part is given and not learned, because
it is predicted from the position on its left, which lies in another row; at the start of a document this token is
`<|beginoftext|>`. So every part has at least two tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

SHORTEST_ROW = 4
"""The smallest number of tokens of a row among which documents are divided: two parts of two tokens."""
WINDOW_TOKENS = 2**24
"""The number of tokens of a window, on average, at which windows have fewer documents."""


class Part(NamedTuple):
    """Consecutive tokens of a document: `size` of them from the token with the index `start` on.

    document: the index of the document in the list that was divided.
    """

    document: int
    start: int
    size: int


def split(sizes: Sequence[int], width: int) -> list[Part]:
    """Returns parts of at most `width` tokens of documents with these numbers of tokens; all but the last fill a row.

    A last part of one token would have nothing to learn, so the part before it leaves it one more.
    """
    parts = list[Part]()
    for document, size in enumerate(sizes):
        start = 0
        while size - start > width:
            take = width - (size - start - width == 1)
            parts.append(Part(document, start, take))
            start += take
        parts.append(Part(document, start, size - start))
    return parts


def cut(sizes: Sequence[int], width: int, most: int) -> list[list[Part]]:
    """Returns the parts of each row if the documents are put one after the other, and cut where a row ends.

    No row has more than `width` tokens, or more than `most` parts. A row keeps one or two positions free where a part of
    one token would be left over otherwise.
    """
    rows, row, space = list[list[Part]](), list[Part](), width
    for document, size in enumerate(sizes):
        start = 0
        while start < size:
            rest = size - start
            take = min(space, rest)
            take -= rest - take == 1
            if take < 2 or len(row) == most:
                rows.append(row)
                row, space = [], width
                continue
            row.append(Part(document, start, take))
            start, space = start + take, space - take
    return [*rows, row]
