"""Digests of batches of every layout option: `python tests/batch_digests.py` writes them to tests/batch_digests.json.

The digests were recorded before rows were read from a token store. Batches must stay the same, bit for bit, because a
run that is resumed by a later version continues with them. Record a digest anew only for a setting that is new.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dream_jax.batch import Batch
from dream_jax.data import (
    BatchOptions,
    EncodeOptions,
    ReadOptions,
    TokenCache,
    TokenizedRows,
    find_cache,
    make_batches,
)
from dream_jax.tokenizer import load_tokenizer

RECORDED = Path(__file__).with_suffix(".json")
WHOLE, SHORT = 500, 24
"""The numbers of batches over which each setting has a digest."""
BATCH_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the batches of one digest are made of; `data` are names of files of `write_data`, or sudoku."""

    data: tuple[str, ...]
    weights: tuple[float, ...] = ()
    max_length: int
    read: ReadOptions = ReadOptions()
    encode: EncodeOptions = EncodeOptions()
    layout: BatchOptions = BatchOptions()
    tokenizer: str = "bytes"
    seed: int = 0


SETTINGS = {
    "one width": Setting(data=("chats.jsonl",), max_length=160),
    "width buckets": Setting(
        data=("chats.jsonl",), max_length=192, layout=BatchOptions(width_step=32, eos_tail=8), seed=3
    ),
    "packed": Setting(data=("chats.jsonl",), max_length=256, layout=BatchOptions(pack=True, eos_tail=4)),
    "packed mixture in buckets": Setting(
        data=("chats.jsonl", "documents.jsonl"),
        weights=(1.0, 3.0),
        max_length=256,
        layout=BatchOptions(pack=True, eos_tail=2, width_step=64),
        seed=5,
    ),
    "mixture": Setting(data=("chats.jsonl", "traces.jsonl", "sudoku"), weights=(2.0, 1.0, 0.5), max_length=200),
    "random cuts": Setting(
        data=("chats.jsonl",), max_length=192, layout=BatchOptions(cut_responses=True, tail_cut=0.3, width_step=16)
    ),
    "right, all turns": Setting(
        data=("chats.jsonl",),
        max_length=96,
        encode=EncodeOptions(length_policy="right", learned_turns="all"),
        layout=BatchOptions(eos_tail=16),
        tokenizer="tiny",
    ),
    "middle": Setting(
        data=("traces.jsonl",),
        max_length=110,
        encode=EncodeOptions(length_policy="middle"),
        read=ReadOptions(held_out=0.3, ignored_fields=("note",)),
    ),
    "answers only": Setting(
        data=("traces.jsonl",),
        max_length=180,
        encode=EncodeOptions(length_policy="answer_only"),
        read=ReadOptions(answer_format="d1", only_correct=True, skip_bad=True),
        layout=BatchOptions(tail_cut=0.5),
    ),
    "documents": Setting(
        data=("documents.jsonl",),
        max_length=128,
        read=ReadOptions(held_out=0.0),
        encode=EncodeOptions(length_policy="right"),
        layout=BatchOptions(eos_tail=0, width_step=16),
        seed=11,
    ),
}


def write_data(folder: Path) -> None:
    """Writes the files that the settings name, and the tokenizer "tiny"; the same bytes every time."""
    import tiny_tokenizer

    (folder / "chats.jsonl").write_text(_lines(_chat(number) for number in range(300)))
    (folder / "traces.jsonl").write_text(_lines(_trace(number) for number in range(150)))
    documents = ({"text": _text(f"document {number}", 1, 260)} for number in range(120))
    (folder / "documents.jsonl").write_text(_lines(documents))
    (folder / "tiny").mkdir()
    tiny_tokenizer.write_tokenizer(folder / "tiny")


