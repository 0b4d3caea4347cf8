"""The rules of the house that a reader cannot see in one file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name as canonical

import kt
from kt.errors import DISTRIBUTION, EXTRAS, UnknownModel, install_hint
from kt.model.hub import one_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src" / "kt").rglob("*.py"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_no_result_of_a_run_is_kept_with_the_code():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    manifests = [name for name in listed.stdout.split("\0") if Path(name).name == "manifest.json"]
    assert all(name.startswith("tests/fixtures/") for name in manifests), manifests


@pytest.mark.parametrize("room", ["tracing", "editing", "figures"])
def test_the_three_names_at_the_root_are_relative_links_into_the_package(room):
    link = ROOT / room
    assert link.is_symlink()
    assert link.readlink() == Path(f"src/kt/{room}")
    assert (link / "__init__.py").is_file()


@pytest.mark.parametrize("room", ["tracing", "editing"])
def test_importing_a_room_from_the_root_is_an_error_and_no_second_copy(room):
    found = subprocess.run(
        [sys.executable, "-c", f"import {room}"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "ImportError" in found.stderr


def test_the_linter_sees_every_source():
    """An exclusion of the links at the root once hid the three rooms themselves, which are called the same."""
    command = [sys.executable, "-m", "ruff", "check", "--show-files", "--no-cache"]
    seen = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split("\n")
    assert {str(path) for path in SOURCES} <= set(seen)


LINT = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]


def test_no_name_is_undefined():
    """mypy's name-defined is off, for shape strings, and an import does not reach the names inside functions."""
    result = subprocess.run([*LINT, "--select", "F821", "."], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, "All checks passed!")


def test_the_linter_reports_an_undefined_name_beside_shape_strings():
    planted = (
        '"""Planted."""\n\nfrom jaxtyping import Float\nfrom torch import Tensor\n\n\n'
        'def planted(x: Float[Tensor, " d"], y: Float[Tensor, "fact layer"]) -> Tensor:\n    return x + y + nowhere\n'
    )
    command = [*LINT, "--stdin-filename", "src/kt/planted.py", "-"]
    result = subprocess.run(command, cwd=ROOT, input=planted, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert re.findall(r"(\w+) Undefined name `(\w+)`", result.stdout) == [("F821", "nowhere")]


HEAVY = ("torch", "nnsight", "transformers", "plotly", "pandas", "numpy", "rich")


@pytest.mark.parametrize("code", ["import kt", "from kt.cli import main; main(['--help'])"])
def test_neither_importing_kt_nor_its_help_loads_what_takes_seconds(code):
    check = f"{code}\nimport sys; sys.stderr.write(','.join(m for m in {HEAVY} if m in sys.modules))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0
    assert found.stderr == ""


def test_help_of_every_command_loads_no_torch():
    check = (
        "import sys\nfrom kt.cli.app import COMMANDS, main\n"
        "codes = [main([name, '--help']) for name in COMMANDS]\n"
        "assert not any(codes), codes\nassert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_every_public_name_is_there():
    assert {name for name in kt.__all__ if not hasattr(kt, name)} == set()
    assert set(kt.__all__) == set(kt._HOMES)
    assert set(kt.__all__) <= set(dir(kt))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = kt.nonsense


def test_the_version_is_that_of_the_package():
    from importlib.metadata import PackageNotFoundError, version

    try:
        assert version(DISTRIBUTION) == kt.__version__
    except PackageNotFoundError:
        pytest.skip("kt is not installed, only on the path")


PLACES = ("src", "docs", "tests", "benchmarks", "tools", "notebooks")
TEXTS = (".py", ".md", ".toml", ".j2", ".sh", ".ipynb")
INSTALL = re.compile(r"\b(?:pip|pipx|uv|uvx)\b[^\n`]*?\b(?:install|add)\b(?P<what>[^\n`#&|;)]*)")
"""An installing command, up to the end of the line, of the code or of the command."""


def texts() -> dict[str, str]:
    """Sources, tests and documents, without this file, which has the wrong names to search for."""
    inside = [path for place in PLACES for path in (ROOT / place).rglob("*") if path.suffix in TEXTS]
    paths = {*inside, *ROOT.glob("*.md"), ROOT / "pyproject.toml", ROOT / "Makefile"} - {Path(__file__)}
    return {relative(path): path.read_text(encoding="utf-8") for path in sorted(paths)}


def foreign(text: str) -> list[str]:
    """Places that would install the project which has our import's name on the package index."""
    words = [word.strip("\\'\"") for match in INSTALL.finditer(text) for word in match["what"].split()]
    named = [word for word in words if re.match(r"kt(?![\w./-])", word)]
    return named + re.findall(r"(?<![\w./-])kt\\?\[[a-z-]+\\?\]", text)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("pip install 'kt[lora]'", True),
        ("python -m pip install --quiet kt", True),
        ("uv pip install kt==0.1", True),
        ("install kt[data]", True),
        (r"match='kt\[lora\]'", True),
        ("pip install 'kt-interp[lora]'", False),
        ("pip install -e . && .venv/bin/kt demo", False),
        ("`pip install pyarrow`, then kt eval", False),
        ("table['kt']", False),
    ],
)
def test_an_install_of_the_other_kt_is_recognised(text, wrong):
    assert bool(foreign(text)) == wrong


