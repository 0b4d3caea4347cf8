"""What evaluation reads on the demo model: tokens, forwards and CPU seconds, beside asking everything by itself.

    python benchmarks/speed/eval_tokens.py            # the first 100 demo facts, minutes

"By itself" is the simple path that tests compare the other one with: a row for every answer, a generation for every
text. Tokens are counted by a hook on the embedding, padding included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from measure import measured

import kt
from kt.evaluation.run import Options, plan_questions
from kt.evaluation.samples import samples_of
from kt.model.sampling import continuations, continue_one_by_one
from kt.model.scoring import teacher_force

FACTS = 100
HEAD = "| asked | tokens, by itself | tokens | forwards, by itself | forwards | CPU s, by itself | CPU s |"


def counts(model: kt.TracedModel, call: Callable[[], Any]) -> tuple[str, str, str]:
    """Tokens and forwards of a call, and its CPU seconds."""
    read: list[int] = []
    embed = model.module.get_input_embeddings()
    hook = embed.register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    cost = measured(call)[1]
    hook.remove()
    return f"{sum(read):,}", f"{len(read):,}", f"{cost.cpu_s:.1f}"


def lines(model: kt.TracedModel) -> Iterator[str]:
    """The rows of the table as Markdown."""
    samples = samples_of(kt.load_facts("demo", limit=FACTS))
    for protocols in (("tf",), ("tf", "prob"), ("gen",), ("gen", "wild")):
        plan = plan_questions(model, samples, Options(protocols, 64, 0, "auto", None, compared=False, reference=None))
        if plan.forced:
            alone = partial(teacher_force, model, plan.forced, share_prefixes=False)
            together = partial(teacher_force, model, plan.forced)
        else:
            alone = partial(continue_one_by_one, model, plan.written)
            together = partial(continuations, model, plan.written)
        pairs = zip(counts(model, alone), counts(model, together), strict=True)
        cells = " | ".join(figure for pair in pairs for figure in pair)
        yield f"| `{','.join(protocols)}`: {'answers' if plan.forced else 'greedy texts'} | {cells} |"


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    sys.stdout.write("\n".join([HEAD, "|" + " --- |" * 7, *lines(kt.load("demo"))]) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
