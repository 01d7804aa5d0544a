"""Benchmarks: python -m experiments.bench --suite=NAME. A suite is a file in suites/."""
