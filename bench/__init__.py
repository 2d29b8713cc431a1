"""Measurements: one module a table, `run(quick)` each; results are committed in `results/`."""
