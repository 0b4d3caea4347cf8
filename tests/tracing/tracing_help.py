"""Facts whose tokens the tiny tokenizer knows, noise for them, and the comparison with the plain loop."""

import sys
from pathlib import Path

import numpy as np
import torch

import kt
import kt.model.tokens

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from plain_loop import plain_trace  # noqa: E402

KINDS = ("mlp", "attn", "hidden")
FACTS = (
    kt.Fact("The {} is", "France", id="fr", relation="capital"),
    kt.Fact("city of {} in the", "Paris", id="pa"),
    kt.Fact("The {} of", "Rapinoe", id="ra", relation="capital"),
)
TOLERANCE = 1e-5
"""Largest difference of float32 probabilities and logits between two orders of the same sums."""


def draws(model, facts, samples=2):
    """Noise for a list of facts, large enough to move every logit."""
    torch.manual_seed(3)
    width = model.module.get_input_embeddings().weight.shape[1]
    spans = [kt.model.tokens.template_span(model.tokenizer, f.template, f.subject) for f in facts]
    return [2 * torch.randn(samples, s.stop - s.start, width) for s in spans]


def assert_equals_plain_loop(model, facts, window=1, kinds=KINDS, direction="denoise", **options):
    """Every cell of every kind, and that patching moved the logits at all."""
    noise = draws(model, facts)
    how = {"kinds": kinds, "window": window, "direction": direction}
    trace = kt.causal_trace(model, facts, noise=noise, keep="all", **how, **options)
    assert trace.n_facts == len(facts)
    for fact, added in zip(trace.facts, noise, strict=True):
        asked = (fact.ids, *fact.span, added, fact.answer_id, fact.foil_id, kinds)
        found = plain_trace(model, *asked, window=window, direction=direction)
        unpatched = fact.corrupted if direction == "denoise" else fact.clean
        for kind in kinds:
            for m, metric in enumerate(("prob", "logit_diff")):
                ours, plain = fact.patched[kind][metric], found[kind][m].numpy()
                assert np.isfinite(ours).all() and np.isfinite(plain).all()
                assert np.abs(ours - plain).max() < TOLERANCE, (kind, metric)
            assert np.abs(plain - unpatched["logit_diff"]).max() > 100 * TOLERANCE, "nothing was patched"
