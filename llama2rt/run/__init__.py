"""A run directory: the recipe, what went in, what was measured, where to continue.

A stage opens a `Run` with its `Recipe`, reads `complete`, logs, and finishes it.
"""

from llama2rt.run.directory import Run, abandon
from llama2rt.run.manifest import hash_path, is_complete
from llama2rt.run.recipe import Change, Recipe, check_integers, whole_type

__all__ = [
    "Change",
    "Recipe",
    "Run",
    "abandon",
    "check_integers",
    "hash_path",
    "is_complete",
    "whole_type",
]
