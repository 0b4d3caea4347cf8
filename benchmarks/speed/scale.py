"""What a model and a number of facts need, counted: operations, memory, disk; seconds at a rate that is given.

    python benchmarks/speed/scale.py --config llama-70b --facts 100000 --tflops 160  # one of SHAPES below
    python benchmarks/speed/scale.py --check  # the formulas beside what PyTorch counts

The formulas count matrix products only. How far above them the shipped code lies is measured by `make bench` (docs/
performance.md, "x floor"); `--check` says how far their counts are from those of PyTorch's FlopCounterMode.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any, NamedTuple


class Shape(NamedTuple):
    """A decoder's sizes; `parts` is 3 for a gated MLP, 2 for a plain one; `kv` the width of keys and values."""

    layers: int
    d_model: int
    d_key: int
    kv: int
    parts: int
    vocabulary: int

    @property
    def block(self) -> int:
        """Weights of a block's linear maps."""
        return 2 * self.d_model * (self.d_model + self.kv) + self.parts * self.d_model * self.d_key

    @property
    def head(self) -> int:
        return self.d_model * self.vocabulary

    @property
    def weights(self) -> int:
        return self.layers * self.block + self.head


SHAPES = {
    "gpt2": Shape(12, 768, 3072, 768, 2, 50_257),
    "qwen2.5-7b": Shape(28, 3584, 18_944, 512, 3, 152_064),
    "llama-70b": Shape(80, 8192, 28_672, 1024, 3, 128_256),
}


def trace_operations(s: Shape, tokens: int, first: int, samples: int, kinds: int) -> int:
    """One fact: `kinds` modules restored at every layer and token from `first` on (not the residual stream)."""
    last = tokens - 1
    cells = 0
    for token in range(first, tokens):
        layers = s.layers if token == last else s.layers - 1  # the last block's reach nothing, off the last token
        cells += sum((tokens - token) * (s.layers - layer) * 2 * s.block + 2 * s.head for layer in range(layers))
    return kinds * samples * cells + (1 + samples) * (tokens * s.layers * 2 * s.block + 2 * s.head)


def target_operations(s: Shape, tokens: int, suffix: int, start: int, steps: int, rows: int, target: int) -> int:
    """One request: whole rows once; steps over the suffix from block `start` on, the last without a backward."""
    once = rows * tokens * s.layers * 2 * s.block
    step = rows * (suffix * (s.layers - start) * 2 * s.block + target * 2 * s.head)
    return once + (2 * steps - 1) * step


def statistics_operations(s: Shape, tokens: int, last: int, moments: int) -> int:
    """`moments` down_projs up to layer `last`, lower triangles in eight strips."""
    return tokens * ((last + 1) * 2 * s.block + moments * s.d_key**2 * 9 // 8)


def factor_operations(s: Shape) -> int:
    return s.d_key**3 // 3


def lines(s: Shape, facts: int, tflops: float, traced: int, moments: int, start: int) -> list[tuple[str, str, str]]:
    """What, how much, and how long at this rate (float64 solves: at 50 GFLOP/s, a core's)."""
    gib = lambda n: f"{n / 2**30:,.1f} GiB"  # noqa: E731

    def hours(operations: float, rate: float) -> str:
        seconds = operations / rate
        return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 3600:,.1f} h"

    gpu = 1e12 * tflops
    trace = traced * trace_operations(s, 12, 1, 10, 2)
    cov = statistics_operations(s, 100_000, start, moments)
    targets = facts * target_operations(s, 24, 8, start, 25, 7, 2)
    solve = moments * factor_operations(s)
    return [
        ("weights, bf16", gib(2 * s.weights), ""),
        (f"trace of {traced:,} facts (12 tokens, 10 samples, mlp and attn)", f"{trace:.1e} FLOP", hours(trace, gpu)),
        (f"C of {moments} down_projs over 100,000 tokens", f"{cov:.1e} FLOP", hours(cov, gpu)),
        ("- running sums, float64", gib(8 * moments * s.d_key**2), ""),
        ("- kept on disk, C and its factor", gib(12 * moments * s.d_key**2), ""),
        (f"targets of {facts:,} facts (25 steps, 7 rows)", f"{targets:.1e} FLOP", hours(targets, gpu)),
        (f"factors of {moments} C, once", f"{solve:.1e} FLOP", hours(solve, 5e10)),
        ("- memory while factoring one", gib(24 * s.d_key**2), ""),
        (f"solves of {facts:,} facts in batches of 100", *_solves(s, facts, moments, hours)),
        ("the edit file: the smaller of factors and dense ΔW, float32", gib(_stored(s, facts, moments)), ""),
    ]


