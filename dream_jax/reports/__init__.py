"""Documents made from the folder of a run: report, curves, comparison of two runs, model card."""
