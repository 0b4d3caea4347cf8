"""The `kt` command line: its commands, and how their failures reach the user."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from ..errors import KtError, install_hint
from ..runs import parallel
from . import interrupt, parse, processes
from .command import HELP_NAMES, BadOption, Options, UsageError, as_click
from .console import broken, one_line_warnings
from .session import screen_for, write_result

EPILOG = (
    "Every flag is also KT_<FLAG> in the environment and a key in a --config file. "
    "Exit code: 0 done, 1 the work failed, 2 the input was wrong."
)


class About(NamedTuple):
    """A command: where its function is, what it does in a line, and examples of its use."""

    function: str
    line: str
    examples: tuple[str, ...]


COMMANDS = {
    "demo": About("demo:demo", "The whole loop on the embedded model, with one HTML report.", ("kt demo",)),
    "heatmap": About(
        "heatmap:heatmap",
        "Causal tracing: which layer and token bring the answer back.",
        ("kt heatmap -m MODEL -f facts.jsonl --limit 20 --png map.png",),
    ),
    "alpha": About(
        "heatmap:alpha",
        "The balance factor between attention and MLP, and layers to edit.",
        ("kt alpha -m MODEL -f lre --limit 50",),
    ),
    "layers": About(
        "layers:layers",
        "Which layers to edit: a trace, then edits in windows of layers; a preset file.",
        ("kt layers -m MODEL -f facts.jsonl --method memit --preset-to mine.toml",),
    ),
    "probe": About(
        "probe:probe",
        "The old and the new answer through the layers; with --edit, before and after.",
        ('kt probe -m MODEL --prompt "The capital of {} is" --subject France --answer Paris --foil Rome',),
    ),
    "neurons": About(
        "neurons:neurons",
        "Knowledge neurons: which MLP neurons an answer's probability is due to.",
        ("kt neurons -m MODEL -f facts.jsonl --limit 20",),
    ),
    "cov": About(
        "cov:cov",
        "Take the second moments of the keys over a corpus.",
        ("kt cov -m MODEL --corpus text.txt --layers-mlp 4-8",),
    ),
    "cache": About(
        "cache:cache",
        "What is kept of earlier runs, with sizes; rm removes it.",
        (
            "kt cache ls",
            "kt cache rm --older-than 30d",
        ),
    ),
    "train-editor": About(
        "train_editor:train_editor",
        "Train an editor that learns (MALMEN, MEND) for a model.",
        ("kt train-editor -m MODEL -f facts.jsonl --method malmen -o editor",),
    ),
    "apply-edit": About(
        "apply_edit:apply_edit",
        "Solve an edit for all requests and write it as a file.",
        (
            "kt apply-edit -m MODEL -f facts.jsonl --method memit --evaluate end -o memit",
            'kt apply-edit -m MODEL --prompt "The capital of {} is" --subject France --answer Paris --target Rome',
        ),
    ),
    "eval": About(
        "eval:evaluate",
        "Score a model, or a model with an edit, on a facts file.",
        ("kt eval -m MODEL -f facts.jsonl --edit memit/edit.safetensors",),
    ),
    "abilities": About(
        "abilities:abilities",
        "General abilities through lm-eval, before and after an edit.",
        ("kt abilities -m MODEL --tasks gsm8k --limit 50 --edit memit/edit.safetensors",),
    ),
    "case": About(
        "case:case",
        "One record under several edits, side by side.",
        ("kt case --edits memit=memit/edit.safetensors,ft=ft/edit.safetensors -m MODEL -f facts.jsonl",),
    ),
    "sweep": About(
        "sweep:sweep",
        "One edit a setting: alpha, layers, edits, clamp, modules; with figures; resumable.",
        (
            "kt sweep alpha -m MODEL -f facts.jsonl --grid 0:1:0.1",
            "kt sweep edits -m MODEL -f facts.jsonl --method memit,jeep",
        ),
    ),
    "edits": About(
        "edits:edits",
        "List edit files, show one, compare two, or stack several.",
        (
            "kt edits show memit/edit.safetensors",
            "kt edits stack memit/edit.safetensors ft/edit.safetensors --to both.json -m MODEL",
        ),
    ),
    "export": About(
        "export:export",
        "An edit as a merged Hugging Face folder or as a PEFT adapter; onto the Hub.",
        (
            "kt export memit/edit.safetensors -m MODEL --to merged",
            "kt export memit/edit.safetensors -m MODEL --format peft --push OWNER/NAME --dry-run",
        ),
    ),
    "revert": About(
        "export:revert",
        "Take an edit out of a merged folder, or prove that it is out.",
        ("kt revert merged --to base-again",),
    ),
    "run": About(
        "run:run",
        "A table or figure of the papers by one command, beside the papers' own figures.",
        (
            "kt run ls",
            "kt run methods --only memit,ft -f facts.jsonl",
        ),
    ),
    "explore": About(
        "report:explore",
        "The facts of runs on one page: maps, answers by layer, texts before and after.",
        ("kt explore runs/trace runs/edit -o facts.html",),
    ),
    "report": About(
        "report:report",
        "One HTML page from run folders: verdict, explorer, every result.",
        ("kt report runs/trace runs/edit -o report.html",),
    ),
    "presets": About(
        "presets:presets",
        "List the presets, or explain one: every value with symbol and source.",
        ("kt presets show qwen2.5-7b --method memit",),
    ),
    "ls": About("app:ls", "List models, methods, presets or datasets.", ("kt ls methods",)),
    "env": About("app:env", "Show the versions and devices that a result can depend on.", ("kt env --json -",)),
}
"""By name; a command's module is imported when it runs."""


