"""Benchmarks: programs that print measurements, with ratios taken in one run."""
