"""Residuals as files, and several residuals as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy import ndarray

from ..artifacts import load_arrays, save_arrays, whole
from ..errors import BadFact
from ..tracing.cases import LeftOut
from .attacks import STATES, Attacks
from .controls import Control
from .lens import Reading
from .questions import ProbedFact
from .residual import Residual

FILE_KIND = "residual"
_ARRAYS = ("prob", "rank", "start_prob", "start_rank")
_SAME = ("model", "revision", "n_layers", "vocab", "final_norm", "seed", "n_boot", "prefixes")
"""What residuals must share before their facts are averaged together."""


def save(residual: Residual, path: str | os.PathLike[str]) -> Path:
    """Arrays `<state>.prob`, `<state>.rank`, ... and `<state>.attacks` for both states, and `elsewhere`."""
    arrays: dict[str, ndarray] = {"elsewhere": residual.elsewhere}
    for state in STATES:
        reading = residual.readings[state]
        arrays |= {f"{state}.{name}": getattr(reading, name) for name in _ARRAYS}
        arrays[f"{state}.attacks"] = getattr(residual.attacks, state)
    return save_arrays(
        path,
        arrays,
        {
            "kind": FILE_KIND,
            "facts": [asdict(fact) for fact in residual.facts],
            "controls": [[control._asdict() for control in some] for some in residual.controls],
            "layers": list(residual.layers),
            "attacks": list(residual.attacks.names),
            "left_out": [fact._asdict() for fact in residual.left_out],
            "run": dict(residual.metadata),
            "results": residual.as_dict(),
        },
    )


def load(path: str | os.PathLike[str]) -> Residual:
    """Read what `save` wrote; the results are worked out again from the arrays.

    Raises:
        BadFile: not there, not whole, or not a residual.
    """
    arrays, header = load_arrays(path, kind=FILE_KIND)
    with whole(path, "residual", "measure it again"):
        facts = tuple(ProbedFact(**fact) for fact in header["facts"])
        controls = tuple(tuple(Control(**control) for control in some) for some in header["controls"])
        readings = {s: _reading({name: arrays[f"{s}.{name}"] for name in _ARRAYS}) for s in STATES}
        attacks = Attacks(tuple(header["attacks"]), *(arrays[f"{s}.attacks"] for s in STATES))
        left_out = tuple(LeftOut(**fact) for fact in header["left_out"])
        layers, elsewhere = tuple(header["layers"]), arrays["elsewhere"]
        found = Residual(facts, controls, layers, readings, elsewhere, attacks, left_out, header["run"])
        _check_shapes(found)
        return found


def _reading(arrays: dict[str, ndarray]) -> Reading:
    return Reading(**arrays, sets=None)


def _check_shapes(residual: Residual) -> None:
    n, layers, names = len(residual.facts), len(residual.layers), len(residual.attacks.names)
    if len(residual.controls) != n:
        raise ValueError(f"{n} facts and {len(residual.controls)} rows of controls")
    for state in STATES:
        reading, attacks = residual.readings[state], getattr(residual.attacks, state)
        if reading.rank.shape[:4] != (n, 2, 3, layers) or reading.prob.shape != reading.rank.shape:
            raise ValueError(f"the {state} reading has the shape {reading.rank.shape}")
        if attacks.shape[:2] != (n, names):
            raise ValueError(f"the {state} attacks have the shape {attacks.shape}")
    if residual.elsewhere.shape != (n, 2, 3, layers):
        raise ValueError(f"elsewhere has the shape {residual.elsewhere.shape}")


def joined(parts: Sequence[Residual]) -> Residual:
    """See `Residual.joined`. Facts are numbered on from list to list."""
    _refuse_unequal(parts)
    facts: list[ProbedFact] = []
    left_out: list[LeftOut] = []
    start = 0
    for part in parts:
        facts += [replace(fact, index=fact.index + start) for fact in part.facts]
        left_out += [fact._replace(fact=fact.fact + start) for fact in part.left_out]
        start += int(part.metadata["n_given"])
    readings = {}
    for state in STATES:
        read = [part.readings[state] for part in parts]
        readings[state] = _reading({name: np.concatenate([getattr(r, name) for r in read]) for name in _ARRAYS})
    attacks = Attacks(parts[0].attacks.names, *(np.concatenate([getattr(p.attacks, s) for p in parts]) for s in STATES))
    elsewhere = np.concatenate([part.elsewhere for part in parts])
    about = dict(parts[0].metadata) | {"n_given": start, "parts": len(parts)}
    about["warnings"] = sorted({text for part in parts for text in part.metadata.get("warnings", ())})
    controls = tuple(some for part in parts for some in part.controls)
    return Residual(tuple(facts), controls, parts[0].layers, readings, elsewhere, attacks, tuple(left_out), about)


def _refuse_unequal(parts: Sequence[Residual]) -> None:
    if not parts:
        raise BadFact("there are no residuals to join; give at least one")
    first = parts[0]
    for part in parts[1:]:
        for name in _SAME:
            if part.metadata.get(name) != first.metadata.get(name):
                raise BadFact(
                    f"residuals of {name} {first.metadata.get(name)!r} and {part.metadata.get(name)!r} do not join; "
                    "measure both the same way"
                )
        if part.layers != first.layers or part.attacks.names != first.attacks.names:
            raise BadFact("residuals of other layers or attacks do not join; measure both the same way")
    seen: set[tuple[str, str, int, int]] = set()
    for fact in (fact for part in parts for fact in part.facts):
        if fact.said in seen:
            raise BadFact(f"{fact.prompt!r} is in two of the residuals and would count twice; join distinct facts")
        seen.add(fact.said)
