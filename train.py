"""Trains a Dream model on a mesh: `python train.py --mesh 8x1 --model nano --data sudoku --out runs/sudoku`.

--recipe NAME takes the settings of recipes/NAME.toml, which other flags override; --recipe alone lists the recipes.
--plan trains nothing: it prints the memory and time that the run would need, also on hardware that is not present.
--compare compares two runs, and --report writes the report of one run. --data-report FILE reports on the data alone.
"""

import contextlib
import dataclasses
import functools
import io
import pathlib
import sys
from typing import Annotated

import jax
import tyro

from dream_jax.device_memory import explained, take_memory
from dream_jax.files import write_file, write_json
from dream_jax.paths import check_file, check_local, check_replaceable, is_json_object
from dream_jax.plan import PlanSettings, make_plan, remedies, render
from dream_jax.pretrained import SMOLLM2, adapt_autoregressive
from dream_jax.reports.comparison import compare
from dream_jax.reports.record import read_record
from dream_jax.reports.run_report import write_report
from dream_jax.tokenizer import check_texts
from dream_jax.trainer import Diverged, Stopped, TrainSettings, leave, train
from dream_jax.trainer.data_report import write_data_report
from dream_jax.trainer.recipes import Recipe, listing, read_recipe

DOES_NOT_FIT = 3
CONVERTED = pathlib.Path("weights/smollm2-as-dream")
RECIPES = pathlib.Path(__file__).resolve().parent / "recipes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Looking:
    """Settings for reports of data, and for reports and comparisons of existing runs, instead of training."""

    compare: tuple[pathlib.Path, pathlib.Path] | None = None
    """folders of two runs to compare, instead of training"""
    report: pathlib.Path | None = None
    """folder of a run, finished or not, whose report.md and curves.png are written again, instead of training"""
    compare_out: pathlib.Path | None = None
    """a new Markdown file to which the comparison is written too"""
    data_report: pathlib.Path | None = None
    """a JSON file for the statistics of the data, which are also printed: rows kept and dropped with the reasons, lengths,
    epochs and padding; nothing is trained"""

    def __post_init__(self) -> None:
        check_local(self)
        if self.compare_out is not None and self.compare is None:
            raise ValueError("--compare-out needs a comparison: add --compare RUN1 RUN2")
        if self.report is not None and self.compare is not None:
            raise ValueError("--report and --compare cannot be combined: give one of them")
        if self.data_report is not None and (self.report is not None or self.compare is not None):
            raise ValueError("--data-report cannot be combined with --report or --compare: give one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    # This field has no name of its own, so that the help heads its groups "run options", "network options" and so on.
    training: Annotated[TrainSettings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainSettings)
    planning: PlanSettings = dataclasses.field(default_factory=PlanSettings)
    looking: Looking = dataclasses.field(default_factory=Looking)


def asked_recipe(arguments: list[str]) -> str | None:
    """Returns the value of --recipe on the command line: "" if it has no value, None if the flag is not given.

    Raises:
      ValueError: the flag is given twice.
    """
    asked = None
    for position, argument in enumerate(arguments):
        name, sign, value = argument.partition("=")
        if name != "--recipe":
            continue
        if asked is not None:
            raise ValueError("--recipe is given twice, but a run has one recipe; leave one of them out")
        following = arguments[position + 1 : position + 2]
        asked = value if sign else "".join(one for one in following if not one.startswith("-"))
    return asked


def given_settings(arguments: list[str]) -> set[str]:
    """Returns the names of all settings whose flags are on the command line, with "_" instead of "-"."""
    flags = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    return {flag.removeprefix("--").replace("-", "_") for flag in flags}


def origins(settings: TrainSettings, recipe: Recipe | None) -> dict[str, str]:
    """Returns the origin of each setting that is not a default, by its name: "given", or "recipe NAME"."""
    begun = (TrainSettings() if recipe is None else recipe.train_settings()).values()
    found = {}
    for name, value in settings.values().items():
        if value != begun[name] or name == "recipe":
            found[name] = "given"
        elif recipe is not None and name in {"out", *recipe.settings}:
            found[name] = f"recipe {recipe.name}"
    return found


def plan(command: Command, recipe: Recipe | None, given: set[str]) -> int:
    """Prints the plan. Returns the exit code: 0 if the step fits into the memory, otherwise `DOES_NOT_FIT`."""
    training = command.training
    if recipe is not None and recipe.like is not None:
        left_open = "model" in recipe.required and "model" not in given
        if left_open or training.network.model == recipe.settings.get("model"):
            # A plan needs only the sizes of the model, so it takes a preset of the same sizes and downloads nothing.
            training = training.replaced(model=recipe.like, revision=None)
    if command.planning.plan_out is not None:
        check_replaceable(command.planning.plan_out, "a plan", is_json_object("hardware", "memory", "fits"))
    made = make_plan(training, command.planning)
    print(render(made))
    if command.planning.plan_out is not None:
        command.planning.plan_out.parent.mkdir(parents=True, exist_ok=True)
        write_json(command.planning.plan_out, made.plain())
        print(f"wrote {command.planning.plan_out}")
    return 0 if made.fits else DOES_NOT_FIT


def with_weights(settings: TrainSettings) -> TrainSettings:
    """Returns the settings with a directory for the name smollm2; if it is new, the weights are converted to it."""
    if settings.network.model != SMOLLM2 or pathlib.Path(SMOLLM2).is_dir():
        return settings
    if not CONVERTED.is_dir():
        config = adapt_autoregressive(SMOLLM2, CONVERTED)
        print(f"made {CONVERTED}: SmolLM2 with {config.num_parameters:,} parameters and a mask token")
    return settings.replaced(model=str(CONVERTED))


def lay_side_by_side(asked: Looking) -> int:
    """Prints the comparison of two runs, and writes it to --compare-out. Returns the exit code 0."""
    assert asked.compare is not None
    if asked.compare_out is not None:
        check_file(asked.compare_out)
    if asked.compare_out is not None and asked.compare_out.exists():
        raise FileExistsError(f"{asked.compare_out} exists; give another --compare-out, or remove it")
    text = compare(*asked.compare)
    print(text, end="")
    if asked.compare_out is not None:
        write_file(asked.compare_out, text)
        print(f"wrote {asked.compare_out}")
    return 0


def parsed(begun: Command | None) -> Command:
    """Returns the command line as a `Command`; `begun` gives the defaults.

    Raises:
      ValueError: a group of settings refuses a value. tyro itself would print that message in a box and exit with 2, as
        it does for a flag that does not exist.
    """
    refusal = io.StringIO()
    try:
        with contextlib.redirect_stderr(refusal):
            command = tyro.cli(Command, description=__doc__, default=begun, config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as end:
        # tyro names the whole group as a str where a group's own check failed, and a single flag otherwise.
        error = end.__context__
        cause = None if error is None else error.__context__
        if isinstance(getattr(error, "arg", None), str) and isinstance(cause, ValueError):
            raise cause from None
        sys.stderr.write(refusal.getvalue())
        raise
    assert command is not None  # the type of tyro.cli allows None, because `default` may be None
    return command


def main() -> int:
    try:
        check_texts(sys.argv[1:])
        asked = asked_recipe(sys.argv[1:])
        if asked == "":
            print(listing(RECIPES))
            return 0
        recipe = None if asked is None else read_recipe(asked, RECIPES)
        begun = None if recipe is None else Command(training=recipe.train_settings(recipe=asked))
        command = parsed(begun)
        take_memory()
        if command.planning.plan and command.looking != Looking():
            raise ValueError(
                "--plan is for a future run, but --report and --compare are for existing runs, and --data-report is for "
                "data; give one of them"
            )
        if command.looking.compare is not None:
            return lay_side_by_side(command.looking)
        if command.looking.report is not None:
            print("wrote", *write_report(read_record(command.looking.report)))
            return 0
        if command.planning.plan:
            return plan(command, recipe, given_settings(sys.argv[1:]))
        if recipe is not None:
            recipe.check_given(given_settings(sys.argv[1:]))
        if command.looking.data_report is not None:
            write_data_report(command.training, command.looking.data_report)
            return 0
        given = origins(command.training, recipe)
        train(with_weights(command.training), given)
        if jax.process_index() == 0:
            print("wrote", *write_report(read_record(command.training.run.out)))
    except Stopped as stopped:
        print(stopped)
        return 130
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except jax.errors.JaxRuntimeError as error:
        print(f"error: {explained(error, functools.partial(remedies, command.training))}", file=sys.stderr)
        return leave(1)
    except (Diverged, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return leave(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
