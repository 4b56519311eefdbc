"""Errors of graph work that a user can cause and cure."""


class GraphError(Exception):
    """A graph, a configuration or an attribute that cannot be used; the message is one sentence with the cure."""
