"""CPU time and memory of `kt.causal_trace` beside the obvious nnsight loop, in one process.

    python benchmarks/speed/trace_speed.py  # the demo model, and a random GPT-2 of 12 layers with d_model 768
    python benchmarks/speed/trace_speed.py --small  # a random GPT-2 of 4 layers with d_model 128: seconds

Both trace mlp, attn and hidden over all layers and tokens with the same noise, and the numbers are compared.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from measure import Row, command, counted, measured, product_rate
from plain_loop import plain_trace

import kt
from kt._util.text import count
from kt.model.tokens import template_span

KINDS = ("mlp", "attn", "hidden")
METRICS = ("prob", "logit_diff")
GOAL, SAMPLES = 5.0, 10
TOLERANCE = 1e-3  # of logits of order 10, after twelve layers in another order of summation


def random_gpt2(layers: int, width: int, vocabulary: int = 50_257) -> kt.TracedModel:
    """A GPT-2 with random weights and a tokenizer of bytes: one token for each character of a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<pad>"])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=max(2, width // 64),
        vocab_size=vocabulary,
        bos_token_id=vocabulary - 1,
        eos_token_id=vocabulary - 1,
    )
    module = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() == 2:
                # Large enough that patches move the logits, and the comparison can fail.
                weight.normal_(0, 0.1 if "wte" in name or "wpe" in name else 1 / weight.shape[0] ** 0.5)
    return kt.load(module, tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>"))


def early_middle_late(model: kt.TracedModel) -> list[kt.Fact]:
    """Three demo facts: nothing left of a late subject needs patching, so the early one is the hard case."""

    def place(fact: kt.Fact) -> float:
        span = template_span(model.tokenizer, fact.template, fact.subject)
        return span.start / len(model.tokenizer(fact.prompt)["input_ids"])

    ordered = sorted(kt.load_facts("demo", limit=200), key=place)
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]]


def compare(name: str, model: kt.TracedModel, facts: list[kt.Fact], goal: float | None) -> Row:
    """The facts, both ways."""
    spans = [template_span(model.tokenizer, fact.template, fact.subject) for fact in facts]
    embeddings = model.module.get_input_embeddings().weight
    draw = torch.Generator().manual_seed(0)
    noise = [torch.randn((SAMPLES, s.stop - s.start, embeddings.shape[1]), generator=draw) for s in spans]
    noise = [draws * 3 * float(embeddings.float().std()) for draws in noise]
    trace, ours = measured(lambda: kt.causal_trace(model, facts, kinds=KINDS, noise=noise, keep="all"))
    if trace.n_facts != len(facts):
        raise SystemExit(f"{name}: {trace.why_left_out()}")
    prompts = list(zip(trace.facts, spans, noise, strict=True))
    loop, theirs = measured(
        lambda: [plain_trace(model, f.ids, *span, draws, f.answer_id, f.foil_id, KINDS) for f, span, draws in prompts]
    )
    difference, moved = 0.0, 0.0
    for fact, found in zip(trace.facts, loop, strict=True):
        for kind in KINDS:
            for m, metric in enumerate(METRICS):
                mine, other = fact.patched[kind][metric], found[kind][m].numpy()
                if not (np.isfinite(mine).all() and np.isfinite(other).all()):
                    raise SystemExit(f"{name}: numbers that are not finite")
                difference = max(difference, float(np.abs(mine - other).max()))
                moved = max(moved, float(np.abs(other - fact.corrupted[metric]).max()))
    if moved < 100 * TOLERANCE:
        raise SystemExit(f"{name}: patches move nothing ({moved:.1e}); the comparison could not fail")
    tokens = ", ".join(str(len(fact.ids)) for fact in trace.facts)
    return Row(
        part="trace",
        work=f"{name}: {count(len(facts), 'fact')} of {tokens} tokens, {SAMPLES} samples, {', '.join(KINDS)}",
        reference="one nnsight trace a site",
        ours=ours,
        theirs=theirs,
        counted=counted(lambda: kt.causal_trace(model, facts, kinds=KINDS, noise=noise, keep="all")),
        rate=product_rate(),
        difference=difference,
        bound=TOLERANCE,
        goal=goal,
    )


def rows(small: bool) -> Iterator[Row]:
    """The demo model and a GPT-2 of 12 layers; or a small GPT-2."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="traced all the same")
    # One token a byte; after a dash an answer brings no space of its own.
    few, twelve = (kt.Fact(f"a{{}}{rest}-", "bcdx", answer="q", foil="z") for rest in ("efg", "efghij"))
    if small:
        yield compare("random GPT-2, 4 layers, d_model 128", random_gpt2(4, 128), [few], None)
        return
    model = kt.load("demo")
    yield compare("demo model", model, early_middle_late(model), GOAL)
    yield compare("random GPT-2, 12 layers, d_model 768", random_gpt2(12, 768), [twelve], GOAL)


if __name__ == "__main__":
    raise SystemExit(command(rows, __doc__))
