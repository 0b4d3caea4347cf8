"""Result objects as the JSON that `--json` and `results.json` hold; every mean with its n and 95% interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..edit_run import EditRun
    from ..editing import Edit
    from ..editing.edit import RequestReport
    from ..probing import Probe
    from ..tracing import Balance, Trace
    from ..tracing.screen import Screen as AttributionScreen


def results_of_trace(trace: Trace) -> dict[str, Any]:
    """`kinds.<kind>.<metric>` = [token of a single fact, or role of several][layer], and the same for intervals.

    Several facts' intervals and n are over facts, a single fact's over its noise draws.
    """
    from ..tracing.show import grid

    cells = {str(kind): {metric: grid(trace, kind, metric) for metric in trace.metrics} for kind in trace.kinds}
    first = next(iter(next(iter(cells.values())).values()))
    single = trace.n_facts == 1
    return {
        "model": trace.metadata["model"],
        "direction": trace.metadata["direction"],
        "method": trace.metadata["method"],
        "n_facts": trace.n_facts,
        "left_out": [fact._asdict() for fact in trace.left_out],
        "rows": first["rows"] if single else trace.by_role(trace.kinds[0], trace.metrics[0], n_boot=1).roles,
        "subject_rows": first["subject_rows"],
        "kinds": {k: {m: found["values"] for m, found in by.items()} for k, by in cells.items()},
        "intervals": {k: {m: _interval(found) for m, found in by.items()} for k, by in cells.items()},
        "tests": {k: {m: {n: found[n] for n in ("p", "q")} for m, found in by.items()} for k, by in cells.items()},
        "curves": {str(k): {m: trace.curve(k, m)._asdict() for m in trace.metrics} for k in trace.kinds},
        **_baselines(trace),
    }


def _interval(found: dict[str, Any]) -> dict[str, Any]:
    return {name: found[name] for name in ("low", "high", "n")}


def _baselines(trace: Trace) -> dict[str, Any]:
    """The answer's probability in the clean and the corrupted run, means over facts."""
    from ..stats import bootstrap_mean

    clean = bootstrap_mean([fact.p_clean for fact in trace.facts])
    corrupted = bootstrap_mean([fact.p_corrupt for fact in trace.facts])
    return {
        "clean": clean.mean,
        "clean_ci95": clean.ci95,
        "corrupted": corrupted.mean,
        "corrupted_ci95": corrupted.ci95,
    }


def results_of_screen(screen: AttributionScreen) -> dict[str, Any]:
    """How well the estimate ranked the cells, what it took, and the cells that were patched."""
    found = {name: getattr(screen, name) for name in ("correlation", "correlation_checked", "recall")}
    return {
        "metric": screen.metric,
        "top": screen.top,
        "complete": screen.complete,
        "seconds": dict(screen.seconds),
        **{name: None if value is None else value.as_dict() for name, value in found.items()},
        "cells": screen.checked.to_dict("records"),
    }


def results_of_probe(probe: Probe) -> dict[str, Any]:
    """`positions.<position>.<answer>.rank` and `.prob`: the residual stream's means by layer.

    `kinds.<kind>.<position>.<answer>.<metric>.<mean|median>` holds every kind with intervals, `sets` the word sets.
    """
    from ..probing.result import METRICS, STATISTICS

    def curves(kind: str, position: str, answer: str) -> dict[str, Any]:
        return {m: {s: probe.curve(kind, position, answer, m, s)._asdict() for s in STATISTICS} for m in METRICS}

    kinds = {k: {p: {a: curves(k, p, a) for a in probe.answers} for p in probe.positions} for k in probe.kinds}
    brief = {
        position: {answer: {m: by[m]["mean"]["mean"] for m in METRICS} for answer, by in answers.items()}
        for position, answers in kinds["resid"].items()
    }
    found = {
        "model": probe.metadata["model"],
        "final_norm": probe.metadata["final_norm"],
        "n_facts": probe.n_facts,
        "n_same_first_token": len(probe.same_first_token),
        "left_out": [fact._asdict() for fact in probe.left_out],
        "layers": probe.layers,
        "positions": brief,
        "kinds": kinds,
        "stages": probe.stages.as_dict(),
    }
    if probe.set_names:
        found["sets"] = {
            p: {name: probe.set_curve(name, "resid", p)._asdict() for name in probe.set_names} for p in probe.positions
        }
    return found


def results_of_balance(balance: Balance) -> dict[str, Any]:
    """α (clamped and raw), its interval, and what each layer contributes."""
    return {
        "alpha": balance.alpha,
        "alpha_raw": balance.alpha_raw,
        "ci95": balance.ci95,
        "n_facts": balance.n_facts,
        "per_layer": balance.per_layer,
        "layers": balance.layers,
        "per_fact": balance.to_dataframe().to_dict("records"),
        "warnings": balance.warnings,
    }


def results_of_edit(edit: Edit, path: str | None) -> dict[str, Any]:
    """The file, what each weight gets, what each request gains."""
    known = ("method", "alpha", "model")
    about: dict[str, Any] = {name: edit.manifest[name] for name in known if name in edit.manifest}
    for name in ("alphas", "value_change", "lost_to_rounding"):
        if edit.manifest.get(name):
            about[name] = edit.manifest[name]
    return {**about, "edit": path, "deltas": edit.deltas(), "requests": [_request(r) for r in edit.report]}


def results_of_run(run: EditRun, path: str | None) -> dict[str, Any]:
    """The edit as a whole (in single mode, its weights' means over the edits), the course, the scores."""
    if run.edit is not None:
        found = results_of_edit(run.edit, path)
    else:
        found = results_of_edit(run.edits[0], path)
        found["deltas"] = _mean_deltas([edit.deltas() for edit in run.edits])
        found["requests"] = [_request(r) for edit in run.edits for r in edit.report]
    found["mode"] = run.steps.mode
    if len(run.steps.steps) > 1:
        found["steps"] = run.steps.as_dict()["steps"]
    for name in ("before", "after", "control"):
        if (scores := getattr(run, name)) is not None:
            found[name] = scores.as_dict()["metrics"]
            found["protocol"] = scores.protocol
    return found


def _mean_deltas(edits: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each weight's norms as means over the edits that write it, with how many those are."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for deltas in edits for name in deltas):
        own = [deltas[name] for deltas in edits if name in deltas]
        means = {key: sum(d[key] for d in own) / len(own) for key in ("norm", "relative_norm", "norm_ratio")}
        found[name] = {"shape": own[0]["shape"], "rank": max(d["rank"] for d in own), **means, "n": len(own)}
    return found


def _request(report: RequestReport) -> dict[str, Any]:
    def change(pair: tuple[Any, Any] | None) -> dict[str, Any] | None:
        return None if pair is None else {"before": pair[0], "after": pair[1]}

    measured = ("target_prob", "target_rank", "answer_prob", "answer_rank")
    words = ("id", "prompt", "subject", "target", "answer")
    said = {w: getattr(report, w) for w in words} | {m: change(getattr(report, m)) for m in measured}
    return said | {"control_prob": report.control_prob}