class Commands(TyperGroup):
    """The table above as a command group; building all options of all commands would take longer than `--help` may."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = parse.meant(args[0], tuple(COMMANDS))
            raise BadOption(f"kt has no command {args[0]!r}{hint or '; kt --help lists them'}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        about = COMMANDS[cmd_name]
        module, _, function = about.function.partition(":")
        room = importlib.import_module(f".{module}", __package__)
        return as_click(cmd_name, getattr(room, function), about.examples)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about.line) for name, about in COMMANDS.items()])


app = typer.Typer(
    name="kt",
    cls=Commands,
    help="Find where a language model keeps a fact, and rewrite it there.",
    epilog=EPILOG,
    # Rich's help and tracebacks would double the time to start.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP_NAMES,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from .. import __version__

        typer.echo(f"kt {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options of `kt` itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `kt` and return its exit code; whatever goes wrong is one line on stderr."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if processes.stands_by(arguments):
        return 0
    interrupt.note()
    if threading.current_thread() is threading.main_thread():
        if argv is not None or parallel.started() > 1:
            signal.signal(signal.SIGTERM, _terminated)
        if argv is None:  # the process is ours
            _open_closed_streams()
            interrupt.hear()
            interrupt.end_soon_after_interrupt()
    code = _run(arguments)
    broken(sys.stdout)  # else Python would fail to flush it at exit
    if argv is None:
        processes.end(code)
        interrupt.leave(code)
        interrupt.deaf()
    return code


def _run(arguments: list[str]) -> int:
    try:
        with one_line_warnings(processes.say):
            command = typer.main.get_command(app)
            code = command.main(args=arguments, prog_name="kt", standalone_mode=False, obj=tuple(arguments))
            sys.stdout.flush()
    except BaseException as error:
        code, line = _explained(KeyboardInterrupt() if interrupt.heard() else error)
        if line:
            processes.last_word(line)
        return code
    if code == interrupt.INTERRUPTED:  # click makes it of a KeyboardInterrupt
        processes.say(interrupt.message())
        return interrupt.code()
    return code if isinstance(code, int) else 0


def _terminated(*_: object) -> None:
    # As an exception it unwinds through the run folders, which remove what is half written.
    raise SystemExit(interrupt.TERMINATED)


def _explained(error: BaseException) -> tuple[int, str]:
    """The exit code, and one line for stderr; an empty one where there is nothing to say."""
    if os.environ.get("KT_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    if isinstance(error, SystemExit):
        if parallel.started() > 1 and error.code == interrupt.TERMINATED:
            processes.say(interrupt.stopped())
            return 1, ""
        return error.code if isinstance(error.code, int) else 1, ""
    if isinstance(error, BrokenPipeError) and broken(sys.stdout):
        return 0, ""
    if isinstance(error, KeyboardInterrupt):
        processes.say(interrupt.message())
        return interrupt.code(), ""
    if isinstance(error, UsageError) and hasattr(error, "ctx"):
        path = error.ctx.command_path if error.ctx is not None else "kt"
        return 2, f"kt: error: {_usage(error, path)} (see {path} --help)"
    known = _refusal(error) or error
    if isinstance(known, KtError):
        return known.exit_code, f"kt: error: {_line(known)}"
    what = f"{type(error).__name__}: {_line(error)[:300]}"
    return 1, f"kt: error: {what} (a bug? KT_DEBUG=1 shows the traceback)"


MEANT_BY = (
    ("--to", "--out", "--output", "--output-dir", "--output-path", "--out-dir", "--save", "--save-to", "--dest"),
    ("--png", "--svg", "--html", "--figure", "--image", "--plot"),
    ("--facts", "--edits", "--data", "--dataset", "--file", "--input"),
    ("--grid", "--values", "--range"),
    ("--model", "--checkpoint", "--pretrained", "--model-name", "--model-path"),
    ("--limit", "--n", "--num", "--max", "--count"),
)
"""Options that mean the same, here or in other programs: one that a command lacks is answered with its own."""


def _usage(error: Any, path: str) -> str:
    """A usage error of click, with what to write instead where that can be said."""
    text = _line(error.format_message())
    flag = getattr(error, "option_name", None)
    if flag is not None and error.ctx is not None and hasattr(error, "possibilities"):
        own = [name for p in error.ctx.command.params for name in p.opts if name.startswith("-")]
        bare = [p for p in error.ctx.command.params if p.param_type_name == "argument"]
        if word := next((p.name.upper() for p in bare if p.name.rstrip("s") == flag.lstrip("-").rstrip("s")), None):
            return f"{path} has no option {flag}; write it without one: {path} {word}"
        if "--set" in own and (setting := flag.lstrip("-").replace("-", "_")) in _settings():
            return f"{path} has no option {flag}, which is a setting of methods; write --set {setting}=VALUE"
        typed = flag.replace("_", "-")
        meant = [name for names in MEANT_BY if typed in names for name in names if name in own]
        if near := meant or get_close_matches(typed, own, 3, cutoff=0.7):
            return f"{path} has no option {flag}; did you mean {' or '.join(near)}?"
        others = [name for name in COMMANDS if flag in _flags(error.ctx, name)]
        more = ", ..." if len(others) > 3 else ""
        have = "have" if len(others) > 1 else "has"
        return f"{path} has no option {flag}" + (f"; kt {', kt '.join(others[:3])}{more} {have} it" if others else "")
    if text.startswith("Got unexpected extra argument"):
        text = f"{path} takes no such word: {text.partition('(s) ')[2].strip('()')}; -m names a model, -f a facts file"
    return text


def _settings() -> Collection[str]:
    from ..editing.methods import all_settings

    return all_settings()


def _flags(ctx: Any, name: str) -> set[str]:
    group = ctx.find_root().command
    return {flag for p in group.get_command(ctx, name).params for flag in p.opts}


def _refusal(error: BaseException) -> KtError | None:
    """A failed write, wherever it happened, is the user's to mend."""
    if not isinstance(error, OSError):
        return None
    from .._util.files import why_not_written

    return why_not_written(error)


