"""Benchmarks, and the tables that are generated from their results."""
