"""Benchmarks: time beside the strongest baseline, in one run, with the search included."""