def _line(message: object) -> str:
    return " ".join(str(message).split())


def _open_closed_streams() -> None:
    """Where a shell closed stdout or stderr (`>&-`), Python has none."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 -- for as long as the process lives


# `kt ls` and `kt env`: what there is, and what is installed.


@dataclass(frozen=True)
class ListOptions(Options):
    what: Annotated[str, typer.Argument(metavar="models|methods|presets|datasets")] = "models"


def ls(options: ListOptions) -> None:
    """List models, methods, presets or datasets."""
    if options.what not in LISTS:
        hint = parse.meant(options.what, tuple(LISTS))
        raise BadOption(f"kt ls {options.what!r}: unknown; choose among {', '.join(LISTS)}{hint}")
    from ..report import Table

    rows = LISTS[options.what]()
    screen_for(options).tables(Table(["name", "what it is"], rows, f"kt {options.what}"))
    write_result(options, {options.what: [{"name": name, "about": what} for name, what in rows]})


def env(options: Options) -> None:
    """Show the versions, devices and settings that a result can depend on."""
    from ..report.table import pairs
    from ..runs.provenance import environment

    settings = environment()
    rows = [[key, _one_cell(value)] for key, value in settings.items()]
    screen_for(options).tables(pairs(rows, "kt env"))
    write_result(options, settings)


def _one_cell(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{k} {v if v is not None else '(not installed)'}" for k, v in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)


def models() -> list[tuple[str, str]]:
    """The embedded model, and what else is read by structure."""
    return [
        ("demo", "the embedded model: small, trained on the embedded facts, always there"),
        ("FOLDER", "a folder that save_pretrained wrote: config, weights and tokenizer"),
        ("OWNER/NAME[@REVISION]", "a causal language model on the Hugging Face Hub, by its structure: Qwen2, Qwen3, "
         "Llama, Mistral, Gemma, GPT-2, GPT-J, GPT-NeoX, Phi, OPT, OLMo and models built like them"),
    ]  # fmt: skip


def methods() -> list[tuple[str, str]]:
    """The editing methods."""
    from ..editing.methods import METHODS

    return [(name, method.summary) for name, method in METHODS.items()]


def presets() -> list[tuple[str, str]]:
    """The hyper-parameter files that are shipped, with their variants."""
    from ..presets import presets as known

    return [
        (name, preset.summary + (f" (--variant {' or '.join(preset.variants)})" if preset.variants else ""))
        for name, preset in known().items()
    ]


def datasets() -> list[tuple[str, str]]:
    """The embedded facts, and the record formats that a file may have."""
    from ..facts import FORMATS

    known = [(name, f"{format.about}; records hold {format.keys}") for name, format in FORMATS.items()]
    return [
        ("demo", "the embedded facts, which the demo model knows"),
        ("lre", "real facts for any model: triples of the LRE data set under prompts of our own"),
        ("FILE, FOLDER", "a .json, .jsonl, .ndjson, .csv, .tsv or .parquet file, or a folder of them; formats below"),
        ("hf:OWNER/NAME[:FILE]", f"a data set on the Hugging Face Hub ({install_hint('data')})"),
        *known,
    ]


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "models": models,
    "methods": methods,
    "presets": presets,
    "datasets": datasets,
}
