"""Symbolic shapes and element values of a graph: what a tensor holds at an index, without running it."""
