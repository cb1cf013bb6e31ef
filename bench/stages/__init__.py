"""The stages of bench/accelerator.py. Each stage runs in a process of its own and writes its result as it goes."""
