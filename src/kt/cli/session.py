"""The work of a command around its one library call: load model and facts, fill the run folder, write the JSON."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .._util.data import SCHEMA_VERSION, plain, read_json, to_json
from .._util.files import atomic_write, write_named
from ..errors import KtError
from ..facts.corpus import Corpus, corpus_for, tokens_for
from ..runs import parallel
from ..runs.folder import RunFolder, default_folder, is_finished
from ..runs.journal import SETTINGS, Journal, claim, todays_names
from ..runs.provenance import versions
from . import checks, interrupt, outputs, parse, processes
from .command import BadOption, Options
from .console import Screen, print_out
from .options import FactOptions, FigureOptions, LongRunOptions, ModelOptions, RunOptions

if TYPE_CHECKING:
    from ..editing.stack import AnyEdit
    from ..facts.fact import Fact
    from ..facts.load import Loaded
    from ..model.model import TracedModel
    from ..report import Figure, Result

O = TypeVar("O", bound=Options)  # noqa: E741


@dataclass
class Session:
    """One run of one command."""

    options: Any
    screen: Screen
    run: RunFolder
    path: Path
    figures: dict[str, Any] = field(default_factory=dict)
    heading: str = ""
    beside: list[Path] = field(default_factory=list)
    """Files and folders that the run wrote elsewhere."""

    _model: TracedModel | None = None
    _facts: list[Fact] | None = None
    _journal: Journal | None = None

    def load_model(self) -> TracedModel:
        """The model that the options name, noted in the manifest; loaded once."""
        if self._model is None:
            from ..model.identity import of_a_run

            self._model = load_model(self.options)
            self._ask_in_chat(self._model)
            self.run.describe_model(self._model)
            parallel.assert_equal_on_ranks(
                {"model": self.run.manifest["model"]["fingerprint"], "dtype": self.run.manifest["dtype"]}
                | (of_a_run(self._model) if parallel.joined() else {})
            )
        return self._model

    def _ask_in_chat(self, model: TracedModel) -> None:
        """Put the model's prompts into its chat template, as the options say; one line says what `auto` found."""
        if not hasattr(self.options, "chat"):
            return
        from ..model.chat import choose

        model.chat, line = choose(model, parse.chat(self.options))
        if line is not None:
            self.screen.say(f"kt: {line}")

    def load_facts(self) -> list[Fact]:
        """The facts that the options name, noted in the manifest with what was left out of them; read once."""
        if self._facts is None:
            loaded = load_facts(self.options)
            if parallel.joined():
                from ..facts.fact import facts_digest

                parallel.assert_equal_on_ranks({"set of facts": facts_digest(loaded.facts)})
            by_hand = self.options.prompt is not None
            source, skips = "by hand" if by_hand else self.options.facts, loaded.skips
            self.run.describe_data(source, len(loaded.facts), skips.reasons)
            if skips.total:
                self.run.manifest["data"] |= {"records": skips.records, "formats": dict(skips.formats)}
                self.screen.say(f"kt: {skips}")
            for note in skips.noted:
                self.screen.say(f"kt: {note}")
            self._facts = loaded.facts
        return self._facts

    def journal(self) -> Journal:
        """Where this run keeps its finished phases until it is whole: beside the run folder, as NAME.unfinished."""
        if self._journal is not None:
            return self._journal
        from ..facts.fact import facts_digest
        from ..model.identity import of_a_run

        typed = option_values(self.options) | {"command": self.options.command}
        typed.pop("force", None)  # decides on an exit code, and no number
        for name in ("chat", "system", "thinking", "chat_turn"):  # what they come to is the "model's chat" of of_a_run
            typed.pop(name, None)
        model = of_a_run(self.load_model())
        weights = self.run.manifest["model"]["fingerprint"]  # of gigabytes: hashed once a command
        given = model | {"model weights": weights, "facts' content": facts_digest(self.load_facts())}
        files = {f"{name} file": stamp(getattr(self.options, name, None)) for name in DATA_FILES}
        if (corpus := getattr(self.options, "corpus", None)) is not None:
            given["corpus identity"] = Corpus.open(corpus, self.options.model).identity
        settings = typed | given | files | {"versions": versions()}
        folder, resume = unfinished(self.path), self.options.resume is not None
        if resume and (folder / SETTINGS).is_file():  # an option that the older kt lacked, and that nobody gave
            noted, usual = read_json(folder / SETTINGS), {each.name: each.default for each in fields(self.options)}
            settings = {n: v for n, v in settings.items() if n in noted or n not in usual or v != plain(usual[n])}
        self._journal = Journal.begin(folder, settings, resume, self.options.argv)
        interrupt.note(self.kept())
        if resume:
            self.screen.say(f"kt: {self._journal.done} finished phases are taken from {folder}")
        return self._journal

    def end_journal(self, error: BaseException | None = None) -> None:
        """Remove the journal of a run that is whole or had finished nothing; else tell how to go on."""
        if self._journal is None or self._journal.folder is None:
            return
        journal, self._journal = self._journal, None
        if not parallel.is_main():
            return
        journal.release()
        wrong = isinstance(error, KtError) and not error.passing and not interrupt.heard()
        wrong = wrong and self.options.resume is None
        if error is None or wrong or not journal.done:
            shutil.rmtree(unfinished(self.path), ignore_errors=True)
            interrupt.note()
        elif isinstance(error, KtError) and error.passing:
            error.args = (f"{error}; {self.kept()}",)
        elif not isinstance(error, KtError | KeyboardInterrupt) and not (
            parallel.joined() and isinstance(error, SystemExit)
        ):
            self.screen.say(f"kt: {self.kept()}")

    def kept(self) -> str:
        """How an unfinished run goes on."""
        return f"what was finished is kept: go on with --resume {self.path}"

    def progress(self, what: str) -> Any:
        """A progress bar for a library function."""
        return self.screen.progress(what)

    def keep(self, result: Result, figures: Sequence[Figure] | None = None, **more: Any) -> None:
        """Take a result as the run's: its JSON with `more`, and its figures (or `figures`) by name."""
        self.run.results, self.heading = result.as_dict() | more, f": {getattr(result, 'heading', result.kind)}"
        figures = result.figures() if figures is None else figures
        self.figures = {figure.name: figure.figure for figure in figures if figure.only != "page"}

    def page(self) -> str:
        """All figures on one page that opens offline."""
        from ..report import Figure, Section, render

        sections = [Section(name.replace("-", " "), [Figure(figure)]) for name, figure in self.figures.items()]
        return render(
            f"kt {self.options.command}{self.heading}", sections, {"command": shlex.join(["kt", *self.options.argv])}
        )

    def write_asked_figures(self) -> None:
        """`--html` is the page; `--png` and `--svg` the first figure, with the others' names added to its own."""
        from ..figures import images

        files = wanted_files(self.options)
        if "html" in files:
            self.beside.append(write_named(files.pop("html"), self.page()))
        for kind, path in files.items():
            pictures = images([(figure, kind) for figure in self.figures.values()])
            for number, (name, picture) in enumerate(zip(self.figures, pictures, strict=True)):
                named = path
                if number:
                    beside = path.with_stem(f"{path.stem}-{name}")
                    named = outputs.further(self.options, beside)
                    if named != beside:
                        self.screen.warn(f"{beside} is a file that kt does not write over; this figure is {named}")
                self.beside.append(write_named(named, picture))


