"""What every working command does around its one library call: model, facts, run folder, JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artifacts import SCHEMA_VERSION, atomic_write, to_json
from ..run_folder import RunFolder, default_folder
from . import parse
from .command import BadOption, Options
from .console import Screen
from .options import FactOptions, FigureOptions, ModelOptions, RunOptions

if TYPE_CHECKING:
    from ..facts.fact import Fact
    from ..model import TracedModel


@dataclass
class Session:
    """One run of one command."""

    options: Any
    screen: Screen
    run: RunFolder
    figures: dict[str, Any] = field(default_factory=dict)

    def load_model(self) -> TracedModel:
        """The model that the options name, noted in the manifest."""
        model = load_model(self.options)
        self.run.describe_model(model)
        return model

    def load_facts(self) -> list[Fact]:
        """The facts that the options name, noted in the manifest."""
        facts = load_facts(self.options)
        by_hand = self.options.prompt is not None
        self.run.describe_data("by hand" if by_hand else self.options.facts, len(facts))
        return facts

    def progress(self, what: str) -> Any:
        """A progress bar for a library function."""
        return self.screen.progress(what)

    def keep(self, results: dict[str, Any], arrays: dict[str, Any] | None = None, **figures: Any) -> None:
        """The run's results, raw arrays, and figures by file name (without ending)."""
        self.run.results = results
        self.run.arrays = arrays or {}
        self.figures |= figures

    def write_figures(self) -> None:
        """All figures into the run folder; the first also to `--html`, `--png`, `--svg`."""
        from ..figures import write_figure

        for name, figure in self.figures.items():
            write_figure(figure, html=self.run.file(f"{name}.html"))
        asked = wanted_files(self.options)
        if asked and self.figures:
            write_figure(next(iter(self.figures.values())), **asked)


@contextmanager
def session(options: RunOptions) -> Iterator[Session]:
    """A run folder around the body; its results as JSON after it.

    Everything typed is checked before the model loads, and nothing is left behind when the body raises.
    """
    screen = screen_for(options)
    parse.batch_size(options.batch_size)
    slug = Path(getattr(options, "model", "demo").partition("@")[0]).name
    path = options.out or default_folder(options.command, slug)
    with RunFolder(path, command=options.command, argv=options.argv) as run:
        run.manifest["seed"] = options.seed
        current = Session(options, screen, run)
        yield current
        current.write_figures()
    write_result(options, run.results)
    screen.say(f"kt: written to {path}")


def screen_for(options: Options) -> Screen:
    """Where this command may print."""
    return Screen(options.quiet, not options.no_progress, json_on_stdout=options.json == "-")


def write_result(options: Options, results: dict[str, Any]) -> None:
    """`--json -` prints the result, `--json FILE` writes it."""
    if options.json is None:
        return
    text = to_json({"schema_version": SCHEMA_VERSION, **results})
    if options.json == "-":
        sys.stdout.write(text)
    else:
        atomic_write(options.json, text)


def load_model(options: ModelOptions) -> TracedModel:
    """`kt.load` with the shared model options."""
    quiet_libraries()
    from ..loading import load

    return load(
        options.model,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
        trust_remote_code=options.trust_remote_code,
    )


def load_facts(options: FactOptions) -> list[Fact]:
    """The facts file, or the one fact typed by hand."""
    from ..facts.load import fact_by_hand
    from ..facts.load import load_facts as read

    if options.prompt is None:
        stray = [f for f in ("subject", "answer", "foil", "target") if getattr(options, f) is not None]
        if stray:
            raise BadOption(f"--{stray[0]} belongs to a fact by hand; give --prompt and --subject with it")
        return read(options.facts, limit=options.limit)
    if options.subject is None:
        raise BadOption("--prompt needs --subject, the entity that stands for {} in the prompt")
    return [fact_by_hand(options.prompt, options.subject, options.answer, options.foil, options.target)]


def wanted_files(options: FigureOptions | Any) -> dict[str, Path]:
    """The figure files asked for by `--html`, `--png`, `--svg`."""
    return {kind: path for kind in ("html", "png", "svg") if (path := getattr(options, kind, None)) is not None}


def quiet_libraries() -> None:
    """Hugging Face's own bars and notes would mix with ours on stderr."""
    import os

    for name, value in {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}.items():
        os.environ.setdefault(name, value)
