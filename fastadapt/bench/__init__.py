"""Benchmarks: every system answers the same case, is checked against a float64 reference, and takes turns."""
