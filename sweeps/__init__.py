"""Sweeps: a file defines `sweep()` or `search(trial)`, and `python -m sweeps.run` runs its rows."""
