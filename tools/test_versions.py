"""Run the tests on the oldest and on the newest transformers and nnsight that pyproject.toml allows.

Each end has a virtual environment of its own beside `.venv`, so that a second run installs only what changed.

    python tools/test_versions.py [oldest|newest] [arguments of pytest ...]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
BOUNDED = ("transformers", "nnsight")
ENDS = ("oldest", "newest")


def wanted(end: str, dependencies: Sequence[str]) -> list[str]:
    """What pip is asked for: the lower bounds themselves, or the newest within the bounds."""
    requirements = [r for r in map(Requirement, dependencies) if r.name in BOUNDED]
    if end == "newest":
        return [str(requirement) for requirement in requirements]
    return [f"{r.name}=={s.version}" for r in requirements for s in r.specifier if s.operator == ">="]


def python_of(end: str) -> Path:
    """The interpreter of this end's environment, made if it is not there."""
    folder = ROOT / f".venv-{end}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    return python


def run(end: str, arguments: Sequence[str]) -> int:
    """Install what this end asks for and run pytest with it; its exit status."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    python, versions = python_of(end), wanted(end, dependencies)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*install, "-e", ".[dev]", *versions], cwd=ROOT, check=True)
    show = (
        "import transformers, nnsight; print(transformers.__version__, 'and nnsight', nnsight.__version__, flush=True)"
    )
    sys.stdout.write(f"{end}: transformers ")
    sys.stdout.flush()
    subprocess.run([python, "-c", show], cwd=ROOT, check=True)
    return subprocess.run([python, "-m", "pytest", *(arguments or ["-n", "2"])], cwd=ROOT).returncode


def main(arguments: Sequence[str]) -> int:
    """Every end even when the first fails, so that one run says all."""
    ends = [arguments[0]] if arguments and arguments[0] in ENDS else list(ENDS)
    rest = [argument for argument in arguments if argument not in ENDS]
    return max(run(end, rest) for end in ends)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="an end (oldest or newest), then pytest's arguments"
    )
    raise SystemExit(main(parser.parse_args().arguments))