@contextmanager
def session(
    options: RunOptions, write: bool = True, before_model: Callable[[Session], object] | None = None
) -> Iterator[Session]:
    """A run folder around the body, and its results as JSON after it.

    Every process that shares the command's work runs the body. `write=False` keeps no folder (a dry run).

    Everything typed is checked before the model loads (`before_model`: the command's own checks of it), and
    nothing is left behind when the body raises.
    """
    settle_libraries()
    screen = screen_for(options)
    processes.meet(options, option_values(options))
    path = parallel.on_rank_zero("what was typed", _checked, options)
    resumes = getattr(options, "resume", None) is not None
    run = RunFolder(
        path,
        command=options.command,
        argv=options.argv,
        keep=write,
        overwrite=options.overwrite or (resumes and isinstance(options, LongRunOptions)),
        continues=resumes and not isinstance(options, LongRunOptions),  # the points of a sweep lie in its folder
    )
    current = Session(options, screen, run, path)
    screen.hold()
    try:
        with run:
            run.manifest["seed"] = options.seed
            run.manifest["config"] = option_values(options)
            try:
                if isinstance(options, FactOptions):
                    current.load_facts()  # refused before the command imports a library
                if before_model is not None:
                    before_model(current)
                if isinstance(options, ModelOptions):
                    checks.model(options)
                yield current
            except BaseException as error:
                interrupt.undisturbed()
                current.end_journal(error)  # before the run folder takes away the parents that it made
                raise
            if current.figures and processes.speaks():
                atomic_write(run.file("figures.html"), current.page())
    except BaseException as error:
        interrupt.undisturbed()
        current.end_journal(error)
        if isinstance(error, Exception):
            screen.release()
        raise
    current.end_journal()
    if not processes.speaks():
        return
    current.write_asked_figures()
    current.beside += write_json_to(options, run.results)
    screen.release()
    screen.written(*[run.path] * write, *current.beside)


