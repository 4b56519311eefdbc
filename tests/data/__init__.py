"""Graphs as the exporters of the day write them, frozen: tiny models of many families by many routes, and the commands that make and judge them."""
