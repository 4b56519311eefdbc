"""Errors that a user can cause and cure."""


class UserError(Exception):
    """Bad input; the message is one sentence: what was got, what is allowed, what to do (exit status 2)."""


class GateError(Exception):
    """A check that ran and was not passed (exit status 1)."""
