"""Nothing that kt ships can run code from a file: no pickle, no eval, no shell; and the scan that says so sees them."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "src")
MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "jsonpickle", "code"}
BUILTINS = {"eval", "exec", "compile", "__import__", "breakpoint"}
CALLS = {
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "pandas.read_pickle", "pandas.read_hdf"),
    *("pd.read_pickle", "pd.read_hdf", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "tempfile.mktemp", "runpy.run_path", "tomllib.eval"),
    *("shutil.unpack_archive", "tarfile.open", "numpy.save", "np.save"),
}
METHODS = {"to_pickle", "read_pickle", "extractall"}
FLAGS = ("trust_remote_code", "allow_pickle", "shell", "weights_only")
"""Arguments whose `True` (of the last one, `False`) lets foreign code run."""
SUFFIXES = {
    *(".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".ckpt", ".h5", ".msgpack", ".so", ".pyc"),
}


def findings(source: str) -> Iterator[str]:
    """What in a module could run code that came from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = node.module or ""
            yield from [f"from {module}"] if module.split(".")[0] in MODULES else []
            yield from (f"from {module} import {a.name}" for a in node.names if f"{module}.{a.name}" in CALLS)
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    if name in BUILTINS or name in CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
        yield f"{name}()"
    if name.endswith("import_module") and node.args and isinstance(node.args[0], ast.Constant):
        yield from [f"{name} of {node.args[0].value}"] if str(node.args[0].value).split(".")[0] in MODULES else []
    for keyword in node.keywords:
        unsafe = keyword.arg != "weights_only"
        if keyword.arg in FLAGS and isinstance(keyword.value, ast.Constant) and keyword.value.value is unsafe:
            yield f"{name}({keyword.arg}={unsafe})"


BAD = (
    *("import pickle", "import torch, dill", "from joblib import load", "import marshal as m"),
    *("torch.load(path)", "from torch import load", "np.load(p, allow_pickle=True)", "frame.to_pickle(p)"),
    *(
        "from shelve import open",
        "eval(text)",
        "exec(text)",
        "compile(t, '', 'exec')",
        "yaml.load(t)",
        "os.system('ls')",
        "subprocess.run(c, shell=True)",
    ),
    *("Model.from_pretrained(n, trust_remote_code=True)", "torch.load(p, weights_only=False)", "__import__('os')"),
    *("importlib.import_module('pickle')", "tarfile.open(p).extractall()", "pd.read_pickle(p)"),
)
GOOD = (
    *("import json", "json.load(file)", "safetensors.torch.load(raw)", "re.compile(p)", "from .pickle import x"),
    *("Model.from_pretrained(n, trust_remote_code=asked)", "subprocess.run(c)", "model.eval()"),
    "np.load(p, allow_pickle=False)",
)


@pytest.mark.parametrize("source", BAD)
def test_the_scan_sees(source):
    assert list(findings(source))


@pytest.mark.parametrize("source", GOOD)
def test_the_scan_lets_pass(source):
    assert list(findings(source)) == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The files of the wheel, built from a copy."""
    pytest.importorskip("setuptools", reason="the wheel is built with setuptools, which is not installed")
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in NEEDED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, copy)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(out)]
    built = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=300)
    if built.returncode:
        pytest.skip(f"the wheel cannot be built here: {built.stderr.strip().splitlines()[-1:]}")
    [path] = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_no_code_that_runs_what_it_reads(wheel):
    sources = {name: raw.decode() for name, raw in wheel.items() if name.endswith(".py")}
    assert len(sources) > 150 and "kt/_util/data.py" in sources
    assert {name: found for name, text in sources.items() if (found := sorted(set(findings(text))))} == {}


def test_the_wheel_holds_no_file_that_would_have_to_be_unpickled(wheel):
    assert {"kt/demo/model/model.safetensors", "kt/demo/facts.jsonl"} <= wheel.keys()
    assert [name for name in wheel if Path(name).suffix in SUFFIXES] == []
    assert [name for name, raw in wheel.items() if raw[:1] == b"\x80" or raw[:2] == b"PK"] == []


def test_the_names_in_the_wheel_stay_in_their_folder(wheel):
    assert [name for name in wheel if name.startswith("/") or ".." in name or "\\" in name] == []
