"""A message names only flags that the command has which shows it.

All texts in the source are searched for flags, such as --mask. A flag must belong to the commands that can show the text:
those that `SHOWN_BY` lists for the file, or the command whose name stands before the flag in the text itself.
"""

import argparse
import ast
import contextlib
import functools
import pathlib
import re
import runpy
import sys
import typing
import warnings

import pytest
import tyro

ROOT = pathlib.Path(__file__).parent.parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?:-(?=[*…]))?")
SCRIPT = re.compile(r"[\w/]+\.py\b")

ASKING = ("sample.py", "evaluate.py")
CONVERTING = ("convert/hf_to_flax.py", "convert/flax_to_hf.py", "convert/qwen2_to_dream.py", "convert/ar_to_dream.py")
SHOWN_BY: dict[str, tuple[str, ...]] = {
    "dream_jax/chips.py": ("train.py",),
    "dream_jax/data/": ("train.py",),
    "dream_jax/distributed.py": ("train.py",),
    "dream_jax/evaluation/": ("evaluate.py",),
    "dream_jax/float8.py": ("train.py",),
    "dream_jax/files.py": (*CONVERTING, "train.py"),
    "dream_jax/inference.py": ASKING,
    "dream_jax/paths.py": (*ASKING, "train.py"),
    "dream_jax/plan/": ("train.py",),
    "dream_jax/posttraining/": ("train.py",),
    "dream_jax/pretrained/adapter.py": ASKING,
    "dream_jax/pretrained/autoregressive.py": ("convert/qwen2_to_dream.py", "convert/ar_to_dream.py"),
    "dream_jax/pretrained/gguf_file.py": ("convert/ar_to_dream.py",),
    "dream_jax/pretrained/llama.py": ("convert/ar_to_dream.py",),
    "dream_jax/pretrained/conversion.py": ("convert/flax_to_hf.py",),
    "dream_jax/reports/": ("train.py",),
    "dream_jax/reports/model_card.py": ("convert/flax_to_hf.py",),
    "dream_jax/serving/": ("serve.py",),
    "dream_jax/tokenizer.py": ASKING,
    "dream_jax/trainer/": ("train.py",),
    "mask_study/": ("study.py",),
}
OF_OTHER_PROGRAMS = {
    ("dream_jax/evaluation/harness.py", flag) for flag in ("--model", "--tasks", "--include", "--apply", "--name")
}
OF_OTHER_PROGRAMS |= {(file, "--no-deps") for file in ("convert/ar_to_dream.py", "dream_jax/pretrained/gguf_file.py")}


COMMANDS = [
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.py"), *ROOT.glob("convert/[!_]*.py"), *ROOT.glob("bench/*.py"))
] + [  # started with python -m
    f"mask_study/{name}.py" for name in ("adaptation", "block_diffusion", "floors", "refreshing")
]


class _Stopped(BaseException):
    """Raised in place of running a command, once its parser is known."""


@functools.cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """Returns the parser of the command line of a script."""
    found: list[argparse.ArgumentParser] = []

    def cli(target: typing.Any, *_: typing.Any, **options: typing.Any) -> typing.NoReturn:
        options.pop("args", None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # There is no other way yet to ask tyro for a parser.
            found.append(tyro.extras.get_parser(target, **options))
        raise _Stopped

    def parse_args(self: argparse.ArgumentParser, *_: typing.Any, **__: typing.Any) -> typing.NoReturn:
        found.append(self)
        raise _Stopped

    with pytest.MonkeyPatch.context() as patched, contextlib.suppress(_Stopped):
        patched.setattr(tyro, "cli", cli)
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patched.setattr(sys, "argv", [script])
        patched.syspath_prepend(str((ROOT / script).parent))
        patched.chdir(ROOT)
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert found, f"{script} has read no command line"
    return found[0]


def flags_of(script: str) -> frozenset[str]:
    """Returns the flags that the parser of a script knows."""
    return frozenset(option for action in parser_of(script)._actions for option in action.option_strings)


def texts(path: pathlib.Path) -> typing.Iterator[tuple[int, str]]:
    """Yields the line and the text of each string in a source file; a value that is put into a text becomes "…"."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, node.value


def sources() -> list[str]:
    files = [path for folder in ("dream_jax", "convert", "mask_study") for path in (ROOT / folder).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *files])


def shown_by(name: str) -> tuple[str, ...]:
    if name in COMMANDS:
        return (name,)
    best = max((prefix for prefix in SHOWN_BY if name.startswith(prefix)), key=len, default=None)
    return SHOWN_BY[best] if best else ()


def wrong_flags(name: str, text: str) -> typing.Iterator[str]:
    """Yields what is wrong with the flags in one text of a file."""
    for match in FLAG.finditer(text):
        flag = match[0]
        if (name, flag) in OF_OTHER_PROGRAMS or flag == "--help":
            continue
        named = [script for script in SCRIPT.findall(text[: match.start()]) if script in COMMANDS]
        commands = (named[-1],) if named else shown_by(name)
        if not commands:
            yield f"{flag}: say in SHOWN_BY which commands show the texts of this file, or name the command in the text"
        for command in commands:
            known = flags_of(command)
            if not (any(one.startswith(flag) for one in known) if flag.endswith("-") else flag in known):
                yield f"{flag} is no flag of {command}"


def test_messages_name_flags_that_exist() -> None:
    found = [
        f"{name}:{line}: {complaint}"
        for name in sources()
        for line, text in texts(ROOT / name)
        for complaint in wrong_flags(name, text)
    ]
    assert not found, "\n".join(found)


def test_a_flag_that_is_missing_is_noticed() -> None:
    assert list(wrong_flags("sample.py", "try --nope")) == ["--nope is no flag of sample.py"]
    assert list(wrong_flags("dream_jax/config.py", "pass --mask"))
    assert not list(wrong_flags("sample.py", "as train.py --anneal-steps, or --lora-*, but a--b and -- are nothing"))
    assert list(wrong_flags("dream_jax/config.py", "convert/hf_to_flax.py --ignore-config-key a")) == []
