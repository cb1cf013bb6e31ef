"""Judges say whether an answer is correct, and why. Evaluations and rewards use the same ones.

| module | content |
|---|---|
| `verdict` | the types Judge and Verdict |
| `puzzles` | judges of 4x4 sudoku and of countdown |
| `long_tasks` | judges of chains of sums and of routes, which have long answers |
| `gsm8k` | the judge of the number with which an answer concludes |
| `conclusions`, `sentences`, `numerals` | the number with which an answer concludes; of a sentence; numbers in a text |
"""
