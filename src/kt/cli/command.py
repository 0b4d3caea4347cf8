"""One mechanism for every option of every command.

A command is a function of one frozen dataclass whose fields are its options (`Annotated[type, typer.Option(...)]`);
dataclasses inherit, so an option that several commands share is written once. The value of an option comes from the
command line, else from `KT_<FLAG>`, else from the `--config` file, else from the field's default.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from .._util.data import read_table
from ..errors import KtError, warn_user

MOST_USED = "Most used"
FIRST = ("model", "facts", "limit", "method", "layers_mlp", "out")
"""Options that most uses of a command need, where it has them; each options class may name more (`first`)."""
HELP_NAMES = {"help_option_names": ["-h", "--help"]}

# UsageError has no public name of its own in typer; it is what BadParameter is derived from.
UsageError: type[Any] = typer.BadParameter.__mro__[1]
Opts = TypeVar("Opts", bound="Options")


class Command(TyperCommand):
    """A command whose help shows examples first, then the options that most users need, then the others by subject."""

    examples: tuple[str, ...] = ()
    headings: Mapping[str, str] = {}

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            settings = self._settings(ctx, args)
            rest: list[str] = super().parse_args(ctx, args)
        except UsageError as error:  # the parser's own (an option without its value) do not know whose they are
            error.ctx = error.ctx or ctx
            raise
        if settings:
            ctx.params["set"] = ",".join(settings)
        return rest

    def _settings(self, ctx: Any, args: Sequence[str]) -> list[str]:
        """Every `--set` of the command line, which is a list and may come in parts: click keeps the last alone."""
        if all(param.name != "set" for param in self.params):
            return []
        parser: Any = type(self.make_parser(ctx))(ctx)
        for param in self.get_params(ctx):
            if param.name == "set":
                parser.add_option(param, param.opts, param.name, action="append")
            else:
                param.add_to_parser(parser, ctx)
        found: list[str] = parser.parse_args(list(args))[0].get("set", [])
        return found

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        super().format_help_text(ctx, formatter)
        with formatter.section("Example" if len(self.examples) == 1 else "Examples"):
            for example in self.examples:
                formatter.write(f"{' ' * formatter.current_indent}{example}\n")  # whole, so that it can be copied

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[Any]] = {}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                argument = param.param_type_name == "argument"
                heading = "Arguments" if argument else self.headings.get(param.name, "All commands")
                groups.setdefault(heading, []).append(record)
        order = ("Arguments", MOST_USED, "Options")
        for heading in sorted(groups, key=lambda each: order.index(each) if each in order else len(order)):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])


class BadOption(KtError):
    """An option whose value cannot be read."""


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of the options that follow (this option is eager)."""
    if path is not None and not ctx.resilient_parsing:
        ctx.default_map = config_defaults(path, ctx)
    return path


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of every command: where their values come from, and how much it prints."""

    heading: ClassVar[str] = "All commands"
    """Over the options of this class in the help."""
    first: ClassVar[tuple[str, ...]] = ()
    """Its options that stand among the most used ones."""

    config: Annotated[
        Path | None,
        typer.Option("--config", is_eager=True, callback=read_config, help="TOML file with values for any flag."),
    ] = None
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE|-", help="Write the result as JSON; - is stdout.")
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", help="Print no table and no messages.")] = False
    no_progress: Annotated[bool, typer.Option("--no-progress", help="Show no progress bars.")] = False
    command: str = ""
    argv: tuple[str, ...] = ()


def as_click(name: str, function: Callable[[Opts], None], examples: tuple[str, ...] = ()) -> Any:
    """A function of one Options dataclass as a command; its docstring is the help, and `examples` stand below it."""
    (parameter,) = inspect.signature(function, eval_str=True).parameters.values()
    options_class = parameter.annotation

    def run(ctx: typer.Context, **values: Any) -> None:
        check_variables(ctx)
        from . import outputs

        argv = ctx.obj if isinstance(ctx.obj, tuple) else tuple(sys.argv[1:])
        options = options_class(command=name, argv=argv, **values)
        outputs.check(options)
        function(options)

    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += option_parameters(options_class)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    run.__doc__ = function.__doc__
    alone = typer.Typer(rich_markup_mode=None, add_completion=False, pretty_exceptions_enable=False)
    alone.command(name, cls=Command, context_settings=HELP_NAMES)(run)
    command: Any = typer.main.get_command(alone)
    command.examples, command.headings = examples, headings(options_class)
    return command


def headings(options_class: type[Options]) -> dict[str, str]:
    """The heading of each option: that of the class that it is written in, or that of the most used ones."""
    found: dict[str, str] = {}
    for base in reversed(options_class.__mro__):
        found |= {name: vars(base).get("heading", "Options") for name in vars(base).get("__annotations__", {})}
    most = {*FIRST, *options_class.first}
    return {name: MOST_USED if name in most else heading for name, heading in found.items()}


def option_parameters(options_class: type[Options]) -> list[inspect.Parameter]:
    """The fields of an options dataclass that are options or arguments, as the parameters that typer reads."""
    hints = get_type_hints(options_class, include_extras=True)
    # The options of Options itself come last in the help: they matter least.
    fields = sorted(dataclasses.fields(options_class), key=lambda f: f.name in Options.__dataclass_fields__)
    parameters = []
    for field in fields:
        kind, *infos = get_args(hints[field.name]) or (hints[field.name],)
        if not infos or not isinstance(infos[0], type(typer.Option()) | type(typer.Argument())):
            continue
        info = copy(infos[0])
        if isinstance(info, type(typer.Option())):
            info.envvar = variable(field.name)
            info.show_envvar = False
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        annotation = Annotated[kind, info]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        )
    return parameters


def option_of(command: type[Options], name: str) -> Any:
    """Another command's option, taken over as it is: its flag and its meaning are written there alone."""
    return get_args(get_type_hints(command, include_extras=True)[name])[1]


