"""Draws the pictures of the README and the docs as SVG.

    python docs/make_pictures.py [--model runs/demo/model]

`docs/img/canvas.svg` shows a sudoku that the model of `make demo` solves; the digits and their order are the sampler's.
`docs/img/architecture.svg` shows the two programs, training and sampling; `cache.svg` and `cache.zh.svg` show when keys and
values may be kept. Without the model only these are drawn.
"""

from __future__ import annotations

import argparse
import html
import pathlib
import sys
from typing import Any

IMAGES = pathlib.Path(__file__).resolve().parent / "img"
FONT = "font-family='ui-sans-serif,system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif'"
MONOSPACE = "font-family='ui-monospace,SFMono-Regular,Menlo,Consolas,monospace'"
INK, GREY, PAPER = "#1f2933", "#62707f", "#ffffff"

PUZZLE = "4000\n0124\n2031\n0000\n"  # the puzzle of `make demo`: 0 is an empty cell, its solution is in the test split
PASSES = (7, 10, 13, 16)  # the forward passes after which the canvas is drawn, beside the first and the last canvas


def text(x: float, y: float, words: str, size: int = 13, colour: str = INK, more: str = "") -> str:
    """One line of text, centred at x; y is its baseline."""
    return (
        f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{colour}' text-anchor='middle' {more}>"
        f"{html.escape(words)}</text>"
    )


def rectangle(x: float, y: float, width: float, height: float, fill: str, edge: str = "none", radius: int = 4) -> str:
    """A rectangle with rounded corners."""
    return (
        f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='{radius}' fill='{fill}' stroke='{edge}'/>"
    )


def page(width: int, height: int, title: str, parts: list[str]) -> str:
    """The file: a white page with a title for readers who do not see it."""
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}' "
            f"role='img' {FONT}>",
            f"<title>{html.escape(title)}</title>",
            rectangle(0.5, 0.5, width - 1, height - 1, PAPER, "#d5dbe1", 8),
            *parts,
            "</svg>",
            "",
        ]
    )


def sampled_canvases(model_directory: str) -> tuple[list[str], list[list[str]]]:
    """The captions and the canvases (lists of 16 cells, "" where masked) of the demo model's answer to PUZZLE."""
    import numpy as np

    import dream_jax
    from dream_jax.tokenizer import load_tokenizer

    model = dream_jax.load(model_directory, dtype="float32")
    tokenizer = load_tokenizer(model_directory)
    prompt = np.asarray([tokenizer.encode(PUZZLE)], np.int32)
    config = dream_jax.SamplerConfig(
        max_new_tokens=len(PUZZLE),
        steps=len(PUZZLE),
        alg="entropy",
        vocab_limit=tokenizer.vocab_limit,
        forbidden_tokens=(tokenizer.mask_id,),
    )
    sample = dream_jax.generate(model, prompt, config)
    passes = int(sample.forwards)
    captions, canvases = ["the puzzle"], [[cell if cell != "0" else "" for cell in PUZZLE if cell != "\n"]]
    for step_id in (0, *PASSES, passes):  # step 0 writes nothing and is skipped, so step k is the k-th pass
        answer = [int(token) for token in np.asarray(sample.canvas_at(step_id))[0, prompt.shape[1] :]]
        cells = ["" if token == tokenizer.mask_id else tokenizer.decode([token]) for token in answer]
        canvases.append([cell for place, cell in enumerate(cells) if place % 5 < 4])  # every fifth is a line's end
        captions.append("the canvas" if step_id == 0 else f"after {step_id} passes")
    captions[-1] = f"answer, {passes} passes"
    return captions, canvases


def draw_canvas(captions: list[str], canvases: list[list[str]]) -> str:
    """The canvases side by side: cells just written are dark, earlier ones light, masked ones grey."""
    cell, gap, left, top = 25, 27, 16, 40
    parts, width = [], left * 2 + len(canvases) * 4 * cell + (len(canvases) - 1) * gap
    for number, (caption, cells) in enumerate(zip(captions, canvases, strict=True)):
        x0 = left + number * (4 * cell + gap)
        parts.append(text(x0 + 2 * cell, 25, caption, 12, GREY))
        before = canvases[number - 1] if number > 1 else [""] * 16
        for place, digit in enumerate(cells):
            x, y = x0 + place % 4 * cell, top + place // 4 * cell
            if number == 0:
                fill, ink = ("#eef1f4", INK)
            elif not digit:
                fill, ink = ("#c3ccd5", INK)
            elif not before[place]:
                fill, ink = ("#1764ab", PAPER)
            else:
                fill, ink = ("#d6e6f4", INK)
            parts.append(rectangle(x + 1, y + 1, cell - 2, cell - 2, fill, radius=3))
            if digit:
                parts.append(text(x + cell / 2, y + cell / 2 + 5, digit, 15, ink, MONOSPACE))
        if number + 1 < len(canvases):
            parts.append(text(x0 + 4 * cell + gap / 2, top + 2 * cell + 5, "›", 18, GREY))
    foot = "grey: mask token · dark blue: written since the canvas before · light blue: written earlier"
    parts.append(text(width / 2, top + 4 * cell + 24, foot, 11, GREY))
    return page(width, top + 4 * cell + 38, "A 4x4 sudoku is solved by denoising: the canvas after some passes", parts)