def _solves(s: Shape, facts: int, moments: int, hours: Any) -> tuple[str, str]:
    operations = 4.0 * moments * s.d_key**2 * facts
    return f"{operations:.1e} FLOP", hours(operations, 5e10)


def _stored(s: Shape, facts: int, moments: int) -> int:
    return 4 * moments * min(facts * (s.d_model + s.d_key), s.d_model * s.d_key)


def check() -> int:
    """The formulas beside PyTorch's count, on a small GPT-2: (formula - count) / count."""
    from measure import counted
    from statistics_speed import take
    from trace_speed import random_gpt2

    import kt
    from kt.editing.closed_form.aims import TargetSite
    from kt.editing.closed_form.contexts import Contexts
    from kt.editing.closed_form.objective import NLL, ClampNorm, Objective, WeightDecay
    from kt.editing.closed_form.targets import find_targets
    from kt.facts.corpus import Corpus
    from kt.model.sites import Kind, Site

    warnings.filterwarnings("ignore")
    layers, width, vocabulary = 6, 128, 300
    model, s = random_gpt2(layers, width, vocabulary), Shape(layers, width, 4 * width, width, 2, vocabulary)
    fact = kt.Fact("a{}efghij-", "bcdx", answer="q", foil="z", target="x")
    contexts, aim = Contexts((("{}",),)), TargetSite(Site(Kind.RESID, 2))
    objective = Objective((NLL(), WeightDecay(), ClampNorm()), steps=5)
    found = {
        "trace": (
            trace_operations(s, 12, 1, 10, 2),
            counted(lambda: kt.causal_trace(model, fact, kinds=("mlp", "attn"), samples=10, keep="all")),
        ),
        "targets": (
            target_operations(s, 12, 8, 3, 5, 1, 1),
            counted(lambda: find_targets(model, [fact], [aim], contexts, objective)),
        ),
        "statistics": (
            statistics_operations(s, 4096, 3, 2),
            counted(lambda: take(model, [Site(Kind.MLP, 2), Site(Kind.MLP, 3)], Corpus.open("demo"), 4096)),
        ),
    }
    for name, (formula, count) in found.items():
        sys.stdout.write(f"{name}: {formula:.3e} by formula, {count:.3e} counted ({formula / count - 1:+.0%})\n")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=SHAPES, default="llama-70b")
    parser.add_argument("--facts", type=int, default=100_000)
    parser.add_argument("--traced", type=int, default=1000, help="facts that are traced")
    parser.add_argument("--moments", type=int, default=5, help="down_projs that are edited")
    parser.add_argument("--last", type=int, default=8, help="the last layer of these")
    parser.add_argument("--tflops", type=float, default=160.0, help="what the GPUs together do of bf16 products")
    parser.add_argument("--check", action="store_true", help="the formulas beside PyTorch's count")
    chosen = parser.parse_args()
    if chosen.check:
        return check()
    rows = lines(SHAPES[chosen.config], chosen.facts, chosen.tflops, chosen.traced, chosen.moments, chosen.last)
    sys.stdout.write("| what | how much | time |\n| --- | --- | --- |\n")
    for row in rows:
        sys.stdout.write(f"| {' | '.join(row)} |\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
