"""What a run was, read back from its folder: report, curves, comparison of two runs, model card."""
