"""Traces as files, and several traces as one."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from ..artifacts import load_arrays, save_arrays, whole
from ..errors import BadFact, BadFile
from ..prompts import Span
from .cases import LeftOut
from .patches import Patch
from .trace import METRICS, Trace, TracedFact

FILE_KIND = "trace"
OLDER = {"direction": "denoise", "method": "exact"}
"""What files said nothing of while there was no choice."""
_SAME = ("model", "revision", "n_layers", "window", "corrupt", "direction", "method", "keep", "min_gap")
"""What traces must share before their facts are averaged together."""


def save(trace: Trace, path: str | os.PathLike[str]) -> Path:
    """Arrays `<n>.corrupted.<metric>` (sample) and `<n>.<kind>.<metric>` (layer, token, sample) of the n-th fact."""
    arrays: dict[str, ndarray] = {}
    for i, fact in enumerate(trace.facts):
        for metric in METRICS:
            arrays[f"{i}.corrupted.{metric}"] = fact.corrupted[metric].astype(np.float32)
            for kind in trace.kinds:
                arrays[f"{i}.{kind}.{metric}"] = fact.patched[kind][metric].astype(np.float32)
    return save_arrays(
        path,
        arrays,
        {
            "kind": FILE_KIND,
            "kinds": list(trace.kinds),
            "facts": [_described(fact) for fact in trace.facts],
            "left_out": [fact._asdict() for fact in trace.left_out],
            "run": dict(trace.metadata),
        },
    )


def load(path: str | os.PathLike[str]) -> Trace:
    """Read a trace.

    Raises:
        BadFile: the file is no trace, or not a whole one.
    """
    arrays, header = load_arrays(path, kind=FILE_KIND)
    with whole(path, "trace", "trace again"):
        try:
            kinds = tuple(Patch.parse(kind).label for kind in header["kinds"])
        except BadFact as error:
            raise BadFile(f"{path}: not a whole trace ({error}); trace again") from error
        facts = tuple(_read(fact, i, kinds, arrays) for i, fact in enumerate(header["facts"]))
        left_out = tuple(LeftOut(**fact) for fact in header["left_out"])
        return Trace(facts, kinds, left_out, OLDER | header["run"])


def merge(traces: Sequence[Trace]) -> Trace:
    """See `Trace.merge`."""
    first = traces[0]
    for trace in traces[1:]:
        for name in _SAME:
            if trace.metadata[name] != first.metadata[name]:
                raise BadFact(
                    f"traces of {name} {first.metadata[name]!r} and {trace.metadata[name]!r} do not merge; "
                    "trace both the same way"
                )
        if set(trace.kinds) != set(first.kinds):
            raise BadFact(f"traces of kinds {_names(first)} and {_names(trace)} do not merge; trace both the same way")
    seen: set[tuple[Any, ...]] = set()
    facts, left_out, start = [], [], 0
    for trace in traces:
        for fact in trace.facts:
            said = (fact.prompt, fact.subject, fact.answer_id, fact.foil_id)
            if said in seen:
                raise BadFact(f"{fact.prompt!r} is in two of the traces and would count twice; merge distinct facts")
            seen.add(said)
            facts.append(replace(fact, index=fact.index + start))
        left_out += [one._replace(fact=one.fact + start) for one in trace.left_out]
        start += int(trace.metadata["n_given"])
    return Trace(tuple(facts), first.kinds, tuple(left_out), _merged_metadata(traces, start))


def _merged_metadata(traces: Sequence[Trace], n_given: int) -> dict[str, Any]:
    """The first trace's, with lists where the traces differ (the noise level follows from the facts)."""
    merged = dict(traces[0].metadata)
    for name in ("noise_level", "noise_scale", "noise", "seed", "dtype"):
        values = [value for trace in traces for value in _listed(trace.metadata[name])]
        merged[name] = values[0] if all(v == values[0] for v in values) else values
    merged["metrics"] = [m for m in METRICS if all(m in trace.metrics for trace in traces)]
    merged["samples"] = sorted({s for trace in traces for s in trace.metadata["samples"]})
    merged["warnings"] = [text for trace in traces for text in trace.metadata["warnings"]]
    return merged | {"n_given": n_given}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _names(trace: Trace) -> str:
    return ", ".join(trace.kinds)


def _described(fact: TracedFact) -> dict[str, Any]:
    plain = {f.name: getattr(fact, f.name) for f in fields(fact) if f.name not in ("corrupted", "patched")}
    return plain | {"clean": dict(fact.clean), "span": list(fact.span)}


def _read(fact: dict[str, Any], i: int, kinds: Sequence[str], arrays: dict[str, ndarray]) -> TracedFact:
    lists = {name: tuple(fact[name]) for name in ("ids", "tokens", "roles")}
    return TracedFact(
        **fact
        | lists
        | {
            "span": Span(*fact["span"]),
            "corrupted": {m: arrays[f"{i}.corrupted.{m}"] for m in METRICS},
            "patched": {k: {m: arrays[f"{i}.{k}.{m}"] for m in METRICS} for k in kinds},
        }
    )
