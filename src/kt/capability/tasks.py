"""Which tasks: names as lm-eval has them, patterns, YAML files, folders of one's own, and presets.

A task is code of the user's choosing: a YAML file may name Python functions that stand beside it, and they are run.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import KtError, install_hint, need, said_by

Spec = str | dict[str, Any]
"""A name, a pattern, a YAML file, {"task": name, "num_fewshot": n}, or a whole task as a dict."""

GSM8K_TWO_SHOT: tuple[Spec, ...] = ({"task": "gsm8k", "num_fewshot": 2}, "wikitext")
"""GSM8K with two worked examples (IntAttn-Edit, supplement B.4), and word perplexity on WikiText-2.

The supplement prints PPL and names neither its text nor how an answer is read off: figures of WikiText and lm-eval's
two readings (strict-match, flexible-extract) are this preset's choice.
"""
PRESETS: dict[str, tuple[Spec, ...]] = {"gsm8k-two-shot": GSM8K_TWO_SHOT}


class BadTask(KtError):
    """A task that lm-eval does not know or cannot load."""


class Chosen(NamedTuple):
    """Arguments of `simple_evaluate`, their source and, once it ran, the loaded tasks by name."""

    manager: Any
    specs: list[Spec]
    include_path: str | None
    loaded: dict[str, Any]


def lm_eval_module(name: str = "lm_eval") -> Any:
    """A module of lm-eval, or the line that says how to get it."""
    need("lm_eval", "a measurement of general abilities")
    try:
        return importlib.import_module(name)
    except ImportError as error:  # of a package that it needs
        raise KtError(f"lm-eval cannot be imported ({error}); {install_hint('lm-eval')} mends it") from error


def choose(tasks: str | Sequence[Spec], include_path: str | Path | None = None) -> Chosen:
    """Find the tasks, without loading their data.

    Reading the index of lm-eval's own fourteen thousand tasks takes seconds, so that it is read only where the
    user's folder does not hold everything that was asked for.

    Raises:
        BadTask: no tasks, or one that nobody knows.
        KtError: lm-eval is not installed.
    """
    manager_of = lm_eval_module("lm_eval.tasks").TaskManager
    wanted = [part.strip() for part in tasks.split(",")] if isinstance(tasks, str) else list(tasks)
    wanted = [spec for spec in wanted if spec != ""]
    if not wanted:
        raise BadTask("no tasks to run; name at least one, as --tasks gsm8k,mmlu")
    folder = None if include_path is None else _folder(include_path)
    manager = manager_of(include_path=folder, include_defaults=False) if folder else None
    if manager is None or any(not _found(spec, manager.all_tasks) for spec in wanted):
        manager = manager_of(include_path=folder)
    specs = [match for spec in wanted for match in _known(spec, manager.all_tasks)]
    loaded: dict[str, Any] = {}
    shots = {_name(spec): int(spec["num_fewshot"]) for spec in specs if isinstance(spec, dict) and _has_own_shots(spec)}
    _explain_loading(manager, loaded, shots)
    names: list[Spec] = [_name(spec) if _has_own_shots(spec) else spec for spec in specs]
    return Chosen(manager, names, folder, loaded)


def _has_own_shots(spec: Spec) -> bool:
    """lm-eval reads a dict as a whole task, never as a known one with a value of its own."""
    return isinstance(spec, dict) and spec.keys() == {"task", "num_fewshot"}


def _folder(path: str | Path) -> str:
    if not Path(path).is_dir():
        raise BadTask(f"--include-path {path}: no such folder; name the one that holds your tasks' YAML files")
    return str(path)


def _name(spec: Spec) -> str:
    return spec if isinstance(spec, str) else str(spec.get("task", ""))


def _found(spec: Spec, known: Sequence[str]) -> list[Spec]:
    name = _name(spec)
    if name in known or Path(name).suffix in (".yaml", ".yml") or (isinstance(spec, dict) and not _has_own_shots(spec)):
        return [spec]
    return list(fnmatch.filter(known, name)) if isinstance(spec, str) else []


def _known(spec: Spec, known: Sequence[str]) -> list[Spec]:
    name = _name(spec)
    if Path(name).suffix in (".yaml", ".yml") and name not in known and not Path(name).is_file():
        raise BadTask(f"task file {name} does not exist; give its path, or the name of a task of lm-eval")
    matches = _found(spec, known)
    if not matches:
        near = difflib.get_close_matches(name, known, 3)
        like = f"; is it {' or '.join(near)}?" if near else "; `lm-eval ls tasks` lists them"
        raise BadTask(f"lm-eval knows no task {name!r}{like} (your own need --include-path)")
    return matches


def _explain_loading(manager: Any, loaded: dict[str, Any], shots: Mapping[str, int]) -> None:
    """Make the manager note what it loads, and say in one line why it could not; `shots` by task or group of tasks."""
    load = manager.load

    def explained(specs: list[Spec]) -> Any:
        try:
            tree = load(specs)
        except Exception as error:  # the hub, the network, YAML and every task's own code raise their own kinds
            reason = said_by(error)
            names = ", ".join(map(_name, specs))
            raise BadTask(
                f"task {names} cannot be loaded: {reason} (its data set must be on this machine, or the Hub in reach)"
            ) from error
        loaded.update(tree["tasks"])
        for name, number in shots.items():
            for task in tree["groups"][name].get_all_tasks() if name in tree["groups"] else [tree["tasks"][name]]:
                task.set_config(key="num_fewshot", value=number)
        return tree

    manager.load = explained
