"""The papers' tables and figures as data: one TOML each, run to a table in the paper's layout.

    recipe = read_recipe("intattn-table-1")
    found = run_recipe(recipe, kt.load, smoke=True)           # the demo model: not the paper's figures
    found.markdown()                                          # the paper's layout, ours beside theirs

The files stand in `toml/`; docs/recipes.md says what they hold.
"""

from .reading import Cited, Line, PaperRecipe, names, read_recipe
from .run import run_recipe
from .table import Cell, RecipeRun

__all__ = ["Cell", "Cited", "Line", "PaperRecipe", "RecipeRun", "names", "read_recipe", "run_recipe"]