BLUE, GREEN, SAND = ("#e3eefa", "#1764ab"), ("#e2f3e8", "#1b7a43"), ("#fdf1dc", "#a86a08")


def box(x: float, y: float, width: float, height: float, colour: tuple[str, str], words: list[str], module: str) -> str:
    """A box with its lines of text, and in monospace the module that holds the code."""
    lines = [rectangle(x, y, width, height, *colour, radius=6)]
    first = y + height / 2 - (len(words) * 17 + 15) / 2 + 13
    for number, line in enumerate(words):
        weight = "font-weight='600'" if number == 0 else ""
        lines.append(text(x + width / 2, first + 17 * number, line, 13, INK, weight))
    lines.append(text(x + width / 2, first + 17 * len(words), module, 11, colour[1], MONOSPACE))
    return "\n".join(lines)


def arrow(points: list[tuple[float, float]], colour: str = GREY) -> str:
    """A line through the points with a head at the last."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    return f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='1.6' marker-end='url(#head)'/>"


def draw_architecture() -> str:
    """Training on the left, sampling on the right, the transformer that both run in the middle."""
    left, middle, right, wide = 24, 316, 608, 268
    parts = [
        "<defs><marker id='head' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0,0 L10,5 L0,10 z' fill='{GREY}'/></marker></defs>",
        text(left + wide / 2, 28, "Training", 16, BLUE[1], "font-weight='700'"),
        text(middle + wide / 2, 28, "The model", 16, SAND[1], "font-weight='700'"),
        text(right + wide / 2, 28, "Sampling", 16, GREEN[1], "font-weight='700'"),
        box(left, 42, wide, 62, BLUE, ["text → tokens", "and which of them may be masked"], "data/ · tokenizer"),
        box(left, 130, wide, 62, BLUE, ["mask tokens with probability t", "t ~ U(0, 1), one a row"], "objective"),
        box(
            left,
            244,
            wide,
            78,
            BLUE,
            ["logits at masked positions only", "weight × cross entropy,", "÷ masked positions, global batch"],
            "objective",
        ),
        box(
            left,
            348,
            wide,
            62,
            BLUE,
            ["clip → AdamW → sharded weights", "loop, logs, checkpoints"],
            "train_step · optimizer · trainer/",
        ),
        box(
            middle,
            130,
            wide,
            192,
            SAND,
            [
                "28 layers of a Qwen2.5 transformer",
                "without the causal mask:",
                "every position attends to every other",
                "",
                "hidden state i−1 predicts token i",
                "attention: cuDNN, splash or XLA",
                "",
            ],
            "model · attention/ · masks/",
        ),
        box(
            middle, 348, wide, 62, SAND, ["weights", "Hugging Face ⇄ JAX, bit for bit"], "hf/ · pretrained/ · convert/"
        ),
        box(right, 42, wide, 62, GREEN, ["prompt → canvas", "the prompt, then mask tokens"], "inference · sampler/"),
        box(
            right,
            130,
            wide,
            62,
            GREEN,
            ["a token and a confidence", "for every masked position"],
            "decoding/ · sampler/",
        ),
        box(
            right,
            244,
            wide,
            78,
            GREEN,
            ["write the most confident ones,", "as many as the schedule says;", "again until no mask is left"],
            "schedule · sampler/",
        ),
        box(right, 348, wide, 62, GREEN, ["answer", "tokens, and the step of each"], "sample.py · evaluate.py"),
        arrow([(left + wide / 2, 104), (left + wide / 2, 129)]),
        arrow([(left + wide, 161), (middle - 1, 161)]),
        arrow([(middle, 283), (left + wide + 1, 283)]),
        arrow([(left + wide / 2, 322), (left + wide / 2, 347)]),
        arrow([(left + wide, 379), (middle - 1, 379)]),
        arrow([(middle + wide / 2, 348), (middle + wide / 2, 323)]),
        arrow([(right, 73), (middle + wide / 2, 73), (middle + wide / 2, 129)]),
        arrow([(middle + wide, 161), (right - 1, 161)]),
        arrow([(right + wide / 2, 192), (right + wide / 2, 243)]),
        arrow([(right, 283), (middle + wide + 1, 283)]),
        arrow([(right + wide / 2, 322), (right + wide / 2, 347)]),
    ]
    return page(
        900, 430, "How training and sampling run the same transformer, with the modules that hold the code", parts
    )


_CACHE_WORDS: dict[str, dict[str, Any]] = {
    "en": {
        "title": "When keys and values may be kept: four masks, eight tokens, blocks of four",
        "exact": "exact",
        "wrong": "not exact",
        "layers": "exact only far away",
        "foot": "a row is a query, a column is a key · green: kept · orange: still to be written · "
        "red: a kept token sees one that is still to be written",
        "names": ("causal", "block-causal:4", "window:1", "bidirectional"),
        "below": (
            "nothing kept looks right",
            "blocks end where blocks are written",
            "layer l sees l tokens to the right",
            "every key changes with each token",
        ),
    },
    "zh": {
        "title": "什么时候可以保留键和值：四种注意力掩码，八个 token，四个一块",
        "exact": "精确",
        "wrong": "不精确",
        "layers": "相距足够远处才精确",
        "foot": "每行是一个查询，每列是一个键 · 绿：保留 · 橙：还要写 · 红：被保留的 token 看得见还要写的",
        "names": ("因果", "分块因果:4", "窗口:1", "双向"),
        "below": (
            "被保留的都不往右看",
            "注意力掩码的块就是书写的块",
            "第 l 层往右看 l 个 token",
            "每写一个 token，键全都过时",
        ),
    },
}


def draw_cache(language: str) -> str:
    """Four masks: which of the tokens that are kept see tokens that are still to be written."""
    import numpy as np

    from dream_jax import masks

    words = _CACHE_WORDS[language]
    cell, gap, left, top = 20, 44, 24, 44
    parts = []
    for panel, name in enumerate(("causal", "block-causal:4", "window:1", "bidirectional")):
        allowed = np.asarray(masks.parse(name).for_rows(np.ones((1, 8), bool), np.arange(8)[None] >= 4).dense(8, 8))
        allowed = np.broadcast_to(allowed, (1, 8, 8))[0]
        x0 = left + panel * (8 * cell + gap)
        parts.append(text(x0 + 4 * cell, 28, words["names"][panel], 14, INK, "font-weight='600'"))
        crossing = False
        for query in range(8):
            for key in range(8):
                fill = "#eef1f4"
                if allowed[query, key]:
                    bad = query < 4 <= key
                    crossing |= bad
                    fill = "#c81e1e" if bad else "#d98a1f" if key >= 4 else "#2f9e58"
                parts.append(rectangle(x0 + key * cell + 1, top + query * cell + 1, cell - 2, cell - 2, fill, radius=3))
        verdict = "exact" if not crossing else "layers" if name.startswith("window") else "wrong"
        colour = "#1b7a43" if not crossing else "#c81e1e"
        parts.append(text(x0 + 4 * cell, top + 8 * cell + 22, words[verdict], 11, colour))
        parts.append(text(x0 + 4 * cell, top + 8 * cell + 39, words["below"][panel], 11, GREY))
    width = 2 * left + 4 * 8 * cell + 3 * gap
    parts.append(text(width / 2, top + 8 * cell + 66, words["foot"], 11, GREY))
    return page(width, top + 8 * cell + 82, words["title"], parts)


def main() -> int:
    """Draws all pictures, or all but the first where the model is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/model", help="the model that `make demo` trained")
    arguments = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "architecture.svg").write_text(draw_architecture(), encoding="utf-8")
    for language, name in (("en", "cache.svg"), ("zh", "cache.zh.svg")):
        (IMAGES / name).write_text(draw_cache(language), encoding="utf-8")
    print(f"wrote {IMAGES.name}/architecture.svg, cache.svg and cache.zh.svg")
    if not pathlib.Path(arguments.model).is_dir():
        print(f"error: {arguments.model} is no directory; train it with `make demo`", file=sys.stderr)
        return 1
    (IMAGES / "canvas.svg").write_text(draw_canvas(*sampled_canvases(arguments.model)), encoding="utf-8")
    print(f"wrote {IMAGES.name}/canvas.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
