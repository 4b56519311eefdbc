"""Changes to a graph, one a file."""
