"""Recipes: the settings of whole runs under a name, in TOML files, with where they come from and what they would take.

    about = "one line"
    source = "paper, repository or reasoning"
    like = "dream-7b"            # a preset of the model's sizes, to plan with where its files are not here
    required = ["data"]          # settings that the command line must give
    [settings]                   # fields of TrainSettings
    [[planned]]                  # per hardware: what changes there, hours, price, memory; written by bench/recipes.py

Knows the format and the types of the settings. Knows nothing of command lines.
"""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import tomllib
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal

from dream_jax.config import PRESETS
from dream_jax.trainer.settings import TrainSettings

SUFFIX = ".toml"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """What the run would take on some hardware.

    Attributes:
      topology: as in `--topology`.
      settings: those that differ from the recipe's there.
      hours, rmb: of all steps, if everything overlaps and if nothing does; no price where none is listed.
      peak_gib: memory of a device at the worst moment.
      fits: whether it has as much.
      how: by whom this is known.
    """

    topology: str
    settings: Mapping[str, Any]
    hours: tuple[float, float]
    rmb: tuple[float, float] | None
    peak_gib: float
    fits: bool
    how: Literal["compiled", "arithmetic"]

    def flags(self) -> str:
        """The settings as the command line takes them."""
        return " ".join(_flag(name, value) for name, value in self.settings.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One file, checked.

    Attributes:
      name: of the file, without its suffix.
      file: where it lies.
      about, source: see the module.
      like: a preset, or None.
      required: settings that a run must be given besides.
      settings: fields of TrainSettings.
      planned: in the order of the file.
    """

    name: str
    file: pathlib.Path
    about: str
    source: str
    like: str | None
    required: tuple[str, ...]
    settings: Mapping[str, Any]
    planned: tuple[Planned, ...]

    def train_settings(self, **changes: Any) -> TrainSettings:
        """The settings of a run by this recipe. Raises ValueError, opening with the file, for a value out of range."""
        given = {"out": pathlib.Path("runs") / self.name, **self.settings}
        try:
            return TrainSettings(**given | {"recipe": str(self.name)} | changes)
        except ValueError as error:
            raise ValueError(f"{self.file}: {error}") from error

    def check_given(self, given: Collection[str]) -> None:
        """Raises ValueError when a setting that the recipe leaves to the user is not among those that were given."""
        missing = [name for name in self.required if name not in given]
        if missing:
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(f"recipe {self.name} needs {flags}: {self.about}")


def read_recipe(name_or_file: str, folder: pathlib.Path) -> Recipe:
    """A recipe of the folder by its name, or any file.

    Raises:
      FileNotFoundError: neither, with the names that there are and the nearest.
      ValueError: no TOML, an unknown or missing key, or a value of another type: with file, key and the nearest name.
    """
    file = pathlib.Path(name_or_file).expanduser()
    if file.suffix != SUFFIX:
        file = folder / f"{name_or_file}{SUFFIX}"
    if not file.is_file():
        known = names(folder)
        near = _nearest(name_or_file, known)
        raise FileNotFoundError(
            f"no recipe {name_or_file!r}{near}: give a {SUFFIX} file, or one of {', '.join(known) or f'none in {folder}'}"
        )
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not TOML ({error})") from error
    try:
        return _recipe(found, file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def names(folder: pathlib.Path) -> list[str]:
    """The recipes of a folder."""
    return sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))


def listing(folder: pathlib.Path) -> str:
    """All recipes of a folder with what they are and what they would take, as text."""
    lines = []
    for name in names(folder):
        recipe = read_recipe(name, folder)
        lines.append(f"{name}: {recipe.about}")
        for one in recipe.planned:
            price = "no price" if one.rmb is None else f"{one.rmb[0]:.0f} to {one.rmb[1]:.0f} RMB"
            fits = f"{one.peak_gib:.0f} GiB" if one.fits else f"DOES NOT FIT: {one.peak_gib:.0f} GiB"
            hours = f"{one.hours[0]:.2f} to {one.hours[1]:.2f} h"
            lines.append(f"    {one.topology:8} {hours}, {price}, {fits} ({one.how})  {one.flags()}")
    return "\n".join(lines) or f"no recipes in {folder}"


# ------------------------------------------------------------------------------------------------------------- reading

_KEYS = {"about": str, "source": str, "like": str | None, "required": tuple[str, ...]}
_OPTIONAL = ("like", "required")
_NOT_HERE = ("recipe", "out", "overwrite", "coordinator", "num_processes", "process_id")
"""Settings that say where a run happens, not what it is."""


def _recipe(found: dict[str, Any], file: pathlib.Path) -> Recipe:
    settings, planned = found.pop("settings", {}), found.pop("planned", [])
    _check_names(found, [*_KEYS, "settings", "planned"], "")
    missing = [key for key in _KEYS if key not in found and key not in _OPTIONAL]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    top = {name: _value(value, _KEYS[name], name) for name, value in found.items()}
    hints = typing.get_type_hints(TrainSettings)
    allowed = [name for name in hints if name not in _NOT_HERE]
    required = top.get("required", ())
    _check_names(dict.fromkeys(required), allowed, "required: ")
    like = top.get("like")
    if like is not None and like not in PRESETS:
        raise ValueError(f"like = {like!r} is no preset{_nearest(like, PRESETS)}; presets are {', '.join(PRESETS)}")
    if not isinstance(settings, dict) or not isinstance(planned, list):
        raise ValueError("[settings] must be a table, and [[planned]] tables")
    return Recipe(
        name=file.stem,
        file=file,
        about=top["about"],
        source=top["source"],
        like=like,
        required=required,
        settings=_settings(settings, "settings", hints, allowed),
        planned=tuple(_planned(one, number, hints, allowed) for number, one in enumerate(planned, 1)),
    )


def _settings(
    found: Mapping[str, Any], where: str, hints: Mapping[str, Any], allowed: Collection[str]
) -> dict[str, Any]:
    _check_names(found, allowed, f"[{where}] ")
    return {name: _value(value, hints[name], f"[{where}] {name}") for name, value in found.items()}


def _planned(found: Any, number: int, hints: Mapping[str, Any], allowed: Collection[str]) -> Planned:
    where = f"planned {number}"
    kinds = typing.get_type_hints(Planned)
    if not isinstance(found, dict):
        raise ValueError(f"{where} must be a table")
    settings = found.pop("settings", {})
    if not isinstance(settings, dict):
        raise ValueError(f"{where}: settings must be a table")
    _check_names(found, [name for name in kinds if name != "settings"], f"{where}: ")
    missing = [name for name in kinds if name not in found and name not in ("settings", "rmb")]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    given = {name: _value(value, kinds[name], f"{where}: {name}") for name, value in found.items()}
    return Planned(**{"rmb": None, **given}, settings=_settings(settings, where, hints, allowed))


def _check_names(found: Mapping[str, Any], allowed: Collection[str], where: str) -> None:
    for name in found:
        if name in _NOT_HERE:
            raise ValueError(f"{where}{name} does not belong in a recipe: give it on the command line")
        if name not in allowed:
            raise ValueError(f"{where}{name} is not known{_nearest(name, allowed)}")


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _value(value: Any, hint: Any, where: str) -> Any:
    """A value of TOML as the type wants it. Raises ValueError, opening with `where`, for another type or choice."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        kind = typing.get_origin(option) or option
        arguments = typing.get_args(option)
        if kind is Literal and value in arguments and type(value) in {type(one) for one in arguments}:
            return value
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if kind in (int, str, bool) and type(value) is kind:
            return value
        if kind is pathlib.Path and isinstance(value, str):
            return pathlib.Path(value)
        if kind is tuple and isinstance(value, list):
            return tuple(_value(one, arguments[0], f"{where}[{place}]") for place, one in enumerate(value))
    choices = [one for option in options if typing.get_origin(option) is Literal for one in typing.get_args(option)]
    if choices and isinstance(value, str):
        known = ", ".join(map(str, choices))
        raise ValueError(f"{where} = {value!r} is none of {known}{_nearest(value, [str(one) for one in choices])}")
    raise ValueError(f"{where} = {value!r} must be {_said(options)}")


def _said(options: tuple[Any, ...]) -> str:
    words = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", pathlib.Path: "a path"}
    found = []
    for option in options:
        if typing.get_origin(option) is tuple:
            found.append("a list")
        elif typing.get_origin(option) is Literal:
            found.append("one of " + ", ".join(map(str, typing.get_args(option))))
        elif option is not type(None):
            found.append(words.get(option, str(option)))
    return " or ".join(found)


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    values = value if isinstance(value, tuple) else (value,)
    return f"--{flag} {' '.join(map(str, values))}"
