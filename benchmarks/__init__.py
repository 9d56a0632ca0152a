"""Measurements of this package beside what it replaces. Run as `python -m benchmarks.NAME`."""