def _checked(options: RunOptions) -> Path:
    """The run folder's name; options are checked before anything is loaded."""
    outputs.check_places(options)
    parse.batch_size(options.batch_size)
    checks.typed(options)
    slug = Path(getattr(options, "model", "demo").partition("@")[0]).name
    path = run_path(options) or default_folder(options.command, slug)
    if isinstance(options, LongRunOptions) and not getattr(options, "dry_run", False):
        if options.resume is not None and not unfinished(path).exists() and is_finished(path):
            raise BadOption(f"--resume {options.resume}: that run is finished; leave --resume out to begin another one")
        claim(unfinished(path), {}, options.resume is not None)
    return path


def run_path(options: RunOptions) -> Path | None:
    """The folder that `--out` or `--resume` names."""
    resume = getattr(options, "resume", None)
    if resume is None or not isinstance(options, LongRunOptions):
        return options.out
    path = resume.with_name(resume.name.removesuffix(UNFINISHED))
    if options.out not in (None, path):
        raise BadOption("--resume and --out name two folders; --resume is enough")
    return path


UNFINISHED = ".unfinished"
DATA_FILES = ("statistics", "alpha_facts", "history", "preset")
"""Options that name files on whose content a result depends."""


def unfinished(path: Path) -> Path:
    """Where the run that will be `path` keeps its journal: a finished run that stands there is not touched."""
    return path.absolute().with_name(path.absolute().name + UNFINISHED)


def with_todays_names(options: O) -> O:
    """A resumed run's options, with today's name of what a run of an older version could be begun with."""
    given = getattr(options, "set", None)
    if given is None or getattr(options, "resume", None) is None:
        return options
    return replace(options, set=todays_names(given))  # type: ignore[type-var,call-arg]


def stamp(file: Path | str | None) -> list[int] | None:
    """Size and time of a file that a run depends on and that is too large to be read for this."""
    if file is None or not Path(file).is_file():
        return None  # a name of ours, a Hub id, or a list of files
    about = Path(file).stat()
    return [about.st_size, about.st_mtime_ns]


NO_CONFIG = (
    "config",
    "json",
    "quiet",
    "no_progress",
    "command",
    "argv",
    "out",
    "overwrite",
    "html",
    "png",
    "svg",
    "resume",
)
"""Options that decide where results go, not their values."""


def option_values(options: Options) -> dict[str, Any]:
    """The options of a command that its results depend on, defaults included."""
    named = (field.name for field in fields(options))
    values = {name: plain(getattr(options, name)) for name in named if name not in NO_CONFIG}
    if isinstance(corpus := values.get("corpus"), str):
        values["corpus"] = corpus_for(corpus, str(values.get("model")))  # a later kt may choose another text
        if "max_tokens" in values:
            values["max_tokens"] = tokens_for(values["corpus"], values["max_tokens"])
    return values


