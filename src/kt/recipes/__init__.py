"""The papers' tables and figures as data: one TOML each, run to what the paper has, ours beside it.

    recipe = read_recipe("intattn-table-1")
    found = run_recipe(recipe, kt.load, smoke=True)           # the demo model: not the paper's figures
    found.markdown()                                          # the paper's layout, ours beside theirs
    found.figures()                                           # plotly figures by name, where the paper has some

The files stand in `toml/`; docs/recipes.md says what they hold. A recipe's `kind` says what runs: `edits` and
`abilities` give a table, `trace` and `probe` a figure and what the paper claims of it, `case` one record's answers.
"""

from ..report import Table
from .base import PaperRecipe
from .claims import Verdict
from .edited import Cited, Line
from .kinds import KINDS
from .reading import names, read_recipe
from .result import RecipeRun
from .run import run_recipe
from .table import Cell

__all__ = [
    "KINDS",
    "Cell",
    "Cited",
    "Line",
    "PaperRecipe",
    "RecipeRun",
    "Table",
    "Verdict",
    "names",
    "read_recipe",
    "run_recipe",
]