def test_nobody_is_told_to_install_the_other_kt():
    held = texts()
    assert {"README.md", "docs/data.md", "src/kt/errors.py", "tests/conftest.py", "pyproject.toml"} <= set(held)
    assert {name: places for name, text in held.items() if (places := foreign(text))} == {}


def test_every_extra_in_a_hint_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == DISTRIBUTION
    everything = "\n".join(texts().values())
    named = re.findall(rf"{DISTRIBUTION}\\?\[([\w,-]+)", everything)
    named += re.findall(r"install_hint\([\"']([\w-]+)[\"']\)", everything)
    hints = {extra for names in named for extra in names.split(",")}
    assert {"data", "lora", "lm-eval"} <= hints <= set(project["optional-dependencies"])


def required(name: str, found: set[str]) -> set[str]:
    """A distribution and all that it requires without extras, of what is installed here."""
    name = canonical(name)
    if name not in found:
        with suppress(PackageNotFoundError):
            found.add(name)
            for line in requires(name) or ():
                need = Requirement(line)
                if need.marker is None or need.marker.evaluate({"extra": ""}):
                    required(need.name, found)
    return found


def imported(tree: ast.Module) -> set[str]:
    """Packages that a module imports where it runs: not those for type checkers alone."""
    typed = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(each) for node in typed for each in ast.walk(node)}
    names, dynamic = set(), "import_module" in ast.unparse(tree)
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module)
        elif dynamic and isinstance(node, ast.arguments):  # of a function that imports what it is given
            names |= {each.value for each in node.defaults if isinstance(each, ast.Constant) and each.value in EXTRAS}
    return {name.partition(".")[0] for name in names}