def screen_for(options: Options) -> Screen:
    """The command's screen; `--quiet`, or being another process than rank 0, also silences what the library says."""
    quiet = options.quiet or not processes.speaks()
    if quiet:
        warnings.simplefilter("ignore")
        logging.getLogger("kt").setLevel(logging.WARNING)
    return Screen(quiet, not options.no_progress, json_on_stdout=options.json == "-")


def write_result(options: Options, results: dict[str, Any], *written: Path) -> None:
    """`--json -` prints the result, `--json FILE` writes it; then a command without a run says what it wrote."""
    screen_for(options).written(*written, *write_json_to(options, results))


def write_json_to(options: Options, results: dict[str, Any]) -> list[Path]:
    """Print or write the result as `--json` asks; the file, where there is one."""
    if options.json is None:
        return []
    text = to_json({"schema_version": SCHEMA_VERSION, **results})
    if options.json != "-":
        return [write_named(options.json, text)]
    print_out(text)
    return []


def load_model(options: ModelOptions) -> TracedModel:
    """`kt.load` with the shared model options."""
    checks.model(options)
    from ..model.load import load

    return load(
        options.model,
        dtype=options.dtype,
        device=options.device,
        device_map=options.device_map,
        trust_remote_code=options.trust_remote_code,
        remote=getattr(options, "remote", False),
        layout=getattr(options, "layout", None),
    )


def load_facts(options: FactOptions) -> Loaded:
    """The facts file with what was left out of it, or the one fact typed by hand."""
    from ..facts.fact import doubts, joined_by
    from ..facts.load import Loaded, Skips, fact_by_hand, read_facts

    if options.prompt is None:
        stray = [f for f in ("subject", "answer", "foil", "target") if getattr(options, f) is not None]
        if stray:
            raise BadOption(f"--{stray[0]} belongs to a fact by hand; give --prompt and --subject with it")
        return read_facts(options.facts, options.limit, known_to=options.known_to, **reading(options))
    if options.subject is None:
        raise BadOption("--prompt needs --subject, the entity that stands for {} in the prompt")
    fact = fact_by_hand(options.prompt, options.subject, options.answer, options.foil, options.target)
    skips = Skips()
    for what in doubts(fact) if "{}" not in options.prompt else ():
        skips.note(what, repr(fact.prompt))
    return Loaded([joined_by(fact, reading(options)["join"])], skips)


def reading(options: FactOptions) -> dict[str, Any]:
    """How a file's records are read, as arguments of `read_facts`."""
    join = None if options.join is None else options.join.replace("\\n", "\n").replace("\\t", "\t")
    return {"format": options.format, "zsre_target": options.zsre_target, "join": join}


def wanted_files(options: FigureOptions | Any) -> dict[str, Path]:
    """The figure files asked for by `--html`, `--png`, `--svg`."""
    return {kind: path for kind in ("html", "png", "svg") if (path := getattr(options, kind, None)) is not None}


LIBRARY_SETTINGS = {
    # Hugging Face's own bars and notes would mix with ours on stderr.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    # Threads that spin while they wait made tracing a small model four times slower on a busy two-core machine.
    "OMP_WAIT_POLICY": "PASSIVE",
}


def settle_libraries() -> None:
    """Set environment variables before torch and transformers are imported; the user's own values win."""
    for name, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(name, value)


# The edits that `--edit` names, opened and held against the model before any work is done with them.


def open_edit(s: Session, path: Path) -> AnyEdit:
    """The edit or the stack in a file, as one that fits the session's model; the session's options hold `force`.

    The file is read before the model loads, which takes longer.

    Raises:
        BadFile: it is no edit.
        KtError: the model's weights are not those it was solved for, and there is no `--force`.
    """
    return open_edits(s, {"": path})[""]


def open_edits(s: Session, paths: dict[str, Path]) -> dict[str, AnyEdit]:
    """Several, by the same names."""
    from ..editing.stack import open_edit as opened

    edits = {name: opened(path) for name, path in paths.items()}
    return {name: edit.for_model(s.load_model(), s.options.force) for name, edit in edits.items()}
