"""Trains a Dream model on a mesh: `python train.py --mesh 8x1 --model nano --data sudoku --out runs/sudoku`."""

import sys

import tyro

from dream_jax.trainer import Diverged, Stopped, TrainSettings, train


def main() -> int:
    try:
        train(tyro.cli(TrainSettings, description=__doc__))
    except Stopped as stopped:
        print(stopped)
        return 130
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except (Diverged, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