def as_flag(name: str) -> str:
    """An option as it is typed: `layers_mlp` is `--layers-mlp`."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of an option: `--batch-size` is `KT_BATCH_SIZE`."""
    return "KT_" + name.upper()


OTHER_VARIABLES = ("KT_CACHE", "KT_DEBUG", "KT_JUDGE_KEY", "KT_PATIENCE")
"""Variables of kt that are no flag's."""


def check_variables(ctx: typer.Context) -> None:
    """Refuse a `KT_` variable that is a flag's but for its spelling; another program's is only named.

    One that is a flag of another command is left alone, as a key at the top of a config file is.
    """
    stray = [name for name in os.environ if name.startswith("KT_") and name not in OTHER_VARIABLES]
    group: Any = ctx.find_root().command
    if not set(stray) - {variable(p.name or "") for p in ctx.command.params} or not hasattr(group, "list_commands"):
        return
    known = {variable(p.name) for name in group.list_commands(ctx) for p in group.get_command(ctx, name).params}
    for name in sorted(set(stray) - known):
        near = get_close_matches(name, [*sorted(known), *OTHER_VARIABLES], 1, cutoff=0.8)
        if near:
            raise BadOption(f"{name} is set, and no flag has that name; did you mean {near[0]}?")
        if not ctx.params.get("quiet"):
            warn_user(f"{name} is set, and is no variable of kt")


def config_defaults(path: Path, ctx: typer.Context) -> dict[str, Any]:
    """The values of a config file that concern this command.

    A key at the top holds for every command that has that flag; a table named after a command only for that one.
    """
    values = read_table(path)
    group: Any = ctx.find_root().command
    commands = {name: group.get_command(ctx, name) for name in group.list_commands(ctx)}
    flags = {name: {p.name for p in c.params} - {"config", "help"} for name, c in commands.items()}
    mine = flags.get(ctx.info_name or "", set())
    params = {param.name: param for param in ctx.command.params}
    defaults: dict[str, Any] = {}
    for table, keys in [("", values), *((n, v) for n, v in values.items() if isinstance(v, Mapping))]:
        known = flags.get(table, set()) if table else set().union(*flags.values())
        for key, value in keys.items():
            name = key.replace("-", "_")
            if isinstance(value, Mapping) and not table:
                if key not in flags:
                    raise BadOption(f"{path}: [{key}] is no command of kt; tables are named after commands")
            elif name not in known:
                where = f"kt {table} has no flag" if table else "no command of kt has a flag"
                near = get_close_matches(name, sorted(known), 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise BadOption(f"{path}: unknown key {key!r}: {where} {as_flag(key)}{hint}")
            elif name in mine and table in ("", ctx.info_name):
                defaults[name] = _as_typed(value, f"{path}: {key}", params[name])
    return defaults


def _as_typed(value: Any, where: str, option: Any) -> Any:
    """A TOML value as it would be typed: the options parse text.

    Raises:
        BadOption: true or false for an option that takes a value.
    """
    if isinstance(value, bool) and not getattr(option, "is_flag", False):
        raise BadOption(f"{where} = {str(value).lower()}: {as_flag(option.name)} takes a value; write one")
    if isinstance(value, list) and any(isinstance(item, bool) for item in value):
        raise BadOption(f"{where} holds true or false; write the values of {as_flag(option.name)}")
    if isinstance(value, list):
        return ",".join(str(item) for item in value)
    return value if isinstance(value, bool) else str(value)