def open_rows(setting: Setting, folder: Path, cache: str = "off", split: str = "train") -> TokenizedRows:
    """Returns the rows of a setting as tokens; `cache` is a value of --data-cache."""
    names = [name if name == "sudoku" else str(folder / name) for name in setting.data]
    tokenizer = load_tokenizer("bytes" if setting.tokenizer == "bytes" else folder / setting.tokenizer)
    opened = TokenCache(find_cache(cache), tokenizer, setting.encode)
    return opened.open(names, setting.weights or None, split, setting.seed, setting.read)


def digests(
    setting: Setting, rows: TokenizedRows, count: int, processes: int = 1, resume_at: int | None = None
) -> dict[int, str]:
    """Returns the digests of the first `SHORT` and of the first `count` global batches.

    processes: number of processes, whose shares are put together. resume_at: number of batches after which the position
    is saved, and restored in new iterators.
    """
    found, digest = dict[int, str](), hashlib.sha256()
    streams = [_batches(setting, rows, index, processes) for index in range(processes)]
    for number in range(count):
        if number == resume_at:
            states = [json.loads(json.dumps(stream.get_state())) for stream in streams]
            assert all(state == states[0] for state in states)
            for stream in streams:
                stream.close()
            streams = [_batches(setting, rows, index, processes) for index in range(processes)]
            for stream in streams:
                stream.set_state(states[0])
        _add(digest, [next(stream) for stream in streams])
        if number + 1 in (SHORT, count):
            found[number + 1] = digest.hexdigest()[:32]
    for stream in streams:
        stream.close()
    return found


def _batches(setting: Setting, rows: TokenizedRows, index: int, processes: int) -> Any:
    return make_batches(
        rows,
        batch_size=BATCH_SIZE,
        max_length=setting.max_length,
        seed=setting.seed,
        process_index=index,
        process_count=processes,
        num_threads=0,
        options=setting.layout,
    )


def _add(digest: Any, shares: list[Batch[np.ndarray]]) -> None:
    for name in ("tokens_BT", "maskable_BT", "row_B", "valid_BT", "length_BM", "text_BM"):
        parts = [getattr(share, name) for share in shares]
        digest.update(name.encode())
        if parts[0] is not None:
            whole = np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])  # row j of share p is row j * P + p
            digest.update(f"{whole.dtype}{whole.shape}".encode() + whole.tobytes())


def _number(key: str, below: int) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % below


def _text(key: str, fewest: int, most: int) -> str:
    """Returns between `fewest` and `most` characters of words; some are not ASCII, some look like special tokens."""
    words = ("the", "sum", "of", "two", "café", "is", "12", "<|im_end|>", "therefore", "日本", "x=3", "so")
    length, text, count = fewest + _number(f"{key} length", most - fewest + 1), "", 0
    while len(text) < length:
        text += words[_number(f"{key} word {count}", len(words))] + " "
        count += 1
    return text[:length].strip() or "so"


def _chat(number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": _text(f"question {number % 280}", 1, 60)}]  # a few prompts occur twice
    for turn in range(_number(f"turns {number}", 3)):
        turns.append({"role": "assistant", "content": _text(f"turn {number} {turn}", 1, 30)})
        turns.append({"role": "user", "content": _text(f"again {number} {turn}", 1, 20)})
    turns.append({"role": "assistant", "content": _text(f"answer {number}", 1, 90)})
    return {"messages": turns, "id": number}


def _trace(number: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "question": _text(f"asked {number}", 1, 30),
        "deepseek_thinking_trajectory": _text(f"thought {number}", 1, 120),
        "deepseek_attempt": _text(f"attempt {number}", 1, 40),
        "deepseek_grade": "Yes" if number % 5 else "No",
        "note": f"n{number}",
    }
    return row


def _lines(rows: Iterator[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Records the digests of all settings that have none yet."""
    recorded = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_data(folder)
        for name, setting in SETTINGS.items():
            if name in recorded:
                continue
            rows = open_rows(setting, folder)
            found = digests(setting, rows, WHOLE)
            assert found == digests(setting, rows, WHOLE, processes=2, resume_at=WHOLE // 3)
            recorded[name] = {str(count): digest for count, digest in found.items()}
            print(name, recorded[name], file=sys.stderr)
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
