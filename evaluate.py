"""Evaluates a model: `python evaluate.py --model runs/demo/model --task sudoku`, or compares two evaluations."""

import functools
import sys

import jax
import tyro

from dream_jax.device_memory import explained, take_memory
from dream_jax.evaluation import EvaluateSettings, compare, evaluate
from dream_jax.inference import memory_remedies
from dream_jax.tokenizer import check_texts


def main() -> int:
    try:
        check_texts(sys.argv[1:])
        settings = tyro.cli(EvaluateSettings, description=__doc__)
        if settings.compare is not None:
            first, second = settings.compare
            print(compare(first, second).to_markdown(str(first), str(second)), end="")
        else:
            take_memory()
            evaluate(settings)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    except jax.errors.JaxRuntimeError as error:
        remedies = functools.partial(memory_remedies, settings, "--batch-size", settings.batch_size)
        print(f"error: {explained(error, remedies)}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
