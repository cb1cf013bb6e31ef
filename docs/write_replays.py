"""Puts the player, as it is now, into the replay files of docs/replays/: `python docs/write_replays.py`.

The answers in them stay. `sample.py --replay` wrote the files at first (docs/player.md has the commands).
"""

from pathlib import Path

from dream_jax.player import pages

if __name__ == "__main__":
    for path in sorted((Path(__file__).parent / "replays").glob("*.html")):
        record = pages.record_of(path.read_text(encoding="utf-8"))
        path.write_text(pages.replay_page(record), encoding="utf-8")
