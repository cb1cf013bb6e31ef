"""Trains a Dream model on a mesh: `python train.py --mesh 8x1 --model nano --data sudoku --out runs/sudoku`.

With --plan it trains nothing, and says what the run would take on hardware that need not be here.
"""

import dataclasses
import json
import sys
from typing import Annotated

import tyro

from dream_jax.plan import PlanSettings, make_plan, render
from dream_jax.trainer import Diverged, Stopped, TrainSettings, leave, train

DOES_NOT_FIT = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    training: Annotated[TrainSettings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TrainSettings)
    planning: Annotated[PlanSettings, tyro.conf.arg(name="")] = dataclasses.field(default_factory=PlanSettings)


def plan(command: Command) -> int:
    """Prints the plan; 0 when the step fits, `DOES_NOT_FIT` when it does not."""
    made = make_plan(command.training, command.planning)
    print(render(made))
    if command.planning.plan_out is not None:
        text = json.dumps(made.plain(), indent=2, allow_nan=False) + "\n"
        command.planning.plan_out.parent.mkdir(parents=True, exist_ok=True)
        command.planning.plan_out.write_text(text, encoding="utf-8")
        print(f"wrote {command.planning.plan_out}")
    return 0 if made.fits else DOES_NOT_FIT


def main() -> int:
    try:
        command = tyro.cli(Command, description=__doc__)
        if command.planning.plan:
            return plan(command)
        train(command.training)
    except Stopped as stopped:
        print(stopped)
        return 130
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except (Diverged, ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return leave(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
