"""Where an option's value comes from, and how values are read."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import Annotated

import pytest
import typer

from kt.cli import app as commands
from kt.cli import parse
from kt.cli.command import BadOption, Options, as_click, variable
from kt.cli.options import FactOptions, ModelOptions, RunOptions

SHARED = {
    "model",
    "dtype",
    "device",
    "device_map",
    "batch_size",
    "seed",
    "out",
    "json",
    "quiet",
    "no_progress",
    "config",
}


@dataclasses.dataclass(frozen=True)
class ProbeOptions(RunOptions, FactOptions, ModelOptions):
    kind: Annotated[str, typer.Option("--kind")] = "mlp"


@pytest.fixture
def seen(monkeypatch):
    """A command that only notes its options, in the place of `kt heatmap`."""
    got: list[ProbeOptions] = []

    def probe(options: ProbeOptions) -> None:
        """Note the options."""
        got.append(options)

    monkeypatch.setattr("kt.cli.heatmap.heatmap", probe)
    return got


def test_the_command_line_wins_over_the_environment_over_the_config_over_the_default(kt, seen, monkeypatch):
    assert kt("heatmap").code == 0
    Path("kt.toml").write_text('model = "from-config"\nseed = 7\n')
    assert kt("heatmap", "--config", "kt.toml").code == 0
    monkeypatch.setenv("KT_MODEL", "from-environment")
    assert kt("heatmap", "--config", "kt.toml").code == 0
    assert kt("heatmap", "-m", "typed", "--config", "kt.toml").code == 0
    assert [o.model for o in seen] == ["demo", "from-config", "from-environment", "typed"]
    assert [o.seed for o in seen] == [0, 7, 7, 7]


def test_flags_and_the_config_itself_come_from_the_environment(kt, seen, monkeypatch):
    Path("kt.toml").write_text("quiet = true\nbatch-size = 8\nkind = ['mlp', 'attn']\n")
    monkeypatch.setenv("KT_CONFIG", "kt.toml")
    monkeypatch.setenv("KT_NO_PROGRESS", "1")
    assert kt("heatmap").code == 0
    options = seen[0]
    assert (options.quiet, options.no_progress, options.batch_size, options.kind) == (True, True, "8", "mlp,attn")


def test_a_table_of_the_config_holds_for_its_command_only(kt, seen):
    Path("kt.toml").write_text('seed = 1\nmethod = "memit"\n[heatmap]\nkind = "attn"\n[apply-edit]\nseed = 9\n')
    ran = kt("heatmap", "--config", "kt.toml")
    assert ran.code == 0, ran.err
    assert (seen[0].seed, seen[0].kind) == (1, "attn")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('modle = "x"', "modle"),
        ("[heatmap]\nmerge-to = 1", "kt heatmap has no flag --merge-to"),
        ("[nonsense]\nx = 1", "nonsense"),
        ("seed = ", "not TOML"),
        ('seed = "x"', "--seed"),
    ],
)
def test_a_wrong_config_is_one_line_that_names_the_key(kt, text, says):
    Path("kt.toml").write_text(text)
    ran = kt("heatmap", "--config", "kt.toml")
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert says in ran.err


def test_a_missing_config_is_one_line(kt):
    ran = kt("heatmap", "--config", "none.toml")
    assert ran.code == 2 and "none.toml" in ran.err and ran.err.count("\n") == 1


def test_every_command_that_runs_a_model_has_the_shared_options():
    group = commands.typer.main.get_command(commands.app)
    for name in ("demo", "heatmap", "alpha", "cov", "apply-edit", "eval"):
        flags = {p.name for p in group.get_command(None, name).params}
        assert flags >= SHARED, name


def test_every_option_has_its_variable():
    command = as_click("x", lambda_for(ProbeOptions))
    known = {p.name: p.envvar for p in command.params if p.name != "help"}
    assert known == {name: variable(name) for name in known}
    assert known["batch_size"] == "KT_BATCH_SIZE"


def lambda_for(options_class: type[Options]):
    def run(options) -> None:
        """Nothing."""

    run.__annotations__["options"] = options_class
    return run


def test_help_and_version_are_exit_code_0(kt):
    assert "Usage: kt" in kt().out
    assert "apply-edit" in kt("--help").out
    assert kt("-h").code == kt("heatmap", "-h").code == 0
    assert kt("--version").out.startswith("kt 0.")


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_help_shows_examples_that_can_be_typed_then_each_option_once_by_subject(kt, name):
    command = commands.typer.main.get_command(commands.app).get_command(None, name)
    assert command.examples
    for example in command.examples:
        words = shlex.split(example)
        assert words[:2] == ["kt", name]
        context = command.make_context(name, words[2:])  # raises where an option or a value is none of the command's
        assert set(context.params) >= {"json", "quiet"}
    text = kt(name, "--help").out
    assert all(example in text for example in command.examples)
    flags = [p.opts[0] for p in command.params if p.param_type_name == "option"]
    shown = [line for line in text.splitlines() if line.startswith("  -")]
    assert len(shown) == len(flags) + 1  # --help
    heads = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert heads[0].startswith("Example") and heads[-1] == "All commands:"
    assert len(set(heads)) == len(heads)


def test_the_most_used_options_are_those_of_the_command():
    group = commands.typer.main.get_command(commands.app)
    most = {
        n: [o for o, h in group.get_command(None, n).headings.items() if h == "Most used"] for n in commands.COMMANDS
    }
    assert most["apply-edit"][:3] == ["model", "facts", "limit"]
    assert max(map(len, most.values())) <= 10


def test_every_name_in_the_table_of_commands_exists():
    group = commands.typer.main.get_command(commands.app)
    assert [group.get_command(None, name).name for name in commands.COMMANDS] == list(commands.COMMANDS)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("4-8", (4, 5, 6, 7, 8)),
        ("4", (4,)),
        ("6,1,3-4,3", (1, 3, 4, 6)),
        (" 1 - 2 ", (1, 2)),
        ("none", ()),
        (None, None),
    ],
)
def test_layers(text, layers):
    assert parse.layers(text, "--layers-mlp") == layers


def test_alpha_noise_and_batch_size():
    assert parse.alpha("auto") == "auto" and parse.alpha("0") == 0 and parse.alpha("1e-1") == 0.1
    assert parse.noise("3s") == 3 and parse.noise("0.5s") == 0.5
    assert parse.batch_size("auto") == "auto" and parse.batch_size("8") == 8
    assert parse.names("b,a,b", ("a", "b"), "--kind") == ("b", "a")
    with pytest.raises(BadOption, match="3s"):
        parse.noise("3")


def test_settings_are_typed_by_their_look():
    found = parse.settings("v_lr=0.1, v_num_grad_steps=20,coupled=true,layers_high=5-6,7,spread=sqrt")
    assert found == {"v_lr": 0.1, "v_num_grad_steps": 20, "coupled": True, "layers_high": (5, 6, 7), "spread": "sqrt"}
    assert type(found["v_num_grad_steps"]) is int and parse.settings(None) == {}
    for bad in ("v_lr", "=3", "a b=1", "v_lr="):
        with pytest.raises(BadOption, match="name=value"):
            parse.settings(bad)


def test_an_option_without_its_value_leads_to_its_own_commands_help(kt):
    from kt.cli.app import COMMANDS, Commands

    for name in COMMANDS:
        for option in Commands(name="kt").get_command(None, name).params:
            if option.opts[0].startswith("--") and not option.is_flag:
                ran = kt(name, option.opts[0])
                wanted = f"kt: error: Option '{option.opts[0]}' requires an argument. (see kt {name} --help)\n"
                assert (ran.code, ran.err) == (2, wanted)
