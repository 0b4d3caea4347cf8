"""What the figures and tables of a trace are called: metrics, kinds, titles and subtitles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._util.text import count, runs_of, without_folders
from .traced_fact import WHOLE, metric_name

if TYPE_CHECKING:
    from .trace import Trace

METRIC_NAMES = {
    "prob": "probability",
    "logit_diff": "logit difference",
    "log_prob": "log p of the whole answer",
    "log_prob_diff": "log p difference of whole answer and foil",
}
METRIC_TITLES = {m: f"{name} restored" + " (eq. 8)" * m.endswith("diff") for m, name in METRIC_NAMES.items()}
NOISE_TITLES = {m: f"{name} taken away" for m, name in METRIC_NAMES.items()}
KIND_TITLES = {"mlp": "MLP", "attn": "Attention", "hidden": "Hidden state"}


def metric_title(trace: Trace, metric: str) -> str:
    """Denoising restores what noising takes away; see trace.py."""
    return (NOISE_TITLES if trace.metadata.get("direction") == "noise" else METRIC_TITLES)[metric_name(metric)]


def title_of(trace: Trace) -> str:
    if trace.n_facts == 1:
        return f"{trace.facts[0].prompt} → {trace.facts[0].answer}"
    return f"Causal tracing of {trace.n_facts} facts"


def subtitle_of(trace: Trace, *metrics: str) -> str:
    window = int(trace.metadata["window"])
    parts = [without_folders(trace.metadata["model"]), f"window of {window} layers" if window > 1 else "single layers"]
    parts += ["corrupted states in the clean run"] * (trace.metadata.get("direction") == "noise")
    parts += ["estimated by attribution patching"] * (trace.metadata.get("method") == "atp")
    parts += [f"{word} in layers {runs_of(layers)}" for word, layers in trace.other_mixers.items()]
    if at := trace.metadata.get("at"):
        parts.append(f"at token {at} of the answer")
    if trace.n_facts == 1:
        fact = trace.facts[0]
        parts.append(f"foil {fact.foil} ({fact.foil_source})")
        if hidden := len(trace.patched_tokens(fact)) - len(trace.shown_tokens(fact)):
            parts.append(f"{count(hidden, 'token')} far before the subject left out")
    whole = [metric_name(metric) in WHOLE for metric in metrics]
    if not all(whole):
        clean, corrupt = (np.mean([getattr(f, name) for f in trace.facts]) for name in ("p_clean", "p_corrupt"))
        parts.append(f"p(answer) {clean:.2f} clean, {corrupt:.2f} corrupted")
    if any(whole):
        lengths = sorted({len(fact.answer_ids) for fact in trace.facts})
        tokens = count(lengths[0], "token") if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]} tokens"
        runs = [f.clean for f in trace.facts], [f.corrupted for f in trace.facts]
        clean, corrupt = (np.mean([np.mean(run["log_prob"]) for run in of_facts]) for of_facts in runs)
        parts.append(f"log p of the whole answer, {tokens}: {clean:.2f} clean, {corrupt:.2f} corrupted")
    return " · ".join(parts)
