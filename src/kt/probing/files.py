"""Probes as files, and several probes as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from ..artifacts import load_arrays, save_arrays, whole
from ..errors import BadFact
from ..tracing.cases import LeftOut
from .lens import KINDS, POSITIONS, Reading
from .questions import ANSWERS, ProbedFact
from .result import Probe

FILE_KIND = "probe"
_SAME = ("model", "revision", "n_layers", "vocab", "final_norm")
"""What probes must share before their facts are averaged together."""


def save(probe: Probe, path: str | os.PathLike[str]) -> Path:
    """The arrays of `Reading` by name, with its axes; facts and metadata in the header."""
    arrays = {name: array for name, array in probe.reading._asdict().items() if array is not None}
    header = {
        "kind": FILE_KIND,
        "layers": list(probe.layers),
        "set_names": list(probe.set_names),
        "facts": [asdict(fact) for fact in probe.facts],
        "left_out": [fact._asdict() for fact in probe.left_out],
        "run": dict(probe.metadata),
    }
    return save_arrays(path, arrays, header)


def load(path: str | os.PathLike[str]) -> Probe:
    """Read a probe.

    Raises:
        BadFile: the file is no probe, or not a whole one.
    """
    arrays, header = load_arrays(path, kind=FILE_KIND)
    with whole(path, "probe", "probe again"):
        facts = tuple(ProbedFact(**fact) for fact in header["facts"])
        left_out = tuple(LeftOut(**fact) for fact in header["left_out"])
        layers, names, run = tuple(header["layers"]), tuple(header["set_names"]), dict(header["run"])
        reading = Reading(**{"sets": None} | arrays)
        _check_shapes(reading, len(facts), len(layers), len(names))
        if missing := [name for name in (*_SAME, "dtype", "n_given", "warnings") if name not in run]:
            raise ValueError(f"the header lacks {', '.join(missing)}")
        return Probe(facts, layers, reading, names, left_out, run)


def _check_shapes(reading: Reading, n_facts: int, n_layers: int, n_sets: int) -> None:
    sites, start = (n_facts, len(POSITIONS), len(KINDS), n_layers), (n_facts, len(POSITIONS))
    wanted: dict[str, tuple[tuple[int, ...], type]] = {
        "prob": ((*sites, len(ANSWERS)), np.float32),
        "rank": ((*sites, len(ANSWERS)), np.int32),
        "start_prob": ((*start, len(ANSWERS)), np.float32),
        "start_rank": ((*start, len(ANSWERS)), np.int32),
    }
    if n_sets or reading.sets is not None:
        wanted["sets"] = ((*sites, n_sets), np.float32)
    for name, (shape, dtype) in wanted.items():
        array: ndarray | None = getattr(reading, name)
        if array is None or array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name} should be {np.dtype(dtype)} of shape {shape}")


def merge(probes: Sequence[Probe]) -> Probe:
    """See `Probe.merge`."""
    first = probes[0]
    for probe in probes[1:]:
        _must_match(first, probe)
    seen: set[tuple[Any, ...]] = set()
    facts: list[ProbedFact] = []
    left_out: list[LeftOut] = []
    start = 0
    for probe in probes:
        said = {fact.said for fact in probe.facts}
        for fact in probe.facts:
            if fact.said in seen:
                raise BadFact(f"{fact.prompt!r} is in two of the probes and would count twice; merge distinct facts")
            facts.append(replace(fact, index=fact.index + start))
        seen |= said
        left_out += [one._replace(fact=one.fact + start) for one in probe.left_out]
        start += int(probe.metadata["n_given"])
    parts = zip(*(probe.reading for probe in probes), strict=True)
    reading = Reading(*(None if some[0] is None else np.concatenate(some) for some in parts))  # type: ignore[arg-type]
    metadata = _merged_metadata(probes, start)
    return Probe(tuple(facts), first.layers, reading, first.set_names, tuple(left_out), metadata)


def _must_match(first: Probe, other: Probe) -> None:
    pairs = [(name, first.metadata[name], other.metadata[name]) for name in _SAME]
    pairs += [("layers", first.layers, other.layers), ("word sets", first.set_names, other.set_names)]
    for name, here, there in pairs:
        if here != there:
            raise BadFact(f"probes of {name} {here!r} and {there!r} do not merge; probe both the same way")


def _merged_metadata(probes: Sequence[Probe], n_given: int) -> dict[str, Any]:
    """The first probe's, with a list of dtypes where they differ."""
    dtypes = [
        d
        for p in probes
        for d in ([p.metadata["dtype"]] if isinstance(p.metadata["dtype"], str) else p.metadata["dtype"])
    ]
    distinct = list(dict.fromkeys(dtypes))
    return dict(probes[0].metadata) | {
        "dtype": distinct[0] if len(distinct) == 1 else distinct,
        "warnings": [text for probe in probes for text in probe.metadata["warnings"]],
        "n_given": n_given,
    }
