"""The one error type meant for the person at the graph."""

from __future__ import annotations


class EasyRefError(ValueError):
    """Wrong input, said in a sentence: what is wrong, what was found, what to do.

    Everything the project refuses on purpose is raised as this type, before anything is changed.
    """
