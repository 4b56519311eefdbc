"""Comparison of a rewritten model with full attention: prompts, runs, figures, gates."""
