"""`run_recipe`: check the arguments, then run the recipe by its kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .._util.kinds import Wanted, takes
from .._util.notebook_bar import stage_or_bars
from .._util.progress import Stage
from ..facts.corpus import Corpus
from ..facts.load import FactsLike, facts_from
from .base import How, PaperRecipe, refuse_untaken
from .kinds import KINDS
from .reading import read_recipe
from .result import RecipeRun

if TYPE_CHECKING:
    from ..model.model import TracedModel

A_RECIPE: Wanted = ((PaperRecipe, str, os.PathLike), "a recipe's name (kt run ls), or a TOML file")


@takes(recipe=A_RECIPE)
def run_recipe(
    recipe: PaperRecipe | str | Path,
    load: Callable[[str], TracedModel],
    facts: FactsLike | None = None,
    *,
    models: Mapping[str, str] | None = None,
    smoke: bool = False,
    folder: str | Path | None = None,
    resume: bool = False,
    batch_size: int | str = "auto",
    corpus: str | Path | None = None,
    statistics: str | Path | None = None,
    sets: str | Path | None = None,
    only: Sequence[str] | None = None,
    stage: Stage | None = None,
) -> RecipeRun:
    """The paper's table or figure, ours beside what the paper has.

    Args:
        recipe: its name (`kt run ls`), a TOML file, or one that is read.
        load: from a model's id to the model; one model is in memory at a time.
        facts: in place of the recipe's own.
        models: in place of the recipe's own, by its labels: {"qwen2.5-7b": "/path/or/id"}.
        smoke: the demo model on demo facts, few steps, few edits, one seed: that it runs, not what it gives.
        folder: run folder, with one folder a model inside; kinds `edits` and `abilities` only.
        resume: go on with the unfinished run in `folder`.
        corpus: text for second moments, in place of the recipe's; kinds that edit only.
        statistics: a file of second moments, in place of a corpus; kinds that edit only.
        sets: a file of word sets in place of the recipe's; kind `probe` only.
        only: of the rows those of these names; kind `methods` only.
        batch_size: rows a batch, or `auto`.
        stage: opens a stage by name and gives the callback for its progress.

    Returns:
        The tables and figures of the recipe, ours beside the paper's.

    Raises:
        BadFile: the recipe's data has to be fetched by hand, or its corpus is not there.
        KtError: an argument that this kind of recipe does not take, too few facts, or what the kind's own work raises.
    """
    recipe = recipe if isinstance(recipe, PaperRecipe) else read_recipe(recipe)
    refuse_untaken(recipe, resume=resume, corpus=corpus, statistics=statistics, sets=sets, only=only)
    shipped = recipe.smoked().models if smoke else recipe.models
    how = How(
        load=load,
        facts=None if facts is None else facts_from(facts),
        models=dict(shipped if models is None or smoke else models),
        smoke=smoke,
        folder=None if folder is None else Path(folder),
        resume=resume,
        batch_size=batch_size,
        corpus=None if corpus is None else str(corpus),
        statistics=statistics,
        sets=sets,
        only=only,
        stage=stage_or_bars(stage),
    )
    corpus = how.corpus or getattr(recipe.smoked() if smoke else recipe, "corpus", None)
    if statistics is None and corpus is not None:
        Corpus.open(corpus, "").check()  # what is written wrong is said before a model is loaded
    return KINDS[recipe.kind].run(recipe, how)
