"""One name per concept: no public class name is defined twice, and no identifier uses a word that DESIGN.md rules out."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

import module_layers
import pytest

SOURCES = {**module_layers.package_sources().texts, **module_layers.application_sources().texts}

# Words that have a better name, that name, and the modules in which the word would have the meaning that is ruled out
# (a regular expression at the beginning of the dotted name). A word is a part of an identifier between underscores or
# capitals.
EVERYWHERE = ""
CACHES = r"dream_jax\.(attention|sampler|model)|mask_study|bench\.sampler"
BATCHES_AND_RUNS = r"dream_jax\.(train_step|objective|reports|trainer\.(loop|steps|segments|cost|folder))|train$"
WORDS = {
    "place": ("position for the index of a token, sharding for the devices of an array", EVERYWHERE),
    "places": ("positions or shardings", EVERYWHERE),
    "placed": ("for_rows for masks, sharded for arrays", EVERYWHERE),
    "placement": ("sharding", EVERYWHERE),
    "room": ("module", EVERYWHERE),
    "rooms": ("modules", EVERYWHERE),
    "surest": ("most_confident", EVERYWHERE),
    "stamp": ("step_id; the list of noise levels is the schedule", EVERYWHERE),
    "stamps": ("step_ids; the list of noise levels is the schedule", EVERYWHERE),
    "clock": ("schedule", EVERYWHERE),
    "exist": ("valid", EVERYWHERE),
    "exists": ("valid", EVERYWHERE),
    "visible": ("valid", EVERYWHERE),
    "real": ("valid", EVERYWHERE),
    "kept": ("kv_cache", CACHES),
    "own": ("kv_cache for keys and values, target for a token", CACHES),
    "part": ("microbatch of a batch, segment of a run", BATCHES_AND_RUNS),
    "parts": ("microbatches of a batch, segments of a run", BATCHES_AND_RUNS),
}

# Uses of these words with another meaning than the one that is ruled out, with that meaning.
ALLOWED = {
    ("dream_jax.data.encode", "NO_ROOM"): "space that a row has left",
    ("dream_jax.trainer.samples", "room"): "tokens that still fit",
    ("dream_jax.trainer.console", "clock"): "hours, minutes and seconds",
    ("dream_jax.trainer.steps", "clock"): "the time in seconds",
}


def identifiers(text: str) -> Iterator[tuple[str, int]]:
    """Names that a file defines: classes, functions, arguments, variables, attributes of self, and keyword fields."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def words_of(name: str) -> list[str]:
    """`kept_BT` -> kept, bt; `KeptKeys` -> kept, keys."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)]


def test_no_public_class_name_is_defined_twice() -> None:
    where: dict[str, list[str]] = defaultdict(list)
    for module, text in SOURCES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(module)
    assert {name: modules for name, modules in where.items() if len(modules) > 1} == {}


def test_no_identifier_has_a_word_that_is_ruled_out() -> None:
    found = [
        f"{module}, line {line}: {name} ({word}: better {WORDS[word][0]})"
        for module, text in SOURCES.items()
        for name, line in identifiers(text)
        if (module, name) not in ALLOWED
        for word in words_of(name)
        if word in WORDS and re.match(WORDS[word][1], module)
    ]
    assert not found, "\n".join(found)


def test_exceptions_are_needed() -> None:
    used = {(module, name) for module, text in SOURCES.items() for name, _ in identifiers(text)}
    assert ALLOWED.keys() <= used


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kept_BT", ["kept", "bt"]),
        ("KeptKeys", ["kept", "keys"]),
        ("_replace", ["replace"]),
        ("HFSource2", ["hf", "source", "2"]),
    ],
)
def test_words_of_an_identifier(name: str, words: list[str]) -> None:
    assert words_of(name) == words
