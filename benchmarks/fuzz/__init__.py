"""Hostile files for every importer, made from bytes: see `python -m benchmarks.fuzz --help`."""
