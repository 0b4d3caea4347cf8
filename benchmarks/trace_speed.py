"""CPU time and memory of `kt.causal_trace` beside the obvious nnsight loop, in one process.

    python benchmarks/trace_speed.py            # the demo model, and a random GPT-2 of 12 layers with d_model 768
    python benchmarks/trace_speed.py --small    # a random GPT-2 of 4 layers with d_model 128: seconds

Both trace mlp, attn and hidden over all layers and tokens with the same noise; the numbers are compared and the loop's
time must be at least three times ours. Memory is what the process gained at its peak over the loaded model.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch
from plain_loop import plain_trace

import kt

KINDS = ("mlp", "attn", "hidden")
METRICS = ("prob", "logit_diff")
TOLERANCE = 1e-3  # of logits of order 10, after twelve layers in another order of summation


def random_gpt2(layers: int, width: int) -> kt.TracedModel:
    """A GPT-2 with random weights and a tokenizer of bytes: one token for each character of a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<pad>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=max(2, width // 64))
    module = GPT2LMHeadModel(config)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() == 2:
                # Large enough that patches move the logits, and the comparison can fail.
                weight.normal_(0, 0.1 if "wte" in name or "wpe" in name else 1 / weight.shape[0] ** 0.5)
    return kt.load(module, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>"))


def early_middle_late(model: kt.TracedModel) -> list[kt.Fact]:
    """Three demo facts: nothing left of a late subject needs patching, so the early one is the hard case."""

    def place(fact: kt.Fact) -> float:
        span = kt.prompts.template_span(model.tokenizer, fact.template, fact.subject)
        return span.start / len(model.tokenizer(fact.prompt)["input_ids"])

    ordered = sorted(kt.load_facts("demo", limit=200), key=place)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def compare(name: str, model: kt.TracedModel, facts: list[kt.Fact], samples: int) -> dict[str, Any]:
    """The facts, both ways: {cpu seconds, ratio, largest difference, peak memory}."""
    spans = [kt.prompts.template_span(model.tokenizer, fact.template, fact.subject) for fact in facts]
    embeddings = model.module.get_input_embeddings().weight
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn((samples, s.stop - s.start, embeddings.shape[1]), generator=draw) for s in spans]
    noise = [draws * 3 * float(embeddings.float().std()) for draws in noise]
    before, start = peak(), time.process_time()
    trace = kt.causal_trace(model, facts, kinds=KINDS, noise=noise, keep="all")
    ours, memory = time.process_time() - start, peak() - before
    if trace.n_facts != len(facts):
        raise SystemExit(f"{name}: {trace.why_left_out()}")
    plain, difference, moved = 0.0, 0.0, 0.0
    for fact, span, draws in zip(trace.facts, spans, noise, strict=True):
        start = time.process_time()
        found = plain_trace(model, fact.ids, *span, draws, fact.answer_id, fact.foil_id, KINDS)
        plain += time.process_time() - start
        for kind in KINDS:
            for m, metric in enumerate(METRICS):
                mine, theirs = fact.patched[kind][metric], found[kind][m].numpy()
                if not (np.isfinite(mine).all() and np.isfinite(theirs).all()):
                    raise SystemExit(f"{name}: numbers that are not finite")
                difference = max(difference, float(np.abs(mine - theirs).max()))
                moved = max(moved, float(np.abs(theirs - fact.corrupted[metric]).max()))
    return {
        "model": name,
        "layers": model.n_layers,
        "d_model": model.d_model,
        "facts": len(facts),
        "tokens": [len(fact.ids) for fact in trace.facts],
        "first_subject_token": [span.start for span in spans],
        "samples": samples,
        "plain_cpu_s": round(plain, 2),
        "kt_cpu_s": round(ours, 2),
        "kt_over_plain": round(ours / plain, 3),
        "max_difference": difference,
        "largest_effect": moved,
        "model_mib": round(sum(p.numel() * p.element_size() for p in model.module.parameters()) / 2**20, 1),
        "kt_extra_peak_mib": round(memory, 1),
    }


def peak() -> float:
    """The process's largest resident memory so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="only a small random GPT-2")
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--only", choices=("demo", "gpt2"), help="one of the two models")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="traced all the same")
    made = []
    # One token a byte; after a dash an answer brings no space of its own.
    small, twelve = (kt.Fact(f"a{{}}{rest}-", "bcdx", answer="q", foil="z") for rest in ("efg", "efghij"))
    if chosen.small:
        made.append(compare("random GPT-2, small", random_gpt2(4, 128), [small], chosen.samples))
    else:
        if chosen.only != "gpt2":
            model = kt.load("demo")
            made.append(compare("demo", model, early_middle_late(model), chosen.samples))
        if chosen.only != "demo":
            made.append(compare("random GPT-2", random_gpt2(12, 768), [twelve], chosen.samples))
    sys.stdout.write(json.dumps(made, indent=2) + "\n")
    held = all(row["kt_over_plain"] <= 1 / 3 and row["max_difference"] <= TOLERANCE for row in made)
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