def test_an_optional_package_is_asked_for_by_the_extra_that_brings_it():
    """Whatever kt imports comes with kt, or is in `EXTRAS`, and the file says by `need` how it is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core: set[str] = set()
    for line in project["dependencies"]:
        required(Requirement(line).name, core)
    homes = packages_distributions()
    ours = sys.stdlib_module_names | {"kt", "tomli", "compression", "IPython"}  # the last where a kernel runs already
    seen = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        optional = {n for n in imported(tree) - ours if not core & {canonical(each) for each in homes.get(n, ())}}
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "need"]
        asked = {call.args[0].value.partition(".")[0] for call in calls}
        missing = {n for n in optional if n not in EXTRAS or EXTRAS[n] not in {EXTRAS[each] for each in asked}}
        assert not missing, (relative(path), missing)
        seen |= optional
    assert seen == set(EXTRAS)
    of_others = {"traitlets": "anywidget", "pyarrow": "datasets"}  # packages that one of an extra requires
    for package, extra in EXTRAS.items():
        brought = {canonical(Requirement(line).name) for line in project["optional-dependencies"][extra]}
        assert canonical(of_others.get(package, package)) in brought


def test_a_tokenizer_that_takes_more_packages_names_their_extra():
    with pytest.raises(UnknownModel, match=re.escape(install_hint("tokenizers"))), one_line("a/model"):
        raise ValueError("You need to have sentencepiece or tiktoken installed to convert a slow tokenizer")


def test_a_checkpoint_whose_reading_takes_another_package_names_it():
    says = "takes the package 'no_such_package', which is not here; install it"
    with pytest.raises(UnknownModel, match=says), one_line("a/model"):
        __import__("no_such_package.inside")


def test_a_hint_installs_ours_with_its_extra():
    assert install_hint("lora") == "pip install 'kt-interp[lora]'"


FORBIDDEN = {
    "a path of one machine": r"[\"'(= ](/home/|/root/|/Users/|/tmp/|/work/)",
    "pickle": r"\b(import pickle|from pickle|pickle\.load|torch\.load\(|joblib)",
    "yaml": r"\bimport yaml",
    "a swallowed exception": r"except( Exception| BaseException)?:\s*(#.*)?\n\s+pass\b",
    "a to-do": r"\b(TODO|FIXME|XXX)\b",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_the_sources_hold_no(what):
    found = [relative(path) for path in SOURCES if re.search(FORBIDDEN[what], path.read_text(encoding="utf-8"))]
    assert found == []


LAYERS = [
    {"errors", "_util"},
    {"stats"},
    {"figures"},
    {"report"},
    {"facts", "runs"},
    {"model"},
    {"evaluation", "tracing"},
    {"probing"},
    {"editing"},
    {"presets", "residual", "experiments", "capability", "export"},
    {"explorer"},
    {"recipes", "demo"},
    {"cli"},
]
"""The rooms from the lowest to the highest; a room imports lower ones, and of its own layer those that do not import
it. `kt/__init__.py` and `kt/__main__.py` stand above all."""
LEVEL = {room: level for level, layer in enumerate(LAYERS) for room in layer}


def rooms_imported() -> dict[str, dict[str, set[str]]]:
    """By room, the rooms that its files import (also inside functions and for types), each with where."""
    graph: dict[str, dict[str, set[str]]] = {}
    for path in SOURCES:
        parts = path.relative_to(ROOT / "src" / "kt").with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                start = parts[: len(parts) - node.level] + tuple(node.module.split(".") if node.module else ())
                for name in [(*start, alias.name)[0] for alias in node.names]:
                    if name in LEVEL and name != parts[0]:
                        graph.setdefault(parts[0], {}).setdefault(name, set()).add(f"{relative(path)}:{node.lineno}")
    return graph


def test_imports_go_down_the_layers_only():
    graph = rooms_imported()
    up = {
        f"{room} -> {other}": sorted(where)
        for room, others in graph.items()
        for other, where in others.items()
        if room in LEVEL
        and (LEVEL[other] > LEVEL[room] or (LEVEL[other] == LEVEL[room] and room in graph.get(other, {})))
    }
    assert up == {}


def test_every_room_has_its_layer():
    rooms = {path.relative_to(ROOT / "src" / "kt").with_suffix("").parts[0] for path in SOURCES}
    assert rooms - {"__init__", "__main__"} == set(LEVEL)


def test_no_room_has_the_name_of_a_public_function():
    """Importing a submodule sets its name in the package: `kt.case_study` was a module once it had been imported."""
    rooms = {path.name.removesuffix(".py") for path in (ROOT / "src" / "kt").iterdir()}
    assert rooms & set(kt.__all__) == set()


def test_public_names_stay_what_they_are_whatever_was_imported_before():
    check = (
        "import importlib, pkgutil, kt\n"
        "for module in pkgutil.walk_packages(kt.__path__, 'kt.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
        "import types\n"
        "modules = [name for name in kt.__all__ if isinstance(getattr(kt, name), types.ModuleType)]\n"
        "assert not modules, modules\n"
        "functions = [name for name in kt.__all__ if name[0].islower()]\n"
        "assert all(callable(getattr(kt, name)) for name in functions)\n"
        "for name in functions:\n"
        "    try: getattr(kt, name)(nonsense=1)\n"
        "    except TypeError as error: assert 'module' not in str(error), (name, error)\n"
        "    except kt.KtError: pass\n"
    )
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr


def test_every_module_says_what_it_is():
    silent = [relative(p) for p in SOURCES if (text := p.read_text(encoding="utf-8")).strip() and text[:3] != '"""']
    assert silent == []


def test_no_two_test_files_share_a_name():
    """Without packages pytest knows a test file by its name alone, and a second one is an error."""
    names = [p.name for p in (ROOT / "tests").rglob("*.py") if p.name != "conftest.py"]
    assert sorted(set(names)) == sorted(names)


def test_warnings_go_through_the_one_function_that_finds_the_users_line():
    direct = [relative(p) for p in SOURCES if "warnings.warn(" in p.read_text(encoding="utf-8")]
    assert direct == []
