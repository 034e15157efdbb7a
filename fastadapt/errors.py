"""What the command line tells in one line."""

from __future__ import annotations


class UserError(Exception):
    """A request that cannot be served; the command line prints it as one line."""
