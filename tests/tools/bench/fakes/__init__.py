"""Benchmarks for the driver to run: one that works, one that raises, one that dies."""
